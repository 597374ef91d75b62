"""Git facts: where HEAD of a repository stands, and which files git locks while it works.

The rule: read git's files, never run git: it refuses a repository of another owner, and ``git status`` may
run filters and monitors that the repository's configuration names (:mod:`supervisor.dirty` runs it where the
repository is our own). What is read is somebody else's: only the name of a commit and of a branch come out,
or None; a pipe under a good name is not waited for.

A repository that keeps its references in a reftable has a commit that is not found here: None. So has one
whose ``.git`` is a file that leads nowhere. A worktree without a ``.git`` of its own (a bare repository with
``--work-tree``) cannot be found.

Source: gitrepository-layout(5), git-check-ref-format(1).
"""

from __future__ import annotations

import errno
import functools
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_MAX_LINKS = 5
_MAX_REFERENCE_BYTES = 4096
_MAX_INDEX_BYTES = 256 * 1024**2
_COMMIT = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_BRANCH = "refs/heads/"
_NO_BRANCH = re.compile(r"[\s~^:?*\[\\]|\.\.|@\{|(?:^|/)\.|\.lock(?:/|$)|//|[/.]$|^$")
"""What no name of a branch has in it (and none in a reftable, whose HEAD names ``.invalid``)."""

_LOCKS = ("index.lock", "HEAD.lock")
"""Held while git writes files and index, and while it moves HEAD, which it does last."""


@dataclass(frozen=True)
class Head:
    """Where HEAD stands.

    Attributes:
        commit: its full name; None where there is none yet, or where it cannot be read.
        branch: None if HEAD is detached, or if that cannot be read.
    """

    commit: str | None = None
    branch: str | None = None


@dataclass(frozen=True)
class Repository:
    """A git directory.

    Attributes:
        directory: the one that holds ``HEAD`` and ``index`` (of the worktree, where there are several).
        worktree: the folder whose files it tracks.
    """

    directory: Path
    worktree: Path

    @property
    def shared(self) -> Path:
        """The directory of what all worktrees have in common: references and configuration."""
        common = _read(self.directory / "commondir")
        return real(self.directory / common) if common else self.directory

    @property
    def locks(self) -> tuple[Path, ...]:
        """The files that are there while git works on this worktree."""
        return tuple(self.directory / name for name in _LOCKS)

    def head(self) -> Head:
        """Return where HEAD stands."""
        shared, name = self.shared, ""
        value = _read(self.directory / "HEAD")
        for _ in range(_MAX_LINKS):
            if value is None or not value.startswith("ref: "):
                break
            name = value.removeprefix("ref: ")
            value = _read(self.directory / name) or _read(shared / name) or _packed(shared, name)
        commit = value if value is not None and _COMMIT.fullmatch(value) else None
        return Head(commit, _branch(name))

    def written(self) -> tuple[int, int, int] | None:
        """Return what is different after git has written the index; None where there is none."""
        try:
            facts = (self.directory / "index").stat()
        except OSError:
            return None
        return facts.st_ino, facts.st_size, facts.st_mtime_ns

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


def find(start: Path) -> Repository | None:
    """Return the repository that ``start`` lies in, by its real place or else by its name, or None."""
    place = real(start)
    for folder in (place, *place.parents, start, *start.parents):
        if (repository := at(folder)) is not None:
            return repository
    return None


def at(folder: Path) -> Repository | None:
    """Return the repository whose worktree begins with this folder, or None."""
    mark = folder / ".git"
    if _holds_head(mark):
        return Repository(mark, folder)
    if (text := _read(mark)) is not None and text.startswith("gitdir: "):
        return Repository(real(folder / text.removeprefix("gitdir: ")), folder)
    return None


def real(path: Path) -> Path:
    """Return where a path leads; ``Path.resolve`` refuses one that leads in a circle."""
    return Path(os.path.realpath(path))


def _branch(reference: str) -> str | None:
    """Return the branch that a reference names; what git would not call so is not passed on."""
    name = reference.removeprefix(_BRANCH)
    if name == reference or not name.isprintable() or _NO_BRANCH.search(name):
        return None
    return name


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
            text = file.read(size).decode().strip()
    except (OSError, ValueError):  # A name out of a file may hold anything.
        return None
    return text if "\0" not in text else None  # No name has a zero byte in it, and no call takes one.


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
