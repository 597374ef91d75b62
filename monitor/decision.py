"""Deciding about one message: whose group is it in, which drops does it name, and who sent it?

The rule: the decision is pure. It sees the message, the projects, the settings and one reading of the map,
and neither the bridge nor the database; so the relay, `explain` and `reconcile` give the same answer to the
same message. What is written, and whether it was written before, is the store's business.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from monitor.drops import find_drops
from monitor.identity import Identity, Known, OwnMessage, Phone, Rules, Sender, identify
from monitor.messages import Message, Unreadable
from monitor.projects import Project, Projects
from monitor.settings import Settings

Outcome = Literal["drops", "no_drop", "own_message", "other_chat", "disabled_project", "dead_letter"]
_MOST_IDENTIFIED = 10_000
MessageId = tuple[str, str]
"""Chat and key."""


class Decided(NamedTuple):
    """A message and what is to become of it."""

    message: Message | Unreadable
    outcome: Outcome
    project: Project | None = None
    drops: tuple[str, ...] = ()
    sender: Sender | None = None
    """Set when there are drops."""
    look_alikes: int = 0
    """Places in the text that look like a drop and are none."""

    @property
    def id(self) -> MessageId:
        """What the ledger knows the message by."""
        return (self.message.chat_jid, self.message.key)


@dataclass
class _Identified:
    """Who the senders are by one reading of the map: few people write thousands of messages."""

    known: Known | None = None
    by_sender: dict[tuple[str, str], Identity] = field(default_factory=dict)


@dataclass(frozen=True)
class Decider:
    """The projects and settings by which messages are judged."""

    projects: Projects
    rules: Rules
    extra_separators: bool = False
    store_own_messages: bool = False
    _identified: _Identified = field(default_factory=_Identified, compare=False, repr=False)

    @classmethod
    def of(cls, settings: Settings, projects: Projects) -> "Decider":
        """Take from the settings what matters here."""
        return cls(
            projects, Rules(settings.calling_codes), settings.extra_separators, settings.store_own_messages
        )

    def decide(self, row: Message | Unreadable, known: Known) -> Decided:
        """Say what is to become of a message."""
        project = self.projects.by_chat.get(row.chat_jid)
        if project is None:
            return Decided(row, "other_chat")
        if not project.enabled:
            return Decided(row, "disabled_project", project)
        if isinstance(row, Unreadable):
            return Decided(row, "dead_letter", project)
        return self._decide_message(row, project, known)

    def phone(self, sender: str, chat_jid: str, known: Known) -> Phone | None:
        """Decide again who sent a drop that waits; None as long as nobody knows."""
        identity = self._identify(sender, chat_jid, known)
        return identity if isinstance(identity, Phone) else None

    def _decide_message(self, message: Message, project: Project, known: Known) -> Decided:
        """Decide about a message in the group of an enabled project."""
        if message.is_from_me and not self.store_own_messages:
            return Decided(message, "own_message", project)
        found = find_drops(
            message.content,
            extra_separators=self.extra_separators,
            min_digits=project.min_digits,
            max_digits=project.max_digits,
        )
        if not found.numbers:
            return Decided(message, "no_drop", project, look_alikes=found.look_alikes)
        sender = self._identify(message.sender, message.chat_jid, known)
        if isinstance(sender, OwnMessage):
            return Decided(message, "own_message", project)
        return Decided(message, "drops", project, found.numbers, sender, found.look_alikes)

    def _identify(self, sender: str, chat_jid: str, known: Known) -> Identity:
        """Say who it is; where own messages count, the bridge's account is a person like any other."""
        if known is not self._identified.known or len(self._identified.by_sender) >= _MOST_IDENTIFIED:
            self._identified.known = known
            self._identified.by_sender.clear()
        identity = self._identified.by_sender.get((sender, chat_jid))
        if identity is None:
            people = replace(known, own=frozenset()) if self.store_own_messages else known
            identity = identify(sender, chat_jid, people, self.rules)
            self._identified.by_sender[sender, chat_jid] = identity
        return identity
