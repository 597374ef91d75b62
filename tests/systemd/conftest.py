"""A machine with the monitor's unit on it, and the evidence that the summary prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.systemd.machine import BIN, UNIT, Machine, Unit, booted, why_not

Evidence = Callable[[str], None]

QUICK = ("--probation 2", "--watchdog 3", "--stop-timeout 5")
"""What makes the unit's supervisor quick enough for a test; all else is as an operator has it."""


@pytest.fixture(scope="session")
def _machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    why = why_not()
    if why is not None:
        pytest.skip(why)
    with booted(tmp_path_factory.mktemp("machine")) as machine:
        yield machine


@pytest.fixture
def machine(_machine: Machine) -> Iterator[Machine]:
    """The machine as it was prepared; whatever a test has started or changed is put back."""
    _machine.run("systemctl", "start", "wa-database.service")
    yield _machine
    _machine.run("sh", "-c", "systemctl stop 'wa-monitor*' && systemctl reset-failed 'wa-monitor*' || true")
    _machine.run(
        "sh", "-c", "rm -rf /run/systemd/system/wa-* /var/lib/wa-monitor* && systemctl daemon-reload"
    )
    _machine.run("git", "-C", "/opt/wa-monitor", "reset", "--quiet", "--hard", "released", user="wa-monitor")
    _machine.run("git", "-C", "/opt/wa-monitor", "clean", "--quiet", "-dfx", "monitor", user="wa-monitor")


@pytest.fixture
def unit(machine: Machine) -> Unit:
    """`wa-monitor.service` as it is installed, but quick; not started."""
    found = Unit(machine, UNIT)
    found.drop_in(f"[Service]\n{_quick(found)}")
    return found


@pytest.fixture
def started(unit: Unit) -> Unit:
    """The same, started and in sync."""
    done = unit.systemctl("start")
    assert done.returncode == 0, f"{done.stderr}\n{unit.journal()}"
    unit.until_in_sync()
    unit.forget()
    return unit


def _quick(unit: Unit) -> str:
    run = f"{BIN}/wa-supervisor run "
    (line,) = [line for line in unit.text().splitlines() if line.startswith(f"ExecStart={run}")]
    return f"ExecStart=\n{line.replace(run, run + ' '.join(QUICK) + ' ')}\n"


@pytest.fixture
def evidence(request: pytest.FixtureRequest) -> Evidence:
    """Print lines in the summary, under the name of the test."""

    def say(lines: str) -> None:
        request.node.user_properties.append(("evidence", lines))

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the evidence of the tests that have passed."""
    for report in terminalreporter.stats.get("passed", ()):
        said = [lines for key, lines in report.user_properties if key == "evidence"]
        if report.when == "call" and said:
            terminalreporter.section(report.nodeid.rpartition("/")[2], sep="-")
            for lines in said:
                terminalreporter.write_line(lines)
