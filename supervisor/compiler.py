"""The compile helper: purges stale bytecode, judges the syntax of sources, writes checked-hash bytecode.

The prints of all code objects go into the report: what the supervisor compares the code of its children with.

A process of its own because ``compile()`` holds the GIL: five megabytes of small functions take over a minute
and most of a gigabyte. It is run as a file with the standard library only, under limits of time and memory
that it sets on itself; what it cannot finish ends the helper and not the supervisor. Request: a JSON file
named on the command line. Report: one JSON object on stdout.

The rule: **the verdict is about the pinned bytes**, the bytecode is for others. A source is judged by
compiling its blob. The ``.pyc`` beside the file on disk is there for every *other* process that runs this
tree (a cron job, a plain restart): it is written by ``py_compile`` in CHECKED_HASH mode, so the importer
compares it with the source itself and an edit in between cannot make it stale. A folder that may not be
written is reported, it is no failure: our children read no ``.pyc``.

What is stale: any ``.pyc`` that the importer would trust without reading the source (timestamp or unchecked
hash), one whose hash is not that of the source, one whose source is gone. A right hash does not make the code
behind it right: a ``.pyc`` that does not hold the very bytes that its source compiles to is replaced. (Bytes
are compared, because loading marshalled data of unknown origin can end a process.)

A ``.pyc`` *beside* the sources is removed only where a source of that name is or was: elsewhere it may be a
module that is shipped without source. A directory left with nothing but an emptied ``__pycache__`` is
removed, because it would go on to be importable as a namespace package.

Nothing met on the way can stop the helper: not a pipe under a good name, not a file of somebody else.

Source: PEP 552, https://docs.python.org/3/library/py_compile.html.
"""

from __future__ import annotations

import hashlib
import json
import marshal
import os
import py_compile
import resource
import stat
import sys
from collections.abc import Iterable
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from typing import Any

if __name__ == "__main__":  # Run as a file and without the site's packages: ours is the folder above.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from supervisor.child import codeprint

_HEADER_BYTES = 16
_CHECKED_HASH = 0b11
_CACHE = "__pycache__"


class Helper:
    """One run over one request.

    Args:
        sources: absolute path to file of pinned bytes, of each source to judge and to compile.
        removed: absolute paths of sources that were deleted.
        directories: absolute paths of directories to sweep whole.
        roots: the tree's roots, which are never removed.
        optimize: level that the children run at.
    """

    def __init__(
        self,
        sources: dict[str, str],
        removed: list[str],
        directories: list[str],
        roots: list[str],
        optimize: int = 0,
    ) -> None:
        self._sources = sources
        self._removed = removed
        self._directories = directories
        self._roots = frozenset(roots)
        self._optimize = optimize
        self._prints: dict[str, dict[str, str]] = {}
        self._bodies: dict[str, bytes] = {}
        self.purged: list[str] = []
        self.unwritable: list[str] = []
        self.compiled_total = 0

    def run(self) -> dict[str, Any]:
        """Do the work and return the report."""
        errors = [error for path in self._sources if (error := self._judge(path)) is not None]
        if not errors:
            self._purge()
            for path in self._sources:
                self._compile(path)
        return {
            "errors": errors,
            "purged": self.purged,
            "compiled_total": self.compiled_total,
            "unwritable": self.unwritable,
            "prints": self._prints,
        }

    def _judge(self, path: str) -> dict[str, Any] | None:
        """Take the prints of a source's code; return what is wrong with its syntax, or None."""
        blob = self._sources[path]
        content = _read(blob)
        if content is None:
            return _problem(path, f"its pinned bytes in {blob} are not readable")
        try:
            code = compile(content, path, "exec", dont_inherit=True, optimize=self._optimize)
            written = compile(content, path, "exec", dont_inherit=True) if self._optimize else code
            self._bodies[path] = hashlib.sha256(marshal.dumps(written)).digest()
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
            self._remove_if_there(f"{path}c")
        # Deepest first: a parent may be left with nothing only after its child went.
        for folder in sorted(
            {os.path.dirname(path) for path in self._removed} | swept, key=len, reverse=True
        ):
            self._remove_shell(folder)

    def _purge_cached(self, pyc: str, source: str) -> None:
        content = _read(self._sources.get(source, source))
        header = _read(pyc, _HEADER_BYTES)
        if content is None or header is None or _stale(header, content):
            self._remove(pyc)

    def _compile(self, path: str) -> None:
        cached = cache_from_source(path)
        content = _read(path)
        if content is None:
            return  # Deleted since; the next manifest will say so.
        existing = _read(cached)
        if existing is not None and not _stale(existing[:_HEADER_BYTES], content):
            if hashlib.sha256(existing[_HEADER_BYTES:]).digest() == self._bodies[path]:
                return
            self._remove(cached)
        try:
            py_compile.compile(
                path, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
            )
        except py_compile.PyCompileError:
            return  # Not the pinned bytes any more; the next manifest judges what is there now.
        except OSError:
            self.unwritable.append(cached)
        else:
            self.compiled_total += 1

    def _remove_if_there(self, path: str) -> None:
        if os.path.lexists(path):
            self._remove(path)

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return  # Somebody else was faster.
        except OSError:
            self.unwritable.append(path)
        else:
            self.purged.append(path)

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
                self.unwritable.append(folder)
                return
            folder, left = os.path.dirname(folder), []


def _stale(header: bytes, source: bytes) -> bool:
    """Whether the importer could take a ``.pyc`` with this header although the source is another one."""
    if len(header) < _HEADER_BYTES or int.from_bytes(header[4:8], "little") != _CHECKED_HASH:
        return True
    # The hash is keyed by the interpreter's magic number; another interpreter checks its own pyc itself.
    return header[:4] == MAGIC_NUMBER and header[8:16] != source_hash(source)


def _problem(path: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"path": path, "line": line, "message": message}


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


def _read(path: str, size: int = -1) -> bytes | None:
    """Return the bytes of a regular file, or its first ones; None for anything else, without ever waiting."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read(size) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


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
    with open(request_file, "rb") as file:
        request = json.load(file)
    _limit(request["cpu_seconds"], request["memory_bytes"])
    names = ("sources", "removed", "directories", "roots", "optimize")
    helper = Helper(*(request[name] for name in names))
    json.dump(helper.run(), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
