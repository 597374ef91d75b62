"""What the metrics say was done is what PostgreSQL holds, after reloads and kills while messages arrive."""

from __future__ import annotations

import os
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from monitor.demo.stage import Stage
from monitor.demo.stream import Stream
from monitor.metrics import Counts, MonitorMetrics
from supervisor.child import metrics as child
from supervisor.metrics import ChildMetrics
from tests.supervisor.harness import SOAK

RELOADS, KILLS = (50, 10) if SOAK else (3, 2)
EDITED = ("identity.py", "relay.py", "store.py", "app.py")
OPTIONS = ("--type", "notify", "--handover", "overlap", "--probation", "0")
TOTALS = ("wa_monitor_messages_total", "wa_monitor_drops_stored_total")

MESSAGES = "SELECT project, count(*) FROM wa_monitor.message WHERE project IS NOT NULL GROUP BY project"
DROPS = (
    "SELECT project, stored_as, kind, count(*) FROM wa_monitor.drop_event GROUP BY project, stored_as, kind"
)


def _save(path: Path, number: int) -> None:
    mark = b"\n# save "
    path.write_bytes(path.read_bytes().partition(mark)[0] + mark + f"{number:04}\n".encode())


@pytest.mark.timeout(600)
def test_totals_are_exact_and_never_fall_over_reloads_and_kills(database_url: str, tmp_path: Path) -> None:
    with Stage(tmp_path / "stage", url=database_url) as stage:
        stage.supervise("monitor.app:main", options=OPTIONS)
        before = dict.fromkeys(TOTALS, 0.0)

        def never_falls() -> None:
            for name in TOTALS:
                now = stage.metric(name)
                assert now >= before[name], f"{name} fell from {before[name]} to {now}"
                before[name] = now

        tree = stage.status()["live"]["tree"]
        with Stream(stage.bridge, seed=9, rate=100.0, first_drop=1_000_001) as stream:
            for number in range(RELOADS):
                _save(stage.tree / "monitor" / EDITED[number % len(EDITED)], number)

                def live(old_tree: str = tree) -> bool:
                    never_falls()
                    status = stage.status()
                    return bool(status["in_sync"] and status["live"]["tree"] != old_tree)

                stage.wait(f"save {number} is live", live)
                tree = stage.status()["live"]["tree"]
                if number * KILLS // RELOADS != (number + 1) * KILLS // RELOADS:
                    os.kill(stage.status()["live"]["pid"], signal.SIGKILL)
                    # The next save starts a process at once, however long the backoff is by now.
                    stage.wait("it has ended", lambda: stage.status()["live"] is None)

        def counted() -> dict[tuple[str, ...], float]:
            return {tuple(labels): count for *labels, count in (*stage.ask(MESSAGES), *stage.ask(DROPS))}

        def shown() -> dict[tuple[str, ...], float]:
            never_falls()
            return {
                key: stage.metric(TOTALS[0], project=key[0])
                if len(key) == 1
                else stage.metric(TOTALS[1], project=key[0], identity=key[1], kind=key[2])
                for key in counted()
            }

        stage.wait(
            "all are read", lambda: sum(count for _, count in stage.ask(MESSAGES)) == stream.posted_total
        )
        stage.wait("the last ones are shown", lambda: stage.metric(TOTALS[0]) >= stream.posted_total)
        stage.wait("drops and messages agree", lambda: shown() == counted())
        assert stage.metric(TOTALS[1]) == sum(count for *_, count in stage.ask(DROPS))
        assert sum(stage.status()["restarts"].values()) == KILLS


def test_repairs_are_not_added_up_over_processes_that_all_show_the_same() -> None:
    metrics = MonitorMetrics()
    metrics.update(began=datetime.now(UTC) - timedelta(days=7), counts=Counts(repaired=3))
    reports = [
        {
            "name": family.name,
            "documentation": family.documentation,
            "type": family.type,
            "since": child._since(family),
            "samples": [[sample.name, sample.labels, sample.value] for sample in family.samples],
        }
        for family in metrics.collect()
    ]
    shown = ChildMetrics()
    for generation in (1, 2, 3):
        shown.update(generation, reports)
        shown.go_live(generation)
        shown.end(generation - 1)
    assert b"\nwa_monitor_lid_repaired_total 3.0\n" in shown.exposition()
