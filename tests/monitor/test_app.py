"""The monitor as a process: notifications, signals, and one sentence for whatever is wrong at the start."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from monitor import app
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.logs import mask_numbers
from monitor.settings import Values
from tests.supervisor.harness import until

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[..., list[tuple[Any, ...]]]

REPOSITORY = Path(__file__).parents[2]
PHONE = "27711234567"
LID = "100000000000017"
SECRET = "s3cret-word"  # noqa: S105 -- invented, and looked for where it must not be


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from monitor.app import main; main()", *arguments],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_monitor_says_ready_then_alive_and_ends_well_at_sigterm(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Any
) -> None:
    monitor = start_monitor()
    monitor.await_message("READY=1")
    monitor.await_message("WATCHDOG=1")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    eventually(lambda: rows("SELECT count(*) FROM qa_photo_reviews") == [(1,)])
    monitor.process.send_signal(signal.SIGTERM)
    monitor.await_message("STOPPING=1")
    assert monitor.process.wait(30) == 0
    assert rows("SELECT released FROM wa_monitor.cursor") == [(True,)]


def test_log_has_the_lines_operators_look_for_and_no_readable_number(
    bridge: SyntheticBridge, environment: dict[str, str]
) -> None:
    bridge.map_lid(LID, PHONE)
    bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000001")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001 fixed")
    output = _run(environment, "--once").stdout
    for line in (
        "Drop monitor started",
        "Found drop: DR1000001 in Northfield",
        "Created QA review for DR1000001",
        "Resubmission detected: DR1000001",
        "Resolved LID 10**********017 -> 27******567",
    ):
        assert line in output
    assert PHONE not in output
    assert LID not in output


@pytest.mark.parametrize(
    "text",
    [
        "27711234567",
        "+27711234567",
        "LID 12345678 ->",
        "\uff12\uff17\uff17\uff11\uff11\uff12\uff13\uff14\uff15",
        "DR1000001 by 27711234567@lid",
    ],
)
def test_number_is_masked_in_every_script(text: str) -> None:
    assert "*" in mask_numbers(text)
    shown = "DR10000001 and 3A0123456789ABC in run 20261130T220000Z-abc123"
    assert mask_numbers(shown) == shown


def test_log_file_survives_rotation_and_a_disk_that_takes_nothing(
    bridge: SyntheticBridge, start_monitor: Any, eventually: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    file = folder / "monitor.log"
    monitor = start_monitor(LOG_FILE=str(file))
    monitor.await_message("writing")

    def logged(number: int, where: Path) -> None:
        bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR{number}")
        eventually(lambda: where.exists() and f"Found drop: DR{number}" in where.read_text())

    logged(1000001, file)
    file.rename(folder / "monitor.log.1")
    logged(1000002, file)
    folder.rename(tmp_path / "gone")  # nothing can be written there any more
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000003")
    folder.mkdir()
    logged(1000004, file)
    assert monitor.stop() == 0
    output = monitor.output()
    assert all(f"Found drop: DR100000{number}" in output for number in (1, 2, 3, 4))
    assert "DR1000002" not in (tmp_path / "gone" / "monitor.log.1").read_text()


def test_log_file_that_cannot_be_written_is_named_at_the_start(environment: dict[str, str]) -> None:
    ended = _run({**environment, "LOG_FILE": "/nowhere/monitor.log"}, "--once")
    assert ended.returncode == 2
    assert re.fullmatch(r"wa-monitor: log file /nowhere/monitor.log: .*LOG_FILE.*\n", ended.stderr)


def test_numbers_are_shown_in_full_when_asked_for(
    bridge: SyntheticBridge, environment: dict[str, str]
) -> None:
    bridge.map_lid(LID, PHONE)
    bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000001")
    output = _run({**environment, "LOG_NUMBERS": "full"}, "--once").stdout
    assert f"Resolved LID {LID} -> {PHONE}" in output


def test_without_a_database_both_remedies_are_named(environment: dict[str, str]) -> None:
    del environment["DATABASE_URL"]
    ended = _run(environment)
    assert ended.returncode == 2
    assert re.fullmatch(r"wa-monitor: .*DATABASE_URL.*wa-monitor run.*wa-monitor demo.*\n", ended.stderr)


def _no_bridge(bridge: SyntheticBridge) -> None:
    bridge.messages_db.unlink()


def _no_map(bridge: SyntheticBridge) -> None:
    bridge.whatsapp_db.unlink()


def _not_sqlite(bridge: SyntheticBridge) -> None:
    bridge.messages_db.write_bytes(b"only some text" * 500)


def _no_table(bridge: SyntheticBridge) -> None:
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("DROP TABLE messages")


BROKEN = [
    (_no_bridge, r"no bridge database at \S*messages\.db.*WATCH|no bridge database at \S*messages\.db"),
    (_no_map, r"LID map is unavailable: no bridge database at \S*whatsapp\.db"),
    (_not_sqlite, r"messages\.db is no SQLite database"),
    (_no_table, r"messages\.db has no table messages"),
]


@pytest.mark.parametrize(("damage", "sentence"), BROKEN)
def test_broken_bridge_ends_a_single_pass_with_one_sentence(
    bridge: SyntheticBridge, environment: dict[str, str], damage: Any, sentence: str
) -> None:
    damage(bridge)
    ended = _run(environment, "--once")
    assert ended.returncode == 1
    assert re.search(sentence, ended.stderr)
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(("damage", "sentence"), BROKEN)
def test_broken_bridge_is_waited_for_by_the_service_which_says_so(
    bridge: SyntheticBridge, start_monitor: Any, damage: Any, sentence: str
) -> None:
    damage(bridge)
    monitor = start_monitor()
    assert re.search(sentence, monitor.await_message("STATUS="))
    monitor.await_message("WATCHDOG=1")
    assert monitor.stop() == 0


def test_locked_bridge_is_waited_for_by_the_service(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Any
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        monitor = start_monitor()
        monitor.await_message("locked")
        connection.execute("ROLLBACK")
    monitor.await_message("READY=1")
    eventually(lambda: rows("SELECT count(*) FROM qa_photo_reviews") == [(1,)])


def test_unreachable_database_is_waited_for_and_its_password_is_never_shown(start_monitor: Any) -> None:
    monitor = start_monitor(DATABASE_URL=f"postgresql://monitor:{SECRET}@127.0.0.1:1/wa")
    status = monitor.await_message("STATUS=")
    assert "127.0.0.1:1/wa cannot be reached" in status
    monitor.await_message("WATCHDOG=1")
    assert monitor.stop() == 0
    output = monitor.output()
    assert "cannot be reached" in output
    assert SECRET not in output + status


@pytest.mark.parametrize(
    ("changes", "arguments", "status", "sentence"),
    [
        ({"DATABASE_URL": f"mysql://monitor:{SECRET}@db/wa"}, (), 2, "DATABASE_URL is not a PostgreSQL URL"),
        ({"DATABASE_URL": f"postgresql://monitor:{SECRET}@word@db/wa"}, (), 2, "ambiguous"),
        (
            {"DATABASE_URL": f"postgresql://monitor:{SECRET}@127.0.0.1:1/wa"},
            ("--once",),
            1,
            "cannot be reached",
        ),
        ({"WA_SINCE": ""}, (), 2, "--since"),
        ({"WA_SINCE": "yesterday"}, (), 2, "yesterday"),
        ({"WA_PROJECTS": "/nowhere/projects.yaml"}, (), 2, "/nowhere/projects.yaml"),
        ({"WA_PROJECTS": ""}, (), 2, "WA_PROJECTS"),
        ({"WHATSAPP_DB_PATH": ""}, (), 2, "WHATSAPP_DB_PATH"),
        ({"SCAN_INTERVAL": "soon"}, (), 2, "SCAN_INTERVAL"),
        ({}, ("--config", "/nowhere/wa.toml"), 2, "/nowhere/wa.toml"),
        ({}, ("--listen", "nowhere"), 2, "--listen"),
    ],
)
def test_wrong_setting_is_one_sentence_and_the_right_status(
    environment: dict[str, str],
    changes: dict[str, str],
    arguments: tuple[str, ...],
    status: int,
    sentence: str,
) -> None:
    ended = _run({**environment, **changes}, *arguments)
    assert ended.returncode == status
    assert sentence in ended.stderr
    assert ended.stderr.startswith("wa-monitor: ")
    assert ended.stderr.count("\n") == 1
    assert SECRET not in ended.stdout + ended.stderr


def test_unknown_flag_ends_with_the_status_for_usage(environment: dict[str, str]) -> None:
    ended = _run(environment, "--brigde", "x")
    assert ended.returncode == 2
    assert "--brigde" in ended.stderr


def test_every_flag_is_a_setting() -> None:
    flags, config = app._parse(["--bridge", "b", "--since", "now", "--once", "--config", "c.toml"])
    assert flags == Values(bridge="b", since="now", once=True)
    assert config == Path("c.toml")


def test_port_in_use_is_named(environment: dict[str, str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as other:
        port = other.getsockname()[1]
        ended = _run(environment, "--listen", f"127.0.0.1:{port}")
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr


def test_metrics_are_served_when_asked_for(start_monitor: Any, environment: dict[str, str]) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    monitor = start_monitor(WA_LISTEN=f"127.0.0.1:{port}")
    monitor.await_message("READY=1")

    def scraped() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    until(lambda: "wa_monitor_lid_rows{" in scraped())  # It is ready before it has counted.
    text = scraped()
    assert 'wa_monitor_drops_stored_total{identity="lid",kind="new",project="Northfield"} 0.0' in text
    assert 'wa_monitor_lid_rows{project="Eastvale"}' in text
    assert 'wa_monitor_store_errors_total{error="store_unavailable"} 0.0' in text
    assert 'wa_monitor_store_errors_total{error="bridge_map"} 0.0' in text
    assert environment["DATABASE_URL"] not in text
    assert monitor.stop() == 0


def test_starting_imports_nothing_that_only_people_need() -> None:
    unwanted = "{'typer', 'rich', 'watchdog', 'phonenumbers'}"
    script = f"import sys, monitor.app; print(*{unwanted} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        env=dict(os.environ),
    )
    assert found.stdout.strip() == ""
