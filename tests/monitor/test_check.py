"""check: what a start would fail by is named beforehand, each thing for itself, and nothing is changed."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from monitor.cli import commands
from monitor.demo.bridge import NORTHFIELD

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from monitor.demo.bridge import SyntheticBridge

    Rows = Callable[..., list[tuple[Any, ...]]]
    Check = Callable[..., dict[str, dict[str, Any]]]

PHONE = "27711234567"


@pytest.fixture
def check(environment: dict[str, str]) -> Check:
    """Return the findings by what they are about; exit status and `failed` say the same."""

    def run(*words: str, **changes: str | None) -> dict[str, dict[str, Any]]:
        result = CliRunner().invoke(commands, ["check", "--json", *words], env={**environment, **changes})
        document = json.loads(result.output)
        wrong = [one for one in document["findings"] if one["state"] == "wrong"]
        assert (result.exit_code, document["failed"]) == (1 if wrong else 0, bool(wrong))
        assert all(one["remedy"] for one in wrong)
        assert "s3cret" not in result.output
        return {one["check"]: one for one in document["findings"]}

    return run


def wrong(found: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name, one in found.items() if one["state"] == "wrong"]


def test_nothing_is_wrong_before_a_first_start_and_nothing_is_left(
    check: Check, rows: Rows, bridge: SyntheticBridge
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    found = check()
    assert {name: one["state"] for name, one in found.items()} == dict.fromkeys(
        ("settings", "projects", "bridge", "map", "database", "table", "clock"), "ok"
    )
    assert rows("SELECT 1 FROM pg_tables WHERE schemaname IN ('public', 'wa_monitor')") == []


def test_nothing_is_wrong_beside_a_monitor_that_ran(
    check: Check, rows: Rows, bridge: SyntheticBridge, relay_once: Any
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    relay_once()
    assert wrong(check()) == []
    assert rows("SELECT drop_number FROM qa_photo_reviews") == [("DR1000001",)]


def test_table_that_lacks_a_column_is_named(check: Check, rows: Rows, relay_once: Any) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews DROP COLUMN comment")
    found = check()
    assert wrong(found) == ["table"]
    assert "no column comment" in found["table"]["detail"]


def test_right_that_was_taken_away_is_named(check: Check, rows: Rows, relay_once: Any) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD CONSTRAINT none CHECK (drop_number = '') NOT VALID")
    assert wrong(check()) == ["table"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"DATABASE_URL": "postgresql://u:s3cret@127.0.0.1:1/d"}, ["database"]),
        ({"DATABASE_URL": "s3cret"}, ["database"]),
        ({"DATABASE_URL": ""}, ["database"]),
        ({"NEON_DATABASE_URL": "postgresql://u:s3cret@127.0.0.1:1/d"}, ["settings"]),
        ({"WHATSAPP_DB_PATH": "/none"}, ["bridge", "map"]),
        (
            {"WHATSAPP_DB_PATH": "/none", "DATABASE_URL": "", "WA_PROJECTS": ""},
            ["projects", "bridge", "map", "database"],
        ),
        ({"WHATSAPP_DB_PATH": ""}, ["settings"]),
        ({"WA_PROJECTS": ""}, ["projects"]),
        ({"WA_PROJECTS": "/none"}, ["projects"]),
        ({"WA_LEASE": "long"}, ["settings"]),
        ({"WA_DATABASE_IDENTITY": "production"}, []),
    ],
)
def test_each_fault_is_named_for_itself(check: Check, changes: dict[str, str], names: list[str]) -> None:
    found = check(**changes)
    assert wrong(found) == names


def test_without_a_bridge_the_rest_is_looked_at(check: Check) -> None:
    states = {name: one["state"] for name, one in check(WHATSAPP_DB_PATH="").items()}
    assert (states["bridge"], states["map"], states["database"]) == ("skipped", "skipped", "ok")


def test_database_of_another_name_is_named_and_none_is_given(
    check: Check, rows: Rows, relay_once: Any
) -> None:
    relay_once()
    assert wrong(check(WA_DATABASE_IDENTITY="production")) == []
    assert rows("SELECT identity FROM wa_monitor.installation") == []
    rows("INSERT INTO wa_monitor.installation (identity) VALUES ('tests')")
    found = check(WA_DATABASE_IDENTITY="production")
    assert wrong(found) == ["table"]
    assert "calls itself 'tests'" in found["table"]["detail"]


def test_bridge_that_has_been_silent_for_a_day_is_named(
    check: Check, bridge: SyntheticBridge, environment: dict[str, str]
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    file = _messages(environment)
    long_ago = time.time() - 30 * 3600
    os.utime(file, (long_ago, long_ago))
    found = check()
    assert wrong(found) == ["bridge"]
    assert "for 30 hours" in found["bridge"]["detail"]


def _messages(environment: dict[str, str]) -> Path:
    from pathlib import Path  # noqa: PLC0415 -- of this helper alone

    path = Path(environment["WHATSAPP_DB_PATH"])
    return path / "messages.db" if path.is_dir() else path


def test_for_people_a_line_says_what_to_do(environment: dict[str, str]) -> None:
    result = CliRunner().invoke(commands, ["check"], env={**environment, "WA_PROJECTS": ""})
    assert result.exit_code == 1
    sentence = "wrong    projects: no projects file is given\n         -> set WA_PROJECTS or --projects to "
    assert sentence in result.output
