"""Blobs: source bytes kept under their sha256, so that a generation always gets the bytes it was started
from.

The rule: what is read back has the digest that was asked for, or an error is raised. A blob is written once,
to a temporary name that is renamed, so a reader never sees half of one. The manifests that children start
from lie beside the blobs, each under its tree digest.

Rejected: handing the sources to the child in its start message (20,000 files are megabytes on each start),
and git's object store (the tree need not be a repository, and its owner may be another user).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path

from supervisor.errors import BlobError
from supervisor.manifest import Manifest


class BlobStore:
    """A directory of blobs and manifests, owned by one supervisor.

    Args:
        directory: is created with mode 0700 where it does not exist.
    """

    def __init__(self, directory: Path) -> None:
        self.blobs = directory / "blobs"
        self.manifests = directory / "manifests"
        for folder in (self.blobs, self.manifests):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._held = {path.name for path in self.blobs.iterdir()}

    def put(self, content: bytes) -> str:
        """Keep ``content`` and return its sha256 in hexadecimal."""
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self._held:
            _write(self.blobs / digest, content)
            self._held.add(digest)
        return digest

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

    def put_manifest(self, manifest: Manifest) -> Path:
        """Keep ``manifest`` for children to start from and return its file."""
        path = self.manifests / f"{manifest.digest}.json"
        if not path.exists():
            body = {"base": manifest.base, "roots": manifest.roots, "sources": dict(manifest.sources)}
            _write(path, json.dumps(body).encode())
        return path

    def collect(self, keep: Collection[Manifest]) -> None:
        """Remove every blob and manifest that none of ``keep`` needs."""
        needed = {digest for manifest in keep for digest in manifest.sources.values()}
        for digest in self._held - needed:
            (self.blobs / digest).unlink(missing_ok=True)
        self._held &= needed
        names = {f"{manifest.digest}.json" for manifest in keep}
        for path in self.manifests.iterdir():
            if path.name not in names:
                path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, readable by its owner only."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 -- takes over the descriptor
        file.write(content)
    temporary.replace(path)
