"""Branches that come and go under a running service: never a mixture, never down, always the right commit."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supervisor.blobs import BlobStore
from supervisor.manifest import Tree, scan
from tests.supervisor.harness import SOAK, Supervised, history, until
from tests.supervisor.helpers_edges import run_git

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

Supervise = Callable[..., Supervised]

CHECKOUTS = 200 if SOAK else 24
MODULES = 40
GOOD, BAD = ("one", "two"), ("syntax", "dies")
LIVE = r"reload \(\w+\): live"

RECORD = """\
import os
_file = os.open(os.environ["SEEN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def note(version):
    os.write(_file, f"{os.getpid()} {version}\\n".encode())
"""
APP = """\
import importlib, itertools, signal, sys, time
from pack import half, other, record
VERSION = {version!r}
record.note(VERSION)
{dies}

def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for number in itertools.count():
        late = importlib.import_module(f"pack.late{{number % {modules}}}")
        if not late.VERSION == half.VERSION == other.VERSION == VERSION:
            raise RuntimeError("a mixture")
        record.note(late.VERSION)
        time.sleep(0.005)
"""
MODULE = "VERSION = {version!r}\nfrom pack import record\nrecord.note(VERSION)\n"
HALF = MODULE + "from pack import other\nassert other.VERSION == VERSION, 'a mixture'\n"
OTHER = MODULE + "def check():\n    from pack import half\n    assert half.VERSION == VERSION\n"


def write_version(pack: Path, version: str) -> None:
    """Write every file of a version; no file but the record is the same in two of them."""
    pack.mkdir(exist_ok=True)
    for name, text in (("__init__", ""), ("record", RECORD), ("half", HALF), ("other", OTHER)):
        (pack / f"{name}.py").write_text(text.replace("{version!r}", repr(version)), encoding="utf-8")
    dies = "raise RuntimeError('this version dies')" if version == "dies" else ""
    app = APP.format(version=version, dies=dies, modules=MODULES)
    (pack / "app.py").write_text(app, encoding="utf-8")
    for number in range(MODULES):
        broken = "(\n" if version == "syntax" and number == MODULES // 2 else ""
        text = MODULE.format(version=version) + broken
        (pack / f"late{number}.py").write_text(text, encoding="utf-8")


def commit_all(folder: Path) -> str:
    run_git(folder, "add", "--all")
    run_git(folder, "commit", "--quiet", "--message=x")
    return run_git(folder, "rev-parse", "HEAD")


def digest(pack: Path, scratch: Path) -> str:
    return scan(Tree((str(pack),)), None, BlobStore(scratch).put).manifest.digest


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with a version in each branch, at `one`."""
    folder = tmp_path / "clone"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=none")
    for branch in (*BAD, *reversed(GOOD)):
        run_git(folder, "checkout", "--quiet", "--orphan", branch)
        write_version(folder / "pack", branch)
        commit_all(folder)
    return folder


@pytest.fixture
def commits(clone: Path, tmp_path: Path) -> dict[str, str]:
    """The digest of each branch's tree to the commit that it is of."""
    found = {}
    for branch in (*GOOD, *BAD):
        place = tmp_path / f"as-{branch}"
        run_git(clone, "worktree", "add", "--quiet", "--detach", str(place), branch)
        found[digest(place / "pack", tmp_path / "scratch")] = run_git(clone, "rev-parse", branch)
        run_git(clone, "worktree", "remove", str(place))
    return found


def metrics(started: Supervised) -> str:
    with urllib.request.urlopen(f"http://{started.status()['listen']}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.timeout(600)
@pytest.mark.parametrize("handover", ["overlap", "replace"] if SOAK else ["overlap"])
def test_random_checkouts_never_mix_versions_and_never_take_the_service_down(  # noqa: PLR0917 -- fixtures
    supervise: Supervise,
    clone: Path,
    commits: dict[str, str],
    tmp_path: Path,
    handover: str,
    measured: Callable[[str], None],
) -> None:
    seed = int(os.environ.get("WA_SEED", "") or random.randrange(2**32))  # noqa: S311 -- no secret
    print(f"WA_SEED={seed}")
    chance = random.Random(seed)  # noqa: S311 -- as above
    seen = tmp_path / "seen"
    started = supervise(f"--handover={handover}", "pack.app:main", cwd=clone, SEEN=str(seen))
    started.expect(LIVE)
    for _ in range(CHECKOUTS):
        run_git(clone, "checkout", "--quiet", chance.choice((*GOOD, *BAD)))
        # Some before anything has come of the last one, some after.
        threading.Event().wait(chance.choice((0.0, 0.1, 0.3, 0.5)))
    for branch in (run_git(clone, "branch", "--show-current"), chance.choice(BAD), chance.choice(GOOD)):
        run_git(clone, "checkout", "--quiet", branch)
        until(lambda branch=branch: ended_well(started, clone, branch))  # type: ignore[misc]
    versions: dict[str, set[str]] = {}
    for line in seen.read_text(encoding="ascii").splitlines():
        pid, _, version = line.partition(" ")
        versions.setdefault(pid, set()).add(version)
    assert [held for held in versions.values() if len(held) > 1] == []
    assert {version for held in versions.values() for version in held} <= {*GOOD, "dies"}
    document = started.status()
    assert sum(document["restarts"].values()) == 0
    if handover == "overlap":
        assert "wa_supervisor_downtime_seconds_total 0.0" in metrics(started)
    everything = json.loads(started.command("history", "-n", "1000", "--json").stdout)
    records = [record for record in everything if record["kind"] == "reload"]
    lived = [record for record in records if record["outcome"] == "live"]
    assert {record["tree"] for record in lived} <= commits.keys()
    wrong = [r for r in records if r["tree"] in commits and r["commit"] != commits[r["tree"]]]
    assert wrong == []
    measured(f"seed {seed}, {CHECKOUTS} checkouts: {len(records)} reloads, {len(versions)} children")


def ended_well(started: Supervised, clone: Path, branch: str) -> bool:
    """Whether what stands at HEAD runs; or, where it cannot, a good version does and the reason is told."""
    document = started.status()
    if document["git"]["branch"] != branch or document["state"] != "live":
        return False
    if branch in GOOD:
        return bool(document["in_sync"] and document["live"]["commit"] == document["git"]["commit"])
    good = {run_git(clone, "rev-parse", name) for name in GOOD}
    reason = {"syntax": "late20.py, line", "dies": "this version dies"}[branch]
    return reason in (document["reason"] or "") and document["live"]["commit"] in good


def test_pull_of_many_files_is_one_reload_with_its_commit(
    supervise: Supervise, tmp_path: Path, measured: Callable[[str], None]
) -> None:
    origin, clone, files, pulls = tmp_path / "origin", tmp_path / "clone", 300, 2

    def version(number: int) -> str:
        (origin / "pack" / "__init__.py").touch()
        for name in range(files):
            (origin / "pack" / f"m{name}.py").write_text(f"VERSION = {number}\n", encoding="utf-8")
        return commit_all(origin)

    (origin / "pack").mkdir(parents=True)
    run_git(origin, "init", "--quiet", "--initial-branch=main")
    sleep = "import time\n\ndef main():\n    while True:\n        time.sleep(60)\n"
    (origin / "pack" / "app.py").write_text(sleep, encoding="utf-8")
    expected = [version(0)]
    run_git(tmp_path, "clone", "--quiet", str(origin), str(clone))
    started = supervise("pack.app:main", cwd=clone)
    started.expect(LIVE)
    for number in range(1, pulls + 1):
        expected.append(version(number))
        run_git(clone, "pull", "--quiet")
        started.expect(LIVE)
    records = [r for r in history(started) if r["kind"] == "reload"][::-1]
    assert [(r["outcome"], r["commit"], r["branch"]) for r in records] == [
        ("live", commit, "main") for commit in expected
    ]
    assert [r["previous_commit"] for r in records] == [None, *expected[:-1]]
    assert [r["paths_total"] for r in records[1:]] == [files] * pulls
    until(lambda: started.status()["git"] == {"commit": expected[-1], "branch": "main", "dirty": False})
    text = metrics(started)
    digest_now = started.status()["live"]["tree"]
    labels = f'commit="{expected[-1]}",dirty="false",tree="{digest_now}"'
    assert f"wa_supervisor_code_info{{{labels}}} 1.0" in text
    measured(f"pull of {files} files: {records[-1]['total_seconds'] * 1000:.0f} ms to live")


def test_commit_of_what_runs_follows_head_that_is_moved_after_the_files(
    supervise: Supervise, tree: Path
) -> None:
    run_git(tree, "init", "--quiet", "--initial-branch=main")
    first = commit_all(tree)
    started = supervise("--scan-interval=0.1", "main.py", cwd=tree)
    started.expect("^serving 1$")
    started.expect(LIVE)
    assert started.status()["live"]["commit"] == first
    (tree / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
    started.expect(LIVE)
    assert started.status()["live"]["commit"] == first
    second = commit_all(tree)
    until(lambda: started.status()["live"]["commit"] == started.status()["git"]["commit"] == second)
    (tree / "modules" / "answer.py").write_text("VALUE = 3\n", encoding="utf-8")
    started.expect(LIVE)
    record = history(started)[0]
    assert (record["previous_commit"], record["commit"], record["branch"]) == (second, second, "main")


HOLDER = """\
import os, sys
descriptor = os.open(sys.argv[1], os.O_CREAT | os.O_EXCL | os.O_WRONLY)
os.utime(sys.argv[1], (0, 0))
print("held", flush=True)
sys.stdin.read()
os.unlink(sys.argv[1])
"""


@contextmanager
def old_lock(path: Path) -> Iterator[None]:
    """A lock as old as can be that a process has open."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        yield
        assert holder.stdin is not None
        holder.stdin.close()


def test_lock_holds_the_reload_for_as_long_as_a_process_holds_the_lock(
    supervise: Supervise, tree: Path
) -> None:
    run_git(tree, "init", "--quiet")
    started = supervise("main.py", cwd=tree)
    started.expect("^serving 1$")
    started.expect(LIVE)
    with old_lock(tree / ".git" / "index.lock"):
        (tree / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
        until(lambda: started.status()["state"] == "reloading")
        threading.Event().wait(1.0)  # Twenty looks at the lock: this time is what the test is about.
        document = started.status()
        assert (document["state"], document["live"]["generation"]) == ("reloading", 1)
        assert document["problems"] == []
        assert not document["in_sync"], "nobody knows what the tree is"
        assert re.search(r"the tree is being written: .*index\.lock", document["reason"])
    started.expect("^serving 2$")
    started.expect(LIVE)


def test_lock_that_was_left_behind_is_reported_and_holds_nobody(supervise: Supervise, tree: Path) -> None:
    run_git(tree, "init", "--quiet")
    started = supervise("main.py", cwd=tree)
    started.expect("^serving 1$")
    lock = tree / ".git" / "index.lock"
    lock.touch()
    os.utime(lock, (0, 0))
    started.expect(f"{lock} was left by a git that died.*remove it")
    (tree / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
    started.expect("^serving 2$")
    assert [str(lock) in problem for problem in started.status()["problems"]] == [True]
    lock.unlink()
    until(lambda: started.status()["problems"] == [])
    assert len([line for line in started.output.lines if str(lock) in line]) == 1
