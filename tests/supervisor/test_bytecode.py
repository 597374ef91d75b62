"""What other processes may run stale is said in log, status and metric, and is taken back when it is gone."""

from __future__ import annotations

import os
import py_compile
import select
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from importlib.util import cache_from_source
from pathlib import Path
from py_compile import PycInvalidationMode

import pytest

from supervisor.blobs import BlobStore
from supervisor.bytecode import CompileJob, Compiler
from supervisor.checkout import Checkout
from supervisor.manifest import Manifest, Tree
from supervisor.pipeline import Pipeline
from supervisor.reload import Reload
from supervisor.watch import Hint
from tests.supervisor import harness
from tests.supervisor.harness import DEADLINE_SECONDS, Supervised
from tests.supervisor.helpers_gauntlet import bound_supervisor

LIVE = r"reload \(\w+\): live"


def plain(tree: Path) -> str:
    """What plain Python imports; it leaves the bytecode as it is."""
    code = "import sys; sys.path.insert(0, 'modules'); import answer; print(answer.VALUE)"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tree, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def metrics(started: Supervised) -> list[str]:
    with urllib.request.urlopen(f"http://{started.status()['listen']}/metrics") as answer:
        exported: bytes = answer.read()
    return exported.decode().splitlines()


@pytest.fixture
def bound(
    tmp_path: Path,
    supervise: Callable[..., Supervised],
    monkeypatch: pytest.MonkeyPatch,
    not_checked: Callable[[str], None],
) -> Callable[..., Supervised]:
    """Start supervisors that permission bits bind."""
    command = bound_supervisor(tmp_path)
    if command is None:
        not_checked("a folder that may not be written: root writes everywhere, and there is no setpriv")
        pytest.skip("root writes everywhere, and there is no setpriv")
    monkeypatch.setattr(harness, "SUPERVISOR", command)
    return supervise


def test_stale_bytecode_that_cannot_be_removed_is_named_until_it_is_gone(
    tree: Path, bound: Callable[..., Supervised]
) -> None:
    answer, right = tree / "modules" / "answer.py", tree / "modules" / "right.py"
    right.touch()
    for source in (answer, right):
        py_compile.compile(str(source), doraise=True, invalidation_mode=PycInvalidationMode.TIMESTAMP)
    facts = answer.stat()
    answer.write_text("VALUE = 2\n", encoding="utf-8")
    os.utime(answer, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    if plain(tree) != "1":
        pytest.fail("void: plain Python does not run the old code here")
    stale = [cache_from_source(str(answer))]
    (tree / "modules" / "__pycache__").chmod(0o555)

    started = bound("main.py", cwd=tree)
    started.expect(rf"OTHER processes may run stale code \(ours cannot\): {stale[0]}$")
    started.expect("serving 2")
    started.expect(LIVE)
    facts_now = started.status()["bytecode"]
    assert (facts_now["writable"], facts_now["stale"], facts_now["stale_total"]) == (False, stale, 1)
    assert "wa_supervisor_bytecode_writable 0.0" in metrics(started)
    assert "not writable: 1 stale file(s) that other processes may run" in started.command("status").stdout

    (tree / "elsewhere.py").touch()
    started.expect(LIVE)
    assert started.status()["bytecode"]["stale"] == stale, "a reload that is not about it does not forget it"
    assert plain(tree) == "1"

    (tree / "modules" / "__pycache__").chmod(0o755)
    (tree / "somewhere.py").touch()
    started.expect(LIVE)
    facts_now = started.status()["bytecode"]
    assert (facts_now["stale"], facts_now["purged"], facts_now["purged_total"]) == ([], stale, 1)
    assert plain(tree) == "2"
    assert not facts_now["writable"], "there may be other places, only a sweep looks at all"

    assert started.reload()["outcome"] == "unchanged"
    assert started.status()["bytecode"]["writable"]
    assert "wa_supervisor_bytecode_writable 1.0" in metrics(started)


def test_folder_that_cannot_be_written_and_holds_nothing_stale_is_not_called_stale(
    tree: Path, bound: Callable[..., Supervised]
) -> None:
    (tree / "modules").chmod(0o555)
    started = bound("main.py", cwd=tree)
    started.expect(r"bytecode is not writable; none of it is stale: .*answer\.cpython-\d+\.pyc$")
    started.expect(LIVE)
    (tree / "modules").chmod(0o755)
    document = started.status()["bytecode"]
    assert document == {"writable": False, "stale": [], "stale_total": 0, "purged": [], "purged_total": 0}
    assert "wa_supervisor_bytecode_writable 0.0" in metrics(started)


def test_what_an_interrupted_helper_left_is_cleared_away_by_the_next_one(tmp_path: Path, tree: Path) -> None:
    ended: list[Reload] = []
    (tmp_path / "run").mkdir()
    blobs = BlobStore(tmp_path / "state")
    pipeline = Pipeline(
        tree=Tree((str(tree),)),
        blobs=blobs,
        compiler=Compiler(blobs=blobs.blobs, scratch=tmp_path / "run", environment=os.environ),
        repository=Checkout(Tree((str(tree),))),
        quiet_seconds=0.0,
        rehash_seconds=300.0,
        finished=ended.append,
    )

    def look(live: Manifest | None, *changed: Path) -> CompileJob | None:
        """Go on until there is a helper and it has done its work, if there is to be one."""
        pipeline.hint([Hint(str(path), finished=True) for path in changed], 0.0)
        pipeline.advance(0.0, live=live, candidate=None)
        if pipeline.job is not None:
            assert select.select([pipeline.job], [], [], DEADLINE_SECONDS)[0], "the helper says nothing"
        return pipeline.job

    def built(job: CompileJob | None) -> Manifest:
        assert job is not None
        while (report := job.read()) is None:
            assert select.select([job], [], [], DEADLINE_SECONDS)[0], "the helper does not end"
        built = pipeline.compiled(report, 0.0)
        assert built is not None
        return built.manifest

    live = built(look(None, tree / "main.py"))
    new = tree / "pack" / "new.py"
    new.parent.mkdir()
    new.touch()
    look(live, new)
    assert Path(cache_from_source(str(new))).exists()
    new.unlink()
    assert look(live, new) is None
    assert [reload.outcome for reload in ended] == ["superseded", "unchanged"]
    assert list(new.parent.iterdir()) != [], "void: the helper was stopped before it had left anything"
    (tree / "main.py").write_text("pass\n", encoding="utf-8")
    built(look(live, tree / "main.py"))
    assert not new.parent.exists()
