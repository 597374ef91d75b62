"""The compile helper: purges stale bytecode, judges the syntax of sources, writes checked-hash bytecode. Runs
and ends.

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
hash), one whose hash is not that of the source, one whose source is gone. A ``.pyc`` *beside* the sources is
removed only where a source of that name is or was: elsewhere it may be a module that is shipped without
source.

Source: PEP 552, https://docs.python.org/3/library/py_compile.html.
"""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import resource
import sys
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash
from typing import Any

_HEADER_BYTES = 16
_CHECKED_HASH = 0b11


class Helper:
    """One run over one request.

    Args:
        sources: absolute path to file of pinned bytes, of each source to judge and to compile.
        removed: absolute paths of sources that were deleted.
        directories: absolute paths of directories to sweep whole.
        roots: the tree's roots, which are never removed.
    """

    def __init__(
        self, sources: dict[str, str], removed: list[str], directories: list[str], roots: list[str]
    ) -> None:
        self._sources = sources
        self._removed = removed
        self._directories = directories
        self._roots = frozenset(roots)
        self.purged: list[str] = []
        self.unwritable: list[str] = []
        self.compiled_total = 0

    def run(self) -> dict[str, Any]:
        """Do the work and return the report."""
        errors = [
            error for path, blob in self._sources.items() if (error := _judge(path, _read(blob))) is not None
        ]
        if not errors:
            self._purge()
            for path in self._sources:
                self._compile(path)
        return {
            "errors": errors,
            "purged": self.purged,
            "compiled_total": self.compiled_total,
            "unwritable": self.unwritable,
        }

    def _purge(self) -> None:
        for path in (*self._sources, *self._removed):
            folder, name = os.path.split(path)
            stem = name.removesuffix(".py")
            for cache in _cache_directories(folder):
                for entry in _names(cache):
                    if entry.endswith(".pyc") and entry.partition(".")[0] == stem:
                        self._purge_cached(os.path.join(cache, entry), path)
            self._remove_if_there(os.path.join(folder, f"{stem}.pyc"))
        for folder in self._directories:
            for cache in _cache_directories(folder):
                for entry in _names(cache):
                    if entry.endswith(".pyc"):
                        source = os.path.join(folder, entry.partition(".")[0] + ".py")
                        self._purge_cached(os.path.join(cache, entry), source)
        # Deepest first: a parent may be left with nothing only after its child went.
        for folder in sorted(
            {os.path.dirname(path) for path in self._removed} | set(self._directories), key=len
        )[::-1]:
            self._remove_shell(folder)

    def _purge_cached(self, pyc: str, source: str) -> None:
        content = _read(self._sources[source]) if source in self._sources else _read_or_none(source)
        if content is None or _stale(_read(pyc)[:_HEADER_BYTES], content):
            self._remove(pyc)

    def _compile(self, path: str) -> None:
        cached = cache_from_source(path)
        content = _read_or_none(path)
        if content is None:
            return  # Deleted since; the next manifest will say so.
        existing = _read_or_none(cached)
        if existing is not None and not _stale(existing[:_HEADER_BYTES], content):
            return
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
        except OSError:
            self.unwritable.append(path)
        else:
            self.purged.append(path)

    def _remove_shell(self, folder: str) -> None:
        """Remove a directory that holds nothing but an empty ``__pycache__``: it would import as a namespace package."""
        if folder in self._roots or _names(folder) != ["__pycache__"]:
            return
        try:
            os.rmdir(os.path.join(folder, "__pycache__"))
            os.rmdir(folder)
        except OSError:
            self.unwritable.append(folder)


def _stale(header: bytes, source: bytes) -> bool:
    """Whether the importer could take a ``.pyc`` with this header although the source is another one."""
    if len(header) < _HEADER_BYTES or int.from_bytes(header[4:8], "little") != _CHECKED_HASH:
        return True
    # The hash is keyed by the interpreter's magic number; another interpreter checks its own pyc itself.
    return header[:4] == MAGIC_NUMBER and header[8:16] != source_hash(source)


def _judge(path: str, content: bytes) -> dict[str, Any] | None:
    """Return what is wrong with the syntax of a source, or None."""
    try:
        compile(content, path, "exec", dont_inherit=True)
    except SyntaxError as error:
        return {"path": path, "line": error.lineno, "message": error.msg}
    except (ValueError, RecursionError, OverflowError, MemoryError) as error:
        return {"path": path, "line": None, "message": f"{type(error).__name__}: {error}"}
    return None


def _cache_directories(folder: str) -> list[str]:
    """Return where bytecode of the sources of a folder may lie: beside them, and below ``pycache_prefix``."""
    beside = os.path.join(folder, "__pycache__")
    return list(
        dict.fromkeys(
            (beside, os.path.dirname(importlib.util.cache_from_source(os.path.join(folder, "m.py"))))
        )
    )


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []  # Not there: nothing to purge.


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _read_or_none(path: str) -> bytes | None:
    try:
        return _read(path)
    except OSError:
        return None


def main(request_file: str) -> None:
    """Run the helper on a request and print its report."""
    request = json.loads(_read(request_file))
    limits = {"RLIMIT_CPU": request["cpu_seconds"]}
    if sys.platform == "linux":  # macOS refuses a limit of the address space
        limits["RLIMIT_AS"] = request["memory_bytes"]
    for name, limit in limits.items():
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    helper = Helper(request["sources"], request["removed"], request["directories"], request["roots"])
    json.dump(helper.run(), sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1])
