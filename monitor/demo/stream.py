"""Messages that keep coming: a thread that posts to the bridge at a steady rate, whatever else happens."""

from __future__ import annotations

import sqlite3
import threading
import time
from typing import TYPE_CHECKING

from monitor.demo.bridge import messages

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from monitor.demo.bridge import SyntheticBridge


class Stream:
    """Posts the stream of ``seed`` within a ``with`` block, ``rate`` a second, lost time made up for.

    Leaving the block waits for the last post and raises what went wrong while posting, for instance
    ``sqlite3.OperationalError: database is locked`` when a reader kept the file too long.
    """

    def __init__(self, bridge: SyntheticBridge, *, seed: int, rate: float, first_drop: int) -> None:
        self._bridge = bridge
        self._posts = messages(seed, first_drop=first_drop)
        self._interval_seconds = 1.0 / rate
        self._ended = threading.Event()
        self._failure: sqlite3.Error | None = None
        self._thread = threading.Thread(target=self._run, name="stream", daemon=True)
        self.posted_total = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Post nothing more; returns when the last post is written, raises if one could not be."""
        self._ended.set()
        self._thread.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def post(self, count: int) -> set[str]:
        """Post ``count`` messages at once, before the block is entered; return the drops that they name."""
        return {drop for _ in range(count) for drop in self._post()}

    def _run(self) -> None:
        due = time.monotonic()
        try:
            while not self._ended.wait(max(0.0, due - time.monotonic())):
                self._post()
                due += self._interval_seconds
        except sqlite3.Error as error:
            self._failure = error  # raised by stop(), in the thread that can act on it

    def _post(self) -> tuple[str, ...]:
        post = next(self._posts)
        self._bridge.post(
            chat_jid=post.chat_jid, sender=post.sender, content=post.content, media_type=post.media_type
        )
        self.posted_total += 1
        return post.drops
