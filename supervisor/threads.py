"""Threads: how one is started here, so that signals go to the main thread and to no other.

A signal to a process is taken by any of its threads that does not block it. The loop is woken by a
descriptor, whichever thread that is; but between two images of the supervisor the main thread blocks signals
so that they wait for the next image, and a thread that is still on its way out must not take one there:
nobody would hear of it, or its default action would end the process.

Source: signal(7), pthread_sigmask(3): a new thread begins with the mask of the one that starts it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_signals() -> Iterator[None]:
    """Have all threads that are started inside this block, and those that they start, take no signal."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
