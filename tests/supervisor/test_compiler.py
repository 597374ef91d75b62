"""No stale bytecode outlives a look at the tree: other processes run what is on disk, too.

Each case has a control arm: before the purge plain Python runs the old code, else the case proves nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import py_compile
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from supervisor import bytecode, compiler, pyc
from supervisor.blobs import BlobStore
from supervisor.bytecode import BytecodeReport, CompileJob, Compiler
from supervisor.manifest import Manifest, Tree, scan
from tests.supervisor.helpers_edges import folder_for_everybody, run_git, run_unprivileged

OLD, NEW = "print('old')\n", "print('new')\n"
DEADLINE_SECONDS = 30.0


def plain_python(*arguments: str, cwd: Path, **environment: str) -> str:
    """What plain Python prints, or the last line of its error."""
    assert "PYTHONDONTWRITEBYTECODE" not in os.environ, "void: without bytecode nothing can be stale"
    child = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return (child.stdout or child.stderr).strip().splitlines()[-1]


@dataclass
class Workshop:
    """A tree and all that the compile helper needs."""

    root: Path
    blobs: BlobStore
    scratch: Path
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def tree(self) -> Tree:
        return Tree((str(self.root),))

    def manifest(self) -> Manifest:
        return scan(self.tree, None, self.blobs.put).manifest

    def start(self, before: Manifest | None = None, *, sweep: bool = False) -> CompileJob:
        return self.compiler().start(
            tree=self.tree, before=before, after=self.manifest(), sweep=sweep, now=time.monotonic()
        )

    def compiler(self) -> Compiler:
        return Compiler(
            blobs=self.blobs.blobs, scratch=self.scratch, environment=os.environ | self.environment
        )

    def compile(self, before: Manifest | None = None, *, sweep: bool = False) -> BytecodeReport:
        return finish(self.start(before, sweep=sweep))

    def write(self, name: str, text: str = OLD) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path


def finish(job: CompileJob) -> BytecodeReport:
    """Return what a helper reports, without the prints of the code."""
    while (report := job.read()) is None:
        assert select.select([job], [], [], DEADLINE_SECONDS)[0], "the helper says nothing"
    return replace(report, prints={})


@pytest.fixture
def workshop(tmp_path: Path) -> Workshop:
    for name in ("tree", "run"):
        (tmp_path / name).mkdir()
    return Workshop(tmp_path / "tree", BlobStore(tmp_path / "state"), tmp_path / "run")


def helper(sources: dict[str, str], root: Path) -> compiler.Helper:
    return compiler.Helper(sources=sources, removed=[], directories=[], roots=[str(root)])


def cached(source: Path, optimization: str = "") -> Path:
    return Path(importlib.util.cache_from_source(str(source), optimization=optimization))


def edit_unseen(source: Path) -> None:
    """Give a source new code, the size and the modification time that it had."""
    facts = source.stat()
    source.write_text(NEW, encoding="utf-8")
    os.utime(source, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert source.stat().st_size == facts.st_size


# --- the gauntlet -----------------------------------------------------------------------------------------

IMPORT = ("-c", "import m")
TIMESTAMP = py_compile.PycInvalidationMode.TIMESTAMP
CHECKED = py_compile.PycInvalidationMode.CHECKED_HASH
UNCHECKED = py_compile.PycInvalidationMode.UNCHECKED_HASH
CACHED = (str(cached(Path("m.py"))),)
NO_FILE = "[Errno 2] No such file or directory"
GONE = "ModuleNotFoundError: No module named 'm'"


@dataclass(frozen=True)
class Case:
    """One way in which plain Python comes to run old code."""

    make_stale: Callable[[Workshop, Path], None]
    run: tuple[str, ...] = IMPORT
    afterwards: str = "new"
    environment: tuple[tuple[str, str], ...] = ()


def timestamp(_: Workshop, source: Path) -> None:
    make_stale_by_time(source)


def make_stale_by_time(source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=TIMESTAMP)
    edit_unseen(source)


def optimized(_: Workshop, source: Path) -> None:
    for level in (1, 2):
        py_compile.compile(str(source), optimize=level, invalidation_mode=TIMESTAMP)
    edit_unseen(source)


def tampered(*, optimize: int, mode: py_compile.PycInvalidationMode) -> Callable[[Workshop, Path], None]:
    """Bytecode whose header is right for the source and whose code is not."""

    def make(_: Workshop, source: Path) -> None:
        compiled = py_compile.compile(str(source), optimize=optimize, invalidation_mode=mode)
        assert compiled is not None
        body = Path(compiled).read_bytes()[16:]
        edit_unseen(source)
        py_compile.compile(str(source), optimize=optimize, invalidation_mode=mode)
        Path(compiled).write_bytes(Path(compiled).read_bytes()[:16] + body)

    return make


def unchecked_hash(_: Workshop, source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=UNCHECKED)
    source.write_text(NEW, encoding="utf-8")


def unchecked_hash_under_the_prefix(workshop: Workshop, source: Path) -> None:
    prefix = workshop.root.parent / "cache"
    workshop.environment["PYTHONPYCACHEPREFIX"] = str(prefix)
    target = prefix / str(source.parent)[1:] / cached(source).name
    py_compile.compile(str(source), cfile=str(target), invalidation_mode=UNCHECKED)
    source.write_text(NEW, encoding="utf-8")


def legacy_beside_a_deleted_source(_: Workshop, source: Path) -> None:
    py_compile.compile(str(source), cfile=f"{source}c")
    source.unlink()


def orphan_in_the_cache(_: Workshop, source: Path) -> None:
    py_compile.compile(str(source))
    source.unlink()


def checked_orphan_in_the_cache(_: Workshop, source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=CHECKED)
    source.unlink()


def written_while_the_source_was_edited(_: Workshop, source: Path) -> None:
    """py_compile reads the source and then looks at its time: an edit in between makes a lasting lie."""
    with pytest.MonkeyPatch.context() as patch:
        read = SourceFileLoader.get_data

        def read_and_be_overtaken(self: SourceFileLoader, path: str) -> bytes:
            content = read(self, path)
            source.write_text(NEW, encoding="utf-8")
            return content

        patch.setattr(SourceFileLoader, "get_data", read_and_be_overtaken)
        py_compile.compile(str(source), invalidation_mode=TIMESTAMP)


GAUNTLET = {
    "same size, same mtime": Case(timestamp),
    "same size, same mtime, python -O": Case(optimized, ("-O", *IMPORT)),
    "same size, same mtime, python -OO": Case(optimized, ("-OO", *IMPORT)),
    "tampered code, right hash": Case(tampered(optimize=0, mode=CHECKED)),
    "tampered code, right hash, python -O": Case(tampered(optimize=1, mode=CHECKED), ("-O", *IMPORT)),
    "tampered code, right hash, python -OO": Case(tampered(optimize=2, mode=CHECKED), ("-OO", *IMPORT)),
    "tampered code, right time": Case(tampered(optimize=0, mode=TIMESTAMP)),
    "unchecked hash": Case(unchecked_hash),
    "unchecked hash under the prefix": Case(unchecked_hash_under_the_prefix),
    "legacy pyc of a deleted source": Case(legacy_beside_a_deleted_source, afterwards=GONE),
    "orphan in the cache": Case(orphan_in_the_cache, CACHED, afterwards=NO_FILE),
    "checked orphan in the cache": Case(checked_orphan_in_the_cache, CACHED, afterwards=NO_FILE),
    "edited while py_compile read it": Case(written_while_the_source_was_edited),
}


@pytest.mark.parametrize("sweep", [False, True])
@pytest.mark.parametrize("name", GAUNTLET)
def test_plain_python_runs_what_is_on_disk(workshop: Workshop, name: str, sweep: bool) -> None:
    case = GAUNTLET[name]
    source = workshop.write("m.py")
    before = workshop.manifest()
    case.make_stale(workshop, source)
    if plain_python(*case.run, cwd=workshop.root, **workshop.environment) != "old":
        pytest.fail("void: plain Python does not run the old code here")
    report = workshop.compile(before, sweep=sweep)
    assert report.error is None
    assert report.purged
    assert case.afterwards in plain_python(*case.run, cwd=workshop.root, **workshop.environment)


@pytest.mark.parametrize("sweep", [False, True])
def test_folder_left_with_only_a_cache_is_not_importable_any_more(workshop: Workshop, sweep: bool) -> None:
    source = workshop.write("shells/inner/m.py")
    before = workshop.manifest()
    py_compile.compile(str(source))
    source.unlink()
    run = ("-c", "import shells.inner; print('old')")
    if plain_python(*run, cwd=workshop.root) != "old":
        pytest.fail("void: plain Python does not import what is left")
    workshop.compile(before, sweep=sweep)
    assert "No module named 'shells'" in plain_python(*run, cwd=workshop.root)
    assert list(workshop.root.iterdir()) == []


def test_sources_outside_of_the_tree_are_left_as_they_are(workshop: Workshop) -> None:
    """The control of all of the above: where nobody purges, old code goes on to run."""
    source = workshop.root.parent / "elsewhere" / "m.py"
    source.parent.mkdir()
    source.write_text(OLD, encoding="utf-8")
    timestamp(workshop, source)
    workshop.compile(sweep=True)
    assert plain_python(*IMPORT, cwd=source.parent) == "old"


def test_bytecode_that_is_written_never_becomes_stale(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is edited between the helper's reading and its writing."""
    source = workshop.write("m.py")
    write = pyc.write

    def be_overtaken_and_write(*arguments: Any) -> None:
        source.write_text(NEW, encoding="utf-8")
        write(*arguments)

    monkeypatch.setattr(pyc, "write", be_overtaken_and_write)
    assert helper({str(source): str(source)}, workshop.root).run()["compiled_total"] == 1
    assert plain_python(*IMPORT, cwd=workshop.root) == "new"


# --- what is purged, and what is kept ---------------------------------------------------------------------


def test_written_bytecode_is_checked_against_the_source(workshop: Workshop) -> None:
    source = workshop.write("m.py")
    assert workshop.compile() == BytecodeReport(None, (), 1, ())
    header = cached(source).read_bytes()[:16]
    assert header[4:8] == bytes([0b11, 0, 0, 0])
    assert header[8:] == importlib.util.source_hash(source.read_bytes())
    assert workshop.compile(sweep=True).compiled_total == 0, "what is good is not written again"


def test_pyc_without_a_source_is_a_module_that_is_shipped_so(workshop: Workshop) -> None:
    source = workshop.write("shipped.py")
    py_compile.compile(str(source), cfile=f"{source}c")
    source.unlink()
    workshop.write("m.py")
    assert workshop.compile(sweep=True).purged == ()
    assert plain_python("-c", "import shipped", cwd=workshop.root) == "old"


def test_bytecode_of_another_interpreter_goes(workshop: Workshop) -> None:
    """A right hash does not make its code right, and we cannot read it; that interpreter compiles again."""
    folder = workshop.write("m.py").parent / "__pycache__"
    folder.mkdir()
    checked = b"\x01\x02\r\n" + bytes([0b11, 0, 0, 0]) + b"8 bytes." + b"code"
    (folder / "m.cpython-399.pyc").write_bytes(checked)
    assert workshop.compile().purged == (str(folder / "m.cpython-399.pyc"),)


def test_bytecode_of_a_source_that_was_not_judged_is_left(workshop: Workshop) -> None:
    """It may have come since, or may not be readable: nothing is known about it."""
    workshop.write("m.py")
    job_manifest = workshop.manifest()
    late = workshop.write("late.py")
    py_compile.compile(str(late), invalidation_mode=TIMESTAMP)
    report = compiler.Helper(
        sources={
            str(workshop.root / "m.py"): str(workshop.blobs.blobs / job_manifest.sources["m.py"]),
        },
        removed=[str(late)],
        directories=[str(workshop.root)],
        roots=[str(workshop.root)],
    ).run()
    assert (report["purged"], cached(late).exists()) == ([], True)


@pytest.mark.parametrize("content", [b"", b"\0" * 15, os.urandom(64)], ids=["empty", "short", "noise"])
def test_damaged_bytecode_is_replaced(workshop: Workshop, content: bytes) -> None:
    source = workshop.write("m.py")
    cached(source).parent.mkdir()
    cached(source).write_bytes(content)
    report = workshop.compile()
    assert (report.purged, report.compiled_total) == ((str(cached(source)),), 1)


def test_module_with_dots_in_its_name_has_its_own_bytecode(workshop: Workshop) -> None:
    """A loader by path writes ``plug.in.cpython-311.pyc``, which is no bytecode of ``plug.py``."""
    code = "from importlib.machinery import SourceFileLoader as L; exec(L('x', 'plug.in.py').get_code('x'))"
    run = ("-c", code)
    source = workshop.write("plug.in.py")
    workshop.write("plug.py", "pass")
    before = workshop.manifest()
    timestamp(workshop, source)
    if plain_python(*run, cwd=workshop.root) != "old":
        pytest.fail("void: plain Python does not run the old code here")
    workshop.compile(before)
    assert plain_python(*run, cwd=workshop.root) == "new"
    assert workshop.compile(sweep=True).purged == ()


def test_pipe_in_the_cache_stops_nobody(workshop: Workshop) -> None:
    source = workshop.write("m.py")
    cached(source).parent.mkdir()
    os.mkfifo(cached(source))
    assert workshop.compile().purged == (str(cached(source)),)


def test_folder_in_place_of_bytecode_is_reported(workshop: Workshop) -> None:
    source = workshop.write("m.py")
    cached(source).mkdir(parents=True)
    report = workshop.compile()
    assert (report.error, set(report.unwritable)) == (None, {str(cached(source))})


def test_cache_that_somebody_else_uses_is_left(workshop: Workshop) -> None:
    source = workshop.write("pack/m.py")
    before = workshop.manifest()
    py_compile.compile(str(source))
    other = source.parent / "__pycache__" / "m.nbi"
    other.touch()
    source.unlink()
    assert workshop.compile(before).unwritable == ()
    assert other.exists()


def test_root_that_was_emptied_stays(workshop: Workshop) -> None:
    source = workshop.write("m.py")
    before = workshop.manifest()
    py_compile.compile(str(source))
    source.unlink()
    workshop.compile(before)
    assert workshop.root.is_dir()


def test_nothing_is_touched_when_a_source_is_no_python(workshop: Workshop) -> None:
    good, bad = workshop.write("good.py"), workshop.write("bad.py", "def")
    py_compile.compile(str(good))
    report = workshop.compile(sweep=True)
    assert (report.purged, report.compiled_total, cached(good).exists()) == ((), 0, True)
    assert report.error == f"{bad}, line 1: invalid syntax"


# --- what cannot be written or removed --------------------------------------------------------------------

IMPORTS = """
import json, sys
from supervisor import compiler, tracked
"""
RUN = """
sources, removed = json.loads(sys.argv[1])
print(json.dumps(compiler.Helper(
    sources={path: path for path in sources}, removed=removed, directories=[], roots=[]
).run()))
"""


def run_bound(*, sources: list[Path], removed: list[Path]) -> dict[str, Any]:
    """Run the helper as somebody whom permission bits bind."""
    request = json.dumps([[str(path) for path in paths] for paths in (sources, removed)])
    report: dict[str, Any] = json.loads(run_unprivileged(IMPORTS, RUN, request))
    return report


def not_cached(source: Path) -> None:
    source.write_text(NEW, encoding="utf-8")


def rightly_cached(source: Path) -> None:
    source.write_text(f"assert __debug__, 'other code at each level'\n{NEW}", encoding="utf-8")
    py_compile.compile(str(source), invalidation_mode=TIMESTAMP)
    py_compile.compile(str(source), optimize=1, invalidation_mode=UNCHECKED)


def not_trusted(source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=TIMESTAMP)
    source.write_text(f"\n{NEW}", encoding="utf-8")


def damaged(source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=TIMESTAMP)
    cached(source).write_bytes(cached(source).read_bytes()[:10])
    source.write_text(NEW, encoding="utf-8")


def optimized_and_stale(source: Path) -> None:
    py_compile.compile(str(source), optimize=1, invalidation_mode=UNCHECKED)
    source.write_text(NEW, encoding="utf-8")


def legacy(source: Path) -> None:
    py_compile.compile(str(source), cfile=f"{source}c")
    source.write_text(NEW, encoding="utf-8")


def legacy_of_deleted(source: Path) -> None:
    legacy(source)
    source.unlink()


def orphan(source: Path) -> None:
    py_compile.compile(str(source), invalidation_mode=UNCHECKED)
    source.unlink()


def test_what_stands_is_called_stale_only_where_plain_python_runs_it() -> None:
    ways = (
        make_stale_by_time, not_cached, rightly_cached, not_trusted, damaged, optimized_and_stale, legacy,
        legacy_of_deleted, orphan,
    )  # fmt: skip
    with folder_for_everybody() as folder:
        sources = {way.__name__: folder / f"{way.__name__}.py" for way in ways}
        for way in ways:
            sources[way.__name__].write_text(OLD, encoding="utf-8")
            way(sources[way.__name__])
        for place in (folder, folder / "__pycache__"):
            place.chmod(0o555)
        there = [source for source in sources.values() if source.exists()]
        report = run_bound(sources=there, removed=[s for s in sources.values() if s not in there])
        ran = {
            str(source)
            for name, source in sources.items()
            for flags in ((), ("-O",))
            if plain_python("-B", *flags, "-c", f"import {name}", cwd=folder) == "old"
        }
        folder.chmod(0o755)
    assert ran, "void: plain Python runs the old code nowhere"
    assert set(report["stale"].values()) == ran
    assert (report["errors"], report["purged"], report["compiled_total"]) == ([], [], 0)
    assert report["stale"].keys() < set(report["unwritable"])


def test_bytecode_of_another_interpreter_that_cannot_be_removed_counts_as_stale_if_that_would_trust_it() -> (
    None
):
    with folder_for_everybody() as folder:
        source = folder / "m.py"
        source.write_text(NEW, encoding="utf-8")
        cache = folder / "__pycache__"
        cache.mkdir()
        for name, flags in (("cpython-398", 0b01), ("cpython-399", 0b11)):
            header = b"\x01\x02\r\n" + bytes([flags, 0, 0, 0])
            (cache / f"m.{name}.pyc").write_bytes(header + b"8 bytes." + b"code")
        cache.chmod(0o555)
        report = run_bound(sources=[source], removed=[])
        cache.chmod(0o755)
    assert report["stale"] == {str(cache / "m.cpython-398.pyc"): str(source)}


# --- what git tracks --------------------------------------------------------------------------------------


@pytest.fixture
def repository(workshop: Workshop) -> Workshop:
    """A workshop whose tree is a repository."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    run_git(workshop.root, "init", "--quiet")
    return workshop


def shipped(workshop: Workshop, name: str) -> Path:
    """Bytecode that takes the place of its source, as a commit brings it."""
    source = workshop.write(name)
    py_compile.compile(str(source), cfile=f"{source}c", doraise=True)
    run_git(workshop.root, "add", "--force", f"{source}c")
    source.unlink()
    return Path(f"{source}c")


@pytest.mark.parametrize("sweep", [False, True])
def test_module_that_a_commit_ships_without_source_is_kept(repository: Workshop, sweep: bool) -> None:
    source = repository.write("m.py")
    left = repository.write("left.py")
    before = repository.manifest()
    legacy_beside_a_deleted_source(repository, left)
    shipped(repository, "m.py")
    assert repository.compile(before, sweep=sweep).purged == (f"{left}c",)
    assert plain_python(*IMPORT, cwd=repository.root) == "old"
    assert run_git(repository.root, "ls-files", "--deleted") == ""
    assert not source.exists()


def test_bytecode_that_git_tracks_is_kept_beside_a_source_that_it_may_replace(repository: Workshop) -> None:
    """A checkout that deletes the source does not bring back what it takes for unchanged."""
    kept = shipped(repository, "pack/m.py")
    repository.write("pack/m.py", NEW)
    assert repository.compile(sweep=True).purged == ()
    assert kept.exists()


def test_cached_bytecode_that_git_tracks_is_kept_without_its_source_and_purged_with_it(
    repository: Workshop,
) -> None:
    source, orphan = repository.write("m.py"), repository.write("orphan.py")
    for path in (source, orphan):
        py_compile.compile(str(path), invalidation_mode=UNCHECKED)
    run_git(repository.root, "add", "--force", ".")
    before = repository.manifest()
    orphan.unlink()
    source.write_text(NEW, encoding="utf-8")
    if plain_python(*IMPORT, cwd=repository.root) != "old":
        pytest.fail("void: plain Python does not run the old code here")
    assert repository.compile(before, sweep=True).purged == (str(cached(source)),)
    assert plain_python(*IMPORT, cwd=repository.root) == "new"
    assert cached(orphan).exists()


def test_nothing_without_a_source_goes_while_the_index_is_not_understood(repository: Workshop) -> None:
    source = repository.write("m.py")
    before = repository.manifest()
    legacy_beside_a_deleted_source(repository, source)
    (repository.root / ".git" / "index").write_bytes(b"DIRC\0\0\0\x09")
    report = repository.compile(before)
    assert (report.purged, report.unwritable) == ((), (f"{source}c",))
    assert report.stale == {f"{source}c": str(source)}, "it may be shipped so; somebody has to look"


# --- the verdict ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def f(:\n", "line 1: "),
        (b"x = 1\n  y = 2\n", "line 2: unexpected indent"),
        (b"x = 1\0\n", "null bytes"),
        (b"# coding: martian\n", "martian"),
        (b"\xff\xfe\n", "utf-8"),
        (b"\xef\xbb\xbf# coding: latin-1\n", "encoding problem"),
        (b"x = " + b"(" * 500 + b")" * 500, "too many nested parentheses"),
        (b"x = " + b"-" * 100_000 + b"1", "Error: |memory"),
        (b"return 1\n", "'return' outside function"),
    ],
    ids=["syntax", "indent", "null", "coding", "utf8", "bom", "parentheses", "deep", "return"],
)
def test_source_that_is_no_python_is_rejected_with_its_place(
    workshop: Workshop, content: bytes, message: str
) -> None:
    (workshop.root / "m.py").write_bytes(content)
    error = workshop.compile().error
    assert error is not None
    assert error.startswith(f"{workshop.root}/m.py")
    assert any(part in error for part in message.split("|"))


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbfx = 1\n", b"# coding: latin-1\nx = '\xe9'\n"])
def test_unusual_source_that_is_python_is_accepted(workshop: Workshop, content: bytes) -> None:
    (workshop.root / "m.py").write_bytes(content)
    assert workshop.compile() == BytecodeReport(None, (), 1, ())


def test_several_errors_are_counted(workshop: Workshop) -> None:
    for name in ("a.py", "b.py", "c.py"):
        workshop.write(name, "def")
    assert str(workshop.compile().error).endswith("(and 2 more)")


def test_verdict_is_about_the_pinned_bytes(workshop: Workshop) -> None:
    """The disk is broken by the time the helper runs: the next manifest's matter."""
    source = workshop.write("m.py")
    after = workshop.manifest()
    source.write_text("def", encoding="utf-8")
    request = {str(source): str(workshop.blobs.blobs / after.sources["m.py"])}
    assert helper(request, workshop.root).run()["errors"] == []
    assert "SyntaxError" in plain_python(*IMPORT, cwd=workshop.root), "and bytecode is of its own source"


def test_missing_blob_is_an_error_and_no_crash(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.write("m.py")
    digest = workshop.manifest().sources["m.py"]
    monkeypatch.setattr(workshop.blobs, "put", lambda _: digest)
    (workshop.blobs.blobs / digest).unlink()
    report = workshop.compile()
    assert "its pinned bytes" in str(report.error)


def test_name_that_is_no_utf8_is_compiled(workshop: Workshop) -> None:
    (workshop.root / os.fsdecode(b"caf\xe9.py")).write_text(OLD, encoding="utf-8")
    assert workshop.compile() == BytecodeReport(None, (), 1, ())


# --- limits of the helper ---------------------------------------------------------------------------------


def test_source_that_takes_too_much_memory_is_rejected(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bytecode, "MEMORY_BYTES", 64 * 1024**2)
    workshop.write("m.py", "x = [" + "".join(f"'{number}'," for number in range(200_000)) + "]")
    assert workshop.compile().error == f"{workshop.root}/m.py: compiling it takes more memory than it may"


def test_source_that_takes_too_long_is_rejected(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bytecode, "DEADLINE_SECONDS", 1.0)
    workshop.write(
        "m.py", "".join(f"def f{n}(a, b):\n    return [a for a in b if a]\n" for n in range(60_000))
    )
    why = "compiling the tree took more than 1 s of processor time"
    assert workshop.compile().error == f"{workshop.root}/m.py: {why}"


def test_helper_that_is_killed_is_a_rejection(workshop: Workshop) -> None:
    workshop.write("m.py", "".join(f"def f{n}(): pass\n" for n in range(50_000)))
    job = workshop.start()
    assert not isinstance(job._process, str)
    job._process.send_signal(signal.SIGKILL)
    assert str(finish(job).error).endswith("the compile helper ended by signal SIGKILL before it was done")


def test_helper_says_which_source_it_is_at_and_when_it_is_through_with_them(workshop: Workshop) -> None:
    said: list[str] = []
    sources = {str(path): str(path) for path in (workshop.write("a.py"), workshop.write("b.py"))}
    compiler.Helper(sources=sources, removed=[], directories=[], roots=[], at=said.append).run()
    assert said == [*sources, ""]


def test_helper_whose_time_is_up_names_the_source_that_it_was_at(tmp_path: Path) -> None:
    request = tmp_path / "request"
    request.write_bytes(b"/tree/m.py\0and what is left of the request")
    reader, writer = os.pipe()
    process = subprocess.Popen(["sleep", "60"], stdout=writer)  # noqa: S607 -- where the system has it
    os.close(writer)
    report = CompileJob(process, reader, request, 0.0).expire()
    assert report.error == "/tree/m.py: the compile helper was not done after 120 s"
    assert (process.returncode, request.exists()) == (-signal.SIGKILL, False)


def test_cancelled_helper_is_gone_at_once_and_leaves_no_request(workshop: Workshop) -> None:
    workshop.write("m.py", "".join(f"def f{n}(): pass\n" for n in range(50_000)))
    job = workshop.start()
    assert not isinstance(job._process, str)
    assert list(workshop.scratch.iterdir()) != []
    job.cancel()
    assert job._process.returncode == -signal.SIGKILL
    assert list(workshop.scratch.iterdir()) == []


def test_helper_that_cannot_be_started_is_a_rejection(workshop: Workshop) -> None:
    workshop.write("m.py")
    workshop.scratch.rmdir()
    job = workshop.start()
    assert finish(job).error == "the compile helper could not be started: No such file or directory"


def test_helper_imports_nothing_of_the_tree(workshop: Workshop) -> None:
    for name in ("json.py", "py_compile.py", "sitecustomize.py"):
        workshop.write(name, "raise SystemExit('imported from the tree')")
    workshop.environment |= {
        "PYTHONPATH": str(workshop.root),
        "PYTHONSTARTUP": "x",
        "PYTHONWARNINGS": "error",
    }
    assert workshop.compile() == BytecodeReport(None, (), 3, ())
