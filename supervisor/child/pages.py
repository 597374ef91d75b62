"""Pages: gives a forked process memory of its own, at a moment when nobody waits for it.

A forked child shares its memory with the zygote and copies each page when it first writes to it, which takes
longer one by one than many at a time. There are three moments at which it stands about:

- **before it begins**, while the change is still being compiled: it copies the pages that a generation before
  it, forked from the same zygote, has written to until it was live. The layout of their memory is the same.
  These are some 1,500 faults between the first message and "live";
- **if still nobody has anything for it to do**, because it was forked long before it is needed, it copies all
  others, too (:func:`claim`);
- **when it is live** it copies those that are left (:func:`make_own`). The end of an interpreter writes to
  nearly all of them (it counts down the references to every object), so in a ``replace`` handover 4,000 page
  faults would stand between the old child's last word and the new one's first: half of the time that the end
  takes.

The child then has the memory that it would have had if it had been started by itself.

Nothing of what it holds is changed: the kernel makes a page writable (MADV_POPULATE_WRITE, Linux 5.14), which
is safe beside other threads that write to it. Pages that this process has already to itself, or does not have
yet, are left alone. Where the kernel cannot do it, nothing happens.

Rejected: to end without letting the interpreter go (``os._exit``): what an application's objects do at their
end would not be done; to write to the pages (another thread may write to the same byte); to copy all of them
before it begins although somebody waits (more than ten milliseconds, longer than a change is compiled).

Source: madvise(2), proc(5) ``pagemap``: bit 63 "present", bit 56 "exclusively mapped".
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from array import array
from collections.abc import Callable, Iterable, Iterator

from .gently import in_slices

_POPULATE_WRITE = 23
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56
_OWN = _PRESENT | _EXCLUSIVE
_ENTRY_BYTES = 8
_MOST_PAGES = 64
"""Of one call: other threads that want to map memory wait until it is done, some 100 microseconds."""

Run = tuple[int, int]
"""Number of the first of some pages, and how many they are."""


def claim(runs: Iterable[Run], awaited: Callable[[], bool]) -> bool:
    """Copy these pages, then all others that are shared, until somebody waits for this process.

    Args:
        runs: what :func:`make_own` has returned to another process of the same layout.
        awaited: whether somebody does.

    Returns:
        Whether others were copied, too: :func:`make_own` cannot tell then which ones were written to.
    """
    copy, copied = _copier(), 0
    for run in runs:
        copy(run)  # What is not mapped here, or cannot be written to, is refused, and that is all.
        copied += run[1]
        if copied >= _MOST_PAGES:
            if awaited():
                return False
            copied = 0
    if awaited():
        return False
    with contextlib.suppress(OSError):  # We may not know; they are copied one by one.
        for run, shared in in_slices(_runs(os.sysconf("SC_PAGESIZE"))):
            if shared and (awaited() or not copy(run)):
                break
    return True


def make_own() -> list[Run]:
    """Copy what is still shared; return what was not: the pages that this process has written to so far."""
    copy, own = _copier(), list[Run]()
    try:
        for run, shared in list(in_slices(_runs(os.sysconf("SC_PAGESIZE")))):
            if not shared:
                own.append(run)
            elif not copy(run):
                break  # An older kernel, or somebody took the memory away meanwhile.
    except OSError:
        pass  # We may not know; they are copied one by one.
    return own


def _copier() -> Callable[[Run], bool]:
    """Return what copies pages, and tells whether it could."""
    madvise, page = ctypes.CDLL(None).madvise, os.sysconf("SC_PAGESIZE")
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return lambda run: madvise(run[0] * page, run[1] * page, _POPULATE_WRITE) == 0


def _runs(page: int) -> Iterator[tuple[Run, bool]]:
    """Yield what can be written to and is present, and whether it is shared, in address order."""
    with open("/proc/self/maps", "rb") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps.read().splitlines():
            span, access, *_ = line.split(b" ")
            if access != b"rw-p":
                continue
            first, end = (int(address, 16) // page for address in span.split(b"-"))
            pagemap.seek(first * _ENTRY_BYTES)
            read = pagemap.read((end - first) * _ENTRY_BYTES)
            entries = array("Q", read[: len(read) // _ENTRY_BYTES * _ENTRY_BYTES])
            count = kind = 0
            for number, entry in enumerate((*entries, 0), start=first):
                now = entry & _OWN if entry & _PRESENT else 0
                if count and (now != kind or count == _MOST_PAGES):
                    yield (number - count, count), kind == _PRESENT
                    count = 0
                kind = now
                count += now != 0
