"""The repository keeps its own promises: commands, documents, lock, contracts, and no real person's data."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import phonenumbers
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]

# The only numbers of persons that may stand anywhere here: examples of libphonenumber, and the subscriber
# that no directory lists, 123 4567. LIDs are made of zeros; so are group ids.
PHONES = re.compile(
    r"27\d\d123456[07]|263712345678|258821234567|447400123456|918123456789|2348021234567|12015550123"
)
LIDS = re.compile(r"[1389]0{8,12}\d\d|120363\d+")
PASSWORDS = re.compile(r"s3cret.*|secret|password|open-sesame|PASSWORD|\*+|[{$<].*")


def texts() -> Iterator[tuple[str, str]]:
    """Every text file under version control, but the lock, whose hashes are digits."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("no git here: what is under version control")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S607 -- git of the PATH
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if name and name != "requirements.lock" and path.is_file():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def is_phone(digits: str) -> bool:
    try:
        return phonenumbers.is_valid_number(phonenumbers.parse(f"+{digits}"))
    except phonenumbers.NumberParseException:
        return False


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def subcommands(name: str) -> set[str]:
    """The commands that a script lists in its help."""
    screen = run(str(Path(sys.executable).parent / name), "--help").stdout
    return set(re.findall(r"^[│ ]*([a-z][a-z-]+)(?:  |$)", screen, flags=re.MULTILINE))


def test_make_lists_every_target_it_has() -> None:
    listed = set(re.findall(r"^  make ([a-z]+)", run("make").stdout, flags=re.MULTILINE))
    assert listed == make_targets()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_name_only_commands_that_exist(document: Path) -> None:
    code = "\n".join(
        re.findall(r"```.*?```|`[^`\n]+`", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
    assert set(re.findall(r"\bmake ([a-z]+)\b", code)) <= make_targets()
    for name in SCRIPTS:
        assert set(re.findall(rf"\b{name} ([a-z][a-z-]+)\b", code)) <= subcommands(name)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_link_only_to_files_that_exist(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_every_command_answers_help(name: str) -> None:
    script = str(Path(sys.executable).parent / name)
    found = subcommands(name)
    assert found
    for command in sorted(found):
        done = run(script, command, "--help")
        assert done.returncode == 0, done.stderr
        assert "usage: " in done.stdout.lower()


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_an_unknown_command_is_a_usage_error(name: str) -> None:
    assert run(str(Path(sys.executable).parent / name), "no-such-command").returncode == 2


def test_no_number_of_a_real_person_is_under_version_control() -> None:
    found = []
    for name, text in texts():
        for digits in re.findall(r"(?<![0-9A-Za-z._])[1-9][0-9]{9,14}(?![0-9A-Za-z])", text):
            if PHONES.fullmatch(digits) or LIDS.fullmatch(digits):
                continue
            if len(digits) >= 13 or is_phone(digits):
                found.append(f"{name}: {digits}")
    assert found == []


def test_no_credentials_are_under_version_control() -> None:
    found = []
    for name, text in texts():
        found += [
            f"{name}: the password {password} in a URL"
            for password in re.findall(r"\b[a-z+]+://[^\s:/@'\"]+:([^\s@'\"]+)@", text)
            if not PASSWORDS.fullmatch(password)
        ]
        if re.search(
            r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36}", text
        ):
            found.append(f"{name}: a key")
    assert found == []


def check_lock(folder: Path) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, str(ROOT / ".ci" / "check_lock.py"), str(folder))


def test_the_lock_is_in_step_and_from_the_public_index() -> None:
    done = check_lock(ROOT)
    assert done.returncode == 0, done.stderr


LOCK_FAULTS = [
    (
        "requirements.lock",
        r"^rich==",
        "--extra-index-url https://pypi.example/simple\nrich==",
        "pypi.example",
    ),
    ("requirements.lock", r"^(rich)==[0-9.]+", r"\1 @ file:///tmp/rich.whl", "file:///tmp/rich.whl"),
    ("requirements.lock", r"^(rich)==[0-9.]+", r"\1 @ git+https://pypi.org/rich", "git+https"),
    ("requirements.lock", r"^(rich)==[0-9.]+", r"\1>=15", "rich is not pinned"),
    ("requirements.lock", r"^(rich==[0-9.]+) \\\n( +--hash.*\n)+", r"\1\n", "rich has no hash"),
    ("requirements.lock", r"^rich==[0-9.]+", "rich==1.0", "rich==1.0 is not rich>="),
    ("requirements.lock", r"^rich==", "ri ch ==", "not a requirement"),
    ("pyproject.toml", r'^ +"rich>=14",\n', "", "rich is not in pyproject.toml any more"),
    ("pyproject.toml", r'"rich>=14",', '"rich>=14", "requests",', "requests of pyproject.toml is missing"),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "finding"), LOCK_FAULTS, ids=[fault[3] for fault in LOCK_FAULTS]
)
def test_a_lock_that_proves_less_is_found(
    tmp_path: Path, file: str, old: str, new: str, finding: str
) -> None:
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    text = (tmp_path / file).read_text(encoding="utf-8")
    changed, times = re.subn(old, new, text, count=1, flags=re.MULTILINE)
    assert times == 1
    (tmp_path / file).write_text(changed, encoding="utf-8")
    done = check_lock(tmp_path)
    assert done.returncode == 1
    assert finding in done.stderr


def test_the_environment_is_refused_on_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    done = run("make", f"PYTHON={old}", "test", cwd=tmp_path)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()
