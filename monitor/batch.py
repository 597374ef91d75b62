"""A batch: what was decided about the messages of one page, with what their statements will need.

The rule: it is made from the decisions alone, so it may be made while the batch before is still being stored.
Nearly always the ledger knows none of its messages, and all of it is used as it is.
"""

from collections import Counter
from collections.abc import Collection, Sequence

from monitor.database import array
from monitor.decision import Decided, MessageId
from monitor.messages import Message, Unreadable
from monitor.totals import Totals


class Batch:
    """Decided messages, each once: what was decided last about a key counts.

    Attributes:
        messages: by chat and key.
        with_drops: those that name drops.
        unreadable: those that cannot become messages and are to be, with the reason.
        ids: `chat_jids` and `keys`, as the statements take them.
        entry: the same with all that the ledger keeps of a message.
        counted: the messages as the totals count them.
    """

    def __init__(self, decided: Sequence[Decided]) -> None:
        self.messages = {one.id: one for one in decided}
        whole = list(self.messages.values())
        self.with_drops = [one for one in whole if one.drops]
        self.unreadable = {
            one.id: one.message.reason
            for one in whole
            if isinstance(one.message, Unreadable) and one.outcome == "dead_letter"
        }
        self.ids = ids_of(self.messages)
        self.entry = entry_of(whole)
        self.counted = count(whole)


def ids_of(ids: Collection[MessageId]) -> dict[str, object]:
    """Return chats and keys as two arrays."""
    return {"chat_jids": array([chat for chat, _ in ids]), "keys": array([key for _, key in ids])}


def entry_of(messages: Sequence[Decided], dead: Collection[MessageId] = ()) -> dict[str, object]:
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
