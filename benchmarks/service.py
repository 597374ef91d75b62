"""Service: one contender at work in a folder, seen from outside: what its program writes and costs.

The rule: times are those that the program itself wrote into its lines, from the clock of the saves, so
how often anybody looks at the file does not matter. Nothing is asked of a contender while it is timed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from contenders import OURS, Contender, Place

APPLICATION = Path(__file__).parent / "application"
FILES_IN_A_FOLDER = 50
START_SECONDS = 120.0
LOOK_SECONDS = 0.01
ZYGOTE_SECONDS = 20.0
HIDES = (
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONUNBUFFERED",
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "DJANGO_SETTINGS_MODULE",
)


class NotStartedError(Exception):
    """A contender does not serve; the text says what it said."""


@dataclass(frozen=True)
class Line:
    """What the program wrote at one moment.

    Attributes:
        at_ns: of the monotonic clock.
        digits: one for each part of the program; None where a process noted its start.
    """

    at_ns: int
    pid: int
    number: int
    digits: str | None


def make_tree(tree: Path, files: int, parts: int = 10) -> None:
    """Copy the program, and write modules beside it until there are so many ``files``."""
    shutil.copytree(APPLICATION, tree, ignore=shutil.ignore_patterns("__pycache__"))
    for number in range(parts):
        write_part(tree, number, 0)
    for number in range(files - sum(1 for _ in tree.rglob("*.py"))):
        path = tree / f"package_{number // FILES_IN_A_FOLDER}" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        lines = [f"def function_{line}(value):\n    return value + {number}\n\n\n" for line in range(13)]
        path.write_text("".join(lines), encoding="utf-8")


def part(tree: Path, number: int) -> Path:
    """Return the file of a module that the program imports and shows."""
    return tree / "parts" / f"part_{number:03}.py"


def write_part(tree: Path, number: int, digit: int) -> None:
    """Write a module of the program; all versions of it are of one size."""
    part(tree, number).write_text(f"def value() -> int:\n    return {digit}\n", encoding="utf-8")


class Service:
    """One contender at work.

    Args:
        contender: who.
        tree: the code, made by :func:`make_tree`.
        state: what is kept between runs.
        idle: the program writes one line and sleeps.
    """

    def __init__(self, contender: Contender, tree: Path, state: Path, *, idle: bool = False) -> None:
        scratch = Path(tempfile.mkdtemp(prefix="wb-", dir=tree.parent))
        self.contender = contender
        self.place = Place(tree, state, scratch)
        self.lines: list[Line] = []
        self.readies_ns: list[int] = []
        self.started_ns = 0
        self._idle = idle
        self._file = scratch / "lines"
        self._offset = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._follow_up: subprocess.Popen[bytes] | None = None
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(scratch / "n"))

    # --- start and end

    def start(self) -> None:
        """Start it and wait until its program serves.

        Raises:
            NotStartedError: it does not.
        """
        environment = self._environment()
        if self.readies:
            threading.Thread(target=self._receive, daemon=True).start()
        if self.contender.prepare is not None:
            self.contender.prepare(self.place)
        output = (self.place.scratch / "output").open("wb")
        command = self.contender.command(self.place)
        self.started_ns = time.monotonic_ns()
        try:
            with output:
                self._process = subprocess.Popen(
                    command, cwd=self.place.tree, env=environment, start_new_session=True,
                    stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                )  # fmt: skip
        except OSError as error:
            raise NotStartedError(f"cannot be started: {error}") from error
        serving = self.until(lambda: bool(self.shown()), START_SECONDS, alive=True)
        if not serving or (self.readies and not self.until(lambda: bool(self.readies_ns), START_SECONDS)):
            raise NotStartedError(f"does not serve: {self._last_words()}")

    def _environment(self) -> dict[str, str]:
        """Return what it is started with; what hides stale bytecode or shadows its packages is left out."""
        kept = {name: value for name, value in os.environ.items() if name not in HIDES}
        kept["BENCH_LINES"] = str(self._file)
        if self._idle:
            kept["BENCH_PAUSE_SECONDS"] = "3600"
        if self.readies:
            kept["NOTIFY_SOCKET"] = str(self.place.scratch / "n")
        else:
            kept.pop("PYTHONPATH", None)
        return kept

    @property
    def readies(self) -> bool:
        """It tells when new code is live."""
        return self.contender.family == "ours"

    def stop(self) -> None:
        """End it with all that it started."""
        assert self._process is not None
        everybody = self.processes()
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
        _, left = psutil.wait_procs(everybody, timeout=5)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait(10)
        self._finish_follow_up()
        self._notify.sendto(b"", str(self.place.scratch / "n"))

    def _last_words(self) -> str:
        text = (self.place.scratch / "output").read_text(encoding="utf-8", errors="replace")
        return " / ".join(text.strip().splitlines()[-2:]) or "it said nothing"

    # --- what it writes

    def _receive(self) -> None:
        with self._notify:
            while message := self._notify.recv(4096):
                if b"READY=1" in message.splitlines():
                    self.readies_ns.append(time.monotonic_ns())

    def read(self) -> None:
        """Read what has been written since."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for words in map(str.split, whole.decode("ascii").splitlines()):
            at, pid, what, *digits = words
            self.lines.append(
                Line(int(at), int(pid), -1, None)
                if what == "start"
                else Line(int(at), int(pid), int(what), digits[0])
            )

    def until(self, true: Callable[[], bool], seconds: float, *, alive: bool = False) -> bool:
        """Return whether it came true within ``seconds``; not, if it has to be alive and is not."""
        deadline = time.monotonic() + seconds
        while True:
            self.read()
            if true():
                return True
            ended = alive and self._process is not None and self._process.poll() is not None
            if time.monotonic() > deadline or ended:
                return False
            time.sleep(LOOK_SECONDS)

    def shown(self, since_ns: int = 0) -> list[Line]:
        """Return the lines of service since a moment, without starts."""
        late = itertools.takewhile(lambda line: line.at_ns >= since_ns, reversed(self.lines))
        return [line for line in late if line.digits is not None][::-1]

    def starts(self, since_ns: int) -> list[Line]:
        """Return the starts of processes since a moment."""
        return [line for line in self.lines if line.digits is None and line.at_ns >= since_ns]

    def first(self, number: int, since_ns: int) -> Line | None:
        """Return the first line of a version, if there is one."""
        return next((line for line in self.shown(since_ns) if line.number == number), None)

    def gap_ms(self, since_ns: int) -> float:
        """Return the longest time between two lines since the last one before a moment, in milliseconds."""
        stamps = sorted(line.at_ns for line in self.lines if line.digits is not None)
        after = [stamp for stamp in stamps if stamp >= since_ns]
        before = [stamp for stamp in stamps[-len(after) - 1 :] if stamp < since_ns]
        return max((b - a for a, b in itertools.pairwise([*before, *after])), default=0) / 1e6

    # --- what is done to it

    def write(self, text: str) -> int:
        """Save another text as the module with the version; return when, in nanoseconds."""
        self._finish_follow_up()
        now = time.monotonic_ns()
        (self.place.tree / "version.py").write_text(text, encoding="utf-8")
        self.saved()
        return now

    def _finish_follow_up(self) -> None:
        """Wait until what followed the last save has ended; that is no time of the next one."""
        if self._follow_up is not None:
            self._follow_up.wait(30)

    def save(self, number: int) -> int:
        """Save a version, of another size than the one before; return when, in nanoseconds."""
        return self.write(f"def number() -> int:\n    return {number}\n{'#' * (number % 60)}\n")

    def saved(self) -> None:
        """Do what has to follow a save."""
        if self.contender.after_save is None:
            return
        self._finish_follow_up()
        self._follow_up = subprocess.Popen(
            self.contender.after_save(self.place), cwd=self.place.tree, env=self._environment(),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    # --- what it costs

    def processes(self) -> list[psutil.Process]:
        """Return all its processes."""
        assert self._process is not None
        try:
            leader = psutil.Process(self._process.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def status(self) -> dict[str, object]:
        """Ask our supervisor how it is."""
        return status(self.place.scratch)

    def wait_for_zygote(self) -> str:
        """Wait until our zygote is ready; return its state."""
        deadline = time.monotonic() + ZYGOTE_SECONDS
        while True:
            told = self.status().get("zygote")
            state = str(told.get("state")) if isinstance(told, dict) else "none"
            if state != "building" or time.monotonic() > deadline:
                return state
            time.sleep(0.2)


def status(runtime: Path) -> dict[str, object]:
    """Ask the supervisor of a runtime directory how it is; empty if it does not say."""
    answer = subprocess.run(
        [OURS / "wa-supervisor", "status", "--json", f"--runtime-dir={runtime}"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(answer.stdout)) if answer.stdout else {}


def cpu_ns(processes: Sequence[psutil.Process]) -> int:
    """Return the processor time of processes in nanoseconds, all threads, as the scheduler counts it."""
    total = 0
    for process in processes:
        for task in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(task.read_text(encoding="ascii").split()[0])
    return total


def memory_mib(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    """Return resident and proportional memory of processes in MiB."""
    facts = [process.memory_full_info() for process in processes]
    return sum(f.rss for f in facts) / 2**20, sum(f.pss for f in facts) / 2**20


@contextlib.contextmanager
def serving(contender: Contender, tree: Path, state: Path, *, idle: bool = False) -> Iterator[Service]:
    """Run a contender as long as the block lasts, and let it warm up: our zygote has to be ready.

    Raises:
        NotStartedError: it does not serve.
    """
    service = Service(contender, tree, state, idle=idle)
    try:
        service.start()
        if contender.zygote:
            service.wait_for_zygote()
        yield service
    finally:
        if service._process is not None:  # noqa: SLF001 -- of the same module
            service.stop()


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """End a process as Ctrl-C would."""
    process.send_signal(signal.SIGINT)
    process.wait(60)
