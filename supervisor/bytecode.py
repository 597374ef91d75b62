"""Bytecode: the stage between manifest and launch. Starts the compile helper and reads its report.

The rule: the main loop never compiles and never waits. :class:`CompileJob` is a process whose output the loop
collects when it is readable; a job that outlives its deadline is killed and counts as a rejection of the
tree, and so does one that hits its own limits or could not be started at all.

The helper gets the children's environment without what would change how *it* works: a ``PYTHONPATH`` that
leads into the tree would have it import the tree's modules in place of the standard library's.

Source: :mod:`supervisor.compiler` says what is purged and why.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.errors import SourceError
from supervisor.manifest import Manifest, Tree

_HELPER = Path(__file__).parent / "compiler.py"

DEADLINE_SECONDS = 120.0
"""Longest wall time of a helper, and its limit of processor time."""

_MAX_OPTIMIZE = 2
_numbers = itertools.count(1)

MEMORY_BYTES = 2 * 1024**3
"""Address space of a helper."""

_HEARD_VARIABLES = frozenset({"PYTHONPYCACHEPREFIX", "PYTHONHOME", "PYTHONUTF8", "PYTHONCOERCECLOCALE"})
"""Which of Python's own variables the helper takes over: where things lie, and how names are spelt."""


@dataclass(frozen=True)
class BytecodeReport:
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
        passing: the error says nothing about the tree: the machine could not run the helper just now.
    """

    error: str | None
    purged: tuple[str, ...] = ()
    compiled_total: int = 0
    unwritable: tuple[str, ...] = ()
    stale: Mapping[str, str] = field(default_factory=dict)
    swept: bool = False
    passing: bool = False
    prints: Mapping[str, Mapping[str, str]] = field(default_factory=dict, compare=False)


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
        self._request.unlink(missing_ok=True)
        if isinstance(self._process, str):
            return self._process
        code = self._process.wait()  # It has closed its output or was killed: this takes no time.
        if code == -signal.SIGXCPU:
            return f"{place}compiling the tree took more than {DEADLINE_SECONDS:g} s of processor time"
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"{place}the compile helper ended {how} before it was done"


def start(
    *,
    tree: Tree,
    before: Manifest | None,
    after: Manifest,
    blobs: Path,
    scratch: Path,
    environment: Mapping[str, str],
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
        blobs: directory of its pinned sources.
        scratch: directory for the request.
        environment: of the children, for ``PYTHONPYCACHEPREFIX``.
        sweep: compile all, and look at every cache directory of the tree, not only at those of changed
            sources.
        now: monotonic time.
        again: relative paths of sources whose bytecode was not left as it should be.
    """
    changed = after.sources.keys() if before is None or sweep else {*before.changes(after), *again}
    gone = ((before.sources.keys() if before else set()) | set(again)) - after.sources.keys()
    problem = None
    directories: list[str] = []
    try:
        directories = list(tree.directories()) if sweep else []
    except SourceError as error:
        problem = str(error)
    request = {
        "sources": {after.absolute(p): str(blobs / after.sources[p]) for p in changed if p in after.sources},
        "removed": [after.absolute(p) for p in sorted(gone)],
        "directories": directories,
        "roots": tree.roots,
    }
    job = _start(request, scratch=scratch, environment=environment, now=now, problem=problem)
    job.paths = frozenset(changed | gone)
    return job


def judge(
    kept: Manifest, *, blobs: Path, scratch: Path, environment: Mapping[str, str], now: float
) -> CompileJob:
    """Start taking the prints of a manifest that need not be the one on disk; nothing there is touched."""
    request = {
        "sources": {kept.absolute(p): str(blobs / digest) for p, digest in kept.sources.items()},
        "removed": [],
        "directories": [],
        "roots": kept.roots,
        "judge_only": True,
    }
    return _start(request, scratch=scratch, environment=environment, now=now)


def _start(
    request: Mapping[str, object],
    *,
    scratch: Path,
    environment: Mapping[str, str],
    now: float,
    problem: str | None = None,
) -> CompileJob:
    """Start the helper; with a problem there is nothing that it could do, and the job says why."""
    file = scratch / f"compile-{next(_numbers)}.json"
    limits = {"cpu_seconds": int(DEADLINE_SECONDS), "memory_bytes": MEMORY_BYTES}
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    if problem is not None:
        os.close(writer)
        return CompileJob(problem, reader, file, now + DEADLINE_SECONDS)
    process: subprocess.Popen[bytes] | str
    try:
        optimize = _optimize(environment)
        file.write_text(
            json.dumps({"judge_only": False, "optimize": optimize, **limits, **request}), encoding="utf-8"
        )
        process = subprocess.Popen(
            [sys.executable, "-S", "-P", "-W", "ignore", str(_HELPER), str(file)],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            env=_environment(environment),
        )
    except OSError as error:
        process = f"the compile helper could not be started: {error.strerror or error}"
    finally:
        os.close(writer)
    return CompileJob(process, reader, file, now + DEADLINE_SECONDS)


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
