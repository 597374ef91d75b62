"""Child metrics: totals never fall, and nothing a child sends spoils the exposition."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, Summary
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from supervisor import families
from supervisor.child.metrics import Reports
from supervisor.families import FamilyError, Series, Totals, added, parse
from supervisor.metrics import (
    GAUGE_SECONDS,
    RESTART_CAUSES,
    TRIGGERS,
    VANISH_SECONDS,
    WATCH_MODES,
    ChildMetrics,
    Known,
    ProcessSampler,
    SupervisorMetrics,
    registry,
)
from tests.supervisor.harness import SOAK, Supervised, until

Report = dict[str, Any]
ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")


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


def child_families_of(application: CollectorRegistry) -> list[Report]:
    """What the child's own code sends of a registry."""
    return [
        {
            "name": family.name,
            "documentation": family.documentation,
            "type": family.type,
            "samples": [[s.name, dict(s.labels), float(s.value)] for s in family.samples],
        }
        for family in application.collect()
    ]


def shown(metrics: ChildMetrics) -> dict[str, float]:
    """Every series of the exposition as Prometheus would read it; twice the same series is an error."""
    return read(metrics.exposition().decode())


def read(text: str) -> dict[str, float]:
    series: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
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


def lasting(name: str, value: float, since: object = 1.0) -> Report:
    return {**counter(name, value), "since": since}


def test_total_that_outlives_the_processes_is_not_added_up(metrics: ChildMetrics) -> None:
    metrics.update(1, [lasting("drops", 100)])
    metrics.update(2, [lasting("drops", 98)])
    assert without_own(metrics) == {"drops_total": 100}, "the standby has seen less so far"
    metrics.end(1)
    metrics.update(2, [lasting("drops", 137)])
    assert without_own(metrics) == {"drops_total": 137}, "and what the killed one had not sent is there"
    metrics.update(3, [counter("drops", 3)])
    assert without_own(metrics) == {"drops_total": 137}, "one of a process is none of these"


def test_another_total_that_outlives_processes_goes_on_after_the_first(metrics: ChildMetrics) -> None:
    metrics.update(1, [lasting("drops", 100, 1.0)])
    metrics.update(2, [lasting("drops", 5, 2.0)])
    metrics.update(1, [lasting("drops", 101, 1.0)])
    metrics.update(2, [lasting("drops", 6, 2.0)])
    assert without_own(metrics) == {"drops_total": 106}


def test_total_of_a_process_becomes_one_that_outlives_it(metrics: ChildMetrics) -> None:
    """A new version keeps in a database what the old one had counted in memory."""
    metrics.update(1, [counter("drops", 5)])
    metrics.end(1)
    metrics.update(2, [lasting("drops", 2)])
    assert without_own(metrics) == {"drops_total": 5}
    metrics.update(2, [lasting("drops", 9)])
    assert without_own(metrics) == {"drops_total": 9}


def test_child_tells_what_began_before_it_from_what_it_counts_itself() -> None:
    """An application's own counters have a time of creation, too."""
    script = """
import json, time
from prometheus_client import REGISTRY, Counter
from prometheus_client.core import CounterMetricFamily
from supervisor.child import metrics
Counter("own", "Own.").inc()
class Kept:
    def collect(self):
        family = CounterMetricFamily("kept", "Kept.", labels=["x"])
        family.add_metric(["1"], 7, created=1000.5)
        yield family
REGISTRY.register(Kept())
print(json.dumps({f["name"]: f["since"] for f in metrics.families()}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == {"own": None, "kept": 1000.5}


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
    "beginning that is no number": lasting("a", 1, "now"),
    "beginning that is no time": lasting("a", 1, math.nan),
    "buckets that fall": histogram("a", le_1=5, le_2=3),
    "our own name by its suffix": counter("wa_supervisor", 1),
    "the interpreter's name by its suffix": {
        "name": "python",
        "documentation": "d",
        "type": "info",
        "samples": [["python_info", {}, 1]],
    },
    "the one name of ours as another kind": counter("wa_supervisor_child_scrape_error", 1),
    "label value that is a list": gauge("a", 1, x=[1]),
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


def test_page_of_text_is_not_carried_to_every_scrape(metrics: ChildMetrics) -> None:
    metrics.go_live(1)
    long = gauge("documented", 1) | {"documentation": "d" * 100_000}
    metrics.update(1, [long, gauge("labelled", 1, query="q" * 3000), gauge("short", 1, query="q")])
    expected = {"documented": 1, "short{query=q}": 1, "wa_supervisor_child_families_rejected": 1}
    assert shown(metrics) == expected
    assert len(metrics.exposition()) < 2000


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


@pytest.mark.parametrize(
    "samples",
    [
        [["a_bucket", {"le": "1"}, 2], ["a_bucket", {"le": "+Inf"}, 3], ["a_sum", {}, 1.5]],
        [["a_bucket", {"le": "1"}, 2], ["a_count", {}, 3], ["a_sum", {}, 1.5]],
        [
            ["a_bucket", {"le": "1"}, 2],
            ["a_bucket", {"le": "inf"}, 3],
            ["a_count", {}, 3],
            ["a_sum", {}, 1.5],
        ],
        [
            ["a_bucket", {"le": "1e0"}, 2],
            ["a_bucket", {"le": "+Inf"}, math.nan],
            ["a_count", {}, 3],
            ["a_sum", {}, 1.5],
        ],
        [
            ["a_bucket", {"le": "1"}, 2],
            ["a_bucket", {"le": "+Inf"}, 2],
            ["a_count", {}, 3],
            ["a_sum", {}, 1.5],
        ],
    ],
    ids=["no count", "no last bucket", "other spelling", "NaN", "count above the last bucket"],
)
def test_histogram_that_lacks_something_is_shown_whole(metrics: ChildMetrics, samples: list[Any]) -> None:
    report = {"name": "a", "documentation": "d", "type": "histogram", "samples": samples}
    metrics.update(1, [report])
    whole = {"a_bucket{le=1.0}": 2, "a_bucket{le=+Inf}": 3, "a_count": 3, "a_sum": 1.5}
    assert without_own(metrics) == whole
    metrics.end(1)
    metrics.update(2, [report])
    assert without_own(metrics) == {name: 2 * value for name, value in whole.items()}


def test_histogram_without_anything_but_observations_missing_is_one(metrics: ChildMetrics) -> None:
    metrics.update(
        1, [{"name": "a", "documentation": "", "type": "histogram", "samples": [["a_count", {}, 2]]}]
    )
    assert without_own(metrics) == {"a_bucket{le=+Inf}": 2, "a_count": 2, "a_sum": 0}


def test_histogram_begins_anew_as_a_whole(metrics: ChildMetrics) -> None:
    """Only its first bucket shows that it was reset; added up one by one, its buckets would fall."""
    metrics.update(1, [histogram("a", le_1=3, le_2=5)])
    metrics.update(1, [histogram("a", le_1=0, le_2=5)])
    metrics.update(1, [histogram("a", le_1=5, le_2=5)])
    shown_now = without_own(metrics)
    assert (shown_now["a_bucket{le=1.0}"], shown_now["a_bucket{le=2.0}"], shown_now["a_count"]) == (8, 10, 10)


def many(name: str, count: int) -> Report:
    samples = [[f"{name}_total", {"request": f"{number}"}, 1] for number in range(count)]
    return {"name": name, "documentation": "d", "type": "counter", "samples": samples}


def test_family_that_explodes_does_not_take_the_others_with_it(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("before", 1), many("exploded", 100_000), counter("after", 2)])
    assert shown(metrics) == {
        "before_total": 1,
        "after_total": 2,
        "wa_supervisor_child_families_rejected": 1,
    }


def test_labels_that_are_never_the_same_again_are_remembered_up_to_a_limit(
    metrics: ChildMetrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.metrics.KEPT_LIMIT", 50)
    for number in range(20):
        metrics.update(
            1 + number // 5,
            [counter("jobs", 1, request=str(n)) for n in range(10 * number, 10 * number + 10)],
        )
        if number % 5 == 4:
            metrics.end(1 + number // 5)
    kept = without_own(metrics)
    assert len(kept) == 50
    metrics.update(9, [counter("jobs", 1, request="1")])
    assert without_own(metrics)["jobs_total{request=1}"] == kept["jobs_total{request=1}"] + 1, (
        "what is kept goes on"
    )


class Clock:
    """Monotonic time that only a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("supervisor.metrics.time", made)
    return made


def test_metric_that_new_code_lacks_vanishes_after_its_time(metrics: ChildMetrics, clock: Clock) -> None:
    metrics.update(1, [counter("old", 5), counter("jobs", 1)])
    metrics.go_live(1)
    metrics.update(2, [counter("jobs", 1)])
    metrics.go_live(2)
    metrics.end(1)
    clock.now += VANISH_SECONDS
    metrics.update(2, [counter("jobs", 1)])
    assert without_own(metrics) == {"old_total": 5, "jobs_total": 2}
    clock.now += 1
    assert without_own(metrics) == {"jobs_total": 2}, "also when nothing else has changed since"
    assert metrics.family("old_total") is None
    metrics.update(3, [counter("old", 1), counter("jobs", 0)])
    metrics.go_live(3)
    assert without_own(metrics) == {"old_total": 6, "jobs_total": 2}, "brought back, it goes on where it was"


def test_metric_stays_while_nobody_serves_or_who_drains_still_has_it(
    metrics: ChildMetrics, clock: Clock
) -> None:
    metrics.update(1, [counter("jobs", 5)])
    metrics.go_live(1)
    metrics.end(1)
    clock.now += 10 * VANISH_SECONDS
    assert without_own(metrics) == {"jobs_total": 5}, "nobody serves, so nobody has removed it"
    metrics.update(2, [counter("jobs", 1)])
    metrics.update(3, [])
    metrics.go_live(3)
    clock.now += 10 * VANISH_SECONDS
    assert without_own(metrics) == {"jobs_total": 6}, "the one that drains still counts"


def test_what_has_vanished_is_forgotten_before_new_series_are_refused(
    metrics: ChildMetrics, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.metrics.KEPT_LIMIT", 10)
    metrics.update(1, [many("old", 10)])
    metrics.end(1)
    metrics.update(2, [])
    metrics.go_live(2)
    clock.now += VANISH_SECONDS + 1
    metrics.update(2, [many("new", 10)])
    assert len(without_own(metrics)) == 10
    assert "new_total{request=9}" in without_own(metrics)


def test_gauges_of_the_generation_before_stand_in_until_the_new_one_has_its_own(
    metrics: ChildMetrics, clock: Clock
) -> None:
    metrics.update(1, [gauge("standing", 2), gauge("pending", 7), gauge("gone", 1)])
    metrics.go_live(1)
    metrics.go_live(2)
    assert without_own(metrics) == {"standing": 2, "pending": 7, "gone": 1}
    metrics.update(1, [gauge("standing", 3), gauge("pending", 8), gauge("gone", 1)])
    metrics.end(1)
    metrics.update(2, [gauge("pending", 9)])
    assert without_own(metrics) == {"standing": 3, "pending": 9, "gone": 1}
    metrics.update(2, [gauge("pending", 9), gauge("standing", 0)])
    assert without_own(metrics) == {"standing": 0, "pending": 9, "gone": 1}
    clock.now += GAUGE_SECONDS + 1
    metrics.update(2, [gauge("pending", 9), gauge("standing", 0)])
    assert without_own(metrics) == {"standing": 0, "pending": 9}, "what new code does not have is gone"


def test_generation_that_is_replaced_before_its_first_report_leaves_no_gap(metrics: ChildMetrics) -> None:
    metrics.update(1, [gauge("standing", 2)])
    for number in (1, 2, 3):
        metrics.go_live(number)
        assert without_own(metrics) == {"standing": 2}
    metrics.end(1)
    metrics.end(2)
    assert without_own(metrics) == {"standing": 2}


def test_gauges_of_a_generation_that_is_gone_are_gone_with_it(metrics: ChildMetrics) -> None:
    metrics.update(1, [gauge("standing", 2)])
    metrics.go_live(1)
    metrics.go_live(2)
    metrics.end(1)
    metrics.end(2)
    assert without_own(metrics) == {}, "nobody serves"
    metrics.go_live(3)
    assert without_own(metrics) == {}, "the one before was gone when it took over"


def test_gauges_of_a_child_that_says_nothing_are_not_what_is_now(metrics: ChildMetrics, clock: Clock) -> None:
    metrics.update(1, [gauge("standing", 0), counter("jobs", 1)])
    metrics.go_live(1)
    clock.now += GAUGE_SECONDS
    assert without_own(metrics) == {"standing": 0, "jobs_total": 1}
    clock.now += 1
    assert without_own(metrics) == {"jobs_total": 1}, "also when nothing has changed since"
    assert metrics.family("standing") is None
    metrics.update(1, [gauge("standing", 2), counter("jobs", 1)])
    assert without_own(metrics) == {"standing": 2, "jobs_total": 1}


def test_one_family_is_found_by_its_name_and_by_that_of_its_samples(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("jobs", 5)])
    metrics.end(1)
    metrics.update(2, [counter("jobs", 1), counter("other", 1)])
    for name in ("jobs", "jobs_total"):
        found = metrics.family(name)
        assert found is not None
        assert found.values == {("jobs_total", ()): 6.0}
    assert metrics.family("none") is None


def test_exposition_is_what_the_library_writes_of_the_same(metrics: ChildMetrics) -> None:
    """The reference for our own writer: the same names, texts, labels and values."""
    application = CollectorRegistry()
    Counter("jobs", 'With "quotes", \\ and\nlines', ["kind"], registry=application).labels('a"b\\c\nd é').inc(
        1.5
    )
    Gauge("queue", "Queue", registry=application).set(math.inf)
    Gauge("nothing", "Nothing", registry=application).set(math.nan)
    Histogram("lag_seconds", "Lag", registry=application, buckets=(0.1, 5)).observe(2)
    Info("build", "Build", registry=application).info({"version": "1"})
    metrics.go_live(1)
    metrics.update(1, json.loads(json.dumps(child_families_of(application))))
    written = metrics.exposition().decode().splitlines()
    reference = [
        line for line in generate_latest(application).decode().splitlines() if "_created" not in line
    ]
    assert sorted(line for line in written if "wa_supervisor" not in line) == sorted(reference)


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool here (apt-get install prometheus)")
def test_promtool_has_nothing_to_say_about_what_is_exposed(metrics: ChildMetrics) -> None:
    created = registry()
    SupervisorMetrics(created).set_code_info("a", None, dirty=None)
    metrics.go_live(1)
    metrics.update(
        1, [histogram("lag_seconds", le_1=1), {**counter("jobs", 1, x='\n"é'), "documentation": ""}]
    )
    body = generate_latest(created) + metrics.exposition()
    done = subprocess.run([str(PROMTOOL), "check", "metrics"], input=body, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.fixture
def application(monkeypatch: pytest.MonkeyPatch) -> CollectorRegistry:
    """The registry of an application, as the child's own code finds it."""
    created = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", created)
    return created


def sent(reports: Reports) -> Report:
    """The next report as it arrives."""
    frame: Report = json.loads(json.dumps(reports.next()))
    return frame


def is_whole(frame: Report) -> dict[str, bool]:
    return {family["name"]: "samples" in family for family in frame["families"]}


def test_numbers_alone_are_shown_as_a_whole_report_would_be(
    metrics: ChildMetrics, application: CollectorRegistry
) -> None:
    jobs = Counter("jobs", "Jobs.", ["queue"], registry=application)
    lag = Histogram("lag", "Lag.", registry=application)
    size = Summary("size", "Size.", registry=application)
    temperature = Gauge("temperature", "Temperature.", registry=application)
    Info("build", "Build.", registry=application).info({"version": "1"})
    jobs.labels("a").inc()
    reports, whole = Reports(), ChildMetrics()
    metrics.go_live(1)
    whole.go_live(1)
    for number in range(4):
        jobs.labels("a").inc()
        lag.observe(number)
        size.observe(number)
        temperature.set(float("nan") if number == 2 else -number)
        if number == 3:
            jobs.labels("b").inc()
        frame = sent(reports)
        assert metrics.update(1, frame["families"])
        whole.update(1, child_families_of(application))
        assert metrics.exposition() == whole.exposition()
        reports.taken(frame["report"])
        expected = {
            "jobs": number in {0, 3},
            **dict.fromkeys(("lag", "size", "temperature", "build"), not number),
        }
        assert is_whole(frame) == expected


def test_families_are_told_whole_until_they_are_known_to_have_been_taken(
    application: CollectorRegistry,
) -> None:
    Counter("jobs", "Jobs.", registry=application)
    reports = Reports()
    first, second = sent(reports), sent(reports)
    assert is_whole(first) == is_whole(second) == {"jobs": True}
    reports.taken(first["report"])
    assert is_whole(sent(reports)) == {"jobs": True}, "the first one may not be what the second one said"
    for number in (True, "4", None, 10**9):
        reports.taken(number)
    last = sent(reports)
    assert is_whole(last) == {"jobs": True}
    reports.taken(last["report"])
    assert is_whole(sent(reports)) == {"jobs": False}
    reports.forget()
    assert is_whole(sent(reports)) == {"jobs": True}


def test_two_families_of_one_name_are_always_told_whole(application: CollectorRegistry) -> None:
    class Twice(Collector):
        def collect(self) -> Iterator[Metric]:
            for value in (1, 2):
                yield GaugeMetricFamily("twice", "Twice.", value=value)

    application.register(Twice())
    reports = Reports()
    for _ in range(3):
        frame = sent(reports)
        assert [family["samples"][0][2] for family in frame["families"]] == [1, 2]
        reports.taken(frame["report"])


def test_numbers_of_which_nobody_has_said_what_they_are_change_nothing(metrics: ChildMetrics) -> None:
    metrics.update(1, [counter("jobs", 5)])
    metrics.go_live(1)
    assert metrics.update(1, [{"name": "jobs", "values": [6]}])
    image = ChildMetrics(msgspec.msgpack.decode(msgspec.msgpack.encode(metrics.known), type=Known))
    assert not image.update(1, [{"name": "jobs", "values": [7]}]), "another image has to ask"
    assert not metrics.update(1, [{"name": "jobs", "values": [7]}, {"name": "other", "values": [1]}])
    assert without_own(metrics) == without_own(image) == {"jobs_total": 6}
    assert image.update(1, [counter("jobs", 8)])
    assert image.update(1, [{"name": "jobs", "values": [9]}])
    assert without_own(image) == {"jobs_total": 9}


@pytest.mark.parametrize("values", [[], [1, 2], ["1"], [None], [10**400], {}, "1", None], ids=repr)
def test_numbers_that_are_none_or_too_many_are_one_family_that_cannot_be_shown(
    metrics: ChildMetrics, values: object
) -> None:
    metrics.go_live(1)
    metrics.update(1, [gauge("jobs", 5), gauge("other", 1), gauge("python_mine", 1)])
    numbers = [{"name": "jobs", "values": values}, {"name": "other", "values": [2]}]
    assert metrics.update(1, [*numbers, {"name": "python_mine", "values": [1]}])
    assert shown(metrics) == {"other": 2, "wa_supervisor_child_families_rejected": 2}


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
    metrics.go_live(1)
    metrics.update(1, json.loads(json.dumps(child_families_of(application))))
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


# --- a real child -----------------------------------------------------------------------------------------

COUNTS = """\
import os, signal, sys, time
from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
import version

Gauge("number", "Of the version.").set(version.NUMBER)

jobs = Counter("jobs", "Jobs.")
lag = Histogram("lag_seconds", "Lag.", buckets=version.BUCKETS)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

class Exploding:
    def collect(self):
        family = CounterMetricFamily("exploding", "One series a request.", labels=["request"])
        for number in range(version.SERIES):
            family.add_metric([str(number)], 1)
        yield family

REGISTRY.register(Exploding())
print("serving", version.NUMBER, flush=True)
while True:
    jobs.inc()
    lag.observe(0.3)
    time.sleep(0.005)
"""


class Watching:
    """Scrapes again and again; a total that falls, or a histogram that is none, is a fault."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.before: dict[str, float] = {}

    def scrape(self) -> dict[str, float]:
        with urlopen(f"http://{self._address}/metrics", timeout=10) as answer:
            now = read(answer.read().decode())
        for name, value in self.before.items():
            if name.partition("{")[0].endswith(("_total", "_count", "_bucket")):
                assert now[name] >= value, f"{name} fell from {value} to {now[name]}"
        assert now.get("lag_seconds_bucket{le=+Inf}") == now.get("lag_seconds_count")
        self.before = now
        return now


def write_version(tree: Path, number: int, series: int = 0) -> None:
    bounds = (0.1, 0.5) if number % 2 else (0.2, 0.4, 1.0)
    new = tree / "version.new"
    new.write_text(f"NUMBER, SERIES, BUCKETS = {number}, {series}, {bounds}\n", encoding="utf-8")
    new.replace(tree / "version.py")


@pytest.mark.timeout(300)
@pytest.mark.parametrize("handover", ["overlap", "replace"])
def test_no_total_falls_over_reloads_kills_and_a_rollback(
    supervise: Callable[..., Supervised], tmp_path: Path, handover: str
) -> None:
    reloads, kills = (50, 10) if SOAK else (3, 1)
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text(COUNTS, encoding="utf-8")
    write_version(tree, 0)
    started = supervise(f"--handover={handover}", "--probation=0.1", "main.py", cwd=tree)
    started.expect("^serving 0$")
    watching = Watching(started.status()["listen"])
    until(lambda: watching.scrape().get("jobs_total", 0) > 0)
    for number in range(1, reloads + 1):
        write_version(tree, number)
        started.expect(f"^serving {number}$")
        before = watching.scrape()["jobs_total"]
        until(lambda before=before: watching.scrape()["jobs_total"] > before)  # type: ignore[misc]
        if number <= kills:  # The next save starts a process at once, however long the backoff is by now.
            started.live().kill()
            until(lambda: started.status()["live"] is None)
    until(lambda: started.status()["live"]["tree"] in started.status()["known_good"])
    write_version(tree, reloads + 1)
    started.expect(f"^serving {reloads + 1}$")
    until(lambda: len(started.status()["known_good"]) > 1)
    assert started.command("rollback").returncode == 0
    before = watching.scrape()["jobs_total"]
    until(lambda: watching.scrape()["jobs_total"] > before)
    assert sum(started.status()["restarts"].values()) == kills


def test_scrape_at_any_moment_of_a_reload_finds_the_gauges(
    supervise: Callable[..., Supervised], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text(COUNTS, encoding="utf-8")
    write_version(tree, 0)
    started = supervise("--handover=overlap", "main.py", cwd=tree)
    started.expect("^serving 0$")
    watching = Watching(started.status()["listen"])
    until(lambda: watching.scrape().get("number") == 0)
    for number in (1, 2, 3):
        write_version(tree, number)
        until(lambda number=number: watching.scrape()["number"] == number)  # type: ignore[misc]


def test_child_whose_series_explode_is_still_seen_and_still_reloaded(
    supervise: Callable[..., Supervised], tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text(COUNTS, encoding="utf-8")
    write_version(tree, 0, 100_000)
    started = supervise("main.py", cwd=tree)
    started.expect("^serving 0$")
    watching = Watching(started.status()["listen"])
    until(lambda: watching.scrape().get("wa_supervisor_child_scrape_error") == 1)
    until(lambda: watching.scrape()["jobs_total"] > 0)
    assert "exploding_total{request=1}" not in watching.before
    write_version(tree, 1)
    started.expect("^serving 1$")
    until(lambda: "wa_supervisor_child_scrape_error" not in watching.scrape())
    assert started.status()["in_sync"]
