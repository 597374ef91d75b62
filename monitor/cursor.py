"""The cursor row: how far a bridge was read, and who may write.

The rule: **the row is the lock.** Every write begins by locking its source's row and finding its own epoch
in it. Taking over raises the epoch, so a former owner, however late it wakes up, finds no row and writes
nothing. Nobody can double or lose a drop, not the standby generation of a handover and not a monitor on
another host.

Taking over is allowed when the owner released the row, when the owner is a process of this host that is
dead, or when it has shown no sign of life for its lease. "Dead" is proven: same host, same boot, same pid
namespace, and no process with that pid and that start time (or a zombie). Where that cannot be proven, the
lease decides.

Rejected: session advisory locks (lost behind a transaction pooler), a lock file (one host only), leader
election by heartbeat alone (a handover would take as long as the heartbeat). Source: proc(5), fields 3 and
22 of `stat`.
"""

import os
import socket
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psycopg

from monitor.database import Database
from monitor.errors import CursorLostError, StoreUnavailableError
from monitor.messages import Place
from monitor.totals import Totals

_PROC = Path("/proc")
_STATE_FIELD = 0  # counted after the command's closing parenthesis
_START_FIELD = 19
_DEAD_STATES = frozenset({"Z", "X", "x"})


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that may own a cursor."""

    host: str
    """Host name, boot and pid namespace: where a pid means what it means here."""
    pid: int
    started: str
    generation: str = ""
    tree: str = ""
    """Digest of the source tree that the process runs (`WA_TREE`), empty when nobody told it."""

    @classmethod
    def of_this_process(cls) -> "Owner":
        """Describe the calling process."""
        pid = os.getpid()
        return cls(
            host=_this_host(),
            pid=pid,
            started=_start_time(pid) or "",
            generation=os.environ.get("WA_GENERATION", ""),
            tree=os.environ.get("WA_TREE", ""),
        )

    def is_dead(self) -> bool:
        """Tell whether this process is proven to be gone; False where nothing can be proven."""
        if not self.started or self.host != _this_host():
            return False
        return not _hidden(self.pid) and _start_time(self.pid) != self.started

    def is_same_process(self, other: "Owner") -> bool:
        """Tell whether both are one process; two readings of one process may differ in what it runs."""
        return (self.host, self.pid, self.started) == (other.host, other.pid, other.started)

    def __str__(self) -> str:
        """Show it to a person."""
        return f"pid {self.pid} on {self.host.partition('/')[0]}"


@dataclass(frozen=True, slots=True)
class Cursor:
    """The row as it was seen."""

    epoch: int
    owner: Owner
    released: bool
    expired: bool
    renewed_at: datetime
    place: Place
    since: datetime | None
    since_rowid: int | None
    """Rows after this one arrived after the first start with `--since now`: ours, whenever they were sent."""
    totals: Totals
    created_at: datetime

    def may_be_claimed(self) -> bool:
        """Tell whether its owner has finished, is dead, or has been silent for its lease."""
        return self.released or self.expired or self.owner.is_dead()


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to write: an epoch of a source's cursor, and who holds it."""

    source: str
    epoch: int
    owner: Owner
    lease_seconds: float

    @property
    def key(self) -> dict[str, object]:
        """The row and the epoch, as every guarded statement names them."""
        return {"source": self.source, "epoch": self.epoch}


def look(database: Database, source: str) -> Cursor | None:
    """Read the row without locking it; None if this source was never read."""
    rows = database.rows("look", {"source": source})
    if not rows:
        return None
    epoch, host, pid, started, released, expired, renewed_at, *rest = rows[0]
    *place, since, since_rowid, totals, created_at = rest
    return Cursor(
        epoch=epoch,
        owner=Owner(host, pid, started),
        released=released,
        expired=expired,
        renewed_at=renewed_at,
        place=Place(*place),
        since=since,
        since_rowid=since_rowid,
        totals=Totals.from_json(totals),
        created_at=created_at,
    )


def begin(
    database: Database,
    source: str,
    *,
    owner: Owner,
    lease_seconds: float,
    place: Place,
    since: datetime | None,
    since_rowid: int | None = None,
) -> bool:
    """Create the row for a source that has none, released, so that it is then claimed like any other.

    Of two first starts at once, one returns True.
    """
    beginning = {"since": since, "since_rowid": since_rowid}
    parameters = {**_owner(source, owner, lease_seconds), **place_parameters(place), **beginning}
    return database.run("begin", parameters) == 1


def claim(database: Database, source: str, seen: Cursor, owner: Owner, lease_seconds: float) -> Claim | None:
    """Take over from the owner that was `seen`; None after a sign of life since, or if the row is locked."""
    parameters = {**_owner(source, owner, lease_seconds), "epoch": seen.epoch, "renewed_at": seen.renewed_at}
    try:
        with database.transaction():
            database.rows("limit_lock_wait")
            rows = database.rows("claim", parameters)
    except StoreUnavailableError as error:
        if isinstance(error.__cause__, psycopg.errors.LockNotAvailable):
            return None
        raise
    return Claim(source, rows[0][0], owner, lease_seconds) if rows else None


def renew(database: Database, held: Claim) -> None:
    """Show a sign of life; raises `CursorLostError` when somebody else has taken over."""
    with database.patient_transaction():
        renewed = database.run("renew", held.key)
    if renewed == 0:
        raise lost(held)


def release(database: Database, held: Claim) -> None:
    """Say that this owner has finished; the next one takes over at its next look."""
    with database.patient_transaction():
        database.run("release", held.key)


def lost(held: Claim) -> CursorLostError:
    """Return the error for a claim that is no longer ours."""
    return CursorLostError(
        f"cursor {held.source!r} was taken over from epoch {held.epoch}; nothing was written,"
        " this process stands by"
    )


def place_parameters(place: Place) -> dict[str, object]:
    """Return a place as the statements name it."""
    return {"rowid": place.rowid, "key": place.key, "chat_jid": place.chat_jid, "file": place.file}


def _owner(source: str, owner: Owner, lease_seconds: float) -> dict[str, object]:
    return {
        "source": source,
        "host": owner.host,
        "pid": owner.pid,
        "started": owner.started,
        "generation": owner.generation,
        "tree": owner.tree,
        "lease": lease_seconds,
    }


def _this_host() -> str:
    """Return what makes a pid comparable: host, boot, pid namespace; the last two are empty without /proc."""
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()}/{boot}/{namespace}"


def _hidden(pid: int) -> bool:
    """Tell whether a process runs although /proc does not show it to this user (mount option hidepid)."""
    if (_PROC / str(pid)).exists():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _start_time(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it is gone or a zombie."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[_STATE_FIELD] in _DEAD_STATES else fields[_START_FIELD]
