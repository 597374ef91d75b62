"""Zygote: loads the libraries of the application once, and forks a generation from there at each request.

What the application would load again at every start, from outside the tree, is loaded here **by the same
program that starts a child cold** (``bootstrap.py``): :func:`serve` returns in each forked child, which then
goes the same way as one that was started by itself.

The rules:

- Nothing of the tree is run. Its sources are compiled, from pinned bytes whose sha256 was checked, so that a
  child compiles only what has changed since.
- Nothing is loaded that a fork would share or lose: a module whose import starts a thread or a process, keeps
  a file open, shares memory, sets a timer or prints is **refused**, by the name of its top-level package. It
  cannot be unloaded, so this process ends and another one leaves it out.
- A forked child shows what one started by itself shows: parent, session, name, descriptors, working
  directory, environment (also in ``/proc/PID/environ``, by which :mod:`supervisor.orphans` knows its own),
  random numbers.
- The supervisor is its parent: it is forked *twice*, and the answer to a request is given when the process in
  between has been collected, so the supervisor, a subreaper, has inherited the child by then.

What a forked child has that a cold one may lack: modules that the generation before it had loaded and it does
not import itself. An import statement that was lost may therefore be noticed at the next cold start only.

It does not lower its priority: nobody may raise it again without privileges, and its children inherit it. It
rests after each import for as long as that took.

Rejected: ``multiprocessing.forkserver`` (it is the parent and the reaper of what it forks, has it run a
pickled function under ``multiprocessing``'s names, knows neither sessions nor environments nor staleness, and
does not look at what an import left behind); ``clone(2)`` with CLONE_PARENT instead of the second fork (past
the C library's and the interpreter's own preparations for a fork); ``SOCK_SEQPACKET`` (a packet is bounded by
the socket's buffer; the facts of thousands of files are more).

Source: prctl(2), credentials(7), proc(5) (``environ``, ``stat``), unix(7) SCM_RIGHTS, signal-safety of forks
in https://docs.python.org/3/library/os.html#os.fork.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import signal
import socket
import sys
import time
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn, Self

from . import attest, frames, functions, loaded, pages, pinned
from .codeprint import codeprint, every

PLACEHOLDERS = {"WA_TREE": "-" * 64, "WA_GENERATION": "-" * 10}
"""What the zygote's environment holds in place of what differs between children: room for it."""

NEVER = frozenset({"coverage", "numpy", "readline", "rlcompleter", "torch", "watchdog"})
"""Not loaded though it might pass: a terminal, threads that begin later, random numbers of their own."""

_NAME = b"wa-zygote"
_PR_SET_NAME = 15
_FIONREAD = 0x541B
_ENV_START, _ENV_END = 47, 48
"""Fields 50 and 51 of ``/proc/PID/stat``, counted from the one after the name."""
_SHARED = (b"rw-s", b"-w-s", b"rwxs")
"""How ``/proc/PID/maps`` marks memory that a fork shares and both can write."""
_LONGEST_REST_SECONDS = 0.5
_MOST_BYTES = 131072
"""Of a source that is compiled between two requests: about a third of a second."""


class RefusedError(Exception):
    """A module cannot be loaded here; the first argument is its top-level name, the second one says why."""


class UnusableError(Exception):
    """There can be no zygote here."""


class Block:
    """The environment as the kernel keeps it: what ``/proc/PID/environ`` shows, and C programs read.

    ``os.environ`` and putenv(3) leave it as it was when the program began, so it is changed in place.
    """

    def __init__(self) -> None:
        fields = _content("/proc/self/stat").rpartition(b")")[2].split()
        start, end = int(fields[_ENV_START]), int(fields[_ENV_END])
        block = _content("/proc/self/environ")
        if not start or end - start != len(block):
            raise UnusableError("the kernel does not say where the environment is")
        self._places: dict[str, tuple[int, int]] = {}
        for name, room in PLACEHOLDERS.items():
            offset = (b"\0" + block).find(b"\0%s=%s\0" % (name.encode(), room.encode()))
            if offset < 0:
                raise UnusableError("the environment has no room for what differs between children")
            self._places[name] = start + offset + len(name) + 1, len(room)

    def write(self, variables: dict[str, str]) -> None:
        """Set variables for this process, for its children and for who looks from outside."""
        for name, value in variables.items():
            address, room = self._places[name]
            ctypes.memmove(address, os.fsencode(value).ljust(room, b"\0"), room)
            os.environ[name] = value


@dataclass(frozen=True)
class Forked:
    """What a forked child finds.

    Attributes:
        descriptor: of its channel.
        environment: for what differs from child to child.
        frozen: functions of its libraries.
        pins: of the tree that the zygote was built for.
        pages: that the child before it has written to.
    """

    descriptor: int
    environment: Block
    frozen: functions.Frozen
    pins: pinned.Pins
    pages: list[pages.Run]


def serve(
    connection: socket.socket, decoder: frames.Decoder, first: frames.Frame, plain_modules: Collection[str]
) -> Forked:
    """Load what was asked for and fork for each request; returns in the forked children alone.

    Args:
        connection: to the supervisor; the process ends with it.
        decoder: of what comes over it.
        first: says what to load.
        plain_modules: names that plain Python has in ``sys.modules`` when it starts a program.
    """
    try:
        return _serve(connection, decoder, first, plain_modules)
    except BaseException:  # noqa: BLE001 -- no library's own end is run here: each child has its own
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _serve(
    connection: socket.socket, decoder: frames.Decoder, first: frames.Frame, plain_modules: Collection[str]
) -> Forked:
    called = _name()
    _rename(_NAME)
    try:
        pins = pinned.Pins.of(first["manifest"], first["blobs"])
        seedless = _preload(first, pins, plain_modules)
        block = Block()  # A library may have moved it (setproctitle).
    except RefusedError as refused:
        _leave(connection, {"type": "refused", "module": refused.args[0], "why": refused.args[1]})
    except UnusableError as unusable:
        _leave(connection, {"type": "unusable", "why": str(unusable)})
    _prepare(first["compiled"], first["blobs"])
    gc.collect()
    frozen = functions.Frozen()
    gc.freeze()
    connection.sendall(frames.encode(_ready(first, pins, plain_modules)))
    written: list[pages.Run] = []
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, 65536, 1, socket.MSG_CMSG_CLOEXEC)
        if not data:
            os._exit(0)
        for request in decoder.feed(data):
            if request["type"] == "pages":
                written = request["runs"]
                continue
            if request["type"] == "compile":
                _forget(request["gone"])
                _prepare(request["new"], first["blobs"], _MOST_BYTES)
                continue
            pid = _fork(request)
            if pid == 0:
                connection.close()
                _begin(called, seedless)
                return Forked(descriptors[0], block, frozen, pins, written)
            connection.sendall(frames.encode({"type": "forked", "number": request["number"], "pid": pid}))
        for descriptor in descriptors:
            os.close(descriptor)


def _prepare(sources: list[tuple[str, str]], blobs: str, most_bytes: int | None = None) -> None:
    """Compile sources of the tree, without running them; a child that executes the same bytes need not.

    Args:
        sources: sha256 and path of each.
        blobs: directory of the pinned sources.
        most_bytes: larger ones are left to the children; while one is compiled, nothing can be forked.
    """
    for digest, path in sources:
        began = time.monotonic()
        try:
            content = pinned.read_blob(blobs, digest)
            if most_bytes is not None and len(content) > most_bytes:
                continue
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                code = compile(content, path, "exec", dont_inherit=True)
            prepared = pinned.Prepared(code, len(content), pinned.lines_of(content))
        except Exception:  # noqa: BLE001, S112 -- each child will say so itself
            continue
        if not said:  # What the compiler warns of is said by each child.
            pinned.PREPARED[digest, path] = prepared
            functions.PRINTS.update({id(part): (part, codeprint(part)) for part in every(code)})
        if most_bytes is None:
            _rest(began)


def _forget(sources: list[tuple[str, str]]) -> None:
    """Drop what the tree no longer has."""
    for digest, path in sources:
        prepared = pinned.PREPARED.pop((digest, path), None)
        for part in every(prepared.code) if prepared is not None else ():
            functions.PRINTS.pop(id(part), None)


def _rest(since: float) -> None:
    """Leave the processor to others for as long as we had it."""
    time.sleep(min(time.monotonic() - since, _LONGEST_REST_SECONDS))


def _fork(request: frames.Frame) -> int | None:
    """Fork twice; return the pid of the child when the process in between is gone, 0 in the child itself."""
    reader, writer = os.pipe()
    between = os.fork()
    if between == 0:
        try:
            os.close(reader)
            os.chdir(request["directory"])
            child = os.fork()
            if child:
                os.write(writer, b"%d" % child)
                os._exit(0)
        except BaseException:  # noqa: BLE001 -- a fork must not go on as the zygote
            os._exit(1)
        os.setsid()
        os.close(writer)
        return 0
    os.close(writer)
    os.waitpid(between, 0)
    pid = os.read(reader, 20)
    os.close(reader)
    return int(pid) if pid else None


def _begin(name: bytes, seedless: list[random.Random]) -> None:
    """Become in the forked child what a process of its own would be."""
    _rename(name)
    for generator in seedless:
        generator.seed()
    processes: Any = sys.modules.get("multiprocessing.process")
    if processes is not None:  # Drawn when it was imported; generations share no secret.
        processes.current_process().authkey = os.urandom(32)


def _preload(first: frames.Frame, pins: pinned.Pins, plain_modules: Collection[str]) -> list[random.Random]:
    """Import what is asked for; return the generators of random numbers that were seeded by chance."""
    never = NEVER.union(first["never"])
    path = sys.path[:]
    sys.path[:] = [entry for entry in _search_path() if not attest.in_tree(pins, os.path.abspath(entry))]
    taken = {name for name, _ in loaded.modules()}
    effects = _Effects(pins, never)
    why = effects.found()
    if why is not None:
        raise UnusableError(f"what the interpreter loads at its start: {why}")
    with _Seeds() as seeds:
        for name, origin in first["modules"]:
            top = name.partition(".")[0]
            if top in never:
                continue
            if name not in sys.modules:
                began = time.monotonic()
                try:
                    import_module(name)
                except (Exception, SystemExit):  # noqa: BLE001, S112 -- then each child loads it
                    continue
                finally:
                    effects.check(top)
                _rest(began)
            spec = getattr(sys.modules.get(name), "__spec__", None)
            if getattr(spec, "origin", None) not in {origin, None}:
                if name in taken:
                    raise UnusableError(f"the application has another module {name}: {origin}")
                raise RefusedError(top, f"the application has another one: {origin}")
    sys.path[:] = path
    sys.path_importer_cache.clear()
    hidden = sorted(
        _names(plain_modules)
        & pinned.top_level_names(pins.sources, pins.sources, base_is_package=_is_package(pins.base, first))
    )
    if hidden:
        raise UnusableError(f"the tree has a module that libraries know as theirs: {hidden[0]}")
    return seeds.drawn


class _Effects:
    """What an import has left behind that a fork would share or lose."""

    def __init__(self, pins: pinned.Pins, never: Collection[str]) -> None:
        self._pins = pins
        self._never = never
        self._descriptors = os.listdir("/proc/self/fd")
        self._seen = set(sys.modules) - _from_tree(pins)

    def check(self, top: str) -> None:
        """Look.

        Raises:
            RefusedError: there is something.
        """
        why = self.found()
        if why is not None:
            raise RefusedError(top, why)

    def found(self) -> str | None:  # noqa: PLR0911 -- one for each
        """Return what there is, as half a sentence."""
        if len(os.listdir("/proc/self/task")) != 1:
            return "it starts a thread"
        if os.listdir("/proc/self/fd") != self._descriptors:
            return "it keeps a file or a socket open"
        if _content(f"/proc/self/task/{os.getpid()}/children"):
            return "it starts a process"
        if any(line.split(b" ", 2)[1] in _SHARED for line in _content("/proc/self/maps").splitlines()):
            return "it shares memory that can be written"
        if signal.getitimer(signal.ITIMER_REAL) != (0.0, 0.0):
            return "it sets a timer"
        if _has_printed():
            return "it prints while it is imported"
        new = sys.modules.keys() - self._seen
        self._seen |= new
        for name in sorted(new):
            if name.partition(".")[0] in self._never:
                return f"it needs {name}, which is left out"
        for name in sorted(new & _from_tree(self._pins)):
            return f"it loads {name} of the tree"
        return None


def _from_tree(pins: pinned.Pins) -> set[str]:
    """Return the names of modules that came from the tree."""
    return {
        name
        for name, module in list(sys.modules.items())
        if isinstance(file := getattr(module, "__file__", None), str)
        and attest.in_tree(pins, os.path.abspath(file))
    }


class _Seeds:
    """Notes which generators of random numbers seed themselves: two children shall not draw the same."""

    def __init__(self) -> None:
        self.drawn: list[random.Random] = []
        self._ordinary = random.Random.seed

    def __enter__(self) -> Self:
        ordinary, drawn = self._ordinary, self.drawn

        def seed(generator: random.Random, a: Any = None, version: int = 2) -> None:  # noqa: ANN401
            ordinary(generator, a, version)
            drawn[:] = [one for one in drawn if one is not generator]
            if a is None:
                drawn.append(generator)

        random.Random.seed = seed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        random.Random.seed = self._ordinary  # type: ignore[method-assign]


def _ready(first: frames.Frame, pins: pinned.Pins, plain_modules: Collection[str]) -> frames.Frame:
    names = _names(plain_modules)
    folders = {*_search_path(), first["first_path"]}
    return {
        "type": "ready",
        "modules": len(sys.modules),
        "names": sorted(names),
        "files": {path: loaded.facts(path) for path in loaded.files() | loaded.paths_files()},
        "base_is_package": _is_package(pins.base, first),
        "folders": {folder: loaded.entries(folder, names) for folder in folders},
    }


def _is_package(base: str, first: frames.Frame) -> bool:
    """Whether nobody imports what lies directly in the tree's base but as part of a package."""
    on_path = {os.path.realpath(entry) for entry in (first["first_path"], *_search_path())}
    return os.path.realpath(base) not in on_path


def _search_path() -> list[str]:
    """Return ``sys.path`` without our own folder, in whose place the application's will be."""
    return sys.path[0 if sys.flags.safe_path else 1 :]


def _names(plain_modules: Collection[str]) -> set[str]:
    """Return the top-level names that somebody else's file could stand for, were they not loaded already."""
    tops = {name.partition(".")[0] for name in sys.modules}
    return tops - {name.partition(".")[0] for name in plain_modules} - set(sys.builtin_module_names)


def _leave(connection: socket.socket, last_words: frames.Frame) -> NoReturn:
    connection.sendall(frames.encode(last_words))
    os._exit(0)


def _has_printed() -> bool:
    """Whether something stands in the pipe that is our stdout and stderr."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    waiting = ctypes.c_int(0)
    ctypes.CDLL(None).ioctl(1, _FIONREAD, ctypes.byref(waiting))
    return waiting.value > 0


def _name() -> bytes:
    return _content("/proc/self/comm").rstrip(b"\n")


def _rename(name: bytes) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name, 0, 0, 0)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
