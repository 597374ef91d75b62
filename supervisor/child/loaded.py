"""Loaded: which modules this process has from outside the tree, and the facts by which a change is noticed.

Used by both ends: a live child says what it has loaded, a zygote loads the same and notes the **facts** of
every file that this came from; the supervisor takes the facts again before it relies on the zygote. Equal
facts mean that a new interpreter would load the same, as far as files decide.

- *Files*: the stat tuple of each module's file, of each package's folder (a new ``.so`` beside a ``.py`` goes
  first), of everything mapped into the process (libraries of libraries) and of ``pyvenv.cfg``. The ctime is
  in it: ``touch -r`` restores an mtime, nothing restores a ctime.
- *Folders*: of each entry of ``sys.path``, the names in it that could stand for a module that was loaded, and
  the ``.pth`` files. Not their stat tuples: an application may write its files beside its code all the time.

Not seen: what a library read while it was imported and is no module (time zones, certificates, a
configuration).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import Any

_RUN_AT_EVERY_START = frozenset({"sitecustomize", "usercustomize"})
_PATHS_FILE = ".pth"

FileFacts = list[int] | None
"""Of one file; None for one that is not there. Lists, because they travel as JSON."""


def modules() -> Iterator[tuple[str, str]]:
    """Yield (name, origin) of every module that the import system found, in the order of their imports.

    The origin is a path, or ``built-in`` or ``frozen``. What a program put into ``sys.modules`` by itself, or
    under a second name, is left out.
    """
    for name, module in list(sys.modules.items()):
        spec = _namespace(module).get("__spec__")
        origin = getattr(spec, "origin", None)
        if getattr(spec, "name", None) == name and isinstance(origin, str):
            yield name, origin


def files() -> set[str]:
    """Return the absolute paths of all that makes up the modules of this process."""
    found = {os.path.join(sys.prefix, "pyvenv.cfg"), sys.executable}
    for module in list(sys.modules.values()):
        namespace = _namespace(module)
        file, folders = namespace.get("__file__"), namespace.get("__path__")
        if isinstance(file, str):
            found.add(os.path.abspath(file))
        if isinstance(folders, Iterable):
            found.update(os.path.abspath(folder) for folder in folders if isinstance(folder, str))
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            path = line.rstrip("\n").partition("/")[2]
            if path and "/" in path:
                found.add(f"/{path}")
    return found


def facts(path: str) -> FileFacts:
    """Return what tells a file or folder from every other one that stood or will stand in its place."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return [stat.st_mode, stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def entries(folder: str, names: Collection[str]) -> list[str]:
    """Return what in a folder of ``sys.path`` could be one of the top-level ``names``, sorted."""
    try:
        found = os.listdir(folder or ".")
    except OSError:
        return []
    return sorted(
        entry
        for entry in found
        if (stem := entry.partition(".")[0]) in names
        or stem in _RUN_AT_EVERY_START
        or entry.endswith(_PATHS_FILE)
    )


def paths_files() -> set[str]:
    """Return the ``.pth`` files of ``sys.path``: what they say is done at every start."""
    return {
        os.path.join(folder, e) for folder in sys.path for e in entries(folder, ()) if e.endswith(_PATHS_FILE)
    }


def _namespace(module: Any) -> dict[str, Any]:  # noqa: ANN401 -- sys.modules may hold any object
    """Return a module's dictionary without asking the module: one that is loaded lazily would be loaded."""
    try:
        namespace = object.__getattribute__(module, "__dict__")
    except AttributeError:
        return {}
    return namespace if isinstance(namespace, dict) else {}
