"""What the proof of running code costs, and whether it raises false alarms.

**A child at work**: a supervised script with a tree of 300 modules, 5,000 functions of every ordinary
shape, and 600,000 objects that the garbage collector tracks. Its main thread never rests: it calls
functions of the tree and notes every step that took longer than it should, which is what an attestation
costs the application. Processor time is that of the thread that answers, read from its own clock
(``pthread_getcpuclockid``), so the work of the main thread is not in it.

**A tree of 5,000 files**: the scans in this process, then ``verify`` of a supervisor, with the time that
its main loop hears nobody: the longest wait of a second client that asks for the status over and over. From
cold means that the kernel was asked to drop the files from its page cache; what it read again is in the
table, names and inodes stay cached.

Prints a Markdown table and writes it to ``benchmarks/results/proof.md``; what misses its target is marked
so. Run it on a machine at rest, and not within six minutes after thousands of files were deleted (by an
earlier run, for example): ext4 without a journal passes over inodes that were freed just now, which makes a
new file ten times as expensive (``recently_deleted`` in fs/ext4/ialloc.c).
"""

from __future__ import annotations

import contextlib
import os
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from supervisor import control, manifest
from supervisor.blobs import BlobStore
from supervisor.manifest import Tree

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
RESULT = Path(__file__).parent / "results" / "proof.md"
MODULES = 300
OBJECTS = 600_000
VERIFICATIONS = 100
FILES = 5_000
EDITS = 50

ATTESTATION_SECONDS = 0.150
STALL_SECONDS = 0.015
MANIFEST_SECONDS = 1.0
HASHING_SECONDS = 0.005

PAUSE_SECONDS = 0.3
NOTICED_SECONDS = 0.0005

MODULE = '''\
"""Module @N@ of a tree that exists to be measured."""

import contextlib
import dataclasses
import functools
import types
import typing

LIMIT, NAMES = @N@, ("first@N@", "second@N@", b"third", 4.5, frozenset({"a", "b"}))


def traced(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        return result if result is not None else LIMIT

    return wrapper


def counter(start):
    count = start

    def following(step=1):
        nonlocal count
        count += step
        return count

    return following


def total(values, *, above=0):
    result = 0
    for value in values:
        if value > above:
            result += value * LIMIT
        elif value == above:
            result -= 1
    return {"total": result, "names": [name for name in NAMES if name]}


@traced
def decorated(a, b=2):
    try:
        return a / b
    except ZeroDivisionError as error:
        raise ValueError(f"no share of {a} among {b} in @N@") from error


@functools.lru_cache(maxsize=8)
def remembered(number):
    return tuple(range(number % 7))


@contextlib.contextmanager
def managed(name):
    yield f"{name}-@N@"


def generated(limit):
    for number in range(limit):
        yield number, LIMIT


async def awaited(number):
    return number + LIMIT


@types.coroutine
def old_style():
    yield LIMIT


@dataclasses.dataclass(frozen=True)
class Row:
    name: str = "@N@"
    size: int = @N@

    @property
    def label(self):
        return f"{self.name}: {self.size}"

    def larger(self, by):
        return dataclasses.replace(self, size=self.size + by)

    @staticmethod
    def empty():
        return Row("", 0)

    @classmethod
    def named(cls, name):
        return cls(name, len(name))


class Pair(typing.NamedTuple):
    left: int = @N@
    right: int = 1

    def sum(self):
        return self.left + self.right


following = counter(LIMIT)
twice = functools.partial(total, above=@N@)
key = lambda row: (row.size, row.name)


def step():
    row = Row.named(NAMES[0]).larger(following())
    with managed(row.label):
        pairs = list(generated(2)), Pair().sum()
        return total((1, 2, LIMIT)), decorated(LIMIT), twice([LIMIT + 1]), key(row), pairs
'''

LARGE_MODULE = MODULE * 2
"""Of 4.5 kB."""

MAIN = """\
import array, asyncio, dataclasses, gc, importlib, os, signal, sys, threading, time
import prometheus_client, psycopg

@dataclasses.dataclass
class Kept:
    number: int
    rest: list

modules = [importlib.import_module(f"pack.part{number:03}") for number in range(int(sys.argv[2]))]
gc.collect()
missing = int(sys.argv[3]) - len(gc.get_objects())
kept = [Kept(number, [number]) for number in range(missing // 2)]
gc.collect()
steps = prometheus_client.Counter("steps", "Rounds of the main thread.")
going = True

def stop(*_):
    global going
    going = False

def work(record):
    answering = next(one for one in sys._current_frames() if one != threading.get_ident())
    clock = time.pthread_getcpuclockid(answering)
    last = noted = time.monotonic()
    while going:
        for module in modules:
            module.step()
            now = time.monotonic()
            if now - last > float(sys.argv[4]) or now - noted > 0.005:
                record.extend((now, now - last, time.clock_gettime(clock)))
                noted = now
            last = now
        steps.inc()

record = array.array("d")
signal.signal(signal.SIGTERM, stop)
with open(sys.argv[1] + ".objects", "w") as file:
    file.write(str(len(gc.get_objects())))
work(record)
with open(sys.argv[1], "wb") as file:
    record.tofile(file)
"""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        fact: what was measured.
        value: what came out, with its unit.
        target: in words, empty where there is none.
        met: whether it was met.
    """

    fact: str
    value: str
    target: str = ""
    met: bool = True

    @classmethod
    def one(cls, fact: str, seconds: float, limit_seconds: float | None = None) -> Row:
        """Return the line of a single time."""
        target = "" if limit_seconds is None else f"≤ {limit_seconds * 1e3:g} ms"
        return cls(fact, f"{seconds * 1e3:.0f} ms", target, limit_seconds is None or seconds <= limit_seconds)

    @classmethod
    def many(cls, fact: str, seconds: list[float], limit_seconds: float | None = None) -> Row:
        """Return the line of many times; the target is one for the 99th percentile."""
        median, high, most = statistics.median(seconds), percentile(seconds), max(seconds)
        value = f"median {median * 1e3:.1f} ms, p99 {high * 1e3:.1f} ms, longest {most * 1e3:.1f} ms"
        target = "" if limit_seconds is None else f"p99 ≤ {limit_seconds * 1e3:g} ms"
        return cls(fact, value, target, limit_seconds is None or high <= limit_seconds)

    def __str__(self) -> str:
        verdict = ("met" if self.met else "**MISSED**") if self.target else ""
        return f"| {self.fact} | {self.value} | {self.target} | {verdict} |"


def main() -> None:
    """Measure everything and print the table."""
    load, _, _ = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        large = large_tree(Path(folder) / "large")  # First: nothing has been deleted yet.
        rows = [*child_at_work(Path(folder) / "work"), *large]
    machine = f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, Linux {os.uname().release}"
    head = [
        "# Proof of running code",
        "",
        f"{machine}, load average {load:.1f} before it began.",
        "Written by `.venv/bin/python benchmarks/proof.py`.",
        "",
        "| measured | result | target | |",
        "|---|---|---|---|",
    ]
    text = "\n".join([*head, *map(str, rows), ""])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


# --- a child at work --------------------------------------------------------------------------------------


def child_at_work(folder: Path) -> list[Row]:
    """Ask a working child for its proof again and again."""
    tree, record = folder / "tree", folder / "record"
    (tree / "pack").mkdir(parents=True)
    (tree / "pack" / "__init__.py").touch()
    for number in range(MODULES):
        (tree / "pack" / f"part{number:03}.py").write_text(
            MODULE.replace("@N@", str(number)), encoding="utf-8"
        )
    (tree / "main.py").write_text(MAIN, encoding="utf-8")
    windows, pauses, answers = [], [], []
    with supervised(
        folder, tree, "main.py", str(record), str(MODULES), str(OBJECTS), str(NOTICED_SECONDS)
    ) as ask:
        wait_until(record.with_suffix(".objects").exists)
        wait_until(lambda: ask("status")["status"]["in_sync"])
        for _ in range(VERIFICATIONS):
            rested, began = time.monotonic(), time.monotonic() + PAUSE_SECONDS
            time.sleep(PAUSE_SECONDS)
            answers.append(ask("verify"))
            windows.append((began, time.monotonic()))
            pauses.append((rested, began))
        time.sleep(PAUSE_SECONDS)  # For the last note of the main thread.
    verified = [answer["verify"] for answer in answers]
    alarms = sum(not one["in_sync"] or bool(one["functions"]["foreign"]) for one in verified)
    checked = min(one["functions"]["checked"] for one in verified)
    objects = int(record.with_suffix(".objects").read_text(encoding="ascii"))
    samples = list(struct.iter_unpack("ddd", record.read_bytes()))
    started = max(cpu for at, _, cpu in samples if at < windows[0][0])
    every = [gap for window in windows for gap in steps(samples, *window) if gap > NOTICED_SECONDS]
    inside = (
        f"`verify` {VERIFICATIONS} times in a row, main thread busy: {MODULES} modules, "
        f"{checked:,} functions compared, {objects:,} objects alive"
    )
    return [
        Row(inside, f"{alarms} false alarms", "0", alarms == 0),
        Row.many("latency of `verify`", [end - began for began, end in windows]),
        Row.many(
            "processor time of an attestation, in the child",
            [spent(samples, *window) for window in windows],
            ATTESTATION_SECONDS,
        ),
        Row.one("the same, all attestations of a start together, every function printed", started),
        Row.many(
            f"stalls of the main thread over {NOTICED_SECONDS * 1e3} ms during verifications, "
            f"{len(every) / len(windows):.0f} in each",
            every,
            STALL_SECONDS,
        ),
        Row.many(
            "the longest stall of each verification",
            [max(steps(samples, *window)) for window in windows],
            STALL_SECONDS,
        ),
        Row.many(
            f"the longest stall in each {PAUSE_SECONDS} s without one",
            [max(steps(samples, *pause)) for pause in pauses],
        ),
    ]


def spent(samples: list[tuple[float, float, float]], began: float, ended: float) -> float:
    """Return the processor time that the answering thread used between two moments, in seconds."""
    before = max(cpu for at, _, cpu in samples if at <= began)
    return min(cpu for at, _, cpu in samples if at >= ended) - before


def steps(samples: list[tuple[float, float, float]], began: float, ended: float) -> list[float]:
    """Return the steps of the main thread that were noted in a window, in seconds."""
    return [gap for at, gap, _ in samples if began <= at <= ended]


# --- a large tree -----------------------------------------------------------------------------------------


def large_tree(folder: Path) -> list[Row]:
    """Scan a tree of many files in this process, then have a supervisor verify it."""
    tree = folder / "tree"
    for number in range(FILES):
        path = tree / f"pack{number // 50:03}" / f"part{number:04}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(LARGE_MODULE.replace("@N@", str(number)), encoding="utf-8")
    (tree / "main.py").write_text("import signal\nsignal.pause()\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in tree.rglob("*.py"))
    return [*scans(folder, tree, size), *blocked_loop(folder, tree)]


def scans(folder: Path, tree: Path, size: int) -> list[Row]:
    """Measure the manifest: from nothing, again, and after one edit."""
    roots = Tree((str(tree),))
    out_of_cache(tree)
    before = storage_reads()
    hashing, _ = timed(lambda: manifest.scan(roots, None, lambda content: sha256(content).hexdigest()))
    fetched = storage_reads() - before
    out_of_cache(tree)
    cold, _ = timed(lambda: manifest.scan(roots, None, BlobStore(folder / "cold").put))
    store = BlobStore(folder / "warm")
    warm, _ = timed(lambda: manifest.scan(roots, None, store.put))
    whole, snapshot = timed(lambda: manifest.scan(roots, None, store.put))
    unchanged = [timed(lambda: manifest.scan(roots, snapshot, store.put))[0] for _ in range(EDITS)]
    hashed: list[float] = []
    after_edit: list[float] = []

    def put(content: bytes) -> str:
        seconds, digest = timed(lambda: store.put(content))
        hashed.append(seconds)
        return digest

    for number in range(EDITS):
        text = f"X = {number}\n" + LARGE_MODULE.replace("@N@", "7")
        (tree / "pack000" / "part0007.py").write_text(text, encoding="utf-8")
        seconds, snapshot = timed(lambda last: manifest.scan(roots, last, put), snapshot)
        after_edit.append(seconds)
    what = f"{FILES:,} files, {size / 1e6:.0f} MB"
    return [
        Row.one(
            f"manifest of {what}, from cold ({fetched / 1e6:.0f} MB read from storage)",
            hashing,
            MANIFEST_SECONDS,
        ),
        Row.one("the same, every file kept as a new blob", cold, MANIFEST_SECONDS),
        Row.one("the same with the files in the page cache", warm),
        Row.one("the same with the blobs kept already: the disk side of each `verify`", whole),
        Row.many("scan of an unchanged tree", unchanged),
        Row.many("hashing and keeping after one edit", hashed, HASHING_SECONDS),
        Row.many("the whole scan after one edit", after_edit),
    ]


def blocked_loop(folder: Path, tree: Path) -> list[Row]:
    """Measure how long the supervisor's loop hears nobody while it verifies a large tree."""
    with supervised(folder, tree, "main.py") as ask:
        wait_until(lambda: ask("status")["status"]["in_sync"])
        quiet = waits(ask, lambda: time.sleep(2.5))  # One periodic scan is in it.
        latencies: list[float] = []
        busy = waits(ask, lambda: latencies.extend(timed(lambda: ask("verify"))[0] for _ in range(10)))
    return [
        Row.many(f"latency of `verify`, {FILES:,} files", latencies),
        Row.one("longest block of the supervisor's loop during these", max(busy)),
        Row.one("longest block of the loop without them, a periodic scan included", max(quiet)),
    ]


def waits(ask: Callable[[str], Any], during: Callable[[], object]) -> list[float]:
    """Return how long the loop took to answer a second client while something else went on, in seconds."""
    answered: list[float] = []
    ended = threading.Event()

    def follow() -> None:
        while not ended.is_set():
            answered.append(timed(lambda: ask("status"))[0])
            ended.wait(0.002)

    thread = threading.Thread(target=follow)
    thread.start()
    during()
    ended.set()
    thread.join()
    return answered


def out_of_cache(tree: Path) -> None:
    """Have the kernel drop the contents of the files from its page cache; names and inodes stay there."""
    for path in tree.rglob("*.py"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def storage_reads() -> int:
    """Return the bytes that this process has fetched from storage so far."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


# --- common -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def supervised(folder: Path, tree: Path, *target: str) -> Iterator[Callable[[str], Any]]:
    """Run a supervisor; yields a function that asks it a command."""
    runtime = folder / "run"
    # No verification but ours; the rest as it comes.
    options = [f"--runtime-dir={runtime}", f"--state-dir={folder / 'state'}", "--listen=127.0.0.1:0"]
    command = [SUPERVISOR, "run", *options, "--verify-interval=100000", *target]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until((runtime / "control.sock").exists)
        try:
            yield lambda name: control.request(runtime, name)
        finally:
            process.terminate()


def wait_until(holds: Callable[[], object], timeout_seconds: float = 60.0) -> None:
    """Wait for something, by asking; raises TimeoutError."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def timed(call: Callable[..., Any], *arguments: object) -> tuple[float, Any]:
    """Return the seconds that a call took, and its result."""
    began = time.monotonic()
    result = call(*arguments)
    return time.monotonic() - began, result


def percentile(values: list[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(values, n=100, method="inclusive")[-1]


if __name__ == "__main__":
    main()
