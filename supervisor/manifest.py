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
environments, ``.git``, ``node_modules`` and ``__pycache__`` belong to nobody's tree, nor does what its owner
has left out (:mod:`supervisor.child.ignored`). A directory that links lead to belongs to the tree under each
of its names, because the program may import it under any of them.

No look at the tree can block: what is not a regular file (a pipe, a device) or is too large for a source is
never read. It is an error, and so is a root that is not there: nothing is known about the tree then, and
whoever has last seen it keeps what they know.

Rejected: comparing mtimes for "newer" (misses restored backups and roll-backs), watchdog's directory
snapshots (they compare mtimes), hashing everything on each scan (31 MB cost a third of a second), taking each
real directory once (which of its names wins would depend on the order of a directory listing).
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from supervisor.child.ignored import is_ignored, is_left_out
from supervisor.errors import SourceError
from supervisor.sharded import Sharded

EXCLUDED_DIRECTORIES = frozenset({"__pycache__", ".git", "node_modules"})
"""Names of directories that belong to no tree, wherever they are."""

VENV_MARKER = "pyvenv.cfg"
"""A directory that holds this file is a virtual environment (PEP 405) and belongs to no tree."""

_GIT_MARKER = ".git"
"""A directory that holds this, a directory or a file, is a worktree of git."""

_VENV_LIBRARY = "site-packages"
"""What is left out of a root that is itself a virtual environment (``python -m venv .`` in the project)."""

_STAT_GRAIN_NS = 20_000_000
"""Youngest age of a ctime that is trusted: two kernel ticks at 100 Hz, the coarsest that Linux runs at."""

_SECOND_NS = 1_000_000_000
_COARSE_GRAIN_NS = 2 * _SECOND_NS
"""The same for a ctime of whole seconds: its file system may keep no more than that (FAT: two seconds)."""

_READ_ATTEMPTS = 5

_MAX_LINKS_IN_PATH = 3
"""Links to directories that one path may go through; without a bound, twelve directories that link to each
other have more names than can be listed."""

_LEADS_NOWHERE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG})
"""Deleted since it was listed, a link that leads nowhere, or too deep: nothing that can be imported."""

_MAX_SOURCE_BYTES = 32 * 1024**2
"""What is larger is no source, whatever its name, and reading it would hold the main loop."""

StatTuple = tuple[int, int, int, int, int]


class Tree(Struct, frozen=True):
    """The watched roots.

    Attributes:
        roots: absolute directories; nested roots count once.
        ignore: patterns of what is left out.
    """

    roots: tuple[str, ...]
    ignore: tuple[str, ...] = ()

    @property
    def base(self) -> str:
        """The common parent of the roots: what the manifest's paths are relative to."""
        return os.path.commonpath(self.roots)

    def directories(self, root: str) -> Iterator[str]:
        """Yield the absolute path of every directory below one of the roots that belongs to the tree.

        Raises:
            SourceError: the root cannot be listed.
        """
        for folder in self._folders((root,)):
            yield folder.path

    def ignores(self, path: str) -> bool:
        """Whether an absolute path below a root is left out by a pattern."""
        return is_ignored(self.ignore, self._prefix(path).rstrip("/"))

    def _prefix(self, directory: str) -> str:
        inside = os.path.relpath(directory, self.base).replace(os.sep, "/")
        return "" if inside == "." else f"{inside}/"

    def folders(self) -> Iterator[Folder]:
        """Yield every directory that belongs to the tree, each name of a directory once.

        The order is nobody's. Links to directories are followed, except into one that encloses the link.

        Raises:
            SourceError: a root cannot be listed.
        """
        return self._folders(self.roots)

    def _folders(self, roots: tuple[str, ...]) -> Iterator[Folder]:
        seen: set[str] = set()
        for root in roots:
            pending = [] if self.ignores(root) else [_Place(root)]
            while pending:
                place = pending.pop()
                if place.path in seen:
                    continue
                seen.add(place.path)
                listing = _list(place, is_root=place.path == root)
                if listing is None:
                    continue
                prefix = self._prefix(place.path)
                sources = [n for n in listing.sources if not is_left_out(self.ignore, prefix + n, n)]
                yield Folder(place.path, prefix, sources, is_worktree=listing.is_worktree)
                for below in listing.below:
                    name = os.path.basename(below.path)
                    if not is_left_out(self.ignore, prefix + name, name):
                        pending.append(below)


class Folder(Struct, frozen=True):
    """A directory of the tree.

    Attributes:
        path: absolute.
        prefix: what the relative paths of its files begin with: empty, or with a slash at the end.
        sources: names of its ``*.py`` files.
        is_worktree: a repository of git begins here.
    """

    path: str
    prefix: str
    sources: list[str]
    is_worktree: bool


class Manifest(Struct, frozen=True):
    """What the tree consists of.

    Attributes:
        base: absolute directory that the paths are relative to.
        roots: absolute directories of the tree.
        sources: relative path (with ``/``) to sha256 of the source bytes, in hexadecimal.
        digest: one sha256 over all of them; equal digests are equal trees.
        ignore: patterns of what was left out of it.
    """

    base: str
    roots: tuple[str, ...]
    sources: Sharded[str]
    digest: str
    ignore: tuple[str, ...] = ()

    @classmethod
    def of(cls, tree: Tree, sources: Mapping[str, str]) -> Manifest:
        """Return the manifest of ``sources`` in ``tree``, with its digest computed."""
        sharded = sources if isinstance(sources, Sharded) else Sharded(sources)
        return cls(tree.base, tree.roots, sharded, sharded.digest(), tree.ignore)

    def absolute(self, relative: str) -> str:
        """Return the absolute path of a source."""
        return os.path.join(self.base, *relative.split("/"))

    def changes(self, newer: Manifest) -> tuple[str, ...]:
        """Return the relative paths added, removed or altered between this one and ``newer``, sorted."""
        altered, gone = self.sources.difference(newer.sources)
        return tuple(sorted([*altered, *gone]))


class Snapshot(Struct, frozen=True):
    """A manifest with the trusted stat tuples of its files; what the next scan starts from.

    Attributes:
        manifest: the content.
        stats: relative path to stat tuple; a path is missing where the tuple could not be trusted.
        aliased: some file has two names, so a change under the one is a change under the other.
        worktrees: absolute directories in which a repository of git begins.
    """

    manifest: Manifest
    stats: Sharded[StatTuple]
    aliased: bool = False
    worktrees: tuple[str, ...] = ()

    def touched(self, newer: Snapshot) -> set[str]:
        """Return the paths whose stat tuples a newer one has otherwise, whatever their content."""
        altered, _ = self.stats.difference(newer.stats)
        return {path for path in altered if path in self.stats}


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
        SourceError: a file of the tree cannot be read or kept; nothing is known about the tree then.
    """
    known = previous.stats.plain() if previous else {}
    digests = previous.manifest.sources.plain() if previous else {}
    sources: dict[str, str] = {}
    stats: dict[str, StatTuple] = {}
    files: set[tuple[int, int]] = set()
    worktrees: list[str] = []
    for relative, path in _files(tree, worktrees):
        facts = _look(path)
        if facts is None:
            continue
        files.add((facts.st_dev, facts.st_ino))
        now = _stat_tuple(facts)
        if known.get(relative) == now and relative not in doubtful:
            sources[relative], stats[relative] = digests[relative], now
            continue
        read = _read(path)
        if read is None:
            continue
        content, taken = read
        sources[relative] = _keep(keep, content, path)
        if _is_trusted(taken, clock_ns()):
            stats[relative] = taken
    for relative in sorted(digests.keys() - sources.keys()):
        _look(os.path.join(tree.base, relative))  # It was a source: now it is gone, or an error.
    unchanged = previous is not None and sources == digests
    manifest = previous.manifest if unchanged and previous else Manifest.of(tree, sources)
    aliased = len(files) < len(sources)
    return Snapshot(manifest, Sharded(stats), aliased=aliased, worktrees=tuple(worktrees))


def look_again(
    previous: Snapshot,
    paths: Collection[str],
    keep: Callable[[bytes], str],
    *,
    clock_ns: Callable[[], int] = time.time_ns,
) -> Snapshot | None:
    """Return what the tree consists of if nothing but the content of some of its sources has changed.

    Takes no longer for a large tree. The snapshot has the manifest of the previous one if it is the same.

    Args:
        previous: the last snapshot.
        paths: relative paths of what may have changed; all of them are read.
        keep: stores the bytes of a file and returns their sha256.
        clock_ns: wall clock in nanoseconds.

    Returns:
        None where more may have changed: a path was no source before or is no plain file now, or a file has
        two names. :func:`scan` finds out.

    Raises:
        SourceError: a file cannot be read or kept.
    """
    known = previous.manifest
    if previous.aliased or any(path not in known.sources for path in paths):
        return None
    changed: dict[str, str] = {}
    trusted: dict[str, StatTuple] = {}
    for relative in paths:
        path = known.absolute(relative)
        plain = not os.path.islink(path) and _look(path) is not None
        read = _read(path) if plain else None
        if read is None:
            return None
        content, taken = read
        digest = _keep(keep, content, path)
        if digest != known.sources[relative]:
            changed[relative] = digest
        if _is_trusted(taken, clock_ns()):
            trusted[relative] = taken
    stats = previous.stats.changed(trusted, gone=[path for path in paths if path not in trusted])
    newer = known
    if changed:
        newer = Manifest.of(Tree(known.roots, known.ignore), known.sources.changed(changed))
    return Snapshot(newer, stats, worktrees=previous.worktrees)


def _files(tree: Tree, worktrees: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (relative path, absolute path) of every source, and collect the worktrees on the way."""
    for folder in tree.folders():
        if folder.is_worktree:
            worktrees.append(folder.path)
        for name in folder.sources:
            yield folder.prefix + name, os.path.join(folder.path, name)


def source_roots(paths: Collection[Path]) -> tuple[str, ...]:
    """Return the roots as absolute strings, sorted, without those that lie below another one."""
    absolute = sorted({os.path.abspath(p) for p in paths})
    return tuple(
        path
        for path in absolute
        if not any(path != other and os.path.commonpath((path, other)) == other for other in absolute)
    )


def is_source(name: str) -> bool:
    """Whether a file of this name is one, and not an editor's own: Emacs' locks and auto-saves.

    (vim's end in ``.swp`` or ``~``.)
    """
    return name.endswith(".py") and not name.startswith((".#", "#"))


# --- one file ---------------------------------------------------------------------------------------------


def _look(path: str) -> os.stat_result | None:
    """Return the facts of a regular file, or None if there is nothing; open nothing."""
    try:
        facts = os.stat(path)
    except OSError as error:
        if error.errno in _LEADS_NOWHERE:
            return None
        raise SourceError(path, error.strerror or str(error)) from error
    _refuse_what_is_no_source(facts, path)
    return facts


def _refuse_what_is_no_source(facts: os.stat_result, path: str) -> None:
    remedy = "move it out of the watched tree"
    if not stat.S_ISREG(facts.st_mode):
        raise SourceError(path, "it is not a regular file", remedy)
    if facts.st_size > _MAX_SOURCE_BYTES:
        raise SourceError(path, f"it has {facts.st_size} bytes, which is too large for a source", remedy)


def _read(path: str) -> tuple[bytes, StatTuple] | None:
    """Return bytes and stat tuple of a file that held still while it was read, or None if it is gone."""
    for _ in range(_READ_ATTEMPTS):
        try:
            # What was a file a moment ago may be a pipe by now, and opening one would block.
            with open(path, "rb", opener=_open_without_waiting) as file:
                before = os.fstat(file.fileno())
                _refuse_what_is_no_source(before, path)
                content = file.read(before.st_size)
                after = os.fstat(file.fileno())
        except OSError as error:
            if error.errno in _LEADS_NOWHERE:
                return None
            raise SourceError(path, error.strerror or str(error)) from error
        if _stat_tuple(before) == _stat_tuple(after):
            break
    # Still moving after the last attempt: whatever was read is a candidate that the next scan will replace,
    # because the tuple taken after the read is too young to be trusted.
    return content, _stat_tuple(after)


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _keep(keep: Callable[[bytes], str], content: bytes, path: str) -> str:
    try:
        return keep(content)
    except OSError as error:
        why = f"its bytes cannot be kept in {error.filename}: {error.strerror or error}"
        raise SourceError(path, why, "free some space there or make it writable") from error


def _stat_tuple(facts: os.stat_result) -> StatTuple:
    return facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev


def _is_trusted(taken: StatTuple, now_ns: int) -> bool:
    """Whether any later change of the file must show in its stat tuple."""
    _, _, ctime_ns, _, _ = taken
    grain_ns = _STAT_GRAIN_NS if ctime_ns % _SECOND_NS else _COARSE_GRAIN_NS
    return now_ns - ctime_ns > grain_ns


# --- one directory ----------------------------------------------------------------------------------------


class _Place(Struct, frozen=True):
    """A directory on the way down from a root.

    Attributes:
        path: its name on this way.
        excluded: names of directories that do not belong to the tree here.
        links_from: the real directories that held the links on this way.
    """

    path: str
    excluded: frozenset[str] = EXCLUDED_DIRECTORIES
    links_from: tuple[str, ...] = ()

    def below(self, path: str) -> _Place:
        return _Place(path, self.excluded, self.links_from)

    def behind(self, link: str) -> _Place | None:
        """Return where a link leads to, None if that encloses this place or is too many links away."""
        if len(self.links_from) >= _MAX_LINKS_IN_PATH:
            return None
        way = (*self.links_from, os.path.realpath(self.path))
        target = os.path.realpath(link)
        if any(os.path.commonpath((target, place)) == target for place in way):
            return None
        return _Place(link, self.excluded, way)


class _Listing(Struct, frozen=True):
    sources: list[str]
    below: list[_Place]
    is_worktree: bool


def _list(place: _Place, *, is_root: bool) -> _Listing | None:
    """Return what of a directory belongs to the tree, None if it does not belong there itself."""
    try:
        with os.scandir(place.path) as entries:
            names = {entry.name: entry for entry in entries}
    except OSError as error:
        # The importer finds nothing in a directory that it may not list, and neither do we: a service does
        # not need its neighbour's private data folder (one that held sources is another matter). A root that
        # may not be listed is a mistake; one that is not there may come back, and is no reason to take its
        # code for deleted.
        if not is_root and (error.errno in _LEADS_NOWHERE or isinstance(error, PermissionError)):
            return None
        if error.errno in _LEADS_NOWHERE:
            raise SourceError(place.path, error.strerror or str(error), "put it back") from error
        raise SourceError(place.path, error.strerror or str(error)) from error
    if VENV_MARKER in names:
        if not is_root:
            return None
        place = _Place(place.path, place.excluded | {_VENV_LIBRARY}, place.links_from)
    listing = _Listing([], [], _GIT_MARKER in names)
    for name, entry in names.items():
        if _is_directory(entry):
            if name not in place.excluded:
                below = place.behind(entry.path) if entry.is_symlink() else place.below(entry.path)
                listing.below.extend([below] if below else [])
        elif is_source(name):
            listing.sources.append(name)
    return listing


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # A link in a circle, or into a place that may not be looked at: nothing to descend to.
