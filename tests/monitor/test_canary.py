"""Before a process is ready: the trial write, the database's name; while it runs: the projects file."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from monitor.canary import try_write
from monitor.database import Database, connect
from monitor.demo.bridge import NORTHFIELD, WESTMOOR, SyntheticBridge
from monitor.errors import StoreSchemaError
from monitor.schema import prepare
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Rows = Callable[..., list[tuple[Any, ...]]]
    Eventually = Callable[[Callable[[], bool]], None]

PHONE = "27711234567"
ALL_TABLES = (
    "SELECT (SELECT count(*) FROM qa_photo_reviews), (SELECT count(*) FROM wa_monitor.message),"
    " (SELECT count(*) FROM wa_monitor.drop_event), (SELECT count(*) FROM wa_monitor.pending),"
    " (SELECT count(*) FROM wa_monitor.dead_letter)"
)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(connect(DatabaseUrl(database_url))) as opened:
        prepare(opened)
        yield opened


def test_trial_write_leaves_nothing(database: Database, rows: Rows) -> None:
    try_write(database, "Northfield")
    assert rows(ALL_TABLES) == [(0, 0, 0, 0, 0)]


DEFERRED = (
    "ALTER TABLE qa_photo_reviews ALTER assigned_agent SET DEFAULT 'nobody',"
    " ADD FOREIGN KEY (assigned_agent) REFERENCES agents (name) DEFERRABLE INITIALLY DEFERRED"
)
TRIGGER = (
    "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no resubmission'; END $$;"
    " CREATE TRIGGER no BEFORE UPDATE ON qa_photo_reviews FOR EACH ROW EXECUTE FUNCTION no()"
)


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE qa_photo_reviews ADD CHECK (project <> 'Northfield')",
        "ALTER TABLE wa_monitor.drop_event RENAME COLUMN reason TO because",
        DEFERRED,
        TRIGGER,
    ],
)
def test_incident_16_database_that_takes_no_drop_is_found_before_the_process_is_ready(
    database: Database, rows: Rows, relay_once: Any, change: str
) -> None:
    rows("CREATE TABLE agents (name varchar(50) PRIMARY KEY)")
    rows(change)
    with pytest.raises(StoreSchemaError):
        try_write(database, "Northfield")
    with pytest.raises(StoreSchemaError):
        relay_once()
    assert rows("SELECT 1 FROM wa_monitor.cursor") == []


def test_user_without_the_right_to_write_is_found_before_the_process_is_ready(
    database: Database, rows: Rows
) -> None:
    role = f"reader_{rows('SELECT current_database()')[0][0]}"
    rows(f"CREATE ROLE {role}")
    try:
        rows(f"GRANT USAGE ON SCHEMA wa_monitor TO {role}")
        rows(f"GRANT SELECT ON ALL TABLES IN SCHEMA public, wa_monitor TO {role}")
        database.script(f"SET ROLE {role}".encode())
        with pytest.raises(StoreSchemaError, match="permission denied"):
            try_write(database, "Northfield")
    finally:
        rows(f"DROP OWNED BY {role}")
        rows(f"DROP ROLE {role}")


def test_incident_19_database_that_calls_itself_otherwise_is_refused(relay_once: Any, rows: Rows) -> None:
    relay_once(database_identity="production")
    relay_once(database_identity="production")
    with pytest.raises(StoreSchemaError, match="calls itself 'production' and the settings want 'dev'"):
        relay_once(database_identity="dev")
    relay_once()
    assert rows("SELECT identity FROM wa_monitor.installation") == [("production",)]


def test_incident_33_projects_change_while_the_monitor_runs_and_a_bad_file_changes_nothing(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually, projects_file: Path
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    good = projects_file.read_text()
    _replace(projects_file, good.replace("enabled: true", "enabled: maybe", 1))
    assert "line 3" in monitor.await_message("the projects that were in force stay")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    eventually(lambda: rows("SELECT count(*) FROM qa_photo_reviews") == [(1,)])
    _replace(projects_file, good)
    monitor.await_message("the projects file is good again")
    _replace(projects_file, good.replace("enabled: false", "enabled: true"))

    def stored() -> bool:
        bridge.post(chat_jid=WESTMOOR, sender=PHONE, content="DR1000002")
        return bool(rows("SELECT 1 FROM qa_photo_reviews WHERE project = 'Westmoor'"))

    eventually(stored)
    assert monitor.process.pid == rows("SELECT owner_pid FROM wa_monitor.cursor")[0][0]
    assert monitor.stop() == 0
    assert "Projects file applied: 3 enabled, new: ['Westmoor']" in monitor.output()


def _replace(path: Path, text: str) -> None:
    """Save as editors do: nobody reads half of it."""
    new = path.with_name("new")
    new.write_text(text)
    new.replace(path)
