"""Replacing the supervisor in place, on real processes, with a copy of its package that can be edited."""

from __future__ import annotations

import compileall
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

import supervisor
from supervisor import control
from supervisor.own import OwnCode
from supervisor.reexec import SIGNALS
from tests.supervisor.harness import SOAK, Supervised, history, until

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="without memfd and pidfd the supervisor refuses to be replaced in place"
)

Supervise = Callable[..., Supervised]

_TIMES = 10 if SOAK else 3

TICKS = """\
import itertools, os, sys, threading, time
from prometheus_client import Counter
sys.path.insert(0, "modules")
import answer
ticks = Counter("app_ticks", "Ticks.", ["value"]).labels(answer.VALUE)
if os.path.exists("crash"):
    os.unlink("crash")
for number in itertools.count():
    ticks.inc()
    print("tick", os.getpid(), number, answer.VALUE, flush=True)
    time.sleep(0.02)
    if os.path.exists("crash"):
        sys.exit("asked to crash")
"""

DAEMON = """\
import os, time
VALUE = 1
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
os.wait()
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without bytecode."""
    folder = tmp_path / "package"
    source = Path(supervisor.__file__).parent
    shutil.copytree(source, folder / "supervisor", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def ticking(tree: Path) -> Path:
    (tree / "main.py").write_text(TICKS, encoding="utf-8")
    return tree


def edit(package: Path, module: str, old: str, new: str) -> None:
    """Change a text that stands once in a module of the package."""
    file = package / "supervisor" / module
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, (module, old)
    file.write_text(text.replace(old, new), encoding="utf-8")


def metrics(started: Supervised) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{started.status()['listen']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def functions_checked(started: Supervised) -> int:
    document = control.request(started.runtime, "verify", timeout_seconds=15)["verify"]
    assert document["in_sync"], document
    return int(document["functions"]["checked"])


def is_a_total(name: str) -> bool:
    family = name.partition("{")[0]
    ours = family.startswith(("wa_supervisor_", "app_", "process_cpu_"))
    return ours and family.endswith(("_total", "_bucket", "_count", "_sum"))


def in_sync(started: Supervised) -> bool:
    return bool(started.status()["in_sync"])


def begun(started: Supervised) -> None:
    started.expect(r"reload \(start\): live")
    until(lambda: in_sync(started))


def generation(started: Supervised) -> int | None:
    live = started.status()["live"]
    return live["generation"] if live is not None else None


def test_an_update_is_shown_and_taken_over_while_the_child_runs_on(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    (ticking / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
    until(lambda: generation(started) == 2 and in_sync(started))
    before, record, proven = started.status(), history(started)[-1], functions_checked(started)
    assert (before["self"]["outdated"], before["self"]["image"]) == (False, 1), before["self"]
    assert proven > 0

    edit(package, "succession.py", "the supervisor was replaced in place", "the NEW program is in its place")
    started.expect(r"outdated: its own package has changed.*: succession\.py")
    assert "succession.py" in started.status()["self"]["reason"]
    assert "outdated" in started.command("status").stdout
    counted = metrics(started)
    assert counted["wa_supervisor_self_outdated"] == 1

    assert control.request(started.runtime, "reexec", timeout_seconds=15)["ok"]
    assert functions_checked(started) == proven, "proven with prints that the new image took, or not yet"
    started.expect(r"the NEW program is in its place \(image 2\); generation 2 runs on")
    until(lambda: in_sync(started))
    after = started.status()
    assert after["pid"] == before["pid"] == started.process.pid
    assert after["live"] == before["live"]
    assert after["listen"] == before["listen"]
    assert (after["self"]["outdated"], after["self"]["image"]) == (False, 2), after["self"]
    assert after["self"]["tree"] != before["self"]["tree"]
    until(lambda: started.status()["last_reload"] is not None)
    assert started.status()["last_reload"]["outcome"] == "unchanged"

    goes_on = metrics(started)
    fallen = {
        n: (v, goes_on.get(n, 0)) for n, v in counted.items() if is_a_total(n) and v > goes_on.get(n, 0)
    }
    assert not fallen
    assert goes_on["wa_supervisor_self_outdated"] == 0
    assert goes_on["wa_supervisor_reload_seconds_count"] > counted["wa_supervisor_reload_seconds_count"]

    records = history(started)
    assert record in records
    asked = next(r for r in records if r["kind"] == "operator")
    assert (asked["outcome"], asked["uid"]) == ("reexec", os.getuid())

    (ticking / "modules" / "answer.py").write_text("VALUE = 3\n", encoding="utf-8")
    until(lambda: generation(started) == 3 and in_sync(started))
    (ticking / "crash").touch()
    until(lambda: generation(started) == 4 and in_sync(started))
    ticks = 'app_ticks_total{value="2"}'
    assert metrics(started)[ticks] >= goes_on[ticks]


def test_stale_bytecode_of_the_supervisor_itself_is_noticed_and_not_run_again(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    assert compileall.compile_dir(package, quiet=1)  # With timestamps, as pip does.
    file = package / "supervisor" / "service.py"
    times = file.stat()
    edit(package, "service.py", '"status at http', '"STATUS at http')
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_size == times.st_size

    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    started.expect("status at http")  # The control arm: a plain start runs the stale code.
    started.expect(r"outdated: it may have loaded other code than its own package holds: service\.py")
    assert started.status()["self"]["outdated"]

    assert started.command("reexec").returncode == 0
    started.expect("STATUS at http")
    assert not started.status()["self"]["outdated"]


def test_a_program_that_cannot_take_over_is_refused_and_the_old_one_goes_on(
    package: Path, ticking: Path, tmp_path: Path, supervise: Supervise
) -> None:
    config = tmp_path / "settings.toml"
    config.write_text("probation = 20\n", encoding="utf-8")
    started = supervise(f"--config={config}", "main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    before = started.status()

    def refused(why: str) -> None:
        answer = started.command("reexec")
        assert answer.returncode == 1
        assert re.search(why, answer.stderr), answer.stderr
        assert len(answer.stderr.splitlines()) == 1, answer.stderr

    bad = (
        (
            "errors.py",
            "class SupervisorError",
            "class class SupervisorError",
            r"does not compile: .*errors\.py",
        ),
        (
            "verify.py",
            "from typing import Any,",
            "from typing import Nothing, Any,",
            "does not start: .*Nothing",
        ),
        ("child/frames.py", "PROTOCOL = 1", "PROTOCOL = 2", "does not understand the child"),
        (
            "lifecycle.py",
            "    paused: bool = False\n",
            "    paused: str = ''\n",
            "cannot be read by this version",
        ),
    )
    for module, old, new, why in bad:
        edit(package, module, old, new)
        refused(why)
        edit(package, module, new, old)
    config.write_text(f"watch = ['{tmp_path}']\n", encoding="utf-8")
    refused("watch needs a new start")
    config.write_text("probation = 25\n", encoding="utf-8")  # This one can be taken over.

    after = started.status()
    assert (after["live"], after["self"]["image"]) == (before["live"], 1)
    assert in_sync(started)
    assert not [r for r in history(started) if r["outcome"] == "reexec"]

    assert started.command("pause").returncode == 0
    assert started.command("reexec").stdout == "replaced (image 2); generation 1 runs on\n"
    after = started.status()
    assert (after["live"], after["self"]["image"], after["paused"]) == (before["live"], 2, True)
    assert started.command("resume").returncode == 0
    until(lambda: generation(started) == 2 and in_sync(started))


def test_if_exec_fails_the_same_program_goes_on_with_everything(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    edit(package, "reexec.py", "os.execve(command[0],", 'os.execve("/nowhere/python",')
    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    before = started.status()
    answer = started.command("reexec")
    assert answer.returncode == 1
    assert "could not be started: No such file or directory" in answer.stderr
    until(lambda: in_sync(started))
    after = started.status()
    assert (after["live"], after["self"]["image"]) == (before["live"], 1)
    (ticking / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
    started.expect(r"tick \d+ 0 2")
    started.process.terminate()
    assert started.process.wait(15) == 0


def test_what_cannot_be_handed_over_or_prepared_is_refused_and_everything_goes_on(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    (started.runtime / "package").touch()
    answer = started.command("reexec")
    assert (answer.returncode, "cannot write to" in answer.stderr) == (1, True), answer.stderr
    (started.runtime / "package").unlink()
    assert started.command("reexec").returncode == 0
    odd = ticking / os.fsdecode(b"\xff.py")
    odd.write_text("VALUE = 1\n", encoding="utf-8")
    until(lambda: generation(started) == 2 and in_sync(started))
    answer = started.command("reexec")
    assert (answer.returncode, "not UTF-8" in answer.stderr) == (1, True), answer.stderr
    assert generation(started) == 2


def test_only_the_main_thread_takes_signals(ticking: Path, supervise: Supervise) -> None:
    """Another one, on its way out while the main thread blocks them, would be ended, and all with it."""
    started = supervise("main.py", cwd=ticking)
    begun(started)
    host, _, port = started.status()["listen"].rpartition(":")
    with socket.create_connection((host, int(port)), timeout=15) as connection:  # It has a thread of its own.
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1)
        blocked = {
            int(task.name): int(re.findall(r"SigBlk:\s*([0-9a-f]+)", (task / "status").read_text())[0], 16)
            for task in Path(f"/proc/{started.process.pid}/task").iterdir()
        }
    main = blocked.pop(started.process.pid)
    wanted = sum(1 << (number - 1) for number in SIGNALS)
    assert main & wanted == 0
    assert len(blocked) >= 5, "output, scribe, watcher, web and its connection"
    assert {mask & wanted for mask in blocked.values()} == {wanted}


def test_what_happens_between_two_images_is_seen_by_the_next(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    between = (
        "os.kill(os.getpid(), signal.SIGHUP); os.kill(estate.fleet.running[0].child.pid, signal.SIGKILL)"
    )
    edit(package, "reexec.py", "            _exec(document)\n", f"            {between}; _exec(document)\n")
    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    assert started.command("reexec").returncode == 0
    started.expect("SIGHUP: reload")
    until(lambda: generation(started) == 2 and in_sync(started))
    restarts = [record for record in history(started) if record["kind"] == "restart"]
    assert [(r["generation"], r["ending"]["signal"]) for r in restarts] == [(1, "SIGKILL")]
    assert started.status()["restarts"]["crash"] == 1


def test_a_replacement_waits_for_a_quiet_moment_and_is_refused_if_there_is_none(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    edit(package, "succession.py", "PATIENCE_SECONDS = 30.0", "PATIENCE_SECONDS = 3.0")
    started = supervise("--handover=overlap", "main.py", cwd=ticking, PYTHONPATH=str(package))
    begun(started)
    slow = "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)\nVALUE = 2\n"
    (ticking / "modules" / "answer.py").write_text(slow, encoding="utf-8")
    until(lambda: started.status()["candidate"] is not None)
    answer = started.command("reexec")
    assert answer.returncode == 1
    assert "it took longer than 3 s: generation 2 is being started" in answer.stderr

    with waiting_for_reexec(started) as waiting:
        (ticking / "go").touch()
        started.expect(r"tick \d+ 0 2")
        answered = waiting()
    assert answered["ok"], answered
    assert answered["live"] == 2
    assert generation(started) == 2


@contextmanager
def waiting_for_reexec(started: Supervised) -> Iterator[Callable[[], control.Answer]]:
    answers: list[control.Answer] = []
    asking = threading.Thread(
        target=lambda: answers.append(control.request(started.runtime, "reexec", timeout_seconds=15))
    )
    asking.start()

    def wait() -> control.Answer:
        asking.join(20)
        return answers[0]

    yield wait
    asking.join(20)


class Crowd:
    """People who ask for the status all the time, by socket and by HTTP; nobody is to be turned away."""

    def __init__(self, started: Supervised) -> None:
        self._started = started
        self._address = started.status()["listen"]
        self._done = threading.Event()
        self.failures: list[str] = []
        self.answers = 0
        self._threads = [
            threading.Thread(target=self._ask, args=(how,)) for how in (self._socket, self._http)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, how: Callable[[], object]) -> None:
        while not self._done.wait(0.01):
            try:
                how()
                self.answers += 1
            except Exception as error:  # noqa: BLE001 -- whatever it is, it is a failure
                self.failures.append(f"{how.__name__}: {error!r}")

    def _socket(self) -> None:
        assert control.request(self._started.runtime, "status", timeout_seconds=10)["ok"]

    def _http(self) -> None:
        with urllib.request.urlopen(f"http://{self._address}/readyz", timeout=10) as answer:
            assert answer.status == 200


def test_replaced_many_times_by_signal_nothing_is_lost_and_nothing_is_left_open(
    package: Path, ticking: Path, tmp_path: Path, supervise: Supervise
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.setblocking(False)
        started = supervise(
            "main.py",
            cwd=ticking,
            PYTHONPATH=str(package),
            NOTIFY_SOCKET=str(tmp_path / "n"),
            WATCHDOG_USEC="10000000",
        )
        begun(started)
        live = started.status()["live"]

        def descriptors() -> list[str]:
            folder = Path(f"/proc/{started.process.pid}/fd")
            names = [str(entry.readlink()) for entry in folder.iterdir()]
            return sorted(re.sub(r"\d+", "N", name) for name in names if "socket:" not in name)

        def replace(image: int) -> None:
            os.kill(started.process.pid, signal.SIGUSR2)
            started.expect(rf"replaced in place \(image {image}\); generation 1 runs on")
            until(lambda: in_sync(started) and started.status()["state"] == "live")

        replace(2)
        first = descriptors()
        with Crowd(started) as crowd:
            for image in range(3, 2 + _TIMES):
                replace(image)
        assert not crowd.failures
        assert crowd.answers > _TIMES
        until(lambda: descriptors() == first)
        assert started.status()["live"] == live
        heard = []
        while True:
            try:
                heard.append(manager.recv(65536).decode())
            except BlockingIOError:
                break
        assert "WATCHDOG=1" in heard
        assert not [message for message in heard if "STOPPING" in message]
        started.process.terminate()
        assert started.process.wait(15) == 0
    numbers = [int(n) for n in re.findall(rf"tick {live['pid']} (\d+) 1", started.output.join())]
    assert numbers == list(range(len(numbers))), "lines were lost, doubled or swapped"
    kept = (tmp_path / "state" / "log" / "child.log").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(rf"tick {live['pid']} (\d+) 1", kept)] == numbers


def test_what_a_generation_daemonized_before_a_replacement_still_ends_with_it(
    package: Path, ticking: Path, supervise: Supervise
) -> None:
    (ticking / "modules" / "answer.py").write_text(DAEMON, encoding="utf-8")
    started = supervise("main.py", cwd=ticking, PYTHONPATH=str(package))
    pid = int(started.expect(r"daemon (\d+)")[1])
    begun(started)
    assert started.command("reexec").returncode == 0
    until(lambda: in_sync(started))
    (ticking / "modules" / "answer.py").write_text("VALUE = 3\n", encoding="utf-8")
    started.expect(r"tick \d+ 0 3")
    assert not Path(f"/proc/{pid}").exists()


def test_nobody_else_is_taken_for_a_successor(package: Path, ticking: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "supervisor", "run", "main.py"],
        cwd=ticking,
        env=os.environ | {"PYTHONPATH": str(package), "WA_SUPERVISOR_ESTATE": "adopt 0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=15,
    )
    assert ended.returncode == 1
    assert "cannot be read" in ended.stderr


def test_what_changed_after_the_start_may_have_been_loaded_in_either_state() -> None:
    assert OwnCode(time.time_ns()).problem is None
    long_ago = OwnCode(0)
    assert long_ago.problem is not None
    assert "may have loaded other code" in long_ago.problem
    long_ago.look()
    assert long_ago.problem is not None, "time does not settle it"
