"""Pinned imports: modules of the tree come from the bytes of the manifest, and from nowhere else.

The invariant: **a source of the tree that this process executes was read from a blob of its manifest, its
sha256 was checked before it was compiled, and it is on record**. (A process that was forked from a zygote may
find the compiling done, in its own memory.) So one process can never mix two versions:
not by a lazy import an hour after the file changed, not when it is broken or gone by then, and not through a
stale ``.pyc``, because no ``.pyc`` of the tree is ever read.

How: a path hook (PEP 302) in front of the ordinary one claims the directories that belong to the tree, and
only those, so ``sys.path`` order, relative entries, packages and namespace packages work as they always do,
and modules outside the tree never come near this code. Extension modules inside the tree are left to the
ordinary finder, and so is what the tree's owner has left out of it (``--ignore``): it is imported from the
disk as it stands there, through its bytecode as well, and nothing is proven of it.

Rejected: a ``sys.meta_path`` finder (must rebuild the order of ``sys.path``); ``SourceFileLoader.get_data``
with the pinned bytes and the standard bytecode cache (an unchecked-hash ``.pyc`` is trusted without looking
at the source: https://docs.python.org/3/reference/import.html#pyc-invalidation); sending every import through
the hook (half a second for 200 third-party modules whose cached bytecode is then not used).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import linecache
import os
import sys
import warnings
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from importlib.util import decode_source, spec_from_file_location
from types import CodeType, ModuleType
from typing import IO, Any, cast

from .ignored import is_ignored


@dataclass(frozen=True)
class Prepared:
    """What a source becomes, made beforehand.

    Attributes:
        code: its code, which nobody has run.
        size: of the source in bytes.
        lines: its text, as ``linecache`` keeps it.
    """

    code: CodeType
    size: int
    lines: list[str]


PREPARED: dict[tuple[str, str], Prepared] = {}
"""By sha256 and path of the source: made from those bytes by the zygote that this process was forked from,
which read and checked them as :meth:`Pins.read` does. Each is used once."""


class PinnedSourceError(ImportError):
    """The bytes that this generation was started from are missing or damaged; the module is not executed."""


class Names:
    """What the paths of a tree's sources say without their content.

    Args:
        sources: relative paths.

    Attributes:
        directories: relative paths of all directories, the base's is empty.
        top_level: names of what can be imported from some directory of the tree on ``sys.path``.
    """

    def __init__(self, sources: Collection[str]) -> None:
        self.directories = {""}
        for directory in {path.rpartition("/")[0] for path in sources}:  # Each once: a tree may be large.
            parts = directory.split("/")
            self.directories.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        self.top_level = top_level_names(sources, sources)


class Pins:
    """The manifest as a child sees it, and the record of what was executed from it.

    Args:
        base: absolute directory that the manifest's paths are relative to.
        roots: absolute directories of the tree.
        sources: relative path to sha256 of each source.
        blobs: absolute directory of the blobs.
        ignore: patterns of what is left out of the tree.
        names: what the paths say, if that is known.
    """

    def __init__(
        self,
        base: str,
        roots: list[str],
        sources: Mapping[str, str],
        blobs: str,
        ignore: tuple[str, ...] = (),
        *,
        names: Names | None = None,
    ) -> None:
        self.executed: dict[str, str] = {}
        """Relative path to sha256 of every source that was compiled for execution in this process."""
        self.modules: dict[str, str] = {}
        """Module name to the relative path it was executed from."""
        self.compiled: set[tuple[str, str]] = set()
        """Sha256 and path of each source that was compiled in this process, or for it."""
        self.sources = sources
        self.base = base
        self._blobs = blobs
        self._ignore = ignore
        self._given_roots = roots
        # A tree may be reached by the name that was given or by the real one behind links.
        self._bases = tuple(dict.fromkeys((base, os.path.realpath(base))))
        self._roots = tuple(dict.fromkeys([*roots, *(os.path.realpath(root) for root in roots)]))
        self._names = names or Names(sources)

    @classmethod
    def of(cls, manifest: str, blobs: str) -> Pins:
        """Return the pins that a manifest's file describes.

        Raises:
            OSError, ValueError, KeyError: it is not readable, or no manifest.
        """
        with open(manifest, "rb") as file:
            body = json.load(file)
        return cls(body["base"], body["roots"], body["sources"], blobs, tuple(body.get("ignore", ())))

    def changed(self, altered: Mapping[str, str], gone: Collection[str]) -> Pins:
        """Return the pins of a tree that differs in some sources; takes no longer for a large tree.

        Args:
            altered: relative path to sha256 of what is new or other than here.
            gone: relative paths of what is not there.
        """
        sources: Mapping[str, str] = ChainMap(dict(altered), cast("dict[str, str]", self.sources))
        names: Names | None = self._names
        if gone or any(path not in self.sources for path in altered):
            left = set(gone)
            sources = {path: digest for path, digest in sources.items() if path not in left}
            names = None
        return Pins(self.base, self._given_roots, sources, self._blobs, self._ignore, names=names)

    def relative(self, path: str) -> str | None:
        """Return the manifest's name of an absolute path, or None outside the tree."""
        if not any(path == root or path.startswith(root + os.sep) for root in self._roots):
            return None
        for base in self._bases:
            if path == base:
                return ""
            if path.startswith(base.rstrip(os.sep) + os.sep):
                return path[len(base.rstrip(os.sep)) + 1 :].replace(os.sep, "/")
        return None

    def top_level_names(self) -> set[str]:
        """Return the names of what can be imported from some directory of the tree on ``sys.path``."""
        return self._names.top_level

    def holds_root(self, directory: str) -> bool:
        """Whether a directory lies outside the tree and a root lies directly in it."""
        return self.relative(directory) is None and any(
            os.path.dirname(root) == directory for root in self._roots
        )

    def has_source(self, relative: str) -> bool:
        """Whether the manifest has a source of this relative path."""
        return relative in self.sources

    def ignores(self, relative: str) -> bool:
        """Whether a path was left out of the tree."""
        return is_ignored(self._ignore, relative)

    def has_directory(self, relative: str) -> bool:
        """Whether the manifest has any source below this relative directory."""
        return relative in self._names.directories

    def names_in(self, relative: str) -> Iterator[tuple[str, bool]]:
        """Yield (module name, whether it is a package) of what lies directly in a directory of the tree."""
        prefix = f"{relative}/" if relative else ""
        for path in self.sources:
            inside = path.removeprefix(prefix) if path.startswith(prefix) else ""
            parts = inside.split("/")
            if len(parts) == 1 and parts[0].endswith(".py") and parts[0] != "__init__.py":
                yield parts[0].removesuffix(".py"), False
            elif len(parts) == 2 and parts[1] == "__init__.py":  # noqa: PLR2004 -- directory and file
                yield parts[0], True

    def read(self, relative: str, module: str) -> bytes:
        """Return the pinned bytes of a source.

        Raises:
            PinnedSourceError: the blob is missing or no longer has the manifest's sha256.
        """
        try:
            return read_blob(self._blobs, self.sources[relative])
        except OSError as error:
            raise PinnedSourceError(
                f"pinned source of {relative}: {error}", name=module, path=relative
            ) from error
        except ValueError as error:
            raise PinnedSourceError(
                f"pinned source of {relative} is damaged", name=module, path=relative
            ) from error

    def compile(self, relative: str, path: str, module: str) -> CodeType:
        """Return the code of a source, compiled from its pinned bytes, and put it on record as executed."""
        source = self.sources[relative], path
        prepared = PREPARED.pop(source, None)
        if prepared is not None:
            linecache.cache[path] = (prepared.size, None, prepared.lines, path)
            self._executes(relative, source[0], module)
            code = prepared.code
        else:
            code = compile(self.take(relative, path, module), path, "exec", dont_inherit=True)
        self.compiled.add(source)
        return code

    def compiles(self, paths: Iterable[str]) -> bool:
        """Whether these sources are valid Python; what was compiled to find out is kept for its execution.

        Args:
            paths: relative ones.
        """
        for relative in paths:
            digest, path = self.sources[relative], os.path.join(self.base, relative)
            if (digest, path) not in PREPARED:
                try:
                    made = prepared(read_blob(self._blobs, digest), path)
                except Exception:  # noqa: BLE001 -- whatever it is, the supervisor finds it, too, and tells
                    return False
                if made is not None:
                    PREPARED[digest, path] = made
        return True

    def take(self, relative: str, path: str, module: str) -> bytes:
        """Return the pinned bytes of a source for execution, and put it on record as executed.

        ``linecache`` gets the same bytes, so that a traceback never shows new lines for old code.

        Raises:
            PinnedSourceError: the blob is missing or no longer has the manifest's sha256.
        """
        content = self.read(relative, module)
        with contextlib.suppress(SyntaxError, UnicodeError):  # Compiling it will say so.
            # An entry whose mtime is None is never checked against the disk.
            linecache.cache[path] = (len(content), None, lines_of(content), path)
        self._executes(relative, hashlib.sha256(content).hexdigest(), module)
        return content

    def _executes(self, relative: str, digest: str, module: str) -> None:
        self.executed[relative] = digest
        self.modules[module] = relative


def prepared(content: bytes, path: str) -> Prepared | None:
    """Return a source compiled for execution; None if the compiler warns: who executes it is to say so.

    Raises:
        SyntaxError, ValueError, RecursionError, OverflowError, MemoryError: it does not compile.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        code = compile(content, path, "exec", dont_inherit=True)
    return None if said else Prepared(code, len(content), lines_of(content))


def lines_of(content: bytes) -> list[str]:
    """Return the lines of a source as ``linecache`` keeps them."""
    return decode_source(content).splitlines(keepends=True)


def read_blob(blobs: str, digest: str) -> bytes:
    """Return the bytes that have a sha256.

    Raises:
        OSError: the blob is missing.
        ValueError: it holds other bytes.
    """
    with open(os.path.join(blobs, digest), "rb") as file:
        content = file.read()
    if hashlib.sha256(content).hexdigest() != digest:
        raise ValueError(f"the blob {digest} is damaged")
    return content


def top_level_names(
    paths: Iterable[str], sources: Collection[str], *, base_is_package: bool = False
) -> set[str]:
    """Return the names of those among ``paths`` that can be top-level modules.

    Args:
        paths: relative paths of sources.
        sources: those of the whole tree.
        base_is_package: the directory that they are relative to is not on ``sys.path``, if it is a package.
    """
    inside = base_is_package and "__init__.py" in sources
    holders: dict[str, set[str]] = {}
    for path in paths:
        directory, _, file = path.rpartition("/")
        if file == "__init__.py":
            directory, _, file = directory.rpartition("/")
        holders.setdefault(directory, set()).add(file)
    names: set[str] = set()
    for directory, files in holders.items():  # Each once: a tree may be large.
        if f"{directory}/__init__.py" not in sources and (directory or not inside):
            names.update(file.removesuffix(".py") for file in files)
    return names


class PinnedLoader(SourceFileLoader):
    """Loads one module of the tree from its blob; data files beside it are read from disk as usual."""

    def __init__(self, fullname: str, path: str, pins: Pins, relative: str) -> None:
        super().__init__(fullname, path)
        self._pins = pins
        self._relative = relative

    def get_code(self, fullname: str) -> CodeType:
        """Compile the pinned source; bytecode is neither read nor written."""
        return self._pins.compile(self._relative, self.path, fullname)

    def get_source(self, fullname: str) -> str:
        """Return the pinned source as text."""
        return decode_source(self._pins.read(self._relative, fullname))


class PinnedFinder:
    """Finds the modules that lie directly in one directory of the tree (a path entry finder, PEP 302)."""

    def __init__(self, pins: Pins, directory: str, relative: str) -> None:
        self._pins = pins
        self._directory = directory
        self._relative = relative
        self._extensions = FileFinder(directory, (ExtensionFileLoader, EXTENSION_SUFFIXES))
        self._ordinary = FileFinder(
            directory, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, SOURCE_SUFFIXES)
        )

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of a module of this directory, a namespace portion, or None."""
        tail = fullname.rpartition(".")[2]
        base = f"{self._relative}/{tail}" if self._relative else tail
        package = os.path.join(self._directory, tail)
        if self._pins.has_source(f"{base}/__init__.py"):
            return pinned_spec(
                self._pins, fullname, os.path.join(package, "__init__.py"), f"{base}/__init__.py", [package]
            )
        extension = self._extensions.find_spec(fullname, target)
        if extension is not None and extension.loader is not None:
            return extension
        if self._pins.has_source(f"{base}.py"):
            return pinned_spec(self._pins, fullname, f"{package}.py", f"{base}.py", None)
        if any(self._pins.ignores(path) for path in (base, f"{base}.py", f"{base}/__init__.py")):
            ordinary = self._ordinary.find_spec(fullname, target)
            if ordinary is not None:
                return ordinary
        if self._pins.has_directory(base):
            namespace = ModuleSpec(fullname, None)
            namespace.submodule_search_locations = [package]
            return namespace
        return None

    def invalidate_caches(self) -> None:
        """Forget what the ordinary finders remember of the directory."""
        self._extensions.invalidate_caches()
        self._ordinary.invalidate_caches()

    def iter_modules(self, prefix: str = "") -> list[tuple[str, bool]]:
        """Return what :mod:`pkgutil` lists: (name, whether it is a package), sorted."""
        return sorted((prefix + name, package) for name, package in self._pins.names_in(self._relative))


class ParentFinder:
    """Finds modules in a directory outside the tree that a root of the tree lies in: a package's parent."""

    def __init__(self, pins: Pins, directory: str, ordinary: Any) -> None:  # noqa: ANN401 -- any path entry finder
        self._pins = pins
        self._directory = directory
        self._ordinary = ordinary

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the pinned spec of a root that is a package; everything else is found as usual."""
        package = os.path.join(self._directory, fullname.rpartition(".")[2])
        relative = self._pins.relative(package)
        if relative is None:
            return self._ordinary.find_spec(fullname, target)  # type: ignore[no-any-return]
        init = f"{relative}/__init__.py" if relative else "__init__.py"
        if self._pins.has_source(init):
            return pinned_spec(self._pins, fullname, os.path.join(package, "__init__.py"), init, [package])
        namespace = ModuleSpec(fullname, None)
        namespace.submodule_search_locations = [package]
        return namespace

    def invalidate_caches(self) -> None:
        """Forget what the ordinary finder remembers of the directory."""
        self._ordinary.invalidate_caches()

    def iter_modules(self, prefix: str = "") -> Iterator[tuple[str, bool]]:
        """Yield what :mod:`pkgutil` lists; names do not depend on the pins."""
        import pkgutil  # noqa: PLC0415 -- only for an application that uses it itself

        yield from pkgutil.iter_importer_modules(self._ordinary, prefix)  # type: ignore[attr-defined]


def pinned_spec(
    pins: Pins, fullname: str, path: str, relative: str, locations: list[str] | None
) -> ModuleSpec | None:
    """Return the spec of a module that is loaded from its blob."""
    loader = PinnedLoader(fullname, path, pins, relative)
    return spec_from_file_location(fullname, path, loader=loader, submodule_search_locations=locations)


def install(pins: Pins, plain_modules: frozenset[str]) -> None:
    """Let every import of this process that leads into the tree go through ``pins``.

    Args:
        pins: the manifest and the record.
        plain_modules: names in ``sys.modules`` that stay although the tree has modules of these names: plain
            Python would have loaded them, too.
    """

    def hook(entry: str) -> PinnedFinder | ParentFinder:
        path = os.path.abspath(entry or ".")
        if pins.holds_root(path):
            return ParentFinder(pins, path, _ordinary_finder(hook, entry))
        relative = pins.relative(path)
        # A directory without sources in the manifest (a virtual environment, one made later) is not pinned;
        # what is imported from it and lies in the tree is reported by the attestation.
        if relative is None or not pins.has_directory(relative):
            raise ImportError(f"{entry} is outside the tree")
        return PinnedFinder(pins, path, relative)

    def get_code(loader: SourceFileLoader, fullname: str) -> CodeType | None:
        relative = pins.relative(os.path.abspath(loader.path))
        if relative is not None and pins.has_source(relative):
            return pins.compile(relative, loader.path, fullname)
        return ordinary(loader, fullname)

    def open_code(path: str) -> IO[bytes]:
        relative = pins.relative(os.path.abspath(path))
        if relative is not None and pins.has_source(relative):
            return io.BytesIO(pins.take(relative, path, relative))
        return open_ordinarily(path)

    # Who loads a file of the tree by its path (plugins, editable installs) does it through this class, or has
    # runpy do it (run_path, and so the main module of a spawned process), which opens it by this function.
    ordinary = SourceFileLoader.get_code
    SourceFileLoader.get_code = get_code  # type: ignore[method-assign, assignment]
    open_ordinarily = io.open_code
    io.open_code = open_code
    sys.path_hooks.insert(0, hook)
    sys.path_importer_cache.clear()
    for name in pins.top_level_names() & sys.modules.keys() - plain_modules:
        del sys.modules[name]  # We hold what we use of the standard library; the name is the tree's.


def _ordinary_finder(ours: object, entry: str) -> Any:  # noqa: ANN401 -- any path entry finder
    for other in sys.path_hooks:
        if other is not ours:
            try:
                return other(entry)
            except ImportError:
                continue
    raise ImportError(f"no finder for {entry}", path=entry)
