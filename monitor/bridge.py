"""The bridge's two SQLite files, strictly read-only, while the bridge writes to them.

The rule: the bridge never notices us. The files are opened with `mode=ro` (nothing is created, a missing
file is an error), each read is one short SELECT with a LIMIT, fetched whole and over before anything else
happens: the files use a rollback journal, so a reader that lingers makes the bridge's write fail, and the
bridge then drops the message.

Order is arrival, that is the rowid: message ids are random and message times come late, in mixed zones.
`INSERT OR REPLACE` gives an old message a new rowid, so it is read again, which the ledger makes harmless.
Four signs say that rowids no longer mean what they meant: another file (device, inode), no row at or after
our place, another message at our place, and a message that was at our place and is nowhere now (a backup that
was written over the file). Then everything is read again; if that message only moved, it was delivered again
and a window is enough.

The LID map is read whole, since it is small and a snapshot without history, and only when it changed. If it
cannot be read, that is an error (`MapUnavailableError`) and never "no mapping".

A file for a write-ahead log whose log is not there has no writer, and nothing of it lies elsewhere. Opened as
usual, SQLite would make the log and its index, as ours, where the bridge then cannot write them; on a
read-only mount it could not even read. So that one, and as long as no log appears and the file stays the
same, is read as immutable.

Rejected: `immutable=1` in any other case (wrong answers under a writer), a copy of the file (tears without
its journal), comparing timestamps as text (offsets differ within one column), paging by message id. Sources:
sqlite.org, "URI Filenames", "PRAGMA data_version", "File Locking", "Write-Ahead Logging" (Read-Only
Databases), "Database File Format" (bytes 18 and 19); go-sqlite3's time format.
"""

import os
import re
import sqlite3
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from monitor.errors import (
    BridgeBusyError,
    BridgeError,
    BridgeFormatError,
    BridgeMissingError,
    BridgeSchemaError,
    MapUnavailableError,
)
from monitor.identity import Known, parse_jid
from monitor.messages import Message, Place, Unreadable, digest

WHATSAPP_DB = "whatsapp.db"
LOOK_BACK_ROWS = 500
_PAGE_ROWS = 2000
_STEP_ROWS = 100
BUSY_TIMEOUT_SECONDS = 2.0
# SQLite's own waiting grows to a tenth of a second, and misses the short gaps of a bridge that writes one
# message after the other.
_RETRY_SECONDS = 0.0005

_COLUMNS = ("id", "chat_jid", "sender", "content", "timestamp", "is_from_me")
_SELECT = f"SELECT rowid, {', '.join(_COLUMNS)} FROM messages"  # noqa: S608 -- constants of this module
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
_DAMAGED = {sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT}
_MAX_ID_CHARACTERS = 255
_NO_ID = "no-id:"
# WhatsApp began in 2009. Outside these years a time is garbage, and at the ends of the calendar it cannot
# even be moved to another zone.
_FIRST_YEAR = 2009
_LAST_YEAR = 2100
_PRIMARY_CODE_MASK = 0xFF  # an extended result code holds its primary one in the low byte
_VERSIONS_AT = 18
_NO_UTF8 = "Could not decode to UTF-8"
"""How Python's sqlite3 begins to say so; it has no code for it."""
_WRITE_AHEAD = b"\x02\x02"
# Go's own way to print a time, which some drivers store: the zone's name and a monotonic clock may follow.
_GO_TIME = re.compile(r"([-0-9]{10} [:.0-9]{8,} [+-][0-9]{4}) [A-Z+0-9-]{3,6}(?: m=[+-][.0-9]+)?", re.ASCII)
_IDENTITY = re.compile(r"[1-9][0-9]{5,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Page:
    """What one read found after a place."""

    rows: Sequence[Message | Unreadable]
    end: Place
    """The place after the last of `rows`; the place that was asked for if there are none."""
    rescan_from: int | None = None
    """Set when rowids mean something else now: read again from after this rowid. `rows` is empty then."""


class Bridge:
    """Reader of one bridge; opens its files when they are first needed and again when they were replaced.

    Every method raises `BridgeError` or a subclass; all of them may be tried again.
    """

    def __init__(self, messages_db: Path) -> None:
        self._messages = _ReadOnlyFile(messages_db, {"messages": _COLUMNS})
        self._map = _ReadOnlyFile(
            messages_db.with_name(WHATSAPP_DB),
            {"whatsmeow_lid_map": ("lid", "pn"), "whatsmeow_device": ("jid", "lid")},
        )
        self._map_version: tuple[int, int] | None = None
        self._known = Known()

    def read_after(self, place: Place, limit: int) -> Page:
        """Return at most `limit` rows that arrived after `place`, or say from where to read again."""
        steps = self.reading_after(place, limit)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                page: Page = end.value
                return page

    def reading_after(self, place: Place, limit: int) -> Generator[None, None, Page]:
        """Do what :meth:`read_after` does in small steps; the file is read in the first one."""
        file = self._messages.refresh()
        here = replace(place, file=file)
        # The row at the place itself comes along: it proves that the place is what it was.
        found = self._messages.query(
            f"{_SELECT} WHERE rowid >= ? ORDER BY rowid LIMIT ?", place.rowid, limit + 1
        )
        rows: list[Message | Unreadable] = []
        for first in range(0, len(found), _STEP_ROWS):
            yield
            rows += map(_parse, found[first : first + _STEP_ROWS])
        rescan_from = 0 if place.file not in {"", file} else self._rescan_from(place, rows[:1])
        if rescan_from is not None:
            return Page((), here, rescan_from)
        return _page([row for row in rows if row.rowid != place.rowid][:limit], here)

    def end(self) -> Place:
        """Return the place after the newest row."""
        file = self._messages.refresh()
        return _page(self._select("ORDER BY rowid DESC LIMIT ?", 1), Place(file=file)).end

    def pages(self) -> Iterator[Sequence[Message | Unreadable]]:
        """Yield everything in order of arrival, each page by a short read of its own."""
        self._messages.refresh()
        rowid = 0
        while rows := self._select("WHERE rowid > ? ORDER BY rowid LIMIT ?", rowid, _PAGE_ROWS):
            yield rows
            rowid = rows[-1].rowid

    def find(self, ids: Sequence[tuple[str, str]]) -> list[Message | Unreadable]:
        """Return the messages of these chats and keys, as far as they are still there under their own id."""
        self._messages.refresh()
        return [
            row
            for chat_jid, key in ids
            for row in self._select("WHERE id = ? AND chat_jid = ?", key, chat_jid)
        ]

    def known(self) -> Known:
        """Return the LID map and the bridge's own account; the same object as long as nothing changed.

        Raises `MapUnavailableError` for whatever keeps the map from being read.
        """
        try:
            self._map.refresh()
            version = (self._map.openings, self._map.query("PRAGMA data_version")[0][0])
            if version != self._map_version:
                known = self._read_known()
                # Its file holds more than the map: it changes with each message.
                self._known = self._known if known == self._known else known
                self._map_version = version
        except BridgeError as error:
            raise MapUnavailableError(f"the bridge's LID map is unavailable: {error}") from error
        return self._known

    def close(self) -> None:
        """Close both files."""
        self._messages.close()
        self._map.close()

    def _rescan_from(self, place: Place, found: Sequence[Message | Unreadable]) -> int | None:
        """Return from where to read again, None if the place is what it was.

        `found` is the first row at or after it.
        """
        if not place.key:  # there was none to compare with
            is_beyond = not found and place.rowid > 0 and self.end().rowid < place.rowid
            return 0 if is_beyond else None
        if found and found[0].rowid == place.rowid:
            return None if (found[0].key, found[0].chat_jid) == (place.key, place.chat_jid) else 0
        message_id = "" if place.key.startswith(_NO_ID) else place.key
        moved = self._select(
            "WHERE id = ? AND chat_jid = ? AND rowid > ?", message_id, place.chat_jid, place.rowid
        )
        return max(0, place.rowid - LOOK_BACK_ROWS) if moved else 0

    def _select(self, rest: str, *parameters: int | str) -> list[Message | Unreadable]:
        return [_parse(row) for row in self._messages.query(f"{_SELECT} {rest}", *parameters)]

    def _read_known(self) -> Known:
        """Read the whole map; rows are cut to user parts, as some bridges store full addresses.

        What cannot be anybody's identity is left out.
        """
        pairs = self._map.query("SELECT lid, pn FROM whatsmeow_lid_map")
        accounts = self._map.query("SELECT jid, lid FROM whatsmeow_device")
        own = {parse_jid(str(value)).user for account in accounts for value in account if value}
        users = {parse_jid(_text(lid)).user: parse_jid(_text(phone)).user for lid, phone in pairs}
        return Known.from_rows(
            {lid: phone for lid, phone in users.items() if _IDENTITY.fullmatch(lid)}, frozenset(own - {""})
        )


class _ReadOnlyFile:
    """One SQLite file, its connection, and the tables that must be in it."""

    def __init__(self, path: Path, tables: dict[str, tuple[str, ...]]) -> None:
        self._path = path
        self._log = path.with_name(f"{path.name}-wal")
        self._tables = tables
        self._connection: sqlite3.Connection | None = None
        self._opened = ""
        self.openings = 0
        """How often the file was opened: what a connection counts begins anew with it."""
        # Closed with the connection and not before: closing a file ends all locks of this process on it.
        self._header: FileIO | None = None
        self._resting: tuple[int, int] | None = None
        """The file's time and size while it is read as immutable; None while it is read under its locks."""

    def refresh(self) -> str:
        """Make sure that the connection is to the file that the path names now; return which."""
        try:
            status = os.stat(self._path)  # noqa: PTH116 -- ten times a second, without a Path in between
        except OSError as error:
            self.close()
            raise BridgeMissingError(
                f"no bridge database at {self._path} ({error.strerror});"
                " set WHATSAPP_DB_PATH or --bridge to messages.db, beside which whatsapp.db lies"
            ) from error
        current = f"{status.st_dev}:{status.st_ino}"
        if self._connection is None or current != self._opened or self._is_outdated():
            self.close()
            self._open(current)
        return current

    def query(self, statement: str, *parameters: int | str) -> list[Any]:
        """Run one statement to its end and return all rows."""
        if self._connection is None:
            raise BridgeError(f"{self._path} is not open")
        until_seconds = time.monotonic() + BUSY_TIMEOUT_SECONDS
        while True:
            try:
                with closing(self._connection.execute(statement, parameters)) as cursor:
                    found = cursor.fetchall()
            except sqlite3.Error as error:
                if self._connection.text_factory is str and _NO_UTF8 in str(error):
                    # Bytes that are no UTF-8 spoil their own message only, not the whole page.
                    self._connection.text_factory = _decoded
                    continue
                if not _is_locked(error) or time.monotonic() > until_seconds:
                    raise _explained(error, self._path) from error
            else:
                self._connection.text_factory = str  # In which it takes half of the time.
                if not self._is_outdated():
                    return found
                self.close()
                raise BridgeBusyError(
                    f"{self._path} was opened by its writer meanwhile; reading is tried again"
                )
            time.sleep(_RETRY_SECONDS)

    def close(self) -> None:
        """Close the connection, if there is one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
        header, self._header = self._header, None
        if header is not None:
            header.close()

    def _open(self, identity: str) -> None:
        if not os.access(self._path, os.R_OK):
            raise BridgeMissingError(f"{self._path} may not be read by this user; grant read access to it")
        try:
            self._header = FileIO(self._path)
            self._resting = self._state_at_rest()
            options = "mode=ro" if self._resting is None else "mode=ro&immutable=1"
            connection = sqlite3.connect(
                f"file:{quote(str(self._path.absolute()))}?{options}",
                uri=True,
                timeout=0,
                isolation_level=None,
            )
        except OSError as error:
            raise BridgeError(
                f"{self._path} cannot be read ({error.strerror}); reading is tried again"
            ) from error
        except sqlite3.Error as error:
            raise _explained(error, self._path) from error
        self._connection, self._opened = connection, identity
        self.openings += 1
        try:
            self._check_tables()
        except BridgeError:
            self.close()
            raise

    def _state_at_rest(self) -> tuple[int, int] | None:
        """Return time and size of a file for a write-ahead log that has none, so nobody writes; else None."""
        if self._header is None or os.pread(self._header.fileno(), 2, _VERSIONS_AT) != _WRITE_AHEAD:
            return None
        status = os.fstat(self._header.fileno())
        return None if self._log.exists() else (status.st_mtime_ns, status.st_size)

    def _is_outdated(self) -> bool:
        """Tell whether a file that is read as immutable has a writer now, or had one since."""
        return self._resting is not None and self._resting != self._state_at_rest()

    def _check_tables(self) -> None:
        for table, columns in self._tables.items():
            present = {row[1] for row in self.query(f"PRAGMA table_info({table})")}
            if not present:
                raise BridgeSchemaError(
                    f"{self._path} has no table {table}; is it the bridge's database, and a recent one?"
                )
            missing = ", ".join(column for column in columns if column not in present)
            if missing:
                raise BridgeSchemaError(
                    f"table {table} of {self._path} lacks the column {missing}; the bridge's schema changed"
                )


def _decoded(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _is_locked(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE_MASK in _LOCKED


def _explained(error: sqlite3.Error, path: Path) -> BridgeError:
    """Put SQLite's error into a sentence of the right class."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & _PRIMARY_CODE_MASK
    if _is_locked(error):
        return BridgeBusyError(
            f"{path} was locked for more than {BUSY_TIMEOUT_SECONDS:.0f} s; reading is tried again"
        )
    if getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_READONLY_ROLLBACK:
        return BridgeError(
            f"beside {path} lies a transaction that its writer did not finish;"
            " it is read again as soon as the bridge runs and has undone it"
        )
    if code in _DAMAGED:
        return BridgeFormatError(
            f"{path} is no SQLite database or is damaged ({error}); check what the bridge writes"
        )
    if code == sqlite3.SQLITE_ERROR:
        return BridgeSchemaError(f"{path} cannot be queried ({error}); the bridge's schema changed")
    return BridgeError(f"{path} cannot be read ({error}); reading is tried again")


def _page(rows: Sequence[Message | Unreadable], here: Place) -> Page:
    if not rows:
        return Page((), here)
    last = rows[-1]
    return Page(rows, replace(here, rowid=last.rowid, key=last.key, chat_jid=last.chat_jid))


def _parse(row: tuple[int, object, object, object, object, object, object]) -> Message | Unreadable:
    """Turn a row into a message, or say why it is none."""
    rowid, raw_id, raw_chat, raw_sender, raw_content, raw_time, is_from_me = row
    if (
        type(raw_id) is type(raw_chat) is type(raw_sender) is type(raw_content) is str
        and 0 < len(raw_id) <= _MAX_ID_CHARACTERS
        and len(raw_chat) <= _MAX_ID_CHARACTERS
        and _is_plain(raw_id, raw_chat, raw_sender, raw_content)
    ):
        with suppress(ValueError):  # Said below, with everything else that is wrong with the row.
            instant = _instant(raw_time)
            return Message(rowid, raw_id, raw_chat, raw_sender, raw_content, instant, bool(is_from_me))
    message_id, chat, sender, content = map(_text, (raw_id, raw_chat, raw_sender, raw_content))
    fault = "its chat has no usable address" if len(chat) > _MAX_ID_CHARACTERS else None
    fault = fault or next(
        (fault for value in (message_id, chat, sender, content) if (fault := _fault(value))), None
    )
    sent_at: datetime | None = None
    try:
        sent_at = _instant(raw_time)
    except ValueError as error:
        fault = fault or str(error)
    if message_id:
        key = _key(message_id)
    else:  # sent again, it may come with another offset and another spelling of its sender
        moment = raw_time if sent_at is None else sent_at.astimezone(UTC).isoformat()
        key = f"{_NO_ID}{digest(f'{moment}|{content}')}"
    if fault is not None or sent_at is None:
        chat = _escaped(chat)[:_MAX_ID_CHARACTERS]
        return Unreadable(
            rowid, _escaped(key), chat, digest(content), fault or "", _escaped(content), sent_at
        )
    return Message(rowid, key, chat, sender, content, sent_at, bool(is_from_me))


def _is_plain(*texts: str) -> bool:
    """Tell whether PostgreSQL can store these texts, as it can nearly all; False says nothing yet."""
    joined = "".join(texts)
    return joined.isascii() and "\0" not in joined


def _key(message_id: str) -> str:
    """Return the id, or its digest if it is too long for an index of PostgreSQL."""
    return message_id if len(message_id) <= _MAX_ID_CHARACTERS else f"long-id:{digest(message_id)}"


def _text(value: object) -> str:
    """Return a column's value as text: the columns are declared TEXT, which SQLite takes as advice only."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    return "" if value is None else str(value)


def _fault(text: str) -> str | None:
    """Say why PostgreSQL cannot store `text`, or None when it can."""
    if "\0" in text:
        return "holds a NUL byte, which PostgreSQL cannot store"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "holds bytes that are not UTF-8"
    return None


def _escaped(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")


def _instant(value: object) -> datetime:
    """Read the bridge's text time; ValueError when it is none or has no offset."""
    if not isinstance(value, str):
        raise ValueError(f"its timestamp {value!r} is not text")  # noqa: TRY004 -- a value, not a caller, is wrong
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        go_time = _GO_TIME.fullmatch(value)
        if go_time is None:
            raise ValueError(f"its timestamp {_escaped(value)!r} is no time") from None
        try:
            instant = datetime.fromisoformat(go_time[1].replace(" ", "T", 1).replace(" ", ""))
        except ValueError:
            raise ValueError(f"its timestamp {_escaped(value)!r} is no time") from None
    if instant.tzinfo is None:
        raise ValueError(f"its timestamp {value!r} has no offset, so it names no instant")
    if not _FIRST_YEAR <= instant.year <= _LAST_YEAR:
        raise ValueError(f"its timestamp {value!r} is outside the years {_FIRST_YEAR} to {_LAST_YEAR}")
    return instant
