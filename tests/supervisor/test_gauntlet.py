"""The gauntlet: every known way to have old code run after an edit, and what must run in its place.

One table, two drivers. ``test_stage_by_stage`` calls the stages itself (scan, compile helper, a generation)
and is fast; ``test_supervised`` edits the tree of a real ``wa-supervisor run``. Whatever the row, what runs
is what is on disk, ``verify`` says so, and a plain ``python3 main.py`` over the same tree runs it, too; or
the reload is rejected for the reason the row names, the old code serves and ``verify`` exits 3.

A row with ``stale`` is about bytecode and carries its control arm: before our reload, plain Python must run
that old code, or the row proves nothing and fails as void. The supervisor is held still meanwhile, it would
be faster.

A new way to have old code run is a new row first.
"""

from __future__ import annotations

import json
import os
import re
import select
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from supervisor import launch, verify
from supervisor.blobs import BlobStore
from supervisor.bytecode import Compiler
from supervisor.errors import SourceError
from supervisor.launch import LaunchRequest
from supervisor.manifest import Manifest, Snapshot, Tree, scan
from supervisor.settings import Target
from tests.supervisor import harness
from tests.supervisor import helpers_gauntlet as by
from tests.supervisor.harness import Supervised
from tests.supervisor.helpers_gauntlet import Bench, Edit

DEADLINE_SECONDS = 15.0
EXIT_DIFFERS = 3
LIVE = r"reload \(\w+\): live"

Stage = Literal["hashed", "compiled", "importing"]
Reason = Literal["syntax", "import"]


@dataclass(frozen=True)
class Step:
    """One edit and what must follow.

    Attributes:
        edit: what is done to the tree.
        runs: what must run afterwards.
        stale: what plain Python must run before the reload; None if the row is not about bytecode.
        rejected: why there must be no reload; then ``runs`` is what goes on to run, and ``verify`` exits 3.
        says: what the sentence about the rejection must hold.
        overtaken: the stage after which (``importing``: during which) another edit follows, whose version
            must run.
    """

    edit: Edit
    runs: str = "new"
    stale: str | None = None
    rejected: Reason | None = None
    says: str = ""
    overtaken: Stage | None = None


@dataclass(frozen=True)
class Row:
    """One way in which old code might run.

    Attributes:
        name: of the row.
        steps: what happens, in order.
        prepare: what the tree needs before anybody looks at it.
        environment: of the supervisor, its children and plain Python.
        arguments: of the supervisor.
        flags: of plain Python.
        bound: permission bits must bind, so the stages cannot run in a test process that may be root's; the
            row has only its supervised driver.
    """

    name: str
    steps: tuple[Step, ...]
    prepare: Edit = lambda _: None
    environment: tuple[tuple[str, str], ...] = ()
    arguments: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    bound: bool = False


def unseen(name: str, old: bytes, new: bytes, runs: str, *, stale: str) -> Row:
    """Return the row of a source whose size and time stay, in one way to write it down."""
    return Row(name, (Step(by.unseen(new), runs, stale),), prepare=by.writes(old))


def rejected(name: str, content: bytes, says: str) -> Row:
    """Return the row of a source that is no Python; what is right again runs again."""
    broken = Step(by.writes(content), "old", rejected="syntax", says=says)
    return Row(name, (broken, Step(by.writes(by.NEW))))


def refused(name: str, edit: Edit, says: str) -> Row:
    """Return the row of something that is no file that could be read; what takes its place runs."""
    return Row(name, (Step(edit, "old", rejected="import", says=says), Step(by.becomes_a_file)))


def table(word: str) -> bytes:
    """Return a source with five megabytes of data."""
    rows = b"".join(b"    '%05d %s',\n" % (number, b"x" * 1010) for number in range(5000))
    return b"TABLE = [\n" + rows + b"]\n" + by.value(word)


LATIN = "# -*- coding: latin-1 -*-\n"
CACHE_ELSEWHERE = (("PYTHONPYCACHEPREFIX", "{outside}/cache"),)
SCANNED = ("--scan-interval=0.1",)  # No event tells of an edit outside the tree, or of a mode.

GAUNTLET = (
    Row("same size in the same second", (Step(by.in_the_same_second, stale="old"),)),
    Row("mtime restored", (Step(by.unseen(by.NEW), stale="old"),)),
    Row("mtime goes back", (Step(by.back_in_time),)),
    Row("planted unchecked hash", (Step(by.planted(by.NEW), stale="old"),)),
    Row("tampered code, right time and size", (Step(by.tampered(by.TIMESTAMP), stale="old"),)),
    Row("tampered code, right hash", (Step(by.tampered(by.CHECKED), stale="old"),)),
    Row("python -O, unchecked hash", (Step(by.tampered(by.UNCHECKED, 1), stale="old"),), flags=("-O",)),
    Row("python -O, tampered code", (Step(by.tampered(by.CHECKED, 1), stale="old"),), flags=("-O",)),
    Row("python -OO, tampered code", (Step(by.tampered(by.CHECKED, 2), stale="old"),), flags=("-OO",)),
    Row(
        "PYTHONOPTIMIZE, tampered code",
        (Step(by.tampered(by.CHECKED, 1), stale="old"),),
        environment=(("PYTHONOPTIMIZE", "1"),),
    ),
    Row("edited while py_compile read it", (Step(by.overtaken_py_compile, stale="old"),)),
    Row(
        "cache elsewhere, unchecked hash",
        (Step(by.under_the_prefix(by.UNCHECKED), stale="old"),),
        environment=CACHE_ELSEWHERE,
    ),
    Row(
        "cache elsewhere, tampered code",
        (Step(by.under_the_prefix(by.CHECKED), stale="old"),),
        environment=CACHE_ELSEWHERE,
    ),
    Row("legacy bytecode", (Step(by.deleted_beside_legacy_bytecode, "gone", stale="old"),)),
    Row("source deleted", (Step(by.deleted, "gone"), Step(by.writes(by.NEW)))),
    Row(
        "package and back",
        (Step(by.becomes_a_package, "package"), Step(by.becomes_a_module_again, "back", stale="package")),
    ),
    Row(
        "package left with bytecode alone",
        (
            Step(by.becomes_a_package, "package"),
            Step(by.package_left_with_bytecode_alone, "gone", stale="empty"),
        ),
    ),
    Row("atomic save", (Step(by.renamed_over, stale="old"),)),
    Row(
        "truncate, then write",
        (
            Step(by.truncated_and_half_written, "old", rejected="syntax", says="unterminated string"),
            Step(by.written_to_its_end),
        ),
    ),
    Row("edit between hash and compile", (Step(by.writes(by.MIDDLE), "newest", overtaken="hashed"),)),
    Row("edit between compile and import", (Step(by.writes(by.MIDDLE), "newest", overtaken="compiled"),)),
    Row("edit while the child imports", (Step(by.writes(by.WAITING), "newest", overtaken="importing"),)),
    Row(
        "target of a link edited",
        (Step(by.unseen(by.NEW), stale="old"),),
        prepare=by.linked,
        arguments=SCANNED,
    ),
    Row("link turned", (Step(by.link_turned, stale="old"),), prepare=by.linked),
    unseen("beyond ASCII", by.value("dû"), by.value("dö"), r"d\xf6", stale=r"d\xfb"),
    unseen(
        "PEP 263",
        f"{LATIN}VALUE = 'dû'\n".encode("latin-1"),
        f"{LATIN}VALUE = 'dö'\n".encode("latin-1"),
        r"d\xf6",
        stale=r"d\xfb",
    ),
    unseen("byte order mark", b"\xef\xbb\xbf" + by.OLD, b"\xef\xbb\xbf" + by.NEW, "new", stale="old"),
    unseen("CRLF", b"VALUE = 'old'\r\n", b"VALUE = 'new'\r\n", "new", stale="old"),
    unseen("5 MB of data", table("old"), table("new"), "new", stale="old"),
    Row("0 bytes", (Step(by.planted(b""), "empty", stale="old"), Step(by.writes(by.NEW)))),
    Row(
        "no permission to read",
        (
            Step(by.unreadable, "old", rejected="import", says="Permission denied"),
            Step(by.readable),
        ),
        arguments=SCANNED,
        bound=True,
    ),
    Row(
        "folder without permission",
        (
            Step(by.folder_unreadable, "old", rejected="import", says="answer.py: Permission denied"),
            Step(by.folder_readable),
        ),
        arguments=SCANNED,
        environment=CACHE_ELSEWHERE,
        bound=True,
    ),
    refused("pipe in place of a source", by.becomes_a_pipe, "answer.py: it is not a regular file"),
    refused("socket in place of a source", by.becomes_a_socket, "answer.py: it is not a regular file"),
    refused("directory in place of a source", by.becomes_a_directory, "answer.py: it is not a regular file"),
    refused("links in a circle", by.becomes_a_circle_of_links, ".py: Too many levels of symbolic links"),
    refused("huge file", by.becomes_a_terabyte, f"answer.py: it has {1 << 40} bytes"),
    Row("links that enclose themselves", (Step(by.links_all_around, stale="old"),)),
    Row(
        "root gone and made anew",
        (
            Step(by.root_gone, "old", rejected="import", says="tree: No such file or directory"),
            Step(by.root_made_anew),
        ),
        arguments=SCANNED,
        environment=CACHE_ELSEWHERE,  # Nothing of it may be purged.
    ),
    rejected("syntax error", b"VALUE = = 'new'\n", "answer.py, line 1: invalid syntax"),
    rejected("undecodable", b"VALUE = '\xff\xfe'\n", "answer.py"),
    rejected("binary", b"\x7fELF\x02\x01\x01\0\0\0\0\0", "answer.py"),
)


def rows(*, bound: bool) -> list[object]:
    """Return the table for a driver, with or without the rows that need permission bits that bind."""
    return [pytest.param(row, id=row.name) for row in GAUNTLET if bound or not row.bound]


def control_arm(bench: Bench, step: Step) -> None:
    """Make sure that plain Python is fooled, if the row says that it is."""
    if step.stale is not None and (ran := bench.plain()) != step.stale:
        pytest.fail(f"void: plain Python runs {ran!r} here and not the stale {step.stale!r}")


# --- the stages, one by one -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What one generation did.

    Attributes:
        said: the version that it got.
        verdict: on its attestation, against what was on disk when it had spoken.
    """

    said: str
    verdict: verify.Verdict


class Stages:
    """The stages over one tree, called by hand; each look at the tree begins with what the last one left."""

    def __init__(self, bench: Bench, folder: Path) -> None:
        self._bench = bench
        self._tree = Tree((str(bench.root),))
        self._blobs = BlobStore(folder / "state")
        self._scratch = folder / "run"
        self._scratch.mkdir()
        self._said = folder / "said"
        os.mkfifo(self._said)
        self._snapshot: Snapshot | None = None
        self._compiled: Manifest | None = None
        self._prints: dict[str, dict[str, str]] = {}

    def look(self) -> Manifest:
        """Stage *manifest*."""
        self._snapshot = scan(self._tree, self._snapshot, self._blobs.put)
        return self._snapshot.manifest

    def compile(self, manifest: Manifest) -> str | None:
        """Stage *bytecode*; return why it was rejected."""
        compiler = Compiler(
            blobs=self._blobs.blobs,
            scratch=self._scratch,
            environment=os.environ | self._bench.environment,
        )
        job = compiler.start(
            tree=self._tree,
            before=self._compiled,
            after=manifest,
            sweep=self._compiled is None,
            now=time.monotonic(),
        )
        while (report := job.read()) is None:
            assert select.select([job], [], [], DEADLINE_SECONDS)[0], "the helper says nothing"
        if report.error is None:
            self._compiled = manifest
            for path, digest in manifest.sources.items():
                prints = report.prints.get(manifest.absolute(path))
                self._prints |= {digest: dict(prints)} if prints is not None else {}
        return report.error

    def run(self, manifest: Manifest, importing: Callable[[], None] | None = None) -> Ran:
        """Stages *launch* and *verify*; ``importing`` is called while the child imports."""
        request = LaunchRequest(
            generation=1,
            tree=manifest.digest,
            manifest=self._blobs.put_manifest(manifest),
            blobs=self._blobs.blobs,
            target=Target("script", "main.py"),
            environment=os.environ
            | self._bench.environment
            | {"WA_GENERATION": "1", "GAUNTLET_SAID": str(self._said)},
            directory=self._bench.root,
        )
        said = os.open(self._said, os.O_RDONLY | os.O_NONBLOCK)
        child = launch.launch(request)
        try:
            child.send({"type": "go"})
            if importing is not None:
                importing()
            assert select.select([said], [], [], DEADLINE_SECONDS)[0], "the child says nothing"
            word = os.read(said, 100).decode()
            child.send({"type": "attest", "nonce": "n"})
            attestation = verify.parse(_attestation(child))
            return Ran(word, verify.compare(manifest, self.look(), attestation, self._prints))
        finally:
            os.close(said)
            child.kill_group()
            launch.reap(child)


def _attestation(child: launch.Child) -> dict[str, object]:
    while select.select([child.channel], [], [], DEADLINE_SECONDS)[0]:
        for frame in child.receive():
            if frame["type"] == "attestation":
                return frame
    pytest.fail("no attestation")


@pytest.mark.parametrize("row", rows(bound=False))
def test_stage_by_stage(row: Row, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.make(tmp_path, dict(row.environment), row.flags)
    row.prepare(bench)
    monkeypatch.chdir(bench.root)
    stages = Stages(bench, tmp_path)
    stages.compile(stages.look())
    for step in row.steps:
        step.edit(bench)
        control_arm(bench, step)
        if step.rejected is not None:
            assert step.says in _rejection(stages, step.rejected)
        elif step.overtaken is not None:
            _be_overtaken(stages, bench, step.overtaken)
        if step.rejected is None:
            found = stages.look()
            assert stages.compile(found) is None
            ran = stages.run(found)
            assert (ran.said, ran.verdict.problem, ran.verdict.on_disk) == (step.runs, None, True)
            assert bench.everywhere() == {step.runs}


def _rejection(stages: Stages, reason: Reason) -> str:
    if reason == "import":
        with pytest.raises(SourceError) as caught:
            stages.look()
        return str(caught.value)
    return str(stages.compile(stages.look()))


def _be_overtaken(stages: Stages, bench: Bench, when: Stage) -> None:
    """The generation that was overtaken runs what it was started from and is known not to be on disk."""
    manifest = stages.look()
    if when == "hashed":
        bench.overtake()
    assert stages.compile(manifest) is None
    if when == "compiled":
        bench.overtake()

    def while_importing() -> None:
        gate = os.open(bench.gate, os.O_WRONLY)  # Waits for the child to be at it.
        bench.overtake()
        os.close(gate)

    ran = stages.run(manifest, while_importing if when == "importing" else None)
    assert (ran.said, ran.verdict.problem, ran.verdict.on_disk) == ("middle", None, False)


# --- the whole supervisor ---------------------------------------------------------------------------------


@pytest.fixture
def supervise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, not_checked: Callable[[str], None]
) -> Iterator[Callable[[Row, Bench], Supervised]]:
    """Start the supervisor that a row needs."""
    with ExitStack() as stack:

        def start(row: Row, bench: Bench) -> Supervised:
            command: Path | None = harness.SUPERVISOR
            if row.bound:
                command = by.bound_supervisor(tmp_path)
            elif any(step.overtaken for step in row.steps):
                command = by.hooked_supervisor(tmp_path)
            if command is None:
                not_checked(f"{row.name}: root reads everything, and there is no setpriv")
                pytest.skip("root reads everything, and there is no setpriv")
            monkeypatch.setattr(harness, "SUPERVISOR", command)
            started = Supervised(tmp_path, [*row.arguments, "main.py"], bench.root, bench.environment)
            stack.callback(started.end)
            return started

        yield start


@pytest.mark.parametrize("row", rows(bound=True))
def test_supervised(row: Row, tmp_path: Path, supervise: Callable[[Row, Bench], Supervised]) -> None:
    bench = Bench.make(tmp_path, dict(row.environment), row.flags)
    row.prepare(bench)
    started = supervise(row, bench)
    started.expect("running ")
    started.expect(LIVE)
    for step in row.steps:
        before, bytecode_before = list(started.output.lines), _content(bench.bytecode)
        if step.overtaken in {"hashed", "compiled"}:
            (bench.armed / step.overtaken).write_bytes(by.NEWEST)
        with by.held_still(started.process):
            step.edit(bench)
            control_arm(bench, step)
        if step.rejected is not None:
            sentence = started.expect(rf"reload \(\w+\): rejected \({step.rejected}\).*").group()
            assert step.says in sentence
            assert not [line for line in started.output.lines[len(before) :] if line.startswith("running ")]
            _assert_rejected(started, step)
            assert bench.bytecode.read_bytes() == bytecode_before, "nothing of it was purged"
        else:
            _expect_live(started, bench, step)
            assert bench.everywhere() == {step.runs}
        verified = started.command("verify", "--json")
        assert verified.returncode == (EXIT_DIFFERS if step.rejected else 0), verified.stderr
        assert json.loads(verified.stdout)["in_sync"] is (step.rejected is None)


def _expect_live(started: Supervised, bench: Bench, step: Step) -> None:
    if step.overtaken == "importing":
        gate = os.open(bench.gate, os.O_WRONLY)  # Waits for the child to be at it.
        bench.overtake()
        started.expect(rf"^running {step.runs}$")
        os.close(gate)
    else:
        started.expect("^running " + step.runs.replace("\\", r"\\") + "$")
    started.expect(LIVE)
    assert "running middle" not in started.output.lines, "what was overtaken never ran"


def _assert_rejected(started: Supervised, step: Step) -> None:
    """Status, metrics and the command line say the same as the log."""
    status = started.status()
    last = status["last_reload"]
    assert (last["outcome"], last["reason"], status["in_sync"]) == ("rejected", step.rejected, False)
    assert step.says in last["detail"]
    assert step.says in status["reason"]
    with urllib.request.urlopen(f"http://{status['listen']}/metrics") as answer:
        series = answer.read().decode()
    counted = re.findall(r'_reloads_total{outcome="rejected",trigger="(\w+)"} [1-9]', series)
    assert last["trigger"] in counted


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
