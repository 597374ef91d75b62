"""Blobs: source bytes kept under their sha256, so that a generation gets the bytes it was started from.

The rules: what is read back has the digest that was asked for, or an error is raised; and **what is put in is
there afterwards**, whatever was on disk before. A blob is written once, to a temporary name that is renamed,
so a reader never sees half of one; but a power cut may leave an empty file under a good name, and a cleaner
of old files may take one away, so what an earlier run left is compared before it is relied on. The manifests
that children start from lie beside the blobs, each under its tree digest.

One supervisor owns the directory (:mod:`supervisor.lock`): each removes what its own generations no longer
need, and two would remove each other's.

Rejected: handing the sources to the child in its start message (20,000 files are megabytes on each start),
and git's object store (the tree need not be a repository, and its owner may be another user).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

import msgspec

from supervisor.errors import BlobError
from supervisor.manifest import Manifest, Tree
from supervisor.sharded import Sharded


def place(directory: Path) -> Path:
    """Return where the blobs of a store in ``directory`` lie, whether it exists yet or not."""
    return directory / "blobs"


_Facts = tuple[int, int, int, int]


class BlobStore:
    """A directory of blobs and manifests, owned by one supervisor.

    Args:
        directory: is created with mode 0700 where it does not exist.

    Raises:
        OSError: the directory cannot be used.
    """

    def __init__(self, directory: Path) -> None:
        self.blobs = place(directory)
        self.manifests = directory / "manifests"
        for folder in (self.blobs, self.manifests):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = str(self.blobs)
        self._held: dict[str, int] = {}
        """Digest to size of what was seen whole by this process."""
        self._names: set[str] = set()
        self._names_of: _Facts | None = None
        """The folder's when it held these names; it is listed again when it is another."""
        self._whole = Sharded[str]({})
        """Sources all of which are among the names."""
        self._manifests: dict[str, _Facts] = {}
        """Tree digest to the facts of the file that this process has written or seen whole."""

    def put(self, content: bytes) -> str:
        """Keep ``content`` and return its sha256 in hexadecimal.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = f"{self._folder}/{digest}"
        if digest not in self._held or self._held[digest] != _size(path):
            if _content(path) != content:
                known = self._names_of is not None and _facts(self._folder) == self._names_of
                _write(path, content)
                if known:
                    self._names.add(digest)
                self._names_of = _facts(self._folder) if known else None
            self._held[digest] = len(content)
        return digest

    def holds(self, manifest: Manifest) -> bool:
        """Whether there is a blob for each source of a manifest; its bytes are not looked at.

        The folder is listed when it has changed: on the way of a reload that takes long in a large tree. What
        was taken away within a tick of the clock after we have put something is missed; then the child says
        so that misses it.
        """
        if self._names_of is None or _facts(self._folder) != self._names_of:
            self._list()
        altered, _ = self._whole.difference(manifest.sources)
        if not self._names.issuperset(altered.values()):
            return False
        self._whole = manifest.sources
        return True

    def distrust(self) -> None:
        """Compare with the disk whatever is put next: something there was not as it was left."""
        self._held.clear()
        self._manifests.clear()
        self._names_of = None

    def get(self, digest: str) -> bytes:
        """Return the bytes kept under ``digest``.

        Raises:
            BlobError: there are none, or they no longer have this digest.
        """
        try:
            content = (self.blobs / digest).read_bytes()
        except OSError as error:
            raise BlobError(f"the pinned source {digest} is not readable: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise BlobError(f"the pinned source {digest} is damaged on disk; remove {self.blobs / digest}")
        return content

    def manifest_file(self, manifest: Manifest) -> Path:
        """Return the file that :meth:`put_manifest` keeps a manifest in."""
        return self.manifests / f"{manifest.digest}.json"

    def put_manifest(self, manifest: Manifest) -> Path:
        """Keep ``manifest`` for children to start from and return its file.

        Raises:
            OSError: it cannot be written.
        """
        path = self.manifest_file(manifest)
        facts = self._manifests.get(manifest.digest)
        if facts is not None and facts == _facts(str(path)):
            return path
        body = {
            "base": manifest.base,
            "roots": manifest.roots,
            "sources": manifest.sources.plain(),
            "ignore": manifest.ignore,
        }
        try:
            content = msgspec.json.encode(body)  # For 5,000 sources a tenth of a millisecond instead of two.
        except UnicodeEncodeError:  # A name that is not UTF-8.
            content = json.dumps(body).encode()
        if _content(str(path)) != content:
            _write(str(path), content)
        facts = _facts(str(path))
        if facts is not None:
            self._manifests[manifest.digest] = facts
        return path

    def get_manifest(self, digest: str) -> Manifest:
        """Return the manifest kept under a tree digest.

        Raises:
            BlobError: there is none, or it or one of its sources is not what it was.
        """
        path = self.manifests / f"{digest}.json"
        try:
            body = json.loads(path.read_bytes())
            kept = Manifest.of(Tree(tuple(body["roots"]), tuple(body.get("ignore", ()))), body["sources"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BlobError(f"the manifest {path} is not readable: {error}") from error
        if kept.digest != digest:
            raise BlobError(f"the manifest {path} is damaged; remove it")
        for source in kept.sources.values():
            self.get(source)
        return kept

    def collect(self, keep: Collection[Manifest]) -> None:
        """Remove what none of ``keep`` needs, and what a killed run left half written.

        What cannot be removed is tried again the next time.
        """
        needed = {digest for manifest in keep for digest in manifest.sources.values()}
        self._names = _remove_others(self._folder, needed)
        self._names_of = _facts(self._folder)
        if not self._names.issuperset(self._whole.values()):
            self._whole = Sharded({})
        _remove_others(str(self.manifests), {f"{manifest.digest}.json" for manifest in keep})
        self._held = {digest: size for digest, size in self._held.items() if digest in needed}
        kept = {manifest.digest for manifest in keep}
        self._manifests = {digest: facts for digest, facts in self._manifests.items() if digest in kept}

    def _list(self) -> None:
        """Learn which blobs there are; one call, a stat for each of 20,000 takes long."""
        self._names_of, self._whole = _facts(self._folder), Sharded({})
        try:
            self._names = set(os.listdir(self._folder))
        except OSError:
            self._names, self._names_of = set(), None


def _facts(path: str) -> _Facts | None:
    """Return what tells a file or a folder from what it was before, None if it is not there."""
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _content(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


def _remove_others(folder: str, needed: Collection[str]) -> set[str]:
    """Remove the files of a folder that are not needed; return the names of those that are left."""
    try:
        names = set(os.listdir(folder))
    except OSError:
        return set()
    for name in names.difference(needed):
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/{name}")
            names.discard(name)
    return names


def _write(path: str, content: bytes) -> None:
    """Write a file that appears whole or not at all, readable by its owner only."""
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}")
    try:
        try:
            descriptor = _create(temporary)
        except FileNotFoundError:
            os.makedirs(folder, mode=0o700, exist_ok=True)  # A cleaner has taken that, too.
            descriptor = _create(temporary)
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        # A failed write does not name its file; whoever reads the reason wants to know where.
        raise OSError(error.errno, error.strerror, folder) from error


def _create(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
