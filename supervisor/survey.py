"""Survey: one walk over the tree that has every directory of it watched, and says which are not, and why.

The rule: **every directory is asked for, every time.** Nothing is remembered about roots, links or inodes
that could be wrong by now: what the kernel has watched already costs one call, and whatever was replaced,
moved in or refused before shows by itself.

A directory counts as silent if it has no watch, or if its file system can change without an event.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from msgspec import Struct

from supervisor import inotify
from supervisor.canary import Canary
from supervisor.emitter import Followed, TreeEmitter
from supervisor.errors import SourceError
from supervisor.filesystems import FileSystems
from supervisor.manifest import Tree


class Trouble(Struct, frozen=True):
    """Something that keeps changes from being told.

    Attributes:
        reason: what it is.
        remedy: what the operator does about it.
    """

    reason: str
    remedy: str


class Survey(Struct, frozen=True):
    """What was found.

    Attributes:
        directories_total: how many the tree has.
        new: those that were not watched before, or were other ones under the same name.
        unwatched: those that have no watch although there is an emitter.
        silent_total: how many do not tell everything.
        watches_total: how many watches the kernel has, one of them the canary's; None if it does not tell.
        short: these are fewer than were asked for and not refused.
        proving: the directory of the canary is watched.
        troubles: why directories are silent, and roots that cannot be listed.
    """

    directories_total: int = 0
    new: tuple[str, ...] = ()
    unwatched: frozenset[str] = frozenset()
    silent_total: int = 0
    watches_total: int | None = None
    short: bool = False
    proving: bool = False
    troubles: tuple[Trouble, ...] = ()


def take(tree: Tree, emitter: TreeEmitter | None, canary: Canary, file_systems: FileSystems) -> Survey:
    """Walk over the tree, and have the emitter follow every directory and the canary's."""
    troubles: list[Trouble] = []
    directories = dict(_walk(tree, troubles))
    followed, watches_total = _follow(tree, emitter, directories, canary)
    unwatched = frozenset(followed.refused) & directories.keys()
    if unwatched:
        troubles.append(_refusal(followed, unwatched, len(directories)))
    silent = set(unwatched)
    for device, path in {device: path for path, device in directories.items()}.items():
        kind = file_systems.without_all_events(path)
        if kind is not None:
            silent |= {path for path, its_device in directories.items() if its_device == device}
            reason = f"{path} is on a file system ({kind}) that may change without an event"
            troubles.append(Trouble(reason, "keep the code on a local one, or rely on --scan-interval"))
    return Survey(
        directories_total=len(directories),
        new=tuple(path for path in followed.new if path in directories),
        unwatched=unwatched,
        silent_total=len(silent),
        watches_total=watches_total,
        short=watches_total is not None and watches_total < followed.watches_total,
        proving=followed.watches_total > 0 and canary.directory not in followed.refused,
        troubles=tuple(troubles),
    )


def _walk(tree: Tree, troubles: list[Trouble]) -> Iterator[tuple[str, int]]:
    """Yield path and device of each directory of the tree."""
    for root in tree.roots:
        try:
            for path in tree.directories(root):
                with contextlib.suppress(OSError):  # Gone since it was listed.
                    yield path, os.stat(path).st_dev
        except SourceError as error:
            troubles.append(Trouble(f"{error.path} cannot be watched: {error.why}", error.remedy))


def _follow(
    tree: Tree, emitter: TreeEmitter | None, directories: Mapping[str, int], canary: Canary
) -> tuple[Followed, int | None]:
    """Have all watched; return what came of it, and the number of watches the kernel has."""
    nothing = Followed((), {}, 0)
    if emitter is None:
        return nothing, None
    canary.prepare()
    try:
        followed = emitter.follow((canary.directory, *directories), canary.path, tree.ignores)
        watches_total = emitter.count()
    except OSError:  # It has just ended. The next turn sees it.
        return nothing, None
    if canary.directory in followed.new:
        canary.hurry()  # What was written to the directory that it was before is not listened to any more.
    return followed, watches_total


def _refusal(followed: Followed, unwatched: frozenset[str], of_directories: int) -> Trouble:
    path = min(unwatched)
    error = followed.refused[path]
    reason = f"{len(unwatched)} of {of_directories} directories are not watched, {path} is one"
    if error.errno == inotify.NO_WATCH_LEFT:
        return Trouble(f"{reason}: no watch is left", inotify.watches_remedy(len(unwatched)))
    return Trouble(f"{reason}: {error.strerror}", "make them readable for the user of the supervisor")
