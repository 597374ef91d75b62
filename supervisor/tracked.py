"""Tracked: whether git tracks a file, read from the index of the repository that the file lies in.

The rule: a wrong *no* loses somebody's file, so whatever cannot be read or is not understood is an error and
never a no: an extension that the format requires to be understood (a split or a sparse index), an unknown
version. Git itself is never run (see :mod:`supervisor.git`). An index is read once, when it is first asked
about; only what ends in ``.pyc`` is kept of it.

Source: gitformat-index(5).
"""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

from supervisor import git
from supervisor.git import Repository

_VERSIONS = (2, 3, 4)
_COMPRESSED = 4
_IDENTITY_BYTES = (20, 32)
"""Of a SHA-1 and of a SHA-256 repository; the index does not say which, but only one of them adds up."""

_STAT_BYTES = 40
_FLAGS_BYTES = 2
_EXTENDED = 0x4000


class Tracked:
    """What the repositories around some files know of them."""

    def __init__(self) -> None:
        self._repositories: dict[str, Repository | None] = {}
        self._names: dict[Path, frozenset[bytes]] = {}

    def holds(self, path: str) -> bool:
        """Whether git tracks a file of bytecode; one that lies in no repository is tracked by nobody.

        Raises:
            OSError: that cannot be known.
        """
        folder, name = os.path.split(path)
        real = os.path.realpath(folder)
        if real not in self._repositories:
            self._repositories[real] = git.find(Path(real))
        repository = self._repositories[real]
        if repository is None:
            return False
        if repository.directory not in self._names:
            self._names[repository.directory] = bytecode_names(repository.index())
        relative = os.path.relpath(os.path.join(real, name), repository.worktree)
        return os.fsencode(relative) in self._names[repository.directory]


def bytecode_names(index: bytes | None) -> frozenset[bytes]:
    """Return the names in an index that end in ``.pyc``, relative to the worktree.

    Args:
        index: the whole file; None where there is none yet.

    Raises:
        OSError: it is not understood.
    """
    if index is None:
        return frozenset()
    for identity_bytes in _IDENTITY_BYTES:
        try:
            return _names(index, identity_bytes)
        except (ValueError, IndexError, struct.error):
            continue
    raise OSError(errno.EINVAL, "git's index is not understood")


def _names(index: bytes, identity_bytes: int) -> frozenset[bytes]:
    signature, version, count = struct.unpack_from(">4sLL", index)
    if signature != b"DIRC" or version not in _VERSIONS:
        raise ValueError
    names, name, at = set(), b"", 12
    for _ in range(count):
        flags_at = at + _STAT_BYTES + identity_bytes
        (flags,) = struct.unpack_from(">H", index, flags_at)
        name_at = flags_at + (2 * _FLAGS_BYTES if flags & _EXTENDED else _FLAGS_BYTES)
        common = 0
        if version == _COMPRESSED:
            dropped, name_at = _number(index, name_at)
            if dropped > len(name):
                raise ValueError
            common = len(name) - dropped
        end = index.index(b"\0", name_at)
        name = name[:common] + index[name_at:end]
        at = end + 1 if version == _COMPRESSED else at + (end - at + 8) // 8 * 8
        if name.endswith(b".pyc"):
            names.add(name)
    while at < len(index) - identity_bytes:  # What remains at the end is the checksum.
        signature, size = struct.unpack_from(">4sL", index, at)
        if not b"A" <= signature[:1] <= b"Z":
            raise ValueError
        at += 8 + size
    if at != len(index) - identity_bytes:
        raise ValueError
    return frozenset(names)


def _number(index: bytes, at: int) -> tuple[int, int]:
    """Return a number of variable width and where it ends."""
    value = index[at] & 0x7F
    while index[at] & 0x80:
        at += 1
        value = (value + 1 << 7) + (index[at] & 0x7F)
    return value, at + 1
