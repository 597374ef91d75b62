"""Terminal: the documents of :mod:`supervisor.status` as tables for people.

The rule: what a document says in words is printed as it is; brackets in an error message are no markup.
Colour appears on a terminal only (``rich`` sees to that).
"""

from __future__ import annotations

import datetime as dt
import difflib
import itertools
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

_SHORT_DIGEST = 12
_SHOWN_PATHS = 3
_TIMELINE_CELLS = 40
_STAGE_COLOURS = ("cyan", "blue", "magenta", "green", "yellow", "red")


def print_status(document: dict[str, Any]) -> None:
    """Print the document of ``status``."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _status_rows(document):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def reload_line(record: dict[str, Any]) -> str:
    """Return the record of a reload as one line of plain text."""
    parts = [record["outcome"]]
    if record["reason"]:
        parts[0] += f" ({record['reason']}: {record['detail']})"
    if record["generation"]:
        parts.append(f"generation {record['generation']}")
    parts.append(f"by {record['trigger']}")
    if record["paths_total"]:
        parts.append(f"{record['paths_total']} changed ({', '.join(record['paths'][:_SHOWN_PATHS])})")
    parts.append(f"{record['total_seconds'] * 1000:.0f} ms")
    return ", ".join(parts)


def print_verify(document: dict[str, Any]) -> None:
    """Print the document of ``verify``."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    for heading in ("module", "path", "running", "on disk", ""):
        table.add_column(heading)
    for module in document["modules"]:
        colour = "green" if module["state"] == "match" else "red"
        running = (module["running_sha256"] or "unknown")[:_SHORT_DIGEST]
        on_disk = (module["disk_sha256"] or "no file")[:_SHORT_DIGEST]
        state = f"[{colour}]{module['state']}[/]"
        table.add_row(escape(module["name"]), escape(module["path"]), running, on_disk, state)
    console.print(table)
    verdict = "[green]in sync[/]" if document["in_sync"] else "[red]NOT in sync[/]"
    took = document["duration_seconds"] * 1000
    console.print(f"{verdict}: {len(document['modules'])} modules, asked and compared in {took:.0f} ms")
    functions = document["functions"]
    console.print(f"{functions['checked']} functions in memory compared with their sources")
    for name in functions["foreign"]:
        console.print(f"[red]not of its source[/]: {escape(name)}")


def print_history(records: list[dict[str, Any]]) -> None:
    """Print the document of ``history``, in the order given: each reload with a small timeline."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for record in records:
        at = dt.datetime.fromisoformat(record["at"]).astimezone()
        told = [_history_sentence(record), *([record["detail"]] if record["detail"] else [])]
        lines = [_printable(line) for line in told]
        if record["total_seconds"] is not None:
            lines.append(_timeline(record["stages"], record["total_seconds"]))
        table.add_row(f"{at:%Y-%m-%d %H:%M:%S}", "\n".join(lines))
    Console(highlight=False).print(table if records else "nothing has been recorded yet")


def print_findings(document: dict[str, Any]) -> None:
    """Print the document of ``doctor``: a line for each finding, and below it what to do."""
    colours = {"ok": "green", "warning": "yellow", "wrong": "red", "skipped": "dim"}
    console, unit = Console(highlight=False, soft_wrap=True), None
    for finding in document["findings"]:
        if finding["unit"] != unit:
            unit = finding["unit"]
            console.print(f"[bold]{escape(unit)}[/]")
        state, detail = finding["state"], _printable(finding["detail"])
        console.print(f"  [{colours[state]}]{state:<7}[/]  {escape(finding['check'])}: {detail}")
        if finding["remedy"]:
            console.print(f"           -> {_printable(finding['remedy'])}")
    console.print("[red]something is wrong[/]" if document["failed"] else "[green]nothing is wrong[/]")


def print_diff(document: dict[str, Any]) -> None:
    """Print the document of ``diff``; nothing at all if the running sources are those on disk."""
    running = _origin(f"generation {document['generation']}", document["running_commit"])
    on_disk = _origin("on disk", document["disk_commit"])
    for file in document["files"]:
        before, after = ((file[side] or "").splitlines(keepends=True) for side in ("running", "disk"))
        old = f"{file['path']} ({running})" if file["running"] is not None else "/dev/null"
        new = f"{file['path']} ({on_disk})" if file["disk"] is not None else "/dev/null"
        for line in difflib.unified_diff(before, after, old, new):
            print(line.rstrip("\r\n"))


def _history_sentence(record: dict[str, Any]) -> str:
    parts = [f"{record['kind']} by {record['trigger']}" if record["trigger"] else record["kind"]]
    outcome = record["outcome"] or ""
    parts.append(f"{outcome} ({record['reason']})" if record["reason"] else outcome)
    if record["generation"]:
        parts.append(f"generation {record['generation']}")
    if record["tree"]:
        parts.append(f"tree {record['tree'][:_SHORT_DIGEST]}")
    if record["paths_total"]:
        more = ", ..." if record["paths_total"] > _SHOWN_PATHS else ""
        parts.append(f"{record['paths_total']} changed: {', '.join(record['paths'][:_SHOWN_PATHS])}{more}")
    return ", ".join(part for part in parts if part)


def _timeline(stages: dict[str, float], total_seconds: float) -> str:
    """Return where the time of a reload went: for each stage its share of a line, in its first letter."""
    line, done, cells = "", 0.0, 0
    for (stage, seconds), colour in zip(stages.items(), itertools.cycle(_STAGE_COLOURS)):
        done += seconds
        end = round(_TIMELINE_CELLS * done / max(total_seconds, done, 1e-9))
        line += f"[{colour}]{stage[0] * (end - cells)}[/]" if end > cells else ""
        cells = end
    shares = ", ".join(f"{stage} {seconds * 1000:.1f}" for stage, seconds in stages.items())
    return f"{line}{'.' * (_TIMELINE_CELLS - cells)} {total_seconds * 1000:.0f} ms\n{shares}".rstrip()


def _printable(text: str) -> str:
    """Return text that no terminal and no encoding stumbles over: a child may have written anything."""
    shown = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return escape("".join(shown))


def _commit(git: dict[str, Any]) -> str:
    branch = f" ({git['branch']})" if git["branch"] else ""
    return f"{git['commit'] or 'not known'}{escape(branch)}{', [yellow]dirty[/]' if git['dirty'] else ''}"


def _origin(what: str, commit: str | None) -> str:
    return f"{what}, commit {commit[:_SHORT_DIGEST]}" if commit else what


def _status_rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    live, candidate, last, watch = (document[key] for key in ("live", "candidate", "last_reload", "watch"))
    in_sync = "[green]yes[/]" if document["in_sync"] else f"[red]no[/]: {escape(document['reason'])}"
    rows = [("in sync", in_sync), ("state", f"{document['state']} (supervisor pid {document['pid']})")]
    if live:
        tree = live["tree"][:_SHORT_DIGEST]
        rows.append(
            (
                "live",
                f"generation {live['generation']}, pid {live['pid']}, tree {tree}, since {live['since']}",
            )
        )
        if live["status"]:
            rows.append(("says", escape(live["status"])))
    if candidate:
        rows.append(("candidate", f"generation {candidate['generation']} ({candidate['stage']})"))
    if last:
        rows.append(("last reload", escape(reload_line(last))))
    good = document["last_known_good"]
    rows.append(("known good", f"tree {good[:_SHORT_DIGEST]}" if good else "none yet"))
    rows += [
        ("quarantine", escape(f"tree {fault['tree'][:_SHORT_DIGEST]}: {fault['detail']}"))
        for fault in document["quarantine"]
    ]
    own = document.get("self")  # A supervisor that has not been updated yet does not know it.
    if own and own["outdated"]:
        rows.append(("supervisor", f"[yellow]outdated[/]: {escape(own['reason'])}; `wa-supervisor reexec`"))
    zygote = document.get("zygote")
    if zygote and zygote["reason"]:
        rows.append(("zygote", escape(f"{zygote['state']}: {zygote['reason']}")))
    if document["paused"]:
        rows.append(("paused", "[yellow]no other code is started[/] until `wa-supervisor resume`"))
    rows.append(
        ("converges", f"within {document['converge_seconds']:g} s of the last change, or says why not")
    )
    rows += [("problem", f"[red]{escape(problem)}[/]") for problem in document["problems"]]
    rows.append(("watch", f"{watch['mode']}, last scan {watch['last_scan_age_seconds']:.1f} s ago"))
    if document["git"]:
        rows.append(("commit", _commit(document["git"])))
    if not document["bytecode"]["writable"]:
        total, shown = document["bytecode"]["stale_total"], document["bytecode"]["stale"][:_SHOWN_PATHS]
        stale = f"{total} stale file(s) that other processes may run: {', '.join(shown)}"
        rows.append(("bytecode", f"[yellow]not writable[/]: {escape(stale) if total else 'none is stale'}"))
    rows.append(("metrics", f"http://{document['listen']}/metrics"))
    return rows
