"""Commands that do not outlive the process that starts them.

The rule: whoever started it is gone, by whatever way, and so is the command: the kernel sends it a signal. A
launcher of a few lines asks for that signal and then *becomes* the command, so that pid, descriptors and exit
code are the command's own.

Two traps, both closed here. The owner may die before the kernel is asked: the launcher looks at its parent
afterwards. And the signal is tied to the *thread* that started the child, so only the main thread may start
one.

Rejected: ``preexec_fn``, unsafe beside threads; a guardian process, which must be guarded in turn. Linux
only: elsewhere the command runs unbound, and ends where its owner ends it in order.

Source: prctl(2), PR_SET_PDEATHSIG: kept over execve, cleared by a change of user.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import signal
    from collections.abc import Sequence

_LAUNCHER: Final = """\
import ctypes, os, sys
signal, owner, user, group, *command = sys.argv[1:]
if user:
    os.setgroups([])
    os.setgid(int(group))
    os.setuid(int(user))
if sys.platform == "linux":  # after the change of user, which clears the signal
    PR_SET_PDEATHSIG = 1
    if ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal), 0, 0, 0) != 0:
        sys.exit("FATAL: the kernel refuses a parent-death signal")
    if os.getppid() != int(owner):
        sys.exit("FATAL: the owner of this process is gone already")
os.execv(command[0], command)
"""


def owned(
    command: Sequence[str], *, death_signal: signal.Signals, user_and_group: tuple[int, int] | None = None
) -> list[str]:
    """Return the command line that runs ``command`` until this process ends, then sends ``death_signal``.

    ``command[0]`` is a path. ``user_and_group`` are ids to run it as; only root may change them.

    Raises ``RuntimeError`` outside the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "an owned process ends with the thread that starts it: start it from the main thread"
        )
    user, group = ("", "") if user_and_group is None else map(str, user_and_group)
    arguments = (str(int(death_signal)), str(os.getpid()), user, group)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, *arguments, *command]
