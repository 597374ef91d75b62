"""The demo: what it is made of, and the whole tour as a stranger runs it."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest
from psycopg import sql

import monitor
from monitor.demo import incident
from monitor.demo.bridge import EASTVALE, NORTHFIELD
from monitor.demo.compare import compare
from monitor.demo.stage import DemoError, Stage, copy_monitor, script
from monitor.demo.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from monitor.demo.bridge import SyntheticBridge

IDENTITY = Path(monitor.__file__).with_name("identity.py")
ASK = """
from monitor import identity
answer = identity.identify("3000000000013", "120363000000000001@g.us", identity.Known(), identity.Rules())
print(type(answer).__name__)
"""


def ask_copy(tree: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", ASK], cwd=tree, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_bug_has_the_size_of_what_it_replaces_and_takes_a_lid_for_a_phone(tmp_path: Path) -> None:
    copy_monitor(tmp_path)
    good = IDENTITY.read_bytes()
    bad = incident.with_bug(good)
    assert len(bad) == len(good)
    (tmp_path / "monitor" / "identity.py").write_bytes(bad)
    assert ask_copy(tmp_path) == "Phone"


def test_plain_python_runs_the_old_code_after_the_edit(tmp_path: Path) -> None:
    copy_monitor(tmp_path)
    assert ask_copy(tmp_path) == "Lid"
    target = tmp_path / "monitor" / "identity.py"
    before = target.stat()
    incident.overwrite(target, incident.with_bug(target.read_bytes()))
    after = target.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_mode) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_mode,
    )
    assert ask_copy(tmp_path) == "Lid"


def test_the_line_that_a_person_is_told_to_insert_below_brings_the_bug(tmp_path: Path) -> None:
    copy_monitor(tmp_path)
    target = tmp_path / "monitor" / "identity.py"
    lines = target.read_text(encoding="utf-8").splitlines()
    lines.insert(incident.line_of_bug(target.read_bytes()), f"    {incident.BUG}")
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert ask_copy(tmp_path) == "Phone"


def test_an_edit_that_changes_the_size_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "identity.py"
    target.write_bytes(b"one")
    with pytest.raises(incident.IncidentError, match="not the same size"):
        incident.overwrite(target, b"three")
    assert target.read_bytes() == b"one"


@pytest.mark.parametrize(
    ("source", "reason"),
    [(b"x = 1\n", "no function decide"), (b'def decide(user):\n    """Short."""\n', "bytes too short")],
)
def test_a_file_that_cannot_carry_the_bug_is_refused(source: bytes, reason: str) -> None:
    with pytest.raises(incident.IncidentError, match=reason):
        incident.with_bug(source)


def test_a_stream_goes_on_until_it_is_stopped_and_counts_what_it_posted(bridge: SyntheticBridge) -> None:
    stream = Stream(bridge, seed=3, rate=500.0, first_drop=1_000_001)
    backlog = stream.post(20)
    assert min(backlog) == "DR1000001"
    with stream, closing(sqlite3.connect(bridge.messages_db)) as connection:
        while connection.execute("SELECT count(*) FROM messages").fetchone()[0] < 40:
            pass
    with closing(sqlite3.connect(bridge.messages_db)) as connection:
        assert connection.execute("SELECT count(*) FROM messages").fetchone()[0] == stream.posted_total


def test_a_stream_that_cannot_post_says_so_when_it_is_left(bridge: SyntheticBridge) -> None:
    bridge.messages_db.write_bytes(b"not a database, at least 100 bytes of it" * 4)
    with (
        pytest.raises(sqlite3.DatabaseError, match="not a database"),
        Stream(bridge, seed=3, rate=500.0, first_drop=1_000_001) as stream,
    ):
        stream._thread.join()


@pytest.fixture
def stored(bridge: SyntheticBridge, database_url: str) -> Iterator[psycopg.Connection]:
    """A bridge with three drops in four posts, and the tables that the comparison reads, filled
    accordingly."""
    bridge.map_lid("100000000000017", "27711234567")
    for chat, text in (
        (NORTHFIELD, "DR1000001 and dr 1000002"),
        (EASTVALE, "DR1000001 again"),
        (EASTVALE, "DR1000003"),
        (EASTVALE, "DR12345 is none"),
    ):
        bridge.post(chat_jid=chat, sender="27711234567", content=text)
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA wa_monitor")
        connection.execute("CREATE TABLE wa_monitor.drop_event (project text, drop_number text)")
        connection.execute(
            "CREATE TABLE qa_photo_reviews"
            " (project text, drop_number text, submitted_by text, user_name text)"
        )
        connection.execute(
            "INSERT INTO wa_monitor.drop_event VALUES"
            " ('Northfield', 'DR1000001'), ('Northfield', 'DR1000002'),"
            " ('Eastvale', 'DR1000001'), ('Eastvale', 'DR1000003')"
        )
        connection.execute(
            "INSERT INTO qa_photo_reviews VALUES ('Northfield', 'DR1000001', '27711234567', 'x'),"
            " ('Northfield', 'DR1000002', NULL, 'x'), ('Eastvale', 'DR1000003', '27711234567', 'x')"
        )
        yield connection


def test_the_comparison_is_complete_when_both_sides_hold_the_same(
    stored: psycopg.Connection, bridge: SyntheticBridge, database_url: str
) -> None:
    assert not stored.closed
    north, east = compare(bridge.messages_db, bridge.whatsapp_db, database_url)
    assert (north.messages_total, north.drops_total, north.rows_total, north.lids_total) == (1, 2, 2, 0)
    assert (east.messages_total, east.posts_total, east.drops_total) == (3, 2, 1)
    assert north.complete
    assert east.complete


@pytest.mark.parametrize(
    ("damage", "shown"),
    [
        ("DELETE FROM qa_photo_reviews WHERE drop_number = 'DR1000002'", "lost"),
        ("INSERT INTO qa_photo_reviews VALUES ('Northfield', 'DR1000002', NULL, 'x')", "doubled"),
        ("INSERT INTO qa_photo_reviews VALUES ('Northfield', 'DR9999999', NULL, 'x')", "foreign"),
    ],
)
def test_the_comparison_shows_what_is_lost_doubled_or_foreign(
    stored: psycopg.Connection, bridge: SyntheticBridge, database_url: str, damage: str, shown: str
) -> None:
    stored.execute(damage.encode())
    north, east = compare(bridge.messages_db, bridge.whatsapp_db, database_url)
    assert len(getattr(north, shown)) == 1
    assert not north.complete
    assert east.complete


@pytest.mark.parametrize("column", ["submitted_by", "user_name"])
def test_the_comparison_counts_lids_in_either_column(
    stored: psycopg.Connection, bridge: SyntheticBridge, database_url: str, column: str
) -> None:
    statement = "UPDATE qa_photo_reviews SET {} = '100000000000017' WHERE drop_number = 'DR1000003'"
    stored.execute(sql.SQL(statement).format(sql.Identifier(column)))
    _, east = compare(bridge.messages_db, bridge.whatsapp_db, database_url)
    assert east.lids_total == 1


def test_a_stage_says_what_it_did_not_see(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", url="postgresql:///unused")
    with pytest.raises(DemoError, match="not observed within 0 s: the moon"):
        stage.wait("the moon", lambda: None, limit_seconds=0.0)


def demo(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [script("wa-monitor"), "demo", *arguments],
        check=False,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_the_demo_keeps_out_of_a_database_that_is_in_use(database_url: str, tmp_path: Path) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE qa_photo_reviews (id int)")
    done = demo("--once", "--folder", str(tmp_path / "demo"), DATABASE_URL=database_url)
    assert done.returncode == 1
    assert "give an empty database, or unset DATABASE_URL" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_demo_shows_no_password_of_a_database_that_does_not_answer(tmp_path: Path) -> None:
    url = f"postgresql://user:open-sesame@/nowhere?host={tmp_path}"
    done = demo("--once", "--folder", str(tmp_path / "demo"), DATABASE_URL=url)
    assert done.returncode == 1
    assert "DATABASE_URL cannot be used" in done.stderr
    assert "open-sesame" not in done.stdout + done.stderr


def test_the_demo_does_not_overwrite_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "demo" / "tree").mkdir(parents=True)
    done = demo("--once", "--folder", str(tmp_path / "demo"))
    assert done.returncode == 1
    assert "holds an earlier demo" in done.stderr


def test_the_tour_observes_every_step_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = demo("--once", TMPDIR=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"All \d+ steps observed", done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_the_demo_reports_the_bug_that_a_person_saves_and_ends_on_ctrl_c() -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(
            [script("wa-monitor"), "demo", "--folder", f"{folder}/demo"], stdout=subprocess.PIPE, text=True
        ) as process,
    ):
        assert process.stdout is not None
        output = iter(process.stdout)
        assert any("Ctrl-C" in line for line in output)
        target = Path(folder) / "demo" / "tree" / "monitor" / "identity.py"
        incident.overwrite(target, incident.with_bug(target.read_bytes()))
        assert any(line.startswith("reload: live, ") and "identity.py" in line for line in output)
        assert any(line.startswith("LIDs standing in the table: ") for line in output)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0
