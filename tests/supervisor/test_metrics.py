"""Child metrics: totals never fall, and nothing a child sends spoils the exposition."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.core import Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from supervisor import families
from supervisor.families import FamilyError, Series, Totals, added, parse
from supervisor.metrics import (
    RESTART_CAUSES,
    TRIGGERS,
    WATCH_MODES,
    ChildMetrics,
    ProcessSampler,
    SupervisorMetrics,
    registry,
)

Report = dict[str, Any]


def counter(name: str, value: object, **labels: object) -> Report:
    sample = [f"{name}_total", labels, value]
    return {"name": name, "documentation": "d", "type": "counter", "samples": [sample]}


def gauge(name: str, value: object, **labels: object) -> Report:
    return {"name": name, "documentation": "d", "type": "gauge", "samples": [[name, labels, value]]}


def histogram(name: str, **buckets: float) -> Report:
    """``le_1=2`` is two observations up to 1; the last one is the count."""
    bounds = {bound.removeprefix("le_").replace("_", "."): count for bound, count in buckets.items()}
    samples: list[list[Any]] = [[f"{name}_bucket", {"le": le}, count] for le, count in bounds.items()]
    samples.append([f"{name}_count", {}, list(bounds.values())[-1]])
    samples.append([f"{name}_sum", {}, 1.5])
    return {"name": name, "documentation": "d", "type": "histogram", "samples": samples}


def shown(metrics: ChildMetrics) -> dict[str, float]:
    """Every series of the exposition as Prometheus would read it; twice the same series is an error."""
    series: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.exposition().decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            key = f"{sample.name}{{{labels}}}" if labels else sample.name
            assert key not in series, f"{key} appears twice"
            series[key] = sample.value
    return series


def without_own(metrics: ChildMetrics) -> dict[str, float]:
    return {name: value for name, value in shown(metrics).items() if not name.startswith("wa_supervisor_")}


@pytest.fixture
def metrics() -> ChildMetrics:
    return ChildMetrics()


# --- totals over generations ------------------------------------------------------------------------------


def test_total_goes_on_where_the_generation_before_ended(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("drops", 5, project="n")])
    metrics.end(1)
    assert shown(metrics)["drops_total{project=n}"] == 5
    metrics.update(2, [counter("drops", 0, project="n")])
    assert shown(metrics)["drops_total{project=n}"] == 5
    metrics.update(2, [counter("drops", 3, project="n")])
    assert shown(metrics)["drops_total{project=n}"] == 8


def test_totals_of_two_generations_at_work_are_added(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("drops", 5)])
    metrics.update(2, [counter("drops", 1)])
    assert shown(metrics)["drops_total"] == 6


def test_counter_that_its_process_reset_goes_on(metrics: ChildMetrics) -> None:
    for value in (5, 2, 3):
        metrics.update(1, [counter("drops", value)])
    assert shown(metrics)["drops_total"] == 8
    metrics.end(1)
    assert shown(metrics)["drops_total"] == 8


def test_series_that_its_process_no_longer_shows_stays(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("drops", 5, project="n"), counter("drops", 1)])
    metrics.update(1, [])
    assert shown(metrics)["drops_total{project=n}"] == 5


def test_report_of_a_generation_that_is_gone_counts_no_more(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("drops", 5)])
    metrics.end(1)
    metrics.end(1)
    metrics.update(1, [counter("drops", 5)])
    assert shown(metrics)["drops_total"] == 5


def test_histogram_is_added_bucket_by_bucket(metrics: ChildMetrics) -> None:
    metrics.update(1, [histogram("lag", le_1_0=1, le_5_0=2, **{"le_+Inf": 4})])
    metrics.end(1)
    metrics.update(2, [histogram("lag", le_1_0=10, le_5_0=20, **{"le_+Inf": 40})])
    assert without_own(metrics) == {
        "lag_bucket{le=1.0}": 11,
        "lag_bucket{le=5.0}": 22,
        "lag_bucket{le=+Inf}": 44,
        "lag_count": 44,
        "lag_sum": 3,
    }


def test_histogram_whose_bounds_a_new_version_changed_is_still_one(metrics: ChildMetrics) -> None:
    metrics.update(1, [histogram("lag", le_1_0=10, **{"le_+Inf": 12})])
    metrics.end(1)
    metrics.update(2, [histogram("lag", le_2_0=5, **{"le_+Inf": 6})])
    assert without_own(metrics) == {
        "lag_bucket{le=1.0}": 10,
        "lag_bucket{le=2.0}": 15,
        "lag_bucket{le=+Inf}": 18,
        "lag_count": 18,
        "lag_sum": 3,
    }


def test_sum_that_falls_by_itself_is_no_reset() -> None:
    """Observations may be negative; only a count that falls says that the process began anew."""
    first = parse(histogram("x", **{"le_+Inf": 2})).values
    later = {**first, ("x_count", ()): 3.0, ("x_sum", ()): -4.0}
    assert Totals().after(first).after(later).values["x_sum", ()] == -4.0
    reset = {**first, ("x_count", ()): 1.0, ("x_sum", ()): 1.0}
    assert Totals().after(first).after(reset).values["x_sum", ()] == 2.5


def test_gauge_is_that_of_the_generation_that_serves(metrics: ChildMetrics) -> None:
    metrics.update(1, [gauge("pending", 7)])
    assert without_own(metrics) == {}
    metrics.go_live(1)
    metrics.update(2, [gauge("pending", 1)])
    assert shown(metrics)["pending"] == 7
    metrics.go_live(2)
    assert shown(metrics)["pending"] == 1
    metrics.end(1)
    assert shown(metrics)["pending"] == 1
    metrics.end(2)
    assert without_own(metrics) == {}


def test_name_that_a_new_version_uses_for_another_kind_is_shown_as_that(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("jobs", 5)])
    metrics.go_live(1)
    metrics.update(2, [gauge("jobs", 2)])
    metrics.go_live(2)
    metrics.update(1, [counter("jobs", 6)])
    assert without_own(metrics) == {"jobs": 2}, "the old one drains and does not take the name back"
    metrics.end(1)
    metrics.update(3, [counter("jobs", 1)])
    assert without_own(metrics) == {"jobs_total": 7}


class NeverFalls(RuleBasedStateMachine):
    """Whatever order reports, resets and ends come in, no total falls."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = ChildMetrics()
        self.before: dict[str, float] = {}

    @rule(
        generation=st.integers(1, 4),
        values=st.dictionaries(st.sampled_from("abc"), st.integers(0, 9), max_size=3),
        observed=st.integers(0, 9),
    )
    def report(self, generation: int, values: dict[str, int], observed: int) -> None:
        """Each version of the program has bounds of its own."""
        buckets = {
            f"le_{bound}": observed for bound in ((0.5,), (1.0,), (0.5, 2.0), (2.0, 3.0))[generation - 1]
        }
        reports = [counter(name, value) for name, value in values.items()]
        self.metrics.update(generation, [*reports, histogram("h", **buckets, **{"le_+Inf": observed})])

    @rule(generation=st.integers(1, 4))
    def end(self, generation: int) -> None:
        self.metrics.end(generation)

    @invariant()
    def no_total_falls(self) -> None:
        now = without_own(self.metrics)
        for name, value in self.before.items():
            assert now[name] >= value, name
        self.before = {name: value for name, value in now.items() if not name.endswith("_sum")}

    @invariant()
    def histogram_is_cumulative(self) -> None:
        now = without_own(self.metrics)
        bounds = sorted(
            (float(name.partition("le=")[2].rstrip("}")), value)
            for name, value in now.items()
            if name.startswith("h_bucket")
        )
        counts = [count for _, count in bounds]
        assert counts == sorted(counts)
        assert counts[-1:] == [value for name, value in now.items() if name == "h_count"]


TestNeverFalls = NeverFalls.TestCase
TestNeverFalls.settings = settings(max_examples=25, stateful_step_count=15)


def test_scrape_at_any_moment_of_a_handover_sees_the_same_total(
    metrics: ChildMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scrapes run in other threads: here one falls on every addition that the end of a generation makes."""
    seen: list[float] = []
    real = added

    def scrape_and_add(first: families.Values, second: families.Values) -> families.Values:
        with pytest.MonkeyPatch.context() as undisturbed:
            undisturbed.setattr("supervisor.metrics.added", real)
            seen.append(without_own(metrics)["drops_total"])
        return real(first, second)

    metrics.update(1, [counter("drops", 5)])
    metrics.update(2, [counter("drops", 2)])
    monkeypatch.setattr("supervisor.metrics.added", scrape_and_add)
    metrics.end(1)
    metrics.end(2)
    assert set(seen) == {7}
    assert without_own(metrics) == {"drops_total": 7}


# --- a child that sends anything --------------------------------------------------------------------------

BROKEN: dict[str, object] = {
    "no object": "text",
    "empty": {},
    "name with a space": gauge("a b", 1),
    "name with a newline": gauge("a\nb 1\nc", 1),
    "unknown kind": {**gauge("a", 1), "type": "gaugehistogram"},
    "kind that is no text": {**gauge("a", 1), "type": ["gauge"]},
    "documentation that is no text": {**gauge("a", 1), "documentation": None},
    "samples that are no list": {**gauge("a", 1), "samples": {"a": 1}},
    "sample that is too short": {**gauge("a", 1), "samples": [["a", {}]]},
    "sample of another family": {**gauge("a", 1), "samples": [["b", {}, 1]]},
    "value that is a text": gauge("a", "1"),
    "value that is no number": gauge("a", None),
    "value that no float can hold": gauge("a", 10**400),
    "label with a dash": gauge("a", 1, **{"x-y": "1"}),
    "label that is reserved": gauge("a", 1, __name__="b"),
    "label value that is a number": gauge("a", 1, x=1),
    "bucket without a bound": {**histogram("a", le_1=1), "samples": [["a_bucket", {}, 1]]},
    "bucket with a bound of no number": histogram("a", le_x=1),
    "bucket with the bound NaN": histogram("a", le_nan=1),
    "our own name": gauge("wa_supervisor_code_in_sync", 1),
    "the process's name": gauge("process_resident_memory_bytes", 1),
    "the interpreter's name": gauge("python_info", 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_family_that_cannot_be_shown_is_counted_and_the_others_are_shown(
    metrics: ChildMetrics, name: str
) -> None:
    metrics.go_live(1)
    metrics.update(1, [BROKEN[name], gauge("good", 1)])
    assert shown(metrics) == {"good": 1, "wa_supervisor_child_families_rejected": 1}


def test_same_series_twice_is_one(metrics: ChildMetrics) -> None:
    twice = counter("a", 1, x="1")
    twice["samples"] *= 2
    metrics.update(1, [twice, counter("a", 3, x="1")])
    assert without_own(metrics) == {"a_total{x=1}": 3}


def test_families_that_share_a_name_of_a_series_are_not_shown_together(metrics: ChildMetrics) -> None:
    metrics.go_live(1)
    metrics.update(1, [counter("a", 1), gauge("a_total", 2), gauge("b_count", 3), histogram("b", le_1=1)])
    assert without_own(metrics) == {"a_total": 1, "b_count": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1])
def test_value_that_no_total_can_have_does_not_poison_it(metrics: ChildMetrics, value: float) -> None:
    metrics.update(1, [counter("a", 2)])
    metrics.update(1, [counter("a", value)])
    metrics.end(1)
    metrics.update(2, [counter("a", 1)])
    assert without_own(metrics) == {"a_total": 3}


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.5])
def test_gauge_may_have_any_value(metrics: ChildMetrics, value: float) -> None:
    metrics.go_live(1)
    metrics.update(1, [gauge("a", value)])
    assert str(without_own(metrics)["a"]) == str(value)


def test_text_that_cannot_be_written_is_replaced(metrics: ChildMetrics) -> None:
    metrics.go_live(1)
    metrics.update(1, [{**gauge("a", 1, path='caf\udce9 "\\\n'), "documentation": "\ud800\n# x"}])
    assert without_own(metrics) == {'a{path=caf? "\\\n}': 1}


def test_child_that_could_not_read_its_own_registry_says_so(metrics: ChildMetrics) -> None:
    metrics.go_live(1)
    metrics.update(1, [gauge("wa_supervisor_child_scrape_error", 1)])
    assert shown(metrics)["wa_supervisor_child_scrape_error"] == 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["a", "a_total", "a_sum", "b"])
plausible = st.fixed_dictionaries(
    {
        "name": names,
        "documentation": st.text(max_size=5),
        "type": st.sampled_from([*families._SUFFIXES, "other"]),
        "samples": st.lists(
            st.tuples(
                st.builds(str.__add__, names, st.sampled_from(["", "_total", "_bucket", "_count", "_sum"])),
                st.dictionaries(st.sampled_from(["le", "x", "__y"]), st.text(max_size=3), max_size=2),
                st.integers() | st.floats(),
            ).map(list),
            max_size=3,
        ),
    }
)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 3), st.lists(plausible | anything, max_size=4)), max_size=4))
def test_whatever_children_send_the_exposition_can_be_read(reports: list[tuple[int, list[Any]]]) -> None:
    metrics = ChildMetrics()
    metrics.go_live(2)
    for generation, sent in reports:
        metrics.update(generation, sent)
        shown(metrics)
        if generation == 3:
            metrics.end(generation)
    shown(metrics)


@given(
    st.lists(st.lists(st.tuples(st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 9)), max_size=3), max_size=4)
)
def test_adding_is_the_same_in_any_order(sets: list[list[tuple[float, int]]]) -> None:
    totals: list[dict[families.Series, float]] = [
        {("h_bucket", (("le", str(bound)),)): float(count) for bound, count in dict(buckets).items()}
        for buckets in sets
    ]
    # A histogram is cumulative: make each set one.
    for one in totals:
        running = 0.0
        for series in sorted(one):
            running = one[series] = running + one[series]
    forwards: families.Values = {}
    backwards: families.Values = {}
    for one in totals:
        forwards = added(forwards, one)
    for one in reversed(totals):
        backwards = added(backwards, one)
    assert forwards == backwards


def test_families_of_the_library_itself_come_back_as_they_were(metrics: ChildMetrics) -> None:
    """What the child's own code sends for every kind of metric there is."""
    application = CollectorRegistry()
    Counter("jobs", "Jobs.", ["kind"], registry=application).labels("new").inc(3)
    Gauge("queue", "Queue.", registry=application).set(-2)
    Histogram("lag_seconds", "Lag.", registry=application, buckets=(1, 5)).observe(2)
    Summary("size_bytes", "Size.", registry=application).observe(10)
    sent = [
        {
            "name": family.name,
            "documentation": family.documentation,
            "type": family.type,
            "samples": [[s.name, dict(s.labels), float(s.value)] for s in family.samples],
        }
        for family in application.collect()
    ]
    metrics.go_live(1)
    metrics.update(1, json.loads(json.dumps(sent)))
    assert without_own(metrics) == {
        "jobs_total{kind=new}": 3,
        "queue": -2,
        "lag_seconds_bucket{le=1.0}": 0,
        "lag_seconds_bucket{le=5.0}": 1,
        "lag_seconds_bucket{le=+Inf}": 1,
        "lag_seconds_count": 1,
        "lag_seconds_sum": 2,
        "size_bytes_count": 1,
        "size_bytes_sum": 10,
    }


@pytest.mark.parametrize("report", [None, [], 3, {"name": 3}])
def test_what_is_no_family_is_one_error(report: object) -> None:
    with pytest.raises(FamilyError):
        parse(report)


# --- the supervisor's own series --------------------------------------------------------------------------


def own(created: CollectorRegistry) -> dict[tuple[str, tuple[str, ...]], float]:
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in created.collect()
        for sample in family.samples
    }


def test_series_exist_from_zero_so_that_the_first_event_is_an_increase() -> None:
    created = registry()
    SupervisorMetrics(created)
    values = own(created)
    for trigger in TRIGGERS:
        assert values["wa_supervisor_reloads_total", ("live", trigger)] == 0
    for cause in RESTART_CAUSES:
        assert values["wa_supervisor_child_restarts_total", (cause,)] == 0
    assert values["wa_supervisor_rollbacks_total", ()] == 0


def test_exactly_one_mode_of_watching_and_one_code_are_shown() -> None:
    created = CollectorRegistry()
    metrics = SupervisorMetrics(created)
    for mode in WATCH_MODES:
        metrics.set_watch_mode(mode)
        modes = {
            labels[0] for (name, labels), value in own(created).items() if name.endswith("mode") and value
        }
        assert modes == {mode}
    for tree in ("1", "1", "2", None):
        metrics.set_code_info(tree, None, dirty=None)
        codes = [labels[0] for (name, labels), _ in own(created).items() if name.endswith("code_info")]
        assert codes == ([] if tree is None else [tree])


def test_counter_follows_a_total_that_is_counted_elsewhere() -> None:
    metrics = SupervisorMetrics(CollectorRegistry())
    for total in (0, 3, 3, 5):
        metrics.follow(metrics.watch_overflows, total)
    assert metrics.watch_overflows._value.get() == 5


def test_live_child_is_measured_and_one_that_is_gone_is_not_zero() -> None:
    created = CollectorRegistry()
    metrics = SupervisorMetrics(created)
    sampler = ProcessSampler(metrics)
    sampler.sample(os.getpid())
    values = own(created)
    assert values["wa_supervisor_child_resident_memory_bytes", ()] > 1_000_000
    assert values["wa_supervisor_child_threads", ()] >= 1
    used = values["wa_supervisor_child_cpu_seconds_total", ()]
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    for pid in (ended.pid, None):
        sampler.sample(pid)
        values = own(created)
        assert math.isnan(values["wa_supervisor_child_resident_memory_bytes", ()])
        assert values["wa_supervisor_child_cpu_seconds_total", ()] == used


def test_own_and_child_series_stand_in_one_exposition() -> None:
    created = registry()
    SupervisorMetrics(created)
    child = ChildMetrics()
    child.go_live(1)
    child.update(1, [gauge("process_open_fds", 1), counter("drops", 1)])
    text = (generate_latest(created) + child.exposition()).decode()
    heads = [line.split()[2] for line in text.splitlines() if "# TYPE" in line]
    assert len(heads) == len(set(heads))
    assert {"drops_total", "wa_supervisor_child_families_rejected"} <= set(heads)
    assert all(isinstance(family, Metric) for family in created.collect())


def test_totals_go_on_in_another_image_of_the_supervisor() -> None:
    first = SupervisorMetrics(CollectorRegistry())
    first.reloads.labels("live", "watch").inc(3)
    first.downtime.inc(1.5)
    first.reload_seconds.observe(0.3)
    first.stage_seconds.labels("launch").observe(0.02)
    carried = msgspec.msgpack.decode(msgspec.msgpack.encode(first.totals), type=dict[Series, float])
    created = CollectorRegistry()
    second = SupervisorMetrics(created, carried)
    assert dict(second.totals) == dict(first.totals)
    second.reloads.labels("live", "watch").inc()
    second.reload_seconds.observe(0.3)
    second.follow(second.watch_overflows, 2)
    text = generate_latest(created).decode()
    assert 'wa_supervisor_reloads_total{outcome="live",trigger="watch"} 4.0' in text
    assert "wa_supervisor_downtime_seconds_total 1.5" in text
    assert 'wa_supervisor_reload_seconds_bucket{le="0.5"} 2.0' in text
    assert 'wa_supervisor_reload_seconds_bucket{le="0.25"} 0.0' in text
    assert "wa_supervisor_reload_seconds_sum 0.6" in text
    assert 'wa_supervisor_reload_stage_seconds_count{stage="launch"} 1.0' in text
    assert "wa_supervisor_watch_overflows_total 2.0" in text


def test_processor_time_of_a_child_is_not_counted_again_by_another_image() -> None:
    metrics = SupervisorMetrics(CollectorRegistry())
    sampler = ProcessSampler(metrics)
    sampler.sample(os.getpid())
    assert sampler.counted[0] == os.getpid()
    assert sampler.counted[1] > 0
    later = SupervisorMetrics(CollectorRegistry(), metrics.totals)
    ProcessSampler(later, (os.getpid(), sampler.counted[1] + 1000.0)).sample(os.getpid())
    assert later.totals["wa_supervisor_child_cpu_seconds_total", ()] == sampler.counted[1]
