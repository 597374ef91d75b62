"""Watch: file events as hints that something may have changed.

The rule: **an event is a hint, content is the truth.** A handler only notes the path and wakes the main loop;
what changed is decided by hashing, and a periodic scan finds what events missed. So a lost event costs a scan
interval, never a stale service, and when there are no events at all (``polling``) everything still works,
later.

Package ``watchdog`` reports opens and reads unless told otherwise, so hashing the tree would feed the
watcher: only the kinds of events listed here are asked for. A queue overflow is only logged by it; the log is
where it is counted from.

Rejected: watchdog's pattern handlers and its debouncer (they changed their meaning between releases; settling
is decided by the pipeline, which knows what else is under way).
"""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass

from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from supervisor.manifest import EXCLUDED_DIRECTORIES, Tree

_KINDS: list[type[FileSystemEvent]] = [
    FileModifiedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileClosedEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
]
_FINISHED = (FileClosedEvent, FileMovedEvent, FileDeletedEvent)


@dataclass(frozen=True, slots=True)
class Hint:
    """Something happened to a path.

    Attributes:
        path: absolute; of a source, or of a directory or link that may hold some.
        finished: whoever changed it is done with it: it was closed, moved or deleted.
    """

    path: str
    finished: bool


class Watcher:
    """Turns file events below the roots into hints.

    Args:
        tree: where to watch.
        wake: called from a thread of the observer after a hint was noted; must only wake the main loop.
    """

    def __init__(self, tree: Tree, wake: Callable[[], None]) -> None:
        self._tree = tree
        self._wake = wake
        self._hints: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self._observer = Observer()
        self._overflows = _OverflowCounter(self._overflowed)
        self.problem: str | None = None
        """Why there are no events, or None."""

    @property
    def mode(self) -> str:
        """``events`` while file events arrive, else ``polling``."""
        if self.problem is not None:
            return "polling"
        alive = self._observer.is_alive() and all(emitter.is_alive() for emitter in self._observer.emitters)
        return "events" if alive else "polling"

    @property
    def directories_total(self) -> int:
        """How many directories the tree has now."""
        return sum(1 for _ in self._tree.directories())

    @property
    def overflows_total(self) -> int:
        """How often the kernel's queue overflowed."""
        return self._overflows.count

    def start(self) -> None:
        """Start to watch. A system that has no watches left is a :attr:`problem`, not an error."""
        logging.getLogger("watchdog").addHandler(self._overflows)
        handler = _Handler(self._note)
        try:
            for root in self._tree.roots:
                self._observer.schedule(handler, root, recursive=True, event_filter=_KINDS)
            self._observer.start()
        except OSError as error:
            self.problem = f"no file events: {error.strerror or error}; changes are found by scanning"

    def take(self) -> list[Hint]:
        """Return the hints since the last call."""
        hints = []
        while True:
            try:
                hints.append(self._hints.get_nowait())
            except queue.Empty:
                return hints

    def close(self) -> None:
        """Stop to watch."""
        logging.getLogger("watchdog").removeHandler(self._overflows)
        if self._observer.is_alive():
            self._observer.stop()
            self._observer.join()

    def _note(self, hint: Hint) -> None:
        self._hints.put(hint)
        self._wake()

    def _overflowed(self) -> None:
        self._note(Hint(self._tree.base, finished=False))


class _Handler(FileSystemEventHandler):
    def __init__(self, note: Callable[[Hint], None]) -> None:
        self._note = note

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note the paths of an event that can concern a source."""
        for path in {os.fsdecode(event.src_path), os.fsdecode(event.dest_path or "")}:
            if path and _concerns_sources(path, directory=event.is_directory):
                self._note(Hint(path, isinstance(event, _FINISHED)))


class _OverflowCounter(logging.Handler):
    """Counts what watchdog says about its queue, the only place where it says it."""

    def __init__(self, overflowed: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self._overflowed = overflowed

    def emit(self, record: logging.LogRecord) -> None:
        """Note an overflow."""
        if "queue overflowed" in record.getMessage():
            self.count += 1
            self._overflowed()


def _concerns_sources(path: str, *, directory: bool) -> bool:
    if EXCLUDED_DIRECTORIES & set(path.split(os.sep)):
        return False
    return directory or path.endswith(".py") or os.path.islink(path)
