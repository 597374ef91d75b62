"""Every way to end, in every situation: a good version serves again, and history says why.

The application takes a place before it works: one place in ``replace``, two in ``overlap``. Who finds none
writes that down and ends. What it is to do lies in a folder of orders: ``hold-STAGE`` keeps it in a stage,
``hit-PID`` makes one process exit or grow.

All cells are run by `make soak`. `make test` takes a sample, another one with each seed of pytest-randomly.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.supervisor.harness import SOAK, Supervised, generations, history, is_gone, until

Supervise = Callable[..., Supervised]

APPLICATION = """\
import os, signal, socket, time
import answer, orders

def main():
    place = orders.claim()
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.connect(os.environ["NOTIFY_SOCKET"])
    orders.stand("starting", answer.VALUE)
    notify.send(b"READY=1")
    print("serving", answer.VALUE)
    while not stopped:
        notify.send(b"WATCHDOG=1")
        orders.obey()
        time.sleep(0.02)
    orders.stand("draining", answer.VALUE)
    print("finished", answer.VALUE)
"""

ORDERS = """\
import fcntl, os, pathlib, sys, time
FOLDER = pathlib.Path(os.environ["ORDERS"])
grown = []

def claim():
    for number in range(int(os.environ["PLACES"])):
        place = open(FOLDER / f"place-{number}", "a")
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return place
    (FOLDER / f"no-place-{os.getpid()}").touch()
    sys.exit("there is no place for another main")

def stand(stage, value):
    print(stage, value, os.getpid())
    while (FOLDER / f"hold-{stage}").exists():
        obey()
        time.sleep(0.02)

def obey():
    hit = FOLDER / f"hit-{os.getpid()}"
    if not hit.exists():
        return
    what, _, status = hit.read_text().partition(" ")
    hit.unlink()
    if what == "exit":
        sys.exit(int(status))
    grown.append(b"x" * 150_000_000)
"""

ANSWER = 'import orders\nVALUE = {0}\norders.stand("importing", VALUE)\n'

HITS = ("SIGKILL", "SIGSTOP", "SIGSEGV", "memory", "exit 0", "exit 7", "supervisor")
SITUATIONS = {
    "overlap": ("starting", "live", "draining", "reload"),
    "replace": ("starting", "live", "draining", "reload", "handover"),
}
"""``handover``: the old one is gone, and the new one starts. In ``overlap`` there is no such moment."""

CELLS = [
    (handover, situation, hit)
    for handover, situations in SITUATIONS.items()
    for situation, hit in itertools.product(situations, HITS)
]
SAMPLE_CELLS = 6
LIVE = r"reload \(\w+\): live"
GONE_SECONDS = 5.0
"""What is promised for the children of a supervisor that was killed."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run all cells or a sample; the seed is that of the order of tests, so all workers draw the same."""
    if "cell" in metafunc.fixturenames:
        seed = metafunc.config.getoption("randomly_seed", 0)
        drawn = random.Random(seed).sample(CELLS, SAMPLE_CELLS)  # noqa: S311 -- a sample, no secret
        cells = CELLS if SOAK else [cell for cell in CELLS if cell in drawn]
        metafunc.parametrize("cell", cells, ids=lambda cell: "-".join(cell).replace(" ", "-"))


@dataclass
class Scene:
    """A tree under a supervisor, and the folder of orders."""

    tree: Path
    orders: Path
    start: Callable[[], Supervised]

    def write(self, number: int) -> None:
        """Save version ``number`` as an editor does: whole."""
        new = self.tree / "answer.new"
        new.write_text(ANSWER.format(number), encoding="utf-8")
        new.replace(self.tree / "answer.py")

    def hold(self, stage: str) -> None:
        (self.orders / f"hold-{stage}").touch()

    def let_go(self) -> None:
        for hold in self.orders.glob("hold-*"):
            hold.unlink()

    def serving(self, number: int) -> Supervised:
        """Start a supervisor and wait until version ``number`` is live."""
        started = self.start()
        started.expect(f"^serving {number}$")
        started.expect(LIVE)
        return started

    def arrange(self, handover: str, situation: str) -> tuple[Supervised, int]:
        """Bring a supervisor into a situation; return it and the pid of the child that is to be hit."""
        if situation == "starting":
            self.hold("starting")
            started = self.start()
            return started, int(started.expect(r"^starting 1 (\d+)$").group(1))
        started = self.serving(1)
        live = started.live().pid
        match situation:
            case "live":
                return started, live
            case "draining":
                self.hold("draining")
                self.write(2)
                if handover == "overlap":
                    started.expect("^serving 2$")
                    started.expect(LIVE)
                started.expect("^draining 1 ")
                return started, live
            case "handover":
                self.hold("starting")
                self.write(2)
                return started, int(started.expect(r"^starting 2 (\d+)$").group(1))
            case _:  # In replace the live one is asked to stop as soon as the new one has its imports done.
                stage = "importing" if handover == "replace" else "starting"
                self.hold(stage)
                self.write(2)
                started.expect(f"^{stage} 2 ")
                return started, live

    def strike(self, hit: str, pid: int) -> None:
        """Hit a child; return when it is hit."""
        if hit.startswith("SIG"):
            os.kill(pid, signal.Signals[hit])
            return
        order = self.orders / f"hit-{pid}"
        (self.orders / "order").write_text(hit, encoding="utf-8")
        (self.orders / "order").replace(order)
        until(lambda: not order.exists())


@pytest.fixture
def scene(tmp_path: Path, supervise: Supervise, cell: tuple[str, str, str]) -> Scene:
    tree, orders = tmp_path / "tree", tmp_path / "orders"
    for folder in (tree, orders):
        folder.mkdir()
    for name, text in (("app", APPLICATION), ("orders", ORDERS)):
        (tree / f"{name}.py").write_text(text, encoding="utf-8")
    handover = cell[0]

    def start() -> Supervised:
        return supervise(
            "--type=notify",
            f"--handover={handover}",
            "--ready-timeout=5",
            "--stop-timeout=3",
            "--watchdog=1",
            "--scan-interval=0.2",
            "--max-memory=120000000",
            "app:main",
            cwd=tree,
            ORDERS=str(orders),
            PLACES="1" if handover == "replace" else "2",
        )

    found = Scene(tree, orders, start)
    found.write(1)
    return found


ENDINGS: Mapping[str, Mapping[str, Any]] = {
    "SIGKILL": {"signal": "SIGKILL", "exit_status": None, "stopped": False},
    "SIGSTOP": {"signal": "SIGKILL", "exit_status": None, "stopped": True},
    "SIGSEGV": {"signal": "SIGSEGV", "exit_status": None, "stopped": False},
    "exit 0": {"signal": None, "exit_status": 0, "stopped": False},
    "exit 7": {"signal": None, "exit_status": 7, "stopped": False},
}


def cause(situation: str, hit: str) -> Mapping[str, Any] | None:
    """Return what history must say of a hit; None for what is no fault."""
    if hit == "memory":  # A limit is held against who serves, unless something newer is on its way.
        number = 2 if situation == "handover" else 1
        wanted = {"kind": "restart", "trigger": "memory", "generation": number, "ending": None}
        return wanted if situation in {"starting", "live", "handover"} else None
    reason = "readiness" if hit == "SIGSTOP" else "crash"
    match situation:
        case "starting":
            return {"kind": "reload", "outcome": "rejected", "reason": reason, "generation": 1}
        case "handover":
            return {"kind": "rollback", "outcome": "rolled_back", "reason": reason, "generation": 2}
        case "draining":
            return {"kind": "drain", "generation": 1} if hit != "exit 0" else None
    return {"kind": "restart", "trigger": "hang" if hit == "SIGSTOP" else "crash", "generation": 1}


def says(record: Mapping[str, Any], wanted: Mapping[str, Any], hit: str) -> bool:
    ending = record["ending"] or {}
    return all(record[key] == value for key, value in wanted.items()) and (
        hit == "memory" or all(ending[key] == value for key, value in ENDINGS[hit].items())
    )


def test_good_version_serves_again_and_history_says_why(
    scene: Scene, cell: tuple[str, str, str], measured: Callable[[str], None]
) -> None:
    handover, situation, hit = cell
    started, pid = scene.arrange(handover, situation)
    child = psutil.Process(pid)
    version = {"starting": 1, "live": 1, "draining": 2, "reload": 2, "handover": 1}[situation]
    began = time.monotonic()
    if hit == "supervisor":
        children = psutil.Process(started.process.pid).children(recursive=True)
        assert child in children
        started.process.kill()
        until(lambda: all(is_gone(process) for process in children), GONE_SECONDS)
        gone = f"children gone after {time.monotonic() - began:.2f} s, "
        scene.let_go()
        started.end()
        version = 1 if situation in {"starting", "live"} else 2  # What is on disk.
        started = scene.serving(version)
    else:
        scene.strike(hit, pid)
        if situation == "reload" and hit != "memory":
            started.expect("generation 1: (crash|hang)")
        scene.let_go()
        gone = ""
        if hit == "memory" and situation in {"starting", "handover"}:  # It serves until it is replaced.
            version = 1 if situation == "starting" else 2
            started.expect(f"^serving {version}$")
        if (handover, situation) != ("overlap", "draining"):
            started.expect(f"^serving {version}$")
        until(lambda: is_gone(child))
    measured(f"{gone}{version} serves after {time.monotonic() - began:.2f} s")

    def settled() -> bool:
        status = started.status()
        return status["candidate"] is None and status["live"] is not None

    until(settled)
    status = started.status()
    assert status["in_sync"] == (situation != "handover" or hit in {"memory", "supervisor"}), status["reason"]
    supervisor = psutil.Process(started.process.pid)
    until(lambda: [c.pid for c in generations(supervisor) if not is_gone(c)] == [status["live"]["pid"]])
    assert not list(scene.orders.glob("no-place-*")), "there were more mains at work than the handover allows"
    if hit == "supervisor":
        starts = [r["outcome"] for r in history(started) if (r["kind"], r["trigger"]) == ("reload", "start")]
        assert starts[0] == "live"  # What the first one did in its last moment may not be on disk.
        return
    wanted = cause(situation, hit)
    if wanted is None:
        assert [r["kind"] for r in history(started)] == ["reload", "reload"], history(started)
    else:
        until(lambda: any(says(record, wanted, hit) for record in history(started)))
