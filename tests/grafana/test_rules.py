"""The alerting rules by `promtool test rules`: each fault raises its one alert, in time.

A row is a fault: what differs from an installation where all is well, and which alerts fire when. All other
alerts must be silent at those moments, so one row is at the same time a test of all the others.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.grafana.environment import GRAFANA, heavy

RULES = GRAFANA / "prometheus" / "wa-monitor.rules.yml"
PROMTOOL = shutil.which("promtool")
SAMPLE_SECONDS = 15
SAMPLES = 160
FAULT = 40
"""The sample, ten minutes after the beginning, with which faults begin."""

AT = 'instance="a:9464",job="wa-monitor"'
LID = f'wa_monitor_drops_stored_total{{{AT},project="Northfield",identity="lid",kind="new"}}'
START = f"process_start_time_seconds{{{AT}}}"
LONG_AGO = f"-100000+0x{SAMPLES}"
WELL = {
    f"up{{{AT}}}": "1",
    START: "-100000",
    LID: "0",
    f'wa_monitor_drops_stored_total{{{AT},project="Northfield",identity="phone",kind="new"}}': "0+1",
    f'wa_monitor_lid_rows{{{AT},project="Northfield"}}': "0",
    f'wa_monitor_lid_rows{{{AT},project="other"}}': "0",
    f"wa_monitor_lid_pending{{{AT}}}": "0",
    f"wa_monitor_backlog_rows{{{AT}}}": "0",
    f"wa_monitor_bridge_last_message_age_seconds{{{AT}}}": "60",
    f"wa_monitor_bridge_usual_messages{{{AT}}}": "20",
    f'wa_monitor_broken{{{AT},component="database"}}': "0",
    f'wa_monitor_broken{{{AT},component="bridge"}}': "0",
    f'wa_monitor_foreign_rows{{{AT},project="Northfield"}}': "0",
    f'wa_monitor_store_errors_total{{{AT},error="store_refused"}}': "0",
    f'wa_monitor_store_errors_total{{{AT},error="store_unreachable"}}': "0",
    f"wa_monitor_projects_refused{{{AT}}}": "0",
    f"wa_supervisor_code_in_sync{{{AT}}}": "1",
    f"wa_supervisor_child_up{{{AT}}}": "1",
    f"wa_supervisor_self_outdated{{{AT}}}": "0",
    f'wa_supervisor_watch_mode{{{AT},mode="events"}}': "1",
    f'wa_supervisor_watch_mode{{{AT},mode="partial"}}': "0",
    f'wa_supervisor_watch_mode{{{AT},mode="polling"}}': "0",
    f'wa_supervisor_reloads_total{{{AT},outcome="live",trigger="watch"}}': "0+1",
    f'wa_supervisor_reloads_total{{{AT},outcome="rejected",trigger="watch"}}': "0",
    f'wa_supervisor_reloads_total{{{AT},outcome="rolled_back",trigger="watch"}}': "0",
    f'wa_supervisor_child_restarts_total{{{AT},cause="crash"}}': "0",
    f'wa_supervisor_child_restarts_total{{{AT},cause="hang"}}': "0",
    f'wa_supervisor_child_restarts_total{{{AT},cause="age"}}': "0+1",
}


@dataclass(frozen=True)
class Row:
    """A fault, and what fires when."""

    name: str
    series: dict[str, str]
    """In place of those of `WELL` of the same name and labels; an empty string leaves one out."""
    fires: dict[str, str] = field(default_factory=dict)
    """Time since the beginning to the names of the alerts that fire then, and no other."""
    sample_seconds: int = SAMPLE_SECONDS
    late: bool = False
    """Whether all series are born with the fault."""


def from_then(series: str, value: str, before: str = "0") -> dict[str, str]:
    """Return one series that has another value from the fault on, for good."""
    return {series: f"{before}+0x{FAULT - 1} {value}+0x{SAMPLES - FAULT}"}


def meanwhile(series: str, value: str, samples: int, before: str = "0") -> dict[str, str]:
    """Return one series that has another value for some samples from the fault on."""
    after = SAMPLES - FAULT - samples
    return {series: f"{before}+0x{FAULT - 1} {value}+0x{samples - 1} {before}+0x{after}"}


def born(series: str, value: str) -> dict[str, str]:
    """Return one series that is first seen with the fault."""
    return {series: f"_x{FAULT} {value}+0x{SAMPLES - FAULT}"}


def ended(series: str, value: str) -> dict[str, str]:
    """Return one series that is not seen any more from the fault on."""
    return {series: f"{value}+0x{FAULT - 1} stale"}


RELOADS = f'wa_supervisor_reloads_total{{{AT},outcome="%s",trigger="watch"}}'
CRASHES = f'wa_supervisor_child_restarts_total{{{AT},cause="crash"}}'
PENDING = f"wa_monitor_lid_pending{{{AT}}}"
BACKLOG = f"wa_monitor_backlog_rows{{{AT}}}"
BROKEN = f'wa_monitor_broken{{{AT},component="%s"}}'
ALONE = {series: "" for series in WELL if series.startswith("wa_supervisor_")}

ROWS = (
    Row("all is well", {}, {"1m": "", "5m": "", "15m": "", "40m": ""}),
    Row("a LID", from_then(LID, "1"), {"9m45s": "", "10m": "LidStored", "14m": "LidStored", "15m15s": ""}),
    Row("a LID, first seen at 1", born(LID, "1"), {"10m": "LidStored", "14m": "LidStored", "15m15s": ""}),
    Row("a LID after a restart", from_then(LID, "1", "5"), {"9m": "", "10m": "LidStored", "15m15s": ""}),
    Row(
        "a LID before the first scrape of a new supervisor",
        {**born(LID, "1"), **born(START, "590")},
        {"10m": "LidStored", "14m": "LidStored", "15m15s": ""},
        late=True,
    ),
    Row("LIDs of long ago, new Prometheus", {LID: "3"}, {"15s": "", "1m": "", "5m": "", "10m": ""}),
    Row(
        "LIDs of long ago, a monitor started alone",
        {**ALONE, **born(LID, "3"), **born(START, "590")},
        {"10m": "", "12m": "", "16m": ""},
        late=True,
    ),
    Row(
        "LIDs stand and are repaired",
        meanwhile(f'wa_monitor_lid_rows{{{AT},project="Northfield"}}', "2", 8),
        {"10m15s": "", "10m30s": "LidRowsStanding", "11m45s": "LidRowsStanding", "12m": ""},
    ),
    Row(
        "other code",
        from_then(f"wa_supervisor_code_in_sync{{{AT}}}", "0", "1"),
        {"10m45s": "", "11m": "CodeNotInSync"},
    ),
    Row("a reload", meanwhile(f"wa_supervisor_code_in_sync{{{AT}}}", "0", 3, "1"), {"10m45s": "", "11m": ""}),
    Row("rejected", from_then(RELOADS % "rejected", "1"), {"10m": "ReloadRejected", "15m15s": ""}),
    Row("rolled back", from_then(RELOADS % "rolled_back", "1"), {"10m": "RolledBack", "15m15s": ""}),
    Row("unchanged", from_then(RELOADS % "unchanged", "1"), {"10m": "", "12m": ""}),
    Row(
        "three crashes",
        {CRASHES: f"0+0x{FAULT - 1} 1+0x3 2+0x3 3+0x{SAMPLES}"},
        {"12m45s": "", "13m": "CrashLoop", "19m": "CrashLoop", "25m": ""},
    ),
    Row("two crashes", {CRASHES: f"0+0x{FAULT - 1} 1+0x3 2+0x{SAMPLES}"}, {"12m": "", "14m": "", "19m": ""}),
    Row(
        "no child",
        from_then(f"wa_supervisor_child_up{{{AT}}}", "0", "1"),
        {"11m": "", "13m30s": "CrashLoop"},
    ),
    Row(
        "no child for a minute",
        meanwhile(f"wa_supervisor_child_up{{{AT}}}", "0", 4, "1"),
        {"11m": "", "13m": ""},
    ),
    Row(
        "partly blind",
        from_then(f'wa_supervisor_watch_mode{{{AT},mode="partial"}}', "1"),
        {"10m45s": "", "11m": "WatcherBlind"},
    ),
    Row(
        "polling",
        from_then(f'wa_supervisor_watch_mode{{{AT},mode="polling"}}', "1"),
        {"10m45s": "", "11m": "WatcherBlind"},
    ),
    Row("down", from_then(f"up{{{AT}}}", "0", "1"), {"10m45s": "", "11m": "NoScrape"}),
    Row("no such target", ended(f"up{{{AT}}}", "1"), {"10m45s": "", "11m": "NoScrape"}),
    Row("one scrape failed", meanwhile(f"up{{{AT}}}", "0", 1, "1"), {"10m": "", "11m": ""}),
    Row("behind", from_then(BACKLOG, "5"), {"11m45s": "", "12m": "MonitorBehind"}),
    Row("busy", {BACKLOG: "5 5 5 0 " * (SAMPLES // 4)}, {"5m": "", "12m": ""}),
    Row(
        "a silent bridge",
        from_then(f"wa_monitor_bridge_last_message_age_seconds{{{AT}}}", "4000", "60"),
        {"14m45s": "", "15m": "BridgeSilent"},
    ),
    Row(
        "a quiet night",
        {
            **from_then(f"wa_monitor_bridge_last_message_age_seconds{{{AT}}}", "4000", "60"),
            f"wa_monitor_bridge_usual_messages{{{AT}}}": "2",
        },
        {"15m": "", "35m": ""},
    ),
    Row("senders wait", from_then(PENDING, "5"), {"19m45s": "", "20m": "SendersPending"}),
    Row("some senders wait", from_then(PENDING, "4"), {"20m": "", "35m": ""}),
    Row("senders waited", meanwhile(PENDING, "9", 20), {"14m": "", "20m": ""}),
    Row(
        "one sender waits for a day",
        {PENDING: "1"},
        {"23h": "", "24h5m": "", "24h15m": "SendersPending"},
        sample_seconds=300,
    ),
    Row("no database", from_then(BROKEN % "database", "1"), {"10m15s": "", "10m30s": "DatabaseDown"}),
    Row("no bridge", from_then(BROKEN % "bridge", "1"), {"10m45s": "", "11m": "MonitorBroken"}),
    Row(
        "no word from the monitor",
        {**ended(BROKEN % "database", "0"), **ended(BROKEN % "bridge", "0")},
        {"10m45s": "", "11m": "MonitorBroken"},
    ),
    Row(
        "outdated",
        from_then(f"wa_supervisor_self_outdated{{{AT}}}", "1"),
        {"19m45s": "", "20m": "SupervisorOutdated"},
    ),
    Row(
        "another writer",
        from_then(f'wa_monitor_foreign_rows{{{AT},project="Northfield"}}', "1"),
        {"10m15s": "", "10m30s": "ForeignRows"},
    ),
    Row(
        "a message refused",
        from_then(f'wa_monitor_store_errors_total{{{AT},error="store_refused"}}', "1"),
        {"9m45s": "", "10m": "MessagesRefused", "15m15s": ""},
    ),
    Row(
        "another error",
        from_then(f'wa_monitor_store_errors_total{{{AT},error="store_unreachable"}}', "1"),
        {"10m": "", "12m": ""},
    ),
    Row(
        "projects refused",
        from_then(f"wa_monitor_projects_refused{{{AT}}}", "1"),
        {"10m15s": "", "10m30s": "ProjectsRefused"},
    ),
)


def whole(values: str, row: Row) -> str:
    """Write out for how long a value lasts."""
    if not re.fullmatch(r"-?\d+(\+\d+)?", values):
        return values
    samples = 26 * 3600 // row.sample_seconds if row.sample_seconds > SAMPLE_SECONDS else SAMPLES
    before = f"_x{FAULT} " if row.late else ""
    return f"{before}{values if '+' in values else values + '+0'}x{samples}"


def group(row: Row) -> dict[str, object]:
    """Return the row as promtool reads it."""
    series = {**WELL, **row.series}
    return {
        "name": row.name,
        "interval": f"{row.sample_seconds}s",
        "input_series": [
            {"series": name, "values": whole(values, row)} for name, values in series.items() if values
        ],
        "promql_expr_test": [
            {
                "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": moment,
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names.split()],
            }
            for moment, names in row.fires.items()
        ],
    }


def run(folder: Path, rules: Path, rows: tuple[Row, ...]) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    files = []
    for seconds in {row.sample_seconds for row in rows}:
        document = {
            "rule_files": [str(rules)],
            "evaluation_interval": f"{seconds}s",
            "tests": [group(row) for row in rows if row.sample_seconds == seconds],
        }
        files.append(folder / f"every-{seconds}-seconds.yml")
        files[-1].write_text(yaml.safe_dump(document), encoding="utf-8")
    return subprocess.run(
        [PROMTOOL, "test", "rules", *files], check=False, capture_output=True, text=True, timeout=100
    )


def rules() -> list[dict[str, str]]:
    document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def alerts() -> set[str]:
    return {rule["alert"] for rule in rules() if "alert" in rule}


needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool here (Debian: prometheus)")


def test_every_alert_has_a_fault_that_raises_it_and_a_moment_when_it_is_silent() -> None:
    assert {name for row in ROWS for names in row.fires.values() for name in names.split()} == alerts()
    assert all("" in row.fires.values() for row in ROWS if "first" not in row.name)


@heavy
@needs_promtool
def test_each_fault_raises_its_alert_in_time_and_no_other(tmp_path: Path) -> None:
    done = run(tmp_path, RULES, ROWS)
    assert done.returncode == 0, done.stdout + done.stderr


@heavy
@needs_promtool
def test_an_alert_that_never_fires_is_noticed(tmp_path: Path) -> None:
    unnoticed = set()
    for name in alerts():
        document = yaml.safe_load(RULES.read_text(encoding="utf-8"))
        for part in document["groups"]:
            for rule in part["rules"]:
                if rule.get("alert") == name:
                    rule["expr"] = f"({rule['expr']}) > 1e9"
        blunted = tmp_path / "blunted.yml"
        blunted.write_text(yaml.safe_dump(document), encoding="utf-8")
        about = tuple(row for row in ROWS if name in row.fires.values())
        if run(tmp_path, blunted, about).returncode == 0:
            unnoticed.add(name)
    assert unnoticed == set()
