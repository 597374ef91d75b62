"""A machine with a real systemd, and ways to use it as an operator would.

It is booted in namespaces on an overlay of this host's files (`boot`), so nothing of the host is changed.
What the machine has written outlives its power-off and is there at the next boot.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from supervisor import control
from supervisor.errors import NoSupervisorError

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BIN = "/opt/wa-monitor/.venv/bin"
UNIT = "wa-monitor.service"
DEADLINE_SECONDS = 60.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_POLL_SECONDS = 0.05
_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--net", "--cgroup")
_ENTER = ("--mount", "--pid", "--uts", "--ipc", "--cgroup", "--net", "--root", "--wdns=/")


def why_not() -> str | None:
    """Return why no machine can be booted here, None if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a real systemd needs Linux and root to be booted in namespaces"
    tools = ("unshare", "nsenter", "setpriv", "ip", "systemctl", "systemd-analyze", "useradd", "git")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    missing += [path for path in ("/lib/systemd/systemd",) if not Path(path).exists()]
    if missing:
        return f"not here: {', '.join(missing)}; apt-get install systemd util-linux iproute2 passwd git"
    if _cgroups() is None:
        return "no cgroup2 file system is mounted that could be written to"
    tried = subprocess.run(
        [*_NAMESPACES, "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else None


def _cgroups() -> Path | None:
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    return None


class Machine:
    """One machine; made with its disk, not booted.

    Args:
        disk: an empty folder.
    """

    def __init__(self, disk: Path) -> None:
        self._disk = disk
        self._holder = _start("hold", str(disk))
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", self._holder.stdout.read()
        self._booted: subprocess.Popen[str] | None = None
        self._pid = 0
        self._boots = 0
        self._log = disk.with_name("console.log")

    @property
    def disk(self) -> Path:
        """What the machine has written, as seen from here; it may be changed while the machine is off."""
        return Path(f"/proc/{self._holder.pid}/root{self._disk}/up")

    def place(self, path: str) -> Path:
        """Return where a file of the machine is as seen from here, while it is on."""
        return Path(f"/proc/{self._pid}/root{path}")

    # --- power --------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Switch it on and wait until everything that is to start at boot was started."""
        self._boots += 1
        cgroups = _cgroups()
        assert cgroups is not None
        self._cgroup = cgroups / f"machine-{os.getpid()}-{self._boots}"
        self._cgroup.mkdir()
        inherited = Path(sysconfig.get_paths()["purelib"])
        with self._log.open("ab") as log:
            self._booted = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig=KILL", "nsenter", f"--target={self._holder.pid}", "--mount"),
                    *("bash", str(HERE / "boot"), "up", str(self._disk), str(self._cgroup)),
                    *(str(REPOSITORY), sys.base_prefix, str(inherited)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
            )
        self.until(lambda: bool(self._find_init()), "systemd is not started")
        self._pid = self._find_init()
        self.until(self._is_up, "no boot")

    def _is_up(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False) in {"running", "degraded"}

    def _find_init(self) -> int:
        """Return the pid of systemd as this host sees it, 0 before it is there."""
        assert self._booted is not None
        if self._booted.poll() is not None:
            raise AssertionError(f"no boot:\n{self._log.read_text(encoding='utf-8', errors='replace')}")
        with contextlib.suppress(OSError):
            pids = [int(pid) for pid in (self._cgroup / "init.scope/cgroup.procs").read_text().split()]
            return next((pid for pid in pids if _name(pid) == "systemd"), 0)
        return 0

    def power_off(self) -> None:
        """Have it shut down in order."""
        self.run("systemctl", "poweroff", check=False)
        self._gone()

    def pull_the_plug(self) -> None:
        """Let everything in it end at once."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
        elif self._booted is not None:
            self._booted.kill()
        self._gone()

    def _gone(self) -> None:
        assert self._booted is not None
        self._booted.wait(DEADLINE_SECONDS)
        self._booted, self._pid = None, 0
        for folder in [*sorted(self._cgroup.rglob("*/"), reverse=True), self._cgroup]:
            self.until(lambda folder=folder: _removed(folder), f"{folder} stays")  # type: ignore[misc]

    def close(self) -> None:
        """Let go of it and of its disk."""
        if self._booted is not None:
            self.pull_the_plug()
        self._holder.kill()
        self._holder.communicate()

    # --- work ---------------------------------------------------------------------------------------------

    def call(
        self, *command: str, user: str = "root", stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        return subprocess.run(
            self._inside(user, command),
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            check=False,
        )

    def open(self, *command: str, user: str = "root") -> subprocess.Popen[str]:
        """Start a command inside and talk to it; it ends with its input."""
        words = self._inside(user, command)
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def _inside(self, user: str, command: Sequence[str]) -> list[str]:
        home = "/root" if user == "root" else f"/home/{user}"
        become = () if user == "root" else ("setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups")
        return [
            *("nsenter", f"--target={self._pid}", *_ENTER),
            *("env", "-i", f"PATH={_PATH}", f"HOME={home}", "LANG=C.UTF-8", *become, *command),
        ]

    def run(self, *command: str, user: str = "root", stdin: str | None = None, check: bool = True) -> str:
        """Run a command inside that must succeed; return what it says, without the last line break."""
        done = self.call(*command, user=user, stdin=stdin)
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def write(self, path: str, text: str, user: str = "root") -> None:
        """Write a file inside, with its folder."""
        self.run("mkdir", "-p", str(Path(path).parent), user=user)
        self.run("sh", "-c", f"cat > {path}", user=user, stdin=text)

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait for something that tells nobody when it happens."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not true():
            assert time.monotonic() < deadline, f"{what} within {DEADLINE_SECONDS:g} s"
            time.sleep(_POLL_SECONDS)


def _start(*words: str) -> subprocess.Popen[str]:
    command = ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "--propagation", "private"]
    return subprocess.Popen(
        [*command, "bash", str(HERE / "boot"), *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()


def _removed(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        folder.rmdir()
    return not folder.exists()


class Unit:
    """One unit of a machine, and the journal's lines about it from now on.

    Args:
        machine: that it is installed on.
        name: with its suffix.
        runtime: directory of its supervisor.
        program: `wa-supervisor` of its environment.
    """

    def __init__(
        self,
        machine: Machine,
        name: str = UNIT,
        runtime: str = "/run/wa-monitor",
        program: str = f"{BIN}/wa-supervisor",
    ) -> None:
        self.machine = machine
        self.name = name
        self._runtime = runtime
        self._program = program
        self._seen = 0
        self.dropped_in = ""
        self.forget()

    def forget(self) -> None:
        """Look at no line that was written until now."""
        self._seen = len(self._lines())

    def whole_journal(self) -> None:
        """Look at all lines since the machine was booted."""
        self._seen = 0

    def journal(self) -> str:
        """Return the lines since then, as an operator sees them."""
        return "\n".join(self._lines()[self._seen :])

    def _lines(self) -> list[str]:
        # Not from a cursor on: with --unit, journalctl 252 leaves out the first line after it.
        self.machine.run("journalctl", "--sync")
        words = ("journalctl", "--quiet", "--no-pager", "--output=short-monotonic", f"--unit={self.name}")
        return self.machine.run(*words).splitlines()

    def until(self, word: str) -> str:
        """Wait for a line of the journal that holds a word; return the line."""
        self.machine.until(lambda: word in self.journal(), f"no line with {word!r} in:\n{self.journal()}\n")
        return next(line for line in self.journal().splitlines() if word in line)

    def systemctl(self, verb: str) -> subprocess.CompletedProcess[str]:
        """Have systemd do something with it."""
        return self.machine.call("systemctl", verb, self.name)

    def show(self, prop: str) -> str:
        """Return one property of it."""
        return self.machine.run("systemctl", "show", "--value", f"--property={prop}", self.name)

    def processes(self) -> list[int]:
        """Return the pids of all that belongs to it, as the machine counts them."""
        group = self.show("ControlGroup")
        listed = self.machine.call("sh", "-c", f"cat /sys/fs/cgroup{group}/cgroup.procs")
        return [int(pid) for pid in listed.stdout.split()] if group else []

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command against its supervisor."""
        return self.machine.call(self._program, *words, f"--runtime-dir={self._runtime}")

    def ask(self, command: str) -> dict[str, Any]:
        """Ask its supervisor from here; a command of its own costs a start of Python in the machine.

        Raises:
            NoSupervisorError: none answers.
        """
        answer = control.request(self.machine.place(self._runtime), command, timeout_seconds=10.0)
        assert answer["ok"], answer
        return answer

    def status(self) -> dict[str, Any]:
        """Return the status document."""
        document: dict[str, Any] = self.ask("status")["status"]
        return document

    def is_verified(self) -> bool:
        """Whether the running process proves now that it runs what is on disk."""
        return bool(self.ask("verify")["verify"]["in_sync"])

    def text(self) -> str:
        """Return its file as it is installed."""
        return self.machine.run("cat", f"/etc/systemd/system/{self.name}")

    def until_in_sync(self, than: int = 0) -> dict[str, Any]:
        """Wait until a generation is in sync that is newer than another one; return the status document."""
        seen: list[dict[str, Any]] = []

        def is_in_sync() -> bool:
            try:
                seen.append(self.status())
            except NoSupervisorError:
                return False
            return bool(seen[-1]["in_sync"]) and int(seen[-1]["live"]["generation"]) > than

        self.machine.until(is_in_sync, f"not in sync:\n{self.journal()}\n")
        return seen[-1]

    def send(self, signal_name: str, pid: int | None = None) -> None:
        """Send a signal to its main process, or to another one."""
        self.machine.run("kill", f"-{signal_name}", str(pid or self.show("MainPID")))

    def drop_in(self, text: str) -> None:
        """Change it as an operator would, until the machine is off; takes the place of the last change."""
        self.dropped_in = text
        self.machine.write(f"/run/systemd/system/{self.name}.d/test.conf", text)
        self.machine.run("systemctl", "daemon-reload")


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Machine]:
    """A machine that is on and has the product installed; what it says is printed if it cannot be had."""
    (folder / "disk").mkdir()
    made = Machine(folder / "disk")
    try:
        made.boot()
        interpreter = Path(sys.executable).resolve().parent.relative_to(sys.base_prefix)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        made.run("bash", "/opt/repository/tests/systemd/prepare", version, f"/opt/python/{interpreter}")
        yield made
    finally:
        made.close()
