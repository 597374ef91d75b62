"""Processes: what the kernel says of those that are not ours to wait for.

The rule: reading never fails. A process that is gone, hidden or somebody else's is None or empty; so is every
process where there is no ``/proc`` (macOS). A pid alone names nobody: with its start time it does.

Rejected: ``psutil`` (3 ms for the descendants of a process, on the way of every handover; a look at our own
children takes 30 microseconds, and the session is not in it).

Source: proc(5).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

_PROC = "/proc"


class Identity(Struct, frozen=True):
    """What tells a process from every other one that had or will have its pid.

    Attributes:
        pid: its process id.
        start_ticks: when it was started, in clock ticks since boot (field 22 of ``/proc/PID/stat``).
        boot_id: of the boot that this counts from.
    """

    pid: int
    start_ticks: int
    boot_id: str


class Process(Struct, frozen=True):
    """A process at the moment when it was read.

    Attributes:
        pid: its process id.
        name: of its program, at most 15 characters that can be printed.
        state: letter of its main thread: R runs, S sleeps, D waits in the kernel, T was stopped, t is being
            debugged, Z has ended.
        parent: pid of its parent.
        session: pid of the leader of its session, who may be gone.
        start_ticks: when it was started, in clock ticks since boot.
        memory_bytes: of its address space; 0 for one that is about to end, or has.
    """

    pid: int
    name: str
    state: str
    parent: int
    session: int
    start_ticks: int
    memory_bytes: int

    @property
    def key(self) -> tuple[int, int]:
        """Pid and start time: equal for the same process, whatever has become of it since."""
        return self.pid, self.start_ticks

    def __str__(self) -> str:
        return f"{self.pid} ({self.name})"


def identify(pid: int) -> Identity | None:
    """Return what a process can be recognised by later, None if there is no such process."""
    process = read(pid)
    return Identity(pid, process.start_ticks, boot_id()) if process is not None else None


def boot_id() -> str:
    """Return the name of this boot of the machine."""
    return content("sys/kernel/random/boot_id").decode("ascii", "replace").strip()


def read(pid: int) -> Process | None:
    """Return a process, None if there is none."""
    # The name may hold anything, brackets and spaces as well: what follows begins after the last bracket.
    before, _, after = content(f"{pid}/stat").rpartition(b")")
    fields = after.split()
    if not fields:
        return None
    name = before.partition(b"(")[2].decode("utf-8", "replace")
    return Process(
        pid=pid,
        name="".join(character if character.isprintable() else "?" for character in name),
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        start_ticks=int(fields[19]),
        memory_bytes=int(fields[20]),
    )


def table() -> dict[int, Process]:
    """Return all processes by their pid; takes some 8 microseconds for each."""
    processes = (read(int(name)) for name in _names(_PROC) if name.isdigit())
    return {process.pid: process for process in processes if process is not None}


def children(pid: int) -> list[int]:
    """Return the pids of a process's children, those that ended and wait to be collected as well.

    Of another process it may miss some that come and go. Of ourselves it misses none: only we take one away.
    """
    found = []
    try:
        for task in _names(f"{_PROC}/{pid}/task"):
            found += [int(c) for c in Path(f"{_PROC}/{pid}/task/{task}/children").read_bytes().split()]
    except (
        FileNotFoundError
    ):  # A thread ended just now, or the kernel was built without CONFIG_PROC_CHILDREN.
        return [process.pid for process in table().values() if process.parent == pid]
    except OSError:
        return []  # The process ended just now.
    return found


def descendants(pid: int) -> Iterator[Process]:
    """Yield the children of a process, their children, and so on."""
    pending = children(pid)
    while pending:
        process = read(pending.pop())
        if process is not None:
            yield process
            pending += children(process.pid)


def environment(pid: int) -> dict[bytes, bytes]:
    """Return the environment that a process started its program with; empty if we may not read it."""
    entries = content(f"{pid}/environ").split(b"\0")
    return {name: value for name, _, value in (entry.partition(b"=") for entry in entries)}


def arguments(pid: int) -> list[bytes]:
    """Return the command line of a process; empty if it has none, or if its processes are hidden from us."""
    return content(f"{pid}/cmdline").split(b"\0")[:-1]


def owner(pid: int) -> int | None:
    """Return the user whom a process works for, None if it is gone."""
    try:
        return Path(f"{_PROC}/{pid}").stat().st_uid
    except OSError:
        return None


def directory(pid: int) -> Path | None:
    """Return the working directory of a process; None if we may not know."""
    try:
        return Path(f"{_PROC}/{pid}/cwd").readlink()
    except OSError:
        return None


def has_open(pid: int, path: Path, facts: os.stat_result) -> bool:
    """Whether a process has a file open, as far as we may know.

    Args:
        pid: of the process.
        path: of the file.
        facts: of the file. Only what has its name is compared by them: a file of the process may lie on a
            file system that does not answer.
    """
    for descriptor in _names(f"{_PROC}/{pid}/fd"):
        link = f"{_PROC}/{pid}/fd/{descriptor}"
        try:
            if os.path.basename(os.readlink(link)) == path.name:  # noqa: PTH115, PTH119 -- thousands in a row
                found = os.stat(link)  # noqa: PTH116 -- as above
                if (found.st_dev, found.st_ino) == (facts.st_dev, facts.st_ino):
                    return True
        except OSError:
            continue  # Closed since it was listed.
    return False


def mount_namespace(pid: int) -> str:
    """Return the name of the view of the file system that a process has; empty if we may not know."""
    try:
        return str(Path(f"{_PROC}/{pid}/ns/mnt").readlink())
    except OSError:
        return ""


def content(name: str) -> bytes:
    """Return what a file below ``/proc`` says; empty if it is not there or not ours to read."""
    try:
        with open(f"{_PROC}/{name}", "rb", buffering=0) as file:  # noqa: PTH123 -- hundreds of them in a row
            return file.read()
    except OSError:
        return b""


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 -- as above
    except OSError:
        return []
