"""Launch: start one generation, and hold what is needed to speak to it, watch it and end it.

The contract, whether it is forked from the zygote or started by itself (:mod:`supervisor.zygote`; the same
program either way, and no caller notices):

- the supervisor is the child's **parent** and its only reaper; nobody calls ``wait`` but :func:`reap`;
- a **pidfd** is held from the first moment, so that a signal never reaches a recycled pid;
- the child leads its **own session and process group**: a whole family can be signalled, a terminal's Ctrl-C
  is ours alone;
- a **stream socket** connects both for start message, attestation and metrics; its end ends the child;
- the **death signal** is set by the child itself, once the supervisor is its parent (see
  ``child/program.py``);
- it is called from the main thread: the death signal follows the parent *thread* (prctl(2)).

Rejected: ``preexec_fn`` (runs Python between fork and exec of a process with threads),
``psutil.Process.wait`` (steals the exit status), ``multiprocessing`` (re-imports the parent's ``__main__``,
leaves its own names in the child).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from msgspec import Struct, field

from supervisor import ends
from supervisor.child import frames
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.forerunner import Forerunner
from supervisor.settings import Target
from supervisor.sharded import Sharded
from supervisor.zygote import Zygote, execute

_STDOUT, _STDERR = 1, 2

STRIPPED_VARIABLES = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "JOURNAL_STREAM",
)
"""Meant for the supervisor alone: a child that pings systemd would keep a dead supervisor alive, and what a
child writes comes to the journal through us."""


class LaunchRequest(Struct, frozen=True):
    """What a generation is started from.

    Attributes:
        generation: number of the generation, from 1.
        tree: digest of the manifest.
        manifest: file of the manifest.
        blobs: directory of the pinned sources.
        target: what to run.
        environment: the child's whole environment.
        directory: the child's working directory; None for ours.
        sources: what is in the manifest; without it there is always a cold start.
    """

    generation: int
    tree: str
    manifest: Path
    blobs: Path
    target: Target
    environment: Mapping[str, str]
    directory: Path | None = None
    sources: Sharded[str] = field(default_factory=lambda: Sharded({}))


class ChildEstate(Struct, frozen=True):
    """A child as it is left to the next image of the supervisor.

    Attributes:
        channel: descriptor of the socket to it.
        received: beginning of a frame whose end has not arrived.
        unsent: what it had no room for.
    """

    pid: int
    pidfd: int | None
    channel: int
    received: bytes
    unsent: bytes

    @property
    def descriptors(self) -> list[int]:
        """What has to stay open."""
        return [self.channel, *([self.pidfd] if self.pidfd is not None else [])]


class Child(Struct):
    """A started process. Owned by the main loop; closed by :func:`reap`.

    Attributes:
        pid: its process id, also its session and process group. pidfd: names the process for signals even
        after its pid could have been given away; None where the platform
            has none (macOS), there the pid is used, which is safe until it is reaped.
        channel: non-blocking stream socket to it.
    """

    pid: int
    pidfd: int | None
    channel: socket.socket
    _decoder: frames.Decoder = field(default_factory=frames.Decoder)
    _unsent: bytearray = field(default_factory=bytearray)
    _status: int | None = None

    @property
    def ended(self) -> bool:
        """Whether the process has ended and waits to be reaped (asked after each SIGCHLD)."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG) if self.pidfd is None else (0, 0)
            if pid:
                self._status = status
            elif self.pidfd is not None:
                look = os.WEXITED | os.WNOHANG | os.WNOWAIT
                return os.waitid(os.P_PIDFD, self.pidfd, look) is not None
        return self._status is not None

    def send(self, frame: frames.Frame) -> None:
        """Send a frame without blocking; what a child does not take now goes before the next one."""
        self._unsent += frames.encode(frame)
        try:
            while self._unsent:
                del self._unsent[: self.channel.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()  # It is gone; its exit says so.

    @property
    def is_behind(self) -> bool:
        """Whether it has not taken all that was sent to it."""
        return bool(self._unsent)

    def receive(self) -> list[frames.Frame]:
        """Return frames that have arrived, an empty list if none has.

        There may be more: a child that sends without end shall not keep the loop from everything else.

        Raises:
            EOFError: the child closed its end, or failed to speak the protocol.
        """
        received: list[frames.Frame] = []
        try:
            while not received:
                data = self.channel.recv(262144)
                if not data:
                    break
                received.extend(self._decoder.feed(data))
        except BlockingIOError:
            return received
        except (OSError, frames.FrameError) as error:
            raise EOFError(str(error)) from error
        if received:
            return received
        raise EOFError("the child closed its channel")

    @property
    def stopped(self) -> bool:
        """Whether somebody has stopped it, as SIGSTOP does; False where that cannot be known."""
        look = ends.look(self.pid)
        return look is not None and look.stopped

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the child alone; a child that has ended is not an error."""
        with contextlib.suppress(ProcessLookupError):
            if self.pidfd is None:
                os.kill(self.pid, number)
            else:
                signal.pidfd_send_signal(self.pidfd, number)

    def terminate(self) -> None:
        """Ask the child to finish its work and end."""
        self.signal(signal.SIGTERM)

    def abort(self) -> None:
        """Have a child that hangs write the stacks of its threads to its stderr, and end.

        It does so from the signal's handler (faulthandler), whatever its threads are doing. It does not if
        the application blocks or handles SIGABRT itself, or if it was stopped: kill it a moment later.
        """
        self.signal(signal.SIGABRT)

    @property
    def estate(self) -> ChildEstate:
        """What is left to the next image of the supervisor."""
        channel = self.channel.fileno()
        return ChildEstate(self.pid, self.pidfd, channel, self._decoder.rest, bytes(self._unsent))

    @classmethod
    def adopt(cls, estate: ChildEstate) -> Child:
        """Take over a child from the image of the supervisor that started it."""
        channel = socket.socket(fileno=estate.channel)
        channel.setblocking(False)
        decoder = frames.Decoder(estate.received)
        return cls(estate.pid, estate.pidfd, channel, decoder, bytearray(estate.unsent))

    def collect(self) -> int:
        """Take the exit status from the kernel, which frees the pid; blocks until the process has ended."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        if self.pidfd is not None:
            os.close(self.pidfd)
        return self._status

    def kill_group(self) -> None:
        """SIGKILL the child and its process group; before it is reaped, because its pid names the group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self.signal(signal.SIGKILL)


def launch(
    request: LaunchRequest,
    stdout: int | None = None,
    stderr: int | None = None,
    zygote: Zygote | None = None,
    forerunner: Forerunner | None = None,
) -> Child:
    """Start a generation; it imports its code and then waits at its gate for ``go``.

    Args:
        request: what to start.
        stdout: descriptor that it writes to; None for ours.
        stderr: the same.
        zygote: what to fork it from, if that can be done.
        forerunner: what becomes it otherwise, if it can.

    Raises:
        OSError: no process could be started.
    """
    if zygote is not None and request.sources:
        forked = zygote.fork(**_fork_request(request), outputs=_outputs(stdout, stderr))
        if forked is not None:
            return _child(*forked)
    if forerunner is not None:
        waiting = forerunner.take(
            request.environment, _directory(request), _outputs(stdout, stderr), start_message(request)
        )
        if waiting is not None:
            return _child(*waiting)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        pid = execute(theirs.fileno(), request.environment, request.directory, stdout, stderr)
    ours.setblocking(False)
    child = _child(pid, ours)
    child.send(start_message(request))
    return child


def begin(request: LaunchRequest, stdout: int, stderr: int, zygote: Zygote) -> bool:
    """Let a process begin for a generation that may not come to be; return whether there is one.

    It imports its code and waits at its gate. :func:`begun` takes it over; else the zygote leaves it alone.
    """
    return zygote.begin(**_fork_request(request), outputs=_outputs(stdout, stderr))


def begun(request: LaunchRequest, zygote: Zygote) -> Child | None:
    """Return the process that has begun with just this request, if there is one."""
    forked = zygote.begun(**_fork_request(request))
    return _child(*forked) if forked is not None else None


class _ForkRequest(TypedDict):
    environment: Mapping[str, str]
    directory: str
    sources: Sharded[str]
    first: dict[str, Any]


def _fork_request(request: LaunchRequest) -> _ForkRequest:
    return {
        "environment": request.environment,
        "directory": _directory(request),
        "sources": request.sources,
        "first": start_message(request),
    }


def _directory(request: LaunchRequest) -> str:
    return str(request.directory or Path.cwd())


def _outputs(stdout: int | None, stderr: int | None) -> tuple[int, int]:
    return _STDOUT if stdout is None else stdout, _STDERR if stderr is None else stderr


def _child(pid: int, channel: socket.socket) -> Child:
    return Child(pid, os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None, channel)


def start_message(request: LaunchRequest) -> dict[str, Any]:
    """Return the first frame that a child receives."""
    target = request.target
    return {
        "type": "start",
        "supervisor_pid": os.getpid(),
        "manifest": str(request.manifest),
        "blobs": str(request.blobs),
        "variables": {
            name: request.environment[name] for name in PLACEHOLDERS if name in request.environment
        },
        "target": {"kind": target.kind, "name": target.name, "arguments": list(target.arguments)},
    }


def child_environment(
    inherited: Mapping[str, str], *, notify_socket: Path, watchdog_seconds: float, generation: int, tree: str
) -> dict[str, str]:
    """Return the environment of a generation.

    Args:
        inherited: the supervisor's own.
        notify_socket: where the child reports to.
        watchdog_seconds: longest silence allowed; 0 for no watchdog.
        generation: its number.
        tree: digest of its manifest.
    """
    environment = {name: value for name, value in inherited.items() if name not in STRIPPED_VARIABLES}
    environment["NOTIFY_SOCKET"] = str(notify_socket)
    if watchdog_seconds > 0:
        environment["WATCHDOG_USEC"] = str(int(watchdog_seconds * 1_000_000))
    return environment | {"WA_TREE": tree, "WA_GENERATION": str(generation)}


def reap(child: Child) -> int:
    """Collect an ended child, close what was held for it and return its wait status (waitpid(2))."""
    child.kill_group()  # What it left behind goes with it; until it is collected the pid is ours.
    status = child.collect()
    child.channel.close()
    return status
