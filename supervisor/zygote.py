"""Zygote: a process that has the application's libraries loaded; generations are forked from it.

This is the supervisor's end; :mod:`supervisor.child.zygote` runs inside. The rules:

- **Any doubt is a cold start.** :meth:`Zygote.fork` returns a pid or None, and whoever gets None starts the
  same program by itself. A file that a library was loaded from and that has changed, a name that could now
  mean another module, another environment or other limits, an answer that does not come in time: None.
- Facts are taken again *after* the fork was asked for, while it is made, and the child begins when they have
  been found unchanged: it has loaded what a process of its own would have loaded at that moment.
- A fork takes longer than compiling a file, so it is made ahead: at the first sign of a change
  (:meth:`Zygote.prepare`), and for :data:`SPARE_SECONDS` after each start, because a start is often followed
  by a change, and a change by another. What is forked ahead has no code, no number and no output of its own,
  and waits for them; if nobody needs it, it is ended. Its process is older than its generation then. While
  nothing happens there is none: it would cost the memory of a child.
- **What was forked ahead begins before its code is judged** (:meth:`Zygote.begin`), beside the helper that
  compiles. It compiles what has changed before it imports anything: of code that does not compile nothing
  runs.
- It is never in the way: it is built when nothing is being started, at half speed, and has to fork within
  :data:`FORK_SECONDS`. One that does not is killed, one that died is built again, later each time.
- The supervisor is parent and only reaper of what is forked, and of the zygote. It is our child, but no
  generation's: its pid is among the helpers that nobody sweeps.

What it loads is what the last live generation had loaded, so the first start is a cold one. A module that
cannot be loaded without a trace (see the inside) is left out, and the zygote built again without it.

Source: socket(7), unix(7) SCM_RIGHTS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from msgspec import Struct, field

from supervisor import ends, processes
from supervisor.child import frames, loaded, pinned
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.sharded import Sharded

log = logging.getLogger("wa-supervisor")

_BOOTSTRAP = Path(__file__).parent / "child" / "bootstrap.py"

FRESH_SECONDS = 0.02
"""A look at the disk that is older is taken again before a child begins. It takes 1 to 2 milliseconds."""

SPARE_SECONDS = 120.0
"""For how long after a fork, or after it was built, another child is kept ready."""

_SPARE_WAITS_SECONDS = 0.15
"""After which it is made: the processors are for the child that has just begun."""

FORK_SECONDS = 1.0
"""Longest time that a start waits for the zygote. It takes 2 to 4 milliseconds."""

_BUILD_SECONDS = 60.0
_LOOK_SECONDS = 5.0
"""Between two looks for a reason to build it anew; before each fork there is one in any case."""
_FIRST_WAIT_SECONDS = 1.0
_LONGEST_WAIT_SECONDS = 300.0
_HEALTHY_SECONDS = 60.0
_MOST_REFUSED = 20
_MOST_BYTES = 65536
"""Of a message that it is sent while it may be busy."""
_MOST_CHANGES = 200
"""Since it was built, that a child is told one by one; of more it reads the whole manifest."""
_MOST_UNJUDGED_BYTES = 262_144
"""Of sources that a child compiles before they were judged: less than a second's work."""
_LAST_WORDS_BYTES = 4096
_STANDS_STILL = "TtZX"
_GRAIN_NS = 20_000_000
"""Of the clock that the kernel stamps files with: a change may look that much older than it is."""
_LIMITS = tuple(getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_"))

State = Literal["off", "building", "ready", "unusable"]


def execute(
    descriptor: int,
    environment: Mapping[str, str],
    directory: str | os.PathLike[str] | None,
    stdout: int | None,
    stderr: int | None,
) -> int:
    """Start the program that becomes a child or a zygote, as its first message says; return its pid.

    From the main thread: its death signal follows the parent *thread* (prctl(2)).

    Raises:
        OSError: no process could be started.
    """
    process = subprocess.Popen(
        [sys.executable, str(_BOOTSTRAP), str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=dict(environment),
        cwd=directory,
        pass_fds=(descriptor,),
        start_new_session=True,
    )
    process.returncode = 0  # Popen is not the reaper: nothing of it shall wait for this pid.
    return process.pid


class Plan(Struct, frozen=True):
    """What children need, as the live generation has it.

    Attributes:
        modules: name and origin of each library module, in the order of their imports.
        environment: of the children, without what differs from child to child.
        directory: that they work in; what is relative in the module search path is relative to it.
        manifest: file of the tree's manifest, and what is in it.
        blobs: directory of the pinned sources.
        first_path: what the application has as ``sys.path[0]``.
        sources: relative path to sha256 of each source of the tree.
        compiled: sha256 and path of each source that it has executed.
    """

    modules: Sequence[tuple[str, str]]
    environment: Mapping[str, str]
    directory: str
    manifest: str
    blobs: str
    first_path: str
    sources: Sharded[str]
    compiled: frozenset[tuple[str, str]] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """Of the modules."""
        return frozenset(name for name, _ in self.modules)

    @property
    def needs(self) -> tuple[object, ...]:
        """What decides whether there can be a zygote, and what it may not load."""
        return self.names, self.environment, self.first_path, self.sources.keys()


class _Ready(Struct, frozen=True):
    """What a zygote says when it has loaded all.

    Attributes:
        modules: how many.
        names: top-level names that nothing else may have now.
        files: path to the facts of all that was loaded.
        folders: entries of ``sys.path``, and what in them could stand for one of the names.
        base_is_package: what lies directly in the tree's base is imported as part of a package only.
    """

    modules: int
    names: frozenset[str]
    files: Mapping[str, loaded.FileFacts]
    folders: Mapping[str, list[str]]
    base_is_package: bool

    @classmethod
    def of(cls, frame: Mapping[str, Any]) -> _Ready:
        """Return what a frame says.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it has not the agreed form.
        """
        return cls(
            modules=int(frame["modules"]),
            names=frozenset(str(name) for name in frame["names"]),
            files={
                str(path): None if found is None else list(found) for path, found in frame["files"].items()
            },
            folders={str(folder): list(names) for folder, names in frame["folders"].items()},
            base_is_package=bool(frame["base_is_package"]),
        )

    @property
    def newest_ns(self) -> int:
        """When the newest of the files was changed."""
        return max((facts[-1] for facts in self.files.values() if facts), default=0)


class _Process(Struct):
    """A zygote that was started and is not collected.

    Attributes:
        plan: it was built for.
        limits: of this process when it was started; children inherit them from it.
        started_at: monotonic time.
        started_wall_ns: what was changed later cannot have been loaded for sure.
        compiled: sha256 and path of the sources that it was told to compile.
        ready: what it said when it had loaded all.
        last_child: process id of what was forked from it last.
        doomed: why it is of no more use, although it may not have ended yet.
    """

    pid: int
    connection: socket.socket
    output: int
    plan: Plan
    limits: object
    started_at: float
    started_wall_ns: int
    compiled: frozenset[tuple[str, str]]
    decoder: frames.Decoder = field(default_factory=frames.Decoder)
    ready: _Ready | None = None
    ready_at: float = 0.0
    last_child: int | None = None
    doomed: str | None = None


class _Ahead(Struct):
    """A child that was asked for and waits for its first message.

    Attributes:
        number: of the request.
        directory: its working directory.
        place: what that was then (device, inode).
        channel: our end.
        pid: its process id, as soon as the zygote has said it.
        checked_at: monotonic time at which nothing had changed below the zygote since it was asked for.
        begun: the first message that it was sent, although it is not known yet whether it is needed.
    """

    number: int
    directory: str
    place: tuple[int, int] | None
    channel: socket.socket
    pid: int | None = None
    checked_at: float | None = None
    begun: bytes | None = None


class Zygote:
    """The zygote, if there is one. Called from the main loop.

    Args:
        selector: the main loop's.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._selector = selector
        self._process: _Process | None = None
        self._ahead: _Ahead | None = None
        self._plan: Plan | None = None
        self._refused: dict[str, str] = {}
        self._unusable: str | None = None
        self._reason: str | None = "nothing has been live yet"
        self._failures = 0
        self._build_at = self._look_at = 0.0
        self._numbers = self._forks = 0
        self._spare_from = self._spare_until = 0.0
        self._spare_directory: str | None = None
        self._possible = sys.platform == "linux" and hasattr(os, "pidfd_open")
        if not self._possible:
            self._reason = "this platform cannot give away children"

    @property
    def pids(self) -> Collection[int]:
        """Its process id until it is collected, and that of a child that nobody has started yet."""
        ahead = self._ahead.pid if self._ahead is not None else None
        return [pid for pid in (self._process.pid if self._process else None, ahead) if pid is not None]

    @property
    def status(self) -> dict[str, Any]:
        """What ``status --json`` says of it."""
        process = self._process
        usable = process is not None and process.doomed is None
        ready = process.ready if process is not None and usable else None
        state: State = "off"
        if self._unusable is not None:
            state = "unusable"
        elif usable:
            state = "ready" if ready is not None else "building"
        return {
            "state": state,
            "reason": self._unusable or (None if usable else self._reason),
            "pid": process.pid if process is not None and usable else None,
            "modules": ready.modules if ready is not None else 0,
            "forks": self._forks,
            "spare": self._ahead.pid if self._ahead is not None else None,
            "left_out": dict(self._refused),
        }

    # --- called on every turn -----------------------------------------------------------------------------

    def reap(self) -> None:
        """Collect it if it has ended; before other children are looked at, which it would hide."""
        process = self._process
        if process is None or os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return
        self._read()
        end = ends.end_of(self._collect(process))
        if process.doomed is None:
            self._failed(f"the zygote ended: {end}{_last_words(process.output)}")
        os.close(process.output)

    def turn(self, now: float, *, idle: bool, enabled: bool) -> None:
        """Build it if it is wanted and nobody waits for anything; notice what has changed below it.

        Args:
            now: monotonic time.
            idle: nothing is being started, compiled or stopped.
            enabled: ``--no-zygote`` was not given.
        """
        if not enabled:
            self._drop("--no-zygote")
            return
        if idle:
            self._keep_spare(now)
        process = self._process
        if process is not None and process.doomed is None:
            self._follow(process, now, idle=idle)
        if idle and self._process is None and self._possible and now >= self._build_at:
            plan = self._plan
            # The manifest goes when its generation does; the next live one brings its own.
            if plan is not None and self._unusable is None and Path(plan.manifest).exists():
                self._build(plan, now)

    def _keep_spare(self, now: float) -> None:
        """Have a child forked ahead, or end the one that is, although nothing is under way."""
        ahead = self._ahead
        if now >= self._spare_until or (ahead is not None and ahead.begun is not None):
            self._leave_alone()
        elif ahead is None and self._spare_directory is not None and now >= self._spare_from:
            self.prepare(self._spare_directory)

    def _follow(self, process: _Process, now: float, *, idle: bool) -> None:
        """Notice what has become of it, and of what lies below it."""
        if process.ready is None:
            if now - process.started_at > _BUILD_SECONDS:
                self._failed(f"it was not built within {_BUILD_SECONDS:g} s")
            return
        if now - process.ready_at > _HEALTHY_SECONDS:
            self._failures = 0
        if self._ahead is not None and self._ahead.checked_at is None:
            stale = self._check(process, now)  # While others work for the same reload.
            if stale is not None:
                log.info("cold start: %s", stale)
        elif idle and now >= self._look_at:
            self._look_at = now + _LOOK_SECONDS
            if self._check(process, now) is None and _stands_still(process):
                self._failed("it stands still")

    def want(self, plan: Plan) -> None:
        """Take what the live generation has loaded; what is there is kept if it will do."""
        if self._plan is None or plan.needs != self._plan.needs:
            self._unusable = None
            self._refused.clear()
        self._plan = plan
        process = self._process
        if process is not None and process.doomed is None:
            unfit = _unfit(process.plan, plan)
            if unfit is not None:
                self._drop(unfit)
            elif process.ready is not None:
                self._renew(process, plan.compiled)

    def written(self, pid: int, runs: object) -> None:
        """Tell it what a child has written to until it was live: the next one will write there, too.

        Args:
            pid: of the child; only what was forked last from this zygote is like what comes next.
            runs: as it was told (:func:`supervisor.child.pages.make_own`).
        """
        process = self._usable
        if process is None or process.last_child != pid or not isinstance(runs, list):
            return
        message = frames.encode({"type": "pages", "runs": runs})
        if len(message) <= _MOST_BYTES:
            self._tell(process, message)

    def close(self) -> None:
        """End it."""
        self._drop("stopped")
        process = self._process
        if process is not None:
            _await(process.pid, FORK_SECONDS)
            self.reap()

    # --- a fork -------------------------------------------------------------------------------------------

    def prepare(self, directory: str) -> None:
        """Have a child forked that :meth:`fork` will need soon; if there can be none, nothing happens.

        Args:
            directory: its working directory.
        """
        process = self._usable
        if process is None:
            return
        if self._ahead is not None:
            self._ahead.checked_at = None  # What was found out about an earlier moment does not count.
        elif not _stands_still(process):
            self._ask(process, directory)

    def fork(
        self,
        *,
        environment: Mapping[str, str],
        directory: str,
        sources: Sharded[str],
        outputs: tuple[int, int],
        first: frames.Frame,
    ) -> tuple[int, socket.socket] | None:
        """Return the pid of a new child, and our end of its channel; None asks for a cold start.

        Args:
            environment: the child's whole environment.
            directory: its working directory.
            sources: relative path to sha256 of each source of its tree.
            outputs: its stdout and stderr.
            first: its first message, sent as soon as nothing has changed below the zygote.
        """
        process = self._usable
        if process is None:
            return None
        reason = _misfit(process, environment, sources)
        if reason is None and _stands_still(process):
            reason = "it stands still"
        if reason is None:
            ahead = self._child(process, directory)
            reason = self._recheck(process, ahead)
            if reason is None:
                first = _with_changes(first, process.plan.sources, sources)
                if send_first(ahead.channel, frames.encode(first), outputs) and (pid := self._await(ahead)):
                    return self._given_away(process, ahead, pid)
                reason = "it does not answer"
        self._drop(reason)
        log.info("cold start: %s", reason)
        return None

    def begin(
        self,
        *,
        environment: Mapping[str, str],
        directory: str,
        sources: Sharded[str],
        outputs: tuple[int, int],
        first: frames.Frame,
    ) -> bool:
        """Let the child that was forked ahead begin although its code is still being judged.

        It compiles what has changed itself before it imports anything, and ends without a word if it cannot.
        Whoever finds the code good gets it from :meth:`begun`; else it is left alone like any that is not
        needed. The arguments are those of :meth:`fork`; returns whether it has begun.
        """
        process, ahead = self._usable, self._ahead
        if process is None or ahead is None or ahead.begun is not None or not _is_in(ahead, directory):
            return False
        message = _unjudged(first, process.plan.sources, sources)
        if message is None or _misfit(process, environment, sources) is not None:
            return False
        if self._recheck(process, ahead) is not None:
            return False
        if not send_first(ahead.channel, message, outputs):
            self._leave_alone()
            return False
        ahead.begun = message
        return True

    def begun(
        self,
        *,
        environment: Mapping[str, str],
        directory: str,
        sources: Sharded[str],
        first: frames.Frame,
    ) -> tuple[int, socket.socket] | None:
        """Return pid and channel of the child that has begun with just this; None if there is none."""
        process, ahead = self._usable, self._ahead
        if process is None or ahead is None or ahead.begun is None:
            return None
        same = _is_in(ahead, directory) and ahead.begun == _unjudged(first, process.plan.sources, sources)
        usable = same and not _stands_still(process) and _misfit(process, environment, sources) is None
        pid = self._await(ahead) if usable else None
        if pid is None:
            self._leave_alone()
            return None
        return self._given_away(process, ahead, pid)

    @property
    def waits(self) -> bool:
        """Whether a child was forked ahead that has not begun."""
        return self._ahead is not None and self._ahead.begun is None

    def begun_by(self, pid: int) -> bool:
        """Whether a process is the one that has begun and nobody has asked for yet."""
        return self._ahead is not None and self._ahead.begun is not None and self._ahead.pid == pid

    def _given_away(self, process: _Process, ahead: _Ahead, pid: int) -> tuple[int, socket.socket]:
        self._ahead = None
        self._forks += 1
        process.last_child = pid
        self._want_spare(ahead.directory, time.monotonic())
        return pid, ahead.channel

    def _want_spare(self, directory: str, now: float) -> None:
        self._spare_from, self._spare_until = now + _SPARE_WAITS_SECONDS, now + SPARE_SECONDS
        self._spare_directory = directory

    def _child(self, process: _Process, directory: str) -> _Ahead:
        """Return the child that was asked for beforehand if it will do, a new one otherwise."""
        ahead = self._ahead
        if ahead is not None and ahead.begun is None and _is_in(ahead, directory):
            return ahead
        self._leave_alone()
        return self._ask(process, directory)

    @property
    def _usable(self) -> _Process | None:
        process = self._process
        return process if process is not None and process.ready is not None and not process.doomed else None

    def _ask(self, process: _Process, directory: str) -> _Ahead:
        self._numbers += 1
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self._ahead = _Ahead(self._numbers, directory, _place(directory), ours)
        request: frames.Frame = {"type": "fork", "number": self._numbers, "directory": directory}
        with theirs, contextlib.suppress(OSError):  # Then there is no answer.
            socket.send_fds(process.connection, [frames.encode(request)], [theirs.fileno()])
        return self._ahead

    def _recheck(self, process: _Process, ahead: _Ahead) -> str | None:
        """Return what has changed below the zygote, if that was not looked at a moment ago."""
        now = time.monotonic()
        if ahead.checked_at is not None and now - ahead.checked_at <= FRESH_SECONDS:
            return None
        return self._check(process, now)

    def _check(self, process: _Process, now: float) -> str | None:
        """Look whether something has changed below the zygote; one that is stale is dropped."""
        stale = _stale(process)
        if stale is not None:
            self._refused.clear()
            self._drop(stale)
        elif self._ahead is not None:
            self._ahead.checked_at = now
        return stale

    def _await(self, ahead: _Ahead) -> int | None:
        """Return the pid of a child as soon as the zygote has said it, None if it is no child of ours."""
        deadline = time.monotonic() + FORK_SECONDS
        process = self._process
        poll = select.poll()
        if process is not None:
            poll.register(process.connection, select.POLLIN)
        while ahead.pid is None and self._ahead is ahead and (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                self._read()
            if process is None or process.connection not in self._selector.get_map():
                break  # It closed its end.
        return ahead.pid if ahead.pid is not None and _is_our_child(ahead.pid) else None

    def _leave_alone(self) -> None:
        """End a child that nobody needs: it reads the end of its channel."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.channel.close()

    # --- building -----------------------------------------------------------------------------------------

    def _build(self, plan: Plan, now: float) -> None:
        self._unusable = None
        self._reason = None
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        wall = time.time_ns()
        try:
            with theirs:
                environment = {**plan.environment, **PLACEHOLDERS}
                pid = execute(theirs.fileno(), environment, plan.directory, writer, writer)
        except OSError as error:
            ours.close()
            os.close(reader)
            self._failed(f"no process could be started: {error}")
            return
        finally:
            os.close(writer)
        self._process = _Process(pid, ours, reader, plan, _limits(), now, wall, plan.compiled)
        first = {
            "type": "preload",
            "supervisor_pid": os.getpid(),
            "modules": list(plan.modules),
            "manifest": plan.manifest,
            "blobs": plan.blobs,
            "first_path": plan.first_path,
            "never": sorted(self._refused),
            "compiled": sorted(plan.compiled),
        }
        # It reads this at once, and it is some tens of kilobytes: a moment's wait at most.
        ours.settimeout(FORK_SECONDS)
        try:
            ours.sendall(frames.encode(first))
        except OSError as error:
            self._failed(f"it does not listen: {error}")
            return
        ours.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, self._read)

    def _renew(self, process: _Process, wanted: frozenset[tuple[str, str]]) -> None:
        """Have it compile what is new in the tree, for the next child."""
        new, gone = sorted(wanted - process.compiled), sorted(process.compiled - wanted)
        message = frames.encode({"type": "compile", "new": new, "gone": gone})
        if (new or gone) and len(message) <= _MOST_BYTES:  # Else children go on to compile it themselves.
            process.compiled = wanted
            self._tell(process, message)

    def _tell(self, process: _Process, message: bytes) -> None:
        """Send it what needs no answer."""
        try:
            sent = process.connection.send(message)
        except OSError:
            sent = 0
        if sent != len(message):
            self._drop("it does not listen")

    def _read(self) -> None:
        process = self._process
        if process is None:
            return
        for frame in self._receive(process):
            match frame.get("type"):
                case "ready":
                    self._ready(process, frame)
                case "forked":
                    ahead, pid = self._ahead, frame.get("pid")
                    if ahead is not None and ahead.number == frame.get("number") and isinstance(pid, int):
                        ahead.pid = pid
                case "refused":
                    module, why = str(frame.get("module")), str(frame.get("why"))
                    self._refused[module] = why
                    log.info("the zygote leaves out %s: %s", module, why)
                    self._drop(f"it is built again without {module}")
                    if len(self._refused) > _MOST_REFUSED:
                        self._unusable = (
                            f"too many modules cannot be loaded beforehand, the last: {module}: {why}"
                        )
                case "unusable":
                    self._unusable = str(frame.get("why"))
                    self._drop(self._unusable)
                    log.info("no zygote: %s", self._unusable)

    def _ready(self, process: _Process, frame: Mapping[str, Any]) -> None:
        try:
            process.ready, process.ready_at = _Ready.of(frame), time.monotonic()
        except (KeyError, TypeError, ValueError, AttributeError):
            self._failed("it does not say what it has loaded")
            return
        if process.ready.newest_ns >= process.started_wall_ns - _GRAIN_NS:
            self._failed("a library was changed while it was loaded")
            return
        self._want_spare(process.plan.directory, process.ready_at)

    def _receive(self, process: _Process) -> list[frames.Frame]:
        """Return what it has said; nobody listens again to one that closed its end or said something else."""
        received: list[frames.Frame] = []
        try:
            while data := process.connection.recv(262144):
                received += process.decoder.feed(data)
        except BlockingIOError:
            return received
        except (OSError, frames.FrameError):
            self._drop("it does not speak the protocol")
        self._unregister(process)
        return received

    # --- its end ------------------------------------------------------------------------------------------

    def _failed(self, why: str) -> None:
        """Drop it because of a fault, and wait longer before each next one."""
        wait = min(_FIRST_WAIT_SECONDS * 2**self._failures, _LONGEST_WAIT_SECONDS)
        self._failures += 1
        self._build_at = time.monotonic() + wait
        self._reason = why
        log.info("no zygote for %.0f s: %s", wait, why)
        self._drop(why)

    def _drop(self, reason: str) -> None:
        self._reason = reason
        self._leave_alone()
        process = self._process
        if process is not None and process.doomed is None:
            process.doomed = reason
            self._unregister(process)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)

    def _collect(self, process: _Process) -> int:
        self._unregister(process)
        process.connection.close()
        self._process = None
        return os.waitpid(process.pid, 0)[1]

    def _unregister(self, process: _Process) -> None:
        if process.connection in self._selector.get_map():
            self._selector.unregister(process.connection)


def _is_in(ahead: _Ahead, directory: str) -> bool:
    """Whether a child works in a directory: that may have been moved away, and another one made."""
    return ahead.directory == directory and ahead.place == _place(directory)


def _place(directory: str) -> tuple[int, int] | None:
    try:
        found = Path(directory).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def send_first(channel: socket.socket, message: bytes, outputs: tuple[int, int]) -> bool:
    """Send a child what it waits for; whether all of it is on its way."""
    try:
        return socket.send_fds(channel, [message], outputs) == len(message)
    except OSError:
        return False


def _with_changes(first: frames.Frame, before: Sharded[str], now: Sharded[str]) -> frames.Frame:
    """Return a first message that also says how the tree differs from the zygote's, if that is short."""
    altered, gone = before.difference(now)
    short = len(altered) + len(gone) <= _MOST_CHANGES
    return {**first, "changes": [altered, gone]} if short else first


def _unjudged(first: frames.Frame, before: Sharded[str], now: Sharded[str]) -> bytes | None:
    """Return the first message of a child whose code is still being judged; None if it has to wait for that.

    What it compiles meanwhile, it compiles without the limits that the helper has: that has to be little.
    """
    message = _with_changes(first, before, now)
    if "changes" not in message:
        return None
    blobs = Path(first["blobs"])
    try:
        total_bytes = sum((blobs / digest).stat().st_size for digest in message["changes"][0].values())
    except OSError:
        return None
    return frames.encode({**message, "unjudged": True}) if total_bytes <= _MOST_UNJUDGED_BYTES else None


def _unfit(built: Plan, wanted: Plan) -> str | None:
    """Return why the children of a generation could not come from a zygote that was built for another one."""
    if built.environment != wanted.environment:
        return "the environment has changed"
    missing = wanted.names - built.names
    return f"the application has loaded more: {min(missing)}" if missing else None


def fits(environment: Mapping[str, str]) -> bool:
    """Whether what differs from child to child has room in the environment of one that runs already."""
    return all(
        len(os.fsencode(environment.get(name, ""))) <= len(room) for name, room in PLACEHOLDERS.items()
    )


def _misfit(process: _Process, environment: Mapping[str, str], sources: Sharded[str]) -> str | None:
    """Return why a child with this environment and tree cannot come from a zygote."""
    common = {name: value for name, value in environment.items() if name not in PLACEHOLDERS}
    if common != process.plan.environment or process.limits != _limits():
        return "the environment has changed"
    if not fits(environment):
        return "there is no room for the child's environment"
    before = process.plan.sources
    altered, gone = before.difference(sources)
    added = {path for path in altered if path not in before}
    if not (added or gone):
        return None
    if any(path.endswith("__init__.py") for path in (*added, *gone)):
        added = set(sources)  # Another directory may be a package now, or none.
    assert process.ready is not None  # noqa: S101
    names = pinned.top_level_names(added, sources, base_is_package=process.ready.base_is_package)
    hidden = names & process.ready.names
    return f"the tree has a module that libraries know as theirs: {min(hidden)}" if hidden else None


def _stands_still(process: _Process) -> bool:
    seen = processes.read(process.pid)
    return seen is None or seen.state in _STANDS_STILL


def _stale(process: _Process) -> str | None:
    """Return what has changed on disk below a zygote."""
    assert process.ready is not None  # noqa: S101
    for path, facts in process.ready.files.items():
        if loaded.facts(path) != facts:
            return f"{path} has changed"
    for folder, entries in process.ready.folders.items():
        if loaded.entries(folder, process.ready.names) != entries:
            return f"what can be imported from {folder} has changed"
    return None


def _limits() -> object:
    """Return what a process inherits and nobody may raise again."""
    return [resource.getrlimit(number) for number in _LIMITS], os.getpriority(os.PRIO_PROCESS, 0)


def _is_our_child(pid: int) -> bool:
    process = processes.read(pid)
    return process is not None and process.parent == os.getpid()


def _await(pid: int, seconds: float) -> None:
    """Wait until a child has ended; it is not collected."""
    pidfd = os.pidfd_open(pid)
    try:
        select.select([pidfd], [], [], seconds)
    finally:
        os.close(pidfd)


def _last_words(output: int) -> str:
    try:
        lines = os.read(output, _LAST_WORDS_BYTES).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return f": {lines[-1]}" if lines else ""
