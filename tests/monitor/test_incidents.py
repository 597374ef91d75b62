"""What once went wrong, each as a test that bears its number, as far as no other file holds it already.

13 and 15 are in `test_model.py` and `test_adoption.py`, 16, 19 and 33 in `test_canary.py`, 35 in
`test_explain.py`, 38 in `test_adoption.py`. 1 to 3 are the supervisor's. 26, 27, 31 and 34 concern schedules,
exports, lists of valid drops and pairing, of which there is none here.
"""

from __future__ import annotations

import os
import re
import threading
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import monitor
from monitor import database
from monitor.bridge import Bridge
from monitor.census import usual_messages
from monitor.database import connect
from monitor.demo.bridge import EASTVALE, NORTHFIELD, SyntheticBridge
from monitor.errors import BridgeMissingError, ConfigError, StoreSchemaError
from monitor.identity import Known, Lid, Phone, Rules, Unknown, identify
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import ProjectsFile
from monitor.relay import Relay, Stop
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    from monitor.settings import Settings

    Rows = Callable[..., list[tuple[Any, ...]]]
    Eventually = Callable[[Callable[[], bool]], None]

PACKAGE = Path(monitor.__file__).parent
PHONE = "27711234567"
OTHER_PHONE = "263712345678"
LID = "100000000000017"
LATE_LID = "3000000000013"
OLDER = timezone(timedelta(0))
NEWER = timezone(timedelta(hours=2))
NOON = datetime(2026, 11, 11, 10, 0, 0, tzinfo=UTC)
STORED = "SELECT drop_number, submitted_by FROM qa_photo_reviews ORDER BY drop_number"


def _post(bridge: SyntheticBridge, number: int, sender: str = PHONE, **more: Any) -> str:
    return bridge.post(
        chat_jid=more.pop("chat_jid", NORTHFIELD), sender=sender, content=f"DR{1000000 + number}", **more
    )


def _numbers(rows: Rows) -> list[int]:
    return [int(number[2:]) - 1000000 for number, _ in rows(STORED)]


def test_incident_04_shape_never_decides() -> None:
    map_ = Known.from_rows(
        {
            LID: PHONE,
            "90000000000019": OTHER_PHONE,
            LATE_LID: "918123456789",
            "27831234560": "2348021234567",  # a LID in the shape of a phone
        }
    )
    for lid, phone in map_.phone_of.items():
        found = identify(lid, NORTHFIELD, map_, Rules())
        assert isinstance(found, Phone)
        assert found.digits == phone
        assert identify(phone, NORTHFIELD, map_, Rules()) == Phone(
            phone, "certain", "in the map's phone column"
        )
    assert isinstance(identify("100000000000033", NORTHFIELD, map_, Rules()), Lid)
    assert isinstance(identify("447400123456", NORTHFIELD, map_, Rules()), Unknown)
    assert isinstance(identify("27821234567", NORTHFIELD, map_, Rules()), Phone)


@pytest.mark.parametrize("sender", [PHONE, LID, f"{LID}:5@lid", LATE_LID, "120363000000000001"])
def test_incident_05_no_path_stores_a_lid(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, sender: str
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, 1, sender)
    _post(bridge, 2)
    _post(bridge, 2, sender)
    relay_once()
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    relay_once()
    values = {value for row in rows("SELECT submitted_by, user_name FROM qa_photo_reviews") for value in row}
    assert not values & {LID, LATE_LID, sender.partition(":")[0]} - {PHONE}


def test_incident_06_one_place_writes_the_columns_of_the_sender() -> None:
    statements = (PACKAGE / "queries.sql").read_text(encoding="utf-8").split("-- name: ")[1:]
    writing = {
        text.partition("\n")[0]
        for text in statements
        if re.search(r"(INSERT INTO|UPDATE) public\.qa_photo_reviews", text) and "submitted_by" in text
    }
    assert writing == {
        "insert_reviews",
        "resubmit_review",
        "complete_review",
        "repair_reviews",
        "undo_repairs",
    }
    store = (PACKAGE / "store.py").read_text(encoding="utf-8")
    assert store.count("= _sender_columns(") + store.count("[_sender_columns(") == len(
        ("new", "resubmission")
    )


def test_incident_07_sender_that_was_unknown_is_filled_in_once_and_without_resubmission(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    _post(bridge, 1, LATE_LID)
    relay_once()
    relay_once()
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    relay_once()
    relay_once()
    assert rows("SELECT submitted_by, user_name, resubmitted FROM qa_photo_reviews") == [
        (OTHER_PHONE, OTHER_PHONE, False)
    ]
    assert rows("SELECT count(resolved_at) FROM wa_monitor.drop_event") == [(1,)]
    assert rows("SELECT 1 FROM wa_monitor.pending") == []


def test_incident_08_phone_that_was_found_stays_when_the_map_forgets_or_changes(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, 1, LID)
    relay_once()
    bridge.map_lid("100000000000025", PHONE)  # the phone has a new LID: the old one is gone from the map
    _post(bridge, 2, "100000000000025")
    relay_once()
    bridge.map_lid("100000000000025", OTHER_PHONE)
    _post(bridge, 3, "100000000000025")
    relay_once()
    assert [sender for _, sender in rows(STORED)] == [PHONE, PHONE, OTHER_PHONE]
    assert rows("SELECT count(*) FROM wa_monitor.lid_seen") == [(3,)]


def test_incident_09_low_message_id_that_arrives_last_is_read(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    for number, key in enumerate(["FF99", "AC01", "3A00", "FFFF", "0000"]):
        _post(bridge, number, message_id=key)
        relay_once()
    assert _numbers(rows) == [0, 1, 2, 3, 4]


def test_incident_10_monitor_that_completes_no_scan_is_silent_and_one_with_nothing_to_do_is_not(
    bridge: SyntheticBridge, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked, go_on = threading.Event(), threading.Event()
    pings: list[bool] = []
    pinged = threading.Event()

    def alive(_: Notifier) -> None:
        pings.append(blocked.is_set())
        pinged.set()

    def hang(*_: object) -> None:
        blocked.set()
        assert go_on.wait(60)
        raise ConfigError("the test is over")

    monkeypatch.setattr(Notifier, "alive", alive)
    assert settings.projects is not None
    with closing(Stop()) as stop, closing(Notifier()) as notifier:
        relay = Relay(
            replace(settings, once=False),
            ProjectsFile(settings.projects),
            notifier=notifier,
            metrics=MonitorMetrics(),
            stop=stop,
        )
        thread = threading.Thread(target=relay.run)
        thread.start()
        assert pinged.wait(60)  # a quiet group
        monkeypatch.setattr("monitor.store.Store.write", hang)
        _post(bridge, 1)
        assert blocked.wait(60)
        pinged.clear()
        assert not pinged.wait(0.5)
        assert not any(pings)
        stop.request()
        go_on.set()
        thread.join()


def test_incident_11_same_second_late_and_replaced_messages_are_each_stored_once(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    first = _post(bridge, 1, timestamp=NOON)
    relay_once()
    _post(bridge, 2, timestamp=NOON)
    relay_once()
    _post(bridge, 3, timestamp=NOON - timedelta(days=3))
    _post(bridge, 1, message_id=first, timestamp=NOON)
    relay_once()
    assert _numbers(rows) == [1, 2, 3]
    assert not rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")


def test_incident_12_switch_of_the_bridges_zone_loses_and_doubles_nothing(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    for number, zone in enumerate([OLDER, NEWER, OLDER, NEWER]):
        _post(bridge, number, timestamp=(NOON + timedelta(minutes=number)).astimezone(zone))
        relay_once()
    assert rows("SELECT whatsapp_message_date FROM qa_photo_reviews ORDER BY drop_number") == [
        (NOON + timedelta(minutes=number),) for number in range(4)
    ]


def test_incident_14_state_that_is_gone_means_neither_the_beginning_nor_now(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    _post(bridge, 1)
    relay_once()
    rows("DELETE FROM wa_monitor.cursor")
    _post(bridge, 2)
    with pytest.raises(ConfigError, match="say where to begin"):
        relay_once(since=None)
    assert _numbers(rows) == [1]
    relay_once()  # told to begin at the beginning: the ledger keeps the rest from being stored again
    assert _numbers(rows) == [1, 2]
    assert not rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")


def test_incident_17_every_fault_shows_where_an_alert_looks_and_is_gone_with_its_cause(
    bridge: SyntheticBridge, relay_running: Any, rows: Rows, eventually: Eventually
) -> None:
    def rename(path: Path, other: Path) -> None:
        path.rename(other)

    away = bridge.folder / "away"
    column = "ALTER TABLE qa_photo_reviews RENAME COLUMN {} TO {}"
    faults: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        (
            "bridge",
            partial(rename, bridge.messages_db, away),
            partial(rename, away, bridge.messages_db),
        ),
        ("map", partial(rename, bridge.whatsapp_db, away), partial(rename, away, bridge.whatsapp_db)),
        (
            "table",
            partial(rows, column.format("drop_number", "elsewhere")),
            partial(rows, column.format("elsewhere", "drop_number")),
        ),
    ]
    with relay_running() as metrics:
        for number, (component, break_it, mend_it) in enumerate(faults):
            _post(bridge, number)
            eventually(partial(_holds, rows, number + 1))
            assert _broken(metrics) == set()
            break_it()
            if component == "table":
                _post(bridge, 99)
            eventually(partial(_breaks, metrics, component))
            mend_it()
            eventually(lambda: _broken(metrics) == set())
        eventually(lambda: _holds(rows, 4))


def _breaks(metrics: MonitorMetrics, component: str) -> bool:
    return _broken(metrics) == {component}


def _broken(metrics: MonitorMetrics) -> set[str]:
    return {
        sample.labels["component"]
        for family in metrics.collect()
        if family.name == "wa_monitor_broken"
        for sample in family.samples
        if sample.value
    }


@pytest.mark.parametrize("days", [0, 1])
@pytest.mark.parametrize(
    ("constraints", "rows_on_days"),
    [
        ("ADD UNIQUE (drop_number)", (1, 1)),
        ("ALTER project SET NOT NULL", (1, 2)),  # the one that stands: drop and day
        ("DROP CONSTRAINT qa_photo_reviews_drop_number_review_date_key", (2, 2)),
    ],
)
def test_incident_18_same_drop_in_two_spaces_is_stored_or_said_to_be_refused(
    bridge: SyntheticBridge,
    relay_once: Any,
    rows: Rows,
    projects_file: Path,
    table: Callable[..., None],
    *,
    constraints: str,
    rows_on_days: tuple[int, int],
    days: int,
) -> None:
    text = projects_file.read_text()
    projects_file.write_text(text.replace("- name: Eastvale", "- name: Eastvale\n    drop_space: east"))
    table()
    rows(f"ALTER TABLE qa_photo_reviews {constraints}")
    _post(bridge, 1, timestamp=NOON)
    _post(bridge, 1, timestamp=NOON + timedelta(days=days), chat_jid=EASTVALE)
    relay_once()
    stored = len(rows(STORED))
    assert stored == rows_on_days[days]
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(2 - stored,)]
    assert not rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")


def test_incident_20_wrong_path_is_an_error_and_creates_no_file(tmp_path: Path) -> None:
    with closing(Bridge(tmp_path / "messages.db")) as reader, pytest.raises(BridgeMissingError):
        reader.end()
    assert list(tmp_path.iterdir()) == []


def test_incident_21_question_that_fails_is_no_empty_answer(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    _post(bridge, 1)
    relay_once()
    place = rows("SELECT place_rowid FROM wa_monitor.cursor")
    rows("ALTER TABLE wa_monitor.adopted_row RENAME TO elsewhere")
    _post(bridge, 2)
    with pytest.raises(StoreSchemaError):
        relay_once()
    assert _numbers(rows) == [1]
    assert rows("SELECT place_rowid FROM wa_monitor.cursor") == place


def test_incident_22_statement_that_cannot_work_is_found_before_the_process_is_ready(
    relay_once: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready: list[object] = []
    monkeypatch.setattr(Notifier, "ready", lambda _: ready.append(1))
    good = database._QUERIES["insert_reviews"]
    with monkeypatch.context() as broken:
        broken.setitem(database._QUERIES, "insert_reviews", good.replace(b"user_name, ", b"", 1))
        with pytest.raises(StoreSchemaError, match="more expressions than target columns"):
            relay_once()
    assert not ready
    relay_once()
    assert len(ready) == 1


def test_incident_23_silence_of_the_bridge_is_measured_against_what_the_hour_usually_has(
    relay_once: Any, rows: Rows, database_url: str
) -> None:
    relay_once()
    now = datetime.now(UTC)
    for week in range(1, 5):
        for number in range(6):
            rows(
                "INSERT INTO wa_monitor.message VALUES ('bridge', 'x', %s, '', 'no_drop', null, %s, '', '')",
                *(f"{week}/{number}", now - timedelta(weeks=week)),
            )
            rows(
                "INSERT INTO wa_monitor.message VALUES ('bridge', 'y', %s, '', 'no_drop', null, %s, '', '')",
                *(f"{week}/{number}", now - timedelta(weeks=week, hours=3)),
            )
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert usual_messages(database, "bridge") in {4.5, 6.0}  # an hour may just begin, four weeks ago
        assert usual_messages(database, "another") == 0


def test_incident_24_bridges_files_are_open_for_reading_only(bridge: SyntheticBridge) -> None:
    with closing(Bridge(bridge.messages_db)) as reader:
        reader.end()
        reader.known()
        modes = {}
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = link.readlink()
            except FileNotFoundError:
                continue  # the one that lists the folder
            if target.parent == bridge.folder:
                flags = Path(f"/proc/self/fdinfo/{link.name}").read_text(encoding="ascii")
                found = re.search(r"flags:\s*([0-7]+)", flags)
                assert found is not None
                modes[target.name] = int(found[1], 8) & os.O_ACCMODE
    assert modes == {"messages.db": os.O_RDONLY, "whatsapp.db": os.O_RDONLY}


@pytest.mark.parametrize("zone", ["UTC", "Africa/Johannesburg", "America/Los_Angeles"])
def test_incident_25_day_of_a_drop_begins_at_midnight_in_south_africa_whatever_the_session_says(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, zone: str
) -> None:
    rows(
        f"DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database() || ' SET timezone = ''{zone}'''; END $$"
    )
    for number, (hour, minute) in enumerate([(21, 59), (22, 0), (23, 59)]):
        _post(bridge, number, timestamp=datetime(2026, 11, 11, hour, minute, tzinfo=UTC))
    relay_once()
    assert rows("SELECT review_date::text FROM qa_photo_reviews ORDER BY drop_number") == [
        ("2026-11-11",),
        ("2026-11-12",),
        ("2026-11-12",),
    ]


def test_incident_28_of_three_monitors_one_writes(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually
) -> None:
    monitors = [start_monitor() for _ in range(3)]
    for started in monitors:
        started.await_message("READY=1")
    for number in range(10):
        _post(bridge, number)
    eventually(lambda: rows("SELECT count(*) FROM wa_monitor.drop_event") == [(10,)])
    assert rows("SELECT epoch FROM wa_monitor.cursor") == [(1,)]


@pytest.mark.parametrize("sender", ["12015550123", "100000000000099", "100000000000099@lid"])
def test_incident_29_echo_of_the_bridge_itself_stores_nothing(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, sender: str
) -> None:
    bridge.set_device("12015550123:7@s.whatsapp.net", "100000000000099:7@lid")
    _post(bridge, 1, sender)
    _post(bridge, 2, PHONE, is_from_me=True)
    relay_once()
    assert rows(STORED) == []
    assert rows("SELECT DISTINCT outcome FROM wa_monitor.message") == [("own_message",)]


def test_incident_30_no_number_of_a_person_stands_in_the_code() -> None:
    invented = {"27711234567", "120363", "7205759403792793", "00000000"}
    found = {
        number
        for path in PACKAGE.glob("*.*")
        if path.suffix in {".py", ".sql"}
        for number in re.findall(r"(?<![0-9])[0-9]{8,}(?![0-9])", path.read_text(encoding="utf-8"))
    }
    assert found <= invented


def test_incident_32_full_addresses_are_cut_and_fit_the_columns(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    for number, sender in enumerate([f"{LID}:12@lid", f"{PHONE}.1:3@s.whatsapp.net", f"{PHONE}@c.us"]):
        _post(bridge, number, sender)
    relay_once()
    assert {sender for _, sender in rows(STORED)} == {PHONE}


@pytest.mark.parametrize("source", ["production", "dev"])
def test_incident_36_sign_of_life_is_the_same_in_every_environment(start_monitor: Any, source: str) -> None:
    monitor = start_monitor(WA_SOURCE=source, WA_DATABASE_IDENTITY=source)
    monitor.await_message("READY=1")
    monitor.await_message("WATCHDOG=1")


def test_incident_37_resubmission_waits_for_a_reviewer_and_keeps_what_he_wrote(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually, database_url: str
) -> None:
    _post(bridge, 1, timestamp=NOON)
    monitor = start_monitor()
    eventually(partial(_holds_one, rows))
    with psycopg.connect(database_url) as reviewer:
        reviewer.execute(
            "UPDATE qa_photo_reviews SET locked_by = 'reviewer', locked_at = now(), comment = 'blurred',"
            " step_01_house_photo = true, incorrect_steps = '{step_02}', completed = true"
        )
        _post(bridge, 1, OTHER_PHONE)
        eventually(lambda: bool(rows("SELECT 1 FROM pg_locks WHERE NOT granted")))
    eventually(lambda: bool(rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")))
    assert monitor.stop() == 0
    ((comment, *rest),) = rows(
        "SELECT comment, locked_by, step_01_house_photo, incorrect_steps, completed, locked_at IS NOT NULL"
        " FROM qa_photo_reviews"
    )
    assert comment.startswith("blurred\nResubmitted on WhatsApp ")
    assert rest == ["reviewer", True, ["step_02"], True, True]


def _holds_one(rows: Rows) -> bool:
    return _holds(rows, 1)


def _holds(rows: Rows, count: int) -> bool:
    try:
        return len(rows(STORED)) == count
    except psycopg.errors.UndefinedTable:
        return False
