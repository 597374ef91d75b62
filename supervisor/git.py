"""Git facts: which commit the tree stands at, and whether git is in the middle of changing it.

The rule: read git's files, never run git: it refuses a repository of another owner, and ``git status`` may
run filters and monitors that the repository's configuration names. Whether the tree is *dirty* is therefore
not known here. What is read is somebody else's: only the name of a commit comes out, or None; a pipe under a
good name is not waited for.

A repository that keeps its references in a reftable has a commit that is not found here: None.

Source: gitrepository-layout(5).
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

STALE_LOCK_SECONDS = 60.0
"""A lock file older than this was left behind by a git that died."""

_MAX_LINKS = 5
_MAX_REFERENCE_BYTES = 4096
_MAX_INDEX_BYTES = 256 * 1024**2
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


@dataclass(frozen=True)
class Repository:
    """A git directory.

    Attributes:
        directory: the one that holds ``HEAD`` and ``index`` (of the worktree, where there are several).
        worktree: the folder whose files it tracks.
    """

    directory: Path
    worktree: Path

    def commit(self) -> str | None:
        """Return the full name of the commit that HEAD stands at.

        None where it has none yet or cannot be read.
        """
        common = _read(self.directory / "commondir")
        shared = (self.directory / common).resolve() if common else self.directory
        value = _read(self.directory / "HEAD")
        for _ in range(_MAX_LINKS):
            if value is None or not value.startswith("ref: "):
                break
            name = value.removeprefix("ref: ")
            value = _read(self.directory / name) or _read(shared / name) or _packed(shared, name)
        return value if value is not None and _COMMIT.fullmatch(value) else None

    def index(self) -> bytes | None:
        """Return the index, which names all tracked files; None where there is none yet.

        Raises:
            OSError: it cannot be read.
        """
        path = self.directory / "index"
        try:
            with open(path, "rb", opener=_open_without_waiting) as file:
                content = file.read(_MAX_INDEX_BYTES + 1)
        except FileNotFoundError:
            return None
        if len(content) > _MAX_INDEX_BYTES:
            raise OSError(errno.EFBIG, "it is larger than any index", str(path))
        return content

    def is_changing(self) -> bool:
        """Whether a running git holds the index: its checkout is not complete."""
        try:
            age_seconds = time.time() - (self.directory / "index.lock").stat().st_mtime
        except OSError:
            return False
        # A lock from the future is as doubtful as an old one: the clock was set back since.
        return abs(age_seconds) < STALE_LOCK_SECONDS


def find(start: Path) -> Repository | None:
    """Return the repository that ``start`` lies in, by its name or by its real place, or None."""
    real = start.resolve()
    for folder in (start, *start.parents, real, *real.parents):
        mark = folder / ".git"
        if _holds_head(mark):
            return Repository(mark, folder)
        if (text := _read(mark)) is not None and text.startswith("gitdir: "):
            return Repository((folder / text.removeprefix("gitdir: ")).resolve(), folder)
    return None


def _holds_head(directory: Path) -> bool:
    try:
        (directory / "HEAD").lstat()
    except PermissionError:
        return True  # Somebody's private repository; what it says cannot be known.
    except OSError:
        return False
    return True


def _read(path: Path, size: int = _MAX_REFERENCE_BYTES) -> str | None:
    """Return the text of a regular file up to a size, stripped; None for anything else."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return file.read(size).decode().strip()
    except (OSError, ValueError):  # A name out of a file may hold anything, a zero byte as well.
        return None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _packed(directory: Path, name: str) -> str | None:
    """Return the commit of a reference that has no file of its own."""
    path = directory / "packed-refs"
    try:
        facts = path.stat()
    except OSError:
        return None
    return _packed_references(path, (facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)).get(
        name
    )


@functools.lru_cache(maxsize=4)
def _packed_references(path: Path, _facts: tuple[int, int, int, int]) -> Mapping[str, str]:
    """Return all packed references; kept while the file is as it was, because it may be megabytes long."""
    text = _read(path, -1) or ""
    pairs = (line.partition(" ") for line in text.splitlines())
    return {name: commit for commit, _, name in pairs}
