"""Explain: why is this drop in the table, or why is it not?

The rule: every answer comes from what is stored (rows, events, ledger, dead letters) and from the bridge's
own file, searched now; nothing is inferred from a log. Each message that names the drop gets one verdict,
with times: stored, waiting for its sender, refused, in another group, the bridge's own, from before the
start, not read yet. A drop that nobody ever posted is said to be that, which ends most searches.

A message is found by a wider pattern than the one that stores drops, so that a drop in a spelling that does
not count is shown as what it is.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from monitor import cursor
from monitor.bridge import Bridge
from monitor.database import Database
from monitor.decision import Decided, Decider, MessageId
from monitor.drops import find_drops
from monitor.identity import Known
from monitor.ledger import Beginning, LedgerEntry, fate, ledger_entries

MEANINGS = {
    "new": "stored as a new drop",
    "resubmission": "stored as a resubmission",
    "known": "its row stood in the table before the monitor; nothing was changed",
    "foreign": "another writer had put it into the table; the row was left alone",
    "rejected": "refused",
    "other_chat": "posted in a group that is no project",
    "disabled_project": "posted in the group of a project that is not enabled",
    "own_message": "sent by the bridge's own account",
    "no_drop": "written in a way that does not count as a drop, or edited later; read",
    "before_start": "sent before the time from which on messages are read",
    "not_read_yet": "the monitor has not read it yet",
    "missing": "read, and stored nowhere: this must not be",
}
"""What each verdict says to a person."""
_SHORTEST, _LONGEST = 5, 12
_LAST = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Post:
    """A message that names the drop."""

    chat_jid: str
    key: str
    verdict: str
    """A key of `MEANINGS`."""
    project: str | None
    sent_at: datetime | None
    decided_at: datetime | None = None
    """When the monitor stored it, or decided that it does not."""
    in_bridge: bool = True
    reason: str | None = None
    """Why it was refused, or how its sender was judged."""
    sender_state: str | None = None
    """`phone`, `pending`, `unknown` or `lid` when it was stored."""
    resolved_at: datetime | None = None
    """When a sender that was pending got a phone."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table."""

    project: str
    sent_at: datetime | None
    created_at: datetime
    submitted_by: str | None
    resubmitted: bool
    origin: Literal["monitor", "adopted", "foreign"]


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything that is known about a drop."""

    number: str
    rows: Sequence[Row]
    posts: Sequence[Post]

    @property
    def seen(self) -> bool:
        """Tell whether there is any trace of the drop."""
        return bool(self.rows or self.posts)


def explain(
    number: str, database: Database, bridge: Bridge, *, decider: Decider, known: Known, source: str
) -> Explanation:
    """Collect what is known of `number` (canonical: `DR` and digits); raises `StoreError`, `BridgeError`."""
    seen = cursor.look(database, source)
    found = {one.id: one for one in _posted(number, bridge, decider, known)}
    posts = [_stored(row, found) for row in database.rows("explain_events", {"number": number})]
    ledger = ledger_entries(database, source, list(found))
    beginning = None if seen is None else Beginning.of(database, source, seen)
    stored = {(post.chat_jid, post.key) for post in posts}
    posts += [
        _not_stored(one, fate(one, seen, beginning, ledger.get(one.id)), ledger.get(one.id))
        for one in found.values()
        if one.id not in stored
    ]
    rows = [Row(*row) for row in database.rows("explain_rows", {"number": number})]
    return Explanation(number, rows, sorted(posts, key=lambda post: post.sent_at or _LAST))


def _posted(number: str, bridge: Bridge, decider: Decider, known: Known) -> Iterator[Decided]:
    """Find the messages that name the drop in any spelling."""
    for page in bridge.pages():
        for row in page:
            loose = find_drops(row.content, extra_separators=True, min_digits=_SHORTEST, max_digits=_LONGEST)
            if number in loose.numbers:
                yield decider.decide(row, known)


def _stored(row: Sequence[Any], found: Container[MessageId]) -> Post:
    chat_jid, key, kind, project, sent_at, stored_at, reason, stored_as, resolved_at = row
    return Post(
        chat_jid=chat_jid,
        key=key,
        verdict=kind,
        project=project,
        sent_at=sent_at,
        decided_at=stored_at,
        in_bridge=(chat_jid, key) in found,
        reason=reason,
        sender_state=None if kind in {"known", "foreign"} else stored_as,
        resolved_at=resolved_at,
    )


def _not_stored(one: Decided, verdict: str, entry: LedgerEntry | None) -> Post:
    """Say why a message of the bridge has no event."""
    message = one.message
    return Post(
        chat_jid=message.chat_jid,
        key=message.key,
        verdict=verdict,
        project=None if one.project is None else one.project.name,
        sent_at=message.sent_at,
        decided_at=None if entry is None else entry.decided_at,
        reason=None if entry is None else entry.reason,
    )
