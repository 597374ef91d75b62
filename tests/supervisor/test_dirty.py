"""Whether the worktree differs from its commit, as git itself says, and what asking must not do."""

from __future__ import annotations

import os
import selectors
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from supervisor import dirty, git
from supervisor.dirty import Dirty
from supervisor.git import Repository
from tests.supervisor.harness import until
from tests.supervisor.helpers_edges import NOBODY, run_git

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "a.py").write_text("1\n", encoding="utf-8")
    run_git(folder, "add", "a.py")
    run_git(folder, "commit", "--quiet", "--message=x")
    return folder


def found(folder: Path) -> Repository:
    repository = git.find(folder)
    assert repository is not None
    return repository


class Loop:
    """Asks as the main loop does, with a clock that jumps over the pauses."""

    def __init__(self, environment: dict[str, str] | None = None) -> None:
        self.selector = selectors.DefaultSelector()
        self.dirty = Dirty(self.selector, os.environ if environment is None else environment)
        self.now = 0.0
        self.state = 0

    def begin(self, folder: Path) -> None:
        self.state += 1
        self.now += 1_000
        self.dirty.follow(found(folder), self.state, self.now)

    def turn(self) -> bool:
        for key, _ in self.selector.select(0.01):
            key.data()
        self.dirty.turn(self.now)
        return not self.dirty.pids

    def ask(self, folder: Path) -> bool | None:
        self.begin(folder)
        until(self.turn)
        assert not self.selector.get_map()
        return self.dirty.value


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.dirty.close()
    loop.selector.close()


def test_answer_is_that_of_git(loop: Loop, clone: Path) -> None:
    assert loop.ask(clone) is False
    (clone / "untracked.py").touch()
    assert loop.ask(clone) is False
    (clone / "a.py").write_text("2\n", encoding="utf-8")
    assert loop.ask(clone) is True
    run_git(clone, "checkout", "--quiet", "a.py")
    assert loop.ask(clone) is False
    run_git(clone, "rm", "--quiet", "--cached", "a.py")
    assert loop.ask(clone) is True


def test_more_than_a_pipe_holds_is_one_answer(loop: Loop, clone: Path) -> None:
    for number in range(2_000):
        (clone / f"{'x' * 60}{number}.py").touch()
    run_git(clone, "add", "--all")
    assert loop.ask(clone) is True


def test_answer_counts_for_its_own_state_only_and_nobody_is_asked_twice(loop: Loop, clone: Path) -> None:
    assert loop.ask(clone) is False
    loop.dirty.follow(found(clone), loop.state, loop.now + 1_000)
    assert (loop.dirty.value, loop.dirty.pids) == (False, [])
    loop.dirty.follow(found(clone), "another", loop.now)
    assert (loop.dirty.value, loop.dirty.pids) == (None, []), "it was asked a moment ago"
    loop.dirty.follow(None, "none", loop.now + 1_000)
    assert (loop.dirty.value, loop.dirty.pids) == (None, [])


def test_asking_takes_no_lock_writes_nothing_and_starts_no_monitor(loop: Loop, clone: Path) -> None:
    marker = clone / "monitor-was-run"
    run_git(clone, "config", "core.fsmonitor", f"touch {marker}; false")
    os.utime(clone / "a.py", (1, 1))  # The index would be refreshed.
    before = (clone / ".git" / "index").stat()
    assert loop.ask(clone) is False
    after = (clone / ".git" / "index").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not marker.exists()
    run_git(clone, "status")
    assert marker.exists(), "void: git would not have run it"


def test_variables_of_the_supervisor_do_not_lead_git_elsewhere(clone: Path, tmp_path: Path) -> None:
    loop = Loop(os.environ | {"GIT_DIR": str(tmp_path), "GIT_WORK_TREE": "/", "NOTIFY_SOCKET": "/x"})
    assert loop.ask(clone) is False


def test_without_git_it_is_not_known(clone: Path, tmp_path: Path) -> None:
    loop = Loop({"PATH": str(tmp_path)})
    assert loop.ask(clone) is None


def test_git_that_hangs_is_killed_with_what_it_started(
    loop: Loop, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dirty, "DEADLINE_SECONDS", 0.5)
    pids = tmp_path / "pids"
    run_git(clone, "config", "filter.slow.clean", f"echo $$ >> {pids}; sleep 1000")
    (clone / ".gitattributes").write_text("*.py filter=slow\n", encoding="utf-8")
    (clone / "a.py").write_text("2\n", encoding="utf-8")
    loop.begin(clone)
    until(lambda: loop.turn() or (pids.exists() and pids.read_text(encoding="ascii").endswith("\n")))
    (asked,) = loop.dirty.pids
    started = [int(line) for line in pids.read_text(encoding="ascii").split()]
    loop.now += 1
    until(loop.turn)
    assert loop.dirty.value is None
    assert not psutil.pid_exists(asked), "it was not collected"
    until(lambda: not any(psutil.pid_exists(pid) for pid in started))


@pytest.mark.parametrize("place", [".", ".git", ".git/worktrees/side", "side", "side/.git"])
def test_repository_of_which_anything_belongs_to_another_user_is_not_asked(
    loop: Loop, clone: Path, place: str
) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes files of another user")
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(clone / "side"))
    where = clone if place in {".", ".git"} else clone / "side"
    assert loop.ask(where) is False
    os.chown(clone / place, NOBODY, NOBODY)
    loop.begin(where)
    assert (loop.dirty.value, loop.dirty.pids) == (None, [])


def test_loop_is_never_held(loop: Loop, clone: Path, measured: Callable[[str], None]) -> None:
    began_at = time.perf_counter()
    loop.begin(clone)
    measured(f"asking git took {(time.perf_counter() - began_at) * 1000:.1f} ms of the loop")
    assert loop.dirty.pids != []
    until(loop.turn)
