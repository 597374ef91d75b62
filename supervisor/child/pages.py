"""Pages: gives a forked process memory of its own, at a moment when nobody waits for it.

A forked child shares its memory with the zygote and copies each page when it first writes to it. The end of
an interpreter writes to nearly all of them (it counts down the references to every object), so in a
``replace`` handover 4,000 page faults stand between the old child's last word and the new one's first: half
of the time that the end takes. The copies are made beforehand instead. The child then has the memory that it
would have had if it had been started by itself.

Nothing of what it holds is changed: the kernel makes a page writable (MADV_POPULATE_WRITE, Linux 5.14), which
is safe beside other threads that write to it. Pages that this process has already to itself, or does not have
yet, are left alone. Where the kernel cannot do it, nothing happens.

Rejected: to end without letting the interpreter go (``os._exit``): what an application's objects do at their
end would not be done; to write to the pages (another thread may write to the same byte).

Source: madvise(2), proc(5) ``pagemap``: bit 63 "present", bit 56 "exclusively mapped".
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Iterator

_POPULATE_WRITE = 23
_PRESENT, _EXCLUSIVE = 1 << 63, 1 << 56
_ENTRY_BYTES = 8
_MOST_PAGES = 64
"""Of one call: other threads that want to map memory wait until it is done, some 100 microseconds."""


def make_own() -> None:
    """Copy what is still shared."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGESIZE")
    try:
        for first, count in list(_shared(page)):
            if madvise(first * page, count * page, _POPULATE_WRITE) != 0:
                return  # An older kernel, or somebody took the memory away meanwhile.
    except OSError:
        return  # We may not know; they are copied one by one.


def _shared(page: int) -> Iterator[tuple[int, int]]:
    """Yield (number of the first page, how many) of those that can be written to and are shared."""
    with open("/proc/self/maps", "rb") as maps, open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for line in maps.read().splitlines():
            span, access, *_ = line.split(b" ")
            if access != b"rw-p":
                continue
            first, end = (int(address, 16) // page for address in span.split(b"-"))
            pagemap.seek(first * _ENTRY_BYTES)
            read = pagemap.read((end - first) * _ENTRY_BYTES)
            entries = array("Q", read[: len(read) // _ENTRY_BYTES * _ENTRY_BYTES])
            count = 0
            for number, entry in enumerate((*entries, _EXCLUSIVE), start=first):
                shared = entry & (_PRESENT | _EXCLUSIVE) == _PRESENT
                if count and (not shared or count == _MOST_PAGES):
                    yield number - count, count
                    count = 0
                count += shared
