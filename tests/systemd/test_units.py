"""What lies in contrib/systemd, as the systemd that is to run it sees it."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.systemd.machine import Machine

Evidence = Callable[[str], None]

UNITS = (
    "wa-monitor.service",
    "wa-monitor@prod.service",
    "wa-monitor-pull@prod.service",
    "wa-monitor-pull@prod.timer",
)
DROP_INS = "/opt/repository/contrib/systemd/drop-ins"
MOST_EXPOSED = 2.0
NEWER = {"systemd-254": 254}
"""Drop-ins that an older systemd does not understand, and the first that does."""


def version(machine: Machine) -> int:
    return int(machine.run("systemctl", "--version").split()[1])


def verify(machine: Machine, *units: str) -> str:
    """Return all that `systemd-analyze verify` has to say; it exits 0 on warnings."""
    machine.run("systemctl", "daemon-reload")
    done = machine.call("systemd-analyze", "verify", "--man=no", *units)
    return done.stdout + done.stderr


def test_units_are_understood_without_a_word(machine: Machine) -> None:
    assert verify(machine, *UNITS) == ""


def test_verify_says_a_word_about_what_it_does_not_understand(machine: Machine) -> None:
    place = "/run/systemd/system/wa-monitor.service.d/test.conf"
    machine.write(place, "[Service]\nWatchdogSecs=30\n")
    assert "Unknown key name 'WatchdogSecs'" in verify(machine, "wa-monitor.service")


@pytest.mark.parametrize("unit", UNITS[:3])
def test_exposure_is_low(machine: Machine, evidence: Evidence, unit: str) -> None:
    said = machine.run("systemd-analyze", "security", "--no-pager", unit)
    (exposure,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(exposure) <= MOST_EXPOSED
    evidence(f"systemd {version(machine)}: {said.splitlines()[-1].strip()}")


def test_every_drop_in_is_understood(machine: Machine, not_checked: Callable[[str], None]) -> None:
    names = [name.removesuffix(".conf") for name in machine.run("ls", DROP_INS).splitlines()]
    machine.run("sh", "-c", "getent group whatsapp-bridge || groupadd --system whatsapp-bridge")
    machine.run("cp", "-a", "/opt/wa-monitor", "/opt/wa-monitor-dev")
    try:
        for name in names:
            needs = NEWER.get(name, 0)
            if version(machine) < needs:
                not_checked(f"drop-ins/{name}.conf: needs systemd {needs}, here is {version(machine)}")
                continue
            place = "/run/systemd/system/wa-monitor.service.d"
            machine.run("mkdir", "-p", place)
            machine.run("cp", f"{DROP_INS}/{name}.conf", f"{place}/test.conf")
            assert verify(machine, "wa-monitor.service") == "", name
    finally:
        machine.run("rm", "-r", "/opt/wa-monitor-dev")
