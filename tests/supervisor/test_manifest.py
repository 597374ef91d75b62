"""The manifest of real trees: what belongs to it, what is noticed, and what can not hold it up."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from supervisor import manifest
from supervisor.errors import SourceError
from supervisor.manifest import Manifest, Snapshot, Tree, scan, source_roots
from supervisor.sharded import Sharded
from tests.supervisor.helpers_edges import folder_for_everybody, run_unprivileged

LONG_AGO_NS = 1_000_000_000 * 3600


def keep(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def much_later() -> int:
    """A clock by which every stat tuple of the present is old enough to be trusted."""
    return time.time_ns() + LONG_AGO_NS


def tree_of(*roots: Path) -> Tree:
    return Tree(source_roots(roots))


def look(tree: Tree, previous: Snapshot | None = None, **arguments: object) -> Snapshot:
    return scan(tree, previous, keep, clock_ns=much_later, **arguments)  # type: ignore[arg-type]


def paths(tree: Tree) -> list[str]:
    return sorted(look(tree).manifest.sources)


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def restore_times(path: Path, facts: os.stat_result) -> None:
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


# --- what belongs to a tree -------------------------------------------------------------------------------


def test_only_python_sources_belong_to_the_tree(tmp_path: Path) -> None:
    write(tmp_path / "a.py")
    write(tmp_path / "pack" / "b.py")
    for other in ("a.pyc", "data.txt", "a.py~", ".#a.py", "#a.py#", "#b.py", "a.py.swp"):
        write(tmp_path / other)
    assert paths(tree_of(tmp_path)) == ["a.py", "pack/b.py"]


@pytest.mark.parametrize("name", [".git", "node_modules", "__pycache__"])
def test_folders_of_tools_belong_to_no_tree(tmp_path: Path, name: str) -> None:
    write(tmp_path / "pack" / name / "hook.py")
    write(tmp_path / "pack" / "a.py")
    assert paths(tree_of(tmp_path)) == ["pack/a.py"]


def test_virtual_environment_belongs_to_no_tree(tmp_path: Path) -> None:
    write(tmp_path / "env" / "pyvenv.cfg")
    write(tmp_path / "env" / "lib" / "python3" / "site-packages" / "thing.py")
    write(tmp_path / "a.py")
    assert paths(tree_of(tmp_path)) == ["a.py"]


def test_root_that_is_a_virtual_environment_itself_keeps_its_own_sources(tmp_path: Path) -> None:
    write(tmp_path / "pyvenv.cfg")
    write(tmp_path / "lib" / "python3" / "site-packages" / "thing.py")
    write(tmp_path / "lib" / "ours.py")
    write(tmp_path / "main.py")
    assert paths(tree_of(tmp_path)) == ["lib/ours.py", "main.py"]


def test_directory_with_the_name_of_a_source_is_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "plugin.py" / "inner.py")
    assert paths(tree_of(tmp_path)) == ["plugin.py/inner.py"]


def test_several_roots_share_their_common_parent(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a.py")
    write(tmp_path / "two" / "a.py")
    write(tmp_path / "three" / "a.py")
    tree = tree_of(tmp_path / "one", tmp_path / "two")
    assert (tree.base, paths(tree)) == (str(tmp_path), ["one/a.py", "two/a.py"])


def test_nested_roots_count_once(tmp_path: Path) -> None:
    write(tmp_path / "pack" / "a.py")
    assert source_roots([tmp_path / "pack", tmp_path, tmp_path / "x" / ".."]) == (str(tmp_path),)
    nested = Tree((str(tmp_path), str(tmp_path / "pack")))
    assert list(scan(nested, None, lambda _: "x").manifest.sources) == ["pack/a.py"]


def test_sibling_with_the_same_beginning_is_no_nested_root(tmp_path: Path) -> None:
    assert len(source_roots([tmp_path / "app", tmp_path / "app2"])) == 2


# --- links ------------------------------------------------------------------------------------------------


def test_directory_behind_links_belongs_to_the_tree_under_each_name(tmp_path: Path) -> None:
    write(tmp_path / "releases" / "2" / "a.py")
    (tmp_path / "current").symlink_to("releases/2")
    assert paths(tree_of(tmp_path)) == ["current/a.py", "releases/2/a.py"]


def test_linked_directory_outside_of_the_tree_belongs_to_it(tmp_path: Path) -> None:
    write(tmp_path / "shared" / "a.py")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "modules").symlink_to("../shared")
    assert paths(tree_of(tmp_path / "tree")) == ["modules/a.py"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x.py")
    write(tmp_path / "b" / "y.py")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    (tmp_path / "b" / "root").symlink_to("/")
    assert paths(tree_of(tmp_path)) == ["a/to_b/y.py", "a/x.py", "b/to_a/x.py", "b/y.py"]


def test_directories_that_all_link_to_each_other_end(tmp_path: Path) -> None:
    names = [f"d{number}" for number in range(8)]
    for name in names:
        write(tmp_path / name / "a.py")
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(f"../{other}")
    found = paths(tree_of(tmp_path))
    assert {f"{name}/a.py" for name in names} <= set(found)
    assert len(found) < 8 * 8**3


def test_link_that_leads_nowhere_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "gone.py").symlink_to("nothing.py")
    (tmp_path / "circle").symlink_to("circle")
    assert paths(tree_of(tmp_path)) == []


def test_source_whose_links_lead_in_a_circle_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").symlink_to("b.py")
    (tmp_path / "b.py").symlink_to("a.py")
    with pytest.raises(SourceError, match=r"[ab]\.py: Too many levels of symbolic links"):
        look(tree_of(tmp_path))


def test_edit_behind_a_linked_file_is_found(tmp_path: Path) -> None:
    target = write(tmp_path / "shared" / "m.py", "A = 1")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "m.py").symlink_to(target)
    tree = tree_of(tmp_path / "tree")
    before = look(tree)
    facts = target.stat()
    target.write_text("A = 2", encoding="utf-8")
    restore_times(target, facts)
    assert before.manifest.changes(look(tree, before).manifest) == ("m.py",)


def test_turning_a_link_to_another_release_is_a_change(tmp_path: Path) -> None:
    write(tmp_path / "releases" / "1" / "a.py", "A = 1")
    write(tmp_path / "releases" / "2" / "a.py", "A = 2")
    (tmp_path / "current").symlink_to("releases/1")
    tree = tree_of(tmp_path / "current")
    before = look(tree)
    (tmp_path / "new").symlink_to("releases/2")
    (tmp_path / "new").replace(tmp_path / "current")
    assert before.manifest.changes(look(tree, before).manifest) == ("a.py",)


# --- what is noticed --------------------------------------------------------------------------------------


def overwrite(path: Path) -> None:
    path.write_text("A = 2", encoding="utf-8")


def replace_it(path: Path) -> None:
    write(path.with_name("temporary"), "A = 2").replace(path)


def move_an_older_backup_over_it(path: Path) -> None:
    backup = write(path.with_name("backup"), "A = 2")
    os.utime(backup, (0, 0))
    backup.replace(path)


@pytest.mark.parametrize("edit", [overwrite, replace_it, move_an_older_backup_over_it])
@pytest.mark.parametrize("times_restored", [False, True])
def test_edit_of_the_same_size_is_found(
    tmp_path: Path, edit: Callable[[Path], None], times_restored: bool
) -> None:
    source = write(tmp_path / "a.py", "A = 1")
    tree = tree_of(tmp_path)
    before, facts = look(tree), source.stat()
    edit(source)
    if times_restored:
        restore_times(source, facts)
        assert (source.stat().st_size, source.stat().st_mtime_ns) == (facts.st_size, facts.st_mtime_ns)
    assert before.manifest.changes(look(tree, before).manifest) == ("a.py",)


def test_second_edit_in_one_tick_of_the_clock_is_found(tmp_path: Path) -> None:
    """The kernel's clock is simulated: the second edit leaves the stat tuple as it was."""
    source = write(tmp_path / "a.py", "A = 1")
    tree = tree_of(tmp_path)
    in_the_tick = source.stat().st_ctime_ns
    before = scan(tree, None, keep, clock_ns=lambda: in_the_tick)
    source.write_text("A = 2", encoding="utf-8")
    same = manifest._stat_tuple(source.stat())
    # Control: had the tuple been kept, it would be the one that the second edit has, and hide it.
    trusting = replace(before, stats=Sharded({"a.py": same}))
    assert look(tree, trusting).manifest == before.manifest
    assert "a.py" not in before.stats
    assert before.manifest.changes(look(tree, before).manifest) == ("a.py",)


def test_whole_seconds_of_a_coarse_file_system_are_trusted_later() -> None:
    fine, coarse = (1, 0, 5_000_000_001, 1, 1), (1, 0, 5_000_000_000, 1, 1)
    assert manifest._is_trusted(fine, 5_100_000_000)
    assert not manifest._is_trusted(coarse, 6_900_000_000)
    assert manifest._is_trusted(coarse, 7_100_000_000)


def test_time_that_was_set_back_trusts_nothing(tmp_path: Path) -> None:
    write(tmp_path / "a.py")
    assert scan(tree_of(tmp_path), None, keep, clock_ns=lambda: 0).stats == {}


def test_unchanged_file_is_not_read_again(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "A = 1")
    tree = tree_of(tmp_path)
    before = look(tree)

    def nothing_to_keep(content: bytes) -> str:
        pytest.fail(f"read again: {content!r}")

    after = scan(tree, before, nothing_to_keep, clock_ns=much_later)
    assert after.manifest is before.manifest
    with pytest.raises(pytest.fail.Exception, match="read again"):
        scan(tree, before, nothing_to_keep, doubtful={"a.py"}, clock_ns=much_later)


def test_edit_while_a_file_is_read_is_found_at_the_latest_by_the_next_scan(tmp_path: Path) -> None:
    source = write(tmp_path / "a.py", "A = 1")
    tree = tree_of(tmp_path)

    def keep_and_be_overtaken(content: bytes) -> str:
        source.write_text("A = 2", encoding="utf-8")
        return keep(content)

    before = scan(tree, None, keep_and_be_overtaken)
    assert before.manifest.sources == {"a.py": keep(b"A = 1")}
    assert look(tree, before).manifest.sources == {"a.py": keep(b"A = 2")}


def test_file_that_moves_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.py", "A = 1")
    real, edits = os.fstat, iter(["A = 22", "A = 333"])

    def fstat_and_edit(descriptor: int) -> os.stat_result:
        facts = real(descriptor)
        if (text := next(edits, None)) is not None:
            source.write_text(text, encoding="utf-8")
        return facts

    monkeypatch.setattr(os, "fstat", fstat_and_edit)
    assert look(tree_of(tmp_path)).manifest.sources == {"a.py": keep(b"A = 333")}


def test_file_that_vanishes_between_listing_and_reading_is_no_error(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "first")
    write(tmp_path / "b.py", "second")

    def keep_and_delete_the_rest(content: bytes) -> str:
        for path in tmp_path.iterdir():
            path.unlink()
        return keep(content)

    assert len(scan(tree_of(tmp_path), None, keep_and_delete_the_rest).manifest.sources) == 1


def test_root_that_vanishes_is_an_error_until_it_is_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    source = write(root / "a.py", "A = 1")
    tree = tree_of(root)
    before = look(tree)
    root.rename(tmp_path / "away")
    with pytest.raises(SourceError, match=f"cannot read {root}: No such file or directory; put it back"):
        look(tree, before)
    write(source, "A = 1")
    assert look(tree, before).manifest.digest == before.manifest.digest


def test_source_whose_place_is_taken_by_a_directory_is_not_taken_for_deleted(tmp_path: Path) -> None:
    source = write(tmp_path / "a.py")
    before = look(tree_of(tmp_path))
    source.unlink()
    source.mkdir()
    with pytest.raises(SourceError, match=f"{source}: it is not a regular file"):
        look(tree_of(tmp_path), before)
    assert paths(tree_of(tmp_path)) == [], "a directory that never was a source may have its name"


def test_file_too_large_for_a_source_is_named_and_not_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.py")
    os.truncate(source, 1 << 40)
    with pytest.raises(SourceError, match=f"{source}: it has {1 << 40} bytes, which is too large"):
        look(tree_of(tmp_path))


def test_digest_is_of_paths_and_contents_and_of_nothing_else(tmp_path: Path) -> None:
    tree = tree_of(tmp_path)
    one = Manifest.of(tree, {"a.py": "1", "b.py": "2"})
    assert one.digest == Manifest.of(tree, {"b.py": "2", "a.py": "1"}).digest
    others = ({"a.py": "2", "b.py": "1"}, {"a.py": "1"}, {"a.py": "1", "c.py": "2"})
    assert len({one.digest, *(Manifest.of(tree, other).digest for other in others)}) == 4


def test_name_that_is_no_utf8_is_a_source_like_any_other(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.py")
    (tmp_path / name).write_text("A = 1", encoding="utf-8")
    found = look(tree_of(tmp_path)).manifest
    assert found.sources == {name: keep(b"A = 1")}
    assert Path(found.absolute(name)).read_bytes() == b"A = 1"


@pytest.fixture
def deep_path(tmp_path: Path) -> Iterator[Path]:
    """A folder that may be made deeper than Python's own removal of it can go."""
    yield tmp_path
    subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # noqa: S607 -- rm is where the system has it


def test_deep_directories_are_followed_to_their_end(deep_path: Path) -> None:
    here = os.open(deep_path, os.O_RDONLY)
    depth = 1200
    for _ in range(depth):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(os.open("deep.py", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    assert paths(tree_of(deep_path)) == ["d/" * depth + "deep.py"]


# --- what cannot be read ----------------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket_file(path: Path) -> None:
    os.mknod(path, 0o140600)


@pytest.mark.parametrize("make", [pipe, socket_file])
def test_what_is_no_regular_file_is_named_and_not_waited_for(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    make(tmp_path / "x.py")
    with pytest.raises(SourceError, match=r"x\.py: it is not a regular file; move it out") as caught:
        look(tree_of(tmp_path))
    assert caught.value.path == str(tmp_path / "x.py")


def test_pipe_that_takes_the_place_of_a_source_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "x.py")
    real = manifest._look

    def look_then_exchange(path: str) -> os.stat_result | None:
        facts = real(path)
        source.unlink()
        os.mkfifo(source)
        return facts

    monkeypatch.setattr(manifest, "_look", look_then_exchange)
    with pytest.raises(SourceError, match="not a regular file"):
        look(tree_of(tmp_path))


def test_bytes_that_cannot_be_kept_are_an_error_that_names_the_place(tmp_path: Path) -> None:
    write(tmp_path / "a.py")

    def full(_: bytes) -> str:
        raise OSError(28, "No space left on device", "/state/blobs")

    with pytest.raises(SourceError, match="cannot be kept in /state/blobs: No space left on device; free"):
        scan(tree_of(tmp_path), None, full)


IMPORTS = """
import sys
from supervisor.errors import SourceError
from supervisor.manifest import Tree, scan
"""
LOOK = """
try:
    print(sorted(scan(Tree((sys.argv[1],)), None, lambda content: "x").manifest.sources))
except SourceError as error:
    print(error)
"""


@pytest.fixture
def root() -> Iterator[Path]:
    with folder_for_everybody() as folder:
        (folder / "root").mkdir(mode=0o755)
        yield folder / "root"


def test_file_that_may_not_be_read_is_named_with_what_to_do(root: Path) -> None:
    write(root / "a.py").chmod(0)
    assert run_unprivileged(IMPORTS, LOOK, str(root)) == (
        f"cannot read {root}/a.py: Permission denied; make it readable for the user of the supervisor"
    )


def test_private_folder_of_somebody_else_is_no_part_of_the_tree(root: Path) -> None:
    write(root / "data" / "dump.py").parent.chmod(0)
    write(root / "a.py").chmod(0o644)
    assert run_unprivileged(IMPORTS, LOOK, str(root)) == "['a.py']"
    (root / "data").chmod(0o755)


def test_root_that_may_not_be_listed_is_an_error(root: Path) -> None:
    root.chmod(0)
    assert run_unprivileged(IMPORTS, LOOK, str(root)).startswith(f"cannot read {root}: Permission denied")
    root.chmod(0o755)


def test_what_is_too_deep_for_a_name_is_nothing_that_could_be_imported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("VALUE = 1\n", encoding="utf-8")
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(20):  # Names of 250 characters: longer together than any path may be.
        os.mkdir("d" * 250, dir_fd=here)
        here, above = os.open("d" * 250, os.O_RDONLY, dir_fd=here), here
        os.close(above)
    os.close(os.open("b.py", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)
    tree = Tree((str(tmp_path),))
    found = manifest.scan(tree, None, lambda content: hashlib.sha256(content).hexdigest())
    assert list(found.manifest.sources) == ["a.py"]
