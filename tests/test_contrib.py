"""What lies in ``contrib/`` names only what exists."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from monitor.metrics import Counts, MonitorMetrics
from supervisor.child.metrics import failure
from supervisor.metrics import ChildMetrics, SupervisorMetrics

ROOT = Path(__file__).parents[1]
UNITS = ROOT / "contrib" / "systemd"
UNIT = UNITS / "wa-monitor.service"
GRAFANA = ROOT / "contrib" / "grafana"
RULES = GRAFANA / "prometheus" / "wa-monitor.rules.yml"
ALERTING = GRAFANA / "provisioning" / "alerting" / "wa-monitor.yml"
DASHBOARD = GRAFANA / "dashboards" / "wa-monitor.json"
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")


@functools.cache
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


def metrics_of_the_monitor() -> set[str]:
    metrics = MonitorMetrics()
    metrics.update(projects=("Northfield",), began=datetime.now(UTC), last_message_at=datetime.now(UTC))
    metrics.update(counts=Counts())
    return {sample.name for family in metrics.collect() for sample in family.samples}


def metrics_of_the_supervisor() -> set[str]:
    registry = CollectorRegistry()
    SupervisorMetrics(registry)
    ours = {
        name for family in registry.collect() for name in (family.name, *(s.name for s in family.samples))
    }
    ours |= set(re.findall(r"\bwa_supervisor_\w+", ChildMetrics().exposition().decode()))
    return ours | {failure("why")["name"]}


def test_reference_names_every_counter_of_the_supervisor() -> None:
    ours = metrics_of_the_supervisor()
    named = set(re.findall(r"\bwa_supervisor_\w+", REFERENCE))
    assert named <= ours
    assert {name for name in ours if name.endswith("_total")} <= named


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


@pytest.mark.parametrize("path", [RULES, ALERTING, DASHBOARD], ids=lambda path: path.parent.name)
def test_alerts_and_dashboard_name_metrics_that_exist(path: Path) -> None:
    recorded = r"(?<!:)\bwa_(?:supervisor|monitor)_\w+(?!\w*:)"
    named = set(re.findall(recorded, path.read_text(encoding="utf-8")))
    stages = {f"wa_supervisor_reload_stage_seconds_{part}" for part in ("bucket", "sum", "count")}
    assert named
    assert named <= metrics_of_the_supervisor() | metrics_of_the_monitor() | stages


def test_alerts_are_what_their_one_source_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, GRAFANA / "alerts.py", tmp_path], check=True)
    for path in (RULES, ALERTING):
        written = tmp_path / path.relative_to(GRAFANA)
        assert path.read_text(encoding="utf-8") == written.read_text(encoding="utf-8"), "run `make generate`"


def test_prometheus_and_grafana_have_the_same_conditions() -> None:
    rules = [rule for group in read(RULES)["groups"] for rule in group["rules"]]
    recorded = {rule["record"]: rule["expr"] for rule in rules if "record" in rule}
    of_prometheus = {}
    for rule in rules:
        if "alert" in rule:
            query, comparison, threshold = re.fullmatch(r"(?s)(.*) ([<>]) (\S+)", rule["expr"]).groups()  # type: ignore[union-attr]
            bare = query[1:-1] if query.startswith("(") else query
            query = recorded.get(query, bare)
            of_prometheus[rule["alert"]] = (query, comparison, float(threshold), rule["for"], rule["labels"])
    of_grafana = {}
    for rule in (rule for group in read(ALERTING)["groups"] for rule in group["rules"]):
        query, threshold = rule["data"]
        (condition,) = threshold["model"]["conditions"]
        comparison = {"gt": ">", "lt": "<"}[condition["evaluator"]["type"]]
        (limit,) = condition["evaluator"]["params"]
        assert (rule["condition"], threshold["model"]["expression"]) == ("B", "A")
        expression = query["model"]["expr"]
        of_grafana[rule["title"]] = (expression, comparison, float(limit), rule["for"], rule["labels"])
    assert of_grafana == of_prometheus


def test_grafana_finds_nothing_to_expand_in_its_provisioning() -> None:
    # It takes a $ for the name of an environment variable.
    assert "$" not in ALERTING.read_text(encoding="utf-8")


def test_alerts_name_the_data_source_that_is_provisioned() -> None:
    (source,) = read(GRAFANA / "provisioning" / "datasources" / "wa-monitor.yml")["datasources"]
    used = {
        query["datasourceUid"]
        for group in read(ALERTING)["groups"]
        for rule in group["rules"]
        for query in rule["data"]
    }
    assert used == {source["uid"], "__expr__"}


def test_every_alert_says_what_it_means_what_to_run_and_where_to_read_on() -> None:
    alerts = [rule for group in read(RULES)["groups"] for rule in group["rules"] if "alert" in rule]
    for rule in alerts:
        texts = rule["annotations"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert texts["summary"]
        assert texts["runbook_url"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert " First run `" in texts["description"]
        for script, command in re.findall(r"`(wa-\w+) ([\w-]+)", texts["description"]):
            assert command in help_of(script)


def test_operations_has_a_section_for_every_alert() -> None:
    path = ROOT / "docs" / "operations.md"
    sections = set(re.findall(r"^### (\w+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    alerts = {rule.get("alert") for group in read(RULES)["groups"] for rule in group["rules"]} - {None}
    assert alerts <= sections


def read(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document
