"""What is started before it is known what it will be becomes just what is asked for, or nothing does."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from supervisor.forerunner import Forerunner, possible
from tests.supervisor.harness import NO_ZYGOTE, Supervised, is_gone, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets an environment be changed")

ENVIRONMENT = {"PATH": os.environ["PATH"], "COLOUR": "green", "WA_TREE": "t", "WA_GENERATION": "1"}
OUTPUTS = (1, 2)
MESSAGE = {"type": "start", "supervisor_pid": os.getpid(), "variables": {}}


@pytest.fixture
def forerunner(tmp_path: Path) -> Iterator[Forerunner]:
    made = Forerunner(ENVIRONMENT, str(tmp_path))
    yield made
    made.close()


def pid_of(forerunner: Forerunner) -> int:
    assert forerunner.pid is not None
    return forerunner.pid


def test_it_becomes_what_is_asked_for_once(forerunner: Forerunner, tmp_path: Path) -> None:
    pid = pid_of(forerunner)
    later = ENVIRONMENT | {"WA_TREE": "f" * 64, "WA_GENERATION": "12"}
    taken = forerunner.take(later, str(tmp_path), OUTPUTS, MESSAGE)
    assert taken is not None
    assert taken[0] == pid
    assert forerunner.take(later, str(tmp_path), OUTPUTS, MESSAGE) is None
    forerunner.close()
    assert psutil.pid_exists(pid), "it is no longer the forerunner's to end"
    taken[1].close()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def in_another_environment(forerunner: Forerunner, folder: Path) -> object:
    return forerunner.take(ENVIRONMENT | {"COLOUR": "blue"}, str(folder), OUTPUTS, MESSAGE)


def with_a_variable_less(forerunner: Forerunner, folder: Path) -> object:
    fewer = {name: value for name, value in ENVIRONMENT.items() if name != "COLOUR"}
    return forerunner.take(fewer, str(folder), OUTPUTS, MESSAGE)


def in_another_directory(forerunner: Forerunner, folder: Path) -> object:
    return forerunner.take(ENVIRONMENT, str(folder.parent), OUTPUTS, MESSAGE)


def with_a_number_that_has_no_room(forerunner: Forerunner, folder: Path) -> object:
    return forerunner.take(ENVIRONMENT | {"WA_GENERATION": "1" * 11}, str(folder), OUTPUTS, MESSAGE)


def when_it_has_ended(forerunner: Forerunner, folder: Path) -> object:
    pid = pid_of(forerunner)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return forerunner.take(ENVIRONMENT, str(folder), OUTPUTS, MESSAGE)


@pytest.mark.parametrize(
    "take",
    [
        in_another_environment,
        with_a_variable_less,
        in_another_directory,
        with_a_number_that_has_no_room,
        when_it_has_ended,
    ],
)
def test_with_any_doubt_it_is_gone(
    forerunner: Forerunner, tmp_path: Path, take: Callable[[Forerunner, Path], object]
) -> None:
    pid = pid_of(forerunner)
    assert take(forerunner, tmp_path) is None
    assert forerunner.pid is None
    assert not psutil.pid_exists(pid), "it was ended and collected"


def test_it_is_ended_when_it_has_waited_too_long(
    forerunner: Forerunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = pid_of(forerunner)
    forerunner.look()
    assert forerunner.pid == pid
    monkeypatch.setattr("supervisor.forerunner._MOST_SECONDS", 0.0)
    forerunner.look()
    assert forerunner.pid is None
    assert not psutil.pid_exists(pid)


def test_it_ends_with_the_supervisor(forerunner: Forerunner) -> None:
    forerunner._channel.close()
    assert os.waitpid(pid_of(forerunner), 0)[1] == 256, "exit status 1: nothing has begun"
    forerunner.pid = None


@pytest.mark.skipif(NO_ZYGOTE, reason="WA_TEST_NO_ZYGOTE=1: each start is a process of its own")
def test_the_first_generation_is_the_forerunner_and_nothing_is_left_of_one_that_is_not_needed(
    supervise: Callable[..., Supervised], tmp_path: Path
) -> None:
    assert possible
    script = tmp_path / "main.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    started = supervise("--type=simple", "main.py", cwd=tmp_path)
    started.expect("up")
    until(lambda: started.status()["live"] is not None)
    live = started.live()
    variables = Path(f"/proc/{live.pid}/environ").read_bytes().split(b"\0")
    assert b"WA_GENERATION=1" in variables
    assert not any(variable.startswith(b"WA_TREE=-") for variable in variables)
    started.end()
    script.write_text("def (\n", encoding="utf-8")
    started = supervise("--type=simple", "main.py", cwd=tmp_path)
    started.expect("rejected")
    children = psutil.Process(started.process.pid).children()
    waiting = [child for child in children if "bootstrap.py" in " ".join(child.cmdline())]
    assert len(waiting) == 1, "control: there is one"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(600)\n", encoding="utf-8")
    started.expect("up")
    until(lambda: started.status()["live"] is not None)
    assert started.live().pid == waiting[0].pid
    started.end()
    assert is_gone(waiting[0])
