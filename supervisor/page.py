"""Page: the status as one HTML document for a browser, and its sections by themselves.

The rules:

- **It is complete without JavaScript**; the script only puts newer sections, which are made here as well, in
  place of older ones. There is one way in which a thing is written.
- **Whatever comes from a disk, a child or a person is text.** Elements are made by :func:`_el`, which escapes
  every child that is no :class:`Html`; nothing else makes :class:`Html` of a variable.
- One document, nothing from elsewhere. Its content security policy allows this style and this script by their
  hashes and nothing else, so that an escape that was forgotten would show and not run. Inline styles are not
  allowed by it: lengths of bars are attributes of SVG.
- Colour says nothing that a word does not say.

It knows documents only (those of ``status``, ``history`` and ``verify``) and does not ask anybody.

Rejected: a template engine (a dependency for six tables), sections made by the script from JSON (everything
twice, and nothing without it).

Source: https://www.w3.org/TR/CSP3/, https://www.w3.org/WAI/ARIA/apg/, https://www.w3.org/TR/WCAG22/.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msgspec import Struct, field

RECORDS_SHOWN = 50
MODULES_SHOWN = 500
ROWS_SHOWN = 200
_PATHS_SHOWN = 3
_SHORT_DIGEST = 12
_DETAIL_CHARACTERS = 600
_STAGES = ("settle", "manifest", "bytecode", "launch", "verify", "handover")
_TIMELINE = 1000
"""Length of the longest timeline, in units of the picture."""

_GOOD = frozenset({"live", "unchanged"})
_BAD = frozenset({"rejected", "rolled_back"})

Document = Mapping[str, Any]


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class Table(Struct, frozen=True):
    """Numbers of the child, added up.

    Attributes:
        name: of the metric.
        documentation: of the metric.
        heads: names of the columns; numbers follow those of the labels.
        rows: their cells, numbers last.
        labels: how many of the columns are labels.
        across: the label whose values the other columns are.
    """

    name: str
    documentation: str
    heads: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    labels: int = 0
    across: str | None = None


class View(Struct, frozen=True):
    """What the page shows.

    Attributes:
        status: the document of ``status``.
        records: those of ``history`` that are shown, the newest first.
        modules: the rows of ``verify``, as they are now; None before the first attestation.
        functions: how many pieces of code in memory were compared with their sources.
        foreign: names of functions that are not of their source.
        tables: numbers of the child.
        alarms: sentences; None if none were asked for.
        unknown: names of the metrics that alarms are about and that the child does not show now.
        public: the address can be reached from other machines.
    """

    status: Document
    records: Sequence[Document] = ()
    modules: Sequence[Document] | None = None
    functions: int = 0
    foreign: Sequence[str] = ()
    tables: Sequence[Table] = ()
    alarms: Sequence[str] | None = None
    unknown: Sequence[str] = ()
    public: bool = False
    made: dict[str, Html] = field(default_factory=dict)
    """Sections that were made before from the same facts."""


def sections(view: View) -> dict[str, Html]:
    """Return the sections of the page, by their ids."""
    makers = {
        "headline": _headline,
        "alarms": _alarms,
        "counts": _counts,
        "generations": _generations,
        "reloads": _reloads,
        "modules": _modules,
        "watcher": _watcher,
    }
    return {name: view.made.get(name) or make(view) for name, make in makers.items()}


def title(view: View) -> str:
    """Return the title of the document: what a tab shows of it."""
    alarms = len(view.alarms or ())
    alarm = f"{alarms} alarm{'s' if alarms > 1 else ''}, " if alarms else ""
    return f"{alarm}{'in sync' if view.status.get('in_sync') else 'NOT in sync'} · wa-supervisor"


def document(title: str, made: Mapping[str, str]) -> str:
    """Return the whole document."""
    return (
        _TEMPLATE.replace("@title@", _escape(title))
        .replace("@style@", _STYLE)
        .replace("@script@", _SCRIPT)
        .replace("@sections@", "\n".join(made.values()))  # Last: it may hold anything.
    )


# --- sections ---------------------------------------------------------------------------------------------


def _headline(view: View) -> Html:
    status = view.status
    live = status.get("live")
    good = bool(status.get("in_sync"))
    lines = [_el("h1", "✓ In sync" if good else "✗ Not in sync", class_="good" if good else "bad")]
    if not good:
        lines.append(_el("p", _clip(str(status.get("reason") or "nothing is known yet"))))
    if live:
        commit = live.get("commit")
        lines.append(
            _el(
                "p",
                f"Generation {live['generation']} serves tree ",
                _digest(live["tree"]),
                *([", commit ", _digest(commit)] if commit else []),
                ", since ",
                _time(live["since"]),
                f". It says: {_clip(live['status'])}" if live.get("status") else ".",
            )
        )
    if view.public:
        lines.append(
            _el(
                "p",
                _el("strong", "Warning: "),
                f"this page listens on {status.get('listen')}, which others than this machine may reach.",
                class_="warn",
            )
        )
    style = "box good" if good else "box bad"
    return _section("headline", None, *lines, class_=style, role="status")


def _alarms(view: View) -> Html:
    alarms = view.alarms
    if alarms is None:
        return _section("alarms", "Alarms", _el("p", "None are set (--alarm).", class_="faint"))
    lines = []
    if alarms:
        said = _el("ul", *(_el("li", _el("strong", f"✗ {_clip(text)}")) for text in alarms), class_="plain")
        lines.append(_el("div", said, class_="box bad"))
    if view.unknown:
        names = ", ".join(view.unknown)
        lines.append(_el("p", f"• Not known now, the service does not say it: {_clip(names)}", class_="warn"))
    return _section("alarms", "Alarms", *(lines or [_el("p", "✓ No alarm", class_="good")]), role="alert")


def _counts(view: View) -> Html:
    if not view.tables:
        nothing = _el("p", "None are asked for (--show-metric), or the child has none yet.", class_="faint")
        return _section("counts", "Counts of the service", nothing)
    return _section("counts", "Counts of the service", *(_count_table(table) for table in view.tables))


def _count_table(table: Table) -> Html:
    rows = [
        _el(
            "tr",
            *(_el("th", cell, scope="row") for cell in row[: table.labels]),
            *(_el("td", cell, class_="number") for cell in row[table.labels :]),
        )
        for row in table.rows[:ROWS_SHOWN]
    ]
    heads = [
        _el("th", head, scope="col", class_=None if place < table.labels else "number")
        for place, head in enumerate(table.heads)
    ]
    by = f", by {table.across}" if table.across else ""
    text = f"{_clip(table.documentation)}{by} ({table.name})"
    return _table(f"count-{table.name}", text, heads, rows, len(table.rows) - len(rows))


def _generations(view: View) -> Html:
    status = view.status
    live, candidate = status.get("live"), status.get("candidate")
    rows: list[tuple[object, ...]] = []
    if live:
        since = Html(f"since {_time(live['since'])}")
        rows.append(("live", live["generation"], _digest(live["tree"]), since))
    if candidate:
        rows.append(
            ("candidate", candidate["generation"], _digest(candidate["tree"]), f"{candidate['stage']}")
        )
    rows += [("draining", number, "", "was asked to stop") for number in status.get("draining") or ()]
    rows += [
        ("known good", "", _digest(tree), "has served its probation")
        for tree in status.get("known_good") or ()
    ]
    rows += [
        (
            "quarantine",
            "",
            _digest(fault["tree"]),
            f"{fault['reason'] or 'rolled back'}: {_clip(fault['detail'])}",
        )
        for fault in status.get("quarantine") or ()
    ]
    heads = [_el("th", head, scope="col") for head in ("state", "generation", "tree", "")]
    cells = [
        _el(
            "tr",
            _el("th", state, scope="row"),
            *(_el("td", cell) for cell in rest[:-1]),
            _el("td", rest[-1], class_="long"),
        )
        for state, *rest in rows
    ]
    restarts = ", ".join(f"{n} by {cause}" for cause, n in (status.get("restarts") or {}).items() if n)
    return _section(
        "generations",
        "Generations",
        _table("generations-table", "Processes and trees", heads, cells) if rows else _el("p", "None yet."),
        _el("p", f"Restarts in place of a failed one: {restarts or 'none'}."),
    )


def _reloads(view: View) -> Html:
    longest = max((record.get("total_seconds") or 0.0 for record in view.records), default=0.0)
    items = [_record(record, longest) for record in view.records[:RECORDS_SHOWN]]
    known = _el("ol", *items, class_="records") if items else _el("p", "None yet.")
    return _section("reloads", f"The last {RECORDS_SHOWN} reloads", known)


def _record(record: Document, longest: float) -> Html:
    outcome = str(record.get("outcome") or record["kind"])
    style = (
        "good" if outcome in _GOOD else "bad" if outcome in _BAD or record["kind"] == "restart" else "warn"
    )
    mark = {"good": "✓", "bad": "✗", "warn": "•"}[style]
    reason = f" ({record['reason']})" if record.get("reason") else ""
    about = [f"by {record.get('trigger')}" if record.get("trigger") else ""]
    about.append(f"generation {record['generation']}" if record.get("generation") is not None else "")
    about.append(
        f"{record['total_seconds'] * 1000:.0f} ms" if record.get("total_seconds") is not None else ""
    )
    commit = record.get("commit")
    lines = [
        _el(
            "p",
            _time(record["at"]),
            " ",
            _el("strong", f"{mark} {outcome.replace('_', ' ')}{reason}", class_=style),
            f" {', '.join(part for part in about if part)}",
            *([", commit ", _digest(commit)] if commit else []),
        )
    ]
    if record.get("detail"):
        lines.append(_el("p", _clip(record["detail"])))
    if record.get("paths"):
        more = record["paths_total"] - len(record["paths"][:_PATHS_SHOWN])
        names = ", ".join(record["paths"][:_PATHS_SHOWN])
        lines.append(_el("p", _clip(names), f" and {more} more" if more > 0 else "", class_="faint"))
    stages = {name: seconds for name, seconds in (record.get("stages") or {}).items() if name in _STAGES}
    if stages:
        lines += [_timeline(stages, longest), _legend(stages)]
    return _el("li", *lines)


def _timeline(stages: Mapping[str, float], longest: float) -> Html:
    bars, at = [], 0.0
    scale = _TIMELINE / max(longest, sum(stages.values()), 1e-6)
    for name, seconds in stages.items():
        width = seconds * scale
        bars.append(_el("rect", x=f"{at:.1f}", y="0", width=f"{width:.1f}", height="10", class_=name))
        at += width
    told = ", ".join(f"{name} {seconds * 1000:.1f} ms" for name, seconds in stages.items())
    return _el(
        "svg",
        *bars,
        viewBox=f"0 0 {_TIMELINE} 10",
        preserveAspectRatio="none",
        class_="timeline",
        role="img",
        aria_label=f"Timeline: {told}",
    )


def _legend(stages: Mapping[str, float]) -> Html:
    swatch = {"viewBox": "0 0 10 10", "aria_hidden": "true"}
    return _el(
        "p",
        *(
            _el(
                "span",
                _el("svg", _el("rect", width="10", height="10", class_=name), **swatch),
                f"{name} {seconds * 1000:.1f} ms ",
            )
            for name, seconds in stages.items()
        ),
        class_="stages faint",
    )


def _modules(view: View) -> Html:
    if view.modules is None:
        return _section("modules", "Verification", _el("p", "Nothing live has been attested yet."))
    counts: dict[str, int] = {}
    for module in view.modules:
        counts[module["state"]] = counts.get(module["state"], 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in sorted(counts.items())) or "no module"
    style = "good" if counts.keys() <= {"match"} and not view.foreign else "bad"
    rows = [
        _el(
            "tr",
            _el("th", module["name"], scope="row"),
            _el("td", module["path"]),
            _el("td", _el("strong", module["state"]), class_="good" if module["state"] == "match" else "bad"),
            _el("td", _digest(module["running_sha256"]) if module["running_sha256"] else "unknown"),
            _el("td", _digest(module["disk_sha256"]) if module["disk_sha256"] else "no file"),
        )
        for module in sorted(view.modules, key=lambda module: bool(module["state"] == "match"))[
            :MODULES_SHOWN
        ]
    ]
    heads = [_el("th", head, scope="col") for head in ("module", "path", "state", "running", "on disk")]
    text = "sha256 of the source that each module executed, and of the file on disk"
    lines = [
        _el("p", _el("strong", told, class_=style), f"; {view.functions} pieces of code in memory compared.")
    ]
    if view.foreign:
        names = ", ".join(view.foreign[:ROWS_SHOWN])
        lines.append(_el("p", f"Not the code of their source: {_clip(names)}", class_="bad"))
    table = _table("modules-table", text, heads, rows, len(view.modules) - len(rows))
    open_ = "" if style == "bad" else None
    lines.append(
        _el("details", _el("summary", "Each module", id="modules-each"), table, id="modules-all", open=open_)
    )
    return _section("modules", "Verification", *lines)


def _watcher(view: View) -> Html:
    status = view.status
    watch, git, own = status.get("watch") or {}, status.get("git") or {}, status.get("self") or {}
    mode = str(watch.get("mode", "unknown"))
    rows: list[tuple[str, object]] = [
        ("watcher", _el("strong", mode, class_="good" if mode == "events" else "warn")),
        ("why", watch.get("reason")),
        ("what to do", watch.get("remedy")),
        ("directories", watch.get("directories")),
        ("overflows", watch.get("overflows")),
        ("restarts of the watcher", watch.get("restarts")),
        ("last look at all files", f"{watch.get('last_scan_age_seconds', 0.0):.0f} s ago"),
        ("branch on disk", git.get("branch")),
        ("commit on disk", _digest(git["commit"]) if git.get("commit") else None),
        ("paused", "yes, by an operator" if status.get("paused") else None),
        ("zygote", (status.get("zygote") or {}).get("state")),
        ("the supervisor itself", own.get("reason") if own.get("outdated") else None),
        *(
            ("problem", _el("strong", _clip(problem), class_="bad"))
            for problem in status.get("problems") or ()
        ),
    ]
    shown = [(name, value) for name, value in rows if value is not None]
    told = _el("dl", *(part for name, value in shown for part in (_el("dt", name), _el("dd", value))))
    return _section("watcher", "Watcher and supervisor", told)


# --- elements ---------------------------------------------------------------------------------------------


def _section(name: str, heading: str | None, *children: object, **attributes: str | None) -> Html:
    """A section with an accessible name; a live region keeps its role."""
    if heading is None:
        return _el(
            "section", *children, id=name, aria_label="Is the running code the code on disk?", **attributes
        )
    head = _el("h2", heading, id=f"{name}-heading")
    if attributes.get("role") == "alert":  # A role of its own would take away that of the landmark.
        inner = _el("div", *children, role="alert")
        return _el("section", head, inner, id=name, aria_labelledby=f"{name}-heading")
    return _el("section", head, *children, id=name, aria_labelledby=f"{name}-heading", **attributes)


def _table(name: str, caption: str, heads: Iterable[Html], rows: Iterable[Html], left_out: int = 0) -> Html:
    """A table that scrolls by itself when the screen is narrow, also by keyboard."""
    parts = [_el("caption", caption), _el("thead", _el("tr", *heads)), _el("tbody", *rows)]
    table = _el("table", *parts)
    more = [_el("p", f"and {left_out} more, not shown here")] if left_out > 0 else []
    scroll = _el("div", table, class_="scroll", tabindex="0", role="region", aria_label=caption, id=name)
    return Html(scroll + "".join(more))


def _time(at: str) -> Html:
    return _el("time", str(at)[:19].replace("T", " "), datetime=str(at))


def _digest(text: str) -> Html:
    return _el("code", str(text)[:_SHORT_DIGEST], title=str(text))


def _clip(text: object) -> str:
    plain = str(text)
    return plain if len(plain) <= _DETAIL_CHARACTERS else f"{plain[: _DETAIL_CHARACTERS - 1]}…"


def _el(name: str, *children: object, **attributes: str | None) -> Html:
    """Make an element; what is no HTML is escaped, and an attribute that is None is left out.

    The names of attributes are ours: ``class_`` is ``class``, ``aria_label`` is ``aria-label``.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{''.join(_text(child) for child in children)}</{name}>")


def _text(child: object) -> str:
    return child if isinstance(child, Html) else _escape(str(child))


def _escape(text: str) -> str:
    """Return text as it stands in HTML; what no document may hold is replaced."""
    readable = "".join(
        letter if letter >= " " or letter in "\n\t" else "\N{REPLACEMENT CHARACTER}" for letter in text
    )
    return html.escape(readable.encode("utf-8", "replace").decode())


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_TEMPLATE, _STYLE, _SCRIPT = _asset("page.html"), _asset("page.css"), _asset("page.js")

POLICY = "; ".join(
    (
        "default-src 'none'",
        f"style-src {_hash(_STYLE)}",
        f"script-src {_hash(_SCRIPT)}",
        "connect-src 'self'",
        "img-src data:",  # The icon that there is none.
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The content security policy of the document."""
