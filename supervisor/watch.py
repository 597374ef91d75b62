"""Watch: file events as hints that something may have changed, and the proof that they arrive.

The rule: **an event is a hint, content is the truth, and silence proves nothing.** A handler only queues what
happened and wakes the main loop; what changed is decided by hashing, and a periodic scan finds what events
missed. So a lost event costs a scan interval, never a stale service, and when there are no events at all
(``polling``) everything still works, later.

Watchers fail silently, so this one is examined:

- *Does it watch the tree as it is now?* Every :data:`LOOK_SECONDS`, and soon after anything happened to a
  directory, the tree is walked and every directory asked for again. That finds roots that were deleted and
  made anew, links that were turned, directories that were moved in or refused, because no watch is left. The
  walk is on the main loop's thread and takes at most a third of a percent of it, however large the tree.
- *Does the kernel agree?* It says how many watches there are. Fewer than there should be, twice in a row: the
  watcher is started again.
- *Do events come back?* A canary (:mod:`supervisor.canary`) in a directory of its own takes the whole way
  through kernel, both threads, and handler. One that is not heard: the watcher is started again.
- *Do its threads live?* Looked at in each turn of the loop.
- *Can there be events?* Not of what other machines do to a file system (:mod:`supervisor.filesystems`).

After each doubt (events lost, a watch refused, the watcher started again) every byte of the tree is to be
read again: :meth:`Watcher.doubt`.

A directory is watched first and hinted at then, so what happened in between is found by the look that follows
the hint. Two things are left to the scan alone: a file that a link in the tree leads to, outside of the tree,
and a link above a root that is turned.

Rejected: an overflow told by the canary alone (it says that events *now* arrive, not that none was lost while
the process was stopped); watchdog's own inotify emitter (see :mod:`supervisor.emitter`), its pattern handlers
and its debouncer (they changed their meaning between releases; settling is decided by the pipeline, which
knows what else is under way).
"""

from __future__ import annotations

import logging
import os
import queue
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct
from watchdog.events import (
    DirMovedEvent,
    FileClosedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.api import BaseObserver

from supervisor import inotify, survey
from supervisor.canary import Canary
from supervisor.emitter import OverflowEvent, TreeEmitter
from supervisor.filesystems import FileSystems
from supervisor.manifest import Tree, is_source
from supervisor.survey import Survey, Trouble
from supervisor.threads import without_signals

log = logging.getLogger("wa-supervisor")

LOOK_SECONDS = 2.0
"""How often the watcher makes sure that it watches what it is meant to, at most."""

_LOOK_SHARE = 1 / 300
_EARLY_LOOK_SHARE = 1 / 20
"""Shares of the main loop's processor time that looks may take: on time, and because directories change."""

_SHORT_LOOKS = 2
"""Looks in a row that must find watches missing: a directory may be deleted while one looks."""

_VAIN_STARTS = 2
"""Canaries in a row that were not heard, each of a new watcher but the first, until we cannot heal it."""

_LONGEST_PAUSE_SECONDS = 300.0
"""Between two starts of a watcher that never gets as far as to prove itself."""

_DOUBT_SECONDS = 2.0
"""Shortest time between two looks at the whole tree for a doubt: a storm of overflows is one."""

_FINISHED = (FileClosedEvent, FileMovedEvent, DirMovedEvent)

Mode = Literal["events", "partial", "polling"]


class Hint(Struct, frozen=True):
    """Something happened to a path.

    Attributes:
        path: absolute; of a source, or of a directory or link that may hold some.
        finished: what is there now is whole: it was closed after writing, or moved there. What was deleted or
            moved away is not: editors that keep a backup write the file anew a moment later.
    """

    path: str
    finished: bool


class Health(Struct, frozen=True):
    """How changes are noticed now.

    Attributes:
        mode: ``events`` if all of them are told, ``partial`` if some, ``polling`` if a scan finds them.
        reason: why not all are told, None if they are.
        remedy: what the operator does about it, None if there is no reason.
    """

    mode: Mode
    reason: str | None = None
    remedy: str | None = None


class Watcher:
    """Turns file events below the roots into hints.

    Args:
        tree: where to watch.
        wake: called from a thread of the observer after something was queued; must only wake the main loop.
        canary: directory for the proof of life; made if it is not there, and ours alone.
        clock: monotonic time in seconds.
        file_systems: what is mounted.

    Attributes:
        health: how changes are noticed now.
        overflows_total: how often the kernel's queue overflowed.
        restarts_total: how often the watcher was started again because it was dead or blind.
    """

    def __init__(
        self,
        tree: Tree,
        wake: Callable[[], None],
        canary: Path,
        clock: Callable[[], float] = time.monotonic,
        file_systems: FileSystems | None = None,
    ) -> None:
        self._tree = tree
        self._wake = wake
        self._canary = Canary(canary)
        self._clock = clock
        self._file_systems = file_systems or FileSystems()
        self._observer: BaseObserver | None = None
        self._emitter: TreeEmitter | None = None
        self._mailbox: queue.SimpleQueue[FileSystemEvent] = queue.SimpleQueue()
        self._failure: Trouble | None = None
        self._survey = Survey()
        self._short_looks = 0
        self._vain_starts = 0
        self._was_proven = False
        self._start_not_before = 0.0
        self._look_at = self._look_not_before = 0.0
        self._doubts: list[str] = []
        self._doubt_not_before = 0.0
        self.health = Health("events")
        self.overflows_total = 0
        self.restarts_total = 0

    @property
    def directories_total(self) -> int:
        """How many directories the tree had at the last look."""
        return self._survey.directories_total

    @property
    def hears_everything(self) -> bool:
        """Whether what no hint was given of has not changed, but for what events cannot tell (see above)."""
        return self.health.mode == "events" and not self._doubts

    @property
    def blind(self) -> str | None:
        """Why events do not come any more, although the watcher was started again; or None."""
        if self._was_proven and self._canary.misses >= _VAIN_STARTS:
            return f"file events have stopped: those of {self._canary.path} do not come back"
        return None

    def start(self) -> None:
        """Start to watch. That there is nothing to watch with is a matter of :attr:`health`, not an error."""
        now = self._clock()
        self._look(now)
        self._doubts.clear()  # Nothing is known yet that could be doubted.
        self._examine(now)

    def take(self) -> list[Hint]:
        """Return the hints since the last call, and examine the watcher as far as it is time to."""
        now = self._clock()
        if self._emitter is not None and not self._lives() and now >= self._start_not_before:
            self._start_again("a thread of it has ended", now)
        hints = self._read_mailbox()
        if now >= max(self._look_at, self._look_not_before):
            hints += self._look(now)
        self._examine(now)
        return hints

    def doubt(self) -> str | None:
        """Return once why every byte of the tree has to be read again; None if nothing is in doubt."""
        now = self._clock()
        if not self._doubts or now < self._doubt_not_before:
            return None
        self._doubt_not_before = now + _DOUBT_SECONDS
        why = "; ".join(dict.fromkeys(self._doubts))
        self._doubts.clear()
        return why

    def as_json(self) -> dict[str, Any]:
        """Return what ``status --json`` shows."""
        return {
            "mode": self.health.mode,
            "reason": self.health.reason,
            "remedy": self.health.remedy,
            "directories": self.directories_total,
            "watches": self._survey.watches_total,
            "overflows": self.overflows_total,
            "restarts": self.restarts_total,
        }

    def close(self) -> None:
        """Stop to watch."""
        observer, self._observer, self._emitter = self._observer, None, None
        if observer is not None:
            observer.stop()
            observer.join()

    # --- observer -------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Start an observer. Its mailbox is its own: what an earlier one still says proves nothing."""
        self._mailbox = queue.SimpleQueue()
        observer = BaseObserver(TreeEmitter)
        try:
            with without_signals():
                observer.start()
                observer.schedule(_Handler(self._mailbox, self._wake, self._canary.path), self._tree.base)
        except OSError as error:
            reason = f"no file events: {error.strerror or error}"
            self._failure = Trouble(reason, inotify.instances_remedy(error))
        except RuntimeError as error:  # No thread can be started.
            remedy = "raise the limit of tasks (TasksMax= in the unit, ulimit -u)"
            self._failure = Trouble(f"no file events: {error}", remedy)
        else:
            [self._emitter] = [emitter for emitter in observer.emitters if isinstance(emitter, TreeEmitter)]
            self._observer = observer
            if self._failure is not None:
                self._failure = None
                self._doubts.append("file events arrive again")
            return
        observer.stop()

    def _lives(self) -> bool:
        threads = self._observer, self._emitter
        return all(thread is not None and thread.is_alive() for thread in threads)

    def _start_again(self, why: str, now: float) -> None:
        self.close()
        self.restarts_total += 1
        self._start_not_before = now + min(LOOK_SECONDS * 2**self._vain_starts, _LONGEST_PAUSE_SECONDS)
        self._vain_starts += 1
        self._doubts.append(f"the watcher was started again, {why}")
        self._look(now)

    def _read_mailbox(self) -> list[Hint]:
        hints: list[Hint] = []
        while True:
            try:
                event = self._mailbox.get_nowait()
            except queue.Empty:
                return hints
            path = os.fsdecode(event.src_path)
            if isinstance(event, OverflowEvent):
                self.overflows_total += 1
                self._doubts.append(f"file events were lost; {inotify.queue_remedy()}")
                self._canary.hurry()
                self._look_at = 0.0
            elif path == self._canary.path:
                if isinstance(event, FileClosedEvent):
                    self._canary.heard()
                    self._vain_starts = 0
                    self._was_proven = True
            elif path == self._canary.directory:
                self._look_at = 0.0
            else:
                hints.append(Hint(path, isinstance(event, _FINISHED)))
                if event.is_directory or not is_source(os.path.basename(path)):
                    self._look_at = 0.0

    # --- examination ----------------------------------------------------------------------------------------

    def _look(self, now: float) -> list[Hint]:
        """Have every directory watched as it is now; return hints at those that were not before."""
        began = time.thread_time()
        is_new = self._emitter is None
        if is_new:
            self._open()
            self._canary.hurry()
            self._short_looks = 0
        before, found = self._survey, survey.take(self._tree, self._emitter, self._canary, self._file_systems)
        self._survey = found
        if found.unwatched - before.unwatched:
            self._doubts.append(f"{len(found.unwatched)} directories are not watched")
        cost_seconds = time.thread_time() - began
        self._look_at = now + look_interval_seconds(cost_seconds)
        self._look_not_before = now + cost_seconds / _EARLY_LOOK_SHARE
        self._short_looks = self._short_looks + 1 if found.short else 0
        if self._short_looks == _SHORT_LOOKS:
            self._start_again("the kernel has fewer watches for it than were asked for", now)
        # Nobody has told what happened there until now. After a start everything is read anyway.
        return [] if is_new else [Hint(path, finished=True) for path in found.new]

    def _examine(self, now: float) -> None:
        """Have the canary prove that events arrive, and say how changes are noticed now."""
        if self._survey.proving and self._canary.turn(now):
            self._start_again(f"an event of {self._canary.path} did not come back", now)
        before, self.health = self.health, self._judge()
        if self.health.mode != before.mode and self.health.reason is not None:
            log.warning("watch mode %s: %s; %s", self.health.mode, self.health.reason, self.health.remedy)
        elif self.health.mode != before.mode:
            log.info("watch mode %s", self.health.mode)

    def _judge(self) -> Health:
        troubles = list(self._survey.troubles)
        if self._failure is not None:
            return _health("polling", [self._failure])
        if not self._lives():
            ended = Trouble("a thread of the watcher has ended", "see the log; it is started again")
            return _health("polling", [ended, *troubles])
        if self._canary.misses:
            blind = Trouble(f"events of {self._canary.path} do not come back", "restart the supervisor")
            return _health("polling", [blind, *troubles])
        if self._canary.problem is not None:
            reason = f"events are not proven: cannot write {self._canary.path}: {self._canary.problem}"
            troubles.append(Trouble(reason, "put it back and make it writable"))
        elif not self._survey.proving:
            reason = f"events are not proven: {self._canary.directory} is not watched"
            troubles.append(Trouble(reason, inotify.watches_remedy(1)))
        if self._survey.silent_total == self._survey.directories_total:
            return _health("polling", troubles)
        return _health("partial" if troubles else "events", troubles)


class _Handler(FileSystemEventHandler):
    """Queues what happened. Whatever it raised would end watchdog's dispatching thread."""

    def __init__(
        self, mailbox: queue.SimpleQueue[FileSystemEvent], wake: Callable[[], None], quiet: str
    ) -> None:
        self._mailbox = mailbox
        self._wake = wake
        self._quiet = quiet

    def dispatch(self, event: FileSystemEvent) -> None:
        """Queue an event; the canary's own wake nobody."""
        self._mailbox.put(event)
        if event.src_path != self._quiet:
            self._wake()


def look_interval_seconds(cost_seconds: float) -> float:
    """Return how long to wait after a look that took so much of a processor."""
    return max(LOOK_SECONDS, cost_seconds / _LOOK_SHARE)


def _health(mode: Mode, troubles: list[Trouble]) -> Health:
    reasons = dict.fromkeys(trouble.reason for trouble in troubles)
    remedies = dict.fromkeys(trouble.remedy for trouble in troubles)
    return Health(mode, "; ".join(reasons) or None, "; ".join(remedies) or None)
