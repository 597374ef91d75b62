"""What was remembered comes back exactly, or not at all and with a sentence."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from supervisor import remembered
from supervisor.remembered import Quarantined, RecordedProcess, Remembered, load, save

REMEMBERED = Remembered(
    known_good=("a" * 64, "b" * 64),
    quarantine={
        "c" * 64: Quarantined("readiness", "not live within 3 s", "2026-01-02T03:04:05.678+00:00"),
        "d" * 64: Quarantined("import", "cannot read \udcff.py: “no”", "2026-01-02T03:04:06.000+00:00"),
        "e" * 64: Quarantined(None, "by an operator", "2026-01-02T03:04:07.000+00:00"),
    },
    next_generation=42,
    processes=(RecordedProcess(41, 12345, 987654, "5a1c7d52-0000-4000-8000-000000000000"),),
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


@pytest.fixture
def saved(path: Path) -> bytes:
    """The content of a good file."""
    save(path, REMEMBERED)
    return path.read_bytes()


def set_aside(path: Path) -> list[Path]:
    return sorted(path.parent.glob("state.json.corrupt-*"))


def changed(saved: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """Return a file whose body was changed and whose checksum is right."""
    envelope = json.loads(saved)
    change(envelope["body"])
    envelope["sha256"] = remembered._checksum(envelope["body"])
    return json.dumps(envelope).encode()


def test_what_was_saved_comes_back(path: Path) -> None:
    for value in (REMEMBERED, Remembered(), REMEMBERED):
        save(path, value)
        assert load(path) == (value, None)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]


def test_only_the_owner_may_read_it(path: Path) -> None:
    save(path, REMEMBERED)
    assert path.stat().st_mode & 0o777 == 0o600


def test_first_start_remembers_nothing_and_has_nothing_to_say(path: Path) -> None:
    assert load(path) == (Remembered(), None)


@pytest.mark.parametrize("content", [b"", b"{}", b"null", b"[" * 100_000, b"\xff\xfe", b"1" * 5_000])
def test_what_is_no_state_is_set_aside_and_told(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    value, problem = load(path)
    (aside,) = set_aside(path)
    assert value == Remembered()
    assert problem is not None
    assert re.fullmatch(
        rf"{path} .*; it was set aside as {aside.name}, and last good .* are forgotten", problem
    )
    assert re.fullmatch(r"state\.json\.corrupt-\d{8}T\d{6}\.\d{6}Z", aside.name)
    assert aside.read_bytes() == content
    assert load(path) == (Remembered(), None)


def test_torn_file_is_never_taken_for_a_good_one(path: Path, saved: bytes) -> None:
    for length in range(len(saved)):
        path.write_bytes(saved[:length])
        value, problem = load(path)
        assert (value, "is torn or damaged; it was set aside" in (problem or "")) == (Remembered(), True), (
            length
        )
        assert len(set_aside(path)) <= 3


def test_flipped_bit_is_never_taken_for_another_value(path: Path, saved: bytes) -> None:
    found = random.Random(20260102)  # noqa: S311 -- damage
    told = 0
    for _ in range(2_000):
        damaged = bytearray(saved)
        for _ in range(found.choice([1, 1, 1, 2, 8])):
            damaged[found.randrange(len(saved))] ^= 1 << found.randrange(8)
        path.write_bytes(damaged)
        value, problem = load(path)
        if problem is None:
            assert value == REMEMBERED  # It was in the layout.
        else:
            assert value == Remembered()
            told += 1
    assert told > 1_000


def test_half_of_one_file_and_half_of_another_are_told(path: Path, saved: bytes) -> None:
    save(path, replace(REMEMBERED, next_generation=43, known_good=("b" * 64, "a" * 64)))
    other = path.read_bytes()
    assert len(other) == len(saved)
    for at in range(1, len(saved)):
        if (mixed := saved[:at] + other[at:]) not in {saved, other}:
            path.write_bytes(mixed)
            assert load(path)[1] is not None, at


def test_version_of_a_later_supervisor_is_set_aside(path: Path, saved: bytes) -> None:
    path.write_bytes(saved.replace(b'"version": 1', b'"version": 2'))
    value, problem = load(path)
    assert value == Remembered()
    assert "is of version 2, this supervisor knows 1; it was set aside" in (problem or "")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("known_good", ["a" * 64] * 4),
        ("known_good", ["../../etc/passwd"]),
        ("known_good", ["a" * 64 + "\n"]),
        ("known_good", None),
        ("quarantine", {"c" * 64: {"reason": 1, "detail": None, "at": ""}}),
        ("quarantine", {"no digest": {"reason": "crash", "detail": None, "at": ""}}),
        ("quarantine", []),
        ("next_generation", 0),
        ("next_generation", 1.0),
        ("next_generation", True),
        ("processes", [{"generation": 1, "pid": -1, "start_ticks": 1, "boot_id": ""}]),
        ("processes", [{"generation": 1, "pid": 1}]),
        ("something", "of another version"),
    ],
)
def test_wrong_values_under_a_right_checksum_are_set_aside(
    path: Path, saved: bytes, key: str, value: object
) -> None:
    path.write_bytes(changed(saved, lambda body: body.__setitem__(key, value)))
    found, problem = load(path)
    assert found == Remembered()
    assert re.search(r"does not hold what it should|holds more or less than", problem or "")


def test_missing_key_under_a_right_checksum_is_set_aside(path: Path, saved: bytes) -> None:
    path.write_bytes(changed(saved, lambda body: body.__delitem__("quarantine")))
    assert "holds more or less than" in (load(path)[1] or "")


def test_three_that_were_set_aside_are_kept_the_newest(path: Path) -> None:
    for number in range(5):
        path.write_text(f"damaged {number}", encoding="utf-8")
        load(path)
    assert [aside.read_text(encoding="utf-8") for aside in set_aside(path)] == [
        "damaged 2",
        "damaged 3",
        "damaged 4",
    ]


def test_directory_in_its_place_is_told_and_moved(path: Path) -> None:
    path.mkdir()
    value, problem = load(path)
    assert value == Remembered()
    assert "cannot be read (Is a directory); it was set aside" in (problem or "")
    save(path, REMEMBERED)
    assert load(path) == (REMEMBERED, None)


def test_what_cannot_be_set_aside_is_told_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b"damaged")

    def refuse(_path: Path) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(remembered, "set_aside", refuse)
    value, problem = load(path)
    assert value == Remembered()
    assert "is torn or damaged; it cannot be set aside (Permission denied)" in (problem or "")


@pytest.mark.parametrize(
    "value",
    [
        replace(REMEMBERED, known_good=("a" * 64,) * 4),
        replace(REMEMBERED, known_good=("a",)),
        replace(REMEMBERED, next_generation=0),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(path: Path, saved: bytes, value: Remembered) -> None:
    with pytest.raises(ValueError, match="does not hold what it should"):
        save(path, value)
    assert path.read_bytes() == saved


def test_error_of_the_disk_names_the_file_and_leaves_the_former_one(
    path: Path, saved: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("supervisor.remembered.os.fsync", refuse)
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
        save(path, Remembered())
    assert [entry.name for entry in path.parent.iterdir()] == ["state.json"]
    assert path.read_bytes() == saved


def test_directory_that_is_none_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "state.json"
    with pytest.raises(FileExistsError, match=f"'{path}'"):
        save(path, REMEMBERED)
    assert load(path)[0] == Remembered()


def test_directory_that_a_cleaner_took_away_is_made_anew(tmp_path: Path) -> None:
    path = tmp_path / "state" / "state.json"
    save(path, REMEMBERED)
    assert load(path) == (REMEMBERED, None)
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_link_in_place_of_the_temporary_name_is_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    temporary = path.with_name(".state.json.new")
    temporary.symlink_to(victim)
    save(path, REMEMBERED)
    assert load(path) == (REMEMBERED, None)
    assert (victim.read_text(encoding="utf-8"), temporary.is_symlink()) == ("untouched", False)


def test_link_that_is_planted_at_the_last_moment_is_not_followed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched", encoding="utf-8")
    unlink = Path.unlink

    def plant(self: Path, *, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        self.symlink_to(victim)

    monkeypatch.setattr(Path, "unlink", plant)
    with pytest.raises(FileExistsError):
        save(path, REMEMBERED)
    assert victim.read_text(encoding="utf-8") == "untouched"


SAVING = """
import sys
from msgspec.structs import replace
from pathlib import Path
from supervisor.remembered import Remembered, save
path, number = Path(sys.argv[1]), int(sys.argv[2])
while True:
    number += 1
    save(path, Remembered(known_good=(f"{number:064x}",) * (number % 3 + 1), next_generation=number))
    print(number, flush=True)
"""


def test_file_is_good_whenever_the_process_that_saves_is_killed(path: Path) -> None:
    """Each round is killed a little further on its way; what it had told to be saved is there."""
    number = 0
    for round_number in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVING, str(path), str(number)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        for _ in range(round_number + 1):
            told = int(process.stdout.readline())
        process.kill()
        rest = process.stdout.read().split()
        process.wait()
        process.stdout.close()
        told = int(rest[-1]) if rest else told
        value, problem = load(path)
        assert problem is None
        assert value.next_generation in {told, told + 1}
        assert value.known_good[0] == f"{value.next_generation:064x}"
        number = value.next_generation
