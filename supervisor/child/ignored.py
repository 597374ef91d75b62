"""Ignored: which paths of the tree its owner has left out of it (``--ignore``).

The rule: a pattern without a slash is compared with every single name on the way to a file, the file's own
and those of the folders above it; one with a slash is compared with the whole path, the file's own and those
of the folders above it. So what a folder is left out by leaves out all that is in it. Patterns are those of
the shell (:mod:`fnmatch`), with upper and lower case told apart; ``*`` matches a slash as well. Paths are
relative to the base of the tree, with ``/``.

Rejected: all of gitignore's language (its exceptions make the fate of a file depend on the order of lines in
several files).
"""

from __future__ import annotations

import functools
from collections.abc import Callable


def is_ignored(patterns: tuple[str, ...], path: str) -> bool:
    """Whether a file or a folder is left out, by itself or by a folder above it."""
    if not patterns:
        return False
    parts = path.split("/")
    return any(
        is_left_out(patterns, "/".join(parts[:depth]), parts[depth - 1]) for depth in range(1, len(parts) + 1)
    )


def is_left_out(patterns: tuple[str, ...], path: str, name: str) -> bool:
    """Whether a file or a folder is left out by itself.

    Args:
        patterns: of what is left out.
        path: of it.
        name: its last part.
    """
    if not patterns:
        return False
    matches_name, matches_path = _compiled(patterns)
    return matches_name(name) or matches_path(path)


@functools.lru_cache(maxsize=4)
def _compiled(patterns: tuple[str, ...]) -> tuple[Callable[[str], bool], Callable[[str], bool]]:
    # Only for who wants it: in a child, what the application imports first is the application's.
    import re  # noqa: PLC0415
    from fnmatch import translate  # noqa: PLC0415

    def matcher(chosen: list[str]) -> Callable[[str], bool]:
        if not chosen:
            return lambda _: False
        expression = re.compile("|".join(map(translate, chosen)))
        return lambda text: expression.match(text) is not None

    return matcher([p for p in patterns if "/" not in p]), matcher([p for p in patterns if "/" in p])
