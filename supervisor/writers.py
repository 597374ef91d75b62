"""Writers: whether somebody has a file open for writing.

The rule: asking changes nothing and blocks nobody for longer than two system calls take. The kernel grants a
read lease only on a file that nobody has open for writing, so a lease that is granted and given back at once
is the answer, whoever the writer is and whatever he writes with. Somebody who opens the file in between waits
for us to give it back; the signal that tells us so is one that is ignored.

Rejected: looking for the file in ``/proc/*/fd`` (reads all of it for each question, and may not look into
other users' processes), waiting for the event of its closing (``tar`` sets the times of a file after it has
closed it, and without events there is none).

Source: fcntl(2), "Leases".
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal

_SETLEASE: int | None = getattr(fcntl, "F_SETLEASE", None)
_SETSIG: int | None = getattr(fcntl, "F_SETSIG", None)


def is_written(path: str) -> bool | None:
    """Whether a process has a regular file open for writing.

    None where that cannot be known: the file is not there or not ours, its file system has no leases, or the
    platform has none.
    """
    if _SETLEASE is None or _SETSIG is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.fcntl(descriptor, _SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, _SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, _SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    finally:
        os.close(descriptor)
    return False
