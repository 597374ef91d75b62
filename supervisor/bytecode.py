"""Bytecode: the stage between manifest and launch. Starts the compile helper and reads its report.

The rule: the main loop never compiles and never waits. :class:`CompileJob` is a process whose output the loop
collects when it is readable; a job that outlives its deadline is killed and counts as a rejection of the
tree.

Source: :mod:`supervisor.compiler` says what is purged and why.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from supervisor.manifest import Manifest, Tree

_HELPER = Path(__file__).parent / "compiler.py"

DEADLINE_SECONDS = 120.0
"""Longest wall time of a helper, and its limit of processor time."""

MEMORY_BYTES = 2 * 1024**3
"""Address space of a helper."""


@dataclass(frozen=True)
class BytecodeReport:
    """What the helper did.

    Attributes:
        error: one sentence about the first source that is no valid Python, or about the helper's own end;
        None if all is
            well. Nothing was purged or compiled then.
        purged: absolute paths of the bytecode files that were removed. compiled_total: how many were written.
        unwritable: absolute paths that could be neither removed nor written: other processes may read stale
        bytecode.
    """

    error: str | None
    purged: tuple[str, ...] = ()
    compiled_total: int = 0
    unwritable: tuple[str, ...] = ()


class CompileJob:
    """A running helper.

    Args:
        process: the helper; its stdout is non-blocking.
        request: the file it reads, removed at the end.
        deadline: monotonic time after which it is killed.
    """

    def __init__(self, process: subprocess.Popen[bytes], request: Path, deadline: float) -> None:
        self._process = process
        self._request = request
        self._output = bytearray()
        self.deadline = deadline

    def fileno(self) -> int:
        """Return the descriptor to wait on for reading."""
        return self._stdout

    @property
    def _stdout(self) -> int:
        assert self._process.stdout is not None  # noqa: S101 -- it was started with a pipe
        return self._process.stdout.fileno()

    def read(self) -> BytecodeReport | None:
        """Take what the helper has written; return its report once it has ended."""
        try:
            while data := os.read(self._stdout, 262144):
                self._output += data
        except BlockingIOError:
            return None
        code = self._close()
        try:
            return _report(json.loads(self._output))
        except ValueError:
            return BytecodeReport(f"the compile helper ended with status {code} before it was done")

    def cancel(self) -> None:
        """Kill the helper; what it had written to disk so far is checked-hash bytecode and harms nobody."""
        self._process.kill()
        self._close()

    def _close(self) -> int:
        code = self._process.wait()  # It has closed its output or was killed: this takes no time.
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._request.unlink(missing_ok=True)
        return code


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
) -> CompileJob:
    """Start purging and compiling what differs between two manifests.

    Args:
        tree: the roots.
        before: the manifest that was last compiled; None compiles all.
        after: the manifest to judge and compile.
        blobs: directory of its pinned sources.
        scratch: directory for the request.
        environment: of the children, for ``PYTHONPYCACHEPREFIX``.
        sweep: look at every cache directory of the tree, not only at those of changed sources.
        now: monotonic time.
    """
    paths = before.changes(after) if before else tuple(after.sources)
    request = {
        "sources": {after.absolute(p): str(blobs / after.sources[p]) for p in paths if p in after.sources},
        "removed": [after.absolute(p) for p in paths if p not in after.sources],
        "directories": list(tree.directories()) if sweep else [],
        "roots": tree.roots,
        "cpu_seconds": int(DEADLINE_SECONDS),
        "memory_bytes": MEMORY_BYTES,
    }
    file = scratch / f"compile-{after.digest[:16]}.json"
    file.write_text(json.dumps(request), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", "-W", "ignore", str(_HELPER), str(file)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=dict(environment),
    )
    job = CompileJob(process, file, now + DEADLINE_SECONDS)
    os.set_blocking(job.fileno(), False)
    return job


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
    )
