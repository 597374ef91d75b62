"""Families: the metric families that a child reports, judged, and its totals added up over generations.

Values only: a report comes in as plain data from a process that may be broken or hostile, and what comes out
can be put into an exposition without a second look. The rules:

- **A total never falls.** A counter that falls back or vanishes while its process lives was reset by it; what
  it had counted is kept. A child that is gone leaves its totals behind.
- Buckets are added as the steps they are. When a new version of the program has other bounds than the old
  one, each side counts at a bound of the other what it has at its own nearest bound below, so the sum is a
  histogram again and ``le="+Inf"`` equals the count.
- A value that is no total (a quantile, a NaN in a counter) is never added to one: it would stay for ever.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

TOTAL_KINDS = frozenset({"counter", "histogram", "summary"})
"""Kinds whose samples are added over generations; of all others the live generation's are shown."""

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "histogram": ("_bucket", "_count", "_sum"),
    "summary": ("_count", "_sum"),
    "gauge": ("",),
    "info": ("_info",),
    "stateset": ("",),
    "unknown": ("",),
}
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_BOUND = "le"

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]
Values = Mapping[Series, float]


class FamilyError(ValueError):
    """A reported family is not of the agreed form; it is left out of the exposition."""


@dataclass(frozen=True, slots=True)
class Family:
    """A metric family of one child.

    Attributes:
        name: without the suffix of its samples.
        documentation: one text.
        kind: of prometheus_client's types.
        values: of its series.
    """

    name: str
    documentation: str
    kind: str
    values: Values

    @property
    def names(self) -> frozenset[str]:
        """Every name that this family has in an exposition, its own included."""
        return frozenset({self.name, *(self.name + suffix for suffix in _SUFFIXES[self.kind])})


@dataclass(frozen=True, slots=True)
class Totals:
    """What one generation has counted so far.

    Attributes:
        carried: what was counted before the process reset a series.
        last: the newest report of each series.
    """

    carried: Values = field(default_factory=dict)
    last: Values = field(default_factory=dict)

    def after(self, report: Values) -> Totals:
        """Return the totals after a newer report."""
        carried = dict(self.carried)
        for series, value in self.last.items():
            if _was_reset(series, self.last, report):
                carried[series] = carried.get(series, 0.0) + value
        return Totals(carried, {**self.last, **report})

    @property
    def values(self) -> Values:
        """What it comes to."""
        return added(self.carried, self.last)


def parse(report: object) -> Family:
    """Return a family from a child's report.

    Raises:
        FamilyError: it is none.
    """
    if not isinstance(report, Mapping):
        raise FamilyError("a family is an object")
    name, kind = _text(report.get("name")), _text(report.get("type"))
    if not _NAME.fullmatch(name) or kind not in _SUFFIXES:
        raise FamilyError(f"no family has the name {name!r} and the type {kind!r}")
    samples = report.get("samples")
    if not isinstance(samples, list):
        raise FamilyError(f"{name} has no list of samples")
    names = {name + suffix for suffix in _SUFFIXES[kind]}
    values: dict[Series, float] = {}
    for sample in samples:
        series, value = _sample(sample)
        if _left_out(name, kind, series, value):
            continue
        if series[0] not in names:
            raise FamilyError(f"{name} has a sample called {series[0]!r}")
        values[series] = value
    return Family(name, _text(report.get("documentation")), kind, values)


def added(first: Values, second: Values) -> Values:
    """Return the sum of two sets of totals."""
    if not first or not second:
        return first or second
    first, second = _with_bounds_of(second, first), _with_bounds_of(first, second)
    return {series: first.get(series, 0.0) + second.get(series, 0.0) for series in {**first, **second}}


def total_values(families: Iterable[Family]) -> Values:
    """Return all series of the families that are totals."""
    return {
        series: value
        for family in families
        if family.kind in TOTAL_KINDS
        for series, value in family.values.items()
    }


def _was_reset(series: Series, before: Values, after: Values) -> bool:
    """Whether a series began anew. A sum may fall by itself, so its count is asked."""
    name, labels = series
    if name.endswith("_sum"):
        series = (f"{name.removesuffix('_sum')}_count", labels)
    return series in after and after[series] < before.get(series, 0.0)


def _left_out(name: str, kind: str, series: Series, value: float) -> bool:
    """Whether a sample is legal but is not shown."""
    if series[0] == f"{name}_created" or (kind == "summary" and series[0] == name):
        return True
    if kind not in TOTAL_KINDS:
        return False
    return not math.isfinite(value) or (value < 0 and not series[0].endswith("_sum"))


def _sample(sample: object) -> tuple[Series, float]:
    match sample:
        case [str(name), dict(labels), int(value) | float(value)]:
            pairs = tuple(sorted((_label(label), _text(text)) for label, text in labels.items()))
            if name.endswith("_bucket"):
                _bound(pairs)
            try:
                return (name, pairs), float(value)
            except OverflowError as error:
                raise FamilyError(f"{name} has a value that is too large") from error
    raise FamilyError("a sample is a name, labels and a number")


def _label(name: object) -> str:
    if isinstance(name, str) and _LABEL.fullmatch(name):
        return name
    raise FamilyError(f"{name!r} is not the name of a label")


def _text(value: object) -> str:
    """Return a text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise FamilyError(f"{value!r} is not a text")
    return value.encode("utf-8", "replace").decode("utf-8")


def _bound(labels: Labels) -> float:
    """Return the upper bound of a bucket."""
    try:
        bound = float(dict(labels)[_BOUND])
    except (KeyError, ValueError) as error:
        raise FamilyError("a bucket has no bound") from error
    if math.isnan(bound):
        raise FamilyError("a bucket has no bound")
    return bound


def _with_bounds_of(other: Values, values: Values) -> Values:
    """Return ``values`` with the buckets that only ``other`` has, counted from the nearest bound below."""
    missing = [series for series in other if series[0].endswith("_bucket") and series not in values]
    if not missing:
        return values
    steps: dict[Series, dict[float, float]] = {}
    for series, value in values.items():
        if series[0].endswith("_bucket"):
            steps.setdefault(_without_bound(series), {})[_bound(series[1])] = value
    filled = dict(values)
    for series in missing:
        below = steps.get(_without_bound(series), {})
        bound = _bound(series[1])
        filled[series] = max((count for at, count in below.items() if at <= bound), default=0.0)
    return filled


def _without_bound(series: Series) -> Series:
    name, labels = series
    return name, tuple(pair for pair in labels if pair[0] != _BOUND)
