"""Reconcile: the bridge's file against PostgreSQL, message by message.

The rule: the bridge is read once more from its beginning, each drop is decided as the relay decides it, and
looked up. What is missing, refused, gone from the table, or put there by another writer is listed; a clean
run lists nothing. The cursor is read first, so that what arrives meanwhile counts as not read yet and never
as lost.

Rejected: comparing counts. Two errors that cancel each other out would look like none.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import msgspec

from monitor import cursor
from monitor.bridge import Bridge
from monitor.database import Database
from monitor.decision import Decided, Decider
from monitor.identity import Known
from monitor.ledger import Beginning, fate, ledger_entries


@dataclass(frozen=True, slots=True)
class Difference:
    """A drop that one side has and the other has not."""

    drop_number: str
    project: str
    at: datetime | None
    """When it was sent, or when its row was made."""
    reason: str = ""


@dataclass
class Comparison:
    """What both sides hold since then."""

    messages: int = 0
    """Of enabled projects."""
    drops: int = 0
    """Pairs of message and drop."""
    not_read_yet: int = 0
    missing: list[Difference] = field(default_factory=list)
    """Read, and stored nowhere."""
    rejected: list[Difference] = field(default_factory=list)
    gone: list[Difference] = field(default_factory=list)
    """Stored, and their row is not in the table any more."""
    foreign: list[Difference] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Tell whether anything is listed."""
        return bool(self.missing or self.rejected or self.gone or self.foreign)

    def to_json(self) -> bytes:
        """Return the comparison as JSON: the fields above, times in ISO form, and `failed`."""
        document = {"failed": self.failed, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=2)


def reconcile(
    database: Database, bridge: Bridge, decider: Decider, known: Known, *, source: str, since: datetime | None
) -> Comparison:
    """Compare both sides for messages sent since then; raises `StoreError` or `BridgeError`."""
    seen = cursor.look(database, source)
    beginning = None if seen is None else Beginning.of(database, source, seen)
    result = Comparison()
    for page in bridge.pages():
        decided = [decider.decide(row, known) for row in page]
        meant = [one for one in decided if _is_meant(one, since)]
        _compare(meant, database, source, partial(fate, seen=seen, beginning=beginning), result)
    window = {"since": since, "source": source}
    result.gone = [Difference(*row) for row in database.rows("reconcile_gone", window)]
    result.foreign = [Difference(*row) for row in database.rows("reconcile_foreign", window)]
    return result


def _is_meant(one: Decided, since: datetime | None) -> bool:
    """Tell whether a message is of an enabled project and not too old; a time that is none is never old."""
    if one.project is None or not one.project.enabled:
        return False
    return since is None or one.message.sent_at is None or one.message.sent_at >= since


def _compare(
    page: Sequence[Decided],
    database: Database,
    source: str,
    fate_of: Callable[..., str],
    result: Comparison,
) -> None:
    result.messages += len(page)
    wanted = [one for one in page if one.outcome in {"drops", "dead_letter"}]
    if not wanted:
        return
    ids = [one.id for one in wanted]
    asked = {"source": source, "chat_jids": [chat for chat, _ in ids], "keys": [key for _, key in ids]}
    stored = set(database.rows("known_events", asked))
    ledger = ledger_entries(database, source, ids)
    for one in wanted:
        result.drops += len(one.drops)
        left = [number for number in _numbers(one) if (*one.id, number) not in stored]
        what = fate_of(one, entry=ledger.get(one.id)) if left else ""
        if what == "not_read_yet":
            result.not_read_yet += 1
        elif what in {"missing", "rejected"}:
            entry = ledger.get(one.id)
            listed = result.missing if what == "missing" else result.rejected
            listed += _differences(one, left, (entry and entry.reason) or "")


def _numbers(one: Decided) -> Sequence[str]:
    """Return the drops of a message; one that cannot be read has one of which nobody knows the number."""
    return one.drops if one.outcome == "drops" else ("?",)


def _differences(one: Decided, numbers: Sequence[str], reason: str) -> Iterator[Difference]:
    project = "" if one.project is None else one.project.name
    for number in numbers:
        yield Difference(number, project, one.message.sent_at, reason)
