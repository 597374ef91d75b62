"""Spawned processes: what ``multiprocessing`` starts from scratch imports the generation's blobs, too.

A spawned worker is a new interpreter that imports ``__main__`` and the modules of what it is sent, by their
names, from ``sys.path``: from the disk, whatever stands there by then. So it is sent one more thing first: an
object whose unpickling runs our bootstrap, which pins the imports before any module of the tree is wanted.

The rule: nothing of ``multiprocessing`` is imported, and nothing of it is touched, unless the application
imports it itself.

What it does not do: a worker is not attested. It cannot execute other bytes than the manifest's, but what
happens to its functions in memory is not looked at.

Rejected: ``sitecustomize`` on ``PYTHONPATH`` (every Python program that the application starts would get it),
an executable of our own (``multiprocessing.set_executable`` is the application's to set).

Source: ``multiprocessing/spawn.py`` (``get_preparation_data``, ``prepare``): keys it does not know are
ignored.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import pinned

if TYPE_CHECKING:
    from collections.abc import Sequence

_MODULE = "multiprocessing.spawn"
_BOOTSTRAP = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bootstrap.py")


class _PinsOnArrival:
    """Pins the imports of the process in which it is unpickled.

    Args:
        manifest: file of the manifest.
        blobs: directory of the blobs.
        run_name: ``__name__`` by which the bootstrap knows what it is run for.
    """

    def __init__(self, manifest: str, blobs: str, run_name: str) -> None:
        self._manifest = manifest
        self._blobs = blobs
        self._run_name = run_name

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        from runpy import run_path  # noqa: PLC0415 -- multiprocessing.spawn has it loaded

        pins = {"MANIFEST": self._manifest, "BLOBS": self._blobs}
        return run_path, (_BOOTSTRAP, pins, self._run_name)


class _Finder:
    """Finds :data:`_MODULE` where everybody does, and has it changed once it is loaded (PEP 451)."""

    def __init__(self, change: Callable[[ModuleType], None]) -> None:
        self._change = change

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of the one module that this is about, None for all others."""
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            ordinary = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                ordinary(module)
                self._change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install(manifest: str, blobs: str, run_name: str) -> None:
    """Have the processes that ``multiprocessing`` spawns from here pin their imports as this one does.

    Args:
        manifest: file of the manifest.
        blobs: directory of the blobs.
        run_name: ``__name__`` under which the bootstrap calls :func:`pin`.
    """

    def change(module: ModuleType) -> None:
        ordinary = module.get_preparation_data

        def get_preparation_data(name: str) -> dict[str, Any]:
            arrival = _PinsOnArrival(manifest, blobs, run_name)
            return {"wa_supervisor_pins": arrival, **ordinary(name)}

        vars(module)["get_preparation_data"] = get_preparation_data

    loaded = sys.modules.get(_MODULE)
    if loaded is not None:
        change(loaded)
    else:
        sys.meta_path.insert(0, _Finder(change))


def pin(manifest: str, blobs: str, run_name: str, plain_modules: frozenset[str]) -> None:
    """Pin the imports of this process, which was spawned.

    Args:
        manifest: file of the manifest.
        blobs: directory of the blobs.
        run_name: as for :func:`install`, for the processes that this one spawns.
        plain_modules: names that it had in ``sys.modules`` before us.
    """
    pinned.install(pinned.Pins.of(manifest, blobs), plain_modules)
    install(manifest, blobs, run_name)
