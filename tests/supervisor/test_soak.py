"""What many reloads in a row cost the supervisor, and how often code that crashes is started."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from supervisor.lifecycle import Policy
from tests.supervisor.harness import NO_ZYGOTE, SOAK, Supervised, generations, until

Supervise = Callable[..., Supervised]

LIVE = r"reload \(\w+\): live"
RELOADS = (10, 50, 100, 200) if SOAK else (5, 20)
"""After how many reloads it is measured; the first time, all caches have been filled."""

GROWTH_BYTES = 2 * 1024 * 1024
"""What resident memory may grow by between the first and the last measurement.

The history keeps a record for each reload, 1,000 at most: 3 KiB each were measured, 600 KiB after 200. The
bound is three times that, so whatever else is kept of a reload is noticed from 7 KiB on.
"""


@dataclass(frozen=True)
class Usage:
    """What a supervisor holds while one generation serves."""

    resident_bytes: int
    descriptors: int
    threads: int
    children: int
    zombies: int

    def __str__(self) -> str:
        return (
            f"RSS {self.resident_bytes / 2**20:.1f} MiB, {self.descriptors} fds, {self.threads} threads, "
            f"{self.children} children, {self.zombies} zombies"
        )


def usage(started: Supervised, descriptors: int | None = None) -> Usage:
    """Measure a supervisor that has come to rest: beside its child, compile helper and zygote wait for work,
    and after a reload the next child.

    Its pipes are read to their end after that, so the descriptors are waited for as well, if it is known how
    many there were.
    """
    process = psutil.Process(started.process.pid)
    until(lambda: NO_ZYGOTE or started.status()["zygote"]["state"] == "ready")
    spare = int(not NO_ZYGOTE and descriptors is not None)
    until(lambda: (started.status()["zygote"]["spare"] is not None) == bool(spare))
    helpers = spare + (1 if NO_ZYGOTE else 2)
    until(lambda: (len(generations(process)), len(process.children())) == (1, 1 + helpers))
    until(lambda: process.num_fds() <= (descriptors + spare if descriptors is not None else sys.maxsize))
    children = generations(process)
    zombies = [child for child in children if child.status() == psutil.STATUS_ZOMBIE]
    return Usage(
        process.memory_info().rss, process.num_fds(), process.num_threads(), len(children), len(zombies)
    )


def write(tree: Path, text: str) -> None:
    """Save ``modules/answer.py`` as an editor does: whole."""
    new = tree / "answer.new"
    new.write_text(text, encoding="utf-8")
    new.replace(tree / "modules" / "answer.py")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("handover", ["overlap", "replace"])
def test_reloads_leave_nothing_behind_in_the_supervisor(
    supervise: Supervise, tree: Path, handover: str, measured: Callable[[str], None]
) -> None:
    started = supervise(f"--handover={handover}", "main.py", cwd=tree)
    started.expect("^serving 1$")
    started.expect(LIVE)
    at_first = usage(started)
    measured(f"{handover}, {0:3} reloads: {at_first}")
    found = []
    for number in range(1, RELOADS[-1] + 1):
        write(tree, f"VALUE = {number + 1}\n")
        started.expect(f"^serving {number + 1}$")
        started.expect(LIVE)
        if number in RELOADS:
            found.append(usage(started, at_first.descriptors))
            measured(f"{handover}, {number:3} reloads: {found[-1]}")
    last = found[-1]
    assert (last.threads, last.children, last.zombies) == (at_first.threads, 1, 0)
    assert last.resident_bytes - found[0].resident_bytes < GROWTH_BYTES


COUNTED = """\
import os, sys, time
sys.path.insert(0, "modules")
with open(sys.argv[1], "a") as starts:
    starts.write(f"{time.monotonic()} {os.environ['WA_TREE']}\\n")
import answer
while True:
    time.sleep(60)
"""
CRASHES = "raise SystemExit(3)\n"


def starts(file: Path) -> list[tuple[float, str]]:
    """Return when each process was started, and from which tree."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [(float(line.partition(" ")[0]), line.partition(" ")[2]) for line in lines]


def test_version_that_crashes_at_once_is_started_again_no_sooner_than_the_backoff_allows(
    supervise: Supervise, tree: Path, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    (tree / "main.py").write_text(COUNTED, encoding="utf-8")
    write(tree, CRASHES)
    count, policy = 5, Policy(overlap=False, notify=False)
    supervise("--scan-interval=0.1", "main.py", str(tmp_path / "starts"), cwd=tree)
    until(lambda: len(starts(tmp_path / "starts")) >= count)
    times = [at for at, _ in starts(tmp_path / "starts")]
    gaps = [after - before for before, after in itertools.pairwise(times)]
    shortest = [0.8 * policy.backoff_first_seconds * 2.0**number for number in range(count - 1)]
    measured(f"{count} starts within {times[-1] - times[0]:.1f} s, {sum(shortest):.1f} s at least")
    assert all(gap >= least for gap, least in zip(gaps, shortest, strict=True)), (gaps, shortest)


def test_bad_commit_is_started_once_where_a_good_one_is_known(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    (tree / "main.py").write_text(COUNTED, encoding="utf-8")
    started = supervise(
        "--scan-interval=0.1", "--probation=0.3", "main.py", str(tmp_path / "starts"), cwd=tree
    )
    started.expect("is known good")
    write(tree, CRASHES)
    started.expect(r"reload \(\w+\): rolled_back")
    started.expect(LIVE)
    threading.Event().wait(2.0)  # Twenty scans of the bad tree: this time is what the test is about.
    trees = [tree for _, tree in starts(tmp_path / "starts")]
    good = started.status()["live"]["tree"]
    assert [tree == good for tree in trees] == [True, False, True]
