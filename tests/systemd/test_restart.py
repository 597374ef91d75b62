"""Plain `systemctl restart` after each edit that leaves stale bytecode behind: the new code runs.

The supervisor is held still while the tree is edited, so that it is the restart that has to get it right. The
control arm: before it plain Python, under the same interpreter and environment, must run the stale code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from tests.supervisor.test_gauntlet import GAUNTLET, Row
from tests.systemd.machine import BIN, Machine, Unit

Evidence = Callable[[str], None]

FOLDER = "/srv/gauntlet/row"
NAME = "wa-gauntlet.service"
STALE = [row for row in GAUNTLET if any(step.stale is not None for step in row.steps)]


@pytest.fixture(scope="module")
def edit(_machine: Machine) -> Iterator[Callable[[Row, int], str]]:
    """Do a step of a row; return what plain Python runs then."""
    _machine.run("install", "-d", "--owner=wa-monitor", "/srv/gauntlet")
    words = (f"{BIN}/python", "/opt/repository/tests/systemd/editor.py", FOLDER)
    editor = _machine.open(*words, user="wa-monitor")

    def ask(row: Row, step: int) -> str:
        assert editor.stdin is not None
        assert editor.stdout is not None
        editor.stdin.write(f"{row.name} {step}\n")
        editor.stdin.flush()
        return editor.stdout.readline().rstrip("\n")

    yield ask
    editor.communicate()


@pytest.fixture
def unit(machine: Machine) -> Iterator[Unit]:
    """The monitor's own unit, sandbox and all, with the gauntlet's script for a target."""
    text = machine.run("cat", "/etc/systemd/system/wa-monitor.service")
    text = re.sub(r"ExecStart=(\S+) run .*", r"ExecStart=\1 run --listen 127.0.0.1:0 main.py", text)
    text = re.sub(r"(WorkingDirectory|ReadWritePaths)=.*", r"\1=/srv/gauntlet", text)
    text = text.replace("WorkingDirectory=/srv/gauntlet", f"WorkingDirectory={FOLDER}/tree")
    text = re.sub(r"(RuntimeDirectory|StateDirectory)=.*", r"\1=wa-monitor-gauntlet", text)
    machine.write(f"/run/systemd/system/{NAME}", text)
    machine.run("systemctl", "daemon-reload")
    made = Unit(machine, NAME, "/run/wa-monitor-gauntlet")
    yield made
    made.systemctl("stop")


def last_said(unit: Unit) -> str:
    """Return which version said last that it runs."""
    said = re.findall(r"\]: running (.*)", unit.journal())
    return said[-1] if said else ""


@pytest.mark.parametrize("row", STALE, ids=lambda row: row.name)
def test_restart_runs_new_code(
    unit: Unit, edit: Callable[[Row, int], str], row: Row, evidence: Evidence
) -> None:
    edit(row, -1)
    outside = f"{FOLDER}/outside"
    variables = [f'Environment="{name}={text.format(outside=outside)}"' for name, text in row.environment]
    unit.drop_in("\n".join(["[Service]", *variables]))
    assert unit.systemctl("start").returncode == 0, unit.journal()
    for number, step in enumerate(row.steps):
        unit.forget()
        unit.send("STOP")
        ran = edit(row, number)
        if step.stale is not None and ran != step.stale:
            pytest.fail(f"void: plain Python runs {ran!r} here and not the stale {step.stale!r}")
        assert unit.systemctl("restart").returncode == 0, unit.journal()
        unit.machine.until(lambda runs=step.runs: last_said(unit) == runs, unit.journal())  # type: ignore[misc]
        assert unit.is_verified()
        if step.stale is not None:
            evidence(f"plain Python: {ran}; after systemctl restart: {last_said(unit)}, verified")
