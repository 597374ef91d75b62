"""One thread writes: what it does, in which order, and what becomes of what fails."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from supervisor.scribe import Scribe

DEADLINE_SECONDS = 10.0


@pytest.fixture
def scribe() -> Iterator[Scribe]:
    made = Scribe(limit=3)
    yield made
    made.close(DEADLINE_SECONDS)


@pytest.fixture
def stalled(scribe: Scribe) -> Iterator[threading.Event]:
    """A disk that does not answer until the event is set."""
    begun, answer = threading.Event(), threading.Event()

    def stall() -> None:
        begun.set()
        answer.wait()

    scribe.submit("wait", stall)
    assert begun.wait(DEADLINE_SECONDS)
    yield answer
    answer.set()


def fail() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/state/history.db")


def test_work_is_done_in_order_in_another_thread(scribe: Scribe, stalled: threading.Event) -> None:
    done: list[tuple[int, str]] = []

    def note(number: int) -> None:
        done.append((number, threading.current_thread().name))

    for number in range(3):
        scribe.submit("note", partial(note, number))
    assert done == []
    stalled.set()
    assert scribe.flush(DEADLINE_SECONDS)
    assert done == [(0, "scribe"), (1, "scribe"), (2, "scribe")]


def test_failure_is_counted_and_told_and_the_next_work_is_done(scribe: Scribe) -> None:
    done: list[int] = []
    scribe.submit("write the history", fail)
    scribe.submit("collect blobs", lambda: done.append(1))
    assert scribe.flush(DEADLINE_SECONDS)
    assert (done, scribe.errors_total) == ([1], 1)
    assert scribe.problems == ("cannot write the history: No space left on device (/state/history.db)",)


def test_error_of_any_kind_does_not_end_the_thread(scribe: Scribe) -> None:
    scribe.submit("divide", lambda: 1 // 0)
    scribe.submit("be silent", lambda: next(iter(())))
    assert scribe.flush(DEADLINE_SECONDS)
    assert scribe.problems == (
        "cannot divide: integer division or modulo by zero",
        "cannot be silent: StopIteration",
    )


def test_problem_is_over_when_the_same_work_succeeds(scribe: Scribe) -> None:
    scribe.submit("write the history", fail)
    scribe.submit("save the state", fail)
    scribe.submit("write the history", lambda: None)
    assert scribe.flush(DEADLINE_SECONDS)
    assert scribe.problems == ("cannot save the state: No space left on device (/state/history.db)",)
    assert scribe.errors_total == 2


def test_what_does_not_fit_into_the_queue_is_refused_and_counted(
    scribe: Scribe, stalled: threading.Event
) -> None:
    done: list[int] = []
    for number in range(5):
        scribe.submit("note", partial(done.append, number))
    assert (scribe.errors_total, scribe.problems) == (2, ("cannot note: too much waits for the disk",))
    stalled.set()
    assert scribe.flush(DEADLINE_SECONDS)
    assert done == [0, 1, 2]


def test_flush_and_close_do_not_wait_for_a_stalled_disk(scribe: Scribe, stalled: threading.Event) -> None:
    assert not scribe.flush(0.01)
    assert not scribe.close(0.01)
    stalled.set()
    assert scribe.close(DEADLINE_SECONDS)


def test_close_waits_for_what_was_handed_over_and_refuses_what_comes_later(
    scribe: Scribe, stalled: threading.Event
) -> None:
    done: list[int] = []
    scribe.submit("note", lambda: done.append(1))
    stalled.set()
    assert scribe.close(DEADLINE_SECONDS)
    scribe.submit("note", lambda: done.append(2))
    assert (done, scribe.problems) == ([1], ("cannot note: the supervisor stops",))


def test_process_may_end_while_the_disk_hangs() -> None:
    hanging = (
        "import threading; from supervisor.scribe import Scribe; Scribe().submit('w', threading.Event().wait)"
    )
    done = subprocess.run([sys.executable, "-c", hanging], check=False, timeout=DEADLINE_SECONDS)
    assert done.returncode == 0
