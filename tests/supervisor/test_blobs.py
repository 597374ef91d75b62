"""Pinned bytes are there when they are needed, whatever happened to the files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from supervisor.blobs import BlobStore
from supervisor.errors import BlobError
from supervisor.manifest import Manifest, Tree


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "state")


def manifest_of(**sources: str) -> Manifest:
    return Manifest.of(Tree(("/tree",)), {f"{name}.py": digest for name, digest in sources.items()})


def test_bytes_come_back_under_their_digest(store: BlobStore) -> None:
    digest = store.put(b"A = 1\n")
    assert digest == hashlib.sha256(b"A = 1\n").hexdigest()
    assert store.get(digest) == b"A = 1\n"


def test_only_the_owner_may_read_them(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "state" / "deep")
    path = store.blobs / store.put(b"A = 1\n")
    assert (store.blobs.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o600)


def test_missing_bytes_are_an_error(store: BlobStore) -> None:
    with pytest.raises(BlobError, match="not readable: No such file"):
        store.get("0" * 64)


def test_damaged_bytes_are_an_error_that_names_the_file(store: BlobStore) -> None:
    digest = store.put(b"A = 1\n")
    (store.blobs / digest).write_bytes(b"A = 2\n")
    with pytest.raises(BlobError, match=f"damaged on disk; remove .*{digest}"):
        store.get(digest)


@pytest.mark.parametrize("left", [b"", b"A = 2\n"], ids=["empty", "other"])
def test_blob_damaged_by_a_power_cut_is_written_anew_by_the_next_run(store: BlobStore, left: bytes) -> None:
    digest = store.put(b"A = 1\n")
    (store.blobs / digest).write_bytes(left)
    following = BlobStore(store.blobs.parent)
    assert following.get(following.put(b"A = 1\n")) == b"A = 1\n"


def test_blob_that_a_cleaner_took_away_is_written_anew(store: BlobStore) -> None:
    digest = store.put(b"A = 1\n")
    (store.blobs / digest).unlink()
    assert store.get(store.put(b"A = 1\n")) == b"A = 1\n"


def test_directory_that_a_cleaner_took_away_is_made_anew(store: BlobStore) -> None:
    (store.blobs / store.put(b"A = 1\n")).unlink()
    store.blobs.rmdir()
    store.collect([])
    assert store.get(store.put(b"A = 1\n")) == b"A = 1\n"


def test_blob_that_is_there_is_not_written_again(store: BlobStore) -> None:
    digest = store.put(b"A = 1\n")
    inode = (store.blobs / digest).stat().st_ino
    store.put(b"A = 1\n")
    BlobStore(store.blobs.parent).put(b"A = 1\n")
    assert (store.blobs / digest).stat().st_ino == inode


def test_store_knows_which_blobs_are_there_whoever_puts_them_and_takes_them_away(store: BlobStore) -> None:
    a, b = store.put(b"A"), store.put(b"B")
    assert store.holds(manifest_of(a=a, b=b))
    c = store.put(b"C")
    assert store.holds(manifest_of(a=a, c=c))
    (store.blobs / a).unlink()
    assert not store.holds(manifest_of(a=a, c=c))
    BlobStore(store.blobs.parent).put(b"A")
    assert store.holds(manifest_of(a=a, c=c))
    store.collect([manifest_of(a=a)])
    assert store.holds(manifest_of(a=a))
    assert not store.holds(manifest_of(a=a, b=b))


def test_manifest_is_kept_for_children_and_repaired(store: BlobStore) -> None:
    manifest = manifest_of(a="1")
    path = store.put_manifest(manifest)
    path.write_bytes(b'{"base"')
    assert store.put_manifest(manifest) == path
    assert json.loads(path.read_bytes()) == {
        "base": "/tree",
        "roots": ["/tree"],
        "sources": {"a.py": "1"},
        "ignore": [],
    }


def test_name_that_is_no_utf8_survives_in_a_manifest(store: BlobStore) -> None:
    name = os.fsdecode(b"caf\xe9")
    path = store.put_manifest(manifest_of(**{name: "1"}))
    assert json.loads(path.read_bytes())["sources"] == {f"{name}.py": "1"}


def test_what_nobody_needs_is_removed_and_nothing_else(store: BlobStore) -> None:
    kept, dropped = store.put(b"kept"), store.put(b"dropped")
    needed = manifest_of(a=kept)
    store.put_manifest(needed)
    store.put_manifest(manifest_of(a=dropped))
    (store.blobs / f".{kept}.4711").write_bytes(b"half of it, by a run that was killed")
    store.collect([needed])
    assert [path.name for path in store.blobs.iterdir()] == [kept]
    assert [path.name for path in store.manifests.iterdir()] == [f"{needed.digest}.json"]
    assert store.get(store.put(b"dropped")) == b"dropped"


def test_full_disk_is_an_error_that_names_the_place_and_leaves_nothing_half(tmp_path: Path) -> None:
    """A limit of the size of a file stands for the full disk; it needs a process of its own."""
    script = """
import resource, signal, sys
from pathlib import Path
from supervisor.blobs import BlobStore
store = BlobStore(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    store.put(b"x" * 5000)
except OSError as error:
    left = [path.name for path in store.blobs.iterdir()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(error.filename == str(store.blobs), left, len(store.get(store.put(b"x" * 5000))))
"""
    child = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert child.stdout.strip() == "True [] 5000"
