"""The monitor's metrics, as one collector for `prometheus_client`.

The rule: what counts rows comes from the database, not from this process. `wa_monitor_drops_stored_total`,
`wa_monitor_messages_total` and `wa_monitor_lid_resolved_total` are the totals that the cursor row holds,
committed together with the rows they count. They are shown as they are, by each process all of them, and
say by their `_created` that they began with the cursor: whoever adds up processes knows by that what is no
process's own. So they are exact also after a SIGKILL. `wa_monitor_lid_repaired_total` is one of them: the
repairs that the database knows of. Before the cursor was read there is nothing to show: a zero would be taken
for a reset, and the total after it for news. The same holds for what is counted in the table: a zero that
nobody has counted would end the alarm about LIDs that stand, so a process that does not count shows none.

The label sets of all enabled projects exist from 0 as soon as they are known: `increase()` does not see a
series that is born at 1, and the first LID ever must be seen.

Rejected: `Counter` objects and multiprocess mode, which leaves a file for every pid. A collector of plain
values is also indifferent to `PROMETHEUS_MULTIPROC_DIR`. Phones, LIDs and texts of people are never labels.
"""

import itertools
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from monitor.errors import COMPONENTS, BridgeError, Component, StoreError, error_labels
from monitor.judgement import JUDGEMENTS
from monitor.totals import KINDS, DropSeries, Totals

OTHER_PROJECT = "other"
BATCH_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
_CLOCKS_DIFFER_SECONDS = 86_400.0
"""By how much the beginning is told too early: the clock of the database may be ahead of ours."""

_ERROR_LABELS = error_labels(BridgeError, StoreError)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one look at the table and at the bridge has found."""

    lid_rows: Mapping[str, int] = field(default_factory=dict)
    foreign_rows: Mapping[str, int] = field(default_factory=dict)
    pending: int = 0
    repaired: int = 0
    backlog: int = 0
    usual_messages: float = 0.0
    """Of the present hour of the week, on average."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is shown, at one moment."""

    projects: tuple[str, ...] = ()
    """Names of the enabled projects."""
    totals: Totals = field(default_factory=Totals)
    began: datetime | None = None
    """When the totals began; None until they are known."""
    counts: Counts | None = None
    """None while this process does not count."""
    lag_seconds: float = 0.0
    last_message_at: datetime | None = None
    errors: Mapping[str, int] = field(default_factory=dict)
    broken: Component | None = None
    projects_refused: bool = False
    batches: tuple[int, ...] = (0,) * (len(BATCH_SECONDS) + 1)
    """Batches by time: at most so long, and longer."""
    batches_seconds: float = 0.0


class MonitorMetrics(Collector):
    """Shows the latest snapshot; may be collected from another thread than the one that updates it."""

    def __init__(self) -> None:
        self._snapshot = Snapshot()
        self._lock = threading.Lock()

    def update(self, **changes: object) -> None:
        """Replace fields of the snapshot."""
        with self._lock:
            self._snapshot = replace(self._snapshot, **changes)  # type: ignore[arg-type]

    def count_error(self, label: str) -> None:
        """Count an error of reading or writing."""
        with self._lock:
            errors = Counter(self._snapshot.errors)
            errors[label] += 1
            self._snapshot = replace(self._snapshot, errors=errors)

    def count_batch(self, seconds: float) -> None:
        """Count a batch that was decided and stored in that time."""
        with self._lock:
            batches = list(self._snapshot.batches)
            batches[bisect_left(BATCH_SECONDS, seconds)] += 1
            total_seconds = self._snapshot.batches_seconds + seconds
            self._snapshot = replace(self._snapshot, batches=tuple(batches), batches_seconds=total_seconds)

    def collect(self) -> Iterator[Metric]:
        """Yield all families."""
        with self._lock:
            now = self._snapshot
        created = None if now.began is None else now.began.timestamp() - _CLOCKS_DIFFER_SECONDS
        if created is not None:
            yield from _totals(now.projects, now.totals, created)
        if now.counts is not None:
            yield from _counts(now.projects, now.counts, created)
        yield _by_label(
            "wa_monitor_store_errors",
            "Failures of reading the bridge or of writing to PostgreSQL",
            "error",
            {**dict.fromkeys(_ERROR_LABELS, 0), **now.errors},
        )
        yield _broken(now.broken)
        yield _gauge(
            "wa_monitor_projects_refused",
            "Whether the projects file is refused and the one before is in force",
            int(now.projects_refused),
        )
        yield HistogramMetricFamily(
            "wa_monitor_batch_seconds",
            "Time to decide about a batch and to commit it",
            buckets=list(
                zip((*map(str, BATCH_SECONDS), "+Inf"), itertools.accumulate(now.batches), strict=True)
            ),
            sum_value=now.batches_seconds,
        )
        yield _gauge(
            "wa_monitor_message_lag_seconds",
            "Age of the newest message of a batch when it was committed",
            now.lag_seconds,
        )
        if now.last_message_at is not None:
            yield _gauge(
                "wa_monitor_bridge_last_message_age_seconds",
                "How long ago the newest message was sent",
                time.time() - now.last_message_at.timestamp(),
            )


def _totals(projects: tuple[str, ...], totals: Totals, created: float) -> Iterator[Metric]:
    """Show what the cursor row holds."""
    yield _drops(projects, totals, created)
    yield _by_label(
        "wa_monitor_messages",
        "Messages of enabled projects that were dealt with",
        "project",
        {**dict.fromkeys(projects, 0), **totals.messages},
        created,
    )
    yield _by_label(
        "wa_monitor_look_alikes",
        "Places in messages that look like a drop and are none",
        "project",
        {**dict.fromkeys(projects, 0), **totals.look_alikes},
        created,
    )
    yield _by_label(
        "wa_monitor_textless_messages",
        "Messages without a text, such as photos: the bridge does not keep captions",
        "project",
        {**dict.fromkeys(projects, 0), **totals.textless},
        created,
    )
    yield _counter(
        "wa_monitor_lid_resolved",
        "Pending senders that got their phone from the map",
        totals.resolved,
        created,
    )


def _counts(projects: tuple[str, ...], counts: Counts, created: float | None) -> Iterator[Metric]:
    """Show what the last look has found."""
    yield _counter(
        "wa_monitor_lid_repaired", "Rows in which a repair replaced a LID", counts.repaired, created
    )
    yield _rows(
        "wa_monitor_lid_rows",
        "Rows of the table that hold a LID where a phone belongs",
        projects,
        counts.lid_rows,
    )
    yield _rows(
        "wa_monitor_foreign_rows",
        "Rows of the table that another writer put there",
        projects,
        counts.foreign_rows,
    )
    yield _gauge(
        "wa_monitor_lid_pending", "Drops that wait for the map to learn their sender", counts.pending
    )
    yield _gauge("wa_monitor_backlog_rows", "Rows of the bridge that were not read yet", counts.backlog)
    yield _gauge(
        "wa_monitor_bridge_usual_messages",
        "Messages that the present hour of the week had on average in the last four weeks",
        counts.usual_messages,
    )


def _drops(projects: tuple[str, ...], totals: Totals, created: float) -> CounterMetricFamily:
    family = CounterMetricFamily(
        "wa_monitor_drops_stored",
        "Drops stored, by what their row holds after the write",
        labels=("project", "identity", "kind"),
    )
    series: dict[DropSeries, int] = {
        (name, judged, kind): 0 for name in projects for judged in JUDGEMENTS for kind in KINDS
    }
    for labels, count in {**series, **totals.drops}.items():
        family.add_metric(labels, count, created=created)
    return family


def _rows(
    name: str, documentation: str, projects: tuple[str, ...], rows: Mapping[str, int]
) -> GaugeMetricFamily:
    """Show rows of projects that are not enabled, or of none, under one label: the table is not only ours."""
    family = GaugeMetricFamily(name, documentation, labels=("project",))
    counts = Counter(dict.fromkeys((*projects, OTHER_PROJECT), 0))
    for project, count in rows.items():
        counts[project if project in projects else OTHER_PROJECT] += count
    for project, count in counts.items():
        family.add_metric((project,), count)
    return family


def _broken(broken: Component | None) -> GaugeMetricFamily:
    family = GaugeMetricFamily(
        "wa_monitor_broken",
        "Whether the way from the bridge to the table is broken at this place",
        labels=("component",),
    )
    for component in COMPONENTS:
        family.add_metric((component,), int(component == broken))
    return family


def _by_label(
    name: str, documentation: str, label: str, counts: Mapping[str, int], created: float | None = None
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, documentation, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count, created=created)
    return family


def _counter(
    name: str, documentation: str, value: float, created: float | None = None
) -> CounterMetricFamily:
    return CounterMetricFamily(name, documentation, value=value, created=created)


def _gauge(name: str, documentation: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, documentation, value=value)
