"""Comparison: from what was measured to the report: one table, ratios to ours, and each target met or missed.

The rule: pure. Everything that the report says was measured or computed from that; a value that is missing is
told as missing, and a target without its values is "not measured".
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SMALLEST = 20
"""Files of the tree in which everything but the sizes is measured."""

MISSING = "-"
Values = dict[str, Any]


def median(values: Sequence[float] | None) -> float | None:
    return statistics.median(values) if values else None


def p95(values: Sequence[float] | None) -> float | None:
    """Return the 95th percentile; of few values that is nearly the largest."""
    if not values:
        return None
    return statistics.quantiles(values, n=20, method="inclusive")[-1] if len(values) > 1 else values[0]


def number(value: float | None) -> str:
    """Return a value with the digits that mean something."""
    if value is None:
        return MISSING
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 1 else f"{value:.2f}"  # noqa: PLR2004


def ratio(value: float | None, ours: float | None) -> str:
    return f"{value / ours:.1f} x" if value is not None and ours else MISSING


def saves(values: Values, files: int = SMALLEST) -> Sequence[float]:
    found: Sequence[float] = values["saves_ms"].get(str(files), ())
    return found


def seconds_down(found: Sequence[float | None]) -> str:
    """Return the median time down; that it did not come back beats it."""
    back = [value for value in found if value is not None]
    lost = len(found) - len(back)
    return f"not back ({lost} of {len(found)})" if lost else number(median(back))


def stale(values: Values) -> str:
    """Return the share of the edits that did not run, and how many of those were not noticed at all."""
    if "edits" not in values:
        return MISSING
    share = f"{100 * values['stale'] / values['edits']:.0f} %"
    return (
        f"{share} ({values['unnoticed']} of {values['edits']} not noticed)" if values["unnoticed"] else share
    )


def row(values: Values, ours: Values, sizes: Sequence[int], idle_sizes: Sequence[int], version: str) -> str:
    """Return the table row of one contender."""
    taken, gaps = saves(values), values["gaps_ms"]
    idle = [values["idle"].get(str(files), {}) for files in idle_sizes]
    cells = [
        f"{values['name']} {version}".strip(),
        number(median(taken)),
        number(p95(taken)),
        ratio(median(taken), median(saves(ours))),
        number(median(gaps)),
        number(p95(gaps)),
        ratio(median(gaps), median(ours["gaps_ms"])),
        stale(values),
        str(values.get("checkout_starts", MISSING))
        + ("" if values.get("checkout_seen", True) else " (old code)"),
        seconds_down(values["syntax_seconds"]),
        seconds_down(values["import_seconds"]),
        *(number(found.get("cpu_percent")) for found in idle),
        *(f"{number(found.get('rss_mib'))} / {number(found.get('pss_mib'))}" for found in idle),
        *(number(median(saves(values, files))) for files in sizes),
    ]
    return f"| {' | '.join(cells)} |"


def header(sizes: Sequence[int], idle_sizes: Sequence[int]) -> list[str]:
    """Return the first two lines of the table."""
    cells = [
        *("", "(a) save to new code, median ms", "p95", "to ours"),
        *("(b) longest gap, median ms", "p95", "to ours"),
        *("(c) stale after an edit", "(d) processes for a checkout"),
        *("(e) s down, syntax error", "s down, import error"),
        *(f"(f) idle % of a core, {files} files" for files in idle_sizes),
        *(f"RSS / PSS MiB, {files} files" for files in idle_sizes),
        *(f"(g) (a) at {files} files" for files in sizes),
    ]
    return [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]


@dataclass(frozen=True)
class Target:
    """Something to reach.

    Attributes:
        value: what was measured, None if it was not.
        bound: it has to be at most this, None if that was not measured.
    """

    what: str
    value: float | None
    bound: float | None
    unit: str

    @property
    def verdict(self) -> str:
        if self.value is None or self.bound is None:
            return "not measured"
        return "met" if self.value <= self.bound else "missed"

    @property
    def line(self) -> str:
        cells = (
            self.what,
            f"{number(self.value)} {self.unit}",
            f"{number(self.bound)} {self.unit}",
            self.verdict,
        )
        return f"| {' | '.join(cells)} |"


def times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def best(found: Sequence[Values], of: Callable[[Values], float | None]) -> tuple[str, float | None]:
    """Return the name and value of the contender with the smallest value."""
    known = [(value, values["name"]) for values in found if (value := of(values)) is not None]
    value, name = min(known, default=(None, "none"))
    return name, value


def targets(measured: Values) -> list[Target]:
    """Return what was to be reached, with what was."""
    everybody = measured["contenders"]
    ours = next((c for c in everybody if c["family"] == "ours" and "replace" in c["name"]), None)
    if ours is None:
        return []
    overlap = next((c for c in everybody if c["family"] == "ours" and "overlap" in c["name"]), None)
    replacing = [c for c in everybody if c["family"] == "replaces"]
    patching = next((c for c in everybody if c["family"] == "patches"), None)
    cold, live = median(measured["starts"]["python_ms"]), ours["live_ms"].get(str(SMALLEST))
    fastest, fastest_ms = best(replacing, lambda c: median(saves(c)))
    smoothest, smoothest_ms = best(replacing, lambda c: median(c["gaps_ms"]))
    gap = median(ours["gaps_ms"])
    alone = max((-apart for apart in overlap["together_ms"]), default=None) if overlap else None
    demo = measured["demo"]
    parts = [demo.get(name, {}).get("rss_mib") for name in ("supervisor", "zygote")]
    both = sum(parts) if None not in parts else None
    live_5000 = median(ours["live_ms"].get("5000"))
    jurigged = median(saves(patching)) if patching else None
    save = f"{ours['name'].split(', ', 1)[1]}: save to verified and live"
    typical = f"{save}, median"
    start = median(measured["starts"]["service_ms"])
    return [
        Target(f"{typical}, to 0.15 x a cold Python", median(live), times(0.15, cold), "ms"),
        Target(f"{typical}, to 0.5 x jurigged", median(live), times(0.5, jurigged), "ms"),
        Target(f"{typical}, to 1/6 of {fastest}", median(live), times(1 / 6, fastest_ms), "ms"),
        Target(f"{save}, p95, to 2 x its median", p95(live), times(2, median(live)), "ms"),
        Target("longest gap, `replace`, median", gap, 5.0, "ms"),
        Target(f"the same, to 1/40 of {smoothest}", gap, times(1 / 40, smoothest_ms), "ms"),
        Target("longest time without a live child, `overlap`, of all saves", alone, 0.0, "ms"),
        Target(
            f"{typical}, 5000 files, to 1.5 x {SMALLEST} files", live_5000, times(1.5, median(live)), "ms"
        ),
        Target("start of the service to live, median, to 2 x a cold Python", start, times(2, cold), "ms"),
        Target("supervisor RSS, with the demo", parts[0], 60.0, "MiB"),
        Target("supervisor and zygote RSS, with the demo", both, 110.0, "MiB"),
    ]


def notes(measured: Values) -> list[str]:
    """Return what has to be known to read the table."""
    machine, plan, cold = measured["machine"], measured["plan"], measured["starts"]["python_ms"]
    pauses = [pause for c in measured["contenders"] for pause in c["pauses_ms"]]
    demo = measured["demo"]
    shown = [
        f"{name} {number(demo[name]['rss_mib'])} MiB RSS, {number(demo[name]['pss_mib'])} MiB PSS"
        for name in ("supervisor", "zygote")
        if name in demo
    ]
    told = "; ".join(shown) or demo.get("problem", "not measured")
    load = f"load {machine['load_before']:.1f} before and {machine['load_after']:.1f} after"
    return [
        f"Python {machine['python']}, {machine['cores']} cores, {load}; {machine['seconds']:.0f} s.",
        f"{plan['rounds']} interleaved rounds in an order by chance, {plan['saves']} saves each in a round,",
        f"{measured['our_factor'] * plan['saves']} of ours; {plan['saves_in_size']} for each size in (g),",
        "of ours as many as in a round;",
        f"{plan['broken_rounds']} for each fault in (e).",
        f"A plain `import psycopg, prometheus_client` took {number(median(cold))} ms, median of {len(cold)}.",
        "While nothing was saved, the longest pause between two lines, the machine's own part in (b), was",
        f"{number(median(pauses))} ms (median; p95 {number(p95(pauses))}).",
        f"The demo of the bundled monitor: {told}.",
    ]


def report(measured: Values) -> str:
    """Return the report."""
    sizes, idle_sizes = measured["plan"]["sizes"], measured["plan"]["idle_sizes"]
    everybody, alone = measured["contenders"], measured["alone"]
    ours = everybody[0]
    lines = ["# Against others", "", *notes(measured), "", *header(sizes, idle_sizes)]
    for values in (*everybody, alone):
        version = measured["versions"].get((values["package"] or "").lower(), "")
        lines.append(row(values, ours, sizes, idle_sizes, version))
    lines += ["", "What each was started with, and what went wrong:", ""]
    for values in everybody:
        lost = [f"{values['lost']} saves were not running after ten seconds"] if values["lost"] else []
        wrong = [*values["problems"], *lost]
        lines.append(
            f"- {values['name']}: {values['settings']}." + (f" **{'; '.join(wrong)}**" if wrong else "")
        )
    lines += ["", "## Targets", "", "| | measured | at most | |", "|---|---|---|---|"]
    return "\n".join([*lines, *(target.line for target in targets(measured)), ""])
