"""Reexec: another image of this supervisor in the same process, with the children running on.

    ask ──> bytecode of the package ──> a trial start of the new image ──> a quiet moment ──> execve
            purged, compiled            reads what it would be left         nothing under way

Exec keeps the pid, so neither the service manager nor the children see another supervisor: the death signal
of a child follows its parent's main thread, and that goes on. Everything that must go on as well (sockets,
pipes, locks, pidfds) is a descriptor that stays open, and what is known is an *estate*: one value, written
into a memory file that is inherited.

The rules:

- **Nothing is given up before the successor has shown that it can start.** The same command line is run to
  the point where it would begin, with the same environment, and has to read the very estate that it would
  get. A syntax error, a missing module, settings that are not valid or would need a new start, another
  language between supervisor and child: refused, with the reason, and everything goes on.
- **The successor is the code on disk.** The bytecode of the package is purged and compiled with checked
  hashes before it is run; if other bytecode than that is loaded all the same, it is refused. What was tried
  is compared with what is there when its time has come.
- **It happens in a quiet moment or not at all**: no candidate, nothing draining, nothing being built or
  looked at. One that does not come in time is a reason to refuse.
- Signals that arrive meanwhile are blocked, not lost; clients and scrapes that arrive meanwhile wait in the
  queue of a socket that never closes.
- If exec itself fails, this image adopts its own estate.

The successor proves the live generation anew, with prints that it took itself, before it says "in sync".

Rejected: a second supervisor that takes over from the first (another pid: the service manager would have to
be told, and every child would lose its parent), pickle (reads what only this version wrote).

Source: execve(2), memfd_create(2), fcntl(2) F_ADD_SEALS, flock(2), prctl(2).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_origin

import msgspec
from msgspec import Struct, field
from msgspec.structs import replace

from supervisor import bytecode, manifest
from supervisor.blobs import BlobStore
from supervisor.bytecode import CompileJob, Compiler
from supervisor.child import codeprint, frames
from supervisor.configuration import ConfigurationEstate
from supervisor.control import ControlEstate
from supervisor.environment import ESTATE_VARIABLE
from supervisor.errors import SourceError, SupervisorError
from supervisor.fleet import FleetEstate
from supervisor.git import Head
from supervisor.history import Record
from supervisor.lifecycle import State
from supervisor.manifest import Manifest, Snapshot, Tree
from supervisor.metrics import Known
from supervisor.output import OutputEstate
from supervisor.own import OwnCode, began_ns
from supervisor.reporting import ReportingEstate
from supervisor.sharded import Sharded

log = logging.getLogger("wa-supervisor")

VERSION = 1
"""Of the estate: raised when an attribute changes its meaning. New ones need a default instead."""

SIGNALS = frozenset({signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGCHLD})
"""Blocked from the last turn of one image to the first of the next; exec keeps mask and pending signals."""

_SAMPLE = (
    "async def sample(a, *, b=(1, 1.0, True)):\n return [lambda: {a, b'x', ...} async for _ in f'{b}']\n"
)


class RefusedError(SupervisorError):
    """The supervisor cannot be replaced in place now; it goes on as it is. The message says why."""


class Lived(Struct, frozen=True):
    """What a record will need to say of the live generation if that fails on probation."""

    tree: str | None = None
    paths: tuple[str, ...] = ()
    previous_tree: str | None = None


class Estate(Struct, frozen=True, kw_only=True):
    """What one image of the supervisor leaves to the next, within one process.

    Attributes:
        image: number of the next image, from 2.
        began_ns: wall clock time at which that is started, in nanoseconds.
        left_at: the same in monotonic seconds.
        uid: of the operator who asked for it.
        asked: descriptors of the connections that wait for it.
        refused: why exec failed; the estate is this image's own then.
        state: what was decided.
        last_live: number of the last generation that went live.
        manifests: of every tree that may have to be started again.
        heads: see :meth:`Checkout.head_of`.
        unwritten: records that the disk has not taken.
        owed: what the service manager has not taken.
        web: descriptor of HTTP's socket. notify_socket, state_lock: descriptors.
    """

    version: int = VERSION
    pid: int = field(default_factory=os.getpid)
    image: int
    began_ns: int
    left_at: float
    uid: int | None
    asked: tuple[int, ...]
    refused: str | None = None
    state: State
    last_live: int
    lived: Lived
    manifests: tuple[Manifest, ...]
    heads: Mapping[str, Head]
    unwritten: tuple[Record, ...]
    owed: tuple[str, ...]
    web: int
    notify_socket: int
    state_lock: int
    configuration: ConfigurationEstate
    fleet: FleetEstate
    control: ControlEstate
    output: OutputEstate
    reporting: ReportingEstate
    child_metrics: Known

    @property
    def descriptors(self) -> list[int]:
        """What has to stay open."""
        pipes = [source.descriptor for source in self.output.sources]
        single = [self.web, self.notify_socket, self.state_lock]
        return [*single, *pipes, *self.fleet.descriptors, *self.control.descriptors]


# --- between two images -----------------------------------------------------------------------------------


def impossible() -> str | None:
    """Return why this platform cannot do it, None if it can."""
    if hasattr(os, "memfd_create") and hasattr(os, "pidfd_open"):
        return None
    return "this platform has no memory files and no pidfds; restart the supervisor"


def replace_image(estate: Estate) -> Estate:
    """Replace this image by the one on disk; returns only if that failed, with what there is to adopt."""
    sys.stdout.flush()
    try:
        with contextlib.ExitStack() as undo:
            document = _memory_file(_encode(estate))
            undo.callback(os.close, document)
            for descriptor in (document, *estate.descriptors):
                os.set_inheritable(descriptor, True)
                undo.callback(os.set_inheritable, descriptor, False)
            _exec(document)
    except RefusedError as error:
        return replace(estate, refused=str(error))
    except OSError as error:
        return replace(estate, refused=f"the new image could not be started: {error.strerror or error}")


def _exec(document: int) -> NoReturn:
    command = _command()
    environment = os.environ | {ESTATE_VARIABLE: f"adopt {document}"}
    os.execve(command[0], command, environment)  # noqa: S606 -- our own


def received(handed_over: str) -> Estate:
    """Return what an earlier image has left; a trial start ends here.

    Args:
        handed_over: the value of :data:`ESTATE_VARIABLE`.

    Raises:
        RefusedError: it cannot be read.
    """
    purpose, _, number = handed_over.partition(" ")
    try:
        with open(int(number), "rb") as file:  # noqa: PTH123 -- a descriptor
            content = os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        estate = msgspec.msgpack.decode(content, type=Estate, dec_hook=_decoded)
    except (OSError, ValueError, msgspec.DecodeError) as error:
        raise RefusedError(f"what is handed over cannot be read by this version: {error}") from error
    if estate.version != VERSION:
        raise RefusedError(f"what is handed over is of version {estate.version}, this one knows {VERSION}")
    if purpose == "try":
        own = OwnCode(began_ns())
        print(json.dumps({"language": _language(), "tree": own.digest, "problem": own.problem}))
        sys.exit()
    if estate.pid != os.getpid():
        raise RefusedError(f"{ESTATE_VARIABLE} was meant for the process {estate.pid}")
    for descriptor in estate.descriptors:
        os.set_inheritable(descriptor, False)
    return estate


def _encode(estate: Estate) -> bytes:
    """Return an estate as it is handed over.

    Raises:
        RefusedError: it names what is not UTF-8, as a file of the tree may.
    """
    try:
        return msgspec.msgpack.encode(estate, enc_hook=_plain)
    except UnicodeEncodeError as error:
        why = f"a name that is not UTF-8 cannot be handed over: {error.object!a}; restart the supervisor"
        raise RefusedError(why) from error


def _plain(value: object) -> object:
    """Return what a sharded mapping is to another version: a mapping."""
    if isinstance(value, Sharded):
        return value.plain()
    raise NotImplementedError(f"{type(value)} cannot be handed over")


def _decoded(kind: type, value: Any) -> object:  # noqa: ANN401 -- what msgspec gives
    """Return the sharded mapping that was handed over."""
    if get_origin(kind) is Sharded:
        return Sharded(value)
    raise NotImplementedError(f"{kind} cannot be taken over")


def _command() -> list[str]:
    return [sys.executable, *sys.orig_argv[1:]]


def _memory_file(content: bytes) -> int:
    descriptor = os.memfd_create("wa-supervisor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def _language() -> dict[str, Any]:
    """Return what both ends have to agree on: children that run already speak as they did at their start."""
    sample = codeprint.codeprint(compile(_SAMPLE, "sample", "exec", dont_inherit=True))
    return {"protocol": frames.PROTOCOL, "print": sample, "interpreter": sys.version}


# --- from the wish to the moment --------------------------------------------------------------------------


class Replacement:
    """What is done before this image is replaced.

    Args:
        tree: of the package.
        scratch: directory for short-lived files.
        environment: our own.
        selector: the main loop's.
        estate: returns the estate as it is now, for the trial.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        scratch: Path,
        environment: Mapping[str, str],
        selector: selectors.BaseSelector,
        estate: Callable[[], Estate],
    ) -> None:
        self._tree = tree
        # Not with those of the generations: what none of them needs is removed there.
        self._blobs = BlobStore(scratch / "package")
        self._scratch = scratch
        self._environment = environment
        self._selector = selector
        self._estate = estate
        self._snapshot: Snapshot | None = None
        self._job: CompileJob | _Trial | None = None
        self._tried: str | None = None

    @property
    def prepared(self) -> bool:
        """Whether the package was tried, and only its moment is waited for."""
        return self._tried is not None and self._job is None

    @property
    def pids(self) -> Sequence[int]:
        """Of the children that it waits for."""
        return [self._job.pid] if self._job is not None and self._job.pid is not None else []

    def advance(self, now: float) -> bool:
        """Do what is to be done; return whether the package on disk can take over at once.

        Raises:
            RefusedError: it cannot.
        """
        if isinstance(self._job, CompileJob):
            self._purged(self._job, now)
        elif self._job is not None:
            self._tried_out(self._job)
        if self._job is None:
            found = self._look()
            if found.digest == self._tried:
                return True
            self._purge(found, now)
        return False

    def close(self) -> None:
        """Cancel what is under way."""
        if self._job is not None:
            self._job.cancel()
            self._forget()

    def _look(self) -> Manifest:
        try:
            self._snapshot = manifest.scan(self._tree, self._snapshot, self._blobs.put)
        except SourceError as error:
            raise RefusedError(str(error)) from error
        return self._snapshot.manifest

    def _purge(self, found: Manifest, now: float) -> None:
        self._blobs.collect([found])
        environment = dict(self._environment)
        if sys.pycache_prefix is not None:
            environment["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
        compiler = Compiler(blobs=self._blobs.blobs, scratch=self._scratch, environment=environment)
        self._follow(compiler.start(tree=self._tree, before=None, after=found, sweep=True, now=now))

    def _purged(self, job: CompileJob, now: float) -> None:
        report = job.read() if job.deadline > now else job.expire()
        if report is None:
            return
        self._forget()
        if report.error is not None:
            raise RefusedError(f"the new version does not compile: {report.error}")
        if report.stale:
            stale = bytecode.shorten(report.stale)
            raise RefusedError(f"stale bytecode of the package itself cannot be removed: {stale}")
        try:
            self._follow(_Trial(self._estate(), self._environment))
        except OSError as error:
            raise RefusedError(f"the trial start failed: {error.strerror or error}") from error

    def _tried_out(self, trial: _Trial) -> None:
        answer = trial.read()
        if answer is None:
            return
        self._forget()
        last = (answer.decode("utf-8", "backslashreplace").strip().splitlines() or ["it said nothing"])[-1]
        try:
            words = json.loads(last)
            language, tree, problem = words["language"], words["tree"], words["problem"]
        except (ValueError, TypeError, KeyError):
            why = last.removeprefix("wa-supervisor: ")
            raise RefusedError(f"the new version does not start: {why}") from None
        if language != _language():
            raise RefusedError(
                "the new version, or another interpreter, does not understand the child that runs; "
                "restart the supervisor"
            )
        if problem is not None:
            raise RefusedError(f"the new version is not what would run: {problem}")
        self._tried = tree  # If it has changed since, it is tried again.

    def _follow(self, job: CompileJob | _Trial) -> None:
        self._job = job
        self._selector.register(job, selectors.EVENT_READ, lambda: None)

    def _forget(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            self._selector.unregister(job)
        if isinstance(job, _Trial):
            job.close()


class _Trial:
    """A start of the new image that ends before it has begun anything.

    Args:
        estate: what it has to be able to read.
        environment: of the supervisor.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self, estate: Estate, environment: Mapping[str, str]) -> None:
        self._received = bytearray()
        document = _memory_file(_encode(estate))
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        self._output = open(reader, "rb", buffering=0)  # noqa: PTH123, SIM115 -- closed at its end
        try:
            self._process = subprocess.Popen(
                _command(),
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                env={**environment, ESTATE_VARIABLE: f"try {document}"},
                pass_fds=(document,),
            )
        except OSError:
            self._output.close()
            raise
        finally:
            os.close(writer)
            os.close(document)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Return the descriptor to wait on for reading."""
        return self._output.fileno()

    def read(self) -> bytes | None:
        """Take what it says; return all of it once it has ended."""
        while data := self._output.read(65536):
            self._received += data
        if data is None:
            return None
        self.cancel()
        return bytes(self._received)

    def cancel(self) -> None:
        """End it; what it might still have to say is not waited for."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Let go of its output."""
        self._output.close()
