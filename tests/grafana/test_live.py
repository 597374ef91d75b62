"""Dashboard and alerts at work: a real Prometheus scrapes the real supervisor, a real Alertmanager calls.

Grafana itself is not started: Debian has no package of it. What it would ask is asked, variables filled in.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml

from monitor.demo import incident
from monitor.demo.bridge import UNMAPPED_LID
from monitor.demo.stage import Stage, script
from monitor.demo.stream import Stream
from monitor.embedded import EmbeddedPostgres
from tests.grafana.environment import ALERTING, DASHBOARD, heavy
from tests.grafana.watching import ALERTMANAGER, PROMETHEUS, Prometheus, free_port, watching
from tests.supervisor.harness import until

pytestmark = [
    heavy,
    pytest.mark.skipif(PROMETHEUS is None, reason="there is no prometheus here"),
    pytest.mark.skipif(ALERTMANAGER is None, reason="there is no Alertmanager here"),
    pytest.mark.timeout(400),
]

SCRAPE_SECONDS = 15
"""That of the prometheus.yml that we hand out."""
LASTING_SECONDS = 30
"""`for` of LidRowsStanding."""
PATIENCE_SECONDS = 100.0
RATE = 5.0


def has_a_number(series: list[dict[str, Any]]) -> bool:
    found = [pair for entry in series for pair in (entry.get("values") or [entry["value"]])]
    return any(math.isfinite(float(value)) for _, value in found)


def filled(query: str, span_seconds: float) -> str:
    """Put in what Grafana puts in for its variables, at a scrape each second."""
    spans = {"$__range": f"{int(span_seconds)}s", "$__rate_interval": "4s", "$__interval": "1s"}
    for name, value in {**spans, "$instance": ".*", "$project": ".*"}.items():
        query = query.replace(name, value)
    assert "$" not in query.replace('"$1"', "")
    return query


def without_data(queries: Iterable[tuple[str, str]], ask: Callable[[str], list[dict[str, Any]]]) -> list[str]:
    return [f"{title}: {query}" for title, query in queries if not has_a_number(ask(query))]


def alert_queries() -> list[tuple[str, str]]:
    document = yaml.safe_load(ALERTING.read_text(encoding="utf-8"))
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    return [(rule["title"], rule["data"][0]["model"]["expr"]) for rule in rules]


def firing(prometheus: Prometheus, start: float, end: float) -> set[str]:
    found = prometheus.over('ALERTS{alertstate="firing"}', start, end, 1)
    return {series["metric"]["alertname"] for series in found}


def test_every_panel_and_every_alert_finds_data_while_the_tour_runs(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    with watching(tmp_path, scrape_seconds=1) as (prometheus, _):
        address = f"127.0.0.1:{free_port()}"
        prometheus.scrape(address)
        until(lambda: bool(prometheus.now("up")), PATIENCE_SECONDS)
        command = [script("wa-monitor"), "demo", "--once", "--listen", address]
        tour = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        assert tour.returncode == 0, tour.stdout + tour.stderr

        (up,) = prometheus.over("up == 1", time.time() - PATIENCE_SECONDS, time.time(), 1)
        start, end = (float(up["values"][place][0]) for place in (0, -1))
        span = end - start
        document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
        targets = [
            (panel["title"], target["expr"], target.get("instant", False))
            for panel in document["panels"]
            for target in panel.get("targets", ())
        ]
        at_once = [(title, filled(query, span)) for title, query, instant in targets if instant]
        in_time = [(title, filled(query, span)) for title, query, instant in targets if not instant]
        in_time += alert_queries()
        (reloads,) = document["annotations"]["list"]
        events = prometheus.over(filled(reloads["expr"], span), start, end, 1)
        lacking = [
            *without_data(at_once, lambda query: prometheus.now(query, end)),
            *without_data(in_time, lambda query: prometheus.over(query, start, end, 1)),
        ]
        assert lacking == []
        live = {"outcome": "live", "trigger": "watch"}
        (saves,) = (event for event in events if live.items() <= event["metric"].items())
        assert sum(float(value) for _, value in saves["values"]) == 2, "the bug was saved, then the fix"
        assert prometheus.values("instance", "wa_supervisor_code_in_sync", start, end)
        assert {"Northfield", "Eastvale"} <= prometheus.values("project", "wa_monitor_lid_rows", start, end)
        assert firing(prometheus, start, end) == {"LidStored"}
        measured(
            f"{len(targets)} queries of panels and {len(alert_queries())} of alerts found data in a tour of "
            f"{span:.0f} s, scraped each second; {len(saves['values'])} reloads as annotations"
        )


def test_standing_lids_are_told_within_two_scrapes_and_so_is_their_end(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    with (
        watching(tmp_path) as (prometheus, webhook),
        Stage(tmp_path / "stage") as stage,
        Stream(stage.bridge, seed=7, rate=RATE, first_drop=1_000_001),
    ):
        stage.bridge.map_lid(*UNMAPPED_LID)  # What the bug stores of him could not be repaired else.
        stage.supervise("monitor.app:main", options=("--type", "notify", "--handover", "overlap"))
        born = f'{{instance="{stage.address}",identity="lid"}}'
        prometheus.scrape(stage.address)
        scrapes = f'count_over_time(up{{instance="{stage.address}"}}[5m]) > 2'
        until(lambda: bool(prometheus.now(scrapes)), PATIENCE_SECONDS)
        lids = prometheus.now(f"wa_monitor_drops_stored_total{born}")
        assert {series["value"][1] for series in lids} == {"0"}, (
            "each label set is there before the first LID"
        )
        assert {series["metric"]["project"] for series in lids} >= {"Northfield", "Eastvale"}
        assert webhook.alerts == [], "all is well, and somebody was called"

        identity = stage.tree / "monitor" / "identity.py"
        good = identity.read_bytes()
        tree = stage.status()["live"]["tree"]
        bug_at = time.time()
        incident.overwrite(identity, incident.with_bug(good))
        stored = webhook.wait("LidStored", "firing", PATIENCE_SECONDS)
        standing = webhook.wait("LidRowsStanding", "firing", PATIENCE_SECONDS)
        first, told = stored["received"] - bug_at, standing["received"] - bug_at

        incident.overwrite(identity, good)
        stage.wait("the fix is live", lambda: fixed(stage, tree), limit_seconds=PATIENCE_SECONDS)
        assert stage.command("wa-monitor", "repair-lids").returncode == 0
        repair_at = time.time()
        project = standing["labels"]["project"]
        over = webhook.wait("LidRowsStanding", "resolved", PATIENCE_SECONDS, project=project)
        ended = over["received"] - repair_at
        measured(
            f"scraped every {SCRAPE_SECONDS} s, from the bug's save to the webhook: LidStored {first:.0f} s, "
            f"LidRowsStanding {told:.0f} s (its `for` is {LASTING_SECONDS} s); "
            f"from the repair to its end {ended:.0f} s"
        )
        assert {alert["labels"]["alertname"] for alert in webhook.alerts} == {"LidStored", "LidRowsStanding"}
        assert standing["annotations"]["summary"].endswith(
            f"rows of {project} hold a LID where a phone belongs"
        )
        assert standing["annotations"]["runbook_url"] == "docs/operations.md#lidrowsstanding"
        # What is promised is counted in scrapes, and a scrape takes as long on every machine.
        assert told <= 2 * SCRAPE_SECONDS + LASTING_SECONDS
        assert ended <= 2 * SCRAPE_SECONDS


def test_faults_are_seen_by_the_alerts_that_are_named_after_them(
    tmp_path: Path, measured: Callable[[str], None]
) -> None:
    with (
        watching(tmp_path, scrape_seconds=1) as (prometheus, _),
        EmbeddedPostgres(tmp_path / "postgres", durable=False) as database,
        Stage(tmp_path / "stage", url=database.url) as stage,
    ):
        stage.supervise("monitor.app:main", options=("--type", "notify", "--handover", "overlap"))
        prometheus.scrape(stage.address)
        rows = 'wa_monitor_lid_rows{project="Northfield"}'
        # Before there is a target, NoScrape is on its way, as it should be.
        until(lambda: has_a_number(prometheus.now(rows)) and not prometheus.now("ALERTS"), PATIENCE_SECONDS)
        took = {}

        def seen(name: str) -> None:
            """Wait until the alert is about to fire: how long it has to last is tested by promtool."""
            began = time.monotonic()
            until(lambda: bool(prometheus.now(f'ALERTS{{alertname="{name}"}}')), PATIENCE_SECONDS)
            took[name] = time.monotonic() - began

        with psycopg.connect(database.url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO qa_photo_reviews (drop_number, user_name) VALUES ('DR1', 'by hand')"
            )
        seen("ForeignRows")

        projects = stage.folder / "projects.yaml"
        projects_before = projects.read_text(encoding="utf-8")
        projects.write_text("projects: none\n", encoding="utf-8")
        seen("ProjectsRefused")
        projects.write_text(projects_before, encoding="utf-8")
        until(lambda: not prometheus.now('ALERTS{alertname="ProjectsRefused"}'), PATIENCE_SECONDS)

        for _ in range(3):
            live = stage.status()["live"]
            os.kill(live["pid"], signal.SIGKILL)
            stage.wait("another one serves", partial(follows, stage, live), limit_seconds=PATIENCE_SECONDS)
        seen("CrashLoop")

        identity = stage.tree / "monitor" / "identity.py"
        identity.write_text("this is no Python\n", encoding="utf-8")
        seen("ReloadRejected")
        seen("CodeNotInSync")

        database._stop()
        seen("DatabaseDown")
        stage._stop_supervisor()
        seen("NoScrape")
        shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items())
        measured(f"scraped each second, from the fault to the alert's beginning: {shown}")


def follows(stage: Stage, old: dict[str, Any]) -> bool:
    live = stage.status()["live"]
    return bool(live and live["generation"] > old["generation"])


def fixed(stage: Stage, tree: str) -> bool:
    status = stage.status()
    live = status["live"]
    return bool(status["in_sync"] and live and live["tree"] == tree and not status["draining"])
