"""The command line: what it prints, how it ends, and the embedded database behind it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from monitor.cli import commands
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.settings import _ENVIRONMENT, Values

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[..., list[tuple[Any, ...]]]

PHONE = "27711234567"
LID = "100000000000017"


def _run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "monitor", *arguments],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


@pytest.fixture
def invoke(environment: dict[str, str]) -> Callable[..., tuple[int, str]]:
    """Run a command in this process and return its exit status and what it printed."""

    def run(*arguments: str, **changes: str) -> tuple[int, str]:
        result = CliRunner().invoke(commands, arguments, env={**environment, **changes})
        return result.exit_code, result.output

    return run


@pytest.fixture
def standing_lid(bridge: SyntheticBridge, relay_once: Any, rows: Rows) -> None:
    """A table with one LID that the map can resolve."""
    bridge.map_lid(LID, PHONE)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    relay_once()
    rows("UPDATE qa_photo_reviews SET submitted_by = %s", LID)


def test_run_once_relays_the_backlog(
    bridge: SyntheticBridge, environment: dict[str, str], rows: Rows
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=f"{PHONE}@s.whatsapp.net", content="DR1000001")
    ended = _run(environment, "run", "--once")
    assert ended.returncode == 0, ended.stderr
    assert rows("SELECT drop_number, submitted_by FROM qa_photo_reviews") == [("DR1000001", PHONE)]


@pytest.mark.usefixtures("standing_lid")
def test_audit_repair_audit(invoke: Callable[..., tuple[int, str]]) -> None:
    status, text = invoke("audit")
    assert (status, "Northfield" in text) == (1, True)
    status, text = invoke("repair-lids", "--dry-run")
    assert (status, "would be repaired" in text) == (0, True)
    assert invoke("audit")[0] == 1
    status, text = invoke("repair-lids")
    assert status == 0
    assert re.search(r"Northfield\s+\S*\s*1", text)
    status, text = invoke("audit", "--json")
    assert (status, json.loads(text)["failed"]) == (0, False)


def test_audit_masks_numbers(invoke: Callable[..., tuple[int, str]], relay_once: Any, rows: Rows) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name)"
        " VALUES ('DR1', '80000000000018', 'x')"
    )
    assert "80000000000018" not in invoke("audit")[1]
    assert "80000000000018" in invoke("audit", LOG_NUMBERS="full")[1]


def test_database_that_no_monitor_knows_is_named(environment: dict[str, str]) -> None:
    ended = _run(environment, "audit")
    assert ended.returncode == 1
    assert "has no tables of the monitor" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_unreadable_map_repairs_nothing(
    bridge: SyntheticBridge, environment: dict[str, str], relay_once: Any
) -> None:
    relay_once()
    bridge.whatsapp_db.unlink()
    ended = _run(environment, "repair-lids")
    assert ended.returncode == 1
    assert "map is unavailable" in ended.stderr


def test_without_a_url_an_embedded_database_runs_in_the_state_directory_and_keeps_its_data(
    bridge: SyntheticBridge, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    state = tmp_path_factory.mktemp("s")
    alone = {**environment, "STATE_DIRECTORY": str(state), "DATABASE_URL": ""}
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    first = _run(alone, "run", "--once")
    assert first.returncode == 0, first.stderr
    assert (state / "postgres").is_dir()
    second = _run({**alone, "WA_SINCE": ""}, "run", "--once")
    assert second.returncode == 0, second.stderr
    assert "Found drop" in first.stdout
    assert "Found drop" not in second.stdout


def test_wrong_url_is_one_sentence_without_its_password(environment: dict[str, str]) -> None:
    for command in (("run", "--once"), ("audit",), ("repair-lids",)):
        ended = _run({**environment, "DATABASE_URL": "mysql://monitor:s3cret-word@db/wa"}, *command)
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert "s3cret" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("command", ["run", "audit", "repair-lids", "explain", "reconcile", "demo"])
def test_every_command_explains_itself(command: str) -> None:
    ended = CliRunner().invoke(commands, [command, "--help"])
    assert ended.exit_code == 0
    assert "Usage" in ended.output


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        (("run",), {"WA_PROJECTS": ""}),
        (("run",), {"WA_SINCE": ""}),
        (("run",), {"WA_PROJECTS": "/nowhere/projects.yaml"}),
        (("audit",), {}),
        (("repair-lids", "--dry-run"), {}),
        (("repair-lids",), {}),
    ],
)
def test_no_database_is_made_for_a_command_that_cannot_use_it(
    environment: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
    command: tuple[str, ...],
    changes: dict[str, str],
) -> None:
    state = tmp_path_factory.mktemp("s")
    ended = _run({**environment, "STATE_DIRECTORY": str(state), "DATABASE_URL": "", **changes}, *command)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert not list(state.iterdir())


def test_reference_names_every_flag_key_and_variable() -> None:
    reference = (Path(__file__).parents[2] / "docs" / "reference.md").read_text(encoding="utf-8")
    section = reference.partition("## `wa-monitor`\n")[2]
    flags = {
        flag
        for command in ("run", "audit", "repair-lids", "explain", "reconcile", "demo")
        for flag in re.findall(r"--[a-z][a-z-]+", CliRunner().invoke(commands, [command, "--help"]).output)
    } - {"--help"}
    names = {name for alternatives in _ENVIRONMENT.values() for name in alternatives}
    wanted = {f"`{one}" for one in flags | names | set(Values.__struct_fields__)}
    assert {one for one in wanted if one not in section} == set()


def test_unknown_option_is_a_usage_error(environment: dict[str, str]) -> None:
    ended = _run(environment, "run", "--brigde", "x")
    assert ended.returncode == 2
    assert "--brigde" in ended.stderr


@pytest.mark.usefixtures("standing_lid")
def test_repair_is_undone_by_its_run(invoke: Callable[..., tuple[int, str]], rows: Rows) -> None:
    status, text = invoke("repair-lids")
    assert status == 0
    run = re.search(r"in run (\S+):", text)
    assert run is not None
    status, text = invoke("repair-lids", "--undo", run[1])
    assert (status, text) == (0, "1 rows of Northfield hold again what they held before\n")
    assert rows("SELECT submitted_by FROM qa_photo_reviews") == [(LID,)]
    assert invoke("repair-lids", "--undo", run[1]) == (0, "Nothing was put back.\n")
    status, text = invoke("repair-lids", "--undo", "another")
    assert (status, run[1] in text) == (2, True)
    assert invoke("repair-lids", "--undo", run[1], "--dry-run")[0] == 2


@pytest.mark.usefixtures("standing_lid")
def test_drop_is_explained_with_numbers_masked(
    invoke: Callable[..., tuple[int, str]], bridge: SyntheticBridge
) -> None:
    bridge.post(chat_jid="120363000000000009@g.us", sender=PHONE, content="DR1000001")
    status, text = invoke("explain", "dr 1000001")
    assert status == 0
    assert "row in Northfield" in text
    assert "stored as a new drop" in text
    assert "posted in a group that is no project" in text
    assert not re.search("[0-9]{9}", text)
    assert " SAST" in text
    _, text = invoke("explain", "DR1000001", WA_BUSINESS_ZONE="UTC")
    assert " UTC" in text
    assert " SAST" not in text
    status, text = invoke("explain", "DR1000009")
    assert (status, "not seen" in text) == (1, True)
    assert invoke("explain", "tomorrow")[0] == 2


@pytest.mark.usefixtures("standing_lid")
def test_bridge_and_table_are_compared(invoke: Callable[..., tuple[int, str]], rows: Rows) -> None:
    status, text = invoke("reconcile", "--since", "beginning")
    assert (status, text) == (0, "1 messages, 1 drops; 0 not read yet\nNo difference.\n")
    rows("DELETE FROM qa_photo_reviews")
    status, text = invoke("reconcile", "--since", "beginning")
    assert (status, "gone: DR1000001 in Northfield" in text) == (1, True)
    status, text = invoke("reconcile", "--since", "2026-01-01T00:00:00+02:00", "--json")
    assert (status, json.loads(text)["gone"][0]["drop_number"]) == (1, "DR1000001")
    assert invoke("reconcile", "--since", "yesterday")[0] == 2


@pytest.mark.usefixtures("standing_lid")
def test_audit_lists_what_was_stored_since_and_accepts_foreign_rows_on_demand(
    invoke: Callable[..., tuple[int, str]], rows: Rows
) -> None:
    rows("UPDATE qa_photo_reviews SET submitted_by = %s", PHONE)
    rows("INSERT INTO qa_photo_reviews (drop_number, user_name) VALUES ('DR1000009', 'typed by hand')")
    status, text = invoke("audit", "--since", "2026-01-01T00:00:00+02:00")
    assert status == 1
    assert "foreign_row: 1 in (none) by another writer" in text
    assert re.search(r"DR1000001 .* Northfield .* new .* phone .* certain .* in the map's phone column", text)
    status, text = invoke("audit", "--accept-foreign")
    assert (status, "1 rows of other writers were adopted" in text) == (0, True)
