"""Metrics: what Prometheus sees, the supervisor's own series and those of the child, on one endpoint.

The rule for the child's series: **a total never goes down because a child was replaced or killed.** A child
sends its registry once a second; for each counter and histogram series the supervisor keeps a base, the sum
of what ended generations had last sent, and exports base plus the present values. A gauge says how things are
*now*, so it comes from the generation that serves, and is gone with it.

Series of the supervisor exist from 0, so that the first event ever is an increase. Names and labels: the
contract of the project and https://prometheus.io/docs/practices/naming/.

Rejected: prometheus_client's multiprocess mode (files that stay behind for every pid, slower with each
restart).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from supervisor.lifecycle import Outcome

TRIGGERS = (
    "watch", "scan", "signal", "cli", "config", "suspect", "mismatch", "crash", "hang", "memory", "age", "start",
)  # fmt: skip
RESTART_CAUSES = ("crash", "hang", "memory", "age", "mismatch")
STAGES = ("settle", "manifest", "bytecode", "launch", "verify", "handover")
WATCH_MODES = ("events", "partial", "polling")

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOTALS = frozenset({"counter", "histogram", "summary"})
_RESERVED = "wa_supervisor_"

_SeriesKey = tuple[str, tuple[tuple[str, str], ...]]


class SupervisorMetrics:
    """The supervisor's own series.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            return Counter(f"wa_supervisor_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"wa_supervisor_{name}", text, labels, registry=registry)

        self.reloads = counter(
            "reloads", "Reloads by outcome and by what asked for them.", ("outcome", "trigger")
        )
        for outcome in get_args(Outcome):
            for trigger in TRIGGERS:
                self.reloads.labels(outcome, trigger)
        self.stage_seconds = Histogram(
            "wa_supervisor_reload_stage_seconds",
            "Time that each stage of a reload took.",
            ("stage",),
            registry=registry,
            buckets=_BUCKETS,
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        self.reload_seconds = Histogram(
            "wa_supervisor_reload_seconds",
            "Time from the first sign of a change to its outcome.",
            registry=registry,
            buckets=_BUCKETS,
        )
        self.in_sync = gauge("code_in_sync", "1 if the running code is the code on disk, attested; else 0.")
        self.converged_seconds = gauge(
            "converged_seconds", "For how long it has been in sync, in seconds; 0 if it is not."
        )
        self.mismatches = gauge(
            "code_mismatches", "Modules of the live child that are not what they were started from."
        )
        self.code_info = gauge("code_info", "1, labelled with what runs.", ("tree", "commit", "dirty"))
        self.child_restarts = counter(
            "child_restarts", "Starts of a child in place of a live one that failed.", ("cause",)
        )
        for cause in RESTART_CAUSES:
            self.child_restarts.labels(cause)
        self.child_up = gauge("child_up", "1 while a live child serves.")
        self.generation = gauge("generation", "Number of the live generation; 0 if none.")
        self.downtime = counter(
            "downtime_seconds", "Time without a live child since the first one went live."
        )
        self.rollbacks = counter("rollbacks", "Returns to an earlier tree after a new one had failed.")
        self.pyc_purged = counter("pyc_purged", "Stale bytecode files removed.")
        self.bytecode_writable = gauge(
            "bytecode_writable", "0 if stale bytecode of the tree could not be replaced."
        )
        self.compile_errors = counter("compile_errors", "Trees rejected because a source does not compile.")
        self.watch_mode = gauge("watch_mode", "1 for the way in which changes are noticed now.", ("mode",))
        self.watch_overflows = counter("watch_overflows", "Times the kernel's event queue overflowed.")
        self.last_scan_age = gauge(
            "last_scan_age_seconds", "Time since the tree was last looked at, in seconds."
        )
        self.notify_errors = counter("notify_errors", "Messages that the service manager did not take.")
        self.child_memory = gauge("child_resident_memory_bytes", "Resident memory of the live child.")
        self.child_cpu = counter("child_cpu_seconds", "Processor time of all live children, user and system.")
        self.child_fds = gauge("child_open_fds", "Open file descriptors of the live child.")
        self.child_threads = gauge("child_threads", "Threads of the live child.")

        self._followed: dict[Counter, int] = {}

    def follow(self, counter: Counter, total: int) -> None:
        """Bring a counter up to a total that is counted elsewhere."""
        counter.inc(total - self._followed.get(counter, 0))
        self._followed[counter] = total

    def restarts(self) -> dict[str, float]:
        """Return how often a child was started in place of a failed one, by cause."""
        return {
            sample.labels["cause"]: sample.value
            for family in self.child_restarts.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def set_code_info(self, tree: str | None, commit: str | None) -> None:
        """Name what runs; empty labels where it is not known."""
        self.code_info.clear()
        if tree is not None:
            self.code_info.labels(tree, commit or "", "").set(1)

    def set_watch_mode(self, mode: str) -> None:
        """Name how changes are noticed."""
        for known in WATCH_MODES:
            self.watch_mode.labels(known).set(known == mode)


class ProcessSampler:
    """Measures the live child from outside.

    Args:
        metrics: where the samples go.
    """

    def __init__(self, metrics: SupervisorMetrics) -> None:
        self._metrics = metrics
        self._process: psutil.Process | None = None
        self._cpu_seconds = 0.0

    def sample(self, pid: int | None) -> None:
        """Measure the process ``pid``. A reading that cannot be had is a missing sample, not a zero."""
        if self._process is None or self._process.pid != pid:
            self._process, self._cpu_seconds = None, 0.0
            for gauge in (self._metrics.child_memory, self._metrics.child_fds, self._metrics.child_threads):
                gauge.set(float("nan"))
        if pid is None:
            return
        try:
            self._process = self._process or psutil.Process(pid)
            with self._process.oneshot():
                memory = self._process.memory_info().rss
                cpu = self._process.cpu_times()
                threads = self._process.num_threads()
            fds = self._process.num_fds()
        except psutil.Error:
            return
        if memory:
            self._metrics.child_memory.set(memory)
        self._metrics.child_fds.set(fds)
        self._metrics.child_threads.set(threads)
        used = cpu.user + cpu.system
        self._metrics.child_cpu.inc(max(0.0, used - self._cpu_seconds))
        self._cpu_seconds = used


class ChildMetrics(Collector):
    """The series of all generations as one.

    The main loop updates it; scrapes read it from other threads. Each update replaces a whole tuple or
    dictionary that is not altered afterwards, so that a scrape sees one state or the next.
    """

    def __init__(self) -> None:
        self._bases: dict[_SeriesKey, float] = {}
        self._families: dict[str, Mapping[str, Any]] = {}
        self._current: dict[int, tuple[Mapping[str, Any], ...]] = {}
        self._live: int | None = None

    def update(self, generation: int, families: Iterable[Mapping[str, Any]]) -> None:
        """Take what a child sent; families that are not of the agreed form, or that are ours, are left out."""
        valid = tuple(f for f in families if _is_family(f) and not f["name"].startswith(_RESERVED))
        self._families = self._families | {f["name"]: {**f, "samples": []} for f in valid}
        self._current = self._current | {generation: valid}

    def go_live(self, generation: int) -> None:
        """Take the gauges from this generation from now on."""
        self._live = generation

    def end(self, generation: int) -> None:
        """Add the totals of a generation that is gone to the bases."""
        bases = dict(self._bases)
        for family in self._current.get(generation, ()):
            if family["type"] in _TOTALS:
                for name, labels, value in _samples(family):
                    bases[name, labels] = bases.get((name, labels), 0.0) + value
        self._current = {
            number: families for number, families in self._current.items() if number != generation
        }
        self._bases = bases

    def collect(self) -> Iterator[Metric]:
        """Yield the families, totals summed over generations."""
        current, live = self._current, self._live
        values: dict[str, dict[_SeriesKey, float]] = {}
        for (name, labels), base in self._bases.items():
            values.setdefault(name, {})[name, labels] = base
        gauges: dict[str, list[tuple[str, tuple[tuple[str, str], ...], float]]] = {}
        for number, families in current.items():
            for family in families:
                if family["type"] in _TOTALS:
                    for name, labels, value in _samples(family):
                        series = values.setdefault(name, {})
                        series[name, labels] = series.get((name, labels), 0.0) + value
                elif number == live:
                    gauges[family["name"]] = _samples(family)
        for family in self._families.values():
            metric = Metric(family["name"], family["documentation"], family["type"])
            if family["type"] in _TOTALS:
                for suffix in ("_total", "_bucket", "_count", "_sum", ""):
                    for (name, labels), value in values.get(family["name"] + suffix, {}).items():
                        metric.add_sample(name, dict(labels), value)
            else:
                for name, labels, value in gauges.get(family["name"], ()):
                    metric.add_sample(name, dict(labels), value)
            if metric.samples:
                yield metric


def registry() -> CollectorRegistry:
    """Return a registry with what every Prometheus user expects of a process."""
    created = CollectorRegistry()
    ProcessCollector(registry=created)
    PlatformCollector(registry=created)
    GCCollector(registry=created)
    return created


def _samples(family: Mapping[str, Any]) -> list[tuple[str, tuple[tuple[str, str], ...], float]]:
    return [
        (name, tuple(sorted(labels.items())), float(value))
        for name, labels, value in family["samples"]
        if not name.endswith("_created")
    ]


def _is_family(family: Mapping[str, Any]) -> bool:
    try:
        for name, labels, value in family["samples"]:
            if not (isinstance(name, str) and isinstance(labels, dict) and isinstance(value, (int, float))):
                return False
        return all(isinstance(family[key], str) for key in ("name", "documentation", "type")) and family["type"] in (
            *_TOTALS, "gauge", "info", "unknown", "stateset",
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return False
