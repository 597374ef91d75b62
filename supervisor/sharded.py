"""Sharded: a mapping from paths of which a copy with changes costs no more for a large tree.

A save changes one file of thousands. What follows on its way, from a new manifest over its digest to "what is
different from what runs?", is asked of the whole tree; here it is asked of the shards that are not the very
same. A path belongs to the shard that its CRC-32 says, so that equal mappings have equal shards, wherever
they came from.

The rule: **a shard is never changed once it is in a mapping**; a copy has other ones in place of those that
differ, and shares the rest. So the digest of a shard is computed once, however many mappings have it.

Rejected: one shard for each directory (a tree may have one), a chain of differences (what is far from its
origin has to be folded, and then costs everything at once), a library of persistent maps (``immutables`` has
neither a digest nor a difference that skips what is shared).

Source: Merkle trees, as git's tree objects are (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects).
"""

from __future__ import annotations

import hashlib
from binascii import crc32
from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from itertools import chain
from typing import TypeVar, overload

V = TypeVar("V")
D = TypeVar("D")

_SHARDS = 128
"""Of 5,000 paths 40 are in each; to compare with another mapping takes five microseconds and what differs."""


class _Shard(dict[str, V]):
    __slots__ = ("digest",)
    digest: bytes


class Sharded(Mapping[str, V]):
    """An immutable mapping from relative paths.

    Args:
        given: what is in it.

    Attributes:
        shards: the parts; nobody changes them.
    """

    __slots__ = ("shards",)

    def __init__(self, given: Mapping[str, V]) -> None:
        shards = [_Shard[V]() for _ in range(_SHARDS)]
        for path, value in given.items():
            shards[_number(path)][path] = value
        self.shards = tuple(shards)

    def changed(self, altered: Mapping[str, V], gone: Collection[str] = ()) -> Sharded[V]:
        """Return a copy in which some paths are new or have another value, and some are not there."""
        fresh: dict[int, _Shard[V]] = {}
        shards = self.shards
        for path, value in altered.items():
            number = _number(path)
            if number not in fresh:
                fresh[number] = _Shard(shards[number])
            fresh[number][path] = value
        for path in gone:
            number = _number(path)
            if number not in fresh:
                fresh[number] = _Shard(shards[number])
            fresh[number].pop(path, None)
        copy: Sharded[V] = Sharded.__new__(Sharded)
        copy.shards = tuple([fresh.get(number, shard) for number, shard in enumerate(shards)])
        return copy

    def difference(self, newer: Sharded[V]) -> tuple[dict[str, V], list[str]]:
        """Return what has to be set and what has to be removed to make this mapping a newer one."""
        altered: dict[str, V] = {}
        gone: list[str] = []
        for old, new in zip(self.shards, newer.shards, strict=True):
            if old is not new:
                altered.update({path: value for path, value in new.items() if old.get(path) != value})
                gone += [path for path in old if path not in new]
        return altered, gone

    def digest(self) -> str:
        """Return a sha256 over all paths and values, in hexadecimal; equal mappings have equal ones."""
        whole = hashlib.sha256()
        for shard in self.shards:
            try:
                known = shard.digest
            except AttributeError:
                lines = "".join([f"{path}\0{shard[path]}\n" for path in sorted(shard)])
                known = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).digest()
                shard.digest = known
            whole.update(known)
        return whole.hexdigest()

    def plain(self) -> dict[str, V]:
        """Return a dictionary of the same."""
        merged: dict[str, V] = {}
        for shard in self.shards:
            merged.update(shard)
        return merged

    def __getitem__(self, path: str) -> V:
        return self.shards[_number(path)][path]

    @overload
    def get(self, path: str, default: None = None, /) -> V | None: ...
    @overload
    def get(self, path: str, default: V | D, /) -> V | D: ...
    def get(self, path: str, default: V | D | None = None, /) -> V | D | None:
        """Return the value of a path, ``default`` if it is not there."""
        return self.shards[_number(path)].get(path, default)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and path in self.shards[_number(path)]

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.shards)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def keys(self) -> KeysView[str]:
        """Return a view of the paths."""
        return _Keys(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values."""
        return _Values(self)

    def items(self) -> ItemsView[str, V]:
        """Return a view of paths and values."""
        return _Items(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Sharded):
            return self.shards == other.shards  # The very same shards are equal at once.
        return Mapping.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Sharded({self.plain()!r})"


class _Keys(KeysView[str]):
    def __init__(self, mapping: Sharded[V]) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Keys):
            return super().__eq__(other)
        pairs = zip(self._of.shards, other._of.shards, strict=True)
        return all(one is two or one.keys() == two.keys() for one, two in pairs)

    __hash__ = None  # type: ignore[assignment]


class _Values(ValuesView[V]):
    def __init__(self, mapping: Sharded[V]) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[V]:
        return chain.from_iterable(shard.values() for shard in self._of.shards)


class _Items(ItemsView[str, V]):
    def __init__(self, mapping: Sharded[V]) -> None:
        super().__init__(mapping)
        self._of = mapping

    def __iter__(self) -> Iterator[tuple[str, V]]:
        return chain.from_iterable(shard.items() for shard in self._of.shards)


def _number(path: str) -> int:
    return crc32(path.encode("utf-8", "surrogateescape")) % _SHARDS
