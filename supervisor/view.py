"""View: the facts of the status page, gathered when somebody looks.

The rule: **the main loop only leaves references** to values that never change (the status document, a
verdict, a manifest); everything else is done here, in the threads of HTTP, and only for who looks. What was
made of facts that are still the same is kept.

The page shows numbers of the child without knowing what they mean. Which, the settings say
(``--show-metric``, ``--alarm``); who packs a service up with its supervisor says it in the unit.

Rejected: names of the service's metrics in this package (it runs any program), all metrics on the page
(nobody finds the three that matter), a convention of names that a child would have to know.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from supervisor.families import Family, Labels
from supervisor.history import History, Record
from supervisor.manifest import Manifest
from supervisor.metrics import ChildMetrics
from supervisor.page import RECORDS_SHOWN, Html, Table, View, sections, title
from supervisor.settings import Selection, Settings
from supervisor.status import module_rows
from supervisor.verify import Verdict

_RELOADS = frozenset({"reload", "rollback", "restart"})
_ALARMS_SHOWN = 20
_COLUMNS_SHOWN = 30
_LABELS_OF_A_GRID = 2


class Published(Struct, frozen=True):
    """What the main loop leaves to those who look.

    Attributes:
        status: the document.
        verdict: of the live generation, None before the first.
        disk: what is on disk, None if it cannot be read.
        settings: that hold now.
    """

    status: Mapping[str, Any]
    verdict: Verdict | None
    disk: Manifest | None
    settings: Settings


class Page:
    """The sections of the status page; one thread at a time may ask.

    Args:
        published: returns what the loop has left.
        history: of records.
        child: the child's metrics.
    """

    def __init__(self, published: Callable[[], Published], history: History, child: ChildMetrics) -> None:
        self._published = published
        self._history = history
        self._child = child
        self._modules: tuple[Verdict | None, Manifest | None, Html] | None = None
        self._reloads: tuple[list[Record], Html] | None = None

    def __call__(self) -> tuple[str, Mapping[str, str]]:
        """Return the title of the page and its sections by their ids."""
        now = self._published()
        records = [record for record in self._history.last(RECORDS_SHOWN * 4) if record.kind in _RELOADS]
        del records[RECORDS_SHOWN:]
        made: dict[str, Html] = {}
        verdict, disk = now.verdict, now.disk
        if self._modules and self._modules[0] is verdict and self._modules[1] is disk:
            made["modules"] = self._modules[2]
        if self._reloads and self._reloads[0] == records:
            made["reloads"] = self._reloads[1]
        view = View(
            status=now.status,
            records=() if "reloads" in made else [record.as_json() for record in records],
            modules=module_rows(verdict, disk) if verdict and "modules" not in made else None,
            functions=verdict.functions_checked if verdict else 0,
            foreign=verdict.foreign if verdict else (),
            tables=[
                table(family, selection)
                for selection in now.settings.shown_metrics
                if (family := self._child.family(selection.name)) is not None
            ],
            alarms=self._alarms(now.settings),
            unknown=[s.name for s in now.settings.alarms if self._child.family(s.name) is None],
            public=not is_loopback(now.settings.listen[0]),
            made=made,
        )
        shown = sections(view)
        self._modules = verdict, disk, shown["modules"]
        self._reloads = records, shown["reloads"]
        return title(view), shown

    def _alarms(self, settings: Settings) -> list[str] | None:
        if not settings.alarms:
            return None
        return [
            text
            for selection in settings.alarms
            if (family := self._child.family(selection.name)) is not None
            for text in standing(family, selection)
        ][:_ALARMS_SHOWN]


def table(family: Family, selection: Selection) -> Table:
    """Return the sums of a family by the labels that are asked for: the last one across, the others down."""
    counted = {name for name in family.names if not name.endswith(("_bucket", "_sum", "_created"))}
    sums: dict[tuple[str, ...], float] = {}
    labels = selection.labels or _labels_of(family)
    for (name, pairs), value in family.values.items():
        if name in counted and _matches(pairs, selection):
            place = tuple(dict(pairs).get(label, "") for label in labels)
            sums[place] = sums.get(place, 0.0) + value
    if len(selection.labels) < _LABELS_OF_A_GRID:
        rows = [(*place, _number(value)) for place, value in sorted(sums.items())]
        return Table(family.name, family.documentation, (*labels, "number"), tuple(rows), len(labels))
    columns = sorted({place[-1] for place in sums})[:_COLUMNS_SHOWN]
    downs = sorted({place[:-1] for place in sums})
    rows = [(*down, *(_number(sums.get((*down, column), 0.0)) for column in columns)) for down in downs]
    heads, across = (*labels[:-1], *columns), labels[-1]
    return Table(family.name, family.documentation, heads, tuple(rows), len(labels) - 1, across)


def standing(family: Family, selection: Selection) -> list[str]:
    """Return a sentence for each series that an alarm is about and that is not zero."""
    return [
        f"{family.documentation}: {_number(value)} ({name}{_told(pairs)})"
        for (name, pairs), value in family.values.items()
        if value != 0 and _matches(pairs, selection) and not name.endswith(("_bucket", "_sum"))
    ]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _labels_of(family: Family) -> tuple[str, ...]:
    return tuple(sorted({label for _, pairs in family.values for label, _ in pairs} - {"le"}))


def _matches(pairs: Labels, selection: Selection) -> bool:
    return selection.only.items() <= dict(pairs).items()


def _told(pairs: Labels) -> str:
    return ", " + ", ".join(f"{label} {value}" for label, value in pairs) if pairs else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.3f}"
