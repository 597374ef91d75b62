"""Ends: how a process ended, and how one that is judged hung looks from outside.

The rule: facts, never guesses. Whether the kernel killed for want of memory is told from a counter of our
own cgroup; where that cannot be read the answer is None. A process is looked at, never changed: one that
somebody stopped (SIGSTOP) is recorded as stopped and is not continued, it would resume its work.

Rejected: the kernel log for OOM kills (needs privileges, names pids of another namespace), an exit status of
137 as "out of memory" (any SIGKILL looks like it), ``psutil`` for the state (one file holds it).

Source: cgroup-v2 (``memory.events``: ``oom_kill``), proc(5), waitpid(2).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from msgspec import Struct

from supervisor import processes


class End(Struct, frozen=True):
    """How a process ended: exactly one of the first two is set.

    Attributes:
        exit_status: that it left with, 0 to 255.
        signal: name of the signal that killed it, such as ``SIGKILL`` or ``signal 35``.
        oom: whether it was killed for want of memory; None where that is not known.
    """

    exit_status: int | None = None
    signal: str | None = None
    oom: bool | None = None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit status {self.exit_status}"
        name = self.signal if self.signal.startswith("signal ") else f"signal {self.signal}"
        return f"{name} (out of memory)" if self.oom else name


def end_of(
    wait_status: int, *, kills_before: int | None = None, kills_after: int | None = None, by_us: bool = False
) -> End:
    """Say how a process ended.

    Args:
        wait_status: as ``os.waitpid`` returns it.
        kills_before: count of :meth:`OutOfMemoryKills.read` from when the process was last known to live:
            the shorter ago, the less can another process of the cgroup be meant.
        kills_after: the count after its end.
        by_us: we killed it ourselves.
    """
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return End(exit_status=code, oom=False)
    if code != -signal.SIGKILL or by_us:
        return End(signal=_signal_name(-code), oom=False)
    known = kills_before is not None and kills_after is not None
    return End(signal="SIGKILL", oom=kills_after > kills_before if known else None)  # type: ignore[operator]


class OutOfMemoryKills:
    """The kernel's count of processes of our cgroup that it killed for want of memory.

    Args:
        proc: where ``self/cgroup`` and ``self/mountinfo`` lie.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._file = _memory_events(proc)

    def read(self) -> int | None:
        """Return the count, None where there is no cgroup v2 with a memory controller, or it is not ours."""
        for line in _text(self._file).splitlines() if self._file is not None else ():
            name, _, count = line.partition(" ")
            if name == "oom_kill" and count.isdecimal():
                return int(count)
        return None


class Look(Struct, frozen=True):
    """A living process as the kernel shows it. What may not be read is empty.

    Attributes:
        state: the letter of its main thread: R runs, S sleeps, D waits in the kernel, T was stopped, t is
            being debugged, Z has ended.
        wchan: function of the kernel in which it sleeps.
        syscall: number of the system call that it is in, or ``running``.
        stack: its kernel stack, innermost first.
    """

    state: str
    wchan: str
    syscall: str
    stack: tuple[str, ...] = ()

    @property
    def stopped(self) -> bool:
        """Whether somebody stopped it, as SIGSTOP does."""
        return self.state == "T"

    def __str__(self) -> str:
        facts = [f"state {self.state}" + (" (stopped)" if self.stopped else "")]
        if self.wchan:
            facts.append(f"waits in {self.wchan}")
        if self.syscall:
            facts.append(self.syscall if self.syscall == "running" else f"system call {self.syscall}")
        return ", ".join(facts)


def look(pid: int) -> Look | None:
    """Return how a process looks from outside; None if it is gone, or where there is no ``/proc``."""
    process = processes.read(pid)
    if process is None:
        return None
    wchan, syscall, stack = (
        processes.content(f"{pid}/{name}").decode("ascii", "replace")
        for name in ("wchan", "syscall", "stack")
    )
    number = syscall.partition(" ")[0].strip()
    return Look(
        state=process.state,
        wchan="" if wchan == "0" else wchan,  # It runs, or we may not know.
        syscall="" if number == "-1" else number,
        stack=tuple(line.rpartition("] ")[2] for line in stack.splitlines()),
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # Most of the real-time signals have no name.
        return f"signal {number}"


def _memory_events(proc: Path) -> Path | None:
    """Return the file of our own cgroup; None where its hierarchy is not mounted."""
    groups = _text(proc / "self" / "cgroup").splitlines()
    group = next((line.removeprefix("0::") for line in groups if line.startswith("0::")), None)
    if group is None:
        return None
    for line in _text(proc / "self" / "mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        if kind.startswith("cgroup2 "):
            root, point = mount.split()[3:5]
            if (group + "/").startswith(root.rstrip("/") + "/"):
                return Path(point) / group.removeprefix(root).lstrip("/") / "memory.events"
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
