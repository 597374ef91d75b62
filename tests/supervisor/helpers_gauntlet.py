"""The tree of the gauntlet, the ways to edit it, and a supervisor that can be held still or overtaken."""

from __future__ import annotations

import importlib.util
import os
import py_compile
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import BinaryIO
from unittest.mock import patch

from tests.supervisor.harness import SUPERVISOR

MAIN = """\
import os, signal, sys
sys.path.insert(0, "modules")
try:
    import answer
    value = getattr(answer, "VALUE", "empty")
except ModuleNotFoundError:
    value = "gone"
value = value.encode("unicode_escape").decode()
print("running", value, flush=True)
if "GAUNTLET_SAID" in os.environ:
    with open(os.environ["GAUNTLET_SAID"], "w") as pipe:
        pipe.write(value)
if "WA_GENERATION" in os.environ:
    signal.pause()
"""
"""Says which version of ``answer`` it got; under a supervisor it then stays, in plain Python it ends."""

HOOKED = """\
import os, sys
from supervisor import bytecode, cli, launch

def overtaken(stage, then):
    def call(*args, **kwargs):
        armed = os.path.join(os.environ["GAUNTLET_ARMED"], stage)
        if os.path.exists(armed):
            os.replace(armed, os.environ["GAUNTLET_SOURCE"])
        return then(*args, **kwargs)
    return call

bytecode.Compiler.start = overtaken("hashed", bytecode.Compiler.start)
launch.launch = overtaken("compiled", launch.launch)
cli.main()
"""
"""The supervisor, with somebody who saves a file at the one moment between two of its stages."""

TIMESTAMP = PycInvalidationMode.TIMESTAMP
CHECKED = PycInvalidationMode.CHECKED_HASH
UNCHECKED = PycInvalidationMode.UNCHECKED_HASH

_SECOND_NS = 1_000_000_000
_DROPPED = "-dac_override,-dac_read_search"


def value(text: str) -> bytes:
    """Return the source of a version of ``answer``; names of one length make sources of one size."""
    return f"VALUE = '{text}'\n".encode()


OLD, NEW, MIDDLE, NEWEST = value("old"), value("new"), value("middle"), value("newest")
WAITING = b"import os\nopen(os.environ['GAUNTLET_GATE']).read()\n" + MIDDLE
"""Its import lasts until somebody has opened the gate and closed it again."""


@dataclass
class Bench:
    """A script tree with one module, and a folder beside it that nobody watches.

    Attributes:
        root: of the tree.
        outside: the folder beside it.
        environment: of the supervisor and of plain Python.
        flags: of plain Python.
        held: a file that somebody is still writing.
    """

    root: Path
    outside: Path
    environment: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    held: BinaryIO | None = None

    @property
    def source(self) -> Path:
        """The file that is edited."""
        return self.root / "modules" / "answer.py"

    @property
    def package(self) -> Path:
        """What takes the place of that file when it becomes a package."""
        return self.root / "modules" / "answer" / "__init__.py"

    @property
    def bytecode(self) -> Path:
        """Where the importer of a process with our environment looks for bytecode of that file."""
        usual = cached(self.source)
        prefix = self.environment.get("PYTHONPYCACHEPREFIX")
        return Path(prefix, *self.source.parent.parts[1:], usual.name) if prefix else usual

    @property
    def gate(self) -> Path:
        """The pipe that the import of :data:`WAITING` waits at."""
        return self.outside / "gate"

    @property
    def armed(self) -> Path:
        """What lies here under the name of a stage is saved over the source when that stage has ended."""
        return self.outside / "armed"

    @classmethod
    def make(cls, folder: Path, environment: Mapping[str, str], flags: tuple[str, ...] = ()) -> Bench:
        """Make the tree, which says ``old``; ``{outside}`` in the environment is the folder beside it."""
        bench = cls.at(folder, environment, flags)
        bench.armed.mkdir(parents=True)
        os.mkfifo(bench.gate)
        bench.fill(OLD)
        return bench

    @classmethod
    def at(cls, folder: Path, environment: Mapping[str, str], flags: tuple[str, ...] = ()) -> Bench:
        """Return the one that was made in a folder."""
        bench = cls(folder / "tree", folder / "outside", flags=flags)
        bench.environment |= {
            "GAUNTLET_GATE": str(bench.gate),
            "GAUNTLET_ARMED": str(bench.armed),
            "GAUNTLET_SOURCE": str(bench.source),
        }
        bench.environment |= {name: text.format(outside=bench.outside) for name, text in environment.items()}
        return bench

    def fill(self, content: bytes) -> None:
        """Write all that the tree consists of."""
        self.source.parent.mkdir(parents=True)
        (self.root / "main.py").write_text(MAIN, encoding="utf-8")
        self.source.write_bytes(content)
        # A folder that is left with bytecode alone goes with its last source.
        self.source.with_name("neighbour.py").touch()

    def plain(self, *how: str) -> str:
        """Return what plain Python runs here, as a script or in the way that is given."""
        assert "PYTHONDONTWRITEBYTECODE" not in os.environ, "void: without bytecode nothing can be stale"
        done = subprocess.run(
            [sys.executable, *self.flags, *(how or ("main.py",))],
            cwd=self.root,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().removeprefix("running ")

    def everywhere(self) -> set[str]:
        """Return what plain Python runs here, in every way to start it."""
        return {self.plain(), self.plain("-m", "main")}

    def overtake(self) -> None:
        """Save the newest version, as an editor does that renames."""
        saved = self.armed / "saved"
        saved.write_bytes(NEWEST)
        saved.replace(self.source)


Edit = Callable[[Bench], None]

# --- edits ------------------------------------------------------------------------------------------------


def writes(content: bytes) -> Edit:
    """Write and close."""

    def edit(bench: Bench) -> None:
        bench.source.write_bytes(content)

    return edit


def unseen(content: bytes) -> Edit:
    """Write what has the size of the old source, and give the file its old time back."""

    def edit(bench: Bench) -> None:
        cache(bench)
        facts = bench.source.stat()
        bench.source.write_bytes(content)
        os.utime(bench.source, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert bench.source.stat().st_size == facts.st_size, "void: the size tells"

    return edit


def planted(content: bytes) -> Edit:
    """Write, over bytecode of the old source that nobody checks."""

    def edit(bench: Bench) -> None:
        cache(bench, UNCHECKED)
        bench.source.write_bytes(content)

    return edit


def in_the_same_second(bench: Bench) -> None:
    second = bench.source.stat().st_mtime_ns // _SECOND_NS * _SECOND_NS
    os.utime(bench.source, ns=(second, second + _SECOND_NS // 10))
    cache(bench)
    bench.source.write_bytes(NEW)
    os.utime(bench.source, ns=(second, second + _SECOND_NS // 2))


def back_in_time(bench: Bench) -> None:
    cache(bench)
    hour_ago = bench.source.stat().st_mtime_ns - 3600 * _SECOND_NS
    bench.source.write_bytes(NEW)
    os.utime(bench.source, ns=(hour_ago, hour_ago))


def under_the_prefix(mode: PycInvalidationMode) -> Edit:
    """Bytecode of the old source where ``PYTHONPYCACHEPREFIX`` leads, under a header that is trusted."""

    def edit(bench: Bench) -> None:
        py_compile.compile(str(bench.source), str(bench.bytecode), doraise=True, invalidation_mode=mode)
        bench.source.write_bytes(NEW)
        make_trusted(bench.bytecode, bench.source)

    return edit


def tampered(mode: PycInvalidationMode, optimize: int = 0) -> Edit:
    """Bytecode with the code of the old source and a header that is right for the new one."""

    def edit(bench: Bench) -> None:
        written = py_compile.compile(
            str(bench.source), optimize=optimize, doraise=True, invalidation_mode=mode
        )
        assert written is not None
        bench.source.write_bytes(NEW)
        make_trusted(Path(written), bench.source)

    return edit


def make_trusted(bytecode: Path, source: Path) -> None:
    """Give bytecode the header that the importer wants to see; an unchecked one stays as it is."""
    content = bytecode.read_bytes()
    facts = source.stat()
    expected = {
        0b00: b"".join(number.to_bytes(4, "little") for number in (int(facts.st_mtime), facts.st_size)),
        0b01: content[8:16],
        0b11: importlib.util.source_hash(source.read_bytes()),
    }
    flags = int.from_bytes(content[4:8], "little")
    bytecode.write_bytes(content[:8] + expected[flags] + content[16:])


def overtaken_py_compile(bench: Bench) -> None:
    """``py_compile`` reads the source and then looks at its time; the edit falls in between."""
    read = SourceFileLoader.get_data

    def read_and_be_overtaken(self: SourceFileLoader, path: str) -> bytes:
        content = read(self, path)
        bench.source.write_bytes(NEW)
        return content

    with patch.object(SourceFileLoader, "get_data", read_and_be_overtaken):
        cache(bench)


def deleted(bench: Bench) -> None:
    cache(bench)
    bench.source.unlink()


def deleted_beside_legacy_bytecode(bench: Bench) -> None:
    py_compile.compile(str(bench.source), cfile=f"{bench.source}c", doraise=True)
    bench.source.unlink()


def becomes_a_package(bench: Bench) -> None:
    bench.package.parent.mkdir()
    bench.package.write_bytes(value("package"))
    bench.source.unlink()


def becomes_a_module_again(bench: Bench) -> None:
    """The package's bytecode stays beside the source that is gone, and would win over the module."""
    py_compile.compile(str(bench.package), cfile=f"{bench.package}c", doraise=True)
    py_compile.compile(str(bench.package), doraise=True)
    bench.package.unlink()
    bench.source.write_bytes(value("back"))


def package_left_with_bytecode_alone(bench: Bench) -> None:
    """What is left is still importable, as a namespace package without content."""
    py_compile.compile(str(bench.package), doraise=True)
    bench.package.unlink()


def renamed_over(bench: Bench) -> None:
    cache(bench)
    facts = bench.source.stat()
    saved = bench.source.with_name(".answer.py.saved")
    saved.write_bytes(NEW)
    os.utime(saved, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    saved.replace(bench.source)


def truncated_and_half_written(bench: Bench) -> None:
    bench.held = bench.source.open("wb")
    bench.held.write(NEW[:10])
    bench.held.flush()


def written_to_its_end(bench: Bench) -> None:
    assert bench.held is not None
    with bench.held as file:
        file.write(NEW[10:])


def linked(bench: Bench) -> None:
    """The source is a link to a file that nobody watches, with its successor of the same time beside it."""
    first, second = bench.outside / "first", bench.outside / "second"
    bench.source.replace(first)
    second.write_bytes(NEW)
    facts = first.stat()
    os.utime(second, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    bench.source.symlink_to(first)


def link_turned(bench: Bench) -> None:
    cache(bench)
    turned = bench.source.with_name("turned")
    turned.symlink_to(bench.outside / "second")
    turned.replace(bench.source)


def unreadable(bench: Bench) -> None:
    bench.source.write_bytes(NEW)
    bench.source.chmod(0)


def readable(bench: Bench) -> None:
    bench.source.chmod(0o644)


def folder_unreadable(bench: Bench) -> None:
    bench.source.write_bytes(NEW)
    bench.source.parent.chmod(0)


def folder_readable(bench: Bench) -> None:
    bench.source.parent.chmod(0o755)


def becomes_a_pipe(bench: Bench) -> None:
    bench.source.unlink()
    os.mkfifo(bench.source)


def becomes_a_socket(bench: Bench) -> None:
    short = os.open(bench.source.parent, os.O_RDONLY)  # The path of a socket must not be long.
    with socket.socket(socket.AF_UNIX) as server:
        bench.source.unlink()
        server.bind(f"/proc/self/fd/{short}/{bench.source.name}")
    os.close(short)


def becomes_a_circle_of_links(bench: Bench) -> None:
    bench.source.unlink()
    bench.source.symlink_to("other.py")
    bench.source.with_name("other.py").symlink_to(bench.source.name)


def becomes_a_terabyte(bench: Bench) -> None:
    os.truncate(bench.source, 1 << 40)


def becomes_a_file(bench: Bench) -> None:
    if bench.source.is_dir():
        bench.source.rmdir()
    bench.source.unlink(missing_ok=True)
    bench.source.with_name("other.py").unlink(missing_ok=True)
    bench.source.write_bytes(NEW)


def becomes_a_directory(bench: Bench) -> None:
    bench.source.unlink()
    bench.source.mkdir()


def links_all_around(bench: Bench) -> None:
    """Links that enclose themselves, each other and the whole tree, beside an edit."""
    for name, target in (("self", "self"), ("here", "."), ("up", ".."), ("to", "fro"), ("fro", "to")):
        bench.source.with_name(name).symlink_to(target)
    unseen(NEW)(bench)


def root_gone(bench: Bench) -> None:
    bench.root.rename(bench.outside / "away")


def root_made_anew(bench: Bench) -> None:
    """Whoever still stands in the old folder stands in none now."""
    shutil.rmtree(bench.outside / "away")
    bench.fill(NEW)


def cache(bench: Bench, mode: PycInvalidationMode = TIMESTAMP) -> None:
    """Write the bytecode that another process would, from the source as it is."""
    py_compile.compile(str(bench.source), doraise=True, invalidation_mode=mode)


def cached(source: Path) -> Path:
    return Path(importlib.util.cache_from_source(str(source)))


# --- supervisors ------------------------------------------------------------------------------------------


def hooked_supervisor(folder: Path) -> Path:
    """Return a ``wa-supervisor`` that saves what is armed between its stages."""
    script = folder / "hooked.py"
    script.write_text(HOOKED, encoding="utf-8")
    return program_of(folder, [sys.executable, str(script)])


def bound_supervisor(folder: Path) -> Path | None:
    """Return a ``wa-supervisor`` that permission bits bind, whoever runs it; None where there is none."""
    if os.getuid() != 0:
        return SUPERVISOR
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        return None
    return program_of(folder, [setpriv, f"--bounding-set={_DROPPED}", str(SUPERVISOR)])


def program_of(folder: Path, words: list[str]) -> Path:
    # A shell's and not a `#!` of the interpreter, whose path may hold a space.
    path = folder / "wa-supervisor"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@contextmanager
def held_still(process: subprocess.Popen[str]) -> Iterator[None]:
    """Stop a child for a while: an edit of several steps is one to it, and it cannot be faster than we."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
