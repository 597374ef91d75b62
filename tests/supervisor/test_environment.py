"""What children are told besides their code, and when that is a reason for a new generation."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.environment import assignments, read
from supervisor.errors import UsageError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "environment"


AS_SYSTEMD = r"""# comment
; comment

  PLAIN=a b
SINGLE='it is $HOME'
DOUBLE="x=y \"z\" \$a \`b\` \\ \n"
EMPTY=
ESCAPED=a\b\\c\'d
JOINED=one \
  two
KEPT=trail\ {blanks}
TRIMMED= both{blanks}
SPACED = name
LINES="one
two \
three"
PARTS='a''b' c
LITERAL=a'b'c # no comment
BEHIND="x"y"z"
NEXT=\
line
""".replace("{blanks}", " \t")
"""What has its own rule in systemd's reader of ``EnvironmentFile=``; test_install.py has systemd read it."""

READ = {
    "PLAIN": "a b",
    "SINGLE": "it is $HOME",
    "DOUBLE": 'x=y "z" $a `b` \\ \\n',
    "EMPTY": "",
    "ESCAPED": "ab\\c'd",
    "JOINED": "one   two",
    "KEPT": "trail ",
    "TRIMMED": "both",
    "SPACED": "name",
    "LINES": "one\ntwo three",
    "PARTS": "abc",
    "LITERAL": "a'b'c # no comment",
    "BEHIND": 'xy"z"',
    "NEXT": "line",
}


def test_assignments_are_read_as_systemd_reads_them(file: Path) -> None:
    file.write_text(f"{AS_SYSTEMD}export EXPORTED=1\nLAST=x\\", encoding="utf-8")
    inherited = {"HOME": "/h", "PLAIN": "inherited"}
    assert read(inherited, file).variables == {"HOME": "/h", **READ, "EXPORTED": "1", "LAST": "x"}
    file.write_text("A=1\r\n\r\nB='2'\r\n", encoding="utf-8", newline="")
    assert read({}, file).variables == {"A": "1", "B": "2"}


def test_what_systemd_would_pass_over_is_no_assignment_in_a_file_of_its_own(file: Path) -> None:
    file.write_text("export A=1\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 1 is not NAME=value; correct it$"):
        assignments(file, exported=False)


@pytest.mark.parametrize("line", ["no assignment", "1ST=x", "A B=x", "=x", "A=\0"])
def test_line_that_is_no_assignment_is_named_by_its_number_alone(file: Path, line: str) -> None:
    file.write_text(f"GOOD='1\n1'\n{line}\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 3 is not NAME=value; correct it$") as caught:
        read({}, file)
    assert line not in str(caught.value)


@pytest.mark.parametrize("line", ["A='s3cret", 'A="s3cret\\"', "A='a'\"s3cret", "A='s3cret\nB=1"])
def test_quote_that_takes_in_all_that_follows_is_refused(file: Path, line: str) -> None:
    file.write_text(f"GOOD=1\n{line}\nC=1\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"line 2 begins a quote that is not closed; close it$"):
        read({}, file)


def test_comment_that_some_versions_of_systemd_go_on_with_is_refused(file: Path) -> None:
    file.write_text("# C:\\\nA=1\n", encoding="utf-8")
    with pytest.raises(UsageError, match="line 1 is a comment that takes in the next line"):
        read({}, file)


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
