"""Lock: one owner per directory, released by the kernel when the owner is gone.

The rule: a directory of ours is used by one supervisor at a time. The lock is on an open file (flock(2)), so
it outlives nobody; the file holds the owner's pid for the sentence that the second one gets.

Rejected: a pid file alone (a recycled pid looks like the owner), the bound socket (a dead owner leaves it).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from supervisor.errors import AlreadyRunningError, UsageError

_FILE = "lock"


def take(directory: Path, option: str) -> int:
    """Make a directory this process's own and return the descriptor that holds it; closing it lets go.

    Args:
        directory: created with mode 0700 where it does not exist.
        option: of the command line that names it, for the error.

    Raises:
        AlreadyRunningError: another process owns it.
        UsageError: it cannot be used.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot use {directory}: {error.strerror}; name another directory with {option}"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunningError(
            f"a supervisor with pid {owner} already owns {directory}; use it, or name another {option}"
        ) from None
    with contextlib.suppress(OSError):  # A full disk: the lock holds, only the pid is not told.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
    return descriptor
