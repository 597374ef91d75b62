"""What lies in ``contrib/`` names only what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml
from prometheus_client import CollectorRegistry

from supervisor.child.metrics import failure
from supervisor.metrics import ChildMetrics, SupervisorMetrics

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "contrib" / "systemd"
UNIT = UNITS / "wa-monitor.service"
RULES = ROOT / "contrib" / "grafana" / "prometheus" / "wa-monitor.rules.yml"
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


def help_of(*command: str) -> str:
    script = Path(sys.executable).with_name(command[0])
    # Wide enough that no option is cut.
    environment = {"COLUMNS": "200", "PATH": "/usr/bin:/bin"}
    return subprocess.run(
        [script, *command[1:], "--help"], check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_unit_names_commands_and_options_that_exist() -> None:
    commands = re.findall(r"^Exec\w+=\S+/(wa-\w+) (\w+)(.*)$", UNIT.read_text(encoding="utf-8"), re.MULTILINE)
    assert {command for _, command, _ in commands} == {"run", "reload"}
    for script, command, rest in commands:
        assert set(re.findall(r"--[\w-]+", rest)) <= set(re.findall(r"--[\w-]+", help_of(script, command)))


def test_systemd_accepts_the_unit(tmp_path: Path, not_checked: Callable[[str], None]) -> None:
    not_checked("the units under a real systemd: `make systemd` boots one")
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        not_checked("the unit by systemd-analyze: there is none here")
        return
    here = tmp_path / UNIT.name
    text = re.sub(r"/opt/wa-monitor/.venv/bin/\S+", "/bin/true", UNIT.read_text(encoding="utf-8"))
    here.write_text(text.replace("User=wa-monitor", "User=daemon"), encoding="utf-8")
    verified = subprocess.run(
        [analyze, "verify", "--man=no", here], check=False, capture_output=True, text=True
    )
    about_us = [line for line in verified.stderr.splitlines() if UNIT.name in line]
    assert about_us == []


def test_rules_and_reference_name_metrics_that_exist() -> None:
    registry = CollectorRegistry()
    SupervisorMetrics(registry)
    ours = {sample.name for family in registry.collect() for sample in family.samples}
    ours |= {family.name for family in registry.collect()}
    ours |= set(re.findall(r"\bwa_supervisor_\w+", ChildMetrics().exposition().decode()))
    ours |= {failure("why")["name"]}
    named = set(re.findall(r"\bwa_supervisor_\w+", REFERENCE + RULES.read_text(encoding="utf-8")))
    assert named <= ours
    assert {name for name in ours if name.endswith("_total")} <= named


def test_every_alert_says_what_to_run() -> None:
    (group,) = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]:
        script, command = re.findall(r"`(wa-\w+) ([\w-]+)", rule["annotations"]["description"])[0]
        assert command in help_of(script)
        assert set(re.findall(r"\bwa_\w+", rule["expr"])) <= set(re.findall(r"\bwa_\w+", REFERENCE))


def options(unit: Path) -> list[str]:
    """Return what a unit says, without its comments."""
    lines = unit.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "["))]


def test_instance_differs_from_the_single_service_in_its_names_alone() -> None:
    default_port = "Environment=WA_SUPERVISOR_LISTEN=127.0.0.1:9464"
    single = [line for line in options(UNIT) if line != default_port]
    instance = options(UNITS / "wa-monitor@.service")
    assert len(single) == len(instance)
    for line, of_instance in zip(single, instance, strict=True):
        plain = of_instance.replace("/%i.env", "/env").replace("/%i.", "/").replace("-%i", "")
        assert plain.replace("monitor %i,", "monitor,") == line


def test_pull_has_the_same_sandbox_as_the_service() -> None:
    def sandbox(unit: Path) -> set[str]:
        lines = options(unit)
        return set(lines[lines.index("ReadWritePaths=/opt/wa-monitor") :])

    check = "Check=/opt/wa-monitor/.venv/bin/wa-monitor check --json"
    service = sandbox(UNIT) - {"UMask=0077", "WantedBy=multi-user.target", check}
    assert sandbox(UNITS / "wa-monitor-pull@.service") == service


def test_nothing_in_the_units_needs_a_newer_systemd() -> None:
    newer = {"ImportCredential", "RestartSteps", "RestartMaxDelaySec", "SurviveFinalKillSignal"}
    for unit in UNITS.glob("wa-*"):
        keys = {line.partition("=")[0] for line in options(unit)}
        assert not keys & newer
        assert "Type=notify-reload" not in options(unit)
