"""Traces: whether a process whose program is over still holds something that another one could miss.

What is left after the last ``atexit`` handler is the end of the interpreter, a few milliseconds in which
nothing of the program runs, *unless* something is kept that runs or is let go by that end: a thread, a child,
a port, a lock, a file whose last bytes are still in a buffer, an object with a finalizer, a generator that
stands in a ``try``. The rule: **any doubt is a yes.** Only a process of which nothing of that kind is left
may be followed by the next one before it is gone.

Rejected: to end the process at this point (``os._exit``); then what is not known of here would be lost, and
not only late.

Source: proc(5), :meth:`object.__del__`, ``Py_FinalizeEx`` in CPython's ``pylifecycle.c``.
"""

from __future__ import annotations

import fcntl
import gc
import io
import os
import socket
import stat
import sys
from itertools import compress
from typing import Any

_MOST_OBJECTS = 50_000
"""Looking at more would take longer than what is gained."""


class _Witness:
    """An object that is as old as the program: who puts away from the collector what there is, hides it, too.

    (``gc.get_freeze_count`` counts one by one, some milliseconds.)
    """


_witness: _Witness | None = None

_STANDARD = frozenset({0, 1, 2})


def begin() -> None:
    """Note that the program begins; what is put away from the collector later is its own doing."""
    global _witness  # noqa: PLW0603 -- one process, one program
    _witness = _Witness()


def are_left(own: socket.socket) -> bool:
    """Whether the end of this process can still be noticed by others.

    Flushes stdout and stderr.

    Args:
        own: the channel, which is not the program's; a thread listens to it.
    """
    if sys.platform != "linux":
        return True
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        descriptors = {int(name) for name in os.listdir("/proc/self/fd")} - _STANDARD - {own.fileno()}
        threads = len(os.listdir("/proc/self/task")) - len(("this one", "the channel's"))
        return threads > 0 or _has_children() or _are_held(descriptors) or _run_at_the_end()
    except Exception:  # noqa: BLE001 -- objects of the program are asked, and a doubt is a yes
        return True


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _are_held(descriptors: set[int]) -> bool:
    """Whether a descriptor is of something that others share or wait for."""
    for descriptor in descriptors:
        try:
            facts = os.fstat(descriptor)
        except OSError:
            continue  # It was that of the listing.
        if stat.S_ISSOCK(facts.st_mode) and _is_a_letter_box(descriptor):
            continue
        if not stat.S_ISREG(facts.st_mode):
            return True
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        access = flags & os.O_ACCMODE
        # A log: each line is whole in the file once it is written. Others may be databases.
        if access != os.O_RDONLY and not (access == os.O_WRONLY and flags & os.O_APPEND):
            return True
        # Not /proc/locks: the kernel takes 10 ms to list all of them.
        with open(f"/proc/self/fdinfo/{descriptor}", "rb") as file:
            if b"\nlock:" in file.read():
                return True
    return False


def _is_a_letter_box(descriptor: int) -> bool:
    """Whether a socket only sends datagrams, as to the service manager: it has no name to be reached by."""
    with socket.socket(fileno=os.dup(descriptor)) as found:
        return found.family == socket.AF_UNIX and found.type == socket.SOCK_DGRAM and not found.getsockname()


def _run_at_the_end() -> bool:
    """Whether some object has code that runs, or bytes that are written, when it is let go."""
    objects = gc.get_objects()
    if len(objects) > _MOST_OBJECTS:
        return True
    # 35,000 of them after an ordinary start: the loops are the interpreter's own.
    kinds = set(map(type, objects))
    if _Witness not in kinds:
        return True
    ending = {kind for kind in kinds if hasattr(kind, "__del__")}
    files = {
        kind for kind in ending if issubclass(kind, io.IOBase)
    }  # Suspended generators are of the others.
    if ending - files - {socket.socket}:
        return True
    return any(map(_has_bytes, compress(objects, map(files.__contains__, map(type, objects)))))


def _has_bytes(file: Any) -> bool:  # noqa: ANN401 -- an io.IOBase
    """Whether a file object may hold bytes that it has not written."""
    flushed = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    if any(file is stream or file is getattr(stream, "buffer", None) for stream in flushed):
        return False
    return (
        not isinstance(file, io.RawIOBase | io.BytesIO | io.StringIO) and not file.closed and file.writable()
    )
