"""History: why it reloaded, restarted, rolled back, and who asked; the newest thousand of such records.

A SQLite database, ``history.db`` of the state directory, with the same records in memory. The rules: **asking
and adding never wait for the disk** (the records in memory answer, the :mod:`supervisor.scribe` writes); what
could not be written is written with the next record, so a full disk or a lock that somebody holds costs
nothing but time; a file that is damaged, foreign or of a newer version is set aside and a new one begun from
memory, and so is one that somebody took away; **every record is bounded**, whatever a child printed.

The database is in WAL mode, so that a person with the ``sqlite3`` shell may read while we write, with
``synchronous=NORMAL``: kill -9 loses nothing, a power cut at most the last records, neither damages it.
Source: https://www.sqlite.org/wal.html, https://www.sqlite.org/rescode.html.

Rejected: a file of JSON lines (to bound it is to rewrite it, and a torn last line has to be told from a
damaged file), one column a field (whoever adds a field migrates tables; ``json_extract`` asks as well).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import json
import os
import sqlite3
import threading
import uuid
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from supervisor.aside import set_aside
from supervisor.scribe import Scribe

LIMIT = 1_000
PATHS_LIMIT = 20
OUTPUT_LINES_LIMIT = 50
DUMP_LINES_LIMIT = 200
_LINE_CHARACTERS = 500
_DETAIL_CHARACTERS = 4_000

_VERSION = 1
_SCHEMA = f"""
BEGIN;
CREATE TABLE record (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, body TEXT NOT NULL);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_INSERT = "INSERT OR IGNORE INTO record (id, body) VALUES (?, ?)"
_PRUNE = (
    "DELETE FROM record WHERE number <= (SELECT number FROM record ORDER BY number DESC LIMIT 1 OFFSET ?)"
)
_NEWEST = "SELECT body FROM record ORDER BY number DESC LIMIT ?"

_BUSY_SECONDS = 2.0
"""Longest wait for a lock that somebody else holds; the next record tries again."""
_LOAD_SECONDS = 1.0
"""Longest wait for the records of earlier runs; a slower disk brings them later."""

_WRITE = "write the history"

# Errors of the machine or of a neighbour: the same file may be fine in a moment. All others are of the file.
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_READONLY,
    }
)


class Ending(Struct, frozen=True, kw_only=True):
    """How a child ended that nobody had asked to, or why it was killed.

    Attributes:
        pid: of the child.
        lived_seconds: from its start to its end.
        exit_status: None if a signal ended it.
        signal: name of that signal, for example ``SIGSEGV``.
        oom: whether the kernel killed it for want of memory; None where that is not to be known.
        stopped: it was found stopped (SIGSTOP).
        output: the last lines that it wrote to stderr, its traceback among them.
        dump: what its threads were doing; without an answer, what ``/proc`` says of it.
    """

    pid: int | None = None
    lived_seconds: float | None = None
    exit_status: int | None = None
    signal: str | None = None
    oom: bool | None = None
    stopped: bool = False
    output: tuple[str, ...] = ()
    dump: tuple[str, ...] = ()


class Record(Struct, frozen=True, kw_only=True):
    """One thing that happened to the running code.

    Attributes:
        id: of this record.
        at: when it was known, ISO time in UTC.
        kind: what happened.
        trigger: what it was done for.
        outcome: how it ended; of an ``operator`` record, the command.
        reason: one word why not as wanted, None if as wanted.
        detail: for people.
        generation: the one that it is about.
        previous_generation: the one that served before.
        tree: digest of what runs, or was to run.
        previous_tree: digest of what ran before.
        commit: where git knows it, that of ``tree``: where HEAD stood when it was last seen on disk.
        branch: the same.
        previous_commit: that of ``previous_tree``.
        paths: relative paths that changed, the first of them.
        paths_total: how many changed.
        stages: seconds spent in each stage.
        total_seconds: from the first sign to the outcome.
        uid: user who asked, None if nobody did.
        ending: of the child whose end this was about.
    """

    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    at: str = field(default_factory=lambda: dt.datetime.now(dt.UTC).isoformat("T", "milliseconds"))
    kind: Literal["reload", "restart", "rollback", "drain", "promotion", "operator"]
    trigger: str | None = None
    outcome: str | None = None
    reason: str | None = None
    detail: str | None = None
    generation: int | None = None
    previous_generation: int | None = None
    tree: str | None = None
    previous_tree: str | None = None
    commit: str | None = None
    branch: str | None = None
    previous_commit: str | None = None
    paths: tuple[str, ...] = ()
    paths_total: int = 0
    stages: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float | None = None
    uid: int | None = None
    ending: Ending | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the record as ``history --json`` shows it."""
        document: dict[str, Any] = _rounded(msgspec.to_builtins(self))
        return document


class History:
    """The newest records, in memory and in a database.

    Args:
        path: of the database; it and its directory are created where they do not exist.
        scribe: writes.
        limit: how many records are kept.
    """

    def __init__(self, path: Path, scribe: Scribe, limit: int = LIMIT) -> None:
        self._path = path
        self._scribe = scribe
        self._limit = limit
        self._lock = threading.Lock()
        self._records: deque[Record] = deque(maxlen=limit)
        """Oldest first; guarded by the lock, the rest below belongs to the scribe's thread."""
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        """Device and inode of the open file."""
        self._loaded = False
        """The records of earlier runs are in memory."""
        self._saved: frozenset[str] = frozenset()
        """Ids of the records in memory that are in the file."""
        scribe.submit(_WRITE, self._write)
        scribe.flush(_LOAD_SECONDS)

    def add(self, record: Record) -> None:
        """Keep a record, bounded; never waits, and never fails but in the scribe's count."""
        with self._lock:
            self._records.append(_bounded(record))
        self._scribe.submit(_WRITE, self._write)

    def last(self, count: int) -> list[Record]:
        """Return the newest records, the newest first; never waits."""
        with self._lock:
            return list(itertools.islice(reversed(self._records), max(count, 0)))

    def unwritten(self) -> tuple[Record, ...]:
        """Return the records that the file lacks; only after the scribe is closed."""
        return tuple(record for record in self._records if record.id not in self._saved)

    def close(self) -> None:
        """Have what is not yet written written, and the file closed; wait for it by closing the scribe."""
        self._scribe.submit(_WRITE, self._finish)

    # --- in the scribe's thread ---------------------------------------------------------------------------

    def _finish(self) -> None:
        try:
            self._write()
        finally:
            self._disconnect()

    def _write(self) -> None:
        """Write what the file lacks; one that cannot be used makes room for a new one.

        Raises:
            sqlite3.Error, OSError: it cannot be written now.
        """
        try:
            self._write_or_fail()
        except (sqlite3.Error, _UnusableError) as error:
            if not _is_of_the_file(error):
                raise
            self._disconnect()
            aside = set_aside(self._path, ("-wal", "-shm"))
            self._scribe.fail(
                "read the history",
                f"{self._path} cannot be used ({error}); it was set aside as {aside.name}, a new one begun",
            )
            self._write_or_fail()

    def _write_or_fail(self) -> None:
        if self._connection is None or self._is_gone():
            self._connect()
        with self._lock:
            records = tuple(self._records)
        lacking = [record for record in records if record.id not in self._saved]
        if lacking and self._connection is not None:
            with self._connection:  # One transaction.
                rows = [(record.id, json.dumps(record.as_json())) for record in lacking]
                self._connection.executemany(_INSERT, rows)
                self._connection.execute(_PRUNE, (self._limit,))
            self._saved = frozenset(record.id for record in records)

    def _connect(self) -> None:
        """Open the file, created and checked, and take in what it holds.

        Raises:
            sqlite3.Error, OSError: it cannot be opened.
            _UnusableError: it is none of ours.
        """
        self._disconnect()
        self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # SQLite would let others read it; its own files beside it get the mode of this one.
        os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level="IMMEDIATE")
        try:
            _prepare(connection)
            records = [_decode(body) for (body,) in connection.execute(_NEWEST, (self._limit,))]
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
            raise
        self._connection, self._identity = connection, _identity(self._path)
        self._saved = frozenset(record.id for record in records)
        if not self._loaded:
            self._loaded = True
            with self._lock:
                room = self._limit - len(self._records)
                self._records.extendleft(records[:room])

    def _disconnect(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):  # Of a damaged file.
                self._connection.close()
            self._connection = None

    def _is_gone(self) -> bool:
        """Whether somebody has taken the open file away: what is written to it is lost."""
        return _identity(self._path) != self._identity


class _UnusableError(Exception):
    """The file is none of ours; the message says what it is."""


def _prepare(connection: sqlite3.Connection) -> None:
    """Set an open database up, and make it ours if it is new.

    Raises:
        sqlite3.Error: it cannot be used.
        _UnusableError: it is damaged, or not ours.
    """
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version == 0 and not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(_SCHEMA)
    elif version != _VERSION:
        raise _UnusableError(f"it is of version {version}, this supervisor knows {_VERSION}")
    connection.execute("PRAGMA synchronous = NORMAL")
    (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise _UnusableError(verdict)


def _decode(body: str) -> Record:
    try:
        return msgspec.convert(json.loads(body), Record, strict=True)
    except (ValueError, TypeError, RecursionError, msgspec.ValidationError) as error:
        raise _UnusableError(f"it holds no record: {error}") from error


def _is_of_the_file(error: sqlite3.Error | _UnusableError) -> bool:
    if isinstance(error, sqlite3.ProgrammingError):
        return False  # Ours.
    code = getattr(error, "sqlite_errorcode", None)  # Python's own errors have none: text that is no UTF-8.
    return code is None or code & 0xFF not in _PASSING


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


# --- bounds -----------------------------------------------------------------------------------------------


def _bounded(record: Record) -> Record:
    ending = record.ending
    if ending is not None:
        ending = replace(
            ending,
            output=_lines(ending.output[-OUTPUT_LINES_LIMIT:]),
            dump=_lines(ending.dump[-DUMP_LINES_LIMIT:]),  # The main thread comes last.
        )
    detail = record.detail and _clipped(record.detail, _DETAIL_CHARACTERS)
    return replace(record, detail=detail, paths=record.paths[:PATHS_LIMIT], ending=ending)


def _lines(lines: Sequence[str]) -> tuple[str, ...]:
    return tuple(_clipped(line, _LINE_CHARACTERS) for line in lines)


def _clipped(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _rounded(value: Any) -> Any:  # noqa: ANN401 -- whatever JSON holds
    """Return the same with times in microseconds and nothing but lists and dicts."""
    match value:
        case float():
            return round(value, 6)
        case dict():
            return {key: _rounded(item) for key, item in value.items()}
        case list() | tuple():
            return [_rounded(item) for item in value]
    return value
