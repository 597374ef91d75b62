"""Forerunner: the process of the first generation, started before it is known what it will run.

The first start is a cold one: an interpreter has to come up, a few hundredths of a second, and so has the
supervisor's own program. Here they do so side by side. The rules:

- **Any doubt is a process of its own** (:func:`supervisor.launch.launch`): :meth:`Forerunner.take` gives a
  process or None. Another environment, another directory, a variable that has no room, one that has ended:
  None.
- It is the program that every child is, and has loaded what every child has before its first message:
  nothing of the tree, no library of the application's.
- What differs from child to child comes with that message, as it does for a child that is forked from the
  zygote: number and tree in the room that its environment has for them, stdout and stderr as descriptors.
- It is for the first start alone. Who does not need it ends it; without a supervisor it ends by itself.

Rejected: to begin with the application's imports, too, before its sources are judged: of code that does not
compile nothing shall run, and at a start all of it would have to be compiled twice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping

from supervisor.child import frames
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.zygote import execute, fits, send_first

_MOST_SECONDS = 10.0
"""It is ended when it is older: what it has loaded may no longer be what is on disk."""

possible = sys.platform == "linux"
"""Elsewhere the environment of a running process cannot be changed for others to see."""


class Forerunner:
    """A child that waits for its first message.

    Args:
        environment: of a child; what differs from child to child need not be right.
        directory: its working directory.

    Raises:
        OSError: no process could be started.
    """

    def __init__(self, environment: Mapping[str, str], directory: str) -> None:
        self._environment = _common(environment)
        self._directory = directory
        self._started_at = time.monotonic()
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channel.setblocking(False)
        with theirs:
            whole = {**self._environment, **PLACEHOLDERS}
            self.pid: int | None = execute(theirs.fileno(), whole, directory, None, None)
            """Its process id, None as soon as it has become something or is gone."""

    def look(self) -> None:
        """End it if it has waited for too long; for now and then."""
        if time.monotonic() - self._started_at > _MOST_SECONDS:
            self.close()

    def take(
        self,
        environment: Mapping[str, str],
        directory: str,
        outputs: tuple[int, int],
        first: frames.Frame,
    ) -> tuple[int, socket.socket] | None:
        """Return its pid and our end of its channel if it becomes what is asked for; None if it is gone.

        Args:
            environment: the child's whole environment.
            directory: its working directory.
            outputs: its stdout and stderr.
            first: its first message.
        """
        pid = self.pid
        if (
            pid is not None
            and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
            and _common(environment) == self._environment
            and directory == self._directory
            and fits(environment)
            and send_first(self._channel, frames.encode(first), outputs)
        ):
            self.pid = None
            return pid, self._channel
        self.close()
        return None

    def close(self) -> None:
        """End it if it still waits; nothing has begun that could want an end."""
        pid, self.pid = self.pid, None
        if pid is not None:
            self._channel.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _common(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in PLACEHOLDERS}
