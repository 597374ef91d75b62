"""Output: what the children print, and what the supervisor logs, on the way to where somebody reads it.

Each generation gets two pipes. One thread reads them all, passes everything on to the supervisor's own stdout
and stderr (terminal, journal), adds it to a bounded file (see ``logfile.py``), and keeps the last lines of
stderr for the record of a crash. The supervisor's own log goes the same way, to stderr alone.

The rules:

- **the main loop never waits for a reader.** Whatever it calls here takes from pipes and puts into queues;
  only the thread writes, and it asks the kernel first whether there is room. The lock is never held during a
  write;
- **a child waits for a stalled reader, as it would without us**: when :data:`_ROOM_BYTES` are queued for a
  descriptor, the pipes that lead there are not read any more, they fill, and the child blocks. Nothing that a
  living child wrote is dropped. Of one that has ended, what would make the queue longer than
  :data:`_MOST_BYTES` is in the file alone: dead pipes must not use up our descriptors;
- **a line stays whole.** Lines are passed on whole, in pieces of :data:`_PIECE_BYTES` if they are longer. A
  line without its end is passed on after a moment of silence (a prompt); if another source speaks before it
  ends, it is ended with a line feed, the only byte that is ever added;
- **a reader that is gone, a full disk, a missing folder** are counted and said once; everything else goes on.

Stdout and stderr of a child reach us by two pipes, so their order among each other is nearly, not exactly,
that of the child. One pipe for both would keep it and could not tell them apart.

Rejected: inherited descriptors (no file, no last words), ``O_NONBLOCK`` on our own stdout (it is shared with
the shell that started us), ``logging.handlers.QueueHandler`` (its queue does not say what it lost).

Source: pipe(7), poll(2): a pipe that is ready takes PIPE_BUF bytes without blocking.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct

from supervisor.logfile import LogFile
from supervisor.masking import mask
from supervisor.threads import without_signals

_READ_BYTES = 65536
_WRITE_BYTES = 4096  # PIPE_BUF
_PIECE_BYTES = 16384
_ROOM_BYTES = 256 * 1024
_MOST_BYTES = 1024 * 1024
_SILENCE_SECONDS = 0.2
_OWN_LINES = 10_000
_TAIL_LINES = 250  # What a crash says, and the stacks of a few dozen threads.
_TAIL_LINE_BYTES = 4096
_TAIL_LINE_CHARACTERS = 1000
_TAIL_READS = 16  # A pipe holds 64 KiB, an administrator may allow 1 MiB.

log = logging.getLogger("wa-supervisor")


class Pipes(NamedTuple):
    """The write ends of a generation's pipes: descriptors that are not inherited unless a child gets them."""

    stdout: int
    stderr: int


class SourceEstate(Struct, frozen=True):
    """A pipe of a generation as it is left to the next image of the supervisor; see :class:`_Source`.

    Attributes:
        stderr: it is the generation's stderr, else its stdout.
        in_a_line: what was queued last is an unfinished line of it.
        silent_seconds: since the last read.
    """

    number: int
    descriptor: int
    stderr: bool
    last_lines: tuple[bytes, ...] | None
    partial: bytes
    shown: int
    in_a_line: bool
    silent_seconds: float
    forgotten: bool


class OutputEstate(Struct, frozen=True):
    """What is on its way, as it is left to the next image of the supervisor.

    Attributes:
        stdout, stderr: what waits for these descriptors; all of it in ``stderr`` where they are one file.
        own: lines of the supervisor's own log that are not queued yet.
        kept: lines on their way to the file.
        sources: the pipes.
    """

    stdout: bytes
    stderr: bytes
    own: tuple[bytes, ...]
    kept: bytes
    sources: tuple[SourceEstate, ...]
    errors_total: int
    own_lines_lost_total: int
    unpassed_bytes_total: int


class Output:
    """Passes output on until it is closed; its thread starts with it.

    Args:
        log_file: of the children's lines.
        stdout: descriptor that the children's stdout is passed on to.
        stderr: the same for their stderr, and for the supervisor's own log.
        estate: what another image of the supervisor has left.

    Attributes:
        errors_total: writes that a descriptor or the log file refused.
        unpassed_bytes_total: of children that had ended, not passed on because the reader had stalled.
        own_lines_lost_total: lines of the supervisor's own log that there was no room for.
    """

    def __init__(
        self, log_file: Path, stdout: int = 1, stderr: int = 2, estate: OutputEstate | None = None
    ) -> None:
        self.errors_total = 0
        self.own_lines_lost_total = 0
        self._own_lines_lost_told = 0
        self._log_file = LogFile(log_file)
        self._refused: set[str] = set()
        self._lock = threading.Lock()
        self._own: collections.deque[bytes] = collections.deque()
        self._kept = bytearray()  # Lines on their way to the file.
        self._stderr_sink = _Sink("stderr", stderr)
        same = _same_file(stdout, stderr)
        self._stdout_sink = self._stderr_sink if same else _Sink("stdout", stdout)
        self._sinks = [self._stderr_sink] if same else [self._stdout_sink, self._stderr_sink]
        self._sources: list[_Source] = []
        self._stderr_of: dict[int, _Source] = {}
        self._close_at: float | None = None
        self._stopping = False
        self._ended = False
        if estate is not None:
            self._adopt(estate)
        self._wake_reader, self._wake_writer = os.pipe()
        os.set_blocking(self._wake_reader, False)
        os.set_blocking(self._wake_writer, False)
        self._thread = threading.Thread(target=self._run, name="output", daemon=True)
        with without_signals():
            self._thread.start()

    # --- called by the main loop: never blocks ------------------------------------------------------------

    @property
    def unpassed_bytes_total(self) -> int:
        """See the class."""
        return sum(sink.unpassed_bytes for sink in self._sinks)

    @contextlib.contextmanager
    def attach(self, number: int) -> Iterator[Pipes]:
        """Make the pipes of a new generation; inside the ``with`` block they are given to its process.

        Raises:
            OSError: there are no descriptors left.
        """
        with contextlib.ExitStack() as made:
            stdout_reader, stdout = os.pipe()
            made.callback(os.close, stdout)
            unused = made.enter_context(contextlib.ExitStack())
            unused.callback(os.close, stdout_reader)
            stderr_reader, stderr = os.pipe()
            made.callback(os.close, stderr)
            unused.pop_all()
            os.set_blocking(stdout_reader, False)
            os.set_blocking(stderr_reader, False)
            last_lines: collections.deque[bytes] = collections.deque(maxlen=_TAIL_LINES)
            source = _Source(number, stderr_reader, self._stderr_sink, last_lines, stderr=True)
            with self._lock:
                self._sources += [_Source(number, stdout_reader, self._stdout_sink, None), source]
                self._stderr_of[number] = source
            self._wake()
            try:
                yield Pipes(stdout, stderr)
            except BaseException:
                self.forget(number)  # It has no process.
                raise

    def tail(self, number: int) -> tuple[str, ...]:
        """Return the last lines of a generation's stderr, up to what it has just written; secrets are masked.

        Also the last one if it is not ended yet. Long ones are cut. None of a generation that is forgotten.
        """
        with self._lock:
            source = self._stderr_of.get(number)
            if source is None or source.last_lines is None:
                return ()
            for _ in range(_TAIL_READS):
                if source.ended or not (data := _read(source.descriptor)):
                    break
                self._take(source, data)
            lines = [*source.last_lines, *([source.partial] if source.partial else [])][-_TAIL_LINES:]
        return tuple(
            mask(line[:_TAIL_LINE_BYTES].decode("utf-8", "backslashreplace"))[:_TAIL_LINE_CHARACTERS]
            for line in lines
        )

    def forget(self, number: int) -> None:
        """Let go of a generation that was reaped; what is left in its pipes is still passed on.

        They stay open for as long as a process that it left behind holds them.
        """
        with self._lock:
            self._stderr_of.pop(number, None)
            for source in self._sources:
                if source.number == number:
                    source.last_lines = None
                    source.forgotten = True
        self._wake()

    def handler(self) -> logging.Handler:
        """Return a handler that queues lines of the supervisor's own log."""
        return _Handler(self._say)

    def close(self, timeout_seconds: float = 2.0) -> None:
        """Pass on what has been written so far, as far as it can be done in time, and let go of the pipes.

        Args:
            timeout_seconds: the longest it takes. Nothing is logged after it.
        """
        with self._lock:
            self._close_at = time.monotonic() + timeout_seconds
        self._wake()
        self._thread.join(timeout_seconds + _SILENCE_SECONDS)

    def stop(self, timeout_seconds: float = 2.0) -> bool:
        """End the thread for another image of the supervisor; nothing is passed on or lost from then on.

        Args:
            timeout_seconds: the longest it takes.

        Returns:
            Whether it has ended; if not, everything goes on as before.
        """
        with self._lock:
            self._stopping = True
        self._wake()
        self._thread.join(timeout_seconds)
        with self._lock:
            self._stopping = self._ended
            return self._ended

    @property
    def estate(self) -> OutputEstate:
        """What is left to the next image of the supervisor; for good only after :meth:`stop`."""
        with self._lock:
            return OutputEstate(
                stdout=self._stdout_sink.rest if self._stdout_sink is not self._stderr_sink else b"",
                stderr=self._stderr_sink.rest,
                own=tuple(self._own),
                kept=bytes(self._kept),
                sources=tuple(self._left(source) for source in self._sources),
                errors_total=self.errors_total,
                own_lines_lost_total=self.own_lines_lost_total,
                unpassed_bytes_total=self.unpassed_bytes_total,
            )

    def _left(self, source: _Source) -> SourceEstate:
        return SourceEstate(
            number=source.number,
            descriptor=source.descriptor,
            stderr=source.stderr,
            last_lines=tuple(source.last_lines) if source.last_lines is not None else None,
            partial=source.partial,
            shown=source.shown,
            in_a_line=source.sink.is_in_a_line_of(source),
            silent_seconds=time.monotonic() - source.heard_at,
            forgotten=source.forgotten,
        )

    def _adopt(self, estate: OutputEstate) -> None:
        self.errors_total = estate.errors_total
        self.own_lines_lost_total = self._own_lines_lost_told = estate.own_lines_lost_total
        self._stderr_sink.unpassed_bytes = estate.unpassed_bytes_total
        self._stdout_sink.put(self, estate.stdout)
        self._stderr_sink.put(self, estate.stderr)
        self._own.extend(estate.own)
        self._kept += estate.kept
        for left in estate.sources:
            last_lines = (
                collections.deque(left.last_lines, maxlen=_TAIL_LINES)
                if left.last_lines is not None
                else None
            )
            source = _Source(
                left.number,
                left.descriptor,
                self._stderr_sink if left.stderr else self._stdout_sink,
                last_lines,
                stderr=left.stderr,
                partial=left.partial,
                shown=left.shown,
                heard_at=time.monotonic() - left.silent_seconds,
                forgotten=left.forgotten,
            )
            self._sources.append(source)
            if left.in_a_line:
                source.sink.goes_on_with(source)
            if left.stderr and not left.forgotten:
                self._stderr_of[left.number] = source

    def _say(self, line: bytes) -> None:
        if len(self._own) >= _OWN_LINES:
            self.own_lines_lost_total += 1  # logging calls its handlers one at a time.
            return
        self._own.append(line)
        self._wake()

    def _wake(self) -> None:
        with self._lock, contextlib.suppress(BlockingIOError):  # It is about to wake up anyway.
            if not self._ended:
                os.write(self._wake_writer, b"\0")

    # --- from a pipe to the queues: under the lock --------------------------------------------------------

    def _take(self, source: _Source, data: bytes) -> None:
        """Take in what a source wrote: whole lines go on, the rest waits for its end."""
        text = source.partial + data
        end = text.rfind(b"\n") + 1
        if len(text) - end >= _PIECE_BYTES:
            end = len(text)
        if end:
            source.sink.put(source, text[source.shown : end])
            self._keep(source, text[: end - 1] if text[end - 1 : end] == b"\n" else text[:end])
            source.shown = 0
        source.partial = text[end:]
        source.heard_at = time.monotonic()

    def _keep(self, source: _Source, lines: bytes) -> None:
        """Queue lines, of which the last has no line feed, for the file; remember the last ones of stderr."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        prefix = f"{at}Z {source.number} | ".encode()
        self._kept += prefix + lines.replace(b"\n", b"\n" + prefix) + b"\n"
        if source.last_lines is not None:
            source.last_lines.extend(lines.rsplit(b"\n", _TAIL_LINES)[-_TAIL_LINES:])

    def _show_partial(self, source: _Source) -> None:
        source.sink.put(source, source.partial[source.shown :])
        source.shown = len(source.partial)

    def _end(self, source: _Source) -> None:
        """Let go of a pipe, with a last line that has no end."""
        self._show_partial(source)
        if source.partial:
            self._keep(source, source.partial)
        source.partial, source.shown = b"", 0
        source.ended = True
        os.close(source.descriptor)
        self._sources.remove(source)

    # --- the thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            if not self._ended:
                self._end_all()
                self._write_file()
                with self._lock:
                    self._end_thread()

    def _end_thread(self) -> None:
        """Note, under the lock, that nothing is written any more."""
        self._ended = True
        os.close(self._wake_reader)
        os.close(self._wake_writer)

    def _turn(self) -> bool:
        """Wait, read, write; return whether there is to be another turn."""
        now = time.monotonic()
        with self._lock:
            close_at = self._close_at
            if self._stopping:
                self._end_thread()
                return False
            if close_at is not None and now >= close_at:
                return False
            self._queue_own()
            wait_seconds = self._show_silent(now)
            sources = {s.descriptor: s for s in self._sources if s.forgotten or s.sink.has_room}
            sinks = {s.descriptor: s for s in self._sinks if s.queue}
            all_heard = len(sources) == len(self._sources)
            if close_at is not None:
                wait_seconds = close_at - now if sinks else 0.0
        self._tell_losses()
        ready = _wait(wait_seconds, reading=(self._wake_reader, *sources), writing=sinks)
        if self._wake_reader in ready:
            _read(self._wake_reader)
        heard = [source for number, source in sources.items() if number in ready]
        for source in heard:  # In the order of the generations: what ended before another began stands first.
            self._hear(source)
        self._write_file()
        for number in ready & sinks.keys():
            self._write(sinks[number])
        if close_at is None:
            return True
        if all_heard and not heard:
            self._end_all()
        return bool(self._sources or self._own or any(sink.queue for sink in self._sinks))

    def _queue_own(self) -> None:
        while self._own and self._stderr_sink.has_room:
            self._stderr_sink.put(self, self._own.popleft())

    def _show_silent(self, now: float) -> float | None:
        """Pass on what has waited long enough for the end of its line; return the seconds till the next."""
        next_seconds: float | None = None
        for source in self._sources:
            if len(source.partial) > source.shown and source.sink.has_room:
                left_seconds = source.heard_at + _SILENCE_SECONDS - now
                if left_seconds <= 0:
                    self._show_partial(source)
                else:
                    next_seconds = min(left_seconds, next_seconds or left_seconds)
        return next_seconds

    def _tell_losses(self) -> None:
        lost = self.own_lines_lost_total - self._own_lines_lost_told
        if lost and not self._own:
            self._own_lines_lost_told += lost
            log.warning("stderr had stalled; lines of this log that are missing here: %d", lost)

    def _hear(self, source: _Source) -> None:
        with self._lock:
            data = _read(source.descriptor)
            if data:
                self._take(source, data)
            elif data is not None:
                self._end(source)

    def _end_all(self) -> None:
        with self._lock:
            for source in list(self._sources):
                self._end(source)

    def _write_file(self) -> None:
        with self._lock:
            lines, self._kept = self._kept, bytearray()
        try:
            self._log_file.append(bytes(lines))
        except OSError as error:
            self._refuse(str(error.filename or "the children's log file"), error)

    def _write(self, sink: _Sink) -> None:
        """Write once; what was refused is lost for this descriptor."""
        piece = sink.queue[0]
        try:
            done = os.write(sink.descriptor, piece[:_WRITE_BYTES])
        except BlockingIOError:
            return
        except OSError as error:
            self._refuse(sink.name, error)
            done = len(piece)
        with self._lock:
            sink.taken(done)

    def _refuse(self, what: str, error: OSError) -> None:
        self.errors_total += 1
        if what not in self._refused:
            self._refused.add(what)
            log.warning(
                "cannot write %s: %s; output that it does not take is lost there", what, error.strerror
            )


class _Sink:
    """A descriptor that output is passed on to, and what waits for it; under the lock, but for the write."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self.descriptor = descriptor
        self.queue: collections.deque[memoryview] = collections.deque()
        self.unpassed_bytes = 0
        self._queued_bytes = 0
        self._in_a_line: object = None

    @property
    def has_room(self) -> bool:
        return self._queued_bytes < _ROOM_BYTES

    @property
    def rest(self) -> bytes:
        return b"".join(self.queue)

    def is_in_a_line_of(self, source: object) -> bool:
        return self._in_a_line is source

    def goes_on_with(self, source: object) -> None:
        """Take what is queued for the beginning of a line of this source."""
        self._in_a_line = source

    def put(self, source: object, data: bytes) -> None:
        """Queue what a source wrote, on a line of its own."""
        if self._queued_bytes >= _MOST_BYTES:
            self.unpassed_bytes += len(data)
        elif data:
            if self._in_a_line not in (None, source):
                data = b"\n" + data
            self._in_a_line = None if data.endswith(b"\n") else source
            self.queue.append(memoryview(data))
            self._queued_bytes += len(data)

    def taken(self, done_bytes: int) -> None:
        """Forget what was written of the first piece."""
        self._queued_bytes -= done_bytes
        self.queue[0] = self.queue[0][done_bytes:]
        if not self.queue[0]:
            self.queue.popleft()


class _Source(Struct, eq=False):
    """The read end of one pipe.

    Attributes:
        last_lines: of stderr, as long as somebody may ask for them.
        partial: the beginning of a line that has not ended. shown: how many bytes of it are passed on.
        heard_at: monotonic time of the last read.
        forgotten: its generation was reaped.
        ended: the descriptor is closed.
        stderr: it is the generation's stderr, else its stdout.
    """

    number: int
    descriptor: int
    sink: _Sink
    last_lines: collections.deque[bytes] | None
    partial: bytes = b""
    shown: int = 0
    heard_at: float = 0.0
    forgotten: bool = False
    ended: bool = False
    stderr: bool = False


class _Handler(logging.Handler):
    """Gives each line to a function."""

    def __init__(self, say: Callable[[bytes], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))


def fill_standard_descriptors() -> None:
    """Open ``/dev/null`` where stdin, stdout or stderr is closed; the first thing that a program does.

    Otherwise the next file or socket that is opened has that number, and gets what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # The lowest that is free: this one.


def _wait(timeout_seconds: float | None, *, reading: Iterable[int], writing: Iterable[int]) -> set[int]:
    """Return the descriptors that can be read or written, or have failed, as soon as there is one."""
    poll = select.poll()
    for number in reading:
        poll.register(number, select.POLLIN)
    for number in writing:
        poll.register(number, select.POLLOUT)
    return {number for number, _ in poll.poll(None if timeout_seconds is None else timeout_seconds * 1000)}


def _read(descriptor: int) -> bytes | None:
    """Return what is there, nothing at the end, None if there is nothing now."""
    try:
        return os.read(descriptor, _READ_BYTES)
    except BlockingIOError:
        return None


def _same_file(one: int, other: int) -> bool:
    """Whether two descriptors are one terminal, pipe or file, in which lines could tear each other."""
    try:
        return os.path.sameopenfile(one, other)
    except OSError:
        return False
