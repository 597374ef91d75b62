"""File systems: whether the kernel hears of every change of a file.

The rule: **events are believed only where all changes go through this kernel.** On a network file system, or
one that a program or a hypervisor serves, others change files behind its back: its own changes give events,
so such a root looks well watched until somebody deploys from another machine.

An overlay gives events for whatever is changed through its mount, and is taken for local; changing the layers
below it is undefined by its own documentation (https://docs.kernel.org/filesystems/overlayfs.html).
``fuseblk`` is a block device of this machine and local as well.

Source: proc_pid_mountinfo(5). Rejected: asking statfs(2) for the magic number (FUSE has one number for all,
and Python has no call for it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_SERVED_BY_OTHERS = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "cifs",
            "smb3",
            "smbfs",
            "afs",
            "ceph",
            "coda",
            "glusterfs",
            "lustre",
            "gpfs",
            "beegfs",
        ),
        *("ocfs2", "gfs2", "9p", "virtiofs", "vboxsf", "prl_fs", "fuse"),
    }
)
_OCTAL = re.compile(r"\\([0-7]{3})")


class FileSystems:
    """The mounts of this process.

    Args:
        table: the kernel's list of them.
    """

    def __init__(self, table: Path = Path("/proc/self/mountinfo")) -> None:
        self._table = table
        self._text = ""
        self._types: Mapping[str, str] = {}

    def without_all_events(self, path: str) -> str | None:
        """Return the type of the file system that holds ``path`` if it may change without an event."""
        kind = self._type(os.path.realpath(path))
        return kind if kind in _SERVED_BY_OTHERS or kind.startswith("fuse.") else None

    def _type(self, path: str) -> str:
        types = self._read()
        while path not in types and path != os.path.dirname(path):
            path = os.path.dirname(path)
        return types.get(path, "")

    def _read(self) -> Mapping[str, str]:
        try:
            text = self._table.read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return {}
        if text != self._text:
            self._text, self._types = text, dict(_parse(line) for line in text.splitlines())
        return self._types


def _parse(line: str) -> tuple[str, str]:
    """Return mount point and type; of several mounts on one point the last line is the one on top."""
    left, _, right = line.partition(" - ")
    point = left.split(" ")[4].encode("utf-8", "surrogateescape").decode("latin-1")
    unescaped = _OCTAL.sub(lambda found: chr(int(found[1], 8)), point)
    return unescaped.encode("latin-1").decode("utf-8", "surrogateescape"), right.split(" ")[0]
