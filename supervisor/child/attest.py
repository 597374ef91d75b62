"""Attestation: what this process can prove about the code it runs.

The rule: report what was done, not what was meant. ``executed`` comes from the loader that compiled the
bytes; beside it stands every module in ``sys.modules`` whose file lies in the tree but that did not come
through that loader (``unpinned``). What the tree's functions run, and which of them were replaced, is in
:mod:`.functions`.

The nonce of the request is repeated in the answer, so that an earlier answer cannot be taken for a new one.
"""

from __future__ import annotations

import ast
import os
import re
import sys
import time
from dataclasses import dataclass
from types import CodeType
from typing import TYPE_CHECKING, Any

from .pinned import PinnedLoader

if TYPE_CHECKING:
    from .frames import Frame
    from .functions import Functions
    from .pinned import Pins

_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"
_NOT_PLAIN = re.compile(r"/\.|//")
"""In a path that may have another spelling; for most modules it is not worth the time to make sure."""
_GUESS_SECONDS = 1.0
_IMPORT_SECONDS = 5.0


@dataclass
class Progress:
    """How far the application's main thread has come.

    A script's imports are statements of its body, which runs behind the gate: it is not yet at work while it
    stands at or before the last of them. That is a guess about foreign code (the last import may follow the
    work), so it holds for :data:`_GUESS_SECONDS` at most. Being inside the import machinery is a fact, but
    there are programs whose work runs inside an import: after :data:`_IMPORT_SECONDS` they count as at work.

    Attributes:
        thread: identity of the main thread.
        body: the code of ``__main__``; None for a callable, whose module was imported before the gate.
        last_import_line: of that code.
        began_at: monotonic time when the body began to run.
    """

    thread: int
    body: CodeType | None = None
    last_import_line: int = 0
    began_at: float | None = None

    def importing(self) -> bool:
        """Whether the application is still loading its code."""
        frame = sys._current_frames().get(self.thread)  # noqa: SLF001 -- documented
        while frame is not None:
            if frame.f_code.co_filename == _IMPORT_MACHINERY:
                return self._began_within(_IMPORT_SECONDS)
            if frame.f_code is self.body:
                return frame.f_lineno <= self.last_import_line and self._began_within(_GUESS_SECONDS)
            frame = frame.f_back
        return self.body is not None and self._began_within(_GUESS_SECONDS)

    def _began_within(self, seconds: float) -> bool:
        return self.began_at is None or time.monotonic() - self.began_at < seconds


def last_import_line(source: bytes) -> int:
    """Return the line of the last import statement of a module's body, 0 if there is none.

    Those in functions and classes do not count: they are part of the work.
    """
    last, pending = 0, list[ast.AST](ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            last = max(last, node.end_lineno or node.lineno)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.expr)):
            pending += ast.iter_child_nodes(node)
    return last


def report(pins: Pins, functions: Functions, nonce: str, progress: Progress) -> Frame:
    """Return the answer to one request for attestation.

    Args:
        pins: the record of what was executed.
        functions: of the tree, in this process.
        nonce: of the request.
        progress: of the application.
    """
    loaded = dict(sys.modules)
    importing = progress.importing()
    # By object and not by name: some have a second name, as __mp_main__ has, and a name can be given away.
    pinned = {
        id(module)
        for name, path in list(pins.modules.items())
        if (module := loaded.get(name)) is not None and _tree_path(pins, module) == path
    }
    return {
        "type": "attestation",
        "nonce": nonce,
        "modules": [
            {"name": name, "path": path, "sha256": pins.executed[path]}
            for name, path in list(pins.modules.items())
        ],
        "unpinned": [
            {"name": name, "path": path}
            for name, module in loaded.items()
            if id(module) not in pinned
            and not functions.outside(module)
            and not _came_through_the_pins(module)
            and (path := _tree_path(pins, module)) is not None
        ],
        "functions": functions.alive(gently=progress.began_at is not None),
        # Names are bound while a module is loaded; what counts is what they hold afterwards.
        "replaced": [] if importing or progress.began_at is None else functions.replaced(),
        "importing": importing,
    }


def _came_through_the_pins(module: Any) -> bool:  # noqa: ANN401 -- sys.modules may hold any object
    """Whether the pinned loader made a module: also one that it has in hand, or that has a second name."""
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), PinnedLoader)


def _tree_path(pins: Pins, module: Any) -> str | None:  # noqa: ANN401 -- sys.modules may hold any object
    """Return the manifest's name of the file that a module came from, None outside the tree."""
    path = getattr(module, "__file__", None)
    if not isinstance(path, str) or not path.endswith((".py", ".pyc")):
        return None
    if not os.path.isabs(path) or _NOT_PLAIN.search(path):
        path = os.path.abspath(path)
    return pins.relative(path) if in_tree(pins, path) else None


def in_tree(pins: Pins, path: str) -> bool:
    """Whether an absolute path lies in the tree, and not in something that belongs to no tree."""
    relative = pins.relative(path)
    if not relative or pins.ignores(relative):
        return False
    return not _excluded(os.path.dirname(path), relative)


def _excluded(directory: str, relative: str) -> bool:
    """Whether a directory lies in something that belongs to no tree, such as a virtual environment."""
    parts = relative.split("/")[:-1]
    if {"site-packages", "node_modules", ".git"} & set(parts):
        return True
    for _ in parts:
        if os.path.exists(os.path.join(directory, "pyvenv.cfg")):
            return True
        directory = os.path.dirname(directory)
    return False
