"""Attestation: what this process can prove about the code it runs.

The rule: report what was done, not what was meant. ``executed`` comes from the loader that compiled the
bytes; beside it stands every module in ``sys.modules`` whose file lies in the tree but that did not come
through that loader (``unpinned``).

The nonce of the request is repeated in the answer, so that an earlier answer cannot be taken for a new one.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .frames import Frame
    from .pinned import Pins

_IMPORT_MACHINERY = "<frozen importlib._bootstrap>"


def report(pins: Pins, nonce: str, main_thread: int) -> Frame:
    """Return the answer to one request for attestation.

    Args:
        pins: the record of what was executed.
        nonce: of the request.
        main_thread: identity of the thread that runs the application; whether it is importing is told.
    """
    loaded = dict(sys.modules)
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
            if (path := _tree_path(pins, module)) is not None and pins.modules.get(name) != path
        ],
        "importing": _is_importing(sys._current_frames().get(main_thread)),  # noqa: SLF001 -- documented
    }


def _tree_path(pins: Pins, module: Any) -> str | None:  # noqa: ANN401 -- sys.modules may hold any object
    """Return the manifest's name of the file that a module came from, None outside the tree."""
    path = getattr(module, "__file__", None)
    if not isinstance(path, str) or not path.endswith((".py", ".pyc")):
        return None
    relative = pins.relative(path)
    return relative if relative and not _excluded(relative) else None


def _excluded(relative: str) -> bool:
    return bool({"site-packages", "node_modules", ".git"} & set(relative.split("/")))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_MACHINERY:
            return True
        frame = frame.f_back
    return False
