"""Metrics: what Prometheus sees, the supervisor's own series and those of the child, on one endpoint.

The rule for the child's series: **a total never goes down because a child was replaced or killed**, and
nothing a child sends can spoil the exposition. A child sends its registry every 0.4 seconds, and of families
that have not changed the numbers alone; for each counter and histogram series the supervisor keeps a base,
the sum of what ended generations had last sent, and exports base plus the present values. Families that
cannot be shown are counted, not hidden.

A gauge says how things are *now*, so it comes from the generation that serves, and is gone with it, or when
that has said nothing for :data:`GAUGE_SECONDS`: its collectors hang. One that takes over from another shows
the other's gauges until it has its own, for as long at most: a gap of a second would end an alert that waits
for its time.

A family that the serving code no longer has is shown for :data:`VANISH_SECONDS` after its last report, so
that who looks five minutes back still finds it, and goes on from where it was if a rollback brings it back.
What is kept is bounded: of one process :data:`SERIES_LIMIT` series, the smallest families first, so that one
family that explodes does not take the others with it; of all together :data:`KEPT_LIMIT`, after that families
that are no longer shown are forgotten, and then nothing new is taken.

Series of the supervisor exist from 0, so that the first event ever is an increase. Names and labels: the
contract of the project and https://prometheus.io/docs/practices/naming/.

Rejected: prometheus_client's multiprocess mode (files that stay behind for every pid, slower with each
restart).
"""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar, get_args

from msgspec import Struct, field
from msgspec.structs import replace
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

from supervisor.child.metrics import SERIES_LIMIT
from supervisor.events import Outcome
from supervisor.families import (
    TOTAL_KINDS,
    Family,
    FamilyError,
    Form,
    Lasting,
    Series,
    Totals,
    Values,
    Writer,
    added,
    parse_whole,
    total_values,
)

if TYPE_CHECKING:
    import psutil

TRIGGERS = (
    "watch",
    "scan",
    "signal",
    "cli",
    "config",
    "suspect",
    "mismatch",
    "crash",
    "hang",
    "memory",
    "age",
    "start",
)
RESTART_CAUSES = ("crash", "hang", "memory", "age", "mismatch")
STAGES = ("settle", "manifest", "bytecode", "launch", "verify", "handover")
WATCH_MODES = ("events", "partial", "polling")

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_Value = TypeVar("_Value")

VANISH_SECONDS = 300.0
"""For how long a family is shown that the code no longer has: the range of our alerts."""

GAUGE_SECONDS = 10.0
"""For how long what a gauge said is taken for what is so now."""

KEPT_LIMIT = 50_000
"""How many series of counters and histograms are remembered of all generations together."""

_OURS = ("wa_supervisor_", "process_", "python_")
_SCRAPE_ERROR = "wa_supervisor_child_scrape_error"
"""The one name of ours that a child may use: its own registry could not be read."""

_REJECTED = Family(
    "wa_supervisor_child_families_rejected",
    "Metric families of the child that could not be shown, in its last report.",
    "gauge",
    {},
)


class SupervisorMetrics:
    """The supervisor's own series.

    Args:
        registry: where they are registered.
        carried: totals of an earlier image of the supervisor, which these go on from.
    """

    def __init__(self, registry: CollectorRegistry, carried: Values | None = None) -> None:
        self._counters: list[Counter] = []
        self._histograms: list[_Carrying] = []

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            made = Counter(f"wa_supervisor_{name}", text, labels, registry=registry)
            self._counters.append(made)
            return made

        def histogram(name: str, text: str, labels: Sequence[str] = ()) -> Histogram:
            made = Histogram(f"wa_supervisor_{name}", text, labels, registry=None, buckets=_BUCKETS)
            self._histograms.append(_Carrying(made, carried or {}))
            registry.register(self._histograms[-1])
            return made

        def gauge(name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
            return Gauge(f"wa_supervisor_{name}", text, labels, registry=registry)

        self.reloads = counter(
            "reloads", "Reloads by outcome and by what asked for them.", ("outcome", "trigger")
        )
        for outcome in get_args(Outcome):
            for trigger in TRIGGERS:
                self.reloads.labels(outcome, trigger)
        self.stage_seconds = histogram(
            "reload_stage_seconds", "Time that each stage of a reload took.", ("stage",)
        )
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        self.reload_seconds = histogram(
            "reload_seconds", "Time from the first sign of a change to its outcome."
        )
        self.in_sync = gauge("code_in_sync", "1 if the running code is the code on disk, attested; else 0.")
        self.converged_seconds = gauge(
            "converged_seconds", "For how long it has been in sync, in seconds; 0 if it is not."
        )
        self.mismatches = gauge(
            "code_mismatches", "Modules and functions of the live child that are not of its sources."
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
        self.pyc_purged = counter("pyc_purged", "Bytecode files removed: stale ones, and others than ours.")
        self.bytecode_writable = gauge(
            "bytecode_writable",
            "0 if bytecode of the tree could not be written or removed.",
        )
        self.compile_errors = counter("compile_errors", "Trees rejected because a source does not compile.")
        self.watch_mode = gauge("watch_mode", "1 for the way in which changes are noticed now.", ("mode",))
        self.watch_overflows = counter("watch_overflows", "Times the kernel's event queue overflowed.")
        self.watch_restarts = counter("watch_restarts", "Starts of a watcher that was dead or blind.")
        self.last_scan_age = gauge(
            "last_scan_age_seconds", "Time since the tree was last looked at, in seconds."
        )
        self.notify_errors = counter("notify_errors", "Messages that the service manager did not take.")
        self.child_memory = gauge("child_resident_memory_bytes", "Resident memory of the live child.")
        self.child_cpu = counter("child_cpu_seconds", "Processor time of all live children, user and system.")
        self.child_fds = gauge("child_open_fds", "Open file descriptors of the live child.")
        self.child_threads = gauge("child_threads", "Threads of the live child.")
        self.self_outdated = gauge(
            "self_outdated", "1 if the supervisor itself runs other code than its package on disk; else 0."
        )

        self._code: tuple[str, str, str] | None = None
        self._followed: dict[Counter, int] = {}
        for made in self._counters:
            _carry(made, carried or {})

    @property
    def totals(self) -> Values:
        """What all counters and histograms come to."""
        return {
            series: value
            for collector in (*self._counters, *self._histograms)
            for family in collector.collect()
            for series, value in _values(family).items()
        }

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

    def set_code_info(self, tree: str | None, commit: str | None, *, dirty: bool | None) -> None:
        """Name what runs; empty labels where it is not known."""
        known = "" if dirty is None else str(dirty).lower()
        code = (tree, commit or "", known) if tree is not None else None
        if code == self._code:
            return
        # The new one first: a scrape in between sees both, never none.
        if code is not None:
            self.code_info.labels(*code).set(1)
        if self._code is not None:
            self.code_info.remove(*self._code)
        self._code = code

    def set_watch_mode(self, mode: str) -> None:
        """Name how changes are noticed."""
        for known in WATCH_MODES:
            self.watch_mode.labels(known).set(known == mode)


class _Carrying(Collector):
    """A histogram that goes on from what an earlier image of the supervisor had observed."""

    def __init__(self, histogram: Histogram, carried: Values) -> None:
        self._histogram = histogram
        self._carried = carried

    def collect(self) -> Iterator[Metric]:
        for metric in self._histogram.collect():
            family = Family(metric.name, metric.documentation, metric.type, _values(metric))
            before = {series: value for series, value in self._carried.items() if series[0] in family.names}
            sums = Metric(family.name, family.documentation, family.kind)
            for (name, labels), value in added(family.values, before).items():
                sums.add_sample(name, dict(labels), value)
            yield sums


def _carry(counter: Counter, carried: Values) -> None:
    """Bring a counter to what an earlier image of the supervisor had counted."""
    (described,) = counter.describe()
    for (name, labels), value in carried.items():
        if name == f"{described.name}_total":
            (counter.labels(**dict(labels)) if labels else counter).inc(value)


def _values(metric: Metric) -> Values:
    """Return the samples of a metric that are totals."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


class ProcessSampler:
    """Measures the live child from outside.

    Args:
        metrics: where the samples go.
        counted: pid of a process and the seconds of processor time that are counted of it.
    """

    def __init__(self, metrics: SupervisorMetrics, counted: tuple[int | None, float] = (None, 0.0)) -> None:
        self._metrics = metrics
        self._process: psutil.Process | None = None
        self.counted = counted

    def sample(self, pid: int | None) -> int | None:
        """Measure the process ``pid`` and return its resident memory in bytes.

        A reading that cannot be had is a missing sample (None), not a zero.
        """
        if self._process is None or self._process.pid != pid:
            self._process = None
            if self.counted[0] != pid:
                self.counted = pid, 0.0
            for gauge in (self._metrics.child_memory, self._metrics.child_fds, self._metrics.child_threads):
                gauge.set(float("nan"))
        if pid is None:
            return None
        import psutil  # noqa: PLC0415 -- a start does not wait for it

        try:
            self._process = self._process or psutil.Process(pid)
            with self._process.oneshot():
                memory = self._process.memory_info().rss
                cpu = self._process.cpu_times()
                threads = self._process.num_threads()
            fds = self._process.num_fds()
        except (psutil.Error, OSError):  # OSError: no descriptor is left to look with.
            return None
        if memory:
            self._metrics.child_memory.set(memory)
        self._metrics.child_fds.set(fds)
        self._metrics.child_threads.set(threads)
        used = cpu.user + cpu.system
        self._metrics.child_cpu.inc(max(0.0, used - self.counted[1]))
        self.counted = pid, used
        return memory or None


class Known(Struct, frozen=True):
    """Everything that is known of the children's series at one moment.

    Attributes:
        bases: totals of the generations that are gone.
        totals: number of a generation to what it has counted.
        families: number of a generation to its last report.
        newest: name of a family to the newest generation that had it, and the family as it was there.
        live: the generation that serves.
        ended: the generations that are gone.
        rejected: how many families of the last report could not be shown.
        seen: name of a family to the monotonic time of the newest report that had it.
        lasting: totals that outlive the processes.
        earlier_live: the generation that served before, if it was still there when the present one took over.
        earlier: its last report.
        live_at: monotonic time at which the present one took over.
        heard_at: number of a generation to the monotonic time of its last report.
    """

    bases: Values = field(default_factory=dict)
    totals: Mapping[int, Totals] = field(default_factory=dict)
    families: Mapping[int, tuple[Family, ...]] = field(default_factory=dict)
    newest: Mapping[str, tuple[int, Family]] = field(default_factory=dict)
    live: int | None = None
    ended: frozenset[int] = frozenset()
    rejected: int = 0
    seen: Mapping[str, float] = field(default_factory=dict)
    lasting: Mapping[Series, Lasting] = field(default_factory=dict)
    earlier_live: int | None = None
    earlier: tuple[Family, ...] = ()
    live_at: float = 0.0
    heard_at: Mapping[int, float] = field(default_factory=dict)


class ChildMetrics:
    """The series of all generations as one.

    The main loop updates it; scrapes read it from other threads. All that is known is one value that is
    replaced whole, so that a scrape sees one state or the next and never half of a handover.

    Args:
        known: what an earlier image of the supervisor knew.
    """

    def __init__(self, known: Known | None = None) -> None:
        self._known = known or Known()
        self._forms: dict[int, Mapping[str, Form | None]] = {}
        """Of each process's last report. Another image asks for them."""
        self._writer = Writer()
        self._written: tuple[Known, frozenset[str], _Believed, bytes] | None = None

    @property
    def known(self) -> Known:
        """Everything that is known now."""
        return self._known

    def update(self, generation: int, families: Iterable[object]) -> bool:
        """Take what a child sent; families that are not of the agreed form, or ours, are left out.

        Returns:
            False if it sent numbers alone where it has to say what they are; then nothing is taken.
        """
        known = self._known
        if generation in known.ended:
            return True
        reports = list(families)
        try:
            forms, accepted = _read(reports, self._forms.get(generation, {}))
        except KeyError:
            return False
        self._forms[generation] = forms
        newest, seen, now = dict(known.newest), dict(known.seen), time.monotonic()
        for family in accepted:
            if generation >= newest.get(family.name, (0, family))[0]:
                newest[family.name] = generation, family
                seen[family.name] = now
        before = known.totals.get(generation, Totals())
        report = total_values(accepted)
        lasting = _lasting(known.lasting, accepted)
        new = (report.keys() - before.last.keys()) | (lasting.keys() - known.lasting.keys())
        if _kept(known) + len(new) > KEPT_LIMIT:
            known = _forget(known, _gone(known, now))
            if _kept(known) + len(new) > KEPT_LIMIT:
                report = {s: v for s, v in report.items() if s in before.last or s in known.bases}
                lasting = {s: total for s, total in lasting.items() if s in known.lasting}
        self._known = replace(
            known,
            totals={**known.totals, generation: before.after(report)},
            families={**known.families, generation: accepted},
            newest=newest,
            rejected=len(reports) - len(accepted),
            seen=seen,
            lasting=lasting,
            earlier=accepted if generation == known.earlier_live else known.earlier,
            heard_at={**known.heard_at, generation: now},
        )
        return True

    def go_live(self, generation: int) -> None:
        """Take the gauges from this generation from now on."""
        known = self._known
        earlier: tuple[Family, ...] = ()
        if known.live not in known.ended:  # One that was too short to say anything has nothing to leave.
            earlier = known.families.get(known.live or 0, known.earlier)
        self._known = replace(
            known, live=generation, earlier_live=known.live, earlier=earlier, live_at=time.monotonic()
        )

    def end(self, generation: int) -> None:
        """Add the totals of a generation that is gone to the bases."""
        known = self._known
        self._forms.pop(generation, None)
        self._known = replace(
            known,
            bases=added(known.bases, known.totals.get(generation, Totals()).values),
            totals=_without(generation, known.totals),
            families=_without(generation, known.families),
            heard_at=_without(generation, known.heard_at),
            ended=known.ended | {generation},
        )

    def exposition(self) -> bytes:
        """Return all families in the text format, written anew only after something has changed."""
        known, now = self._known, time.monotonic()
        gone, believed = _gone(known, now), _believed(known, now)
        written = self._written
        if written is None or written[0] is not known or written[1:3] != (gone, believed):
            text = self._writer.text(_shown(known, gone, believed))
            written = self._written = known, gone, believed, text.encode()
        return written[3]

    def family(self, name: str) -> Family | None:
        """Return one family as it is shown, by its own name or by that of its samples."""
        known, now = self._known, time.monotonic()
        shown = _shown(known, _gone(known, now), _believed(known, now), name)
        return next((family for family in shown if name in family.names), None)


def _read(
    reports: Sequence[object], before: Mapping[str, Form | None]
) -> tuple[dict[str, Form | None], tuple[Family, ...]]:
    """Return the forms of the reported families, None for those that cannot be shown, and what can be.

    Raises:
        KeyError: there are numbers for a family of which there is no form.
    """
    forms: dict[str, Form | None] = {}
    accepted = []
    for report in _few(reports):
        name = report.get("name") if isinstance(report, Mapping) else None
        form: Form | None = None
        try:
            if isinstance(report, Mapping) and "samples" not in report and "values" in report:
                form = before[str(name)]
                family = form.filled(report["values"]) if form is not None else None
            else:
                form, family = parse_whole(report)
                if not _may_have(family):
                    form = family = None
        except FamilyError:
            family = None
        if isinstance(name, str):
            forms[name] = form
        if family is not None:
            accepted.append(family)
    return forms, tuple(accepted)


def _may_have(family: Family) -> bool:
    """Whether a child may have a family of this name."""
    if family.name == _SCRAPE_ERROR and family.kind == "gauge":
        return True
    return not any(name.startswith(_OURS) for name in family.names)


def _few(reports: Sequence[object]) -> Sequence[object]:
    """Return the reports without the largest, as far as they are together more than there may be.

    They are counted before they are read: reading is what takes its time.
    """
    sizes = [_size(report) for report in reports]
    if sum(sizes) <= SERIES_LIMIT:
        return reports
    smallest_first = sorted(range(len(reports)), key=sizes.__getitem__)
    together = accumulate(sizes[place] for place in smallest_first)
    kept = {place for place, size in zip(smallest_first, together, strict=True) if size <= SERIES_LIMIT}
    return [report for place, report in enumerate(reports) if place in kept]


def _size(report: object) -> int:
    samples = report.get("samples", report.get("values")) if isinstance(report, Mapping) else None
    return len(samples) if isinstance(samples, list) else 0


def _gone(known: Known, now: float) -> frozenset[str]:
    """Return the names of the families that the serving code lacks for long; no code, no judgement."""
    if known.live not in known.families:
        return frozenset()
    reported = {family.name for families in known.families.values() for family in families}
    return frozenset(
        name
        for name in known.newest
        if name not in reported and now - known.seen.get(name, now) > VANISH_SECONDS
    )


class _Believed(Struct, frozen=True):
    """Whose gauges are: those of the generation that serves, and of the one that served before it."""

    live: bool
    earlier: bool


def _believed(known: Known, now: float) -> _Believed:
    heard_at = known.heard_at.get(known.live or 0, known.live_at)
    serves = known.live not in known.ended
    return _Believed(now - heard_at <= GAUGE_SECONDS, serves and now - known.live_at <= GAUGE_SECONDS)


def _shown(
    known: Known, gone: frozenset[str], believed: _Believed, only: str | None = None
) -> Iterator[Family]:
    """Yield what is shown, totals summed over generations; all families, or those that have a name."""
    rejected: Values = {(_REJECTED.name, ()): float(known.rejected)}
    yield replace(_REJECTED, values=rejected)
    before = known.earlier if believed.earlier else ()
    current = known.families.get(known.live or 0, ()) if believed.live else ()
    now = {family.name: family for family in (*before, *current)}
    candidates = [entry for name, entry in known.newest.items() if name not in gone]
    families = [family for family in _compatible(candidates) if only is None or only in family.names]
    if only is not None:
        wanted = frozenset(name for family in families for name in family.names)
        known = _of(known, wanted)
    sums = reduce(added, (t.values for t in known.totals.values()), known.bases)
    lasting = {s: max(sums.get(s, 0.0), total.before + total.value) for s, total in known.lasting.items()}
    totals = _by_name({**sums, **lasting} if lasting else sums)
    for family in families:
        values: Values = {}
        if family.kind in TOTAL_KINDS:
            values = {s: v for name in sorted(family.names) for s, v in totals.get(name, {}).items()}
        elif family.name in now and now[family.name].kind == family.kind:
            values = now[family.name].values
        if values:
            yield replace(family, values=values)


def _lasting(before: Mapping[Series, Lasting], families: Iterable[Family]) -> Mapping[Series, Lasting]:
    """Return the totals that outlive processes, after a report."""
    after = dict(before)
    for family in families:
        if family.kind == "counter" and family.since is not None:
            for series, value in family.values.items():
                known = before.get(series, Lasting(family.since, value))
                after[series] = known.after(family.since, value)
    return after


def _kept(known: Known) -> int:
    return len(known.bases) + len(known.lasting) + sum(len(totals.last) for totals in known.totals.values())


def _forget(known: Known, gone: frozenset[str]) -> Known:
    names = {name for family in gone for name in known.newest[family][1].names}
    bases = {s: value for s, value in known.bases.items() if s[0] not in names}
    return replace(known, bases=bases, lasting={s: t for s, t in known.lasting.items() if s[0] not in names})


def _of(known: Known, names: frozenset[str]) -> Known:
    """Return what is known of the series with these names, so that nobody adds up the others for nothing."""

    def of(values: Values) -> Values:
        return {series: value for series, value in values.items() if series[0] in names}

    totals = {number: Totals(of(t.carried), of(t.last)) for number, t in known.totals.items()}
    lasting = {series: total for series, total in known.lasting.items() if series[0] in names}
    return replace(known, bases=of(known.bases), totals=totals, lasting=lasting)


def _compatible(families: Iterable[tuple[int, Family]]) -> Iterator[Family]:
    """Yield the families that can stand in one exposition; of two that share a name the newer one."""
    taken: set[str] = set()
    for _, family in sorted(families, key=lambda entry: -entry[0]):
        if not taken & family.names:
            taken |= family.names
            yield family


def _by_name(values: Values) -> Mapping[str, Mapping[Series, float]]:
    grouped: collections.defaultdict[str, dict[Series, float]] = collections.defaultdict(dict)
    for series, value in values.items():
        grouped[series[0]][series] = value
    return grouped


def _without(number: int, values: Mapping[int, _Value]) -> Mapping[int, _Value]:
    return {key: value for key, value in values.items() if key != number}


def registry() -> CollectorRegistry:
    """Return a registry with what every Prometheus user expects of a process."""
    created = CollectorRegistry()
    ProcessCollector(registry=created)
    PlatformCollector(registry=created)
    GCCollector(registry=created)
    return created
