"""Canary: a file that is written so that its event has to come back; if it does not, the watcher is blind.

The rule: **only time in which the loop turned counts.** A supervisor that was stopped, or a machine that
slept, has kept its watcher from answering, too; each turn adds what has passed since the last one, but a
second at most.

The file is opened for writing and closed, no byte of it is written: that is an event also on a full disk.
A canary that was not heard is followed by one of the new watcher at once, later ones ever more rarely: where
events never come back, starting the watcher again each time helps nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

INTERVAL_SECONDS = 10.0
"""How often the watcher has to prove itself."""

BOUND_SECONDS = 5.0
"""How long an event may be on its way."""

_RARELY_AFTER_MISSES = 2
_LONGEST_TURN_SECONDS = 1.0
_LONGEST_INTERVAL_SECONDS = 300.0


class Canary:
    """Writes, and waits to be heard of.

    Args:
        directory: where, absolute; it belongs to us alone and is to be watched.

    Attributes:
        directory: the same.
        path: of the file.
        problem: why it cannot be written, or None.
        misses: how many in a row were not heard.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)
        self.path = str(directory / "canary")
        self.problem: str | None = None
        self.misses = 0
        self._due_at = 0.0
        self._turned_at = 0.0
        self._waited_seconds: float | None = None

    def prepare(self) -> None:
        """Make the directory if it is not there; before it is watched."""
        try:
            os.mkdir(self.directory, 0o700)
        except FileExistsError:
            return
        except OSError as error:
            self.problem = error.strerror or str(error)

    def hurry(self) -> None:
        """Have it written at the next turn, because the watcher is new or in doubt."""
        self._waited_seconds = None
        if self.misses < _RARELY_AFTER_MISSES:
            self._due_at = 0.0

    def heard(self) -> None:
        """Its event has come back."""
        self._waited_seconds = None
        self.misses = 0

    def turn(self, now: float) -> bool:
        """Write it if it is due.

        Args:
            now: monotonic time.

        Returns:
            Whether the last one was not heard within :data:`BOUND_SECONDS`.
        """
        passed, self._turned_at = min(now - self._turned_at, _LONGEST_TURN_SECONDS), now
        if self._waited_seconds is not None:
            self._waited_seconds += passed
            if self._waited_seconds <= BOUND_SECONDS:
                return False
            self._waited_seconds = None
            self.misses += 1
            pause = 0.0 if self.misses < _RARELY_AFTER_MISSES else INTERVAL_SECONDS * 2**self.misses
            self._due_at = now + min(pause, _LONGEST_INTERVAL_SECONDS)
            return True
        if now >= self._due_at:
            self._due_at = now + INTERVAL_SECONDS
            self._write()
        return False

    def _write(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            os.close(os.open(self.path, flags, 0o600))
        except OSError as error:
            self.problem = error.strerror or str(error)
        else:
            self.problem = None
            self._waited_seconds = 0.0
