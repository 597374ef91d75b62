"""Being woken when the bridge has written, within a millisecond or two.

The rule: an event is a hint, the look is the truth. Whoever waits here also looks by himself every now and
then, so a lost event costs time and never a message. Events are trusted as long as they tell: a look that
finds what no event announced ends the trust (`missed`), looks are frequent from then on, and the next event
restores it. That covers network file systems, containers with a mounted file, exhausted watches, and a
folder that was moved away.

While a journal with content lies beside the database, a transaction is under way; a look would only meet its
lock. Its end, the removal of the journal, is an event of its own. With a write-ahead log there is no journal.

Rejected: watching files instead of their folder (a replaced file is lost), and the default events of the
package `watchdog`, which tell of our own reads as well. Source: sqlite.org, "Temporary Files Used By SQLite".
"""

import contextlib
import os
import time
from collections.abc import Collection
from pathlib import Path

from watchdog.events import (
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver

_EVENTS: list[type[FileSystemEvent]] = [
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
]
_JOURNAL = "-journal"
_RESTART_SECONDS = 10.0


class Wakeup:
    """Watches SQLite files of one folder; becomes readable when one of them may have changed."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._folder = folder
        self._names = names
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._observer: BaseObserver | None = None
        self._started_seconds = float("-inf")
        self.trusted = False
        """Whether a change is expected to be told."""
        self._start()

    def fileno(self) -> int:
        """Return what `select` waits for."""
        return self._reader

    def rung(self) -> bool:
        """Tell whether there was an event since the last call; if so, events are trusted again."""
        try:
            os.read(self._reader, 65536)
        except BlockingIOError:
            return False
        self.trusted = True
        return True

    def missed(self) -> None:
        """Say that something was found which no event announced."""
        self.trusted = False
        if time.monotonic() - self._started_seconds > _RESTART_SECONDS:
            self._end()
            self._start()

    def close(self) -> None:
        """Stop watching."""
        self._end()
        os.close(self._reader)
        os.close(self._writer)

    def _start(self) -> None:
        self._started_seconds = time.monotonic()
        observer = Observer()
        try:
            observer.schedule(
                _Ringer(self._names, self._writer), str(self._folder), recursive=False, event_filter=_EVENTS
            )
            observer.start()
        except OSError:  # no watches left, no such folder: the looks go on
            return
        _keep_from_children()
        self._observer = observer
        self.trusted = True

    def _end(self) -> None:
        observer, self._observer = self._observer, None
        if observer is not None:
            observer.stop()
            observer.join()


class _Ringer(FileSystemEventHandler):
    """Called in the observer's thread; an exception would end it."""

    def __init__(self, names: Collection[str], writer: int) -> None:
        self._files = {f"{name}{suffix}": name for name in names for suffix in ("", "-wal", _JOURNAL)}
        self._writer = writer

    def on_any_event(self, event: FileSystemEvent) -> None:
        """Ring if a transaction of one of the files may have ended."""
        for path in (event.src_path, event.dest_path):
            folder, name = os.path.split(os.fsdecode(path))
            database = self._files.get(name)
            if database is None or (name.endswith(_JOURNAL) and isinstance(event, FileCreatedEvent)):
                continue
            if not _has_content(os.path.join(folder, database + _JOURNAL)):  # noqa: PTH118
                with contextlib.suppress(BlockingIOError):  # it rings already
                    os.write(self._writer, b"x")
                return


def _keep_from_children() -> None:
    """Close the observer's descriptor in programs that this process starts: the library leaves it open."""
    with contextlib.suppress(OSError):  # no /proc
        for entry in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):  # it is closed meanwhile
                if str(entry.readlink()) == "anon_inode:inotify":
                    os.set_inheritable(int(entry.name), False)


def _has_content(path: str) -> bool:
    try:
        return os.stat(path).st_size > 0  # noqa: PTH116 -- at each event
    except OSError:
        return False
