"""Remembered: what the next supervisor has to know when this one is killed or the machine goes down.

The file ``state.json`` of the state directory. The rules: it is **replaced whole or not at all** (temporary
file, fsync, rename, fsync of the directory); it carries a checksum, so a file that is torn, mixed or altered
is told from a good one; what cannot be trusted is set aside, reported in a sentence, and counts as nothing
remembered, for the service has to start all the same; and nothing is saved that could not be loaded.

Rejected: keeping this in the history's database. SQLite notices a damaged page, not a damaged value, and a
history that is locked or corrupt must not cost the last known good.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Struct, field

from supervisor.aside import set_aside

VERSION = 1
KNOWN_GOOD_LIMIT = 3

_Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
_Positive = Annotated[int, msgspec.Meta(ge=1)]


class Quarantined(Struct, frozen=True):
    """Why a tree is not started again.

    Attributes:
        reason: one word, of :data:`supervisor.events.Reason`; None if an operator put it there.
        detail: for people.
        at: ISO time in UTC.
    """

    reason: str | None
    detail: str
    at: str


class RecordedProcess(Struct, frozen=True):
    """A child as it can be found again, and told from another process that got its pid.

    Attributes:
        generation: its number.
        pid: its process id, and that of its process group.
        start_ticks: when it began, in clock ticks since boot (field 22 of ``/proc/PID/stat``).
        boot_id: of the boot it ran in (``/proc/sys/kernel/random/boot_id``).
    """

    generation: _Positive
    pid: _Positive
    start_ticks: Annotated[int, msgspec.Meta(ge=0)]
    boot_id: str


class Remembered(Struct, frozen=True):
    """What outlives a supervisor.

    Attributes:
        known_good: digests of trees that survived probation, newest first, three at most.
        quarantine: tree digest to why it is not started again.
        next_generation: number of the next generation.
        processes: children that may still be there.
    """

    known_good: Annotated[tuple[_Digest, ...], msgspec.Meta(max_length=KNOWN_GOOD_LIMIT)] = ()
    quarantine: Mapping[_Digest, Quarantined] = field(default_factory=dict)
    next_generation: _Positive = 1
    processes: tuple[RecordedProcess, ...] = ()


def load(path: Path) -> tuple[Remembered, str | None]:
    """Return what was saved, and a sentence if there was a file that cannot be trusted; never raises.

    A missing file is the first start. One that cannot be trusted is set aside beside ``path``.
    """
    try:
        return _decode(path.read_bytes()), None
    except FileNotFoundError:
        return Remembered(), None
    except OSError as error:
        why = f"cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, _UnusableError) else "is torn or damaged"
    try:
        kept = f"it was set aside as {set_aside(path).name}"
    except OSError as error:
        kept = f"it cannot be set aside ({error.strerror})"
    return Remembered(), f"{path} {why}; {kept}, and last good code and quarantine are forgotten"


def save(path: Path, remembered: Remembered) -> None:
    """Replace the file; when this returns, it is on the disk.

    Args:
        path: in a directory that one process at a time saves to.
        remembered: what the next supervisor has to know.

    Raises:
        OSError: it cannot be written, and the former file is as it was; names ``path``.
        ValueError: ``remembered`` breaks its own rules, and the former file is as it was.
    """
    content = _encode(remembered)
    _decode(content)
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # A cleaner may have taken it away.
        # What a killed run left, or a link that somebody put there: removed, never followed.
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:  # noqa: PTH123 -- takes over the descriptor
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # A failed write or fsync does not name its file.
        raise OSError(error.errno, error.strerror, str(path)) from error


class _UnusableError(ValueError):
    """The content is no :class:`Remembered`; the message says what it is."""


def _encode(remembered: Remembered) -> bytes:
    body = msgspec.to_builtins(remembered)
    envelope = {"version": VERSION, "sha256": _checksum(body), "body": body}
    return json.dumps(envelope, indent=1).encode("ascii")


def _decode(content: bytes) -> Remembered:
    """Return what was encoded.

    Raises:
        ValueError, RecursionError: it is nothing that was encoded here.
    """
    envelope = json.loads(content.decode("ascii"))
    if not isinstance(envelope, dict):
        raise _UnusableError("is torn or damaged")
    if envelope.get("version") != VERSION:
        raise _UnusableError(f"is of version {envelope.get('version')!r}, this supervisor knows {VERSION}")
    body = envelope.get("body")
    if envelope.get("sha256") != _checksum(body):
        raise _UnusableError("is torn or damaged")
    try:
        remembered = msgspec.convert(body, Remembered, strict=True)
    except msgspec.ValidationError as error:
        raise _UnusableError(f"does not hold what it should: {error}") from error
    if _checksum(msgspec.to_builtins(remembered)) != envelope["sha256"]:
        raise _UnusableError("holds more or less than this version writes")
    return remembered


def _checksum(body: Any) -> str:  # noqa: ANN401 -- whatever JSON holds
    """Return the sha256 of the values, however they are laid out in the file."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode("ascii")).hexdigest()


def _sync_directory(folder: Path) -> None:
    """Bring the rename to the disk, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
