"""A real supervisor over a real tree, and ways to wait for what it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import control

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
DEADLINE_SECONDS = 15.0

SOAK = os.environ.get("WA_SOAK") == "1"
"""Whether everything is run that takes minutes (`make soak`), and not only a sample of it."""

NO_ZYGOTE = os.environ.get("WA_TEST_NO_ZYGOTE") == "1"
"""Whether every child is started by itself: both ways have to pass the same tests."""

SCRIPT = """\
import os, signal, sys, time
sys.path.insert(0, "modules")
import answer

def stop(*_):
    print("finished", answer.VALUE, flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, stop)
print("serving", answer.VALUE, flush=True)
while True:
    time.sleep(60)
"""


class Output:
    """The merged output of a process, line by line, and a way to wait for a line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.lines: list[str] = []
        self._taken: set[int] = set()
        self._news = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def expect(self, pattern: str) -> re.Match[str]:
        """Wait for a line that contains ``pattern`` and was not expected before, and return the match."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        with self._news:
            while True:
                for number, line in enumerate(self.lines):
                    if number not in self._taken and (found := re.search(pattern, line)):
                        self._taken.add(number)
                        return found
                seen = len(self.lines)
                left = deadline - time.monotonic()
                waited = not self._ended and left > 0 and self._news.wait(left)
                if not waited and seen == len(self.lines):
                    pytest.fail(f"no line with {pattern!r} in:\n" + "\n".join(self.lines))

    def join(self) -> str:
        """Return everything, once the process has closed its output."""
        self._thread.join(DEADLINE_SECONDS)
        assert self._ended, "the output is still open"
        return "\n".join(self.lines)

    def _follow(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                with self._news:
                    self.lines.append(line.rstrip("\n"))
                    self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


def let_others_in(folder: Path) -> None:
    """Make a folder of a test one that other users can read."""
    for each in (folder, *folder.parents):
        if each != Path("/") and each.stat().st_uid == os.geteuid() and each != Path("/tmp"):
            each.chmod(each.stat().st_mode | 0o055)


NAMESPACE = ("unshare", "--user", "--map-root-user")
"""Put before a command, it runs with limits of its own below ``/proc/sys/user``."""


def _why_no_namespaces() -> str:
    try:
        tried = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    return tried.stderr.strip()


needs_namespaces = pytest.mark.skipif(bool(why := _why_no_namespaces()), reason=f"no user namespaces: {why}")


class Supervised:
    """A running ``wa-supervisor run`` and its runtime directory."""

    def __init__(
        self,
        folder: Path,
        arguments: list[str],
        cwd: Path,
        environment: Mapping[str, str],
        prefix: Sequence[str] = (),
    ) -> None:
        self.runtime = folder / "run"
        self.process = subprocess.Popen(
            [
                *prefix,
                SUPERVISOR,
                "run",
                f"--runtime-dir={self.runtime}",
                f"--state-dir={folder / 'state'}",
                "--listen=127.0.0.1:0",
                *(["--no-zygote"] if NO_ZYGOTE else []),
                *arguments,
            ],
            cwd=cwd,
            env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | dict(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.output = Output(self.process)
        self.expect = self.output.expect

    def status(self) -> dict[str, Any]:
        """Return the status document."""
        document: dict[str, Any] = control.request(self.runtime, "status")["status"]
        return document

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command against this supervisor."""
        return subprocess.run(
            [SUPERVISOR, *words, f"--runtime-dir={self.runtime}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=DEADLINE_SECONDS,
        )

    def reload(self) -> dict[str, Any]:
        """Ask for a reload and return its record."""
        record: dict[str, Any] = json.loads(self.command("reload", "--json").stdout)
        return record

    def live(self) -> psutil.Process:
        """Return the live child."""
        return psutil.Process(self.status()["live"]["pid"])

    def end(self) -> None:
        """Stop it, by force if it must be."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(DEADLINE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.output.join()


def is_gone(process: psutil.Process) -> bool:
    """Whether a process has ended; one that nobody has reaped yet has."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def generations(process: psutil.Process) -> list[psutil.Process]:
    """Return the children of a supervisor that are neither compile helpers nor the zygote."""
    found = []
    for child in process.children():
        with contextlib.suppress(psutil.Error):
            helps = any(word.endswith("compiler.py") for word in child.cmdline())
            is_zygote = child.environ().get("WA_TREE", "").startswith("-")
            if not helps and not is_zygote:
                found.append(child)
    return found


def until(true: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """Wait for something that tells nobody when it happens."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"it did not happen within {seconds:g} s"
        time.sleep(0.005)


def history(started: Supervised) -> list[dict[str, Any]]:
    """Return the records of ``history --json``, the newest first."""
    records: list[dict[str, Any]] = json.loads(started.command("history", "--json").stdout)
    return records
