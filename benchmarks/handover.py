"""How long nobody serves during a reload, and where that time goes.

A child appends a line to a file each millisecond: the time and its generation. It also notes when its main
begins, when it is asked to stop and when its main has ended; the benchmark notes when its process is gone.
Three applications: a callable under ``overlap`` and under ``replace``, and a script under ``replace``. All
import psycopg and prometheus_client; the imports of a callable's module are done before the old child is
touched, those of a script are statements of its body and come after.

Prints Markdown tables and writes them to ``benchmarks/results/handover.md``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
RESULT = Path(__file__).parent / "results" / "handover.md"
RELOADS = 50
ENDS = 25
ENOUGH_LINES = 100

NOTE = """\
import os, signal, socket, sys, time

out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(what):
    os.write(out, f"{time.monotonic_ns()} {os.environ['WA_GENERATION']} {what}\\n".encode())
"""
WORK = """\
    note(f"main {os.getpid()}")
    stopped = []

    def stop(*_):
        note("asked")
        stopped.append(True)

    signal.signal(signal.SIGTERM, stop)
    note("line")
    notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notify.connect(os.environ["NOTIFY_SOCKET"])
    notify.send(b"READY=1")
    while not stopped:
        notify.send(b"WATCHDOG=1")
        note("line")
        time.sleep(0.001)
    note("ended")
"""
IMPORTS = "import psycopg, prometheus_client\nimport version\n"
APPLICATIONS = {
    "callable": f"{NOTE}{IMPORTS}\ndef main():\n{WORK}",
    "script": f"{NOTE}note('begun')\n{IMPORTS}\nif True:\n{WORK}",
}
TARGETS = {"callable": "app:main", "script": "app.py"}
ENDINGS = (("", ""), ("gc.freeze()", ""), ("", "os._exit(0)"))
CASES = (("overlap", "callable"), ("replace", "callable"), ("replace", "script"))


@dataclass
class Life:
    """What was noted of one generation, in nanoseconds of the monotonic clock."""

    lines: list[int] = field(default_factory=list)
    marks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What one application measured."""

    handover: str
    kind: str
    lives: Sequence[Life]
    told_seconds: float

    @property
    def pairs(self) -> list[tuple[Life, Life]]:
        return list(itertools.pairwise(self.lives))

    def between(self, first: Callable[[Life, Life], int], then: Callable[[Life, Life], int]) -> list[float]:
        """Return the milliseconds between two moments, for each handover."""
        return [(then(old, new) - first(old, new)) / 1e6 for old, new in self.pairs]


class Follower:
    """Reads what the children write, and sees when their processes are gone."""

    def __init__(self, file: Path) -> None:
        self.lives: dict[int, Life] = {}
        self._file = file
        self._offset = 0
        self._threads: list[threading.Thread] = []

    def read(self) -> None:
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.decode("ascii").splitlines():
            at, generation, what, *pid = line.split()
            life = self.lives.setdefault(int(generation), Life())
            if what == "line":
                life.lines.append(int(at))
            else:
                life.marks[what] = int(at)
            if pid:
                self._watch(life, int(pid[0]))

    def _watch(self, life: Life, pid: int) -> None:
        descriptor = os.pidfd_open(pid)

        def wait() -> None:
            select.select([descriptor], [], [])
            life.marks["gone"] = time.monotonic_ns()
            os.close(descriptor)

        thread = threading.Thread(target=wait, daemon=True)
        self._threads.append(thread)
        thread.start()

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while True:
            self.read()
            if true():
                return
            assert time.monotonic() < deadline, "it never happened"
            time.sleep(0.005)

    def serves(self, number: int) -> bool:
        return number in self.lives and len(self.lives[number].lines) > ENOUGH_LINES

    def has_taken_over(self, number: int) -> bool:
        return self.serves(number) and "gone" in self.lives[number - 1].marks

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
        self.read()


def measure(folder: Path, handover: str, kind: str) -> Case:
    tree = folder / "tree"
    tree.mkdir(parents=True)
    (tree / "app.py").write_text(APPLICATIONS[kind], encoding="utf-8")
    (tree / "version.py").write_text("NUMBER = 0\n", encoding="utf-8")
    runtime = f"--runtime-dir={folder / 'run'}"
    command = [SUPERVISOR, "run", runtime, f"--state-dir={folder / 'state'}", "--listen=127.0.0.1:0"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    follower = Follower(folder / "lines")
    with subprocess.Popen(
        [*command, "--type=notify", f"--handover={handover}", TARGETS[kind], str(folder / "lines")],
        cwd=tree, env=environment, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        follower.until(lambda: follower.serves(1))
        for number in range(1, RELOADS + 1):
            (tree / "version.py").write_text(f"NUMBER = {number}\n", encoding="utf-8")
            follower.until(functools.partial(follower.has_taken_over, number + 1))
        status = subprocess.run(
            [SUPERVISOR, "status", "--json", runtime], check=True, capture_output=True, text=True
        )
        with urllib.request.urlopen(f"http://{json.loads(status.stdout)['listen']}/metrics") as answer:
            told = re.search(
                r"^wa_supervisor_downtime_seconds_total (\S+)$", answer.read().decode(), re.MULTILINE
            )
        process.terminate()
    follower.join()
    assert told is not None
    assert sorted(follower.lives) == list(range(1, RELOADS + 2)), "one save is one generation"
    return Case(handover, kind, [follower.lives[n] for n in sorted(follower.lives)], float(told.group(1)))


def spread(values: Sequence[float]) -> str:
    """Return median, 95th percentile and maximum as cells of a table."""
    p95 = statistics.quantiles(values, n=20, method="inclusive")[-1]
    return f"{statistics.median(values):.1f} | {p95:.1f} | {max(values):.1f}"


def gaps(case: Case) -> list[float]:
    """Return the longest time without a line around each handover, in milliseconds."""
    if case.handover == "replace":
        return case.between(lambda old, _: old.lines[-1], lambda _, new: new.lines[0])
    found = []
    for old, new in case.pairs:
        begin = new.lines[0] - 500_000_000  # The imports of the new one take their time from the old one.
        lines = sorted(
            at for at in (*old.lines, *new.lines) if begin <= at <= new.marks.get("asked", new.lines[-1])
        )
        found.append(max(b - a for a, b in itertools.pairwise(lines)) / 1e6)
    return found


def end_of_python(last_words: str) -> float:
    """Return the milliseconds from a program's last statement until its process is gone, median."""
    code = "import os, gc, time, psycopg, prometheus_client\n" + last_words
    taken = []
    for _ in range(ENDS):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            descriptor = os.pidfd_open(process.pid)
            select.select([descriptor], [], [])
            gone = time.monotonic_ns()
            os.close(descriptor)
            assert process.stdout is not None
            taken.append((gone - int(process.stdout.read())) / 1e6)
    return statistics.median(taken)


def report(cases: Sequence[Case]) -> str:
    say = "os.write(1, b'%d' % time.monotonic_ns())"
    machine = (
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end."
    )
    rows = [
        f"# Handover, {RELOADS} reloads each",
        "",
        f"{machine} All times in milliseconds.",
        "",
        "| handover | application | time without a line: median | p95 | max | sum | told by us |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        found = gaps(case)
        total = f"{sum(found):.0f}" if case.handover == "replace" else "-"
        row = (
            f"| {case.handover} | {case.kind} | {spread(found)} | {total} | {1000 * case.told_seconds:.0f} |"
        )
        rows.append(row)
    together = min(cases[0].between(lambda _, new: new.lines[0], lambda old, _: old.lines[-1]))
    assert together > 0, "there was a moment without a live child"
    rows += [
        "",
        f"In `overlap` both children wrote for at least {together:.0f} ms before the old one ended.",
        "",
        "## Where the time of `replace` goes",
        "",
        "| from | to | callable: median | p95 | max | script: median | p95 | max |",
        "|---|---|---|---|---|---|---|---|",
    ]
    steps: list[tuple[str, str, Callable[[Life, Life], int], Callable[[Life, Life], int]]] = [
        ("last line", "asked to stop", lambda o, _: o.lines[-1], lambda o, _: o.marks["asked"]),
        ("asked to stop", "its main ended", lambda o, _: o.marks["asked"], lambda o, _: o.marks["ended"]),
        ("its main ended", "process gone", lambda o, _: o.marks["ended"], lambda o, _: o.marks["gone"]),
        (
            "process gone",
            "new one begins",
            lambda o, _: o.marks["gone"],
            lambda _, n: n.marks.get("begun", n.marks["main"]),
        ),
        (
            "new one begins",
            "its first line",
            lambda _, n: n.marks.get("begun", n.marks["main"]),
            lambda _, n: n.lines[0],
        ),
    ]
    replaced = [case for case in cases if case.handover == "replace"]
    for start, stop, first, then in steps:
        rows.append(f"| {start} | {stop} | {' | '.join(spread(c.between(first, then)) for c in replaced)} |")
    plain, frozen, cut = (end_of_python(f"{before}\n{say}\n{after}") for before, after in ENDINGS)
    rows += [
        "",
        "## What the end of an interpreter takes",
        "",
        "Of a plain Python, without us, that has imported both packages; from its last statement until it is",
        f"gone: {plain:.1f}. With `gc.freeze()` before that {frozen:.1f}, with `os._exit` {cut:.1f};",
        f"medians of {ENDS}. We do neither: both leave out what plain Python does at its end. Files that",
        "nobody closed are finished by that, and so are suspended generators.",
        "",
    ]
    return "\n".join(rows)


def main() -> None:
    cases = []
    for handover, kind in CASES:
        with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
            cases.append(measure(Path(folder), handover, kind))
    text = report(cases)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
