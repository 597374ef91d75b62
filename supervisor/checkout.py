"""Checkout: what git is doing to the tree, and at which commit each tree stood.

**A tree that git is writing is nobody's version.** While there is a lock of git in a repository that concerns
the roots (that each root lies in, and every one below a root: submodules, clones), the tree is changing.

- A lock younger than :data:`STALE_LOCK_SECONDS` always holds.
- An older one holds for as long as a running process holds it, without a maximum: one that has the file open,
  or, because git closes it before it is done, a git whose working directory lies in the worktree or the git
  directory. A git that only reads or serves is not meant (:data:`_NEVER_LOCKS`), nor one that was started
  after the lock was first found old: a lock is made by its holder.
- What processes of another user have open, and where they work, is root's to know. Of them a git holds the
  lock if it runs as the user whom the lock file belongs to. Where even the names of others' processes are
  hidden (``hidepid``, ``ProtectProc=``), an old lock of theirs counts as left behind.
- An old lock that nobody holds was left behind by a git that died. It is told and ignored: git itself would
  refuse to work there, but the tree is at rest.

**A look is torn** if git wrote while it was taken: a lock was there before or after it, or the index is
another one (:meth:`Checkout.mark`). Nothing is built from a torn look. After git has written, the whole tree
is looked at and not only what events have named so far.

The age counts by the lock's mtime, or by how long we have seen it, whatever is longer: a clock that was set
back holds nobody for more than that time.

**The commit of a tree** is where HEAD stood *before* a look at the disk that showed this tree; the latest
such look counts. Git writes the files first, under ``index.lock``, and moves HEAD after that lock is gone. So
what was read before the look can be behind what was seen, and the next look puts that right, but not ahead of
it. HEAD gets a moment (:data:`_HEAD_SECONDS`) after a lock was seen for the same reason.

Rejected: HEAD as it stands when a reload ends (git may have gone on to the next commit by then), asking git
(see :mod:`supervisor.git`), waiting for a lock of any age (a git that was killed would hold a service for
ever).

Source: ``lockfile.h`` and ``builtin/checkout.c`` of git, proc(5).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

from msgspec import Struct, field

from supervisor import git, processes
from supervisor.git import Head, Repository
from supervisor.manifest import Snapshot, Tree
from supervisor.processes import Process

log = logging.getLogger("wa-supervisor")

STALE_LOCK_SECONDS = 60.0
"""From this age on a lock counts only if a running process holds it."""

_HEAD_SECONDS = 0.05
_LOOK_AGAIN_SECONDS = 1.0
_LOOK_SHARE = 50
"""Looking for the holder of a lock takes no more than one part in this many of our time."""
_HEADS_KEPT = 1_000

_NEVER_LOCKS = frozenset(
    {
        b"blame",
        b"cat-file",
        b"credential-cache--daemon",
        b"daemon",
        b"diff",
        b"fsmonitor--daemon",
        b"log",
        b"show",
    }
)
"""Commands of git that may run for days beside a lock that is not theirs."""


class Lock(Struct, frozen=True):
    """A lock file of git.

    Attributes:
        path: of the file.
        age_seconds: since it was last written, or since we have seen it.
        held: the tree is changing for as long as it is there.
        holders: who holds it, each as ``123 (git)``; not looked for while it is young.
    """

    path: Path
    age_seconds: float
    held: bool
    holders: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.held:
            return f"{self.path} was left by a git that died: no process holds it, it is ignored; remove it"
        return f"git{' ' if self.holders else ''}{', '.join(self.holders)} holds {self.path}"


class _Watched(Struct):
    """What is known of one lock file.

    Attributes:
        seen_at: monotonic time when it was first seen.
        look_at: monotonic time when its holders are to be looked for again.
        holders: who held it at the last look, None before that.
        suspects: those of them of whom only the working directory or the user speaks.
    """

    seen_at: float
    look_at: float = 0.0
    holders: tuple[Process, ...] | None = None
    suspects: frozenset[tuple[int, int]] = field(default_factory=frozenset)


_Key = tuple[Path, int, int, int]


class Checkout:
    """Git's view of a tree.

    Args:
        tree: the roots.
        clock: monotonic seconds.

    Attributes:
        heads: tree digests to where HEAD stood when they were last seen on disk, the latest last.
        lock: the one that holds the tree now, as of the last time that :meth:`is_changing` was asked.
        problems: a sentence about each lock that was left behind, as of then.
    """

    def __init__(self, tree: Tree, clock: Callable[[], float] = time.monotonic) -> None:
        self._roots = [Path(root) for root in tree.roots]
        self._clock = clock
        self._below: tuple[str, ...] = ()
        self._watched: dict[_Key, _Watched] = {}
        self._held_at = float("-inf")
        self.heads: dict[str, Head] = {}
        self.lock: Lock | None = None
        self.problems: tuple[str, ...] = ()

    def repository(self) -> Repository | None:
        """Return the one that all roots lie in; None if there is none, or if there are several."""
        found = {git.find(root) for root in self._roots}
        return found.pop() if len(found) == 1 else None

    # --- is git at work -----------------------------------------------------------------------------------

    def is_changing(self) -> bool:
        """Whether git is about to change the tree: what is on disk may be half of two versions."""
        now = self._clock()
        found = [
            (key, lock) for repository in self._repositories() for key, lock in self._locks(repository, now)
        ]
        self._watched = {key: self._watched[key] for key, _ in found}
        self.lock = next((lock for _, lock in found if lock.held), None)
        problems = tuple(str(lock) for _, lock in found if not lock.held)
        for problem in problems:
            if problem not in self.problems:
                log.warning("%s", problem)
        self.problems = problems
        if self.lock is not None:
            self._held_at = now
        return now - self._held_at < _HEAD_SECONDS

    def mark(self) -> Hashable:
        """Return what is another one after git has written files: a look at the tree between two is torn.

        Git writes the index last, still under its lock. So a look saw no half of a change of git's if nobody
        held a lock before and after it, and both marks are equal.
        """
        return frozenset((found.directory, found.written()) for found in self._repositories())

    def _repositories(self) -> Iterator[Repository]:
        seen: set[Path] = set()
        around = (git.find(root) for root in self._roots)
        below = (git.at(Path(folder)) for folder in self._below)
        for repository in (*around, *below):
            if repository is not None and (place := git.real(repository.directory)) not in seen:
                seen.add(place)
                yield repository

    def _locks(self, repository: Repository, now: float) -> Iterator[tuple[_Key, Lock]]:
        for path in repository.locks:
            try:
                facts = path.lstat()
            except OSError:
                continue  # Not there; or in a private repository, of which nothing can be known.
            # Written to, it is young again; made anew, it may get the same number.
            key = (path, facts.st_dev, facts.st_ino, facts.st_mtime_ns)
            watched = self._watched.setdefault(key, _Watched(now))
            age_seconds = max(time.time() - facts.st_mtime, now - watched.seen_at)
            if age_seconds < STALE_LOCK_SECONDS:
                yield key, Lock(path, max(0.0, age_seconds), held=True)
                continue
            if watched.holders is None or (watched.holders and now >= watched.look_at):
                self._look_for_holders(watched, path, facts, repository)
            holders = tuple(str(process) for process in watched.holders or ())
            yield key, Lock(path, age_seconds, held=bool(holders), holders=holders)

    def _look_for_holders(
        self, watched: _Watched, path: Path, facts: os.stat_result, repository: Repository
    ) -> None:
        began_at = self._clock()
        holders, suspects = _holders(path, facts, repository)
        if watched.holders is not None:
            suspects = [process for process in suspects if process.key in watched.suspects]
        watched.holders = (*holders, *suspects)
        watched.suspects = frozenset(process.key for process in suspects)
        took_seconds = self._clock() - began_at
        watched.look_at = began_at + max(_LOOK_AGAIN_SECONDS, _LOOK_SHARE * took_seconds)

    # --- where does it stand ------------------------------------------------------------------------------

    def head(self) -> Head | None:
        """Return where HEAD stands now; None if no repository holds all roots."""
        repository = self.repository()
        return repository.head() if repository is not None else None

    def saw(self, snapshot: Snapshot, head: Head | None) -> None:
        """Note what a look at the disk has shown.

        Args:
            snapshot: of the tree.
            head: as it was read before that look.
        """
        self._below = snapshot.worktrees
        tree = snapshot.manifest.digest
        self.heads.pop(tree, None)
        if head is not None:
            self.heads[tree] = head
        while len(self.heads) > _HEADS_KEPT:
            del self.heads[next(iter(self.heads))]

    def head_of(self, tree: str | None) -> Head:
        """Return where HEAD stood when this tree was last seen on disk."""
        return self.heads.get(tree or "", Head())


def _holders(
    path: Path, facts: os.stat_result, repository: Repository
) -> tuple[list[Process], list[Process]]:
    """Return the processes that have a lock open, and those that may hold it closed."""
    places = (git.real(repository.worktree), git.real(repository.directory))
    open_in, suspects = [], []
    for process in processes.table().values():
        if not process.memory_bytes:
            continue  # The kernel's own, or ended.
        if processes.has_open(process.pid, path, facts):
            open_in.append(process)
        elif _is_git_that_locks(process):
            directory = processes.directory(process.pid)
            if directory is None:
                # Not ours to know; or it has just ended, and with its memory everything else is gone.
                again = processes.read(process.pid)
                alive = again is not None and again.key == process.key and again.memory_bytes > 0
                inside = alive and processes.owner(process.pid) == facts.st_uid
            else:
                inside = any(directory.is_relative_to(place) for place in places)
            if inside:
                suspects.append(process)
    return open_in, suspects


def _is_git_that_locks(process: Process) -> bool:
    if process.name != "git" and not process.name.startswith("git-"):
        return False
    words = processes.arguments(process.pid)
    return process.name != "git-daemon" and _NEVER_LOCKS.isdisjoint(words[1:])
