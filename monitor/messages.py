"""What was read from the bridge: messages, the rows that are none, and the place up to which was read.

Plain facts that the reader makes and the writer keeps, so that neither has to know the other. Those of
which there is one for each message, thousands a second, are named tuples, which are made in a quarter of the
time that a frozen dataclass takes.

A message's key is its id, which is unique within its chat only. History sync may store an empty id, under
which several messages collapse into one row; such a message is keyed by its moment and its content instead,
so that the next one under the same empty id counts as another message.
"""

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple


class Message(NamedTuple):
    """One row of the bridge's table `messages` that could be read."""

    rowid: int
    key: str
    chat_jid: str
    sender: str
    """As the bridge spells it: phone digits, LID digits, or a full JID."""
    content: str
    sent_at: datetime
    """Aware; the sender's time, not the arrival's."""
    is_from_me: bool

    @property
    def content_hash(self) -> str:
        """Tell an edited message from one that was delivered twice."""
        return digest(self.content)


class Unreadable(NamedTuple):
    """A row that cannot become a message, and why. Its texts are escaped, so that they can be stored."""

    rowid: int
    key: str
    chat_jid: str
    content_hash: str
    reason: str
    content: str = ""
    sent_at: datetime | None = None
    """As in a message; None if it is the time that cannot be read."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in the bridge's file: everything up to `rowid` was read.

    `key` and `chat_jid` name the message at that rowid, or are empty where there is none to compare with;
    `file` is device and inode of the file, empty for one that was never seen.
    """

    rowid: int = 0
    key: str = ""
    chat_jid: str = ""
    file: str = ""


def digest(text: str) -> str:
    """Return the sha256 of `text` in hexadecimal; lone surrogates of undecodable bytes are allowed."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
