"""Manifest: which source bytes the tree consists of, as one value.

A *tree* is a set of roots; every ``*.py`` below them belongs to it. A *manifest* maps each relative path to
the sha256 of the file's bytes, with one tree digest over all of them. A *snapshot* is a manifest with the
stat tuples that it was taken at, so that the next one reads only what may have changed.

The rule: **content decides, stat tuples only save work**, and a stat tuple saves work only when it can be
trusted. A tuple is (size, mtime_ns, ctime_ns, inode, device), compared for inequality: ``cp -p``, ``touch
-r`` and ``rsync -t`` restore the mtime, but none can restore the ctime. A file whose ctime is younger than
the clock's grain when it was read could change again within the same tick, so its tuple is not kept and the
next scan reads it again (git calls such entries *racily clean*: https://git-scm.com/docs/racy-git).

Paths are relative to the common parent of the roots, so that one value describes one root or several. Virtual
environments, ``.git``, ``node_modules`` and ``__pycache__`` belong to nobody's tree.

Rejected: comparing mtimes for "newer" (misses restored backups and roll-backs), watchdog's directory
snapshots (they compare mtimes), hashing everything on each scan (31 MB cost a third of a second).
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from supervisor.errors import SourceError

EXCLUDED_DIRECTORIES = frozenset({"__pycache__", ".git", "node_modules"})
"""Names of directories that belong to no tree, wherever they are."""

VENV_MARKER = "pyvenv.cfg"
"""A directory that holds this file is a virtual environment (PEP 405) and belongs to no tree."""

_STAT_GRAIN_NS = 20_000_000
"""Youngest age of a ctime that is trusted: two kernel ticks at 100 Hz, the coarsest that Linux runs at."""

_READ_ATTEMPTS = 5

StatTuple = tuple[int, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Tree:
    """The watched roots.

    Attributes:
        roots: absolute directories; nested roots count once.
    """

    roots: tuple[str, ...]

    @property
    def base(self) -> str:
        """The common parent of the roots: what the manifest's paths are relative to."""
        return os.path.commonpath(self.roots)

    def files(self) -> Iterator[tuple[str, str]]:
        """Yield (relative path, absolute path) of every source, in no particular order.

        Links to directories are followed, each real directory once. A root that does not exist yields
        nothing: it may come back, and until then the manifest is short, which is a change.
        """
        base = self.base
        seen: set[str] = set()
        for root in self.roots:
            yield from self._walk(root, base, seen)

    def directories(self) -> Iterator[str]:
        """Yield the absolute path of every directory that belongs to the tree."""
        seen: set[str] = set()
        for root in self.roots:
            for directory, _ in _descend(root, seen):
                yield directory

    def _walk(self, root: str, base: str, seen: set[str]) -> Iterator[tuple[str, str]]:
        for directory, names in _descend(root, seen):
            inside = os.path.relpath(directory, base).replace(os.sep, "/")
            prefix = "" if inside == "." else f"{inside}/"
            for name in names:
                yield prefix + name, f"{directory}{os.sep}{name}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What the tree consists of.

    Attributes:
        base: absolute directory that the paths are relative to.
        roots: absolute directories of the tree.
        sources: relative path (with ``/``) to sha256 of the source bytes, in hexadecimal.
        digest: one sha256 over all of them; equal digests are equal trees.
    """

    base: str
    roots: tuple[str, ...]
    sources: Mapping[str, str]
    digest: str

    @classmethod
    def of(cls, tree: Tree, sources: Mapping[str, str]) -> Manifest:
        """Return the manifest of ``sources`` in ``tree``, with its digest computed."""
        summary = hashlib.sha256()
        for path in sorted(sources):
            summary.update(f"{path}\0{sources[path]}\n".encode("utf-8", "surrogateescape"))
        return cls(tree.base, tree.roots, dict(sources), summary.hexdigest())

    def absolute(self, relative: str) -> str:
        """Return the absolute path of a source."""
        return os.path.join(self.base, *relative.split("/"))

    def changes(self, newer: Manifest) -> tuple[str, ...]:
        """Return the relative paths that were added, removed or altered between this one and ``newer``, sorted."""
        paths = self.sources.keys() | newer.sources.keys()
        return tuple(sorted(p for p in paths if self.sources.get(p) != newer.sources.get(p)))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A manifest with the trusted stat tuples of its files; what the next scan starts from.

    Attributes:
        manifest: the content.
        stats: relative path to stat tuple; a path is missing where the tuple could not be trusted.
    """

    manifest: Manifest
    stats: Mapping[str, StatTuple]


def scan(
    tree: Tree,
    previous: Snapshot | None,
    keep: Callable[[bytes], str],
    *,
    doubtful: Collection[str] = (),
    clock_ns: Callable[[], int] = time.time_ns,
) -> Snapshot:
    """Look at every file of the tree and return what it consists of now.

    Args:
        tree: where to look.
        previous: the last snapshot; files whose stat tuple equals its one are not read again. None reads all.
        keep: stores the bytes of a file that was read and returns their sha256 (:meth:`BlobStore.put`).
        doubtful: relative paths that are read whatever their stat tuple says.
        clock_ns: wall clock in nanoseconds, comparable with the file system's times.

    Raises:
        SourceError: a file of the tree cannot be read; nothing is known about the tree then.
    """
    known = previous.stats if previous else {}
    digests = previous.manifest.sources if previous else {}
    sources: dict[str, str] = {}
    stats: dict[str, StatTuple] = {}
    for relative, path in tree.files():
        try:
            now = _stat_tuple(os.stat(path))
        except FileNotFoundError:
            continue  # Deleted since the directory was listed, or a link that leads nowhere.
        except OSError as error:
            raise SourceError(path, error.strerror or str(error)) from error
        if known.get(relative) == now and relative not in doubtful:
            sources[relative], stats[relative] = digests[relative], now
            continue
        read = _read(path)
        if read is None:
            continue
        content, taken = read
        sources[relative] = keep(content)
        if clock_ns() - taken[2] > _STAT_GRAIN_NS:
            stats[relative] = taken
    unchanged = previous is not None and sources == previous.manifest.sources
    manifest = previous.manifest if unchanged and previous else Manifest.of(tree, sources)
    return Snapshot(manifest, stats)


def _read(path: str) -> tuple[bytes, StatTuple] | None:
    """Return bytes and stat tuple of a file that held still while it was read, or None if it is gone."""
    for _ in range(_READ_ATTEMPTS):
        try:
            with open(path, "rb") as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise SourceError(path, "it is not a regular file")
                content = file.read()
                after = os.fstat(file.fileno())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SourceError(path, error.strerror or str(error)) from error
        if _stat_tuple(before) == _stat_tuple(after):
            break
    # Still moving after the last attempt: whatever was read is a candidate that the next scan will replace, because
    # the tuple taken after the read is too young to be trusted.
    return content, _stat_tuple(after)


def _stat_tuple(facts: os.stat_result) -> StatTuple:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev


def _descend(root: str, seen: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (directory, names of its ``*.py`` files) below ``root``, each real directory once."""
    real = os.path.realpath(root)
    if real in seen:
        return
    seen.add(real)
    names: list[str] = []
    below: list[str] = []
    try:
        with os.scandir(root) as entries:
            for entry in entries:
                if entry.name == VENV_MARKER:
                    return
                if entry.is_dir():
                    if entry.name not in EXCLUDED_DIRECTORIES:
                        below.append(entry.path)
                elif entry.name.endswith(".py") and not _is_editor_temporary(entry.name):
                    names.append(entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise SourceError(root, error.strerror or str(error)) from error
    yield root, names
    for directory in below:
        yield from _descend(directory, seen)


def _is_editor_temporary(name: str) -> bool:
    """Whether an editor made this file for itself: Emacs' locks and auto-saves. (vim's end in ``.swp`` or ``~``.)"""
    return name.startswith((".#", "#"))


def source_roots(paths: Collection[Path]) -> tuple[str, ...]:
    """Return the roots as absolute strings, sorted, without those that lie below another one."""
    absolute = sorted({os.path.abspath(p) for p in paths})
    return tuple(
        path
        for path in absolute
        if not any(path != other and os.path.commonpath((path, other)) == other for other in absolute)
    )
