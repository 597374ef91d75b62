"""What children print, and what the supervisor logs, with readers that read, stall and go away."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from supervisor.logfile import LIMIT_BYTES, LogFile, read_last
from supervisor.output import Output, OutputEstate

DEADLINE_SECONDS = 15.0


class Reader:
    """Somebody who reads what is passed on, when told to."""

    def __init__(self) -> None:
        self._read, self.write = os.pipe()
        os.set_blocking(self._read, False)
        self.seen = b""

    def until(self, wanted: bytes) -> bytes:
        """Read until there is this text, and return all that was read."""
        while wanted not in self.seen:
            assert self._ready(DEADLINE_SECONDS), f"no {wanted!r} in {self.seen[-2000:]!r}"
            self.seen += os.read(self._read, 65536)
        return self.seen

    def rest(self) -> bytes:
        """Return all that was ever passed on, up to now."""
        while self._ready(0):
            self.seen += os.read(self._read, 65536)
        return self.seen

    def leave(self) -> None:
        os.close(self._read)
        self._read = -1

    def _ready(self, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def close(self) -> None:
        os.close(self.write)
        if self._read >= 0:
            os.close(self._read)


@pytest.fixture
def stdout() -> Iterator[Reader]:
    with contextlib.closing(Reader()) as reader:
        yield reader


@pytest.fixture
def stderr() -> Iterator[Reader]:
    with contextlib.closing(Reader()) as reader:
        yield reader


@pytest.fixture
def log_file(tmp_path: Path) -> Path:
    return tmp_path / "log" / "child.log"


@pytest.fixture
def output(log_file: Path, stdout: Reader, stderr: Reader) -> Iterator[Output]:
    with opened(log_file, stdout, stderr) as made:
        yield made


@contextlib.contextmanager
def opened(
    log_file: Path, stdout: Reader, stderr: Reader, estate: OutputEstate | None = None
) -> Iterator[Output]:
    output = Output(log_file, stdout.write, stderr.write, estate)
    handler = output.handler()
    log = logging.getLogger("wa-supervisor")
    log.addHandler(handler)
    try:
        yield output
    finally:
        log.removeHandler(handler)
        output.close(0.1)


def run(output: Output, number: int, code: str) -> subprocess.Popen[bytes]:
    """Start a process as a generation."""
    with output.attach(number) as pipes:
        return subprocess.Popen([sys.executable, "-c", code], stdout=pipes.stdout, stderr=pipes.stderr)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_lines_reach_their_descriptor_unchanged_and_the_file_with_time_and_generation(
    output: Output, stdout: Reader, stderr: Reader, log_file: Path
) -> None:
    code = "import os; os.write(1, b'caf\\xe9 \\x1b[1m\\n\\nend\\n'); os.write(2, b'warning\\n')"
    assert run(output, 3, code).wait() == 0
    assert stdout.until(b"end\n") == b"caf\xe9 \x1b[1m\n\nend\n"
    assert stderr.until(b"warning\n") == b"warning\n"
    output.close()
    lines = read_last(log_file, 9)
    assert sorted(line.partition(" | ")[2] for line in lines) == ["", "caf\\xe9 \x1b[1m", "end", "warning"]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z 3 \| ", line) for line in lines)


def test_own_log_goes_to_stderr_and_not_to_the_file(
    output: Output, stdout: Reader, stderr: Reader, log_file: Path
) -> None:
    # Not by the logger: pytest keeps what is logged, and cannot pass this on to another process.
    output.handler().handle(logging.makeLogRecord({"msg": "caf\xe9 \udcff"}))
    assert stderr.until(b"\n") == b"caf\xc3\xa9 \\udcff\n"
    output.close()
    assert stdout.rest() == b""
    assert not log_file.exists()


def test_stalled_stdout_holds_up_the_child_and_nobody_else(
    output: Output, stdout: Reader, stderr: Reader
) -> None:
    line, count = b"x" * 99 + b"\n", 30_000
    code = f"import os\nfor _ in range({count}): os.write(1, b'x' * 99 + b'\\n')\nos.write(2, b'done')"
    process = run(output, 1, code)
    until(lambda: not output._stdout_sink.has_room)
    assert run(output, 2, "import os; os.write(2, b'other\\n')").wait() == 0
    stderr.until(b"other\n")
    logging.getLogger("wa-supervisor").warning("own")
    stderr.until(b"own\n")
    assert output.tail(2) == ("other",)
    assert output.tail(1) == ()
    assert process.poll() is None
    assert output._stdout_sink._queued_bytes < 512 * 1024
    until(lambda: len(stdout.rest()) >= len(line) * count)
    assert process.wait() == 0
    stderr.until(b"done")
    assert stdout.seen == line * count
    assert output.unpassed_bytes_total == 0


def test_everything_stalled_blocks_no_call_and_loses_a_counted_number_of_own_lines(
    output: Output, stderr: Reader
) -> None:
    log = logging.getLogger("wa-supervisor")
    while not output.own_lines_lost_total:
        log.warning("own line of a supervisor whose terminal has stalled")
    with output.attach(1) as pipes:
        os.write(pipes.stderr, b"last words\nunfinished")
        assert output.tail(1) == ("last words", "unfinished")
    stderr.until(b"stderr had stalled; lines of this log that are missing here: 1\n")
    log.warning("after it")
    stderr.until(b"after it\n")
    assert stderr.seen.count(b"own line") > 10_000


def test_tail_has_the_last_lines_of_stderr_as_text_without_secrets(output: Output) -> None:
    with output.attach(1) as pipes:
        os.write(pipes.stdout, b"not stderr\n")
        for number in range(260):
            os.write(pipes.stderr, b"line %d\n" % number)
        assert output.tail(1) == tuple(f"line {number}" for number in range(10, 260))
        os.write(pipes.stderr, b"caf\xe9 postgresql://app:s3cret@db/x\n" + b"x" * 5000)
        assert output.tail(1)[-3:] == ("line 259", "caf\\xe9 postgresql://app:***@db/x", "x" * 1000)
        assert len(output.tail(1)) == 250


def test_tail_outlives_the_process_until_it_is_forgotten(output: Output, stderr: Reader) -> None:
    assert run(output, 1, "import os; os.write(2, b'Traceback\\nValueError')").wait() == 0
    assert output.tail(1) == ("Traceback", "ValueError")
    stderr.until(b"ValueError")
    until(lambda: not output._sources)
    assert output.tail(1) == ("Traceback", "ValueError")
    output.forget(1)
    assert output.tail(1) == ()
    assert output.tail(99) == ()


HALVES = """
import os, sys
for _ in range(200):
    os.write(int(sys.argv[1]), sys.argv[2].encode() * 3000)
    os.write(int(sys.argv[1]), sys.argv[2].encode() * 3000 + b"\\n")
"""


def test_lines_of_several_sources_on_one_terminal_stay_whole(log_file: Path, stderr: Reader) -> None:
    processes = []
    with opened(log_file, stderr, stderr) as output:
        for number, (stream, letter) in enumerate([("1", "a"), ("2", "b"), ("1", "c"), ("2", "d")]):
            with output.attach(number) as pipes:
                process = subprocess.Popen(
                    [sys.executable, "-c", HALVES, stream, letter], stdout=pipes.stdout, stderr=pipes.stderr
                )
            processes.append(process)
        for _ in range(200):
            logging.getLogger("wa-supervisor").warning("o" * 6000)
        until(lambda: bool(stderr.rest()) and all(process.poll() == 0 for process in processes))
        until(lambda: bool(stderr.rest()) and not output._sources)
        logging.getLogger("wa-supervisor").warning("the end")
        lines = stderr.until(b"the end\n").splitlines()
    assert sorted(lines) == sorted([c.encode() * 6000 for c in "abcdo" for _ in range(200)] + [b"the end"])


def test_prompt_is_shown_after_a_silence_and_no_other_line_is_glued_to_it(
    output: Output, stdout: Reader, log_file: Path
) -> None:
    with output.attach(1) as one, output.attach(2) as two:
        os.write(one.stdout, b"name? ")
        assert stdout.until(b"name? ") == b"name? "
        os.write(one.stdout, b"and age? ")
        stdout.until(b"age? ")
        os.write(two.stdout, b"other\n")
        stdout.until(b"other\n")
        os.write(one.stdout, b"thanks\n")
        stdout.until(b"thanks\n")
    assert stdout.seen == b"name? and age? \nother\nthanks\n"
    output.close()
    lines = [line.partition("Z ")[2] for line in read_last(log_file, 9)]
    assert lines == ["2 | other", "1 | name? and age? thanks"]


def test_endless_line_passes_in_pieces_and_unchanged(output: Output, stdout: Reader, log_file: Path) -> None:
    assert run(output, 1, "import os; os.write(1, b'x' * 50_000); os.write(1, b'y' * 50_000)").wait() == 0
    until(lambda: len(stdout.rest()) == 100_000)
    assert stdout.seen == b"x" * 50_000 + b"y" * 50_000
    output.close()
    lines = [line.partition(" | ")[2] for line in read_last(log_file, 99)]
    assert len(lines) > 1
    assert "".join(lines) == stdout.seen.decode()


def test_process_left_behind_is_heard_until_it_ends(output: Output, stdout: Reader) -> None:
    before = descriptors()
    step, go = os.pipe()
    code = f"import os\nif os.fork() == 0: os.read({step}, 1); os.write(1, b'from afar\\n')"
    with output.attach(1) as pipes:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=pipes.stdout, stderr=pipes.stderr, pass_fds=(step,)
        )
    assert process.wait() == 0
    output.forget(1)
    os.write(go, b"x")
    stdout.until(b"from afar\n")
    os.close(step)
    os.close(go)
    until(lambda: descriptors() == before)


def test_ended_children_do_not_use_up_descriptors_while_stdout_is_stalled(
    output: Output, stdout: Reader, log_file: Path
) -> None:
    before = descriptors()
    for number in range(40):
        with output.attach(number) as pipes:
            os.write(pipes.stdout, b"x" * 65535 + b"\n")
        output.forget(number)
        until(lambda: not output._sources)
    assert descriptors() == before
    lost = output.unpassed_bytes_total
    assert 0 < lost < 40 * 65536
    until(lambda: len(stdout.rest()) >= 40 * 65536 - lost)
    assert len(stdout.rest()) == 40 * 65536 - lost
    output.close()
    assert {line[25:27].strip() for line in read_last(log_file, 16)} == {str(n) for n in range(24, 40)}


def test_hundred_generations_leave_no_descriptor_and_no_thread(output: Output, stdout: Reader) -> None:
    def generation(number: int) -> None:
        with output.attach(number) as pipes:
            subprocess.run(
                ["/bin/sh", "-c", "echo served; echo failed >&2"],
                stdout=pipes.stdout,
                stderr=pipes.stderr,
                check=True,
            )
        assert output.tail(number) == ("failed",)
        output.forget(number)
        until(lambda: not output._sources)

    generation(0)
    before = descriptors(), threading.active_count()
    for number in range(1, 101):
        generation(number)
    assert (descriptors(), threading.active_count()) == before
    assert output._stderr_of == {}
    assert stdout.rest().count(b"served\n") == 101


def test_generation_whose_process_cannot_be_started_leaves_nothing(output: Output) -> None:
    before = descriptors()
    with pytest.raises(FileNotFoundError), output.attach(1) as pipes:
        subprocess.Popen(["/nowhere"], stdout=pipes.stdout, stderr=pipes.stderr)
    until(lambda: descriptors() == before)
    assert output._stderr_of == {}


def test_pipes_of_one_generation_are_not_inherited_by_another(output: Output) -> None:
    with output.attach(1) as pipes:
        code = f"import os; os.fstat({pipes.stdout})"
        process = subprocess.run(
            [sys.executable, "-c", code], close_fds=False, check=False, stderr=subprocess.DEVNULL
        )
        assert process.returncode == 1


def test_more_than_the_last_mebibyte_is_kept(output: Output, stdout: Reader, log_file: Path) -> None:
    process = run(output, 1, "for number in range(60_000): print(f'{number:063}')")
    until(lambda: len(stdout.rest()) == 60_000 * 64)
    assert process.wait() == 0
    output.close()
    lines = read_last(log_file, 60_000)
    assert lines[-1].endswith(f"{59_999:063}")
    assert sum(len(line) + 1 for line in lines) >= LIMIT_BYTES


def test_file_that_cannot_be_written_is_said_once_and_everything_else_goes_on(
    tmp_path: Path, stdout: Reader, stderr: Reader
) -> None:
    (tmp_path / "log").write_text("a file where the folder should be", encoding="utf-8")
    with opened(tmp_path / "log" / "child.log", stdout, stderr) as output, output.attach(1) as pipes:
        for number in range(3):
            os.write(pipes.stdout, b"line %d\n" % number)
            stdout.until(b"line %d\n" % number)
        until(lambda: output.errors_total == 3)
        stderr.until(b"child.log: Not a directory; output that it does not take is lost there\n")
        output.close()
    assert stderr.rest().count(b"\n") == 1


@pytest.mark.parametrize("gone", ["stdout", "stderr"])
def test_reader_that_is_gone_is_no_reason_to_end(
    output: Output, stdout: Reader, stderr: Reader, log_file: Path, gone: str
) -> None:
    (stdout if gone == "stdout" else stderr).leave()
    for number in (1, 2):
        assert (
            run(output, number, "import os; os.write(1, b'served\\n'); os.write(2, b'failed\\n')").wait() == 0
        )
        assert output.tail(number) == ("failed",)
    if gone == "stdout":
        stderr.until(b"cannot write stdout: Broken pipe")
    else:
        stdout.until(b"served\nserved\n")
    output.close()
    assert sum(line.endswith(("| served", "| failed")) for line in read_last(log_file, 9)) == 4


def test_close_passes_on_what_was_written_before_it(
    output: Output, stdout: Reader, stderr: Reader, log_file: Path
) -> None:
    with output.attach(1) as pipes:
        os.write(pipes.stdout, b"served\nunfinished")
        logging.getLogger("wa-supervisor").warning("stopped")
        output.close()
    assert stdout.rest() == b"served\nunfinished"
    assert stderr.rest() == b"stopped\n"
    assert [line.partition(" | ")[2] for line in read_last(log_file, 9)] == ["served", "unfinished"]
    logging.getLogger("wa-supervisor").warning("said too late")


def test_close_does_not_wait_for_a_reader_that_stalls_or_a_process_that_goes_on_writing(
    output: Output, log_file: Path
) -> None:
    before = descriptors()
    process = run(output, 1, "import os\nwhile True: os.write(1, b'x' * 1000 + b'\\n')")
    until(lambda: not output._stdout_sink.has_room)
    output.close(0.1)
    assert not output._thread.is_alive()
    assert process.wait() != 0  # Its pipe was broken.
    assert descriptors() == before - 2  # Those it wakes up by.
    assert read_last(log_file, 1)[0].endswith("x")


def test_what_is_on_its_way_passes_over_to_another_image_unchanged(
    output: Output, stdout: Reader, stderr: Reader, log_file: Path
) -> None:
    code = (
        "import os\nfor n in range(60000): os.write(1, b'line %d\\n' % n)\nos.write(1, b'prompt> ')\ninput()"
    )
    with output.attach(4) as pipes:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=pipes.stdout, stderr=pipes.stderr
        )
    until(lambda: log_file.exists() and b"line 9000" in log_file.read_bytes())  # Stdout has stalled by now.
    assert output.stop()
    output.handler().handle(logging.makeLogRecord({"msg": "said while nobody listens"}))
    left = msgspec.msgpack.decode(msgspec.msgpack.encode(output.estate), type=OutputEstate)
    before = descriptors()
    with opened(log_file, stdout, stderr, left):
        stdout.until(b"prompt> ")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() != 0  # End of its input.
        stderr.until(b"EOFError")
    assert stdout.rest() == b"".join(b"line %d\n" % number for number in range(60000)) + b"prompt> "
    assert b"said while nobody listens\n" in stderr.rest()
    assert descriptors() == before - 3  # Its two pipes, and the writing end of its stdin.


def test_an_image_that_is_not_replaced_after_all_goes_on_passing_on(
    log_file: Path, stdout: Reader, stderr: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, free = threading.Event(), threading.Event()

    def append(_file: LogFile, _lines: bytes) -> None:
        stuck.set()
        free.wait(DEADLINE_SECONDS)

    with opened(log_file, stdout, stderr) as output:
        monkeypatch.setattr(LogFile, "append", append)
        assert run(output, 1, "print('one')").wait() == 0
        assert stuck.wait(DEADLINE_SECONDS)
        assert not output.stop(0.05)
        free.set()
        assert run(output, 2, "print('two')").wait() == 0
        assert stdout.until(b"two\n") == b"one\ntwo\n"


def test_closed_standard_descriptors_do_not_become_somebody_elses(tmp_path: Path) -> None:
    code = """
import os, sys
from supervisor.output import Output, fill_standard_descriptors
from pathlib import Path
fill_standard_descriptors()
output = Output(Path(sys.argv[1]) / "child.log")
with output.attach(1) as pipes:
    os.write(pipes.stdout, b"served\\n")
output.close()
(Path(sys.argv[1]) / "names").write_text(" ".join(os.readlink(f"/proc/self/fd/{n}") for n in range(3)))
"""
    subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(tmp_path)],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert (tmp_path / "names").read_text(encoding="utf-8") == "/dev/null /dev/null /dev/null"
    assert read_last(tmp_path / "child.log", 1)[0].endswith("| served")


def test_what_an_old_generation_wrote_before_a_new_one_began_stands_before_its_lines(
    output: Output, stdout: Reader
) -> None:
    held = [os.dup(0) for _ in range(40)]
    noisy = run(output, 0, "print('x' * 600_000)")
    until(lambda: not output._stdout_sink.has_room)  # None of them is read now.
    with contextlib.ExitStack() as attached:
        for number in range(1, 10):
            pipes = attached.enter_context(output.attach(number))
            os.write(pipes.stdout, b"generation %d\n" % number)
            for _ in range(4):  # The next one's descriptors shall be lower than this one's.
                os.close(held.pop())
        stdout.until(b"generation 9\n")
    noisy.wait(DEADLINE_SECONDS)
    lines = [int(number) for number in re.findall(rb"generation (\d)", stdout.seen)]
    assert lines == list(range(1, 10))
