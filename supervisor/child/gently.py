"""Gently: long work of the thread that listens, in slices, so that the application hardly waits for it.

A thread that computes is made to give the interpreter away after five milliseconds only
(``sys.getswitchinterval``, which is the application's to set), and that is how long the application would
stand still right after it went live. The rule: what nobody waits for rests after each fraction of a
millisecond.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

_SLICE_SECONDS = 0.0003
_REST_SECONDS = 0.0005

_Item = TypeVar("_Item")


def in_slices(items: Iterable[_Item]) -> Iterator[_Item]:
    """Yield the same, with a rest whenever that and what is done with it have taken a slice of time."""
    until = time.perf_counter() + _SLICE_SECONDS
    for item in items:
        yield item
        if time.perf_counter() >= until:
            time.sleep(_REST_SECONDS)
            until = time.perf_counter() + _SLICE_SECONDS
