"""The children's log file: its bound, its rotation, and readers under its eyes."""

from __future__ import annotations

import errno
import itertools
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO

import pytest

from supervisor import logfile
from supervisor.logfile import LogFile, follow, predecessor, read_last

DEADLINE_SECONDS = 15.0
LIMIT_BYTES = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "log" / "child.log"


@pytest.fixture
def file(path: Path) -> LogFile:
    return LogFile(path, LIMIT_BYTES)


class Follower:
    """Follows a file in a thread."""

    def __init__(self, path: Path, n: int) -> None:
        self._lines = follow(path, n)
        self._seen: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._follow, daemon=True).start()

    def take(self, count: int) -> list[str]:
        return [self._seen.get(timeout=DEADLINE_SECONDS) for _ in range(count)]

    def _follow(self) -> None:
        for line in self._lines:
            self._seen.put(line)
            if line == "the end":
                return


@pytest.fixture
def nap(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Let a follower look again as often as this is released, and never of itself."""
    looks = threading.Semaphore(0)
    clock = SimpleNamespace(sleep=lambda _: looks.acquire(timeout=DEADLINE_SECONDS))
    monkeypatch.setattr(logfile, "time", clock)
    yield looks
    looks.release(1000)


def test_last_lines_are_read_over_the_rotation(path: Path, file: LogFile) -> None:
    for number in range(150):
        file.append(b"line %05d\n" % number)
    assert path.stat().st_size < LIMIT_BYTES
    assert read_last(path, 120) == [f"line {number:05}" for number in range(30, 150)]
    assert read_last(path, 1) == ["line 00149"]
    assert read_last(path, 0) == []


def test_two_files_of_bounded_size_hold_at_least_the_limit(path: Path, file: LogFile) -> None:
    file.append(b"".join(b"%05d\n" % number for number in range(5000)))
    sizes = [path.stat().st_size, predecessor(path).stat().st_size]
    assert LIMIT_BYTES <= sum(sizes) <= 2 * LIMIT_BYTES + 12
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["child.log", "child.log.1"]
    last = read_last(path, 5000)
    assert last == [f"{number:05}" for number in range(5000 - len(last), 5000)]


def test_files_are_for_their_owner_alone(path: Path, file: LogFile) -> None:
    for _ in range(2):
        file.append(b"x" * LIMIT_BYTES + b"\n")
    assert {oct(entry.stat().st_mode & 0o777) for entry in path.parent.iterdir()} == {"0o600"}
    assert oct(path.parent.stat().st_mode & 0o777) == "0o700"


def test_line_that_a_crash_cut_short_stays_alone(path: Path, file: LogFile) -> None:
    file.append(b"whole\n")
    with path.open("ab") as torn:
        torn.write(b"to")
    file.append(b"next\n")
    assert read_last(path, 9) == ["whole", "to", "next"]


def test_removed_file_is_made_anew(path: Path, file: LogFile) -> None:
    file.append(b"old\n")
    path.unlink()
    file.append(b"new\n")
    assert read_last(path, 9) == ["new"]


def test_full_disk_is_an_error_and_leaves_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(OSError, match="No space") as caught:
        LogFile(tmp_path / "full").append(b"line\n")
    assert caught.value.errno == errno.ENOSPC
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_no_file_has_no_lines_and_bytes_that_are_no_text_are_shown(path: Path, file: LogFile) -> None:
    assert read_last(path, 9) == []
    file.append(b"caf\xe9\n")
    assert read_last(path, 9) == ["caf\\xe9"]


def test_follower_waits_for_the_file_and_sees_each_line_once(
    path: Path, file: LogFile, nap: threading.Semaphore
) -> None:
    follower = Follower(path, 5)
    file.append(b"one\n")
    nap.release()
    assert follower.take(1) == ["one"]
    with path.open("ab") as torn:
        torn.write(b"tw")
    nap.release()
    file.append(b"three\nthe end\n")
    nap.release()
    assert follower.take(3) == ["tw", "three", "the end"]


@pytest.mark.parametrize("rotations", [1, 2])
def test_follower_goes_on_over_rotations(
    path: Path, file: LogFile, nap: threading.Semaphore, rotations: int
) -> None:
    file.append(b"before\nstart\n")
    follower = Follower(path, 1)
    assert follower.take(1) == ["start"]
    count = rotations * LIMIT_BYTES // 10 + 10
    for number in range(count):
        file.append(b"line %04d\n" % number)
    file.append(b"the end\n")
    nap.release(3)
    assert follower.take(count) == [f"line {number:04}" for number in range(count)]


def test_follower_goes_on_when_the_file_is_emptied_or_removed(
    path: Path, file: LogFile, nap: threading.Semaphore
) -> None:
    for number in range(150):
        file.append(b"line %05d\n" % number)
    follower = Follower(path, 1)
    assert follower.take(1) == ["line 00149"]
    os.truncate(path, 0)
    file.append(b"emptied\n")
    nap.release()
    assert follower.take(1) == ["emptied"]
    path.unlink()
    file.append(b"removed\nthe end\n")
    nap.release()
    assert follower.take(2) == ["removed", "the end"]


def test_rotation_between_the_two_openings_doubles_nothing(
    path: Path, file: LogFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.append(b"x\n" * (LIMIT_BYTES // 2))
    opened, opening = logfile._open, itertools.count()

    def rotating(name: Path, stack: ExitStack) -> BinaryIO | None:
        if next(opening) == 1:
            file.append(b"last\n")
        return opened(name, stack)

    monkeypatch.setattr(logfile, "_open", rotating)
    assert read_last(path, 9999) == ["x"] * (LIMIT_BYTES // 2) + ["last"]
