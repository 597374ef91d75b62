"""Log file: the last lines of the children, in a file and its one predecessor; the writer and its readers.

The rule: the disk never holds more than two files of :data:`LIMIT_BYTES` (and the line that crosses it), and
never less than the last :data:`LIMIT_BYTES` of what was written. A line is in one file, whole. The file is
opened for each append: one that somebody removed is made anew, a disk that was full is tried again, and a
line that a crash cut short is ended before the next one.

A reader holds the files open that it reads, so a rotation under its eyes loses nothing; one that is left
behind by more than two rotations skips what is gone.

Rejected: ``logging.handlers.RotatingFileHandler`` (a lock and a record for each line, and its errors go to
stderr), inotify for the reader (a look every 0.2 s costs less than a thread and its failure modes).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

CHILD_LOG = Path("log", "child.log")
"""Where it lies in the state directory."""

LIMIT_BYTES = 1024 * 1024
"""A file this large is put aside, and its predecessor forgotten."""

_LOOK_SECONDS = 0.2
_READ_BYTES = 65536


class LogFile:
    """The writer's end; one at a time has it.

    Args:
        path: of the file; its folder is made with mode 0700 when it is needed.
        limit_bytes: size at which a file is put aside.
    """

    def __init__(self, path: Path, limit_bytes: int = LIMIT_BYTES) -> None:
        self._path = path
        self._limit_bytes = limit_bytes

    def append(self, lines: bytes) -> None:
        """Write lines, each with its line feed.

        Raises:
            OSError: some of them could not be written.
        """
        while lines:
            descriptor = self._open()
            try:
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    size += os.write(descriptor, b"\n")
                if size >= self._limit_bytes:
                    self._path.replace(predecessor(self._path))
                    continue
                end = lines.find(b"\n", self._limit_bytes - size - 1) + 1 or len(lines)
                written = 0
                while written < end:
                    written += os.write(descriptor, lines[written:end])
            finally:
                os.close(descriptor)
            lines = lines[end:]

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        try:
            return os.open(self._path, flags, 0o600)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            return os.open(self._path, flags, 0o600)


def predecessor(path: Path) -> Path:
    """Return where a log file is put aside to."""
    return path.with_name(f"{path.name}.1")


def read_last(path: Path, n: int) -> list[str]:
    """Return the last lines, oldest first; none where there is no file.

    Args:
        path: of the log file.
        n: how many at most.

    Raises:
        OSError: it may not be read.
    """
    with ExitStack() as stack:
        return _last(_open_both(path, stack), n)[0]


def follow(path: Path, n: int) -> Iterator[str]:
    """Yield the last ``n`` lines and then each new one; waits without end, also for a file to be made.

    Raises:
        OSError: it may not be read.
    """
    with ExitStack() as held:
        older, file = _open_both(path, held)
        lines, rest = _last((older, file), n)
        yield from lines
        while True:
            with ExitStack() as opened:
                # First of all: a file that has a successor is not added to any more.
                before, newest = _open_both(path, opened)
                while file is not None and (data := _more(file)):
                    *complete, rest = (rest + data).split(b"\n")
                    yield from map(_text, complete)
                if newest is None or _same(newest, file):
                    time.sleep(_LOOK_SECONDS)
                    continue
                # A predecessor that is neither ours nor what ours followed came after it.
                missed = before is not None and not _same(before, file) and not _same(before, older)
                older, file, rest = (None, before, b"") if missed else (before, newest, b"")
                held.close()
                held.enter_context(opened.pop_all())


def _last(files: Iterable[BinaryIO | None], n: int) -> tuple[list[str], bytes]:
    """Return the last lines of these files, and the bytes of one that is still being written."""
    *complete, rest = b"".join(file.read() for file in files if file is not None).split(b"\n")
    return [_text(line) for line in complete[-n:]] if n > 0 else [], rest


def _open_both(path: Path, stack: ExitStack) -> tuple[BinaryIO | None, BinaryIO | None]:
    """Open the predecessor and the file, those that there are, as they stood at one moment."""
    while True:
        with ExitStack() as opened:
            file, older = _open(path, opened), _open(predecessor(path), opened)
            if not _same(file, older):  # Else it was rotated in between.
                stack.enter_context(opened.pop_all())
                return older, file


def _open(path: Path, stack: ExitStack) -> BinaryIO | None:
    try:
        return stack.enter_context(path.open("rb", buffering=0))
    except FileNotFoundError:
        return None


def _more(file: BinaryIO) -> bytes:
    """Return what has been added; all of it, if the file was emptied."""
    if os.fstat(file.fileno()).st_size < file.tell():
        file.seek(0)
    return file.read(_READ_BYTES)


def _same(one: BinaryIO | None, other: BinaryIO | None) -> bool:
    return one is not None and other is not None and os.path.sameopenfile(one.fileno(), other.fileno())


def _text(line: bytes) -> str:
    return line.decode("utf-8", "backslashreplace")
