"""What became of messages, read from the ledger: what `explain` and `reconcile` share.

The rule: a message of the bridge that should have an event and has none is either refused, still to be read,
older than the beginning, or lost; nothing else is possible, and only the last one is a fault of ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from monitor.cursor import Cursor
from monitor.database import Database
from monitor.decision import Decided, MessageId
from monitor.messages import Message


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """A message that was dealt with."""

    outcome: str
    decided_at: datetime
    reason: str | None
    """Why it was refused."""


def ledger_entries(database: Database, source: str, ids: Sequence[MessageId]) -> dict[MessageId, LedgerEntry]:
    """Look these messages up."""
    parameters = {"source": source, "chat_jids": [chat for chat, _ in ids], "keys": [key for _, key in ids]}
    return {
        (chat_jid, key): LedgerEntry(*rest)
        for chat_jid, key, *rest in database.rows("ledger_entries", parameters)
    }


def fate(one: Decided, seen: Cursor | None, entry: LedgerEntry | None) -> str:
    """Say why a message of the bridge has no event: the reason not to store it, or what became of it.

    `rejected`, `not_read_yet`, `before_start` or `missing` if it is to be stored.
    """
    if one.outcome not in {"drops", "dead_letter"}:
        return one.outcome
    if entry is not None and entry.outcome == "dead_letter":
        return "rejected"
    if seen is None or one.message.rowid > seen.place.rowid:
        return "not_read_yet"
    if entry is None and isinstance(one.message, Message) and seen.since and one.message.sent_at < seen.since:
        return "before_start"
    return "missing"
