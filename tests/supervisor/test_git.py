"""Git facts, read from repositories that git itself made."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from supervisor import git
from supervisor.git import STALE_LOCK_SECONDS, Repository
from tests.supervisor.helpers_edges import run_git

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository without a commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main")
    return folder


def commit(folder: Path) -> str:
    run_git(folder, "commit", "--quiet", "--allow-empty", "--message=x")
    return run_git(folder, "rev-parse", "HEAD")


def found(folder: Path) -> Repository:
    repository = git.find(folder)
    assert repository is not None
    return repository


def test_repository_without_a_commit_has_none(clone: Path) -> None:
    assert found(clone).commit() is None


def test_commit_of_a_branch_follows_it(clone: Path) -> None:
    repository = found(clone)
    for _ in range(2):
        named = commit(clone)
        assert repository.commit() == named


def test_commit_is_found_in_packed_references_and_after_them(clone: Path) -> None:
    repository, first = found(clone), commit(clone)
    run_git(clone, "pack-refs", "--all")
    assert not (clone / ".git" / "refs" / "heads" / "main").exists()
    assert repository.commit() == first
    second = commit(clone)
    assert repository.commit() == second
    run_git(clone, "pack-refs", "--all")
    assert repository.commit() == second


def test_detached_head_is_its_commit(clone: Path) -> None:
    first = commit(clone)
    commit(clone)
    run_git(clone, "checkout", "--quiet", "--detach", first)
    assert found(clone).commit() == first


def test_worktree_has_its_own_head_and_shares_its_references(clone: Path, tmp_path: Path) -> None:
    first = commit(clone)
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    second = commit(clone)
    assert (found(clone).commit(), found(tmp_path / "side").commit()) == (second, first)
    run_git(clone, "pack-refs", "--all")
    assert found(tmp_path / "side").commit() == first


def test_symbolic_references_are_followed_and_end(clone: Path) -> None:
    first = commit(clone)
    run_git(clone, "symbolic-ref", "refs/heads/alias", "refs/heads/main")
    run_git(clone, "symbolic-ref", "HEAD", "refs/heads/alias")
    assert found(clone).commit() == first
    run_git(clone, "symbolic-ref", "refs/heads/main", "refs/heads/alias")
    assert found(clone).commit() is None


def test_repository_is_found_from_a_folder_inside_and_through_a_link(clone: Path, tmp_path: Path) -> None:
    first = commit(clone)
    (clone / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(clone / "deep")
    assert found(clone / "deep" / "er").commit() == first
    assert found(tmp_path / "link").commit() == first


def test_folder_outside_of_any_repository_has_none(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    assert git.find(tmp_path) is None


@pytest.mark.parametrize(
    "head",
    [b"", b"\xff\xfe", b"ref: \0", b"ref: refs/heads/none", b"ref: ../../../../../etc/passwd", b"x" * 40],
)
def test_damaged_head_is_no_commit(clone: Path, head: bytes) -> None:
    commit(clone)
    (clone / ".git" / "HEAD").write_bytes(head)
    assert found(clone).commit() is None


def test_reference_in_a_reftable_is_not_known(clone: Path) -> None:
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n", encoding="utf-8")
    assert found(clone).commit() is None


def test_pipe_in_place_of_a_reference_is_not_waited_for(clone: Path) -> None:
    commit(clone)
    reference = clone / ".git" / "refs" / "heads" / "main"
    reference.unlink()
    os.mkfifo(reference)
    assert found(clone).commit() is None


def test_fresh_lock_says_that_git_is_at_work_and_its_end_that_it_is_done(clone: Path) -> None:
    repository, lock = found(clone), clone / ".git" / "index.lock"
    assert not repository.is_changing()
    lock.touch()
    assert repository.is_changing()
    lock.unlink()
    assert not repository.is_changing()


@pytest.mark.parametrize("age_seconds", [STALE_LOCK_SECONDS + 1, -STALE_LOCK_SECONDS - 60])
def test_lock_of_a_git_that_died_holds_nobody(clone: Path, age_seconds: float) -> None:
    lock = clone / ".git" / "index.lock"
    lock.touch()
    then = time.time() - age_seconds
    os.utime(lock, (then, then))
    assert not found(clone).is_changing()


def test_lock_of_a_worktree_is_its_own(clone: Path, tmp_path: Path) -> None:
    commit(clone)
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    (clone / ".git" / "index.lock").touch()
    assert (found(clone).is_changing(), found(tmp_path / "side").is_changing()) == (True, False)
