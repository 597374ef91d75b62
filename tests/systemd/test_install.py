"""install-unit and doctor under a real systemd: what is written starts, and what is wrong is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.supervisor.test_environment import AS_SYSTEMD, READ
from tests.systemd.conftest import Evidence
from tests.systemd.machine import BIN, Machine, Unit

ODD = "/srv/wa 100% é"
"""A checkout of its own, at a place that has to be written with care."""

_MOVED = r"""
set -e
mkdir "$1"
cp -a /opt/wa-monitor/supervisor /opt/wa-monitor/monitor /opt/wa-monitor/contrib /opt/wa-monitor/.venv "$1"
for file in "$1"/.venv/lib/python3*/site-packages/wa-monitor.pth; do echo "$1" > "$file"; done
for name in supervisor monitor; do
    # As pip writes it where the interpreter's path has a space.
    printf "#!/bin/sh\n'''exec' \"%s/.venv/bin/python\" \"\$0\" \"\$@\"\n' '''\nimport sys\n" "$1" \
        > "$1/.venv/bin/wa-$name"
    printf 'from %s.cli import main\nsys.exit(main())\n' $name >> "$1/.venv/bin/wa-$name"
done
chown -R wa-monitor: "$1"
"""


@pytest.fixture
def tidy(machine: Machine) -> Iterator[Machine]:
    """The machine, without what install-unit has written afterwards."""
    machine.run("mkdir", "-p", "/root/kept")
    machine.run(
        "sh", "-c", "cp -a /etc/systemd/system/wa-monitor* /root/kept/; rm /etc/systemd/system/wa-monitor*"
    )
    yield machine
    machine.run("sh", "-c", "systemctl stop 'wa-monitor@*' || true")
    written = "/etc/systemd/system/wa-monitor* /etc/systemd/system/*.wants/wa-monitor* /etc/wa-monitor/*.env"
    machine.run("sh", "-c", f"rm -rf {written} /etc/wa-monitor/*.database-url")
    machine.run("sh", "-c", "cp -a /root/kept/* /etc/systemd/system/; systemctl daemon-reload")


def install(machine: Machine, tree: str, instance: str) -> str:
    """Install an instance as an operator does, settings and secret included; return what was said."""
    program = f"{tree}/.venv/bin/wa-supervisor"
    said = machine.run(
        "sh", "-c", 'cd "$1" && "$2" install-unit --instance "$3"', "sh", tree, program, instance
    )
    settings = "WHATSAPP_DB_PATH=/srv/bridge\nWA_PROJECTS=/etc/wa-monitor/projects.yaml\nWA_SINCE=beginning\n"
    machine.run(
        "sh", "-c", f"cat >> /etc/wa-monitor/{instance}.env", stdin=f"{settings}WA_SOURCE={instance}\n"
    )
    machine.run(
        "sh",
        "-c",
        f"install -m 600 /etc/wa-monitor/database-url /etc/wa-monitor/{instance}.database-url",
    )
    return said


def wrong(machine: Machine, *words: str) -> list[dict[str, Any]]:
    done = machine.call(f"{BIN}/wa-supervisor", "doctor", "--json", *words)
    document = json.loads(done.stdout)
    assert "s3cret" not in done.stdout + done.stderr
    found = [one for one in document["findings"] if one["state"] == "wrong"]
    assert (done.returncode, document["failed"]) == (1 if found else 0, bool(found))
    return found


def test_two_instances_from_two_checkouts(tidy: Machine, evidence: Evidence) -> None:
    tidy.run("sh", "-c", _MOVED, "sh", ODD)
    said = [install(tidy, ODD, "dev"), install(tidy, "/opt/wa-monitor", "prod")]
    assert "(port 9464)" in said[0]
    assert "(port 9465)" in said[1]
    evidence("\n".join(said))
    dev = Unit(tidy, "wa-monitor@dev.service", "/run/wa-monitor-dev")
    prod = Unit(tidy, "wa-monitor@prod.service", "/run/wa-monitor-prod")
    before = wrong(tidy)
    assert {(one["unit"], one["remedy"]) for one in before} >= {
        (unit.name, f"systemctl {verb} {unit.name}") for unit in (dev, prod) for verb in ("enable", "start")
    }
    for unit in (dev, prod):
        tidy.run("systemctl", "daemon-reload")
        done = tidy.call("systemctl", "enable", "--now", unit.name)
        assert done.returncode == 0, done.stderr + unit.journal()
        unit.until_in_sync()
    assert wrong(tidy) == []
    evidence(tidy.run(f"{BIN}/wa-supervisor", "doctor"))
    assert dev.status()["listen"] == "127.0.0.1:9464"
    code = tidy.run("readlink", f"/proc/{dev.status()['live']['pid']}/cwd")
    assert code == ODD


def test_faults_of_a_running_unit_are_named(tidy: Machine) -> None:
    install(tidy, "/opt/wa-monitor", "prod")
    unit = Unit(tidy, "wa-monitor@prod.service", "/run/wa-monitor-prod")
    done = tidy.call("systemctl", "enable", "--now", unit.name)
    assert done.returncode == 0, done.stderr + unit.journal()
    unit.until_in_sync()
    assert wrong(tidy) == []
    tidy.run("sh", "-c", "echo LOG_LEVEL=ERROR >> /etc/wa-monitor/prod.env")
    (changed,) = wrong(tidy)
    assert changed["detail"].startswith(
        "LOG_LEVEL: the file holds another value than the supervisor was started"
    )
    tidy.run("systemctl", "restart", unit.name)
    unit.until_in_sync()
    assert wrong(tidy) == []
    tidy.run("systemctl", "stop", "wa-database.service")
    assert "database" in {one["check"] for one in wrong(tidy)}
    tidy.run("systemctl", "start", "wa-database.service")
    tidy.run("sh", "-c", f"sed -i s/RestartSec=2/RestartSec=3/ /etc/systemd/system/{unit.name}")
    assert [one["remedy"] for one in wrong(tidy)] == ["systemctl daemon-reload"]
    refused = tidy.call("sh", "-c", f"cd /opt/wa-monitor && {BIN}/wa-supervisor install-unit --instance prod")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "was edited or is not ours" in refused.stderr


def test_file_of_variables_means_the_same_to_systemd_and_to_us(machine: Machine) -> None:
    machine.write("/run/wa-read/env", f"{AS_SYSTEMD}export EXPORTED=1\n")
    unit = "[Service]\nType=oneshot\nEnvironmentFile=/run/wa-read/env\n"
    machine.write(
        "/run/systemd/system/wa-read.service", f"{unit}ExecStart=/bin/sh -c 'env -0 > /run/wa-read/said'\n"
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "wa-read.service")
    said = [one.split("=", 1) for one in machine.run("cat", "/run/wa-read/said").split("\0") if one]
    assert {name: value for name, value in said if name in READ or name == "EXPORTED"} == READ
