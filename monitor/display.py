"""Results of the commands as text for people.

The rule: numbers of people are masked unless the operator wants them in full, times are those of the business
zone with its name, a line is never wrapped (it is grepped), and brackets in a name are no markup. Programs
read the JSON.
"""

from collections.abc import Sequence
from datetime import datetime, tzinfo

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor import repair
from monitor.audit import Findings
from monitor.check import Finding
from monitor.explain import MEANINGS, Explanation
from monitor.logs import mask_numbers
from monitor.reconcile import Comparison

_WIDE = 400


def _console() -> Console:
    """Return where to print: as wide as the terminal, and without one as wide as any table."""
    return Console() if Console().is_terminal else Console(width=_WIDE)


def _moment(instant: datetime, zone: tzinfo) -> str:
    return f"{instant.astimezone(zone):%Y-%m-%d %H:%M:%S %Z}"


def _say(console: Console, text: str) -> None:
    """Print a line as it is: whole, and brackets in it are no markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def show_undone(undone: repair.Undone) -> None:
    """Print what an undo did, by project, and what it had to leave."""
    console = _console()
    for project, rows in sorted(undone.restored.items()):
        _say(console, f"{rows} rows of {project or '(none)'} hold again what they held before")
    for number, project in undone.left:
        _say(console, f"left: {number} in {project or '(none)'}: it was changed since, or is gone")
    if not undone.restored:
        _say(console, "Nothing was put back.")


def show_repair(report: repair.Report, *, full_numbers: bool) -> None:
    """Print what a repair did, by project, and what it had to leave."""
    console = _console()
    if report.repaired:
        what = "would be repaired" if report.dry_run else f"were repaired in run {report.run_id}"
        _say(console, f"{report.repaired.total()} rows {what}:")
        table = Table("project", "rows")
        for project in sorted(report.repaired):
            table.add_row(escape(project) or "(none)", str(report.repaired[project]))
        console.print(table)
    else:
        _say(console, "No LID that the map can resolve stands in the table.")
    for refused in report.refused:
        _say(console, f"refused: {refused.drop_number} in {refused.project or '(none)'}: {refused.reason}")
    for row in report.unresolved:
        value = row.value if full_numbers else mask_numbers(row.value)
        _say(
            console,
            f"not resolved: {row.drop_number} in {row.project or '(none)'}:"
            f" the map has no phone for {value}, or had several",
        )


def show_findings(findings: Findings, *, full_numbers: bool, zone: tzinfo) -> None:
    """Print the findings: first what is wrong, then what waits."""
    console = _console()
    if findings.standing:
        _say(console, f"LIDs stand in {sum(one.rows for one in findings.standing)} rows of the table:")
        table = Table("project", "rows", "stored by tree", "since")
        for one in findings.standing:
            since = _moment(one.since, zone) if one.since else "unknown"
            table.add_row(escape(one.project) or "(none)", str(one.rows), one.tree or "(no record)", since)
        console.print(table)
    else:
        _say(console, "No LID stands in the table.")
    for new in findings.newly_stored:
        _say(
            console,
            f"stored as LID: {new.drops} in {new.project} by tree {new.tree or '(not supervised)'},"
            f" {_moment(new.first_at, zone)} to {_moment(new.last_at, zone)}",
        )
    for waiting in findings.waiting:
        _say(
            console,
            f"{waiting.kind}: {waiting.drops} in {waiting.project} since {_moment(waiting.since, zone)}",
        )
    for letter in findings.dead_letters:
        reason = letter.reason if full_numbers else mask_numbers(letter.reason)
        _say(console, f"dead letters: {letter.messages} in {letter.project or '(none)'}: {reason}")
    for row in findings.doubtful:
        value = row.value if full_numbers else mask_numbers(row.value)
        _say(
            console,
            f"doubtful: {row.drop_number} in {row.project or '(none)'}: {value} is no phone, nor in the map",
        )
    for foreign in findings.foreign_rows:
        _say(
            console,
            f"foreign_row: {foreign.rows} in {foreign.project or '(none)'} by another writer,"
            f" {_moment(foreign.first_at, zone)} to {_moment(foreign.last_at, zone)};"
            f" {foreign.posted} posted too",
        )
    if findings.fresh:
        table = Table("stored", "drop", "project", "kind", "sender", "confidence", "because")
        for drop in findings.fresh:
            table.add_row(
                _moment(drop.stored_at, zone),
                drop.drop_number,
                escape(drop.project),
                drop.kind,
                drop.stored_as + (", resolved later" if drop.resolved_at else ""),
                drop.confidence or "",
                drop.reason,
            )
        console.print(table)


def show_check(findings: Sequence[Finding]) -> None:
    """Print a line for each finding, and below what is wrong what to do about it."""
    console = _console()
    for one in findings:
        _say(console, f"{one.state:<8} {one.check}: {one.detail}")
        if one.remedy is not None:
            _say(console, f"         -> {one.remedy}")


def show_explanation(found: Explanation, *, full_numbers: bool, zone: tzinfo) -> None:
    """Print the rows and the messages of a drop, or that there are none."""
    console = _console()
    if not found.seen:
        _say(console, f"{found.number}: not seen. No message of the bridge names it, and no row holds it.")
    for row in found.rows:
        sender = row.submitted_by or "nobody yet"
        _say(
            console,
            f"{found.number}: row in {row.project or '(none)'}, made {_moment(row.created_at, zone)}"
            f" ({row.origin}), submitted by {sender if full_numbers else mask_numbers(sender)}"
            + (", resubmitted" if row.resubmitted else ""),
        )
    for post in found.posts:
        chat = post.chat_jid if full_numbers else mask_numbers(post.chat_jid)
        when = f"sent {_moment(post.sent_at, zone)}" if post.sent_at else "without a time"
        said = [MEANINGS[post.verdict] + (f" {_moment(post.decided_at, zone)}" if post.decided_at else "")]
        said += [f"sender {post.sender_state}"] if post.sender_state else []
        said += [f"sender known since {_moment(post.resolved_at, zone)}"] if post.resolved_at else []
        said += [post.reason if full_numbers else mask_numbers(post.reason)] if post.reason else []
        said += [] if post.in_bridge else ["the bridge does not have the message any more"]
        _say(console, f"{found.number}: {when} in {post.project or chat}: {'; '.join(said)}")


def show_comparison(comparison: Comparison, *, zone: tzinfo) -> None:
    """Print what both sides hold, and every difference."""
    console = _console()
    _say(
        console,
        f"{comparison.messages} messages, {comparison.drops} drops; {comparison.not_read_yet} not read yet",
    )
    for name in ("missing", "rejected", "gone", "foreign"):
        for one in getattr(comparison, name):
            when = f", {_moment(one.at, zone)}" if one.at else ""
            reason = f": {mask_numbers(one.reason)}" if one.reason else ""
            _say(console, f"{name}: {one.drop_number} in {one.project or '(none)'}{when}{reason}")
    if not comparison.failed:
        _say(console, "No difference.")
