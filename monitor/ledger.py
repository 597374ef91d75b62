"""What became of messages, read from the ledger: what `explain` and `reconcile` share.

The rule: a message of the bridge that should have an event and has none is either refused, still to be read,
older than the beginning, or lost; nothing else is possible, and only the last one is a fault of ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from monitor.adoption import OVERLAP
from monitor.cursor import Cursor
from monitor.database import Database
from monitor.decision import Decided, MessageId
from monitor.messages import Message, Unreadable

_REASONS = {
    "dead_letter": "rejected",
    "other_chat": "other_chat",
    "disabled_project": "disabled_project",
}
"""Outcomes for which a message that would be stored today was not."""


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A message that was dealt with."""

    outcome: str
    decided_at: datetime
    reason: str | None
    """Why it was refused."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """From where on messages are ours."""

    since: datetime | None
    """Messages that were sent before this are not; None: all are."""
    since_rowid: int | None
    """Rows after this one are ours, whenever they were sent; None: the time decides."""
    handled: Mapping[str, datetime] = field(default_factory=dict)
    """Until when the old monitor had dealt with each chat, if its state was taken over."""

    @classmethod
    def of(cls, database: Database, source: str, seen: Cursor) -> "Beginning":
        """Read what the first start was told."""
        handled = {
            chat: datetime.fromisoformat(text)
            for (positions,) in database.rows("adopted_positions", {"source": source})
            for chat, text in positions.items()
        }
        return cls(seen.since, seen.since_rowid, handled)

    def is_after(self, row: Message | Unreadable) -> bool:
        """Tell whether a message was sent before we began."""
        if self.since_rowid is not None and row.rowid > self.since_rowid:
            return False
        handled = self.handled.get(row.chat_jid)
        since = self.since if handled is None else handled - OVERLAP
        return since is not None and row.sent_at is not None and row.sent_at < since


def ledger_entries(database: Database, source: str, ids: Sequence[MessageId]) -> dict[MessageId, LedgerEntry]:
    """Look these messages up."""
    parameters = {"source": source, "chat_jids": [chat for chat, _ in ids], "keys": [key for _, key in ids]}
    return {
        (chat_jid, key): LedgerEntry(*rest)
        for chat_jid, key, *rest in database.rows("ledger_entries", parameters)
    }


def fate(one: Decided, seen: Cursor | None, beginning: Beginning | None, entry: LedgerEntry | None) -> str:
    """Say why a message of the bridge has no event: the reason not to store it, or what became of it.

    `rejected`, `not_read_yet`, `before_start` or `missing` if it is to be stored. A group that was no project
    when its message was read is still the reason.
    """
    if one.outcome not in {"drops", "dead_letter"}:
        return one.outcome
    if entry is not None and entry.outcome in _REASONS:
        return _REASONS[entry.outcome]
    if seen is None or one.message.rowid > seen.place.rowid:
        return "not_read_yet"
    if entry is None and beginning is not None and beginning.is_after(one.message):
        return "before_start"
    return "missing"
