"""Bytecode belongs to whom its folder belongs to, is open to nobody else, and comes whole or not at all."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor import compiler, pyc
from tests.supervisor.helpers_edges import NOBODY, folder_for_everybody, run_unprivileged

SOMEBODY, SOME_GROUP = 4321, 4322
"""Ids that nobody on this machine has."""


@pytest.fixture(params=[0o000, 0o077], ids="umask {:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever the umask, the folder decides."""
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.fixture
def owner() -> tuple[int, int]:
    """Somebody else if we may give files away, else ourselves."""
    return (os.getuid(), os.getgid()) if os.getuid() else (SOMEBODY, SOME_GROUP)


def tree(root: Path, owner: tuple[int, int], *, folder: int = 0o755, source: int = 0o644) -> Path:
    """Make a source in a folder that somebody owns and return its path."""
    path = root / "tree" / "m.py"
    path.parent.mkdir(parents=True)
    path.touch()
    for place, mode in ((path, source), (path.parent, folder)):
        os.chown(place, *owner)
        place.chmod(mode)
    return path


def facts(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(
    ("folder", "source", "expected"),
    [
        (0o755, 0o644, 0o644),
        (0o700, 0o644, 0o600),
        (0o755, 0o600, 0o600),
        (0o755, 0o755, 0o644),
        (0o775, 0o664, 0o664),
        (0o777, 0o644, 0o644),
        (0o2750, 0o444, 0o640),
    ],
    ids="{:o}".format,
)
def test_bytecode_is_of_its_folder_and_never_more_open_than_the_source(
    tmp_path: Path, owner: tuple[int, int], folder: int, source: int, expected: int
) -> None:
    path = tree(tmp_path, owner, folder=folder, source=source)
    written = path.parent / "__pycache__" / "m.pyc"
    pyc.write(str(written), str(path), b"content")
    assert facts(written) == (*owner, expected)
    assert facts(written.parent) == (*owner, folder)
    assert (written.read_bytes(), [*written.parent.iterdir()]) == (b"content", [written])


def test_owner_of_a_tree_can_remove_and_replace_what_root_compiled(
    not_checked: Callable[[str], None],
) -> None:
    if os.getuid():
        not_checked("bytecode in a folder of somebody else: only root gives files away")
        return
    code = """
os.unlink(cached)
os.rmdir(os.path.dirname(cached))
py_compile.compile(sys.argv[1], doraise=True)
"""
    with folder_for_everybody() as folder:
        source = folder / "m.py"
        source.touch()
        for place in (folder, source):
            os.chown(place, NOBODY, NOBODY)
        helper = compiler.Helper(sources={str(source): str(source)}, removed=[], directories=[], roots=[])
        assert helper.run()["compiled_total"] == 1
        imports = "import os, py_compile, sys, importlib.util as u; cached = u.cache_from_source(sys.argv[1])"
        run_unprivileged(imports, code, str(source))


def test_cache_that_was_there_stays_as_it_is(tmp_path: Path, owner: tuple[int, int]) -> None:
    path = tree(tmp_path, owner)
    cache = path.parent / "__pycache__"
    cache.mkdir(mode=0o711)
    before = facts(cache)
    pyc.write(str(cache / "m.pyc"), str(path), b"")
    assert (facts(cache), facts(cache / "m.pyc")) == (before, (*owner, 0o644))


def test_each_directory_below_a_prefix_is_like_the_one_that_it_stands_for(
    tmp_path: Path, owner: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tree(tmp_path, owner, folder=0o700)
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path / "cache"))
    moved = tmp_path / "cache" / str(path.parent)[1:]
    pyc.write(str(moved / "m.pyc"), str(path), b"")
    assert (facts(moved), facts(moved / "m.pyc")) == ((*owner, 0o700), (*owner, 0o600))
    assert facts(moved.parent) == facts(tmp_path), "what is open on the way to the source stays open"


def test_owner_that_cannot_be_given_is_no_failure() -> None:
    code = "pyc.write(sys.argv[1], sys.argv[2], b'content')"
    with folder_for_everybody() as folder:
        folder.chmod(0o777)
        source = folder / "m.py"
        source.touch()
        written = folder / "__pycache__" / "m.pyc"
        run_unprivileged("import sys\nfrom supervisor import pyc", code, str(written), str(source))
        assert written.read_bytes() == b"content"


def test_link_that_was_planted_in_place_of_bytecode_is_replaced_and_not_followed(
    tmp_path: Path, owner: tuple[int, int]
) -> None:
    path = tree(tmp_path, owner)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    before = facts(victim)
    cache = path.parent / "__pycache__"
    cache.mkdir()
    (cache / "m.pyc").symlink_to(victim)
    pyc.write(str(cache / "m.pyc"), str(path), b"content")
    assert (victim.read_bytes(), facts(victim)) == (b"mine", before)
    assert not (cache / "m.pyc").is_symlink()


def test_folder_that_has_gone_is_not_made_anew(tmp_path: Path, owner: tuple[int, int]) -> None:
    path = tree(tmp_path, owner)
    path.unlink()
    path.parent.rmdir()
    with pytest.raises(FileNotFoundError):
        pyc.write(str(path.parent / "__pycache__" / "m.pyc"), str(path), b"")
    assert not path.parent.exists()


def test_failed_write_leaves_nothing_behind(tmp_path: Path, owner: tuple[int, int]) -> None:
    path = tree(tmp_path, owner)
    (path.parent / "__pycache__" / "m.pyc").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        pyc.write(str(path.parent / "__pycache__" / "m.pyc"), str(path), b"")
    assert [entry.name for entry in (path.parent / "__pycache__").iterdir()] == ["m.pyc"]
