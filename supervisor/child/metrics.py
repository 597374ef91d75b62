"""The application's Prometheus metrics as plain data, if it uses ``prometheus_client`` at all.

The rule: look, never import. An application that did not import the library pays nothing and sends nothing.
Metrics of the process and of the interpreter are left out: the supervisor measures its child from outside,
without its help. Of more than :data:`SERIES_LIMIT` series the largest families are left out, and a family
says so: what explodes is one of them, and the others are what tells of it.

What a family is called, its labels and its text seldom change, and to write and read them takes longer than
the numbers: once the supervisor has taken a report, its families are sent again as ``{name, values}``, in the
same order, until something else of them has changed (:class:`Reports`).

A counter may be older than the process that shows it: its ``_created`` is passed on then (``since``), because
the supervisor must not add up what goes on by itself.
"""

from __future__ import annotations

import sys
import time
from typing import Any

SERIES_LIMIT = 20_000
"""How many series are sent at most: a hundred times what an application has that is meant to be watched."""

_BEGAN = time.time()
"""When this process began, or the one it was forked from; what was counted before is not counted here."""

_ABOUT_THE_PROCESS = ("process_", "python_")


def families() -> list[dict[str, Any]] | None:
    """Return the metric families of the default registry, or None where the application has no such library.

    Each is ``{name, documentation, type, samples: [[name, labels, value], …]}``. A collector of the
    application that raises costs its scrape, not the application: the answer is then one family that says so.
    """
    library = sys.modules.get("prometheus_client")
    registry = getattr(library, "REGISTRY", None)
    if registry is None:
        return None
    try:
        found = [
            {
                "name": family.name,
                "documentation": family.documentation,
                "type": family.type,
                "since": _since(family),
                "samples": [[s.name, dict(s.labels), float(s.value)] for s in family.samples],
            }
            for family in registry.collect()
            if not family.name.startswith(_ABOUT_THE_PROCESS)
        ]
    except BaseException as error:  # noqa: BLE001 -- a collector is foreign code, and may even raise SystemExit
        return [failure(f"collecting them raised {type(error).__name__}")]
    return _few(found)


class Reports:
    """What goes to the supervisor, report by report, and what it is known to have taken.

    Not for two threads at a time.
    """

    def __init__(self) -> None:
        self._number = 0
        self._taken = 0
        self._told: dict[str, tuple[int, object]] = {}
        """Name of a family to the report in which it was told whole, and all of it but its values."""

    def next(self) -> dict[str, Any] | None:
        """Return the next one, None where the application has no such library."""
        found = families()
        if found is None:
            return None
        self._number += 1
        names = [family["name"] for family in found]
        told: dict[str, tuple[int, object]] = {}
        report = []
        for family in found:
            name, samples = family["name"], family["samples"]
            form = {**family, "samples": [sample[:2] for sample in samples]}
            number, before = self._told.get(name, (0, None))
            if 0 < number <= self._taken and form == before and names.count(name) == 1:
                told[name] = number, before
                report.append({"name": name, "values": [value for _, _, value in samples]})
            else:
                told[name] = self._number, form
                report.append(family)
        self._told = told
        return {"type": "metrics", "report": self._number, "families": report}

    def taken(self, number: object) -> None:
        """Note that the supervisor has taken this one and all before."""
        if type(number) is int and number <= self._number:
            self._taken = max(self._taken, number)

    def forget(self) -> None:
        """Tell everything again, whole."""
        self._told = {}


def _since(family: Any) -> float | None:  # noqa: ANN401 -- a Metric of a library that is not imported
    """Return when a counter began that is older than this process, None for those that it counts itself."""
    if family.type != "counter":
        return None
    created = [float(s.value) for s in family.samples if s.name == f"{family.name}_created"]
    return min(created) if created and max(created) < _BEGAN else None


def _few(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the families without the largest, as far as they are too many."""
    total = sum(len(family["samples"]) for family in found)
    left_out: list[str] = []
    for family in sorted(found, key=lambda family: len(family["samples"]), reverse=True):
        if total <= SERIES_LIMIT:
            break
        total -= len(family["samples"])
        left_out.append(family["name"])
    if not left_out:
        return found
    few = [family for family in found if family["name"] not in left_out]
    why = f"more than {SERIES_LIMIT} series; left out: {', '.join(left_out[:5])}"
    return [*few, failure(why)]


def failure(why: str) -> dict[str, Any]:
    """Return the family that stands for metrics which cannot be shown."""
    return {
        "name": "wa_supervisor_child_scrape_error",
        "documentation": f"The child's metrics are missing: {why}",
        "type": "gauge",
        "samples": [["wa_supervisor_child_scrape_error", {}, 1.0]],
    }
