"""What children are told besides their code, and when that is a reason for a new generation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.environment import read
from supervisor.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "environment"


def test_assignments_are_read_as_systemd_reads_them(file: Path) -> None:
    file.write_text(
        "# comment\n; comment\n\n  PLAIN=a b\n"
        "SINGLE='it is $HOME'\nDOUBLE=\"x=y\"\nEMPTY=\nexport EXPORTED=1\nODD='a\"\n",
        encoding="utf-8",
    )
    assert read({"HOME": "/h", "PLAIN": "inherited"}, file).variables == {
        "HOME": "/h",
        "PLAIN": "a b",
        "SINGLE": "it is $HOME",
        "DOUBLE": "x=y",
        "EMPTY": "",
        "EXPORTED": "1",
        "ODD": "'a\"",
    }


@pytest.mark.parametrize("line", ["no assignment", "1ST=x", "A B=x", "=x", "NAME = x"])
def test_line_that_is_no_assignment_is_named_by_its_number_alone(file: Path, line: str) -> None:
    file.write_text(f"GOOD=1\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2 is not NAME=value; correct it$") as caught:
        read({}, file)
    assert line not in str(caught.value)


def test_file_that_is_not_there_or_no_text_is_one_sentence(file: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read --env-file .*: No such file or directory$"):
        read({}, file)
    file.write_bytes(b"A=\xff\n")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read({}, file)


def test_pipe_in_place_of_the_file_is_refused_and_not_waited_for(file: Path) -> None:
    os.mkfifo(file)
    with pytest.raises(UsageError, match="is not a regular file"):
        read({}, file)


def test_digest_tells_of_variables_and_credentials_and_of_nothing_else(file: Path, tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    inherited = {"CREDENTIALS_DIRECTORY": str(credentials), "A": "1"}
    seen = [read(inherited, None).digest]
    file.write_text("# nothing\n", encoding="utf-8")
    assert read(inherited, file).digest == seen[0]
    file.write_text("A=2\n", encoding="utf-8")
    seen.append(read(inherited, file).digest)
    (credentials / "url").write_text("first", encoding="utf-8")
    seen.append(read(inherited, file).digest)
    (credentials / "url").write_text("other", encoding="utf-8")
    seen.append(read(inherited, file).digest)
    assert len(set(seen)) == 4
    os.mkfifo(credentials / "pipe")
    assert read(inherited, file).digest == seen[-1], "what cannot be read is as if it were not there"
