"""Unit files: read as systemd reads them, written so that systemd reads what was meant."""

from __future__ import annotations

import re

import pytest

from supervisor import unitfile
from supervisor.errors import UsageError

SPECIFIERS = {"%": "%", "i": "prod", "t": "/run"}
PLACE = re.compile(r"/opt/x(?![\w.-])")


def test_later_file_wins_where_one_value_counts_and_adds_where_several_do() -> None:
    own = "[Service]\nType=simple\nEnvironmentFile=/a\nEnvironmentFile=-/b/%i\n"
    read = unitfile.parse([own, "[Service]\nType=notify\nEnvironmentFile=/c%%\n"], SPECIFIERS)
    assert read.last("Type") == "notify"
    assert read.all("EnvironmentFile") == ("/a", "-/b/prod", "/c%")


def test_empty_assignment_forgets_those_before_it() -> None:
    read = unitfile.parse(["[Service]\nExecStart=/a b\n", "[Service]\nExecStart=\nExecStart=/c d\n"], {})
    assert read.words("ExecStart") == ["/c", "d"]


def test_comments_sections_and_continued_lines() -> None:
    text = (
        "# Type=a\n; Type=b\n[Unit]\nType=c\n[Service]\nExecStart=/x \\\n  # a comment between\n  y\\\n z\n"
    )
    read = unitfile.parse([text], {})
    assert (read.last("Type"), read.last("Type", "Unit")) == (None, "c")
    assert read.words("ExecStart") == ["/x", "y", "z"]


def test_words_may_be_quoted_and_unknown_specifiers_stay() -> None:
    read = unitfile.parse(["[Service]\nExecStart=\"/a b/%t\" 'c d' %q\n"], SPECIFIERS)
    assert read.words("ExecStart") == ["/a b//run", "c d", "%q"]


def test_quote_that_is_not_closed_is_an_error() -> None:
    read = unitfile.parse(['[Service]\nExecStart="/a\n'], {})
    with pytest.raises(
        UsageError, match=r"^ExecStart= of the unit has a quote that is not closed; close it$"
    ):
        read.words("ExecStart")


@pytest.mark.parametrize(
    ("word", "is_to_be"),
    [("${A}", "1"), ("$A", "1"), ("x:${A}", "x:1"), ("$$A", "$A"), ("${NONE}", ""), ("a$", "a$")],
)
def test_variables_in_a_command(word: str, is_to_be: str) -> None:
    assert unitfile.substitute(word, {"A": "1"}) == is_to_be


@pytest.mark.parametrize(
    ("line", "is_to_be"),
    [
        ("WorkingDirectory=/opt/x", "WorkingDirectory=/a b 100%%$"),
        ("ReadWritePaths=-/opt/x/y /z", 'ReadWritePaths="-/a b 100%%$/y" /z'),
        # The first word names a program and has no variables in it, the others have.
        ("ExecStart=/opt/x/p /opt/x ${V}", 'ExecStart="/a b 100%%$/p" "/a b 100%%$$" ${V}'),
        ("Documentation=file:///opt/x/d.md", "Documentation=file:///a%%20b%%20100%%25%%24/d.md"),
        ("# /opt/x=", "# /opt/x="),
        ("ExecStart=/opt/xy /opt/x.y /opt/x-y", "ExecStart=/opt/xy /opt/x.y /opt/x-y"),
    ],
)
def test_path_is_written_by_the_syntax_of_its_setting(line: str, is_to_be: str) -> None:
    assert unitfile.relocate(f"{line}\n", lambda _: "/a b 100%$", PLACE) == f"{is_to_be}\n"


@pytest.mark.parametrize("path", ["/a\nb", '/a"b', "/a'b", "/a\\b", "/a ", "/a\udcff"])
def test_path_that_no_unit_can_name_is_refused(path: str) -> None:
    with pytest.raises(UsageError, match=r"^no unit of systemd can name .*; move it$"):
        unitfile.relocate("WorkingDirectory=/opt/x\n", lambda _: path, PLACE)


@pytest.mark.parametrize(
    ("span", "seconds"),
    [
        ("2", 2.0),
        ("0", 0.0),
        ("100ms", 0.1),
        ("1min 30s", 90.0),
        ("1min30s", 90.0),
        ("1.5 h", 5400.0),
        ("infinity", None),
        ("", None),
        ("5 fortnights", None),
        ("-1", None),
    ],
)
def test_time_spans_are_read(span: str, seconds: float | None) -> None:
    assert unitfile.seconds(span) == seconds
