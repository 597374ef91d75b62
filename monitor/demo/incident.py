"""The incident as an edit: the bug in the one decision function, invisible to Python's bytecode cache.

The original monitor took every all-digit sender for a phone. Here the docstring of ``identity.decide`` gives
way to that line, padded with a comment to the very same number of bytes, and the file keeps its modification
time. Size and time are all that Python compares before it trusts a cached ``.pyc``, so a plain restart goes
on running the old code. ``rsync -t``, ``cp -p`` and two saves within one second do the same without any
intention.

Source: ``importlib._bootstrap_external``, ``_validate_timestamp_pyc``.
"""

from __future__ import annotations

import ast
import os
import shutil
from typing import TYPE_CHECKING, Final

from monitor.errors import MonitorError

if TYPE_CHECKING:
    from pathlib import Path

FUNCTION: Final = "decide"
BUG: Final = 'if user.isdigit(): return Phone(user, "certain", "all digits")'
_BUG_AS_WRITTEN: Final = b'if user.isdigit():\n        return Phone(user, "certain", "all digits")\n    # '
_FILLER: Final = b"the bug of the incident, padded to the size of what stood here; "


class IncidentError(MonitorError):
    """The decision function is not there or not long enough to carry the bug; nothing was written."""


def with_bug(source: bytes) -> bytes:
    """Return ``source`` with the bug in place of the docstring of ``decide``, of the same size.

    Raises ``IncidentError`` when there is no such function or its docstring is shorter than the bug.
    """
    start, end = _docstring(source)
    room_bytes = end - start - len(_BUG_AS_WRITTEN)
    if room_bytes < 0:
        raise IncidentError(f"the docstring of {FUNCTION}() is {-room_bytes} bytes too short to hold the bug")
    padding = (_FILLER * (room_bytes // len(_FILLER) + 1))[:room_bytes].rstrip()
    return source[:start] + _BUG_AS_WRITTEN + padding.ljust(room_bytes, b".") + source[end:]


def overwrite(path: Path, content: bytes) -> None:
    """Put ``content`` in place of a file of the same size, times and mode kept, as ``rsync -t`` does.

    Raises ``IncidentError`` when the size would change: that edit Python would notice by itself.
    """
    before = path.stat()
    if before.st_size != len(content):
        raise IncidentError(
            f"{path} has {before.st_size} bytes and would have {len(content)}: not the same size"
        )
    aside = path.with_name(f".{path.name}.new")
    aside.write_bytes(content)
    shutil.copymode(path, aside)
    os.utime(aside, ns=(before.st_atime_ns, before.st_mtime_ns))
    aside.replace(path)


def line_of_bug(source: bytes) -> int:
    """Return the number of the line below which a person inserts ``BUG``: the last one of the docstring."""
    start, end = _docstring(source)
    return source[:start].count(b"\n") + source[start:end].count(b"\n") + 1


def _docstring(source: bytes) -> tuple[int, int]:
    """Return where the docstring of ``decide`` starts and ends, in bytes."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.FunctionDef)
            and node.name == FUNCTION
            and ast.get_docstring(node) is not None
        ):
            text = node.body[0]
            lines = source.splitlines(keepends=True)
            first, last = text.lineno, text.end_lineno or text.lineno
            start = sum(map(len, lines[: first - 1])) + text.col_offset
            return start, sum(map(len, lines[: last - 1])) + (text.end_col_offset or 0)
    raise IncidentError(
        f"there is no function {FUNCTION}() with a docstring: this is not the monitor's identity.py"
    )
