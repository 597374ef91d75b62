"""Dirty: whether the files that git tracks differ from the commit that HEAD stands at.

Only git itself knows: attributes, filters and line ends decide it. ``git status`` runs what the repository's
configuration names, so it is asked only where **everything of the repository belongs to our own user**, who
could run that as well; else, and where there is no git, the answer is None.

The rule: nobody waits for it and it leaves nothing behind. It is a process that the main loop looks after,
with a deadline and a process group of its own, without git's optional locks, without starting a file system
monitor, without our environment but for :data:`_HEARD_VARIABLES`. It is asked anew when something has
changed, at most every :data:`_AGAIN_SECONDS`, and seldomer where it takes long. Its first line is answer
enough.

What is not noticed: a change of a file that is no source, until the index, HEAD or a source changes, too.

Source: git-status(1), git(1) (``GIT_OPTIONAL_LOCKS``), git-config(1) (``safe.directory``).
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
from collections.abc import Collection, Hashable, Mapping

from msgspec import Struct

from supervisor.git import Repository

DEADLINE_SECONDS = 10.0
"""Longest time that git gets."""

_AGAIN_SECONDS = 3.0
_SHARE = 20
"""Git takes no more than one part in this many of the time."""

_HEARD_VARIABLES = frozenset({"PATH", "HOME", "XDG_CONFIG_HOME", "USER", "LOGNAME", "TMPDIR"})
_OWN_VARIABLES = {
    "LC_ALL": "C",
    "GIT_OPTIONAL_LOCKS": "0",
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_NO_LAZY_FETCH": "1",
}


class _Job(Struct):
    """A git that was asked.

    Attributes:
        key: of the state that it was asked about.
        waited_on: the main loop waits for what it writes.
        found: it has named a file.
    """

    process: subprocess.Popen[bytes]
    key: Hashable
    began_at: float
    waited_on: bool = True
    found: bool = False


class Dirty:
    """Asks git, and knows its last answer.

    Args:
        selector: the main loop's.
        environment: of the supervisor.
    """

    def __init__(self, selector: selectors.BaseSelector, environment: Mapping[str, str]) -> None:
        self._selector = selector
        heard = {name: value for name, value in environment.items() if name in _HEARD_VARIABLES}
        self._environment = heard | _OWN_VARIABLES
        self._key: Hashable = None
        self._known: tuple[Hashable, bool | None] = (None, None)
        self._job: _Job | None = None
        self._not_before = 0.0

    @property
    def value(self) -> bool | None:
        """Whether it is dirty; None if that is not known, or not known yet."""
        key, value = self._known
        return value if key == self._key else None

    @property
    def pids(self) -> Collection[int]:
        """Those of our children that are looked after here."""
        return [self._job.process.pid] if self._job is not None else []

    def follow(self, repository: Repository | None, state: Hashable, now: float) -> None:
        """Ask git, if something has changed since it was last asked.

        Args:
            repository: to ask about.
            state: compares equal for as long as the answer cannot have changed.
            now: monotonic time.
        """
        self._key = (repository, state)
        if self._job is not None or now < self._not_before or self._key == self._known[0]:
            return
        if repository is None or not _is_ours(repository):
            self._known = (self._key, None)
            return
        try:
            self._job = self._ask(repository, now)
        except OSError:
            self._known = (self._key, None)  # There is no git, or no room for it.
            self._not_before = now + _AGAIN_SECONDS

    def _ask(self, repository: Repository, now: float) -> _Job:
        process = subprocess.Popen(
            [
                *("git", "-C", str(repository.worktree), "-c", "core.fsmonitor=false"),
                *("status", "--porcelain", "--untracked-files=no"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=self._environment,
            process_group=0,
        )
        job = _Job(process, self._key, now)
        os.set_blocking(_output(job), False)
        self._selector.register(_output(job), selectors.EVENT_READ, lambda: self._readable(job))
        return job

    def turn(self, now: float) -> None:
        """Take git's answer if it has ended, and end it if its time is up; for every turn of the loop."""
        job = self._job
        if job is None:
            return
        if now - job.began_at > DEADLINE_SECONDS:
            _kill(job)
        if job.process.poll() is None:
            return
        if not job.found:
            self._readable(job)
        self._ignore(job)
        if job.process.stdout is not None:
            job.process.stdout.close()
        self._job = None
        value = True if job.found else (False if job.process.returncode == 0 else None)
        self._known = (job.key, value)
        self._not_before = now + max(_AGAIN_SECONDS, _SHARE * (now - job.began_at))

    def _readable(self, job: _Job) -> None:
        try:
            job.found = job.found or bool(os.read(_output(job), 4096))
        except BlockingIOError:
            return
        self._ignore(job)
        if job.found:
            _kill(job)

    def _ignore(self, job: _Job) -> None:
        if job.waited_on:
            self._selector.unregister(_output(job))
            job.waited_on = False

    def close(self) -> None:
        """Kill the git that runs; what is left of it is nobody's to wait for."""
        if self._job is not None:
            _kill(self._job)
            self._ignore(self._job)


def _output(job: _Job) -> int:
    return job.process.stdout.fileno() if job.process.stdout is not None else -1


def _kill(job: _Job) -> None:
    """Kill git and what it has started."""
    if job.process.returncode is None:  # Not collected: its number is its own.
        with contextlib.suppress(OSError):
            os.killpg(job.process.pid, signal.SIGKILL)


def _is_ours(repository: Repository) -> bool:
    """Whether all that git would follow belongs to our own user."""
    mark = repository.worktree / ".git"
    try:
        places = (repository.worktree, repository.directory, repository.shared)
        owners = {mark.lstat().st_uid, *(place.stat().st_uid for place in places)}
    except OSError:
        return False
    return owners == {os.geteuid()}
