"""Emitter: an emitter of package ``watchdog`` that watches exactly the directories it is told.

The rule: **which directories are watched is decided by one, the watcher; the emitter only tells what
happened there.** It follows the directories of the tree under all of their names (a linked directory has
several), tells of overflows, and holds nothing back.

watchdog's own inotify emitter walks below one root and watches whatever it finds. Not taken, because
(measured with 6.0.0 and 7.1.0):

- an overflow of the kernel's queue is dropped silently by 6.0 and only logged by 7.1;
- at the watch limit 6.0 watches nothing of a root, 7.1 a part without a word;
- it does not follow links, 6.0 does not watch a directory that was moved in, and both keep silent after a
  root was replaced;
- a move out of the tree holds every later event back for half a second, to pair it with a move to somewhere;
- it spends a watch on each directory of ``node_modules`` and ``.git`` and takes their events;
- its descriptor is inherited by every child; 6.0 needs one, and a thread, for each root.

The package's observer, queue, dispatching thread, handlers and kinds of events are used as they are;
``EventEmitter`` is its way to bring a source of events, and the same in 6.0 and 7.x.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from msgspec import Struct
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirModifiedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
)
from watchdog.observers.api import EventEmitter, EventQueue, ObservedWatch

from supervisor import inotify
from supervisor.inotify import Inotify, RawEvent
from supervisor.manifest import EXCLUDED_DIRECTORIES, VENV_MARKER, is_source

_GONE = frozenset({errno.ENOENT, errno.ENOTDIR})

_AWAY = inotify.MOVED_FROM | inotify.DELETE | inotify.DELETE_SELF | inotify.MOVE_SELF | inotify.UNMOUNT
_KINDS: tuple[tuple[int, type[FileSystemEvent], type[FileSystemEvent]], ...] = (
    (inotify.CLOSE_WRITE, FileClosedEvent, FileClosedEvent),
    (inotify.MOVED_TO, FileMovedEvent, DirMovedEvent),
    (_AWAY, FileDeletedEvent, DirDeletedEvent),
    (inotify.CREATE, FileCreatedEvent, DirCreatedEvent),
    (inotify.MODIFY | inotify.ATTRIB, FileModifiedEvent, DirModifiedEvent),
)
"""What the kernel tells to what it is called of a file and of a directory."""


class OverflowEvent(FileSystemEvent):
    """Events were lost, of whatever path."""

    event_type = "overflow"


class Followed(Struct, frozen=True):
    """What came of :meth:`TreeEmitter.follow`.

    Attributes:
        new: directories that were not followed before under this name, or were another one.
        refused: directories without a watch, to the error.
        watches_total: how many watches there are meant to be.
    """

    new: tuple[str, ...]
    refused: Mapping[str, OSError]
    watches_total: int


class TreeEmitter(EventEmitter):
    """Emits what happens in the directories it follows, and nothing that cannot concern a source.

    A move is told of as a deletion of what it leaves and as ``FileMovedEvent`` of what it leads to, each with
    the one path as ``src_path``.
    """

    def __init__(
        self,
        event_queue: EventQueue,
        watch: ObservedWatch,
        *,
        timeout: float = 1.0,
        event_filter: list[type[FileSystemEvent]] | None = None,
    ) -> None:
        super().__init__(event_queue, watch, timeout=timeout, event_filter=event_filter)
        self._inotify = Inotify()
        self._names: Mapping[int, tuple[str, ...]] = {}
        """Number of a watch to the names of its directory."""
        self._folders: frozenset[str] = frozenset()
        self._always = ""
        self._ignores: Callable[[str], bool] = lambda _: False

    # --- called by the watcher ------------------------------------------------------------------------------

    def follow(
        self, directories: Iterable[str], always: str, ignores: Callable[[str], bool] = lambda _: False
    ) -> Followed:
        """Watch these directories as they are now, and no others.

        Each is asked for again every time: for one that is watched the kernel answers with the watch it has,
        for one that was replaced by another of the same name with a new one.

        Args:
            directories: absolute paths, the most important ones first; those that are gone are passed over.
            always: absolute path of a file whose events are emitted whatever its name.
            ignores: whether an absolute path is left out; called from the emitter's thread.

        Raises:
            OSError: the emitter has ended.
        """
        self._always, self._ignores = always, ignores
        wanted = list(dict.fromkeys(directories))
        names: dict[int, tuple[str, ...]] = {}
        refused = self._add(wanted, names)
        stale = self._names.keys() - names.keys()
        for watch in stale:
            self._inotify.remove(watch)
        if refused and stale:
            refused = self._add(list(refused), names)
        before, self._names = self._names, names
        self._folders = frozenset(path for known in names.values() for path in known)
        new = [name for watch, known in names.items() for name in known if name not in before.get(watch, ())]
        return Followed(tuple(new), refused, len(names))

    def _add(self, directories: Sequence[str], names: dict[int, tuple[str, ...]]) -> dict[str, OSError]:
        refused = {}
        for path in directories:
            try:
                watch = self._inotify.add(path)
            except OSError as error:
                if error.errno == errno.EBADF:
                    raise
                if error.errno not in _GONE:
                    refused[path] = error
                continue
            names[watch] = (*names.get(watch, ()), path)
        return refused

    def count(self) -> int | None:
        """Return how many the kernel has, None where it does not tell.

        Raises:
            OSError: the emitter has ended.
        """
        return self._inotify.count()

    # --- called by watchdog ---------------------------------------------------------------------------------

    def on_thread_stop(self) -> None:
        """Have the thread end."""
        self._inotify.stop()

    def run(self) -> None:
        """Emit until it is told to stop."""
        try:
            super().run()
        finally:
            self._inotify.close()

    def queue_events(self, timeout: float) -> None:  # noqa: ARG002 -- it is woken, it need not look up
        """Wait for events and queue those that concern a source."""
        for raw in self._inotify.read():
            for event in self._events(raw):
                self.queue_event(event)

    def _events(self, raw: RawEvent) -> Iterator[FileSystemEvent]:
        if raw.mask & inotify.OVERFLOW:
            yield OverflowEvent("")
        of_itself = bool(raw.mask & (inotify.DELETE_SELF | inotify.MOVE_SELF | inotify.UNMOUNT))
        is_directory = of_itself or bool(raw.mask & inotify.IS_DIRECTORY)
        name = os.fsdecode(raw.name)
        for folder in self._names.get(raw.watch, ()):
            path = os.path.join(folder, name) if name else folder
            for bits, of_file, of_directory in _KINDS:
                if raw.mask & bits:
                    if self._concerns_sources(name, path, raw.mask, is_directory=is_directory):
                        yield (of_directory if is_directory else of_file)(path)
                    break

    def _concerns_sources(self, name: str, path: str, mask: int, *, is_directory: bool) -> bool:
        if path == self._always:
            return True
        if self._ignores(path):
            return False
        if is_directory:
            return name not in EXCLUDED_DIRECTORIES
        if is_source(name) or name == VENV_MARKER:
            return True
        if mask & (inotify.CREATE | inotify.MOVED_TO):
            return os.path.islink(path)
        return mask & _AWAY != 0 and path in self._folders
