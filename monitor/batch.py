"""A batch: what was decided about the messages of one page, with what their statements will need.

The rule: it is made from the decisions alone, piece by piece, so it may be made while the batch before is
still being stored. Nearly always the ledger knows none of its messages, and all of it is used as it is.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from monitor.database import array, arrays_joined
from monitor.decision import Decided, MessageId
from monitor.messages import Message, Unreadable
from monitor.totals import Totals


class Batch:
    """Decided messages, each once: what was decided last about a key counts.

    Attributes:
        messages: by chat and key.
        with_drops: those that name drops.
        unreadable: those that cannot become messages and are to be, with the reason.
        counted: the messages as the totals count them.
    """

    def __init__(self, decided: Sequence[Decided] = ()) -> None:
        self._begin()
        self.add(decided)

    def _begin(self) -> None:
        self._entries: list[Mapping[str, str]] = []
        self._added = 0
        self.counted = Totals()
        self.messages: dict[MessageId, Decided] = {}
        self.with_drops: list[Decided] = []
        self.unreadable: dict[MessageId, str] = {}

    def add(self, decided: Sequence[Decided]) -> None:
        """Add some."""
        if not decided:
            return
        self._added += len(decided)
        self.messages.update({one.id: one for one in decided})
        if len(self.messages) != self._added:  # One was there already: the bridge has delivered it twice.
            whole = list(self.messages.values())
            self._begin()
            self.add(whole)
            return
        self.with_drops += [one for one in decided if one.drops]
        self.unreadable.update(
            {
                one.id: one.message.reason
                for one in decided
                if isinstance(one.message, Unreadable) and one.outcome == "dead_letter"
            }
        )
        self._entries.append(entry_of(decided))
        self.counted += count(decided)

    @property
    def ids(self) -> dict[str, object]:
        """`chat_jids` and `keys`, as the statements take them."""
        return {
            name: arrays_joined([entry[name] for entry in self._entries]) for name in ("chat_jids", "keys")
        }

    @property
    def entry(self) -> dict[str, object]:
        """All that the ledger keeps of the messages, as arrays; there is at least one."""
        return {name: arrays_joined([entry[name] for entry in self._entries]) for name in self._entries[0]}


def ids_of(ids: Collection[MessageId]) -> dict[str, str]:
    """Return chats and keys as two arrays."""
    return {"chat_jids": array([chat for chat, _ in ids]), "keys": array([key for _, key in ids])}


def entry_of(messages: Sequence[Decided], dead: Collection[MessageId] = ()) -> dict[str, str]:
    """Return what the ledger keeps of these messages, as arrays; those in `dead` could not be stored."""
    return {
        **ids_of([one.id for one in messages]),
        "hashes": array([one.message.content_hash for one in messages]),
        "outcomes": array(["dead_letter" if dead and one.id in dead else one.outcome for one in messages]),
        "projects": array([None if one.project is None else one.project.name for one in messages]),
        "sent_ats": array([one.message.sent_at for one in messages]),
    }


def count(messages: Collection[Decided]) -> Totals:
    """Count the messages of enabled projects."""
    by_project: Counter[str] = Counter()
    look_alikes: Counter[str] = Counter()
    textless: Counter[str] = Counter()
    for one in messages:
        if one.project is not None and one.project.enabled:
            by_project[one.project.name] += 1
            if one.look_alikes:
                look_alikes[one.project.name] += one.look_alikes
            if isinstance(one.message, Message) and not one.message.content:
                textless[one.project.name] += 1
    return Totals(messages=by_project, look_alikes=look_alikes, textless=textless)
