"""Aside: a file that cannot be trusted makes room and is kept for a person to look at.

The rule: nothing that might still be of use is deleted, and nothing piles up: the newest three stay.
"""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Sequence
from pathlib import Path

_KEPT = 3


def set_aside(path: Path, companions: Sequence[str] = ()) -> Path:
    """Rename a file to ``NAME.corrupt-TIME`` (UTC) and return its new path.

    Args:
        path: of the file.
        companions: endings of files that lie beside it and go with it where they exist, for example
            ``-wal``. They go first: without their file they are nothing, the file could take up new ones.

    Raises:
        OSError: it cannot be renamed.
    """
    time = dt.datetime.now(dt.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    aside = path.with_name(f"{path.name}.corrupt-{time}")
    for ending in companions:
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}{ending}").rename(f"{aside}{ending}")
    path.rename(aside)
    for ending in ("", *companions):
        # The names sort by time.
        for old in sorted(path.parent.glob(f"{path.name}.corrupt-*Z{ending}"))[:-_KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()
    return aside
