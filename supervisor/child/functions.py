"""Functions: which code of the tree is alive in this process, and what has taken its place.

Two looks. **Alive**: every function object whose code says that it comes from the tree, found through the
garbage collector and, because ``gc.freeze()`` hides objects from it, through the modules as well; the
supervisor compares their prints with what it compiles itself. **Bindings**: each attribute of a tree module
or of its classes that held a function of the tree when the generation was ready; one that holds code from
outside the tree now was replaced.

The rule: no false alarm for what Python programs do to themselves: decorators, closures, properties, partials
and generated methods are compared with the time of readiness, not with an idea of what they should look like.

Prints are kept, so a second look costs the walk alone. The walk runs in a thread of its own and holds the GIL
for no longer than one call of ``gc.get_objects()``, about 20 ms for a million objects; otherwise it gives way
after each switch interval. It makes hardly any system call: each lets go of the GIL for an instant, which is
too short for the main thread to take it and long enough to set its waiting time back to zero.

Rejected: walking modules alone, in slices (finds no closure that only an object holds, and no function that
was made and is called from nowhere else); a slice of the heap at a time (the interpreter lists it whole).
"""

from __future__ import annotations

import ctypes
import functools
import gc
import itertools
import os
import struct
import sys
import time
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from .codeprint import codeprint

if TYPE_CHECKING:
    from .pinned import Pins

PRINTS: dict[int, tuple[CodeType, str]] = {}
"""By the id of a code object, itself and its print: the zygote takes the prints of what it compiles."""

_DEPTH = 8
_GIVE_WAY_SECONDS = 0.0005


class Functions:
    """The functions of the tree in this process.

    Args:
        pins: which modules and files are the tree's.
        frozen: what this process had when it was forked.
    """

    def __init__(self, pins: Pins, frozen: Frozen | None = None) -> None:
        self._pins = pins
        self._frozen = frozen
        self._prints = PRINTS
        self._paths: dict[str, str | None] = {}
        self._folders: dict[str, str] = {}
        self._bound: dict[str, set[str]] = {}

    @property
    def forked(self) -> bool:
        """Whether this process was forked from one that had libraries loaded."""
        return self._frozen is not None

    def outside(self, module: object) -> bool:
        """Whether a module was there before this process was forked, and so is none of the tree's."""
        return self._frozen is not None and id(module) in self._frozen.modules

    def alive(self, *, gently: bool) -> dict[str, dict[str, str]]:
        """Return, for each relative path of the tree, the print of every code object that a function runs.

        The values of the inner dictionary are qualified names, for people.

        Args:
            gently: let whoever waits for the GIL have it first: the application is at work.
        """
        self._folders.clear()  # A link may lead elsewhere by now.
        found: dict[str, dict[str, str]] = {}
        seen: set[int] = set()
        if gently:  # The long call shall not come at the end of a slice.
            time.sleep(_GIVE_WAY_SECONDS)
        paths, unknown = self._paths, object()
        for function in self._functions():
            code = function.__code__
            # Nearly all are libraries', of a file that was met before: one look for each of those.
            if paths.get(code.co_filename, unknown) is None or id(code) in seen:
                continue
            path = self._path(code)
            if path is not None:
                seen.add(id(code))
                found.setdefault(path, {})[self._print(code)] = code.co_qualname
        # Code that no function runs any more needs no print.
        self._prints = {key: kept for key, kept in self._prints.items() if key in seen}
        return found

    def replaced(self) -> list[str]:
        """Return ``module:qualified name`` of what held code of the tree and holds other code now.

        A module is looked at for the first time when this is first called after it was loaded.
        """
        foreign = []
        for name, module in self._modules():
            bindings = dict(_bindings(module))
            before = self._bound.get(name)
            if before is None:
                self._bound[name] = {
                    key for key, function in bindings.items() if self._path(function.__code__)
                }
                continue
            foreign += [
                f"{name}:{key}"
                for key in before
                if (function := bindings.get(key)) is not None and self._path(function.__code__) is None
            ]
        return sorted(foreign)

    def _functions(self) -> Iterator[FunctionType]:
        yield from [candidate for candidate in gc.get_objects() if type(candidate) is FunctionType]
        for _, module in self._modules():
            for _, function in _bindings(module):
                yield function
        if self._frozen is not None:
            yield from self._frozen.changed()

    def _modules(self) -> list[tuple[str, ModuleType]]:
        return [
            (name, module)
            for name in list(self._pins.modules)
            if isinstance(module := sys.modules.get(name), ModuleType)
        ]

    def _print(self, code: CodeType) -> str:
        kept = self._prints.get(id(code))
        if kept is None or kept[0] is not code:
            self._prints[id(code)] = kept = (code, codeprint(code))
        return kept[1]

    def _path(self, code: CodeType) -> str | None:
        """Return the relative path of the source that a code object names, None outside the tree."""
        name = code.co_filename
        if name not in self._paths:
            self._paths[name] = self._source(name) or self._source(self._behind_links(name))
        return self._paths[name]

    def _source(self, path: str) -> str | None:
        relative = self._pins.relative(path)
        return relative if relative is not None and self._pins.has_source(relative) else None

    def _behind_links(self, path: str) -> str:
        """Do what ``os.path.realpath`` does, with each folder looked at once."""
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = os.path.realpath(folder)
        path = os.path.join(self._folders[folder], name)
        return os.path.realpath(path) if os.path.islink(path) else path


class Frozen:
    """The functions that a process has before it is forked: libraries', in objects that were frozen.

    The collector no longer lists them in the forked process, and none of them is the tree's. One that was
    given code of the tree since is found by the address of its code, read where the interpreter keeps it: to
    look at 7,500 functions in the ordinary way takes 6 ms, because each look is counted in the object and so
    copies a page of memory that was shared until then. This way it takes 0.3 ms and copies nothing: memory
    from the first to the last of them is one record, of which nothing but their places is read.
    """

    def __init__(self) -> None:
        self.modules = {id(module): module for module in sys.modules.values()}
        """By their ids, which nobody else gets while they are held here."""
        functions = [found for found in gc.get_objects() if type(found) is FunctionType]
        self._functions = sorted(functions, key=id)
        self._codes = tuple(id(function.__code__) for function in self._functions)
        offset = _offset_of_code(self._functions, self._codes)
        self._read: Callable[[], tuple[int, ...]] | None = None
        if offset is not None and self._functions:
            self._read = _reader([id(function) + offset for function in self._functions])

    def changed(self) -> Iterator[FunctionType]:
        """Yield those that run other code than before; all of them where the interpreter hides its own."""
        if self._read is None:
            yield from self._functions
            return
        now = self._read()
        if now != self._codes:
            for function, code, before in zip(self._functions, now, self._codes, strict=True):
                if code != before:
                    yield function


def _reader(places: list[int]) -> Callable[[], tuple[int, ...]]:
    """Return what reads the addresses that are kept at these places, which rise."""
    width = ctypes.sizeof(ctypes.c_void_p)
    between = (later - place - width for place, later in itertools.pairwise(places))
    record = struct.Struct("@P" + "".join(f"{gap}xP" for gap in between))
    memory = (ctypes.c_char * record.size).from_address(places[0])
    return lambda: record.unpack_from(memory)


def _offset_of_code(functions: list[FunctionType], codes: tuple[int, ...]) -> int | None:
    """Return how many bytes into a function's object the address of its code is kept."""
    width = ctypes.sizeof(ctypes.c_void_p)
    for offset in range(0, FunctionType.__basicsize__ - width + 1, width):
        if all(
            ctypes.c_void_p.from_address(id(function) + offset).value == code
            for function, code in zip(functions, codes, strict=True)
        ):
            return offset
    return None


def _bindings(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """Yield (qualified name, function) of what a module and its own classes hold."""
    yield from _held(vars(module), "", module.__name__, _DEPTH)


def _held(namespace: Any, prefix: str, module: str, depth: int) -> Iterator[tuple[str, FunctionType]]:  # noqa: ANN401 -- a mapping proxy
    for name, value in list(namespace.items()):
        if isinstance(value, type) and depth and value.__module__ == module:
            yield from _held(vars(value), f"{prefix}{name}.", module, depth - 1)
        else:
            for part, function in _unwrapped(value, depth):
                yield f"{prefix}{name}{part}", function


def _unwrapped(value: Any, depth: int) -> Iterator[tuple[str, FunctionType]]:  # noqa: ANN401 -- any attribute
    """Yield the functions that an attribute is made of: itself, or what a descriptor or a partial holds."""
    if type(value) is FunctionType:
        yield "", value
    elif isinstance(value, (staticmethod, classmethod)):
        yield from _unwrapped(value.__func__, depth)
    elif isinstance(value, property):
        for part in ("fget", "fset", "fdel"):
            for _, function in _unwrapped(getattr(value, part), depth):
                yield f".{part}", function
    elif isinstance(value, (functools.partial, functools.partialmethod)) and depth:
        yield from _unwrapped(value.func, depth - 1)
    elif isinstance(value, functools.cached_property):
        yield from _unwrapped(value.func, depth)
