"""Inotify: the kernel's file events, what it says about its watches, and which of its limits is in the way.

The rule: **what the kernel says is passed on, also what it says about itself.** A queue that overflowed is an
event like the others, a watch that is refused is an error with its number, and how many watches there are is
read from the kernel (proc_pid_fdinfo(5)), not from our own books.

The descriptor is closed in every child (``IN_CLOEXEC``). Nothing in the mask is caused by reading: opens,
reads and closes of what was only read are not asked for.

Three limits of a user, each with a remedy that names the setting and a value: watches
(``max_user_watches``), instances (``max_user_instances``) and the length of a queue (``max_queued_events``).
In a user namespace the first two are limited a second time below ``/proc/sys/user`` (namespaces(7),
user_namespaces(7)); the smaller one is what holds us.

Sources: inotify(7), https://docs.kernel.org/admin-guide/sysctl/user.html.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MODIFY = 0x00000002
ATTRIB = 0x00000004
CLOSE_WRITE = 0x00000008
MOVED_FROM = 0x00000040
MOVED_TO = 0x00000080
CREATE = 0x00000100
DELETE = 0x00000200
DELETE_SELF = 0x00000400
MOVE_SELF = 0x00000800
UNMOUNT = 0x00002000
OVERFLOW = 0x00004000
IGNORED = 0x00008000
IS_DIRECTORY = 0x40000000

NO_WATCH_LEFT = errno.ENOSPC
"""What inotify_add_watch(2) says at the limit of watches; it is not about disks."""

_ONLY_DIRECTORIES = 0x01000000
_NOT_UNLINKED = 0x04000000
_MASK = (
    MODIFY
    | ATTRIB
    | CLOSE_WRITE
    | MOVED_FROM
    | MOVED_TO
    | CREATE
    | DELETE
    | DELETE_SELF
    | MOVE_SELF
    | _ONLY_DIRECTORIES
    | _NOT_UNLINKED
)
_HEADER = struct.Struct("iIII")
_READ_BYTES = 256 * 1024

_SYSCTL = Path("/proc/sys")

_libc = ctypes.CDLL(None, use_errno=True)


class RawEvent(NamedTuple):
    """One ``struct inotify_event``.

    Attributes:
        watch: number of the watch, -1 for what concerns the queue.
        mask: what happened.
        name: of the entry of the watched directory, empty for the directory itself.
    """

    watch: int
    mask: int
    name: bytes


class Inotify:
    """One inotify instance. One thread reads, another one may add, remove, count, stop and close.

    Raises:
        OSError: there is none left (``EMFILE``, ``ENFILE``), no memory, or this is not Linux (``ENOSYS``).
    """

    def __init__(self) -> None:
        if sys.platform != "linux":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        descriptor = _libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if descriptor < 0:
            raise _error("inotify_init1")
        # File objects: whatever becomes of us, nobody closes a number that is somebody else's by now.
        self._file = open(descriptor, "rb", buffering=0)  # noqa: SIM115 -- closed by close()
        self._stop = open(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), "r+b", buffering=0)  # noqa: SIM115
        self._lock = threading.Lock()

    def add(self, directory: str) -> int:
        """Watch a directory and return the number of the watch; a directory has one, whatever its names.

        Raises:
            OSError: it is none, it is gone or not readable, or no watch is left (``ENOSPC``).
        """
        with self._lock:
            number: int = _libc.inotify_add_watch(self._descriptor(), os.fsencode(directory), _MASK)
            if number < 0:
                raise _error(directory)
        return number

    def remove(self, watch: int) -> None:
        """End a watch; one that has ended by itself is none."""
        with self._lock:
            _libc.inotify_rm_watch(self._descriptor(), watch)

    def read(self) -> list[RawEvent]:
        """Wait for events and return them; none after :meth:`stop`."""
        poll = select.poll()
        poll.register(self._file, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if self._stop.fileno() in ready:
            return []
        return list(_parse(os.read(self._file.fileno(), _READ_BYTES)))

    def count(self) -> int | None:
        """Return how many watches the kernel has for us, None where it does not tell."""
        with self._lock:
            try:
                facts = Path(f"/proc/self/fdinfo/{self._descriptor()}").read_bytes()
            except OSError:
                return None
        return facts.count(b"inotify wd:")

    def stop(self) -> None:
        """Have :meth:`read` return, now and from now on (called from any thread)."""
        with self._lock:
            if not self._stop.closed:
                os.eventfd_write(self._stop.fileno(), 1)

    def close(self) -> None:
        """Give everything back; every method but this one and :meth:`stop` raises OSError from now on."""
        with self._lock:
            self._file.close()
            self._stop.close()

    def _descriptor(self) -> int:
        if self._file.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._file.fileno()


def _parse(buffer: bytes) -> Iterator[RawEvent]:
    at = 0
    while at < len(buffer):
        watch, mask, _, length = _HEADER.unpack_from(buffer, at)
        at += _HEADER.size
        yield RawEvent(watch, mask, buffer[at : at + length].rstrip(b"\0"))
        at += length


def _error(about: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), about)


# --- limits -----------------------------------------------------------------------------------------------


def queue_remedy() -> str:
    """Return what the operator does about queues that overflow."""
    return _raise("fs/inotify/max_queued_events", _SYSCTL / "fs/inotify/max_queued_events", missing=0)


def watches_remedy(missing: int) -> str:
    """Return what the operator does about watches that are refused."""
    return _raise_user_limit("watches", missing)


def instances_remedy(error: OSError) -> str:
    """Return what the operator does about an instance that was refused."""
    if error.errno == errno.ENOSYS:
        return "rely on --scan-interval"
    if error.errno == errno.EMFILE and _descriptors_left():
        return _raise_user_limit("instances", missing=1)
    if error.errno == errno.EMFILE:
        return "raise the limit of open files (LimitNOFILE= in the unit, ulimit -n)"
    return "free some memory or file descriptors of the machine"


def _raise_user_limit(what: str, missing: int) -> str:
    machine, namespace = f"fs/inotify/max_user_{what}", f"user/max_inotify_{what}"
    limits = {name: limit for name in (machine, namespace) if (limit := _limit(_SYSCTL / name)) is not None}
    name = min(limits, key=lambda name: limits[name], default=machine)
    return _raise(name, _SYSCTL / name, missing)


def _raise(name: str, file: Path, missing: int) -> str:
    limit = _limit(file) or 0
    value = 1 << (2 * max(limit, 1) + 2 * missing - 1).bit_length()
    return f"raise the limit, which is {limit}: sysctl -w {name.replace('/', '.')}={value}"


def _limit(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _descriptors_left() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
