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
UNIT = ROOT / "contrib" / "systemd" / "wa-monitor.service"
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
