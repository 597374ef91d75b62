"""How processes ended and how they look, told of real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor import ends
from supervisor.ends import End, Look, OutOfMemoryKills
from tests.supervisor.harness import DEADLINE_SECONDS

KILLED = int(signal.SIGKILL)
UNNAMED_SIGNAL = 35


@pytest.fixture
def program() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Start Python programs that are killed at the end of the test."""
    started: list[subprocess.Popen[bytes]] = []

    def start(code: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-S", "-c", code], stdin=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def looks_like(pid: int, expected: Callable[[Look], bool]) -> Look:
    """Look at a process until it is as expected."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        look = ends.look(pid)
        assert look is not None
        if expected(look):
            return look
        assert time.monotonic() < deadline, look
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("code", "end", "sentence"),
    [
        ("pass", End(exit_status=0, oom=False), "exit status 0"),
        ("import sys; sys.exit(7)", End(exit_status=7, oom=False), "exit status 7"),
        ("import os; os.kill(os.getpid(), 11)", End(signal="SIGSEGV", oom=False), "signal SIGSEGV"),
        ("import os; os.kill(os.getpid(), 9)", End(signal="SIGKILL", oom=None), "signal SIGKILL"),
        (
            f"import os; os.kill(os.getpid(), {UNNAMED_SIGNAL})",
            End(signal=f"signal {UNNAMED_SIGNAL}", oom=False),
            f"signal {UNNAMED_SIGNAL}",
        ),
    ],
)
def test_end_of_a_process(
    program: Callable[[str], subprocess.Popen[bytes]], code: str, end: End, sentence: str
) -> None:
    _, status = os.waitpid(program(code).pid, 0)
    assert ends.end_of(status) == end
    assert str(ends.end_of(status)) == sentence


@pytest.mark.parametrize(
    ("status", "before", "after", "by_us", "oom"),
    [
        (KILLED, 2, 3, False, True),
        (KILLED, 2, 2, False, False),
        (KILLED, None, 3, False, None),
        (KILLED, 2, None, False, None),
        (KILLED, 2, 3, True, False),  # Somebody else of the cgroup was meant.
        (int(signal.SIGTERM), 2, 3, False, False),
        (7 << 8, 2, 3, False, False),
    ],
)
def test_out_of_memory_is_what_the_kernel_counted(
    status: int, before: int | None, after: int | None, *, by_us: bool, oom: bool | None
) -> None:
    end = ends.end_of(status, kills_before=before, kills_after=after, by_us=by_us)
    assert end.oom is oom
    assert ("(out of memory)" in str(end)) is bool(oom)


def proc_with(folder: Path, cgroup: str, mounts: str) -> Path:
    """Make what a process sees of its cgroup."""
    (folder / "proc" / "self").mkdir(parents=True)
    (folder / "proc" / "self" / "cgroup").write_text(cgroup, encoding="utf-8")
    (folder / "proc" / "self" / "mountinfo").write_text(mounts, encoding="utf-8")
    return folder / "proc"


@pytest.mark.parametrize(
    ("cgroup", "root", "directory"),
    [
        ("0::/system.slice/relay.service\n", "/", "system.slice/relay.service"),
        ("0::/\n", "/", ""),  # In a namespace of its own.
        ("0::/machine/box/unit\n", "/machine/box", "unit"),  # Only a part of the hierarchy is mounted.
        ("9:memory:/elsewhere\n0::/unit\n", "/", "unit"),  # Version 1 beside it.
    ],
)
def test_counter_is_that_of_our_own_cgroup(tmp_path: Path, cgroup: str, root: str, directory: str) -> None:
    mounted = tmp_path / "cgroup"
    mounts = f"30 23 0:26 / /tmp rw - tmpfs tmpfs rw\n31 23 0:27 {root} {mounted} rw - cgroup2 cgroup2 rw\n"
    proc = proc_with(tmp_path, cgroup, mounts)
    (mounted / directory).mkdir(parents=True, exist_ok=True)
    events = mounted / directory / "memory.events"
    counter = OutOfMemoryKills(proc)
    assert counter.read() is None
    events.write_text("low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n", encoding="utf-8")
    assert counter.read() == 3


@pytest.mark.parametrize(
    ("cgroup", "mount"),
    [
        ("", "cgroup2 cgroup2"),
        ("9:memory:/unit\n", "cgroup2 cgroup2"),
        ("0::/unit\n", "cgroup cgroup"),
        ("0::/../other\n", "cgroup2 cgroup2"),  # Outside of what this namespace shows.
    ],
)
def test_counter_that_is_not_there_is_not_known(tmp_path: Path, cgroup: str, mount: str) -> None:
    mounted = tmp_path / "cgroup"
    proc = proc_with(tmp_path, cgroup, f"31 23 0:27 / {mounted} rw - {mount} rw\n")
    (mounted / "unit").mkdir(parents=True)
    assert OutOfMemoryKills(proc).read() is None


def test_real_counter_is_a_number_or_not_known(not_checked: Callable[[str], None]) -> None:
    count = OutOfMemoryKills().read()
    if count is None:
        not_checked("out of memory: no cgroup v2 with a memory controller here")
    assert count is None or count >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
class TestLook:
    """One at a living process, which is not changed by it."""

    def test_process_that_waits(self, program: Callable[[str], subprocess.Popen[bytes]]) -> None:
        look = looks_like(program("input()").pid, lambda look: look.state == "S")
        assert not look.stopped
        assert str(look).startswith("state S")

    def test_process_that_works(self, program: Callable[[str], subprocess.Popen[bytes]]) -> None:
        look = looks_like(program("while True: pass").pid, lambda look: look.state == "R")
        assert (look.wchan, look.stopped) == ("", False)

    def test_stopped_process_is_recorded_and_stays_stopped(
        self, program: Callable[[str], subprocess.Popen[bytes]]
    ) -> None:
        process = program("input()")
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        for _ in range(2):
            look = ends.look(process.pid)
            assert look is not None
            assert look.stopped
        assert str(look).startswith("state T (stopped)")

    def test_process_that_is_gone(self, program: Callable[[str], subprocess.Popen[bytes]]) -> None:
        process = program("pass")
        process.wait()
        assert ends.look(process.pid) is None

    def test_what_may_not_be_read_is_left_out(self) -> None:
        assert str(Look("D", "", "")) == "state D"
        assert str(Look("S", "pipe_read", "0")) == "state S, waits in pipe_read, system call 0"
        assert str(Look("R", "", "running")) == "state R, running"
