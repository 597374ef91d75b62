"""What a process that has come to the end of its program still holds, asked in real processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.harness import Supervised

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is told from Linux' /proc")

ASK = """\
import fcntl, gc, os, socket, subprocess, sys, threading, time
from supervisor.child import traces

gc.collect()
gc.freeze()  # As in a forked child: what is looked at is what the program has made.
traces.begin()
ours, theirs = socket.socketpair()
os.close(theirs.detach())
log = os.path.join(sys.argv[1], "log")
listener = threading.Thread(target=threading.Event().wait, daemon=True)
listener.start()
exec(sys.argv[2])
print("left" if traces.are_left(ours) else "nothing", flush=True)
os._exit(0)
"""

LOG = "out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)"
NOTHING = {
    "no more than it began with": "pass",
    "a log": LOG,
    "a source that is read": "file = open(sys.executable, 'rb')",
    "a socket to the service manager": "tell = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "text on stdout": "sys.stdout.write('')",
    "a file that was closed": "file = open(log, 'w'); file.close()",
}
LEFT = {
    "a thread": "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "a child": "child = subprocess.Popen(['sleep', '0'])",
    "a port": "server = socket.create_server(('127.0.0.1', 0))",
    "a connection": "one, other = socket.socketpair()",
    "a name for datagrams": (
        "box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\nbox.bind(f'\\0wa-test{os.getpid()}')"
    ),
    "a pipe": "reader, writer = os.pipe()",
    "a file that may be a database": "file = os.open(log, os.O_RDWR | os.O_CREAT)",
    "bytes that are not written": "file = open(log, 'a'); file.write('x')",
    "a lock on a log": f"{LOG}; fcntl.flock(out, fcntl.LOCK_EX)",
    "a lock on what is read": "file = open(sys.executable, 'rb'); fcntl.flock(file, fcntl.LOCK_SH)",
    "a finalizer": "class Last:\n    def __del__(self): pass\nlast = Last(); last.itself = last",
    "a finalizer that was put away": (
        "class Last:\n    def __del__(self): pass\nlast = Last(); last.itself = last; gc.freeze()"
    ),
    "a generator in a try": (
        "def steps():\n    try: yield\n    finally: pass\nwaiting = steps(); next(waiting)"
    ),
    "an object that cannot be asked": (
        "class Kind(type):\n    def __getattribute__(cls, name): raise RuntimeError\n"
        "class Strange(metaclass=Kind): pass\nstrange = object.__new__(Strange)\nstrange.itself = strange"
    ),
}


def asked(tmp_path: Path, program: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", ASK, tmp_path, program], capture_output=True, text=True, check=True
    )
    return answer.stdout.strip()


@pytest.mark.parametrize("program", NOTHING.values(), ids=NOTHING)
def test_program_that_has_let_go_of_everything_leaves_nothing(tmp_path: Path, program: str) -> None:
    assert asked(tmp_path, program) == "nothing"


@pytest.mark.parametrize("program", LEFT.values(), ids=LEFT)
def test_what_others_could_miss_is_noticed(tmp_path: Path, program: str) -> None:
    assert asked(tmp_path, program) == "left"


def test_next_program_does_not_begin_before_a_finalizer_of_the_old_one_has_run(
    supervise: Callable[..., Supervised], tree: Path
) -> None:
    """In ``replace``, what runs after ``atexit`` is still the old program."""
    (tree / "main.py").write_text(
        "import os, signal, sys, time\n"
        "sys.path.insert(0, 'modules')\n"
        "import answer\n"
        "class Last:\n"
        "    def __init__(self): self.itself = self\n"
        "    def __del__(self, write=os.write, sleep=time.sleep, number=answer.VALUE):\n"
        "        sleep(0.3)\n"
        "        write(1, b'let go %d\\n' % number)\n"
        "last = Last()\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "print('serving', answer.VALUE, flush=True)\n"
        "while True: time.sleep(60)\n",
        encoding="utf-8",
    )
    started = supervise("--handover=replace", "main.py", cwd=tree)
    started.expect("^serving 1$")
    started.expect(r"reload \(start\): live")
    for number in (2, 3):
        (tree / "modules" / "answer.py").write_text(f"VALUE = {number}\n", encoding="utf-8")
        started.expect(f"^serving {number}$")
        lines = [line for line in started.output.lines if line.startswith(("serving", "let go"))]
        assert lines[-2:] == [f"let go {number - 1}", f"serving {number}"]
        started.expect(r"reload \((watch|scan)\): live")
