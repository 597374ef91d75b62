"""The zygote: what is forked from it is what a process of its own would be, and any doubt is a cold start."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.supervisor.harness import (
    DEADLINE_SECONDS,
    NO_ZYGOTE,
    SOAK,
    Supervised,
    generations,
    is_gone,
    until,
)
from tests.supervisor.helpers_gauntlet import program_of

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="a zygote needs a subreaper"),
    pytest.mark.skipif(NO_ZYGOTE, reason="WA_TEST_NO_ZYGOTE=1"),
]

MAIN = """\
import json, os, signal, sys
import library
import answer

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("running", answer.VALUE, library.VALUE, flush=True)
while True:
    signal.pause()
"""

FACTS = """\
import ctypes, gc, json, os, resource, signal, stat, sys, threading
import library, multiprocessing, prometheus_client, psutil, random, uuid
import answer

def lines(path, *names):
    with open(path) as file:
        return [line for line in file if line.startswith(names)]

def content(path):
    with open(path, "rb") as file:
        return file.read().decode()

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
death = ctypes.c_int()
ctypes.CDLL(None).prctl(2, ctypes.byref(death), 0, 0, 0)
mask = os.umask(0)
os.umask(mask)
kinds = {n: stat.S_IFMT(os.fstat(int(n)).st_mode) for n in ("0", "1", "2")}
process = psutil.Process()
begun = prometheus_client.REGISTRY.get_sample_value("process_start_time_seconds")
same = {
    "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
    "parent": os.getppid(),
    "death": death.value,
    "name": content("/proc/self/comm"),
    "command": content("/proc/self/cmdline").split("\\0")[:-2],
    "block": sorted(e for e in content("/proc/self/environ").split("\\0") if e and not e.startswith("WA_G")),
    "environment": sorted(n for n in os.environ),
    "directory": os.getcwd(),
    "umask": mask,
    "descriptors": [sorted(kinds.items()), len(os.listdir("/proc/self/fd"))],
    "signals": lines("/proc/self/status", "SigBlk", "SigIgn", "SigCgt", "SigPnd", "NoNewPrivs", "Seccomp"),
    "threads": lines("/proc/self/status", "Threads"),
    "limits": [resource.getrlimit(n) for n in range(16)],
    "nice": os.nice(0),
    "flags": str(sys.flags),
    "path": sys.path,
    "arguments": sys.argv,
    "name of main": __name__,
    "streams": [
        [s.isatty(), s.line_buffering, s.encoding, s.errors, s.seekable()] for s in (sys.stdout, sys.stderr)
    ],
    "collector": [gc.isenabled(), gc.get_threshold()],
    "main thread": [threading.main_thread() is threading.current_thread(), threading.active_count()],
    "traced": [sys.gettrace() is None, sys.getprofile() is None],
    "metrics": abs(begun - process.create_time()) < 0.1,
    "seeded": library.SEEDED.random(),
}
drawn = {
    "random": random.random(),
    "module": library.UNSEEDED.random(),
    "uuid": str(uuid.uuid4()),
    "authkey": multiprocessing.current_process().authkey.hex(),
}
own = {
    "block": [e for e in content("/proc/self/environ").split("\\0") if e.startswith("WA_")],
    "environment": [f"{n}={os.environ[n]}" for n in ("WA_TREE", "WA_GENERATION")],
}
with open(os.environ["FACTS"] + os.environ["WA_GENERATION"] + ".part", "w") as file:
    json.dump({"same": same, "drawn": drawn, "own": own}, file)
os.rename(file.name, file.name.removesuffix(".part"))
while True:
    signal.pause()
"""


class Bench:
    """A tree, a library beside it, and a supervisor with a zygote."""

    def __init__(self, folder: Path, supervise: Callable[..., Supervised]) -> None:
        self.folder = folder
        self.tree, self.library = folder / "tree", folder / "library"
        self.tree.mkdir()
        self.library.mkdir()
        (self.tree / "main.py").write_text(MAIN, encoding="utf-8")
        self.answer(1)
        self.write("library", "import random\nVALUE = 'old'\n")
        self._supervise = supervise
        self.started: Supervised

    def write(self, module: str, text: str) -> None:
        (self.library / f"{module}.py").write_text(text, encoding="utf-8")

    def answer(self, value: int) -> None:
        (self.tree / "answer.py").write_text(f"VALUE = {value}\n", encoding="utf-8")

    @property
    def environment(self) -> dict[str, str]:
        # The empty entry is the working directory: of the child, not of whoever forks it.
        inherited = os.environ.get("PYTHONPATH", "")
        return {"PYTHONPATH": os.pathsep.join([str(self.library), *filter(None, [inherited]), ""])}

    def start(self, *arguments: str, **environment: str) -> Supervised:
        self.started = self._supervise(
            *arguments, "main.py", cwd=self.tree, **(self.environment | environment)
        )
        self.started.expect(r"reload \(start\): live")
        return self.started

    @property
    def zygote(self) -> dict[str, Any]:
        state: dict[str, Any] = self.started.status()["zygote"]
        return state

    def ready(self, other_than: int | None = None) -> int:
        """Wait for a zygote, and return its pid."""
        found: list[int] = []

        def is_ready() -> bool:
            zygote = self.zygote
            if zygote["state"] == "ready" and zygote["pid"] != other_than:
                found.append(zygote["pid"])
            return bool(found)

        until(is_ready)
        return found[0]


@pytest.fixture
def bench(tmp_path: Path, supervise: Callable[..., Supervised]) -> Bench:
    return Bench(tmp_path, supervise)


def compile_helper(started: Supervised) -> psutil.Process:
    """Return the helper that waits for the next change."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        for child in psutil.Process(started.process.pid).children():
            with contextlib.suppress(psutil.Error):
                found.extend([child] if "compiler.py" in " ".join(child.cmdline()) else [])
        return bool(found)

    until(is_there)
    return found[0]


def facts(bench: Bench, generation: int) -> dict[str, Any]:
    file = bench.folder / f"facts{generation}"
    until(file.exists)
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return said


def test_forked_child_is_what_a_process_of_its_own_would_be(bench: Bench) -> None:
    (bench.tree / "main.py").write_text(FACTS, encoding="utf-8")
    bench.write("library", "import random\nSEEDED, UNSEEDED = random.Random(42), random.Random()\n")
    bench.start(FACTS=str(bench.folder / "facts"))
    cold = facts(bench, 1)  # Started before it was known what it would be.
    assert cold["own"]["block"] == cold["own"]["environment"]
    zygote = bench.ready()
    for generation in (2, 3):
        assert bench.started.command("restart").returncode == 0
        forked = facts(bench, generation)
        assert forked["same"] == cold["same"]
        assert forked["own"]["block"] == forked["own"]["environment"]
        assert forked["own"]["block"][1] == f"WA_GENERATION={generation}"
    assert forked["same"]["parent"] == bench.started.process.pid
    assert bench.zygote["forks"] == 2
    assert bench.zygote["pid"] == zygote
    drawn = [facts(bench, generation)["drawn"] for generation in (1, 2, 3)]
    for name in drawn[0]:
        assert len({one[name] for one in drawn}) == 3, f"two generations have the same {name}"
    document = json.loads(bench.started.command("verify", "--json").stdout)
    assert document["in_sync"]
    assert psutil.Process(zygote).name() == "wa-zygote"
    bench.started.end()
    bench.start("--no-zygote", FACTS=str(bench.folder / "facts"))
    of_its_own = facts(bench, 4)
    assert of_its_own["same"] == cold["same"] | {"parent": bench.started.process.pid}
    assert of_its_own["own"]["block"] == of_its_own["own"]["environment"]


def edit(bench: Bench) -> None:
    bench.write("library", "VALUE = 'new'  # longer, or the bytecode of a moment ago would do for Python\n")


def shadow(bench: Bench) -> None:
    (bench.folder / "first").mkdir(exist_ok=True)
    (bench.folder / "first" / "library.py").write_text("VALUE = 'new'\n", encoding="utf-8")


def shadowed_by_the_tree(bench: Bench) -> None:
    (bench.tree / "library.py").write_text("VALUE = 'new'\n", encoding="utf-8")


@pytest.mark.parametrize("change", [edit, shadow, shadowed_by_the_tree])
def test_child_is_never_forked_with_a_library_that_it_would_not_find_now(
    bench: Bench, change: Callable[[Bench], None]
) -> None:
    first = bench.folder / "first"
    first.mkdir()
    started = bench.start(PYTHONPATH=os.pathsep.join([str(first), bench.environment["PYTHONPATH"]]))
    started.expect("running 1 old")
    bench.ready()
    bench.answer(2)
    started.expect("running 2 old")
    assert bench.zygote["forks"] == 1, "control: it is used"
    change(bench)
    if change is not shadowed_by_the_tree:  # That one is a save.
        assert started.command("restart").returncode == 0
    started.expect("running 2 new")
    forks = bench.zygote["forks"]
    for number in range(3, 13):  # One that was built before the change may be there for a moment.
        bench.ready()
        bench.answer(number)
        started.expect(f"running {number} new")
        if bench.zygote["forks"] > forks:
            break
    assert bench.zygote["forks"] == forks + 1, "\n".join(started.output.lines)


OVERTAKEN = """\
import os, signal, sys
from supervisor import cli, zygote

ordinary = zygote.Zygote._ask

def ask(self, process, *others):
    if os.path.exists(os.environ["ARMED"]):
        how = open(os.environ["ARMED"]).read()
        os.unlink(os.environ["ARMED"])
        if how.startswith("/"):
            os.replace(how, os.environ["PYTHONPATH"].split(os.pathsep)[0] + "/library.py")
        elif how.startswith("after"):
            ordinary(self, process, *others)
            return os.kill(process.pid, getattr(signal, how.split()[1]))
        else:
            os.kill(process.pid, getattr(signal, how))
    return ordinary(self, process, *others)

zygote.Zygote._ask = ask
cli.main()
"""


@pytest.fixture
def overtaken(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A supervisor whose zygote something happens to at the moment of a request."""
    program, armed = bench.folder / "overtaken.py", bench.folder / "armed"
    program.write_text(OVERTAKEN, encoding="utf-8")
    command = program_of(bench.folder, [sys.executable, str(program)])
    monkeypatch.setattr("tests.supervisor.harness.SUPERVISOR", command)

    def arm(what: str) -> None:
        armed.write_text(what, encoding="utf-8")

    bench.start(ARMED=str(armed)).expect("running 1 old")
    bench.ready()
    return arm


def test_library_that_changes_while_it_forks_is_noticed(
    bench: Bench, overtaken: Callable[[str], None]
) -> None:
    newer = bench.folder / "newer.py"
    newer.write_text("VALUE = 'new'\n", encoding="utf-8")
    overtaken(str(newer))
    bench.answer(2)
    bench.started.expect("cold start: .*library.py has changed")
    bench.started.expect("running 2 new")


@pytest.mark.parametrize("when", ["", "after "])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "SIGTERM"])
def test_zygote_that_fails_in_the_middle_of_a_request_costs_a_cold_start(
    bench: Bench, overtaken: Callable[[str], None], how: str, when: str
) -> None:
    pid = bench.zygote["pid"]
    overtaken(when + how)
    bench.answer(2)
    bench.started.expect("running 2 old")
    bench.started.expect(r"reload \((watch|scan)\): live")
    bench.ready(other_than=pid)
    bench.answer(3)
    bench.started.expect("running 3 old")
    bench.started.expect(r"reload \((watch|scan)\): live")
    assert bench.zygote["forks"] >= 1
    ours = psutil.Process(bench.started.process.pid)
    until(lambda: {c.pid for c in ours.children()} >= {bench.zygote["pid"], bench.started.live().pid})
    until(lambda: not [c for c in ours.children() if is_gone(c)])


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_zygote_that_fails_between_requests_is_replaced(bench: Bench, how: signal.Signals) -> None:
    bench.start().expect("running 1 old")
    pid = bench.ready()
    zygote = psutil.Process(pid)
    os.kill(pid, how)
    bench.ready(other_than=pid)
    assert is_gone(zygote)
    bench.answer(2)
    bench.started.expect("running 2 old")
    assert bench.zygote["forks"] == 1


def test_child_that_was_forked_ahead_and_is_not_needed_ends(bench: Bench) -> None:
    started = bench.start()
    started.expect("running 1 old")
    bench.ready()
    ours = psutil.Process(started.process.pid)

    def programs() -> int:  # The compile helper is another program.
        found = 0
        for child in ours.children():
            with contextlib.suppress(psutil.Error):  # It has just ended.
                found += "bootstrap.py" in " ".join(child.cmdline())
        return found

    (bench.tree / "answer.py").touch()
    started.expect("unchanged")
    until(lambda: bench.zygote["spare"] is not None)
    unneeded = psutil.Process(bench.zygote["spare"])
    (bench.tree / "answer.py").write_text("VALUE = (\n", encoding="utf-8")
    started.expect("rejected")
    until(lambda: is_gone(unneeded))
    until(lambda: programs() == len(("live", "zygote", "the next one")))
    assert bench.zygote["forks"] == 0
    bench.answer(2)
    started.expect("running 2 old")
    assert bench.zygote["forks"] == 1


def test_first_change_after_a_start_finds_a_child_that_has_its_memory(
    bench: Bench, not_checked: Callable[[str], None]
) -> None:
    started = bench.start()
    started.expect("running 1 old")
    bench.ready()
    until(lambda: bench.zygote["spare"] is not None)
    spare = psutil.Process(bench.zygote["spare"])
    if tuple(map(int, platform.release().split(".")[:2])) >= (5, 14):
        until(lambda: spare.memory_full_info().uss > spare.memory_info().rss / 2)
    else:
        not_checked("its memory: the kernel has no MADV_POPULATE_WRITE")
    bench.answer(2)
    started.expect("running 2 old")
    until(lambda: started.status()["in_sync"])
    assert started.live().pid == spare.pid


def test_after_a_reload_the_next_child_waits_for_the_next_one_and_takes_its_code_and_its_place(
    bench: Bench,
) -> None:
    started = bench.start()
    bench.ready()
    bench.answer(2)
    started.expect("running 2 old")
    for number in (3, 4):
        until(lambda: bench.zygote["spare"] is not None)
        spare = bench.zygote["spare"]
        bench.answer(number)
        started.expect(f"running {number} old")
        until(lambda: started.status()["in_sync"])
        assert started.live().pid == spare
        assert f"WA_GENERATION={number}".encode() in Path(f"/proc/{spare}/environ").read_bytes().split(b"\0")
    until(lambda: bench.zygote["spare"] is not None)
    spare = bench.zygote["spare"]
    moved = bench.tree.rename(bench.folder / "moved")
    shutil.copytree(moved, bench.tree)
    bench.answer(5)
    started.expect("running 5 old")
    until(lambda: started.status()["in_sync"])
    live = started.live().pid
    assert live != spare
    assert Path(f"/proc/{live}/cwd").samefile(bench.tree), "the folder of that name, not the one of before"


def test_code_is_imported_while_it_is_still_being_judged_and_does_nothing_more(bench: Bench) -> None:
    (bench.tree / "main.py").write_text(f"print('importing', flush=True)\n{MAIN}", encoding="utf-8")
    started = bench.start("--handover=overlap")
    bench.ready()
    bench.answer(2)
    started.expect("running 2 old")
    (bench.tree / "side.py").write_text("VALUE = 0\n", encoding="utf-8")  # What others import is executed.
    module = "import os\nprint('side', os.environ['WA_GENERATION'], flush=True)\n"
    (bench.tree / "answer.py").write_text(f"{module}VALUE = 3\n", encoding="utf-8")
    started.expect("running 3 old")
    until(lambda: started.status()["in_sync"] and bench.zygote["spare"] is not None)
    number = started.status()["live"]["generation"]
    helper = compile_helper(started)
    helper.suspend()
    try:
        (bench.tree / "answer.py").write_text(f"{module}VALUE = 4\n", encoding="utf-8")
        until(lambda: bench.zygote["spare"] is not None)
        begun = psutil.Process(bench.zygote["spare"])
        wanted = f"WA_GENERATION={number + 1}".encode()
        until(lambda: wanted in Path(f"/proc/{begun.pid}/environ").read_bytes().split(b"\0"))
        status = started.status()
        assert (status["live"]["generation"], status["candidate"]) == (number, None)
    finally:
        helper.resume()
    started.expect("running 4 old")
    until(lambda: started.status()["in_sync"])
    assert started.live().pid == begun.pid


def test_nothing_of_code_that_does_not_compile_is_executed(bench: Bench) -> None:
    """Of a callable's module all is imported before the gate, so that is where it could be."""
    loop = "".join(f"    {line}\n" for line in MAIN.splitlines()[4:])
    application = f"import first, json, os, signal, sys\nimport library\nimport answer\ndef main():\n{loop}"
    (bench.tree / "app.py").write_text(application, encoding="utf-8")
    (bench.tree / "first.py").write_text("print('imported', flush=True)\n", encoding="utf-8")
    bench.started = started = bench._supervise("app:main", cwd=bench.tree, **bench.environment)
    started.expect("running 1 old")
    bench.ready()
    bench.answer(2)
    started.expect("running 2 old")
    for number in range(3):
        until(lambda: bench.zygote["spare"] is not None)
        spare = psutil.Process(bench.zygote["spare"])
        (bench.tree / "answer.py").write_text(f"VALUE = ({number}\n", encoding="utf-8")
        started.expect(r"rejected \(syntax\)")
        until(lambda: is_gone(spare))  # noqa: B023 -- it is called before the next turn
    bench.answer(3)
    started.expect("running 3 old")
    lines = started.output.lines
    assert sum("imported" in line for line in lines) == 3, "once for each that ran"
    assert not [line for line in lines if "Traceback" in line]


def test_forked_child_has_the_tree_of_its_generation_and_not_that_of_the_zygote(bench: Bench) -> None:
    (bench.tree / "left.py").write_text("VALUE = 1\n", encoding="utf-8")
    started = bench.start()
    started.expect("running 1 old")
    bench.ready()
    for number, made in enumerate((3, 300), start=2):  # So many are no longer told one by one.
        for name in range(made):
            (bench.tree / f"made{name}.py").write_text(f"VALUE = {name}\n", encoding="utf-8")
        (bench.tree / "left.py").unlink(missing_ok=True)
        looks = "import importlib.util\nLEFT = importlib.util.find_spec('left')\n"
        text = f"{looks}from made{made - 1} import VALUE as LAST\nVALUE = LEFT, LAST, {number}\n"
        (bench.tree / "answer.py").write_text(text, encoding="utf-8")
        started.expect(rf"running \(None, {made - 1}, {number}\) old")
        started.expect("reload .*: live")
    assert bench.zygote["forks"] == 2


SIDE_EFFECTS = {
    "it starts a thread": "import threading, time\n"
    "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n",
    "it keeps a file or a socket open": "import socket\nSOCKET = socket.socket()\n",
    "it starts a process": "import subprocess\nP = subprocess.Popen(['sleep', '1000'])\n",
    "it shares memory that can be written": "import mmap\nSHARED = mmap.mmap(-1, 4096)\n",
    "it sets a timer": "import signal\nsignal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
    "signal.setitimer(signal.ITIMER_REAL, 1000)\n",
    "it prints while it is imported": "print('hello')\n",
    "it loads answer of the tree": "import answer\n",
    "it needs watchdog, which is left out": "import watchdog\n",
}


@pytest.mark.parametrize("why", SIDE_EFFECTS)
def test_module_that_cannot_be_shared_is_left_out_and_loaded_by_each_child(bench: Bench, why: str) -> None:
    bench.write("uneasy", f"{SIDE_EFFECTS[why]}VALUE = 'loaded'\n")
    bench.write("library", "import json.tool\nVALUE = 'old'\n")
    (bench.tree / "main.py").write_text(f"import uneasy\n{MAIN}", encoding="utf-8")
    bench.write("sitting_on_it", "import uneasy\n")
    environment = {"PYTHONPATH": os.pathsep.join([bench.environment["PYTHONPATH"], str(bench.tree)])}
    started = bench.start(**environment)
    started.expect("running 1 old")
    bench.ready()
    assert bench.zygote["left_out"] == {"uneasy": why}
    bench.answer(2)
    started.expect("running 2 old")
    assert bench.zygote["forks"] == 1


def test_changed_environment_reaches_the_child_and_the_next_zygote(bench: Bench) -> None:
    (bench.tree / "main.py").write_text(
        MAIN.replace(
            "library.VALUE", "os.environ['COLOUR'], open('/proc/self/environ').read().count('blue')"
        ),
        encoding="utf-8",
    )
    file = bench.folder / "variables"
    file.write_text("COLOUR=green\n", encoding="utf-8")
    started = bench.start(f"--env-file={file}", "--scan-interval=0.2")
    started.expect("running 1 green 0")
    pid = bench.ready()
    file.write_text("COLOUR=blue\n", encoding="utf-8")
    started.expect("running 1 blue 1")
    bench.ready(other_than=pid)
    bench.answer(2)
    started.expect("running 2 blue 1")
    assert bench.zygote["forks"] == 1


def test_zygote_outlives_a_child_that_crashes_and_not_the_supervisor(bench: Bench) -> None:
    started = bench.start()
    started.expect("running 1 old")
    pid = bench.ready()
    started.live().kill()
    started.expect("running 1 old")
    assert bench.zygote["pid"] == pid, "it was taken for something that the child had left behind"
    assert bench.zygote["forks"] == 1
    until(lambda: started.status()["live"] is not None)
    live, zygote = started.live(), psutil.Process(pid)
    started.process.kill()
    until(lambda: is_gone(live) and is_gone(zygote))


def test_replaced_supervisor_ends_its_zygote_and_builds_its_own(bench: Bench) -> None:
    started = bench.start()
    started.expect("running 1 old")
    zygote = psutil.Process(bench.ready())
    live = started.live().pid
    assert started.command("reexec").returncode == 0
    bench.ready(other_than=zygote.pid)
    assert is_gone(zygote)
    assert started.live().pid == live
    bench.answer(2)
    started.expect("running 2 old")
    assert bench.zygote["forks"] == 1


def test_stop_ends_the_zygote(bench: Bench) -> None:
    started = bench.start()
    zygote = psutil.Process(bench.ready())
    assert started.command("stop").returncode == 0
    assert started.process.wait(DEADLINE_SECONDS) == 0
    assert is_gone(zygote)


def test_library_function_that_was_given_code_of_the_tree_is_compared_with_its_source(bench: Bench) -> None:
    bench.write("library", "VALUE = 'old'\ndef work():\n    return 1\n")
    (bench.tree / "main.py").write_text(
        "import library, answer\n"
        "def other():\n    return 2\n"
        "library.work.__code__ = other.__code__.replace(co_consts=(None, answer.VALUE))\n"
        "del other\n" + MAIN,
        encoding="utf-8",
    )
    bench.answer(2)  # As in the source: no alarm.
    started = bench.start("--verify-interval=1000")
    started.expect("running 2 old")
    bench.ready()
    bench.answer(3)
    started.expect("function main.*other does not run the code of its source|attestation")
    assert bench.zygote["forks"] >= 1


def test_operator_can_do_without(bench: Bench) -> None:
    started = bench.start("--no-zygote")
    started.expect("running 1 old")
    bench.answer(2)
    started.expect("running 2 old")
    started.expect(r"reload \((watch|scan)\): live")
    assert bench.zygote == {
        "state": "off", "reason": "--no-zygote", "pid": None, "modules": 0, "forks": 0, "spare": None,
        "left_out": {},
    }  # fmt: skip
    assert not [c for c in psutil.Process(started.process.pid).children() if c.name() == "wa-zygote"]


def test_many_reloads_leave_nothing_behind(bench: Bench, measured: Callable[[str], None]) -> None:
    started = bench.start("--probation=0")
    started.expect("running 1 old")
    bench.ready()
    ours = psutil.Process(started.process.pid)
    zygote = psutil.Process(bench.zygote["pid"])

    def reload(number: int) -> None:
        bench.answer(number)
        started.expect(f"running {number} old")
        started.expect(r"reload \((watch|scan)\): live")

    reload(2)
    beside = ("the child", "the next one", "the zygote", "the next compile helper")
    until(lambda: bench.zygote["spare"] is not None and len(ours.children()) == len(beside))
    descriptors = [ours.num_fds(), zygote.num_fds()]
    memory = [process.memory_info().rss for process in (ours, zygote)]
    reloads = 100 if SOAK else 10
    for number in range(3, 3 + reloads):
        reload(number)
    assert bench.zygote["forks"] == reloads + 1
    until(lambda: bench.zygote["spare"] is not None and not zygote.children())
    until(lambda: [ours.num_fds(), zygote.num_fds()] <= descriptors)
    until(lambda: [child.pid for child in generations(ours)] == [started.live().pid])
    grown = [process.memory_info().rss - b for process, b in zip((ours, zygote), memory, strict=True)]
    measured(f"{reloads} reloads: supervisor and zygote grew by {[g // 1024 for g in grown]} KiB")


def test_supervisor_that_finds_the_zygote_of_a_killed_one_ends_it(bench: Bench) -> None:
    """Its death signal does so; this is for the moment before it is set."""
    environment = os.environ | {"NOTIFY_SOCKET": str(bench.folder / "run" / "notify.sock")}
    with subprocess.Popen(
        ["/bin/sleep", "1000"], env=environment | {"WA_GENERATION": "-" * 10}, start_new_session=True
    ) as left:
        bench.start().expect("killed what an earlier supervisor left behind: .*sleep")
        assert left.wait(DEADLINE_SECONDS) == -signal.SIGKILL


def test_supervisor_is_not_held_up_for_long_by_a_zygote_that_stands_still(
    bench: Bench, overtaken: Callable[[str], None], measured: Callable[[str], None]
) -> None:
    overtaken("SIGSTOP")
    began = time.monotonic()
    bench.answer(2)
    bench.started.expect("cold start: it (stands still|does not answer)")
    measured(f"a zygote that stands still was given up after {time.monotonic() - began:.2f} s")
