"""Orphans: what processes leave behind, and the end of it. Nothing that an ended generation started lives on.

A child leads its own session, but what it starts may leave that session (setsid), fork twice so that its
parent is gone, ignore SIGTERM and hold the port that the next generation wants. Therefore the supervisor is
a **subreaper** (prctl(2)): whatever loses its parent below us becomes our own child, at once and before that
parent's end is told to anybody. Everything that is left of an ended generation thus hangs below *strangers*,
children of ours that we did not start, and two things follow:

- killing strangers until none comes is complete. Who lives deeper comes up when the one above him dies, and
  that death is a SIGCHLD: the main loop is woken for the next round and waits for nothing;
- a stranger's pid cannot be given away before we collect him: a signal never reaches somebody else.

The rule: **never kill what may be the live generation's**, or what was our child before there was any
generation (``helper & exec wa-supervisor …``). A stranger's lineage is told by, in this order

1. his session, if it is that of a main process (whose pid must not have been collected yet);
2. what was seen: :meth:`Lineages.look` remembers the descendants of a main process while it lives, and a
   sweep those of everyone whom it kills;
3. his environment: our ``NOTIFY_SOCKET`` with ``WA_GENERATION`` (of the program that he last started; forks
   keep it). Of a generation that has no process any more: nobody's, and killed;
4. his age: he is of the ended generation if nobody else was there to start him.

One reaper per pid: strangers are collected here, and never what somebody else waits for.

Not covered:

- a stranger of whom 1 to 3 say nothing (environment cleaned or overwritten, session of his own, never seen)
  and who is younger than another generation's main process, or than a child that was there before us, is
  spared, and named. He ends with the first generation of which that is no longer so;
- what other services start at a process's request (systemd-run, at, a container engine) descends from them,
  not from us; of what an earlier supervisor left, see :func:`sweep_earlier`;
- what belongs to another user (setuid) may not be signalled, and what hangs in the kernel (state D) does not
  die: both are named;
- where there is no ``/proc`` (macOS), only the process group is killed.

Rejected: a kill of group or session alone (daemons leave both), a cgroup for each generation (it would be the
best, but needs a delegated one, cgroups(7); under systemd the unit's own is swept at its end).

Source: prctl(2) PR_SET_CHILD_SUBREAPER, waitid(2), setsid(2), pidfd_open(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from msgspec import Struct, field

from supervisor import processes
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.processes import Identity, Process

_PR_SET_CHILD_SUBREAPER = 36
_NOT_YET = PLACEHOLDERS["WA_GENERATION"].encode()
"""Stands for a generation's number in what the zygote has forked and nobody has started."""
_ROUNDS = 20
"""Of one turn: enough for any tree that dies at once; what forks faster than it is killed gets more turns."""

SWEEP_SECONDS = 1.0
"""Longest time that the next generation waits for what an ended one left behind."""


class Swept(Struct, frozen=True):
    """What became of those who were left behind; each is named as ``123 (python3)``.

    Attributes:
        over: the sweep is over: there is nobody left to wait for, or the time for it has passed.
        killed: who was killed.
        left: who could not be killed, as ``123 (dd, state D)``.
        spared: who may belong to somebody else and was therefore left alone.
    """

    over: bool = True
    killed: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()


class _Lineage(Struct):
    """A main process and who descends from it.

    Attributes:
        number: of the generation; None for a child that was there before any.
        main: the main process.
        seen: keys of its descendants, as far as they were met.
        killed: names of those that the sweep sent a signal, by their keys.
        refused: keys of those among them that it may not signal.
        deadline: of the sweep, monotonic; None before the main process has ended.
    """

    number: int | None
    main: Process
    seen: set[tuple[int, int]] = field(default_factory=set)
    killed: dict[tuple[int, int], str] = field(default_factory=dict)
    refused: set[tuple[int, int]] = field(default_factory=set)
    deadline: float | None = None

    def look(self, ancestor: int) -> None:
        """Remember the descendants of a process, and forget who is gone."""
        still_there = {key for key in self.seen if (p := processes.read(key[0])) is not None and p.key == key}
        self.seen = still_there | {process.key for process in processes.descendants(ancestor)}

    def knows(self, stranger: Process) -> bool:
        return stranger.session == self.main.pid or stranger.key in self.seen


def become_subreaper() -> bool:
    """Have this process inherit whoever loses his parent below it; whether the platform can do that.

    It survives ``execve``; children do not inherit it.
    """
    if sys.platform != "linux":
        return False
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return bool(prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


class Lineages:
    """All generations that have a process, and who descends from whom.

    To be made before the first child is started: children that are there already belong to nobody's
    generation.

    Args:
        notify_socket: that the environment of every generation names.
        bystanders: pids of the children that belong to nobody's generation, where that was found out before
            any was started (by an earlier image of the supervisor); None for all that are there.
    """

    def __init__(self, notify_socket: Path, bystanders: Collection[int] | None = None) -> None:
        self._notify_socket = os.fsencode(notify_socket)
        self._generations: dict[int, _Lineage] = {}
        here = processes.children(os.getpid())
        found = map(processes.read, here if bystanders is None else set(bystanders).intersection(here))
        self._bystanders = {process.pid: _Lineage(None, process) for process in found if process is not None}

    @property
    def bystanders(self) -> tuple[int, ...]:
        """Pids of the children that were there before any generation."""
        return tuple(self._bystanders)

    def seen(self, number: int) -> frozenset[tuple[int, int]]:
        """Return the keys of the descendants of a main process, as far as they were met."""
        return frozenset(self._generations[number].seen)

    def add(self, number: int, pid: int, seen: Collection[tuple[int, int]] = ()) -> None:
        """Take up a generation whose main process was started, with the descendants met so far."""
        main = processes.read(pid) or Process(pid, "", "", os.getpid(), pid, 0, 0)
        self._bystanders.pop(pid, None)  # It may have been started before it was one of ours.
        self._generations[number] = _Lineage(number, main, set(seen))

    def look(self, number: int) -> None:
        """Remember who descends from a main process now; once it has ended, nothing else may tell.

        For before it is asked to stop or killed, and for now and then. Takes some 30 microseconds for each.
        """
        lineage = self._generations[number]
        lineage.look(lineage.main.pid)

    def sweep(self, number: int, *, known: Collection[int], now: float) -> Swept:
        """Kill and collect what is left of a generation, as far as it goes without waiting.

        For each turn of the main loop from the end of the main process **until that is collected**: before
        then nobody else can have its pid, which names the session and the group.

        Args:
            number: of the generation.
            known: pids of other children that have a reaper of their own: the compile helper.
            now: monotonic time.

        Returns:
            How far it is; over at the latest :data:`SWEEP_SECONDS` after its first turn. Each death on the
            way is a SIGCHLD.
        """
        lineage = self._generations[number]
        if lineage.deadline is None:
            lineage.deadline = now + SWEEP_SECONDS
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(lineage.main.pid, signal.SIGKILL)
        left: list[Process] = []
        spared: list[Process] = []
        stirred = True
        for _ in range(_ROUNDS):
            left, spared, stirred = [], [], False
            for pid in self._strangers(known):
                if _collect(pid):
                    stirred = True  # Whom he had started may have become ours only now.
                    continue
                stranger = processes.read(pid)
                if stranger is None:
                    continue  # Of another user, whose processes we may not even see.
                if stranger.key not in lineage.killed:
                    if not self._owns(lineage, stranger):
                        (left if _is_ending(pid) else spared).append(stranger)
                        continue
                    lineage.look(pid)
                    lineage.killed[stranger.key] = str(stranger)
                    if not _kill(pid):
                        lineage.refused.add(stranger.key)
                    stirred = True
                left.append(stranger)
            if not stirred:
                break
        keys = {stranger.key for stranger in left}
        return Swept(
            over=(not stirred and keys <= lineage.refused) or now >= lineage.deadline,
            killed=tuple(name for key, name in lineage.killed.items() if key not in keys),
            left=tuple(_why(p, refused=p.key in lineage.refused) for p in left),
            spared=tuple(map(str, spared)),
        )

    def remove(self, number: int) -> None:
        """Forget a generation whose main process was collected: its pid may be given away from now on."""
        del self._generations[number]

    def reap_strays(self, known: Collection[int]) -> list[int]:
        """Collect the strangers that have ended, for every SIGCHLD; returns their pids.

        Args:
            known: pids of other children that have a reaper of their own: the compile helper. One of these,
                or a main process, that has ended hides those behind it until it is collected.
        """
        reaped: list[int] = []
        owned = {*known, *(lineage.main.pid for lineage in self._generations.values())}
        while (pid := _ended_child()) is not None and pid not in owned:
            _collect(pid)
            self._bystanders.pop(pid, None)
            reaped.append(pid)
        return reaped

    def has_strangers(self, known: Collection[int]) -> bool:
        """Whether there are processes that some generation has left behind."""
        return bool(self._strangers(known))

    def _strangers(self, known: Collection[int]) -> list[int]:
        """Return the pids of our children that we did not start, nor find at the start."""
        mains = (lineage.main.pid for lineage in self._generations.values())
        not_strange = {*known, *self._bystanders, *mains}
        return [pid for pid in processes.children(os.getpid()) if pid not in not_strange]

    def _owns(self, lineage: _Lineage, stranger: Process) -> bool:
        if lineage.knows(stranger):
            return True
        running = [other for other in self._generations.values() if other.deadline is None]
        others = [*running, *self._bystanders.values()]
        if any(other.knows(stranger) for other in others):
            return False
        variables = processes.environment(stranger.pid)
        number = variables.get(b"WA_GENERATION", b"")
        if variables.get(b"NOTIFY_SOCKET") == self._notify_socket:
            if number.isdigit():
                return int(number) not in {other.number for other in others}
            if number == _NOT_YET:
                return False
        return not any(other.main.start_ticks <= stranger.start_ticks for other in others)


def _ended_child() -> int | None:
    """Return the pid of a child that has ended, without collecting it."""
    if sys.platform != "linux":
        return None  # No subreaper, no strangers.
    try:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return ended.si_pid if ended is not None else None


def _collect(pid: int) -> bool:
    """Collect a child if it has ended."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:
        return True


def _is_ending(pid: int) -> bool:
    """Whether a process has let go of its memory, and of its environment with it: its end comes at once."""
    process = processes.read(pid)
    return process is None or process.memory_bytes == 0


def _kill(child: int) -> bool:
    """Send SIGKILL to a child that is not collected; whether we may."""
    try:
        os.kill(child, signal.SIGKILL)
    except PermissionError:
        return False
    return True


def _why(process: Process, *, refused: bool) -> str:
    return f"{process.pid} ({process.name}, {'not ours to signal' if refused else f'state {process.state}'})"


def sweep_earlier(
    notify_socket: Path, recorded: Collection[Identity], *, patience_seconds: float = SWEEP_SECONDS
) -> Swept:
    """Kill what a supervisor that was killed left behind; for the start, before there is any child.

    That is: the recorded main processes; the members of their sessions; every process that says in its
    environment that it reports to our socket; and all descendants of these. None is a child of ours, so each
    is held by a pidfd and looked at again before it is signalled. Our own ancestors and descendants are
    nobody's leftovers.

    A recorded pid counts only with its start time. The session of a main process that is gone counts only if
    one of its members names our socket: else the number may have been given away. So what has a cleaned
    environment *and* an ended main process is not found; under systemd the unit's cgroup was swept.

    The socket's name counts only in our own mount namespace: in a container the same path is another socket.

    Args:
        notify_socket: that the children of this runtime directory report to; it need not exist.
        recorded: main processes that were running when it was last written down.
        patience_seconds: longest time to wait until they are gone.
    """
    deadline = time.monotonic() + patience_seconds
    killed: dict[tuple[int, int], str] = {}
    left: dict[tuple[int, int], str] = {}
    while found := [p for p in _of_earlier(notify_socket, recorded) if p.key not in left]:
        with contextlib.ExitStack() as stack:
            dying: dict[int, Process] = {}
            for process in found:
                try:
                    pidfd = os.pidfd_open(process.pid)
                    stack.callback(os.close, pidfd)
                    again = processes.read(process.pid)
                    if again is None or again.key != process.key:
                        continue  # Gone, and its pid may be somebody else's by now.
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                except PermissionError:
                    left[process.key] = _why(process, refused=True)
                    continue
                dying[pidfd] = process
            for process in dying.values():
                killed[process.key] = str(process)
            _await_ends(dying, deadline)
            for process in dying.values():
                del killed[process.key]
                left[process.key] = _why(processes.read(process.pid) or process, refused=False)
        if time.monotonic() >= deadline:
            break
    return Swept(killed=tuple(killed.values()), left=tuple(left.values()))


def _await_ends(dying: dict[int, Process], deadline: float) -> None:
    """Wait until processes have ended, and take those that have out of ``dying``."""
    poll = select.poll()
    for pidfd in dying:
        poll.register(pidfd, select.POLLIN)  # Readable when its process has ended.
    while dying and (ended := poll.poll(max(0.0, deadline - time.monotonic()) * 1000)):
        for pidfd, _ in ended:
            poll.unregister(pidfd)
            del dying[pidfd]


def _of_earlier(notify_socket: Path, recorded: Collection[Identity]) -> list[Process]:
    """Return the living processes that an earlier supervisor is responsible for."""
    table = processes.table()
    boot = processes.boot_id()
    view = processes.mount_namespace(os.getpid())

    def names_our_socket(process: Process) -> bool:
        variables = processes.environment(process.pid)
        return (
            b"WA_GENERATION" in variables
            and variables.get(b"NOTIFY_SOCKET") == os.fsencode(notify_socket)
            and processes.mount_namespace(process.pid) == view
        )

    marked = {process.pid for process in table.values() if names_our_socket(process)}
    roots = set(marked)
    for main in recorded:
        leader = table.get(main.pid)
        members = {process.pid for process in table.values() if process.session == main.pid}
        is_same = leader is not None and leader.start_ticks == main.start_ticks
        if main.boot_id == boot and (is_same or (leader is None and members & marked)):
            roots |= {main.pid, *members}
    ours = {*_ancestors(table, os.getpid()), *_below(table, {os.getpid()})}
    return [p for p in map(table.get, _below(table, roots) - ours) if p is not None and p.state not in "ZX"]


def _below(table: Mapping[int, Process], roots: Collection[int]) -> set[int]:
    """Return the roots and all that descend from them."""
    children: dict[int, list[int]] = {}
    for process in table.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    pending = list(roots)
    while pending:
        pid = pending.pop()
        if pid not in found:
            found.add(pid)
            pending += children.get(pid, ())
    return found


def _ancestors(table: Mapping[int, Process], pid: int) -> Iterator[int]:
    while pid in table:
        yield pid
        pid = table[pid].parent
