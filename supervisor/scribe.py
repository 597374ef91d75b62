"""Scribe: the one thread that writes to the state directory, so that a disk that stalls stalls nobody else.

The rules: the loop hands over a piece of work and goes on; work is done one piece at a time and in order, so
what must be on disk first is handed over first; **what fails is neither raised nor swallowed**: it is
counted, and a sentence about it is kept until the same work succeeds. When too much waits, new work is
refused, which counts as a failure, too.

The thread starts no process: a child's death signal would follow the thread and not the supervisor.

Rejected: ``concurrent.futures.ThreadPoolExecutor``. Its queue has no bound, an error stays in a future that
somebody has to look at, and the interpreter waits for its threads at exit without a limit: a disk that hangs
would keep a stopped supervisor alive.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from supervisor.threads import without_signals

WAITING_LIMIT = 10_000


class Scribe:
    """A thread with a bounded queue.

    Args:
        limit: pieces of work that may wait.
    """

    def __init__(self, limit: int = WAITING_LIMIT) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._busy = False
        self._closed = False
        self._errors_total = 0
        self._problems: dict[str, str] = {}
        # A daemon: the process may end while the disk hangs.
        self._thread = threading.Thread(target=self._run, name="scribe", daemon=True)
        with without_signals():
            self._thread.start()

    @property
    def errors_total(self) -> int:
        """How many pieces of work failed or were refused."""
        with self._changed:
            return self._errors_total

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong now, a sentence for each kind of work whose last try failed."""
        with self._changed:
            return tuple(self._problems.values())

    def submit(self, what: str, call: Callable[[], object]) -> None:
        """Have the thread do a piece of work after all that was handed over before; never waits.

        Args:
            what: names this kind of work and completes "cannot …", for example ``write the history``.
            call: may raise; it is called in the thread.
        """
        with self._changed:
            if self._closed or len(self._waiting) >= self._limit:
                why = "the supervisor stops" if self._closed else "too much waits for the disk"
                self.fail(what, f"cannot {what}: {why}")
                return
            self._waiting.append((what, call))
            self._changed.notify_all()

    def fail(self, what: str, sentence: str) -> None:
        """Count a failure and keep the sentence about it; from any thread."""
        with self._changed:
            self._errors_total += 1
            self._problems[what] = sentence

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until all that was handed over is done, and return whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting and not self._busy, timeout_seconds)

    def close(self, timeout_seconds: float) -> bool:
        """Take no more work, wait for what was handed over, and return whether it is done."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (work := self._next()) is not None:
            what, call = work
            try:
                call()
            except Exception as error:  # noqa: BLE001 -- whatever it is, the next piece of work is done
                self.fail(what, f"cannot {what}: {_why(error)}")
            else:
                with self._changed:
                    self._problems.pop(what, None)

    def _next(self) -> tuple[str, Callable[[], object]] | None:
        """Return what is to be done next, when there is something; None at the end."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if not self._waiting:
                return None
            self._busy = True
            return self._waiting.popleft()


def _why(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error) or type(error).__name__
