"""The cursor row as the lock: two writers, takeovers, lost connections; the alarm when a LID is stored."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import threading
from collections import Counter
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from monitor import cursor
from monitor.batch import Batch
from monitor.cursor import Owner
from monitor.database import Database, connect
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.embedded import EmbeddedPostgres
from monitor.errors import ConfigError, CursorLostError, StoreError, StoreRefusedError, StoreUnavailableError
from monitor.identity import Known, Phone, parse_jid
from monitor.messages import Place
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import load_projects
from monitor.schema import check_reviews, prepare
from monitor.settings import DatabaseUrl
from monitor.store import Store
from monitor.totals import Totals

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Rows = Callable[..., list[tuple[Any, ...]]]
    Eventually = Callable[[Callable[[], bool]], None]

PHONE = "27711234567"
LID = "100000000000017"


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(connect(DatabaseUrl(database_url))) as opened:
        prepare(opened)
        yield opened


def _claim(database: Database, owner: Owner, lease_seconds: float = 30) -> cursor.Claim | None:
    seen = cursor.look(database, "bridge")
    if seen is None:
        cursor.begin(database, "bridge", owner=owner, lease_seconds=lease_seconds, place=Place(), since=None)
        seen = cursor.look(database, "bridge")
    assert seen is not None
    if not seen.may_be_claimed():
        return None
    return cursor.claim(database, "bridge", seen, owner, lease_seconds)


def _elsewhere() -> Owner:
    return Owner("another-host/boot/ns", 4711, "12345")


def test_living_owner_is_not_taken_over_until_it_releases(database: Database) -> None:
    first = _claim(database, Owner.of_this_process())
    assert first is not None
    assert _claim(database, _elsewhere()) is None
    cursor.release(database, first)
    second = _claim(database, _elsewhere())
    assert second is not None
    assert second.epoch == first.epoch + 1


def test_dead_process_of_this_host_is_taken_over_at_once(database: Database) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    dead = replace(Owner.of_this_process(), pid=child, started="1")  # a zombie, not reaped yet
    assert _claim(database, dead) is not None
    assert _claim(database, Owner.of_this_process()) is not None
    os.waitpid(child, 0)


def test_pid_that_was_used_again_does_not_pass_for_its_predecessor() -> None:
    assert replace(Owner.of_this_process(), started="1").is_dead()
    assert not Owner.of_this_process().is_dead()


def test_owner_on_another_host_is_never_declared_dead_before_its_lease_ran_out(
    database: Database, rows: Rows
) -> None:
    assert _claim(database, _elsewhere()) is not None
    assert _claim(database, Owner.of_this_process()) is None
    rows("UPDATE wa_monitor.cursor SET renewed_at = now() - interval '31 seconds'")
    assert _claim(database, Owner.of_this_process()) is not None


def test_sign_of_life_between_look_and_claim_keeps_the_owner(database: Database) -> None:
    held = _claim(database, _elsewhere())
    assert held is not None
    cursor.release(database, held)
    seen = cursor.look(database, "bridge")
    assert seen is not None
    assert cursor.claim(database, "bridge", seen, _elsewhere(), 30) is not None
    assert cursor.claim(database, "bridge", seen, Owner.of_this_process(), 30) is None


def test_row_that_a_frozen_owner_holds_locked_is_left_for_the_next_look(
    database: Database, database_url: str
) -> None:
    held = _claim(database, _elsewhere())
    assert held is not None
    cursor.release(database, held)
    seen = cursor.look(database, "bridge")
    assert seen is not None
    with psycopg.connect(database_url) as frozen:
        frozen.execute("SELECT FROM wa_monitor.cursor FOR UPDATE")
        assert cursor.claim(database, "bridge", seen, Owner.of_this_process(), 30) is None
    assert cursor.claim(database, "bridge", seen, Owner.of_this_process(), 30) is not None


def test_single_pass_beside_a_running_monitor_is_refused_and_names_it(
    start_monitor: Any, relay_once: Any
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    with pytest.raises(StoreError, match=f"held by pid {monitor.process.pid} on"):
        relay_once()


def test_former_owner_writes_nothing(database: Database, projects_file: Path, rows: Rows) -> None:
    held = _claim(database, _elsewhere())
    assert held is not None
    store = Store(database, held, load_projects(projects_file), check_table=check_reviews)
    rows("UPDATE wa_monitor.cursor SET epoch = epoch + 1")
    with pytest.raises(CursorLostError):
        store.write(Place(), Batch([]), Place(rowid=9), Known())
    with pytest.raises(CursorLostError):
        store.renew()
    assert rows("SELECT place_rowid FROM wa_monitor.cursor") == [(0,)]


def test_owner_whose_place_moved_under_it_writes_nothing(
    database: Database, projects_file: Path, rows: Rows
) -> None:
    held = _claim(database, _elsewhere())
    assert held is not None
    store = Store(database, held, load_projects(projects_file), check_table=check_reviews)
    rows("UPDATE wa_monitor.cursor SET place_rowid = 5")
    with pytest.raises(CursorLostError):
        store.write(Place(rowid=3), Batch([]), Place(rowid=9), Known())


def test_two_first_starts_at_once_migrate_once(database_url: str, rows: Rows) -> None:
    failures: list[BaseException] = []

    def start() -> None:
        try:
            with closing(connect(DatabaseUrl(database_url))) as opened:
                prepare(opened)
        except StoreError as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert rows("SELECT version FROM wa_monitor.migration ORDER BY 1") == [(1,), (2,), (3,), (4,), (5,)]


# real processes


def _post(bridge: SyntheticBridge, number: int, sender: str = PHONE) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=sender, content=f"DR{1000000 + number}")


def _freeze(process: subprocess.Popen[bytes], bridge: SyntheticBridge) -> None:
    """Stop a monitor where it does not read the bridge: one frozen in a read makes every write wait."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        with closing(sqlite3.connect(bridge.messages_db, timeout=1, isolation_level=None)) as connection:
            try:
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.OperationalError:
                process.send_signal(signal.SIGCONT)
            else:
                return


def _stored(rows: Rows) -> int:
    return int(rows("SELECT count(*) FROM qa_photo_reviews")[0][0])


def test_second_monitor_stands_by_and_takes_over_after_a_release_without_loss_or_double(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    first = start_monitor()
    first.await_message("writing")
    second = start_monitor()
    second.await_message("READY=1")
    second.await_message("standing by")
    second.await_message("WATCHDOG=1")
    for number in range(50):
        _post(bridge, number)
        if number == 20:
            first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(30) == 0
    second.await_message("writing, epoch 2")
    eventually(lambda: _stored(rows) == 50)
    assert rows("SELECT count(*) FROM wa_monitor.drop_event") == [(50,)]
    assert not rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")
    assert second.stop() == 0


def test_killed_owner_is_replaced_at_once_without_loss_or_double(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    first = start_monitor()
    first.await_message("writing")
    second = start_monitor()
    second.await_message("standing by")
    for number in range(50):
        _post(bridge, number)
        if number == 20:
            first.process.kill()
    second.await_message("writing, epoch 2", seconds=10)
    eventually(lambda: _stored(rows) == 50)
    assert rows("SELECT count(*) FROM wa_monitor.drop_event") == [(50,)]


def test_frozen_owner_that_wakes_up_after_a_takeover_goes_back_to_standby(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    first = start_monitor(WA_LEASE="0.3")
    first.await_message("writing")
    second = start_monitor(WA_LEASE="30")
    second.await_message("standing by")
    _freeze(first.process, bridge)
    second.await_message("writing, epoch 2")
    _post(bridge, 1)
    first.process.send_signal(signal.SIGCONT)
    first.await_message("standing by")
    eventually(lambda: _stored(rows) == 1)
    assert first.stop() == 0


def test_connection_that_is_cut_is_opened_again_and_nothing_is_lost(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    for number in range(30):
        _post(bridge, number)
        if number % 10 == 5:
            rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = 'wa-monitor'"
            )
    eventually(lambda: _stored(rows) == 30)
    assert monitor.stop() == 0
    assert "failed" in monitor.output()
    assert rows("SELECT count(*) FROM wa_monitor.drop_event") == [(30,)]


def test_restart_of_postgresql_during_a_run_is_waited_out(
    bridge: SyntheticBridge, start_monitor: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = tmp_path_factory.mktemp("p")
    with EmbeddedPostgres(data, durable=False) as server:
        url = server.url
        monitor = start_monitor(DATABASE_URL=url)
        monitor.await_message("writing")
        _post(bridge, 1)
        monitor.await_message("WATCHDOG=1")
    _post(bridge, 2)
    monitor.await_message("tried again")
    monitor.await_message("WATCHDOG=1")
    with EmbeddedPostgres(data, durable=False) as server:
        if server.url != url:
            pytest.skip("the server came back under another socket path")
        monitor.await_message("writing")
        _post(bridge, 3)
        monitor.await_message("WATCHDOG=1")
        assert monitor.stop() == 0
        with psycopg.connect(url) as connection:
            numbers = connection.execute("SELECT drop_number FROM qa_photo_reviews ORDER BY 1").fetchall()
    assert {"DR1000001", "DR1000002"} <= {number for (number,) in numbers}


def test_bridge_that_comes_back_is_read_on(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    hidden = bridge.messages_db.with_name("elsewhere.db")
    bridge.messages_db.rename(hidden)
    monitor.await_message("no bridge database")
    monitor.await_message("WATCHDOG=1")
    hidden.rename(bridge.messages_db)
    _post(bridge, 1)
    eventually(lambda: _stored(rows) == 1)


def test_file_that_is_replaced_under_a_running_monitor_is_read_from_the_beginning(
    bridge: SyntheticBridge,
    start_monitor: Any,
    rows: Rows,
    eventually: Eventually,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    _post(bridge, 1)
    monitor = start_monitor()
    monitor.await_message("writing")
    eventually(lambda: _stored(rows) == 1)
    other = SyntheticBridge(tmp_path_factory.mktemp("other"))
    other.create()
    _post(other, 2)
    _post(other, 3)
    other.messages_db.replace(bridge.messages_db)
    eventually(lambda: _stored(rows) == 3)
    assert monitor.stop() == 0
    assert "reading again" in monitor.output()


def test_locked_table_is_shown_and_waited_out_and_delays_no_stop(
    bridge: SyntheticBridge,
    start_monitor: Any,
    rows: Rows,
    eventually: Eventually,
    database_url: str,
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    with psycopg.connect(database_url) as other:
        other.execute("LOCK TABLE qa_photo_reviews IN ACCESS EXCLUSIVE MODE")
        _post(bridge, 1)
        assert "tried again" in monitor.await_message("lock timeout")
        monitor.process.send_signal(signal.SIGTERM)
        assert monitor.process.wait(14) == 0
        other.rollback()
    start_monitor()
    eventually(lambda: _stored(rows) == 1)


def test_standby_says_that_a_session_of_an_ended_process_keeps_the_row_locked(
    start_monitor: Any, database_url: str
) -> None:
    first = start_monitor()
    first.await_message("writing")
    second = start_monitor()
    second.await_message("standing by")
    with psycopg.connect(database_url) as left_behind:
        left_behind.execute("SELECT FROM wa_monitor.cursor FOR UPDATE")
        first.process.kill()
        second.await_message("has ended or gave up, but the cursor row is still locked")
    second.await_message("writing, epoch 2")


# what the driver is not left to do


@pytest.mark.parametrize("values", [["", "NULL", '"', "\\", "{}", "a,b", "x\ny", "\u2603"], ["one"], []])
def test_any_texts_come_back_as_they_were_given(database: Database, rows: Rows, values: list[str]) -> None:
    asked = {"lids": values, "phones": [str(number) for number in range(len(values))]}
    database.run("remember_mappings", asked)
    assert rows("SELECT lid FROM wa_monitor.lid_seen ORDER BY phone::int") == [(value,) for value in values]


@pytest.mark.parametrize("values", [["a\0b"], ["a\0b", "c"], ["\0"]])
def test_text_with_a_nul_byte_is_refused_and_never_two_texts(database: Database, values: list[str]) -> None:
    with pytest.raises(StoreRefusedError):
        database.run("remember_mappings", {"lids": values, "phones": values})


# the alarm


def _everything_is_a_phone(sender: str, _chat: str, _known: Known, _rules: object) -> Phone:
    return Phone(parse_jid(sender).user, "certain", "digits")


def test_fault_in_the_decision_is_seen_in_the_rows_and_asks_the_supervisor_once(
    bridge: SyntheticBridge,
    relay_once: Any,
    rows: Rows,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, 1, LID)
    _post(bridge, 2, LID)
    _post(bridge, 3, PHONE)
    monkeypatch.setattr("monitor.decision.identify", _everything_is_a_phone)
    path = tmp_path_factory.mktemp("n") / "s"
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as inbox:
        inbox.bind(str(path))
        inbox.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        metrics = relay_once()
        messages = []
        while True:
            try:
                messages.append(inbox.recv(4096).decode())
            except BlockingIOError:
                break
    assert messages.count("X_SUSPECT=lid-regression") == 1
    assert rows("SELECT drop_number, submitted_by FROM qa_photo_reviews ORDER BY 1")[0] == ("DR1000001", LID)
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }
    assert values["wa_monitor_drops_stored_total", "Northfield", "lid", "new"] == 2
    assert values["wa_monitor_drops_stored_total", "Northfield", "phone", "new"] == 1
    assert values["wa_monitor_lid_rows", "Northfield"] == 2


def test_every_scan_that_stores_a_lid_asks_the_supervisor_though_older_ones_stand(
    bridge: SyntheticBridge, relay_running: Any, monkeypatch: pytest.MonkeyPatch, eventually: Any
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("monitor.decision.identify", _everything_is_a_phone)
    monkeypatch.setattr("monitor.relay._ALARM_SECONDS", 0.0)
    monkeypatch.setattr(Notifier, "suspect", lambda _, why: asked.append(why))
    bridge.map_lid(LID, PHONE)
    with relay_running(auto_repair_seconds=0):
        for number in range(1, 4):
            _post(bridge, number, LID)
            eventually(lambda number=number: len(asked) == number)
    assert set(asked) == {"lid-regression"}


def test_fault_that_completes_a_waiting_row_with_a_lid_is_counted_and_healed_by_the_right_code(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    late = "3000000000013"
    bridge.map_lid(LID, PHONE)
    _post(bridge, 1, late)
    _post(bridge, 2, "3000000000011")  # never mapped: the fault fills it in as well
    relay_once()
    with monkeypatch.context() as faulty:
        faulty.setattr("monitor.decision.identify", _everything_is_a_phone)
        bridge.map_lid(late, "258821234567")
        relay_once()
        bridge.map_lid("8000000000019", "27821234567")
        metrics = relay_once()
    assert rows("SELECT submitted_by FROM qa_photo_reviews ORDER BY drop_number")[0] == (late,)
    assert rows("SELECT phone FROM wa_monitor.drop_event") == [(None,), (None,)]
    assert rows("SELECT count(*) FROM wa_monitor.pending") == [(2,)]
    assert "LID stored as a sender: DR1000001" in caplog.text
    assert _values(metrics)["wa_monitor_drops_stored_total", "Northfield", "lid", "new"] == len((1, 2))
    assert _values(metrics)["wa_monitor_lid_resolved_total",] == 0
    metrics = relay_once()
    assert rows("SELECT submitted_by, user_name FROM qa_photo_reviews ORDER BY drop_number")[0] == (
        "258821234567",
        "258821234567",
    )
    assert rows("SELECT drop_number FROM wa_monitor.pending") == [("DR1000002",)]
    assert _values(metrics)["wa_monitor_lid_resolved_total",] == 1


def _values(metrics: MonitorMetrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in metrics.collect()
        for sample in family.samples
    }


# what each process shows of the totals


def test_each_process_shows_all_of_the_totals_once_they_are_known_and_when_they_began() -> None:
    def shown(metrics: MonitorMetrics) -> dict[str, float]:
        families = [found for found in metrics.collect() if found.name == "wa_monitor_messages"]
        return {sample.name: sample.value for family in families for sample in family.samples}

    metrics = MonitorMetrics()
    assert shown(metrics) == {}, "a zero would look like a reset"
    began = datetime(2026, 1, 2, tzinfo=UTC)
    metrics.update(totals=Totals(messages=Counter(Northfield=100)), began=began)
    assert shown(metrics) == {
        "wa_monitor_messages_total": 100,
        "wa_monitor_messages_created": datetime(2026, 1, 1, tzinfo=UTC).timestamp(),
    }


# database URLs


@pytest.mark.parametrize(
    "url",
    [
        "mysql://monitor:s3cret-word@db.example/wa",
        "postgres//monitor:s3cret-word@db.example/wa",
        "postgresql://monitor:s3cret@word@db.example/wa",
        "postgresql://monitor:s3cret/word@db.example/wa",
        "postgresql://monitor:s3cret-word@db.example/wa?pasword=s3cret-word",
        "not a url s3cret-word",
        "postgresql://monitor:s3cret-word:5432/wa",
        "postgresql://monitor:s3cret-word/wa",
        "postgresql://monitor:secret@db.example:s3cret-word/wa",
        "postgresql://monitor:secret@db.example:99999/wa",
        "postgresql://monitor:secret@127.0.0.1:1/wa?sslmode=s3cret-word",
        "postgresql://monitor:secret@127.0.0.1:1/wa?service=s3cret-word",
        "postgresql://monitor:secret@127.0.0.1:1/wa?connect_timeout=s3cret-word",
    ],
)
def test_wrong_url_is_refused_without_quoting_it(url: str) -> None:
    with pytest.raises(ConfigError, match="DATABASE_URL") as caught:
        connect(DatabaseUrl(url))
    assert "s3cret" not in str(caught.value)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://monitor:s3cret-word@127.0.0.1:1/wa",
        "postgresql://monitor:s3cret-word@nowhere.invalid/wa",
        "postgresql:///wa?host=/nowhere&password=s3cret-word",
    ],
)
def test_unreachable_server_is_named_without_the_password(url: str) -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        connect(DatabaseUrl(url))
    assert "s3cret" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://monitor:1/s3cret-word",
        "postgresql://monitor:2?application_name=s3cret-word",
        "postgresql://s3cret-word",
    ],
)
def test_url_without_an_at_sign_shows_none_of_its_parts(url: str) -> None:
    with pytest.raises(StoreUnavailableError, match="cannot be reached") as caught:
        connect(DatabaseUrl(url))
    assert "s3cret" not in str(caught.value)
    assert "monitor" not in str(caught.value)


def test_missing_url_names_both_remedies() -> None:
    with pytest.raises(ConfigError, match=r"DATABASE_URL.*wa-monitor run.*demo"):
        connect(None)
