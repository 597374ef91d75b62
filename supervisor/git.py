"""Git facts: which commit the tree stands at, and whether git is in the middle of changing it.

The rule: read git's files, never run git: it refuses a repository of another owner, and ``git status`` may
run filters and monitors that the repository's configuration names. Whether the tree is *dirty* is therefore
not known here.

Source: gitrepository-layout(5).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

STALE_LOCK_SECONDS = 60.0
"""A lock file older than this was left behind by a git that died."""

_MAX_LINKS = 5


@dataclass(frozen=True)
class Repository:
    """A git directory.

    Attributes:
        directory: the one that holds ``HEAD`` and ``index`` (of the worktree, where there are several).
    """

    directory: Path

    def commit(self) -> str | None:
        """Return the full name of the commit that HEAD stands at; None where it has none yet or cannot be read."""
        common = _read(self.directory / "commondir")
        shared = (self.directory / common).resolve() if common else self.directory
        value = _read(self.directory / "HEAD")
        for _ in range(_MAX_LINKS):
            if value is None or not value.startswith("ref: "):
                return value
            name = value.removeprefix("ref: ")
            value = _read(self.directory / name) or _read(shared / name) or _packed(shared, name)
        return None

    def is_changing(self) -> bool:
        """Whether a running git holds the index: its checkout is not complete."""
        try:
            age_seconds = time.time() - (self.directory / "index.lock").stat().st_mtime
        except OSError:
            return False
        return age_seconds < STALE_LOCK_SECONDS


def find(start: Path) -> Repository | None:
    """Return the repository that ``start`` lies in, or None."""
    for folder in (start, *start.parents):
        mark = folder / ".git"
        if mark.is_dir():
            return Repository(mark)
        if (text := _read(mark)) is not None and text.startswith("gitdir: "):
            return Repository((folder / text.removeprefix("gitdir: ")).resolve())
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _packed(directory: Path, name: str) -> str | None:
    for line in (_read(directory / "packed-refs") or "").splitlines():
        commit, _, reference = line.partition(" ")
        if reference == name:
            return commit
    return None
