"""A synthetic WhatsApp bridge: the two SQLite files of the real one, written as the real one writes them.

The rule: what the monitor can meet in production, it meets here -- and nothing more comfortable. Hence a chat
row before each message, ``INSERT OR REPLACE`` (a message sent again gets a new rowid), one commit a
statement, rollback journal instead of WAL, message times as text with the writer's own offset, ids without
any order, and a map of LIDs that holds one LID a phone. One thing is stricter: where the real bridge gives up
after five seconds on a locked file and loses the message with a warning, this one raises, so that a monitor
that blocks the bridge is found out.

Everything is invented. Phones are the example numbers of libphonenumber, LIDs are no valid phone anywhere.

Rejected: an in-memory database or a fake reader, which would hide locking, rowids and text formats.

Sources: the bridge's schema and write pattern, ``docs/`` of this repository; sqlite.org, "INSERT OR REPLACE".
"""

from __future__ import annotations

import random
import secrets
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NORTHFIELD: Final = "120363000000000001@g.us"
EASTVALE: Final = "120363000000000002@g.us"
WESTMOOR: Final = "120363000000000003@g.us"

PROJECTS_YAML: Final = f"""\
projects:
  - name: Northfield
    enabled: true
    group_jid: {NORTHFIELD}
    description: Invented site in the north
  - name: Eastvale
    enabled: true
    group_jid: {EASTVALE}
    description: Invented site in the east
  - name: Westmoor
    enabled: false
    group_jid: {WESTMOOR}
    description: Invented site that is closed
"""

_BRIDGE_ZONE: Final = timezone(timedelta(hours=2))  # the real one writes in its host's zone
_BUSY_LIMIT_SECONDS: Final = 5.0  # go-sqlite3's default

_MESSAGES_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS chats (jid TEXT PRIMARY KEY, name TEXT, last_message_time TIMESTAMP);
CREATE TABLE IF NOT EXISTS messages (
    id TEXT, chat_jid TEXT, sender TEXT, content TEXT, timestamp TIMESTAMP, is_from_me BOOLEAN,
    media_type TEXT, filename TEXT, url TEXT, media_key BLOB, file_sha256 BLOB, file_enc_sha256 BLOB,
    file_length INTEGER,
    PRIMARY KEY (id, chat_jid), FOREIGN KEY (chat_jid) REFERENCES chats (jid)
);
"""
_WHATSAPP_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS whatsmeow_lid_map (lid TEXT PRIMARY KEY, pn TEXT UNIQUE NOT NULL); CREATE TABLE IF
NOT EXISTS whatsmeow_device (jid TEXT PRIMARY KEY, lid TEXT, push_name TEXT NOT NULL DEFAULT ''
); CREATE TABLE
IF NOT EXISTS whatsmeow_contacts ( our_jid TEXT, their_jid TEXT, first_name TEXT, full_name TEXT, push_name
TEXT, business_name TEXT, redacted_phone TEXT, PRIMARY KEY (our_jid, their_jid) ); CREATE TABLE IF NOT EXISTS
whatsmeow_version (version INTEGER, compat INTEGER);
"""


class SyntheticBridge:
    """Writer of ``messages.db`` and ``whatsapp.db`` in ``folder``; safe to use from several threads.

    Every method raises ``sqlite3.Error`` when a file cannot be written, ``sqlite3.OperationalError: database
    is locked`` after five seconds in which a reader kept it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.messages_db = folder / "messages.db"
        self.whatsapp_db = folder / "whatsapp.db"

    def create(self) -> None:
        """Create the folder and both files with their tables; what exists stays."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path, schema in ((self.messages_db, _MESSAGES_SCHEMA), (self.whatsapp_db, _WHATSAPP_SCHEMA)):
            with closing(_open(path)) as connection:
                connection.executescript(schema)

    def post(
        self,
        *,
        chat_jid: str,
        sender: str,
        content: str,
        timestamp: datetime | None = None,
        message_id: str | None = None,
        is_from_me: bool = False,
        media_type: str = "",
    ) -> str:
        """Write one message and return its id.

        A known ``message_id`` replaces that message under a new rowid. ``timestamp`` is written with its own
        offset (a naive one without, which the monitor must refuse); by default now, in the bridge's zone.
        """
        text = (timestamp or datetime.now(_BRIDGE_ZONE).replace(microsecond=0)).isoformat(sep=" ")
        identifier = _new_message_id() if message_id is None else message_id
        with closing(_open(self.messages_db)) as connection:
            connection.execute("INSERT OR REPLACE INTO chats VALUES (?, ?, ?)", (chat_jid, "", text))
            connection.execute(
                "INSERT OR REPLACE INTO messages"
                " (id, chat_jid, sender, content, timestamp, is_from_me, media_type)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (identifier, chat_jid, sender, content, text, int(is_from_me), media_type),
            )
        return identifier

    def map_lid(self, lid: str, pn: str) -> None:
        """Learn that ``lid`` is the phone ``pn``; its earlier LID is forgotten, as in the real map."""
        with closing(_open(self.whatsapp_db)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("DELETE FROM whatsmeow_lid_map WHERE pn = ? AND lid <> ?", (pn, lid))
            connection.execute(
                "INSERT INTO whatsmeow_lid_map (lid, pn) VALUES (?, ?)"
                " ON CONFLICT (lid) DO UPDATE SET pn = excluded.pn",
                (lid, pn),
            )
            connection.execute("COMMIT")

    def set_device(self, jid: str, lid: str | None) -> None:
        """Say who the bridge itself is, as full JIDs: ``user:device@server``."""
        with closing(_open(self.whatsapp_db)) as connection:
            connection.execute("INSERT OR REPLACE INTO whatsmeow_device (jid, lid) VALUES (?, ?)", (jid, lid))


@dataclass(frozen=True)
class Post:
    """One message to come, and the truth about it: ``drops`` are the drop numbers it names, in order."""

    chat_jid: str
    sender: str
    content: str
    drops: tuple[str, ...]
    media_type: str = ""


OWN_JID: Final = "12015550123:7@s.whatsapp.net"
OWN_LID: Final = "100000000000099:7@lid"

MAPPED_LIDS: Final = (
    ("100000000000017", "27711234567"),
    ("90000000000019", "263712345678"),
    ("100000000000025", "447400123456"),
    ("100000000000033", "918123456789"),
)
UNMAPPED_LID: Final = ("3000000000013", "258821234567")  # the map learns this pair later, or never

SENDERS: Final = (
    "27711234567",  # one person, as a phone ...
    "100000000000017",  # ... and as a LID
    "90000000000019",
    "447400123456",
    "918123456789",
    "3000000000013",
)

_CHATTER: Final = (
    "Morning all",
    "Power is off on site until ten",
    "Who has the long ladder?",
    "Tomorrow 07:30 at the gate please",
    "DR12345 looks like a typing error",  # five digits: no drop
    "Meter 100000123 read twice",
)
_NEW: Final = (
    "{0} done",
    "{0}",
    "Installed {0}, all photos uploaded",
    "*{0}* green lights",
    "finished {0} now",
)
_SEVERAL: Final = ("{0} and {1} complete", "{0}\n{1}", "Today: {0}, {1}. Thanks")
_AGAIN: Final = ("{0} updated", "{0} photos fixed", "Please look at {0} again")


def messages(seed: int, *, first_drop: int = 1_000_001) -> Iterator[Post]:
    """Yield an endless, repeatable stream of posts: new drops, several at once, resubmissions and chatter.

    New drops count up from ``first_drop``, seven digits, so two streams with different starts never meet.
    """
    chance = random.Random(seed)  # noqa: S311 -- repeatable, not secret
    following = first_drop
    known: list[str] = []
    while True:
        chat_jid = chance.choice((NORTHFIELD, EASTVALE))
        sender = chance.choice(SENDERS)
        kind = chance.choices(("new", "several", "again", "chatter", "photo"), (60, 12, 10, 12, 6))[0]
        if kind == "chatter":
            yield Post(chat_jid, sender, chance.choice(_CHATTER), ())
        elif kind == "photo":
            yield Post(chat_jid, sender, "", (), media_type="image")
        elif kind == "again" and known:
            drop = chance.choice(known)
            yield Post(chat_jid, sender, chance.choice(_AGAIN).format(drop), (drop,))
        else:
            wanted = 2 if kind == "several" else 1
            drops = tuple(f"DR{number}" for number in range(following, following + wanted))
            following += wanted
            known.extend(drops)
            spelt = [_spell(drop, chance) for drop in drops]
            template = chance.choice(_SEVERAL if kind == "several" else _NEW)
            yield Post(chat_jid, sender, template.format(*spelt), drops)


def fill_map(bridge: SyntheticBridge) -> None:
    """Give the bridge its own identity and the pairs of ``MAPPED_LIDS``."""
    bridge.set_device(OWN_JID, OWN_LID)
    for lid, phone in MAPPED_LIDS:
        bridge.map_lid(lid, phone)


def _spell(drop: str, chance: random.Random) -> str:
    """Write a drop number the ways people do."""
    return chance.choices((drop, drop.lower(), f"DR {drop[2:]}", f"dr {drop[2:]}"), (70, 10, 15, 5))[0]


def _new_message_id() -> str:
    """Make an id as phones make them: a client's prefix, then chance; no order."""
    return secrets.choice(("3A", "3EB0", "AC", "A5")) + secrets.token_hex(9).upper()


def _open(path: Path) -> sqlite3.Connection:
    """Open a file as the bridge does: a commit a statement, rollback journal, foreign keys on."""
    connection = sqlite3.connect(path, timeout=_BUSY_LIMIT_SECONDS, isolation_level=None)
    connection.execute("PRAGMA foreign_keys = ON")
    return connection
