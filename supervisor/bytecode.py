"""Bytecode: the stage between manifest and launch. Starts the compile helper and reads its report.

The rule: the main loop never compiles and never waits. :class:`CompileJob` is a process whose output the loop
collects when it is readable; a job that outlives its deadline is killed and counts as a rejection of the
tree, and so does one that hits its own limits or could not be started at all.

A helper works once, because limits of processor time and memory hold for a process. The next one is started
beforehand, so that nobody waits for an interpreter: it reads nothing of the tree until it is told what to do.

The helper gets the children's environment without what would change how *it* works: a ``PYTHONPATH`` that
leads into the tree would have it import the tree's modules in place of the standard library's.

Source: :mod:`supervisor.compiler` says what is purged and why.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from msgspec import Struct, field

from supervisor.errors import SourceError
from supervisor.manifest import Manifest, Tree
from supervisor.sharded import Sharded

_HELPER = Path(__file__).parent / "compiler.py"

DEADLINE_SECONDS = 120.0
"""Longest wall time of a helper, and its limit of processor time."""

_MAX_OPTIMIZE = 2
_numbers = itertools.count(1)

MEMORY_BYTES = 2 * 1024**3
"""Address space of a helper."""

_HEARD_VARIABLES = frozenset({"PYTHONPYCACHEPREFIX", "PYTHONHOME", "PYTHONUTF8", "PYTHONCOERCECLOCALE"})
"""Which of Python's own variables the helper takes over: where things lie, and how names are spelt."""


class BytecodeReport(Struct, frozen=True):
    """What the helper did.

    Attributes:
        error: one sentence about the first source that is no valid Python, or about the helper's own end;
            None if all is well.
        purged: absolute paths of the bytecode files that were removed.
        compiled_total: how many were written.
        unwritable: absolute paths that could not be removed or written, although they should have been.
        stale: those of them that other processes may run although they are not their sources' code, with the
            path of the source.
        swept: every cache directory of the tree was looked at, so that nothing else is unwritable.
        prints: absolute path of each source to the prints of its code objects, and their qualified names.
        passing: the error says nothing about the tree: the machine could not run the helper just now. There
            is an error then.
    """

    error: str | None
    purged: tuple[str, ...] = ()
    compiled_total: int = 0
    unwritable: tuple[str, ...] = ()
    stale: Mapping[str, str] = field(default_factory=dict)
    swept: bool = False
    passing: bool = False
    prints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


class CompileJob:
    """A running helper.

    Args:
        process: the helper, or why there is none.
        output: non-blocking descriptor of what it writes. It is closed with the last reference to the job and
            not earlier: its number may not go to another file while the main loop still waits on it.
        request: the file it reads, removed at the end.
        deadline: monotonic time after which it is to be killed.

    Attributes:
        paths: relative paths of the sources, deleted ones included, whose bytecode it works on.
    """

    def __init__(
        self,
        process: subprocess.Popen[bytes] | str,
        output: int,
        request: Path,
        deadline: float,
    ) -> None:
        self._process = process
        self._output = output
        weakref.finalize(self, os.close, output)
        self._request = request
        self._received = bytearray()
        self.deadline = deadline
        self.paths: frozenset[str] = frozenset()

    @property
    def pid(self) -> int | None:
        """The helper's process id; None if it could not be started."""
        return None if isinstance(self._process, str) else self._process.pid

    def fileno(self) -> int:
        """Return the descriptor to wait on for reading."""
        return self._output

    def read(self) -> BytecodeReport | None:
        """Take what the helper has written; return its report once it has ended."""
        try:
            while data := os.read(self._output, 262144):
                self._received += data
        except BlockingIOError:
            return None
        ended = self._close()
        try:
            return _report(json.loads(self._received))
        except ValueError:
            return BytecodeReport(ended, passing=self._killed_or_not_started())

    def cancel(self) -> None:
        """Kill the helper; what it had written to disk so far is checked-hash bytecode and harms nobody."""
        self._kill()
        self._close()

    def expire(self) -> BytecodeReport:
        """Kill the helper because its time is up, and return the report that it did not make."""
        self._kill()
        place = self._place()
        self._close()
        return BytecodeReport(f"{place}the compile helper was not done after {DEADLINE_SECONDS:g} s")

    def _kill(self) -> None:
        if not isinstance(self._process, str):
            self._process.kill()

    def _place(self) -> str:
        """Return the path of the source that the helper is at, for the beginning of a sentence."""
        try:
            path, _, _ = self._request.read_bytes().partition(b"\0")
        except OSError:
            return ""
        return f"{os.fsdecode(path)}: " if path.startswith(b"/") else ""

    def _killed_or_not_started(self) -> bool:
        return isinstance(self._process, str) or self._process.returncode == -signal.SIGKILL

    def _close(self) -> str:
        """Free what was held and say how the helper ended."""
        place = self._place()
        with contextlib.suppress(OSError):  # Whatever has become of its directory.
            self._request.unlink()
        if isinstance(self._process, str):
            return self._process
        code = self._process.wait()  # It has closed its output or was killed: this takes no time.
        if code == -signal.SIGXCPU:
            return f"{place}compiling the tree took more than {DEADLINE_SECONDS:g} s of processor time"
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"{place}the compile helper ended {how} before it was done"


class _Helper(Struct, frozen=True):
    """A helper that has not been told its work; ``output`` is where its report will come from."""

    process: subprocess.Popen[bytes]
    output: int

    def tell(self, request: Path) -> _Helper:
        """Name its request and return it; raises OSError, and it is no more, if it does not listen."""
        try:
            if self.process.stdin is not None:
                with self.process.stdin:
                    self.process.stdin.write(os.fsencode(request) + b"\n")
        except OSError:
            self.discard()
            raise
        return self

    def discard(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        os.close(self.output)


class Compiler:
    """Starts helpers.

    Args:
        blobs: directory of the pinned sources.
        scratch: directory for the requests.
        environment: of the children, for ``PYTHONPYCACHEPREFIX``.
    """

    def __init__(self, *, blobs: Path, scratch: Path, environment: Mapping[str, str]) -> None:
        self._blobs = blobs
        self._scratch = scratch
        self._optimize = _optimize(environment)
        self._environment = _environment(environment)
        self._spare: _Helper | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the helper that waits for work, if there is one."""
        return self._spare.process.pid if self._spare is not None else None

    def prepare(self) -> None:
        """Have a helper wait for the next piece of work; a machine that cannot start one now is no error."""
        if self._spare is not None and self._spare.process.poll() is not None:
            self.close()
        if self._spare is None:
            with contextlib.suppress(OSError):
                self._spare = self._spawn()

    def start(
        self,
        *,
        tree: Tree,
        before: Manifest | None,
        after: Manifest,
        sweep: bool,
        now: float,
        again: Collection[str] = (),
    ) -> CompileJob:
        """Start purging and compiling what differs between two manifests.

        Args:
            tree: the roots.
            before: the manifest that was last compiled, for what has changed and what is gone since; None
                compiles all.
            after: the manifest to judge and compile.
            sweep: compile all, and look at every cache directory of the tree, not only at those of changed
                sources.
            now: monotonic time.
            again: relative paths of sources whose bytecode was not left as it should be.
        """
        altered, left = (before.sources if before else Sharded({})).difference(after.sources)
        changed = after.sources.keys() if sweep else {*altered, *again}
        gone = {path for path in (*left, *again) if path not in after.sources}
        problem = None
        directories: list[str] = []
        try:
            directories = [folder.path for folder in tree.folders()] if sweep else []
        except SourceError as error:
            problem = str(error)
        request = {
            "sources": self._sources(after, [path for path in changed if path in after.sources]),
            "removed": [after.absolute(p) for p in sorted(gone)],
            "directories": directories,
            "roots": tree.roots,
            "base": tree.base,
            "ignore": tree.ignore,
            "judge_only": False,
        }
        job = self._start(request, now, problem)
        job.paths = frozenset(changed | gone)
        return job

    def judge(self, kept: Manifest, now: float) -> CompileJob:
        """Start taking the prints of a manifest that need not be the one on disk; nothing is touched."""
        request = {
            "sources": self._sources(kept, kept.sources),
            "removed": [],
            "directories": [],
            "roots": kept.roots,
            "base": kept.base,
            "ignore": kept.ignore,
            "judge_only": True,
        }
        return self._start(request, now)

    def close(self) -> None:
        """Let the helper that waits for work go."""
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.discard()

    def _sources(self, manifest: Manifest, paths: Iterable[str]) -> dict[str, str]:
        return {manifest.absolute(path): str(self._blobs / manifest.sources[path]) for path in paths}

    def _start(self, request: Mapping[str, object], now: float, problem: str | None = None) -> CompileJob:
        """Give a helper its work; with a problem there is nothing that it could do, and the job says why."""
        file = self._scratch / f"compile-{next(_numbers)}.json"
        limits = {"cpu_seconds": int(DEADLINE_SECONDS), "memory_bytes": MEMORY_BYTES}
        if problem is None:
            try:
                body = {"optimize": self._optimize, **limits, **request}
                file.write_text(json.dumps(body), encoding="utf-8")
                helper = self._take(file)
                os.set_blocking(helper.output, False)
                return CompileJob(helper.process, helper.output, file, now + DEADLINE_SECONDS)
            except OSError as error:
                problem = f"the compile helper could not be started: {error.strerror or error}"
        reader, writer = os.pipe()
        os.close(writer)
        os.set_blocking(reader, False)
        return CompileJob(problem, reader, file, now + DEADLINE_SECONDS)

    def _take(self, request: Path) -> _Helper:
        """Return a helper that was told its work.

        Raises:
            OSError: there can be none.
        """
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(OSError):  # It has ended, for whatever reason; another one will do.
                return spare.tell(request)
        return self._spawn().tell(request)

    def _spawn(self) -> _Helper:
        reader, writer = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-S", "-P", "-W", "ignore", str(_HELPER)],
                stdin=subprocess.PIPE,
                stdout=writer,
                env=self._environment,
                bufsize=0,
            )
        except OSError:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return _Helper(process, reader)


def _environment(children: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in children.items()
        if not name.startswith("PYTHON") or name in _HEARD_VARIABLES
    }


def _optimize(children: Mapping[str, str]) -> int:
    """Return the level that the children's interpreter takes from PYTHONOPTIMIZE."""
    value = children.get("PYTHONOPTIMIZE", "")
    return min(int(value), _MAX_OPTIMIZE) if value.isdecimal() else int(bool(value))


def shorten(paths: Collection[str], limit: int = 5) -> str:
    """Return a short list of paths for a sentence."""
    shown = ", ".join(sorted(paths)[:limit])
    return shown if len(paths) <= limit else f"{shown} and {len(paths) - limit} more"


def _report(body: dict[str, object]) -> BytecodeReport:
    errors = body["errors"]
    error = None
    if isinstance(errors, list) and errors:
        first = errors[0]
        where = first["path"] if first["line"] is None else f"{first['path']}, line {first['line']}"
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        error = f"{where}: {first['message']}{more}"
    return BytecodeReport(
        error,
        tuple(body["purged"]),  # type: ignore[arg-type]
        int(body["compiled_total"]),  # type: ignore[call-overload]
        tuple(body["unwritable"]),  # type: ignore[arg-type]
        body["stale"],  # type: ignore[arg-type]
        bool(body["swept"]),
        prints=body["prints"],  # type: ignore[arg-type]
    )
