"""Whether git is at work, judged by the locks of git itself, and which commit a tree is said to be of."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from supervisor.checkout import STALE_LOCK_SECONDS, Checkout
from supervisor.git import Head
from supervisor.manifest import Manifest, Snapshot, Tree
from supervisor.sharded import Sharded
from tests.supervisor.harness import until
from tests.supervisor.helpers_edges import folder_for_everybody, run_git, run_unprivileged

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


STRANGER = 54_321
"""A user of whom no process runs."""


class Clock:
    """Monotonic seconds that pass when the test says so."""

    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "a.py").touch()
    run_git(folder, "add", "a.py")
    run_git(folder, "commit", "--quiet", "--message=x")
    return folder


def over(*roots: Path, clock: Callable[[], float] = time.monotonic) -> Checkout:
    return Checkout(Tree(tuple(map(str, roots))), clock)


def age(lock: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(lock, (then, then))


@contextmanager
def running(*command: str, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is killed at the end, with all that it started."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@contextmanager
def committing(clone: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A git that waits for an editor: it has closed its lock, and holds it."""
    (clone / "a.py").write_text("changed = True\n", encoding="utf-8")
    (clone / ".git" / "COMMIT_EDITMSG").unlink()
    editor = {"GIT_EDITOR": "sleep 1000; :", "GIT_CONFIG_GLOBAL": os.devnull}
    person = ("-c", "user.name=A. Person", "-c", "user.email=person@example.invalid")
    with running("git", *person, "commit", "--all", cwd=clone, **editor) as process:
        until((clone / ".git" / "COMMIT_EDITMSG").exists)
        yield process


@pytest.mark.parametrize("name", ["index.lock", "HEAD.lock"])
def test_young_lock_holds_whoever_made_it_and_its_end_lets_go_a_moment_later(
    clone: Path, clock: Clock, name: str
) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / name
    assert not checkout.is_changing()
    lock.touch()
    assert checkout.is_changing()
    assert checkout.lock is not None
    assert checkout.lock.path == lock
    lock.unlink()
    assert checkout.is_changing(), "HEAD is moved after the lock is gone"
    clock.now += 0.1
    assert not checkout.is_changing()


def test_old_lock_without_a_holder_holds_nobody_and_is_reported(clone: Path, clock: Clock) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / "index.lock"
    lock.touch()
    age(lock, STALE_LOCK_SECONDS - 5)
    assert checkout.is_changing()
    age(lock, STALE_LOCK_SECONDS + 1)
    clock.now += 1
    assert not checkout.is_changing()
    (problem,) = checkout.problems
    assert str(lock) in problem
    assert "remove it" in problem
    lock.unlink()
    assert not checkout.is_changing()
    assert checkout.problems == ()


def test_lock_from_the_future_holds_no_longer_than_a_fresh_one(clone: Path, clock: Clock) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / "index.lock"
    lock.touch()
    age(lock, -86_400)
    assert checkout.is_changing()
    clock.now += STALE_LOCK_SECONDS - 1
    assert checkout.is_changing()
    clock.now += 2
    assert not checkout.is_changing()


def test_lock_that_is_made_anew_is_young_again(clone: Path, clock: Clock) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / "index.lock"
    lock.touch()
    age(lock, STALE_LOCK_SECONDS + 1)
    assert not checkout.is_changing()
    lock.unlink()
    lock.touch()
    assert checkout.is_changing()


def test_old_lock_that_a_process_has_open_holds_until_it_is_closed(clone: Path, clock: Clock) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / "index.lock"
    wait = "import sys, time; file = open(sys.argv[1], 'w'); time.sleep(1000)"
    with running(sys.executable, "-c", wait, str(lock), cwd=clone.parent) as holder:
        until(lock.exists)
        age(lock, 86_400)
        for _ in range(3):
            assert checkout.is_changing()
            clock.now += 86_400
        assert checkout.lock is not None
        assert [name.partition(" ")[0] for name in checkout.lock.holders] == [str(holder.pid)]
    assert not checkout.is_changing()
    assert len(checkout.problems) == 1


def test_git_that_has_closed_its_lock_holds_it_until_it_ends_and_no_later_one_does(
    clone: Path, clock: Clock
) -> None:
    checkout, lock = over(clone, clock=clock), clone / ".git" / "index.lock"
    with ExitStack() as stack:
        with committing(clone) as committer:
            until(lock.exists)
            age(lock, 86_400)
            assert checkout.is_changing()
            later = stack.enter_context(running("git", "hash-object", "--stdin", cwd=clone))
            until(lambda: name_of(later) == "git")
            clock.now += 10
            assert checkout.is_changing()
            assert checkout.lock is not None
            assert checkout.lock.holders == (f"{committer.pid} (git)",)
        clock.now += 10
        assert lock.exists(), "void: git has taken its lock away"
        assert name_of(later) == "git", "void: it has ended"
        assert not checkout.is_changing()
        assert len(checkout.problems) == 1


def name_of(process: subprocess.Popen[bytes]) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text(encoding="ascii").strip()


def test_git_elsewhere_and_one_that_only_reads_hold_nothing(clone: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(clone, elsewhere)
    lock = clone / ".git" / "index.lock"
    lock.touch()
    age(lock, 86_400)
    with (
        committing(elsewhere),
        running("git", "hash-object", "--stdin", cwd=elsewhere) as other,
        running("git", "cat-file", "--batch", cwd=clone) as reader,
    ):
        until(lambda: name_of(other) == name_of(reader) == "git")
        assert not over(clone).is_changing()


def test_lock_of_another_user_is_held_by_a_git_of_that_user(clone: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root makes files of another user")
    with folder_for_everybody() as folder:
        public = folder / "repository"
        shutil.copytree(clone, public)
        lock = public / ".git" / "index.lock"
        lock.touch()
        os.chown(lock, STRANGER, STRANGER)
        age(lock, 86_400)
        code = "print(Checkout(Tree((sys.argv[1],))).is_changing())"
        imports = "import sys\nfrom supervisor.checkout import Checkout\nfrom supervisor.manifest import Tree"
        assert run_unprivileged(imports, code, str(public)) == "False"
        # Where this one works cannot be seen.
        with subprocess.Popen(
            ["git", "hash-object", "--stdin"],  # noqa: S607 -- git is where the system has it
            cwd="/",
            user=STRANGER,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        ) as stranger:
            until(lambda: name_of(stranger) == "git")
            assert run_unprivileged(imports, code, str(public)) == "True"


def test_lock_of_a_worktree_is_its_own(clone: Path, tmp_path: Path) -> None:
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    (clone / ".git" / "index.lock").touch()
    assert (over(clone).is_changing(), over(tmp_path / "side").is_changing()) == (True, False)
    (clone / ".git" / "index.lock").rename(clone / ".git" / "worktrees" / "side" / "index.lock")
    assert (over(clone).is_changing(), over(tmp_path / "side").is_changing()) == (False, True)


def test_every_repository_that_concerns_the_roots_is_looked_at(clone: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    run_git(other, "init", "--quiet")
    run_git(other, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(clone), "lib/sub")
    assert (other / "lib" / "sub" / ".git").is_file()
    submodule = other / ".git" / "modules" / "lib" / "sub"
    (other / "lib" / "far").symlink_to(shutil.copytree(clone, tmp_path / "far"))
    tree = Tree((str(clone), str(other / "lib")))
    for directory in (clone / ".git", other / ".git", submodule, tmp_path / "far" / ".git"):
        checkout = Checkout(tree)
        checkout.saw(snapshot(tree), None)
        assert not checkout.is_changing()
        (directory / "index.lock").touch()
        assert checkout.is_changing(), directory
        (directory / "index.lock").unlink()
    assert over(clone, other).head() is None, "no commit is that of both"


def snapshot(tree: Tree, content: str = "x") -> Snapshot:
    worktrees = tuple(folder.path for folder in tree.folders() if folder.is_worktree)
    return Snapshot(Manifest.of(tree, {"a.py": content}), Sharded({}), worktrees=worktrees)


def test_commit_of_a_tree_is_where_head_stood_before_it_was_last_seen(clone: Path) -> None:
    tree = Tree((str(clone),))
    checkout, old, new = Checkout(tree), snapshot(tree, "old"), snapshot(tree, "new")
    first, second = Head("1" * 40, "main"), Head("2" * 40, "main")
    checkout.saw(old, first)
    checkout.saw(new, first)  # Git has not moved HEAD yet.
    checkout.saw(new, second)
    assert checkout.head_of(old.manifest.digest) == first
    assert checkout.head_of(new.manifest.digest) == second
    assert checkout.head_of("another tree") == checkout.head_of(None) == Head()
    checkout.saw(new, None)  # The repository is gone.
    assert checkout.head_of(new.manifest.digest) == Head()


def test_commits_are_remembered_of_a_thousand_trees(clone: Path) -> None:
    tree = Tree((str(clone),))
    checkout = Checkout(tree)
    seen = [snapshot(tree, str(number)) for number in range(1_100)]
    for found in seen:
        checkout.saw(found, Head("1" * 40))
    known = [checkout.head_of(found.manifest.digest).commit is not None for found in seen]
    assert known == [False] * 100 + [True] * 1_000


def test_repository_that_is_made_or_replaced_later_is_noticed(clone: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(tmp_path)
    checkout = over(link)
    assert checkout.head() is None
    link.unlink()
    link.symlink_to(clone)
    head = checkout.head()
    assert head is not None
    assert head.commit == run_git(clone, "rev-parse", "HEAD")
