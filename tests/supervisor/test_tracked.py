"""What git tracks, read from indexes that git itself wrote."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from supervisor.tracked import Tracked, bytecode_names
from tests.supervisor.helpers_edges import folder_for_everybody, run_git, run_unprivileged

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")

NAMES = ["a.pyc", "a/b.pyc", "a/bc.pyc", "deep/er/" + "x" * 200 + ".pyc", "é.pyc", "z.pyc"]


def repository(folder: Path, *options: str) -> Path:
    """A repository that tracks :data:`NAMES` and other files among them; ``untracked.pyc`` is left out."""
    folder.mkdir()
    run_git(folder, "init", "--quiet", "--initial-branch=main", *options)
    for name in (*NAMES, "a.py", "a/bb.txt", "deep/er/y.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    run_git(folder, "add", "--force", ".")
    (folder / "untracked.pyc").touch()
    return folder


def plain(_: Path) -> None:
    """Leave the index in git's own default."""


def version_2(folder: Path) -> None:
    run_git(folder, "update-index", "--index-version", "2")


def version_3(folder: Path) -> None:
    """A mark that needs the longer flags of version 3."""
    (folder / "later.pyc").touch()
    run_git(folder, "add", "--force", "--intent-to-add", "later.pyc")


def version_4(folder: Path) -> None:
    run_git(folder, "update-index", "--index-version", "4")


def committed(folder: Path) -> None:
    """An index with extensions."""
    run_git(folder, "commit", "--quiet", "--message=x")
    run_git(folder, "update-index", "--force-untracked-cache")
    run_git(folder, "status")


def without_checksum(folder: Path) -> None:
    run_git(folder, "config", "index.skipHash", "true")
    run_git(folder, "update-index", "--force-write-index")


@pytest.mark.parametrize("options", [(), ("--object-format=sha256",)], ids=["sha1", "sha256"])
@pytest.mark.parametrize("form", [plain, version_2, version_3, version_4, committed, without_checksum])
def test_what_git_lists_is_tracked_and_nothing_else(
    tmp_path: Path, form: Callable[[Path], None], options: tuple[str, ...]
) -> None:
    folder = repository(tmp_path / "r", *options)
    form(folder)
    listed = run_git(folder, "ls-files", "-z").split("\0")
    tracked = Tracked()
    present = [path.relative_to(folder).as_posix() for path in folder.rglob("*.pyc")]
    assert {name for name in present if tracked.holds(str(folder / name))} == {
        name for name in listed if name.endswith(".pyc")
    }
    assert "untracked.pyc" in present
    assert set(NAMES) <= set(listed)


def test_worktree_and_nested_repository_have_their_own_index(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r")
    committed(folder)
    run_git(folder, "worktree", "add", "--quiet", "-b", "side", str(tmp_path / "side"))
    run_git(folder, "rm", "--quiet", "--cached", "a.pyc")
    inner = repository(folder / "inner")
    run_git(inner, "rm", "--quiet", "--cached", "z.pyc")
    tracked = Tracked()
    found = {
        place.name: [name for name in NAMES if tracked.holds(str(place / name))]
        for place in (folder, tmp_path / "side", inner)
    }
    assert found == {"r": NAMES[1:], "side": NAMES, "inner": NAMES[:-1]}


def test_file_is_known_behind_links_to_its_folder(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r")
    (tmp_path / "current").symlink_to("r")
    (folder / "link").symlink_to("a")
    tracked = Tracked()
    assert tracked.holds(str(tmp_path / "current" / "a.pyc"))
    assert tracked.holds(str(folder / "link" / "b.pyc"))


def test_nothing_is_tracked_where_there_is_no_repository_or_no_index_yet(tmp_path: Path) -> None:
    assert not Tracked().holds(str(tmp_path / "a.pyc"))
    run_git(tmp_path, "init", "--quiet")
    assert not Tracked().holds(str(tmp_path / "a.pyc"))


def split(folder: Path) -> None:
    run_git(folder, "update-index", "--split-index")


def sparse(folder: Path) -> None:
    committed(folder)
    run_git(folder, "sparse-checkout", "set", "--cone", "--sparse-index", "a")


def truncated(folder: Path) -> None:
    index = folder / ".git" / "index"
    index.write_bytes(index.read_bytes()[:-30])


def of_the_future(folder: Path) -> None:
    index = folder / ".git" / "index"
    index.write_bytes(b"DIRC\0\0\0\x05" + index.read_bytes()[8:])


def emptied(folder: Path) -> None:
    os.truncate(folder / ".git" / "index", 0)


def piped(folder: Path) -> None:
    (folder / ".git" / "index").unlink()
    os.mkfifo(folder / ".git" / "index")


def larger_than_any(folder: Path) -> None:
    os.truncate(folder / ".git" / "index", 1 << 40)


@pytest.mark.parametrize("form", [split, sparse, truncated, of_the_future, emptied, piped, larger_than_any])
def test_index_that_is_not_understood_is_an_error_and_never_a_no(
    tmp_path: Path, form: Callable[[Path], None]
) -> None:
    folder = repository(tmp_path / "r")
    form(folder)
    with pytest.raises(OSError, match="index"):
        Tracked().holds(str(folder / "a.pyc"))


def test_every_beginning_of_an_index_is_understood_or_refused(tmp_path: Path) -> None:
    folder = repository(tmp_path / "r")
    version_4(folder)
    index = (folder / ".git" / "index").read_bytes()
    for length in range(len(index)):
        with pytest.raises(OSError, match="not understood"):
            bytecode_names(index[:length])


def test_index_of_a_private_repository_is_an_error() -> None:
    imports = "import sys\nfrom supervisor.tracked import Tracked"
    code = "try: print(Tracked().holds(sys.argv[1]))\nexcept PermissionError as error: print(error.strerror)"
    with folder_for_everybody() as folder:
        run_git(folder, "init", "--quiet")
        (folder / ".git").chmod(0)
        assert run_unprivileged(imports, code, str(folder / "a.pyc")) == "Permission denied"
        (folder / ".git").chmod(0o755)
