"""Settling: when signs of a change are to be looked at, and when what was found may take over.

Two different waits. A *look* may come early: one file that its writer has closed is most often all there is,
so it is built, started and verified while the quiet period still runs. The *handover* waits for the quiet
period, so that whatever else changes meanwhile is part of the same reload. The rules:

- As soon as a second path changes there is no look before the tree has come to rest: each look at half a
  change may start a process for nothing. That holds also when the first one was taken over already, if it was
  a moment ago: of several files that are saved one after the other, all but the first are one reload.
- A path that somebody still has open for writing holds both, a pause between two writes is no end.
- No wait without a bound: after :data:`MAX_SETTLE_SECONDS` the tree is looked at as it is. Only a running git
  that holds a lock holds us longer.

Times are monotonic seconds, passed in.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct, field

from supervisor import writers
from supervisor.reload import Reload

BURST_SECONDS = 0.5
"""Longest time between changes of two files that are taken for parts of one."""

MAX_SETTLE_SECONDS = 5.0
"""Longest wait for a tree to come to rest."""

_QUIET_ONE_FILE_SECONDS = 0.01
_QUIET_MANY_SECONDS = 0.15
_WRITER_LOOK_SECONDS = 0.02
_MOST_ASKED_ABOUT = 50


class Settling(Struct):
    """Signs of a change that has not come to rest.

    Attributes:
        reload: the record that they belong to.
        last_at: time of the newest sign.
        since: time from which the longest wait counts.
        dirty: absolute paths with a sign; their stat tuples are not trusted.
        before: the path of the change before this one, if that was a moment ago: somebody saves several.
        unfinished: those that somebody may still be writing.
        whole: look at every byte of the tree and at every cache directory.
        at_once: somebody waits for it: the tree need not come to rest.
        not_before: time before which git, a writer, or a machine without memory holds us.
        waits: it was looked at and is held by a pause.
        looked: what is on disk is on its way already, and nothing has happened since.
        looked_ahead: it was looked at before it came to rest; that is done once.
    """

    reload: Reload
    last_at: float
    since: float
    before: frozenset[str] = frozenset()
    dirty: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)
    whole: bool = False
    at_once: bool = False
    not_before: float = 0.0
    waits: bool = False
    looked: bool = False
    looked_ahead: bool = False

    def sign(self, path: str, now: float, *, finished: bool) -> None:
        """Note that something happened to a path; ``finished``: whoever did it is done with it."""
        self.dirty.add(path)
        (self.unfinished.discard if finished else self.unfinished.add)(path)
        self.last_at, self.looked = now, False

    def take_up(self, trigger: str) -> None:
        """Begin a record anew if the one there is has ended: what was started ahead may have failed."""
        if self.reload.outcome is not None:
            self.reload = Reload(trigger, self.last_at)

    def hold(self, now: float, seconds: float) -> None:
        """Wait for what is not ours to end; the tree gets all of its time after it."""
        self.not_before = now + seconds
        self.since = max(self.since, now)

    def calm_at(self, quiet_seconds: float | None) -> float:
        """Return when the quiet period will be over, None for the adaptive one."""
        if self.at_once:
            return self.reload.began_at
        if quiet_seconds is None:
            quiet_seconds = _QUIET_ONE_FILE_SECONDS if self._is_one_file else _QUIET_MANY_SECONDS
        return min(self.last_at + quiet_seconds, self.since + MAX_SETTLE_SECONDS)

    def is_overdue(self, now: float) -> bool:
        """Whether it has not come to rest in all the time that it gets."""
        return not self.at_once and now >= self.since + MAX_SETTLE_SECONDS

    @property
    def may_look_ahead(self) -> bool:
        """Whether it is worth a look before it has come to rest: it is one finished file."""
        return bool(self.dirty) and self._is_one_file and not self.looked_ahead and not self.whole

    @property
    def _is_one_file(self) -> bool:
        return len(self.dirty | self.before) <= 1 and not self.unfinished

    def due_at(self, quiet_seconds: float | None) -> float:
        """Return when something is to be done about it at the earliest."""
        return max(self.not_before, self.last_at if self.may_look_ahead else self.calm_at(quiet_seconds))

    def is_held_by_writer(
        self, now: float, is_written: Callable[[str], bool | None] = writers.is_written
    ) -> bool:
        """Whether somebody still writes to one of the paths; it is to be asked again in a moment then."""
        if self.at_once or self.is_overdue(now):
            return False
        # More than these is no editor that saves a file, and asking about each would take its time.
        asked = self.unfinished if len(self.dirty) > _MOST_ASKED_ABOUT else self.dirty
        held = any(is_written(path) for path in sorted(asked)[:_MOST_ASKED_ABOUT])
        if held:
            self.not_before = now + _WRITER_LOOK_SECONDS
        return held
