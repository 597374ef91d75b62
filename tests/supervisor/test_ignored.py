"""What the owner has left out of the tree: not pinned, not purged, not reloaded for, and importable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.child.ignored import is_ignored
from supervisor.manifest import Tree, scan
from supervisor.watch import Watcher
from tests.supervisor.harness import Supervised, history, until

Supervise = Callable[..., Supervised]

LIVE = r"reload \(\w+\): live"

FILES = (
    "main.py",
    "tests/test_main.py",
    "pack/__init__.py",
    "pack/gen_a.py",
    "pack/tests/deep/x.py",
    "pack/plugins/third/x.py",
    "pack/plugins/ours/y.py",
    "pack/testsuite.py",
)


@pytest.mark.parametrize(
    ("patterns", "left_out"),
    [
        (("tests",), {"tests/test_main.py", "pack/tests/deep/x.py"}),
        (("gen_*.py",), {"pack/gen_a.py"}),
        (("pack/plugins",), {"pack/plugins/third/x.py", "pack/plugins/ours/y.py"}),
        (("plugins/third",), set()),
        (("pack/plugins/third",), {"pack/plugins/third/x.py"}),
        (("*/third",), {"pack/plugins/third/x.py"}),
        (("pack/*.py",), {p for p in FILES if p.startswith("pack/")}),
        (("test*",), {"tests/test_main.py", "pack/tests/deep/x.py", "pack/testsuite.py"}),
        (("TESTS", "Pack"), set()),
        (("x.py", "y.py"), {"pack/tests/deep/x.py", "pack/plugins/third/x.py", "pack/plugins/ours/y.py"}),
        (("[mt]*", "pack/[!p]*"), set(FILES) - {"pack/plugins/ours/y.py"}),
        ((), set()),
    ],
)
def test_patterns_leave_out_the_same_in_a_scan_and_for_a_path(
    tmp_path: Path, patterns: tuple[str, ...], left_out: set[str]
) -> None:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    tree = Tree((str(tmp_path),), patterns)
    assert set(FILES) - scan(tree, None, lambda _: "x").manifest.sources.keys() == left_out
    assert {name for name in FILES if is_ignored(patterns, name)} == left_out
    assert {name for name in FILES if tree.ignores(str(tmp_path / name))} == left_out


def test_paths_are_relative_to_what_several_roots_have_in_common(tmp_path: Path) -> None:
    for name in ("a/x.py", "a/y.py", "b/x.py", "c/z.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    tree = Tree(tuple(str(tmp_path / name) for name in "abc"), ("a/x.py", "c"))
    assert scan(tree, None, lambda _: "x").manifest.sources.keys() == {"a/y.py", "b/x.py"}


def test_nobody_is_woken_for_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    watcher = Watcher(Tree((str(tmp_path),), ("build", "gen_*")), lambda: None, tmp_path / "canary")
    watcher.start()
    try:
        for name in ("build/a.py", "gen_b.py", "c.py"):
            (tmp_path / name).touch()
        seen: set[str] = set()

        def hints() -> set[str]:
            seen.update(hint.path for hint in watcher.take())
            return seen

        until(lambda: str(tmp_path / "c.py") in hints())
    finally:
        watcher.close()
    assert {Path(path).name for path in seen} <= {"c.py", tmp_path.name}


MAIN = """\
import sys, time
sys.path.insert(0, "modules")
import answer, gen_table, extra, extra.part, space.one
print("serving", answer.VALUE, gen_table.VALUE, extra.part.VALUE, space.one.VALUE, flush=True)
while True:
    time.sleep(60)
"""


def test_what_is_left_out_is_imported_as_usual_and_nothing_follows_from_it(
    supervise: Supervise, tree: Path
) -> None:
    modules = tree / "modules"
    (tree / "main.py").write_text(MAIN, encoding="utf-8")
    for name in ("gen_table.py", "extra/__init__.py", "extra/part.py", "space/one.py"):
        (modules / name).parent.mkdir(exist_ok=True)
        (modules / name).write_text("VALUE = 1\n", encoding="utf-8")
    kept = modules / "__pycache__" / "gen_gone.cpython-311.pyc"
    purged = modules / "__pycache__" / "gone.cpython-311.pyc"
    kept.parent.mkdir()
    kept.touch()
    purged.touch()
    patterns = ("--ignore=gen_*", "--ignore=modules/extra", "--ignore", "space/")
    started = supervise(*patterns, "main.py", cwd=tree)
    started.expect("^serving 1 1 1 1$")
    started.expect(LIVE)
    assert (kept.exists(), purged.exists()) == (True, False)
    proof = started.command("verify", "--json")
    assert proof.returncode == 0, proof.stdout + proof.stderr
    paths = {module["path"] for module in json.loads(proof.stdout)["modules"]}
    assert paths == {"main.py", "modules/answer.py"}
    (modules / "gen_table.py").write_text("VALUE = (\n", encoding="utf-8")
    (modules / "extra" / "part.py").write_text("VALUE = 20\n", encoding="utf-8")
    (modules / "gen_table.py").write_text("VALUE = 20\n", encoding="utf-8")
    assert started.reload()["outcome"] == "unchanged"
    (modules / "answer.py").write_text("VALUE = 20\n", encoding="utf-8")
    started.expect("^serving 20 20 20 1$")
    started.expect(LIVE)
    record = history(started)[0]
    assert (record["outcome"], record["paths"]) == ("live", ["modules/answer.py"])


LATE = """\
import importlib, os, sys, time
sys.path.insert(0, "modules")
import answer
print("serving", flush=True)
while not os.path.exists("modules/gen_new.py"):
    time.sleep(0.01)
importlib.invalidate_caches()
import gen_new
try:
    import stray
except ImportError:
    print("found gen_new, not stray", flush=True)
while True:
    time.sleep(60)
"""


def test_lazy_import_finds_what_is_left_out_and_no_other_new_file(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text(LATE, encoding="utf-8")
    started = supervise("--ignore=gen_*", "--quiet=5", "main.py", cwd=tree)
    started.expect("^serving$")
    started.expect(LIVE)
    (tree / "modules" / "stray.py").touch()
    (tree / "modules" / "gen_new.py").touch()
    started.expect("^found gen_new, not stray$")
