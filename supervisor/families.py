"""Families: the metric families that a child reports, judged, and its totals added up over generations.

Values only: a report comes in as plain data from a process that may be broken or hostile, and what comes out
can be put into an exposition without a second look. The rules:

- **A total never falls.** A counter that falls back or vanishes while its process lives was reset by it; what
  it had counted is kept. A child that is gone leaves its totals behind.
- Buckets are added as the steps they are. When a new version of the program has other bounds than the old
  one, each side counts at a bound of the other what it has at its own nearest bound below, so the sum is a
  histogram again and ``le="+Inf"`` equals the count.
- A histogram is whole: its buckets rise with their bounds, and ``le="+Inf"`` and the count are there and are
  one number. Buckets that fall are no histogram.
- **A counter that began before its process is not the process's.** Its ``_created`` says so (OpenMetrics):
  it is kept in a database, say, and each process shows all of it. Such totals are not added up, the highest
  counts; so they are exact also when a process is killed before it could send its last numbers.
- Whose labels hold a page of text has made a mistake; it is not carried to every scrape.
- A value that is no total (a quantile, a NaN in a counter) is never added to one: it would stay for ever.

A program that says the same again sends the numbers alone: :class:`Form` is what it had said of them.

What a family looks like in an exposition is written here as well (:class:`Writer`), with what stands before
the numbers kept from one exposition to the next.

Rejected: ``prometheus_client.generate_latest`` for the series of children: it judges each name and escapes
each label anew, which with 10,000 series holds the interpreter four times as long.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from msgspec import Struct, field
from msgspec.structs import replace

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
_NO_DOCUMENTATION = "The program says nothing about it."
_PARTS_OF_A_SAMPLE = 3
_DOCUMENTATION_CHARACTERS = 1_000
_LABELS_CHARACTERS = 2_000
_NUMBERS = frozenset({int, float, bool})
_TEXTS_KEPT = 65_536
"""Label sets whose judgement and text are kept: more than any exposition has."""

_FIGURES = {"nan": "NaN", "inf": "+Inf", "-inf": "-Inf"}
"""What Prometheus calls what Python calls otherwise."""

_SHOWN: Mapping[str, tuple[str, str]] = {
    "counter": ("_total", "counter"),
    "info": ("_info", "gauge"),
    "stateset": ("", "gauge"),
    "unknown": ("", "untyped"),
}
"""Suffix and type of a family in the text format, where they are not its own."""

Labels = tuple[tuple[str, str], ...]
Series = tuple[str, Labels]
Values = Mapping[Series, float]


class FamilyError(ValueError):
    """A reported family is not of the agreed form; it is left out of the exposition."""


class Family(Struct, frozen=True):
    """A metric family of one child.

    Attributes:
        name: without the suffix of its samples.
        documentation: one text.
        kind: of prometheus_client's types.
        values: of its series.
        since: when its counters began, in seconds since 1970, if that was before the process did: then they
            are kept somewhere else and go on by themselves. None for the process's own.
    """

    name: str
    documentation: str
    kind: str
    values: Values
    since: float | None = None

    @property
    def names(self) -> frozenset[str]:
        """Every name that this family has in an exposition, its own included."""
        return frozenset({self.name, *(self.name + suffix for suffix in _SUFFIXES[self.kind])})


class Lasting(Struct, frozen=True):
    """A total that outlives the processes that show it.

    Attributes:
        since: when it began; a later one is another counter, after which this one's end is kept.
        value: the highest that was seen of it.
        before: what the counters came to that it took the place of.
    """

    since: float
    value: float
    before: float = 0.0

    def after(self, since: float, value: float) -> Lasting:
        """Return the same after another report; of a counter that is superseded none counts."""
        if since < self.since:
            return self
        if since > self.since:
            return Lasting(since, value, self.before + self.value)
        return Lasting(since, max(value, self.value), self.before)


class Totals(Struct, frozen=True):
    """What one generation has counted so far.

    Attributes:
        carried: what was counted before the process reset a series.
        last: the newest report of each series.
    """

    carried: Values = field(default_factory=dict)
    last: Values = field(default_factory=dict)

    def after(self, report: Values) -> Totals:
        """Return the totals after a newer report."""
        reset = _reset(self.last, report)
        if not reset:
            return Totals(self.carried, {**self.last, **report})
        before = {series: value for series, value in self.last.items() if _unit(series) in reset}
        kept = {series: value for series, value in self.last.items() if series not in before}
        return Totals(added(self.carried, before), {**kept, **report})

    @property
    def values(self) -> Values:
        """What it comes to."""
        return added(self.carried, self.last)


class Form(Struct, frozen=True):
    """A family without its values, which is all of it that seldom changes.

    Attributes:
        family: without values.
        series: of each reported number in its order; None for one that is never shown.
    """

    family: Family
    series: tuple[Series | None, ...]

    def filled(self, numbers: object) -> Family:
        """Return the family with these numbers.

        Raises:
            FamilyError: they are none, or too few, or no such family has them.
        """
        name, kind = self.family.name, self.family.kind
        if type(numbers) is not list or len(numbers) != len(self.series) or not _are_numbers(numbers):
            raise FamilyError(f"{name} has {len(self.series)} series and needs a number for each")
        is_total, sums = kind in TOTAL_KINDS, f"{name}_sum"
        try:
            values = {
                series: float(number)
                for series, number in zip(self.series, numbers, strict=True)
                if series is not None and (not is_total or _is_total(float(number), is_sum=series[0] == sums))
            }
        except OverflowError as error:
            raise FamilyError(f"{name} has a value that is too large") from error
        return replace(self.family, values=_whole(name, values) if kind == "histogram" else values)


def parse(report: object) -> Family:
    """Return a family from a child's report.

    Raises:
        FamilyError: it is none.
    """
    return parse_whole(report)[1]


def parse_whole(report: object) -> tuple[Form, Family]:
    """Return a family from a child's report, and the form by which more numbers for it can be read.

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
    legal = {f"{name}_created", *([name] if kind == "summary" else [])}
    series: list[Series | None] = []
    numbers = []
    for sample in samples:
        one, number = _sample(sample)
        if one[0] not in names and one[0] not in legal:
            raise FamilyError(f"{name} has a sample called {one[0]!r}")
        series.append(one if one[0] in names else None)
        numbers.append(number)
    documentation = _text(report.get("documentation"))[:_DOCUMENTATION_CHARACTERS] or _NO_DOCUMENTATION
    form = Form(Family(name, documentation, kind, {}, _since(report.get("since"))), tuple(series))
    return form, form.filled(numbers)


class Writer:
    """Writes families in the text format; keeps what stands before the numbers for the next time."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[Series], list[str]]] = {}

    def text(self, families: Iterable[Family]) -> str:
        """Return families in the text format."""
        kept, self._kept = self._kept, {}
        parts = []
        for family in families:
            suffix, kind = _SHOWN.get(family.kind, ("", family.kind))
            documentation = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
            name = f"{family.name}{suffix}"
            parts.append(f"# HELP {name} {documentation}\n# TYPE {name} {kind}\n")
            series, before = list(family.values), kept.get(family.name)
            if before is None or before[0] != series:
                before = series, [f"{name}{_written(labels)} " for name, labels in series]
            self._kept[family.name] = before
            figures = (_FIGURES.get(figure, figure) for figure in map(repr, family.values.values()))
            parts += [f"{start}{figure}\n" for start, figure in zip(before[1], figures, strict=True)]
        return "".join(parts)


def added(first: Values, second: Values) -> Values:
    """Return the sum of two sets of totals."""
    if not first or not second:
        return first or second
    if first.keys() != second.keys():
        first, second = _with_bounds_of(second, first), _with_bounds_of(first, second)
    sums = dict(first)
    for series, value in second.items():
        sums[series] = sums.get(series, 0.0) + value
    return sums


def total_values(families: Iterable[Family]) -> Values:
    """Return all series of the families that are totals of the process."""
    return {
        series: value
        for family in families
        if family.kind in TOTAL_KINDS and family.since is None
        for series, value in family.values.items()
    }


def _reset(before: Values, after: Values) -> set[Series]:
    """Return the counters and histograms that began anew; a sum may fall by itself, so it is not asked."""
    return {
        _unit(series)
        for series, value in after.items()
        if value < before.get(series, value) and not series[0].endswith("_sum")
    }


def _unit(series: Series) -> Series:
    """Return what begins anew together with a series: a counter by itself, a histogram whole."""
    name, labels = _without_bound(series)
    for suffix in _SUFFIXES["histogram"]:
        if name.endswith(suffix):
            return name.removesuffix(suffix), labels
    return name, labels


def _since(value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in _NUMBERS or not math.isfinite(value):  # type: ignore[arg-type]
        raise FamilyError("what counters began at is no time")
    return float(value)  # type: ignore[arg-type]


def _are_numbers(values: Iterable[object]) -> bool:
    return _NUMBERS.issuperset(map(type, values))


def _is_total(value: float, *, is_sum: bool) -> bool:
    """Whether a value can be a total, which neither falls nor is no number."""
    return math.isfinite(value) and (value >= 0 or is_sum)


def _sample(sample: object) -> tuple[Series, object]:
    """Return a series and its number; what was read from JSON has plain types, and ``match`` is slow."""
    if type(sample) is not list or len(sample) != _PARTS_OF_A_SAMPLE:
        raise FamilyError("a sample is a name, labels and a number")
    name, labels, number = sample
    if type(name) is not str or type(labels) is not dict:
        raise FamilyError("a sample is a name, labels and a number")
    try:
        return (name, _judged(name.endswith("_bucket"), tuple(labels.items()))), number
    except TypeError as error:  # A list as the value of a label.
        raise FamilyError(f"{name} has a label that is no text") from error


@lru_cache(_TEXTS_KEPT)
def _judged(bucket: bool, pairs: tuple[tuple[object, object], ...]) -> Labels:
    """Return labels in the one order and spelling that they have everywhere."""
    labels = tuple(sorted((_label(label), _text(text)) for label, text in pairs))
    if sum(len(label) + len(text) for label, text in labels) > _LABELS_CHARACTERS:
        raise FamilyError(f"labels are together longer than {_LABELS_CHARACTERS} characters")
    if not bucket:
        return labels
    bound = _figure(_bound(labels))
    return tuple((label, bound if label == _BOUND else text) for label, text in labels)


def _written(labels: Labels) -> str:
    if not labels:
        return ""
    escaped = (
        (label, text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")) for label, text in labels
    )
    return "{" + ",".join(f'{label}="{text}"' for label, text in escaped) + "}"


def _figure(value: float) -> str:
    """Return a number as Prometheus reads it."""
    figure = repr(value)
    return _FIGURES.get(figure, figure)


def _whole(name: str, values: Mapping[Series, float]) -> Values:
    """Return the values of a histogram with what every histogram has.

    Raises:
        FamilyError: its buckets fall.
    """
    whole = dict(values)
    steps: dict[Labels, dict[float, float]] = {}
    for series, value in values.items():
        labels = _without_bound(series)[1]
        if series[0].endswith("_bucket"):
            steps.setdefault(labels, {})[_bound(series[1])] = value
        else:
            steps.setdefault(labels, {})
    for labels, counts in steps.items():
        rising = [counts[bound] for bound in sorted(counts)]
        if rising != sorted(rising):
            raise FamilyError(f"{name} has buckets that fall")
        count = max(values.get((f"{name}_count", labels), 0.0), rising[-1] if rising else 0.0)
        bounded = tuple(sorted((*labels, (_BOUND, "+Inf"))))
        whole[f"{name}_bucket", bounded] = whole[f"{name}_count", labels] = count
        whole.setdefault((f"{name}_sum", labels), 0.0)
    return whole


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
