"""Health: when the service manager's watchdog is kept quiet, and when it is called."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from supervisor import health
from supervisor.lifecycle import Generation, Policy, Retry, Stage, State
from tests.supervisor.harness import DEADLINE_SECONDS, Supervised

Supervise = Callable[..., Supervised]

OVERLAP, REPLACE = Policy(overlap=True, notify=True), Policy(overlap=False, notify=True)
LIVE = Generation(3, "a", "start", Stage.LIVE, 0.0, 15.0, ready=True, attested=True, was_started=True)
NEXT = Generation(4, "b", "watch", Stage.STARTED, 0.0, 30.0, was_started=True)
SERVING = State(live=LIVE, next_number=5)


# --- the rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "state", "processes", "now", "says"),
    [
        (OVERLAP, SERVING, {3}, 14.0, None),
        (OVERLAP, SERVING, set(), 14.0, "counts as live and has no process"),
        (OVERLAP, replace(SERVING, live=replace(LIVE, attested=False)), {3}, 14.0, "was never proven"),
        (OVERLAP, replace(SERVING, candidate=NEXT), {3, 4}, 14.0, None),
        (REPLACE, replace(SERVING, candidate=NEXT), {3, 4}, 14.0, "3, 4 are at work at the same time"),
        (REPLACE, replace(SERVING, candidate=replace(NEXT, was_started=False)), {3, 4}, 14.0, None),
        (OVERLAP, SERVING, {3}, 24.0, None),
        (OVERLAP, SERVING, {3}, 26.0, "generation 3 (live) is 11 s over its time"),
        (OVERLAP, State(), set(), 1e6, None),
    ],
)
def test_broken_promise_is_named(
    policy: Policy, state: State, processes: set[int], now: float, says: str | None
) -> None:
    found = health.broken(policy, state, processes, now)
    assert found == says if says is None else says in str(found)


@pytest.mark.parametrize(
    ("state", "unserved", "blind", "says"),
    [
        (SERVING, 0.0, None, None),
        (SERVING, 0.0, "no events", "no events"),
        (replace(SERVING, live=replace(LIVE, deadline=None)), 0.5, None, "nobody has been serving"),
        (SERVING, 15.0, None, None),  # Silent, and held to its watchdog.
        (State(candidate=NEXT), 79.0, None, None),
        (State(retry=Retry(9.0, "a", "crash")), 79.0, None, None),
        (State(retry=Retry(9.0, "a", "crash")), 81.0, None, "nobody has been serving for 81 s"),
        (State(), 0.5, None, "nobody has been serving"),
        (State(stopping=True), 500.0, None, None),
    ],
)
def test_what_heals_in_its_bounds_is_waited_for(
    state: State, unserved: float, blind: str | None, says: str | None
) -> None:
    found = health.ailing(OVERLAP, state, unserved, blind)
    assert found == says if says is None else says in str(found)


def test_what_has_a_bound_of_its_own_is_underway() -> None:
    drains = replace(LIVE, stage=Stage.DRAINING)
    assert health.underway(State(), busy=True)
    assert health.underway(State(candidate=NEXT), busy=False)
    assert health.underway(State(stopping=True, draining=(drains,)), busy=True)
    assert not health.underway(SERVING, busy=False)
    assert not health.underway(State(stopping=True, draining=(replace(drains, deadline=None),)), busy=True)


@pytest.mark.parametrize(
    ("state", "reason", "line"),
    [
        (State(), None, "starting"),
        (State(candidate=NEXT), health.NOT_YET, "starting: generation 4 gets ready"),
        (SERVING, None, "in sync: generation 3 serves, commit c; it says: fine"),
        (
            SERVING,
            "bad.py, line 1",
            "NOT in sync: bad.py, line 1; generation 3 serves, commit c; it says: fine",
        ),
        (State(next_number=2), "main.py: no", "nobody serves: main.py: no"),
        (State(served="a", candidate=NEXT), "crash", "nobody serves: crash; generation 4 gets ready"),
        (
            State(stopping=True, draining=(replace(LIVE, stage=Stage.DRAINING),)),
            "stopping",
            "stopping: generation 3 finishes its work",
        ),
        (State(stopping=True), "stopping", "stopping"),
    ],
)
def test_status_line_is_in_words(state: State, reason: str | None, line: str) -> None:
    assert health.words(state, code="commit c", reason=reason, said="fine") == line


# --- a supervisor and its service manager -----------------------------------------------------------------


class Manager:
    """What a service manager hears."""

    def __init__(self, receiver: socket.socket) -> None:
        self._receiver = receiver
        self.heard: list[str] = []

    def hear(self, prefix: str) -> str:
        """Wait for a message that begins so."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while time.monotonic() < deadline:
            self.heard.append(self._receiver.recv(4096).decode())
            if self.heard[-1].startswith(prefix):
                return self.heard[-1]
        return pytest.fail(f"no {prefix!r} in {self.heard}")

    def forget(self) -> None:
        """Throw away what has come until now."""
        self._receiver.setblocking(False)
        try:
            while self._receiver.recv(4096):
                pass
        except BlockingIOError:
            self._receiver.settimeout(DEADLINE_SECONDS)
        self.heard.clear()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "n"))
        receiver.settimeout(DEADLINE_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "n"))
        monkeypatch.setenv("WATCHDOG_USEC", "10000000")
        yield Manager(receiver)


def test_start_asks_for_time_and_is_not_watched_before_it_is_ready(
    supervise: Supervise, tree: Path, manager: Manager
) -> None:
    gate = tree / "gate"
    script = (tree / "main.py").read_text(encoding="utf-8")
    waits = "import os, time\nwhile not os.path.exists('gate'):\n    time.sleep(0.01)\n"
    (tree / "main.py").write_text(waits + script, encoding="utf-8")
    supervise("--ready-timeout=60", "main.py", cwd=tree)
    manager.hear("EXTEND_TIMEOUT_USEC=10000000")
    manager.hear("EXTEND_TIMEOUT_USEC=10000000")
    gate.touch()
    manager.hear("READY=1")
    assert not [message for message in manager.heard if message.startswith("WATCHDOG")]
    manager.hear("WATCHDOG=1")


def test_stop_asks_for_the_time_that_its_child_needs(
    supervise: Supervise, tree: Path, manager: Manager
) -> None:
    main = tree / "main.py"
    script = main.read_text(encoding="utf-8")
    main.write_text(script.replace("sys.exit(0)", "time.sleep(60)"), encoding="utf-8")
    started = supervise("--stop-timeout=2", "main.py", cwd=tree)
    manager.hear("WATCHDOG=1")
    manager.forget()
    started.process.send_signal(signal.SIGTERM)
    manager.hear("STATUS=stopping: generation 1 finishes its work")
    manager.hear("EXTEND_TIMEOUT_USEC=")
    manager.hear("EXTEND_TIMEOUT_USEC=")
    manager.hear("STOPPING=1")


def test_pings_end_while_nobody_serves_and_nothing_is_on_its_way_to(
    supervise: Supervise, tree: Path, manager: Manager
) -> None:
    started = supervise("--watchdog=0", "--verify-interval=0.5", "main.py", cwd=tree)
    manager.hear("WATCHDOG=1")
    child = psutil.Process(started.status()["live"]["pid"])
    child.suspend()
    started.expect("nobody has been serving for .* watchdog is not told any more")
    manager.forget()
    manager.hear("STATUS=NOT in sync: the live generation has not answered")  # For five seconds.
    assert "WATCHDOG=1" not in manager.heard
    child.resume()
    manager.hear("WATCHDOG=1")
