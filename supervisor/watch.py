"""Watch: file events as hints that something may have changed.

The rule: **an event is a hint, content is the truth.** A handler only notes the path and wakes the main loop;
what changed is decided by hashing, and a periodic scan finds what events missed. So a lost event costs a scan
interval, never a stale service, and when there are no events at all (``polling``) everything still works,
later.

What watchdog does not see or say is looked for here, every :data:`LOOK_SECONDS`: a root that was deleted and
made anew or a link that was turned to another directory (its emitter goes on watching the old one), links to
directories (not followed), and directories without a watch because the system has none left (``partial``).

Package ``watchdog`` reports opens and reads unless told otherwise, so hashing the tree would feed the
watcher: only the kinds of events listed here are asked for. A queue overflow is only logged by it; the log is
where it is counted from.

Rejected: watchdog's pattern handlers and its debouncer (they changed their meaning between releases; settling
is decided by the pipeline, which knows what else is under way), and its following of links (an endless walk
where they lead in a circle).
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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
from watchdog.observers.api import BaseObserver, ObservedWatch

from supervisor.errors import SourceError
from supervisor.manifest import EXCLUDED_DIRECTORIES, Tree

LOOK_SECONDS = 2.0
"""How often the watcher makes sure that it watches what it is meant to."""

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


@dataclass(frozen=True, slots=True)
class _Place:
    """Where watching begins: a root, or a link to a directory.

    Attributes:
        name: its path in the tree.
        real: the directory that is behind it.
        inode: device and number of that directory; another one is another place.
    """

    name: str
    real: str
    inode: tuple[int, int]


class Watcher:
    """Turns file events below the roots into hints.

    Args:
        tree: where to watch.
        wake: called from a thread of the observer after a hint was noted; must only wake the main loop.
        clock: monotonic time in seconds.

    Attributes:
        problem: why there are no events, or not from everywhere; None if all is well.
    """

    def __init__(
        self, tree: Tree, wake: Callable[[], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tree = tree
        self._wake = wake
        self._clock = clock
        self._look_at = 0.0
        self._hints: queue.SimpleQueue[Hint] = queue.SimpleQueue()
        self._observer: BaseObserver | None = None
        self._overflows = _OverflowCounter(self._overflowed)
        self._watches: dict[_Place, ObservedWatch] = {}
        self._unwatched: frozenset[str] = frozenset()
        self.problem: str | None = None

    @property
    def mode(self) -> str:
        """``events`` while they arrive from everywhere, ``partial`` from some places, else ``polling``."""
        observer = self._observer
        if observer is None or not observer.is_alive() or not self._watches:
            return "polling"
        if not all(emitter.is_alive() for emitter in observer.emitters):
            return "polling"
        return "events" if self.problem is None else "partial"

    @property
    def directories_total(self) -> int:
        """How many directories the tree has now."""
        return len(self._directories())

    @property
    def overflows_total(self) -> int:
        """How often the kernel's queue overflowed."""
        return self._overflows.count

    def start(self) -> None:
        """Start to watch. A system that has no watches left is a :attr:`problem`, not an error."""
        logging.getLogger("watchdog").addHandler(self._overflows)
        try:
            self._observer = Observer()
            self._observer.start()
        except OSError as error:
            self.problem = f"no file events: {error.strerror or error}; changes are found by scanning"
        else:
            self._look(self._observer)

    def take(self) -> list[Hint]:
        """Return the hints since the last call."""
        if self._observer is not None and self._observer.is_alive() and self._clock() >= self._look_at:
            self._look(self._observer)
        hints = []
        while True:
            try:
                hints.append(self._hints.get_nowait())
            except queue.Empty:
                return hints

    def close(self) -> None:
        """Stop to watch."""
        logging.getLogger("watchdog").removeHandler(self._overflows)
        if self._observer is not None and self._observer.is_alive():
            self._observer.stop()
            self._observer.join()

    def _note(self, hint: Hint) -> None:
        self._hints.put(hint)
        self._wake()

    def _overflowed(self) -> None:
        self._note(Hint(self._tree.base, finished=False))

    # --- what is watched ------------------------------------------------------------------------------------

    def _look(self, observer: BaseObserver) -> None:
        """Make sure that every place is watched as it is now, and find the directories that are not."""
        self._look_at = self._clock() + LOOK_SECONDS
        directories = self._directories()
        places = set(_places(self._tree.roots, directories))
        for place in self._watches.keys() - places:
            observer.unschedule(self._watches.pop(place))
        problems = [
            problem for place in places - self._watches.keys() if (problem := self._watch(observer, place))
        ]
        unwatched = frozenset(_without_watch(directories))
        if unwatched - self._unwatched:
            # Newly made, moved here, or lost: the observer is told to walk through them again, once.
            for place in [p for p in self._watches if any(_is_below(u, p.name) for u in unwatched)]:
                observer.unschedule(self._watches.pop(place))
                problems += filter(None, [self._watch(observer, place)])
            unwatched = frozenset(_without_watch(directories))
        self._unwatched = unwatched
        if unwatched:
            problems.append(
                f"{len(unwatched)} directories give no file events, {min(unwatched)} is one; "
                "raise fs.inotify.max_user_watches; changes there are found by scanning"
            )
        self.problem = "; ".join(problems) or None

    def _watch(self, observer: BaseObserver, place: _Place) -> str | None:
        """Watch a place; return why that is not possible, or None."""
        try:
            self._watches[place] = observer.schedule(
                _Handler(self._note, place, self._tree.ignores),
                place.real,
                recursive=True,
                event_filter=_KINDS,
            )
        except OSError as error:
            return (
                f"no file events from {place.name}: {error.strerror or error}; changes are found by scanning"
            )
        self._note(Hint(place.name, finished=True))  # What has happened there until now, nobody has told.
        return None

    def _directories(self) -> Mapping[str, int]:
        """Return the path and the inode number of each directory of the tree that is there."""
        found = {}
        try:
            for path in self._tree.directories():
                found[path] = os.stat(path).st_ino
        except (OSError, SourceError):
            return found  # It changes while we look, or cannot be listed: the scan says so.
        return found


class _Handler(FileSystemEventHandler):
    def __init__(self, note: Callable[[Hint], None], place: _Place, ignores: Callable[[str], bool]) -> None:
        self._note = note
        self._ignores = ignores
        self._place = place

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Note the paths of an event that can concern a source."""
        for path in {os.fsdecode(event.src_path), os.fsdecode(event.dest_path or "")}:
            if _is_below(path, self._place.real):
                inside = path[len(self._place.real) :]
                name = self._place.name + inside
                if _concerns_sources(inside, name, directory=event.is_directory) and not self._ignores(name):
                    self._note(Hint(name, isinstance(event, _FINISHED)))


class _OverflowCounter(logging.Handler):
    """Counts what watchdog says about its queue, the only place where it says it."""

    def __init__(self, overflowed: Callable[[], None]) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        self._overflowed = overflowed

    def emit(self, record: logging.LogRecord) -> None:
        """Note an overflow, once: what follows it about each path is not another one."""
        message = record.getMessage()
        if "queue overflowed" in message and "reconciling" not in message:
            self.count += 1
            self._overflowed()


def _places(roots: tuple[str, ...], directories: Mapping[str, int]) -> Iterator[_Place]:
    """Yield where to begin to watch so that every directory is below one such place, links followed."""
    reals: list[str] = []
    for path in directories:
        if path not in roots and not os.path.islink(path):
            continue
        real = os.path.realpath(path)
        if any(_is_below(real, other) for other in reals):
            continue
        try:
            facts = os.stat(real)
        except OSError:
            continue  # Gone since it was listed.
        reals.append(real)
        yield _Place(path, real, (facts.st_dev, facts.st_ino))


def _without_watch(directories: Mapping[str, int]) -> list[str]:
    """Return the directories that the kernel has no watch for, where it tells (proc_pid_fdinfo(5))."""
    if sys.platform != "linux":
        return []
    watched: set[int] = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:inotify":
                with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as file:
                    watched.update(_inodes(file))
        except OSError:
            continue  # Closed since it was listed.
    return [path for path, inode in directories.items() if inode not in watched]


def _inodes(lines: Iterator[str]) -> Iterator[int]:
    for line in lines:
        if line.startswith("inotify "):
            fields = dict(part.partition(":")[::2] for part in line.split()[1:])
            yield int(fields["ino"], 16)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _concerns_sources(inside: str, name: str, *, directory: bool) -> bool:
    """Whether an event can concern a source.

    Args:
        inside: the path below the place that is watched.
        name: the whole path.
        directory: it is about a directory.
    """
    if EXCLUDED_DIRECTORIES & set(inside.split(os.sep)):
        return False
    return directory or name.endswith(".py") or os.path.islink(name)
