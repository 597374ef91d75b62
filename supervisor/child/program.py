"""The life of a child, from its first instruction to the application's last.

1. die with the supervisor: wait until it is our parent, ask the kernel for SIGKILL at its death, look again;
2. receive the start message: manifest, target, arguments;
3. pin the imports of the tree; import the target (a callable's module) or compile it (a script, ``-m``);
4. say ``imported`` and wait at the gate. The supervisor attests now, and in a ``replace`` handover stops the
   old child;
5. ``go``: run the application as plain Python would: ``__name__``, ``sys.argv``, ``sys.path[0]``, exit
   status.

The rule: the application sees a plain interpreter. The channel lives in one thread that ``threading`` does
not list, with every signal blocked, its descriptor is not inherited by the application's own children, and
``__main__`` is the application's. The death signal is set by this process itself, from its main thread, after
it has its final parent: set earlier it would fire at a re-parenting (prctl(2), PR_SET_PDEATHSIG).

One thing is not plain: what it prints leaves line by line though stdout is a pipe, as it does on a terminal.
Plain Python would keep 8 KiB of it, which are late in every log and lost when a hung child is killed.

SIGKILL as death signal and not SIGTERM: it is the one that a hung child cannot survive. A supervisor that is
*stopped* sends SIGTERM and waits, so this is for a supervisor that was killed. Where the kernel has no such
signal (macOS), the end of the channel takes its place: SIGTERM, and SIGKILL three seconds later.

A fatal signal leaves the stacks of all threads on stderr, as ``python -X faulthandler`` does. SIGABRT is how
the supervisor asks a child that hangs for them, before it kills it. Whether a core is dumped as well stays
what the operator set (RLIMIT_CORE): SIGKILL cuts a dump short that takes too long. SIGABRT is not
kept for us where an application blocks or handles it: it would see another interpreter.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from types import CodeType, ModuleType
from typing import Any, NoReturn

from . import attest, frames, functions, loaded, metrics, pages, pinned, spawned, traces
from .gently import in_slices

_PR_SET_PDEATHSIG = 1
_PARENT_WAIT_SECONDS = 10.0
_STDERR = 2
_ORPHAN_GRACE_SECONDS = 3.0
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # macOS has none.
_GIVE_WAY_SECONDS = 0.005
_METRICS_INTERVAL_SECONDS = 0.4
"""What is shown is never older than a second, and collecting it and its way there take the rest."""
_METRICS_SHARE = 5
"""A report is followed by the next one after this many times its processor time at least: what explodes
shall not take the application's."""
_LAST_METRICS_SECONDS = 1.0
"""For how long the end of a program waits for a report that is being made."""


@dataclass(frozen=True)
class _Application:
    """What runs behind the gate.

    Attributes:
        run: runs the application to its end; its result is an exit status as ``sys.exit`` takes it.
        body: the code of ``__main__`` that it runs, if that is what it runs.
    """

    run: Callable[[], object]
    body: CodeType | None = None


class _Channel:
    """This process's end of the connection to the supervisor; answers in a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._identity = _identity(connection.fileno())
        self._abandoned = False
        self._decoder = frames.Decoder()
        self._sending = threading.Lock()
        self._reports = metrics.Reports()
        self._reporting = threading.Lock()
        self._early: list[frames.Frame] = []
        self.has_claimed = False
        """This process has copied memory that it had not written to, before it began."""
        self._has_its_memory = False
        self.gate = threading.Event()
        self.begun = threading.Event()

    def start_message(self) -> frames.Frame:
        """Block for the first frame; end the process if the supervisor is gone before it came.

        With it may come what is to be stdout and stderr, for a child that was forked before it had one.
        """
        received: list[frames.Frame] = []
        outputs: list[int] = []
        while not received:
            data, passed, _, _ = socket.recv_fds(self._connection, 65536, 2, _CLOSE_ON_EXEC)
            if not data:
                os._exit(1)  # Nothing has begun that could want an end.
            outputs += passed
            received = list(self._decoder.feed(data))
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
            os.close(output)
        first, *self._early = received
        return first

    def send(self, frame: frames.Frame) -> None:
        """Send a frame; a supervisor that is gone is noticed by the thread that reads."""
        with self._sending:
            if not self.ours:
                return
            try:
                self._connection.sendall(frames.encode(frame))
            except OSError:
                return

    def detach(self) -> tuple[socket.socket, frames.Decoder]:
        """Give the connection away."""
        return self._connection, self._decoder

    @property
    def ours(self) -> bool:
        """Whether the descriptor is still the channel: an application may close what it did not open."""
        return not self._abandoned and _identity(self._connection.fileno()) == self._identity

    @property
    def connection(self) -> socket.socket:
        """The socket."""
        return self._connection

    def abandon(self) -> None:
        """Let go of the channel in a process that the application forked: it speaks for its parent alone."""
        self._sending = threading.Lock()
        self._reporting = threading.Lock()
        if self.ours:
            os.close(self._connection.fileno())
        self._abandoned = True
        self._connection.detach()

    def serve(self, pins: pinned.Pins, frozen: functions.Frozen | None, progress: attest.Progress) -> None:
        """Answer the supervisor until it is gone, and end this process then (runs in a thread)."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        next_metrics = time.monotonic() + _METRICS_INTERVAL_SECONDS
        live = functions.Functions(pins, frozen)
        pending = self._early
        while True:
            for frame in pending:
                self._answer(frame, pins, live, progress)
            if not self.ours:
                return  # The supervisor sees that this end is closed; the application goes on.
            # A timeout of the socket would bound the sends of the main thread, too.
            if _readable(self._connection, max(0.0, next_metrics - time.monotonic())):
                try:
                    pending = frames.receive(self._connection, self._decoder)
                except OSError:
                    pending = []
                if not pending and self.ours:
                    _end_orphan()
            else:
                pending = []
            if time.monotonic() >= next_metrics:
                next_metrics = time.monotonic() + _METRICS_INTERVAL_SECONDS
                spent_before = time.thread_time()
                self.send_metrics()
                spent = time.thread_time() - spent_before
                next_metrics += max(0.0, _METRICS_SHARE * spent - _METRICS_INTERVAL_SECONDS)

    def _answer(
        self, frame: frames.Frame, pins: pinned.Pins, live: functions.Functions, progress: attest.Progress
    ) -> None:
        match frame.get("type"):
            case "attest":
                self.send(attest.report(pins, live, str(frame.get("nonce")), progress))
            case "go":
                self.gate.set()
                self.begun.wait(_GIVE_WAY_SECONDS)  # What is asked next can wait, the application cannot.
            case "modules":
                compiled = sorted(pins.compiled.copy())
                self.send({"type": "modules", "modules": _libraries(pins), "compiled": compiled})
                if live.forked and not self._has_its_memory:  # It is live now: nobody waits for it.
                    self._has_its_memory = True
                    written = pages.make_own()
                    if not self.has_claimed:  # Else nobody knows which of them it has written to.
                        self.send({"type": "pages", "runs": written})
            case "metrics":
                if frame.get("whole"):
                    self._reports.forget()
                self.send_metrics()
            case "taken":
                self._reports.taken(frame.get("report"))

    def send_metrics(self) -> None:
        """Send the application's metrics, if it has any; too many of them are one that says so.

        One report at a time, from beginning to end: an older one that came after a newer one would look as if
        its counters had begun anew.
        """
        if not self._reporting.acquire(timeout=_LAST_METRICS_SECONDS):
            return  # A collector of the application hangs.
        try:
            report = self._reports.next()
            if report is not None:
                self.send(report)
        except frames.FrameError as error:
            self._reports.forget()
            self.send({"type": "metrics", "families": [metrics.failure(str(error))]})
        finally:
            self._reporting.release()


class _Ending:
    """Tells the supervisor that the program is over; made before the channel that it goes through."""

    channel: _Channel | None = None

    def say(self) -> None:
        if self.channel is not None:
            traceless = not traces.are_left(self.channel.connection)
            self.channel.send({"type": "ended", "traceless": traceless})
            if traceless:  # The next one begins now, and shall have the processor on which we would end.
                time.sleep(_GIVE_WAY_SECONDS)


def run(descriptor: int, plain_modules: frozenset[str], run_name: str) -> NoReturn:
    """Run one child from its start message to its exit.

    Args:
        descriptor: of the inherited stream socket to the supervisor.
        plain_modules: names that plain Python has in ``sys.modules`` when it starts a program.
        run_name: ``__name__`` of the bootstrap in the processes that this one spawns.
    """
    ending = _Ending()
    # Registered first, so called last: the application's threads have ended, and so have its own handlers.
    atexit.register(ending.say)
    channel = _Channel(_socket(descriptor))
    frozen = before = None
    is_ahead = os.environ.get("WA_TREE", "").startswith("-")  # It is not known yet what it will be.
    if is_ahead:
        from . import zygote  # noqa: PLC0415 -- a child that is started by itself does without
    start = channel.start_message()
    if is_ahead and start["type"] == "start":
        zygote.Block().write(start["variables"])
    elif is_ahead:
        _die_with(int(start["supervisor_pid"]), channel.connection)
        forked = zygote.serve(*channel.detach(), start, plain_modules)
        channel = _Channel(_socket(forked.descriptor))
        channel.has_claimed = pages.claim(forked.pages, lambda: _readable(channel.connection, 0.0))
        start = channel.start_message()
        forked.environment.write(start["variables"])
        frozen, before = forked.frozen, forked.pins
    ending.channel = channel
    _die_with(int(start["supervisor_pid"]), channel.connection)
    if not faulthandler.is_enabled():
        faulthandler.enable(file=_STDERR, all_threads=True)
    if before is not None and "changes" in start:
        pins = before.changed(*start["changes"])
    else:
        pins = pinned.Pins.of(start["manifest"], start["blobs"])
    if start.get("unjudged") and not pins.compiles(start["changes"][0]):
        os._exit(1)  # Nothing of it has run, and nobody has counted on it.
    traces.begin()
    pinned.install(pins, plain_modules)
    spawned.install(start["manifest"], start["blobs"], run_name)
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    os.register_at_fork(after_in_child=channel.abandon)
    progress = attest.Progress(threading.get_ident())
    _thread.start_new_thread(channel.serve, (pins, frozen, progress))
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    _end(channel, lambda: _live(channel, start["target"], main, pins, progress))


def _live(
    channel: _Channel, target: dict[str, Any], main: ModuleType, pins: pinned.Pins, progress: attest.Progress
) -> object:
    application = _prepare(target, main, pins)
    if application.body is not None:
        progress.body = application.body
        if "__main__" in pins.modules:
            source = pins.read(pins.modules["__main__"], "__main__")
            progress.last_import_line = attest.last_import_line(source)
    channel.send({"type": "imported"})
    channel.gate.wait()
    progress.began_at = time.monotonic()
    channel.begun.set()
    return application.run()


def _prepare(target: dict[str, Any], main: ModuleType, pins: pinned.Pins) -> _Application:
    """Import or compile the target and return what is left to do; sets ``sys.path[0]`` and ``sys.argv``."""
    kind, name, arguments = target["kind"], target["name"], target["arguments"]
    if kind == "script":
        path = os.path.abspath(name)
        _set_first_path(os.path.dirname(os.path.realpath(path)))
        sys.argv = [name, *arguments]
        spellings = (pins.relative(spelling) for spelling in (path, os.path.realpath(path)))
        relative = next((r for r in spellings if r is not None and pins.has_source(r)), None)
        if relative is None:
            raise ImportError(f"the script {path} is not in the watched tree")
        code = pins.compile(relative, path, "__main__")
        main.__file__ = path
        main.__dict__["__cached__"] = None
        return _Application(lambda: _execute(code, main), code)
    _set_first_path(os.getcwd())
    if kind == "module":
        return _prepare_module(name, arguments, main, pins)
    module_name, _, attribute = name.partition(":")
    sys.argv = [name, *arguments]
    found: Any = import_module(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is not callable")
    return _Application(found)


def _prepare_module(name: str, arguments: list[str], main: ModuleType, pins: pinned.Pins) -> _Application:
    """Do what ``python -m NAME`` does (runpy), with ``__main__`` as the namespace from the start."""
    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = find_spec(f"{name}.__main__")
    if spec is None or spec.loader is None or not hasattr(spec.loader, "get_code"):
        raise ImportError(f"no module to run is called {name}", name=name)
    code = spec.loader.get_code(spec.name)
    if spec.name in pins.modules:
        pins.modules["__main__"] = pins.modules.pop(spec.name)
    main.__file__ = spec.origin
    main.__spec__, main.__loader__, main.__package__ = spec, spec.loader, spec.parent
    sys.argv = [spec.origin or name, *arguments]
    return _Application(lambda: _execute(code, main), code)


def _set_first_path(directory: str) -> None:
    """Put a directory where plain Python puts it: in place of ours, unless it was told not to (``-P``)."""
    if not sys.flags.safe_path:
        sys.path[0] = directory


def _execute(code: CodeType, main: ModuleType) -> None:
    exec(code, main.__dict__)  # noqa: S102 -- running the application is the purpose


def _end(channel: _Channel, live: Callable[[], object]) -> NoReturn:
    """Run ``live`` and exit as plain Python would; the supervisor hears of an exception first."""
    try:
        status = live()
    except SystemExit:
        channel.send_metrics()
        raise
    except BaseException as error:  # noqa: BLE001 -- the last frame: reported and printed
        kind, tree_traceback = type(error), _without_our_frames(error)
        error.__traceback__ = tree_traceback
        channel.send_metrics()
        channel.send(
            {
                "type": "failed",
                "error": "".join(traceback.format_exception_only(error)).strip()[-2000:],
                "importing": _while_importing(error),
            }
        )
        sys.excepthook(kind, error, tree_traceback)
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        status = 1
    else:
        channel.send_metrics()
    sys.exit(status)  # type: ignore[arg-type]


def _without_our_frames(error: BaseException) -> Any:  # noqa: ANN401 -- a traceback or None
    """Return the traceback as the application's author expects it: it begins in the application."""
    step = error.__traceback__
    here = os.path.dirname(__file__)
    while step is not None and os.path.dirname(step.tb_frame.f_code.co_filename) == here:
        step = step.tb_next
    return step if step is not None else error.__traceback__


def _while_importing(error: BaseException) -> bool:
    """Whether the exception says that code could not be loaded, rather than that it failed at work."""
    if isinstance(error, (ImportError, SyntaxError)):
        return True
    return any(
        frame.f_code.co_filename.startswith("<frozen importlib")
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _die_with(supervisor: int, connection: socket.socket) -> None:
    """Have the kernel kill this process when the supervisor dies, as far as the platform can."""
    if sys.platform != "linux":
        return
    deadline = time.monotonic() + _PARENT_WAIT_SECONDS
    hung_up = select.poll()
    hung_up.register(connection, 0)  # What is asked for is only the end, which is always told.
    while os.getppid() != supervisor and time.monotonic() < deadline and not hung_up.poll(0):
        time.sleep(0.0001)  # An intermediate process of a double fork is about to be gone.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != supervisor:
        sys.exit("the supervisor was gone before its child had started")


def _end_orphan() -> NoReturn:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_ORPHAN_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("SIGKILL does not return")


def _libraries(pins: pinned.Pins) -> list[tuple[str, str]]:
    """Return name and origin of what is loaded from outside the tree, and is not ours."""
    ours = __name__.partition(".")[0]
    return [
        (name, origin)
        for name, origin in in_slices(loaded.modules())
        if name.partition(".")[0] != ours and not (os.path.isabs(origin) and attest.in_tree(pins, origin))
    ]


def _socket(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Return what tells an open file from another one that has got its number, None if it is closed."""
    try:
        facts = os.fstat(descriptor)
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _readable(connection: socket.socket, timeout_seconds: float) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))
