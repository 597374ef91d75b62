"""Git facts, read from repositories that git itself made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from supervisor import git
from supervisor.checkout import Checkout
from supervisor.git import Head, Repository
from supervisor.manifest import Tree
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
    assert found(clone).head().commit is None


def test_commit_of_a_branch_follows_it(clone: Path) -> None:
    repository = found(clone)
    for _ in range(2):
        named = commit(clone)
        assert repository.head().commit == named


def test_commit_is_found_in_packed_references_and_after_them(clone: Path) -> None:
    repository, first = found(clone), commit(clone)
    run_git(clone, "pack-refs", "--all")
    assert not (clone / ".git" / "refs" / "heads" / "main").exists()
    assert repository.head().commit == first
    second = commit(clone)
    assert repository.head().commit == second
    run_git(clone, "pack-refs", "--all")
    assert repository.head().commit == second


def test_detached_head_is_its_commit(clone: Path) -> None:
    first = commit(clone)
    commit(clone)
    run_git(clone, "checkout", "--quiet", "--detach", first)
    assert found(clone).head().commit == first


def test_worktree_has_its_own_head_and_shares_its_references(clone: Path, tmp_path: Path) -> None:
    first = commit(clone)
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    second = commit(clone)
    assert (found(clone).head().commit, found(tmp_path / "side").head().commit) == (second, first)
    run_git(clone, "pack-refs", "--all")
    assert found(tmp_path / "side").head().commit == first


def test_symbolic_references_are_followed_and_end(clone: Path) -> None:
    first = commit(clone)
    run_git(clone, "symbolic-ref", "refs/heads/alias", "refs/heads/main")
    run_git(clone, "symbolic-ref", "HEAD", "refs/heads/alias")
    assert found(clone).head().commit == first
    run_git(clone, "symbolic-ref", "refs/heads/main", "refs/heads/alias")
    assert found(clone).head().commit is None


def test_repository_is_found_from_a_folder_inside_and_through_a_link(clone: Path, tmp_path: Path) -> None:
    first = commit(clone)
    (clone / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(clone / "deep")
    assert found(clone / "deep" / "er").head().commit == first
    assert found(tmp_path / "link").head().commit == first


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
    assert found(clone).head().commit is None


def test_reference_in_a_reftable_is_not_known(clone: Path) -> None:
    (clone / ".git" / "HEAD").write_text("ref: refs/heads/.invalid\n", encoding="utf-8")
    assert found(clone).head().commit is None


def test_pipe_in_place_of_a_reference_is_not_waited_for(clone: Path) -> None:
    commit(clone)
    reference = clone / ".git" / "refs" / "heads" / "main"
    reference.unlink()
    os.mkfifo(reference)
    assert found(clone).head().commit is None


def test_branch_is_named_as_git_names_it(clone: Path) -> None:
    repository = found(clone)
    assert repository.head() == Head(None, "main")
    first = commit(clone)
    run_git(clone, "checkout", "--quiet", "-b", "feature/größer")
    assert repository.head() == Head(first, "feature/größer")
    run_git(clone, "pack-refs", "--all")
    assert repository.head() == Head(first, "feature/größer")
    run_git(clone, "checkout", "--quiet", "--detach")
    assert repository.head() == Head(first, None)


def test_commit_is_found_among_a_thousand_packed_references(clone: Path) -> None:
    first = commit(clone)
    run_git(clone, "checkout", "--quiet", "-b", "b0500")
    second = commit(clone)
    lines = "".join(f"{first} refs/heads/b{number:04}\n" for number in range(1_000) if number != 500)
    (clone / ".git" / "packed-refs").write_text(lines, encoding="utf-8")
    assert found(clone).head() == Head(second, "b0500")
    run_git(clone, "checkout", "--quiet", "b0999")
    assert found(clone).head() == Head(first, "b0999")


@pytest.mark.parametrize(
    "name", [".invalid", "a..b", "a b", "[red]x", "a\x1b[31m", "x/.y", "x.lock", "a//b", "x/", "", "a\\b"]
)
def test_what_cannot_be_a_branch_is_not_passed_on(clone: Path, name: str) -> None:
    (clone / ".git" / "HEAD").write_text(f"ref: refs/heads/{name}\n", encoding="utf-8")
    assert found(clone).head() == Head(None, None)


def test_head_of_a_rebase_in_progress_is_detached(clone: Path) -> None:
    def edit(text: str) -> str:
        (clone / "a").write_text(text, encoding="utf-8")
        run_git(clone, "add", "a")
        return commit(clone)

    edit("1")
    run_git(clone, "checkout", "--quiet", "-b", "side")
    edit("2")
    run_git(clone, "checkout", "--quiet", "main")
    onto = edit("3")
    run_git(clone, "checkout", "--quiet", "side")
    with pytest.raises(subprocess.CalledProcessError):
        run_git(clone, "rebase", "main")
    assert found(clone).head() == Head(onto, None)
    run_git(clone, "rebase", "--abort")
    assert found(clone).head().branch == "side"


def test_repository_behind_a_link_is_that_of_the_real_place(clone: Path, tmp_path: Path) -> None:
    first = commit(clone)
    other = tmp_path / "other"
    other.mkdir()
    run_git(other, "init", "--quiet")
    (other / "current").symlink_to(clone)
    assert found(other / "current").head().commit == first


def test_git_folder_that_is_a_link_is_followed(clone: Path) -> None:
    first = commit(clone)
    (clone / ".git").rename(clone.parent / "elsewhere")
    (clone / ".git").symlink_to(clone.parent / "elsewhere")
    assert found(clone).head() == Head(first, "main")


def test_git_file_that_leads_nowhere_says_nothing(clone: Path, tmp_path: Path) -> None:
    commit(clone)
    run_git(clone, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    shutil.rmtree(clone)
    repository = found(tmp_path / "side")
    assert (repository.head(), repository.written()) == (Head(), None)


def test_folder_in_a_bare_repository_belongs_to_none(tmp_path: Path) -> None:
    run_git(tmp_path, "init", "--quiet", "--bare", ".")
    (tmp_path / "tree").mkdir()
    assert git.find(tmp_path / "tree") is None


@pytest.mark.parametrize("place", ["a\0b", "circle"])
@pytest.mark.parametrize("file", [".git", ".git/commondir"])
def test_names_that_lead_to_no_place_say_nothing(tmp_path: Path, file: str, place: str) -> None:
    if "/" in file:
        (tmp_path / ".git").mkdir()
        (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
        (tmp_path / ".git" / "circle").symlink_to("circle")
    (tmp_path / "circle").symlink_to("circle")
    prefix = "" if "/" in file else "gitdir: "
    (tmp_path / file).write_text(f"{prefix}{place}\n", encoding="utf-8")
    found = git.at(tmp_path)
    assert found is None or found.head().commit is None
    checkout = Checkout(Tree((str(tmp_path),)))
    assert not checkout.is_changing()
    checkout.mark()


def test_root_that_is_a_link_in_a_circle_lies_in_no_repository_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to("circle")
    assert git.find(tmp_path / "circle") == git.find(tmp_path)
