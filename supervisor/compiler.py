"""The compile helper: judges the syntax of sources, purges stale bytecode, writes checked-hash bytecode.

The prints of all code objects go into the report: what the supervisor compares the code of its children with.

A process of its own because ``compile()`` holds the GIL: five megabytes of small functions take over a minute
and most of a gigabyte. It is run as a file with the standard library only, under limits of time and memory
that it sets on itself; what it cannot finish ends the helper and not the supervisor, which learns from the
request file which source it was at. Request: a JSON file whose name comes as a line on stdin, when there
is work; the end of stdin before that ends the helper. Report: one JSON object on stdout.

The rule: **the verdict is about the pinned bytes**, the bytecode is for others. A source is judged by
compiling its blob. The ``.pyc`` beside the file on disk is there for every *other* process that runs this
tree (a cron job, a plain restart): it holds what was just judged and the hash of its source, so an edit in
between cannot make it stale. A folder that may not be written is reported, it is no failure: our children
read no ``.pyc``.

**What we have not compiled ourselves goes.** A ``.pyc`` of a source stays only if it holds the very bytes
that we would write. A right header does not make the code behind it right, and of the levels of optimisation
and the interpreters that are not ours we cannot tell; they compile again. (Bytes are compared, because
loading marshalled data of unknown origin can end a process.) What cannot be removed is told apart: only what
the importer would trust, with other code in it than that of its source, is *stale*.

What has no source goes if the source was there until now, or is none of a cache directory; never if git
tracks it, then it is a module that is shipped so. Bytecode of a source that is there and was not judged is
left as it is. A directory left with nothing but an emptied ``__pycache__`` is removed, because it would go on
to be importable as a namespace package.

What is left out of the tree is left alone, its bytecode as well.

Nothing met on the way can stop the helper: not a pipe under a good name, not a file of somebody else.
"""

from __future__ import annotations

import errno
import json
import marshal
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable
from importlib.util import MAGIC_NUMBER, cache_from_source
from typing import Any

if __name__ == "__main__":  # Run as a file and without the site's packages: ours is the folder above.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from supervisor import pyc
from supervisor.child import codeprint, ignored

_CACHE = "__pycache__"


class Helper:
    """One run over one request.

    Args:
        sources: absolute path to file of pinned bytes, of each source to judge and to compile.
        removed: absolute paths of sources that were deleted.
        directories: absolute paths of directories to sweep whole.
        roots: the tree's roots, which are never removed.
        base: directory that the patterns' paths are relative to.
        ignore: patterns of what is left out of the tree.
        optimize: level that the children run at.
        judge_only: take the prints and touch nothing: these are not the sources on disk.
        at: is told the path of each source before it is compiled, and the empty string after the last one.
    """

    def __init__(
        self,
        *,
        sources: dict[str, str],
        removed: list[str],
        directories: list[str],
        roots: list[str],
        base: str = "/",
        ignore: Iterable[str] = (),
        optimize: int = 0,
        judge_only: bool = False,
        at: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._sources = sources
        self._removed = removed
        self._directories = directories
        self._roots = frozenset(roots)
        self._base = base
        self._ignore = tuple(ignore)
        self._optimize = optimize
        self._judge_only = judge_only
        self._at = at
        self._prints: dict[str, dict[str, str]] = {}
        self._written: dict[str, bytes] = {}
        self._tracked: Callable[[str], bool] | None = None
        self._purged: list[str] = []
        self._unwritable: set[str] = set()
        self._stale: dict[str, str] = {}
        self._compiled_total = 0

    def run(self) -> dict[str, Any]:
        """Do the work and return the report."""
        errors = [error for path in self._sources if (error := self._judge(path)) is not None]
        self._at("")
        if not errors and not self._judge_only:
            self._purge()
            for path in self._sources:
                self._write(path)
        return {
            "errors": errors,
            "purged": self._purged,
            "compiled_total": self._compiled_total,
            "unwritable": sorted(self._unwritable),
            "stale": self._stale,
            "swept": bool(self._directories),
            "prints": self._prints,
        }

    def _judge(self, path: str) -> dict[str, Any] | None:
        """Take the prints of a source's code; return what is wrong with its syntax, or None."""
        self._at(path)
        blob = self._sources[path]
        try:
            content = pyc.read(blob)
            if content is None:
                return _problem(path, f"its pinned bytes in {blob} are not readable")
            code = compile(content, path, "exec", dont_inherit=True, optimize=self._optimize)
            written = (
                compile(content, path, "exec", dont_inherit=True, optimize=0) if self._optimize else code
            )
            self._written[path] = pyc.whole(content, marshal.dumps(written))
            self._prints[path] = {
                codeprint.codeprint(part): part.co_qualname for part in codeprint.every(code)
            }
        except SyntaxError as error:
            return _problem(path, error.msg, error.lineno)
        except MemoryError:
            return _problem(path, "compiling it takes more memory than it may")
        except (ValueError, RecursionError, OverflowError) as error:
            return _problem(path, f"{type(error).__name__}: {error}")
        return None

    # --- what goes ----------------------------------------------------------------------------------------

    def _purge(self) -> None:
        changed = (*self._sources, *self._removed)
        stems: dict[str, set[str]] = {}
        for path in changed:
            folder, name = os.path.split(path)
            stems.setdefault(folder, set()).add(name.removesuffix(".py"))
        swept = set(self._directories)
        for folder in stems.keys() | swept:
            for cache in _cache_directories(folder):
                for entry in _names(cache):
                    if entry.endswith(".pyc"):
                        stem = _stem(folder, entry, stems.get(folder, ()))
                        if folder in swept or stem in stems[folder]:
                            self._purge_cached(os.path.join(cache, entry), os.path.join(folder, f"{stem}.py"))
        for path in changed:
            if os.path.lexists(f"{path}c"):
                self._remove(f"{path}c", path)
        # Deepest first: a parent may be left with nothing only after its child went.
        for folder in sorted(
            {os.path.dirname(path) for path in self._removed} | swept, key=len, reverse=True
        ):
            self._remove_shell(folder)

    def _purge_cached(self, cached: str, source: str) -> None:
        if source in self._sources:
            ours = os.path.basename(cached) == os.path.basename(cache_from_source(source))
            if ours and pyc.read(cached) == self._written[source]:
                return
        elif not _is_gone(source) or self._is_ignored(source):
            return
        self._remove(cached, source)

    def _is_ignored(self, source: str) -> bool:
        return ignored.is_ignored(self._ignore, os.path.relpath(source, self._base))

    def _remove(self, cached: str, source: str) -> None:
        try:
            if self._is_shipped(cached, source):
                return
            os.unlink(cached)
        except FileNotFoundError:
            return  # Somebody else was faster.
        except OSError:
            self._unwritable.add(cached)
            if self._is_stale(cached, source):
                self._stale[cached] = source
        else:
            self._purged.append(cached)

    def _is_shipped(self, cached: str, source: str) -> bool:
        """Whether a file without its source, or one that would do without, belongs to a repository.

        Raises:
            OSError: that cannot be known.
        """
        if cached != f"{source}c" and not _is_gone(source):
            return False
        if self._tracked is None:
            # Only now: it is seldom needed, and every reload waits for this process to start.
            from supervisor.tracked import Tracked  # noqa: PLC0415

            self._tracked = Tracked().holds
        return self._tracked(cached)

    def _is_stale(self, cached: str, source: str) -> bool:
        """Whether the importer of another process would run other code from a file than its source's."""
        if cached == f"{source}c":
            return _is_gone(source)  # The importer prefers the source.
        if source not in self._sources or os.path.isdir(cached):
            return False  # Nothing is imported from a cache without a source.
        content, level = pyc.read(cached), pyc.level(cached, source)
        if content is None:
            return True  # Perhaps others can read it.
        if (level is None) == content.startswith(MAGIC_NUMBER):
            return False  # The name is one interpreter's and the content another one's.
        judged = pyc.read(self._sources[source]) or b""
        try:
            return pyc.is_trusted(content, source, judged) and (
                level is None or content[pyc.HEADER_BYTES :] != self._body(source, judged, level)
            )
        except (OSError, MemoryError):
            return True  # That cannot be known.

    def _body(self, path: str, source: bytes, level: int) -> bytes:
        """Return the marshalled code of a source that was judged, at another level of optimisation."""
        if level == 0:
            return self._written[path][pyc.HEADER_BYTES :]
        code = compile(source, path, "exec", dont_inherit=True, optimize=level)
        return marshal.dumps(code)  # Of a named object, as the importer does: its references are counted.

    def _remove_shell(self, folder: str) -> None:
        """Remove a directory that holds nothing but an empty ``__pycache__``, and parents emptied by that."""
        left = [_CACHE]
        while folder not in self._roots and not os.path.islink(folder) and _names(folder) == left:
            cache = os.path.join(folder, _CACHE)
            if left and _names(cache):
                return  # Somebody keeps something else there.
            try:
                if left:
                    os.rmdir(cache)
                os.rmdir(folder)
            except OSError:
                self._unwritable.add(folder)
                return
            folder, left = os.path.dirname(folder), []

    # --- what comes ---------------------------------------------------------------------------------------

    def _write(self, path: str) -> None:
        cached = cache_from_source(path)
        if pyc.read(cached) == self._written[path]:
            return
        try:
            pyc.write(cached, path, self._written[path])
        except FileNotFoundError:
            return  # The source is gone; the next manifest will say so.
        except OSError:
            self._unwritable.add(cached)
        else:
            self._compiled_total += 1


def _problem(path: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"path": path, "line": line, "message": message}


def _is_gone(source: str) -> bool:
    """Whether the importer finds no source there; one that merely cannot be looked at is not gone."""
    try:
        return stat.S_ISDIR(os.stat(source).st_mode)
    except OSError as error:
        return error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}


def _stem(folder: str, entry: str, known: Iterable[str]) -> str:
    """Return the name of the module that a cached file is of, dots and all: ``plug.in.cpython-311.pyc``.

    It is the longest beginning that is a source there, or was one until now; else all up to the first dot.
    """
    parts = entry.split(".")[:-1]
    for length in range(len(parts), 0, -1):
        stem = ".".join(parts[:length])
        if stem in known or os.path.lexists(os.path.join(folder, f"{stem}.py")):
            return stem
    return parts[0]


def _cache_directories(folder: str) -> list[str]:
    """Return where bytecode of the sources of a folder may lie: beside them, and below ``pycache_prefix``."""
    beside = os.path.join(folder, _CACHE)
    return list(dict.fromkeys((beside, os.path.dirname(cache_from_source(os.path.join(folder, "m.py"))))))


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []  # Not there: nothing to purge.


def _limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Bound what this process may use; the kernel ends it where it does not end itself."""
    limits = {"RLIMIT_CPU": cpu_seconds, "RLIMIT_CORE": 0}
    if sys.platform == "linux":  # macOS refuses a limit of the address space
        limits["RLIMIT_AS"] = memory_bytes
    for name, limit in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main(request_file: str) -> None:
    """Run the helper on a request and print its report."""
    with open(request_file, "r+b", buffering=0) as file:
        request = json.loads(file.read())
        _limit(request["cpu_seconds"], request["memory_bytes"])
        names = ("sources", "removed", "directories", "roots", "base", "ignore", "optimize", "judge_only")

        def at(path: str) -> None:
            """Note where we are, for whoever finds out that we were killed."""
            os.pwrite(file.fileno(), os.fsencode(path) + b"\0", 0)

        report = Helper(**{name: request[name] for name in names}, at=at).run()
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    name = sys.stdin.buffer.readline().rstrip(b"\n")
    if name:
        main(os.fsdecode(name))
        sys.stdout.flush()
        os._exit(0)  # All is written and closed; letting the interpreter go would hold up a reload.
