"""Drop numbers in texts: a golden table, and the history of the pattern as rows of it."""

from __future__ import annotations

import itertools
import re
import string
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitor.drops import find_drops

GOLDEN = [
    # plain, and where it stands in the text
    ("DR1000001", ["DR1000001"]),
    ("DR100001", ["DR100001"]),
    ("DR10000001", ["DR10000001"]),
    ("dr1000001", ["DR1000001"]),
    ("Dr1000001", ["DR1000001"]),
    ("DR1000001 done", ["DR1000001"]),
    ("done DR1000001", ["DR1000001"]),
    ("done: DR1000001.", ["DR1000001"]),
    ("(DR1000001)", ["DR1000001"]),
    ("*DR1000001*", ["DR1000001"]),
    ("_DR1000001_", ["DR1000001"]),
    ("~DR1000001~", ["DR1000001"]),
    ("https://example.org/DR1000001?x=1", ["DR1000001"]),
    ("DR1000001done", ["DR1000001"]),
    ("DR1000001/2", ["DR1000001"]),
    ("#DR1000001", ["DR1000001"]),
    # blanks between
    ("DR 1000001", ["DR1000001"]),
    ("dr 1000001", ["DR1000001"]),
    ("DR  1000001", ["DR1000001"]),
    ("DR\t1000001", ["DR1000001"]),
    ("DR\u00a01000001", ["DR1000001"]),
    ("DR   1000001", []),
    ("DR\n1000001", []),
    ("DR\r\n1000001", []),
    ("DR\u20281000001", []),
    # several, repeated, in order
    ("DR1000002 DR1000001", ["DR1000002", "DR1000001"]),
    ("DR1000001,DR1000002", ["DR1000001", "DR1000002"]),
    ("DR1000001\nDR1000002\nDR1000003", ["DR1000001", "DR1000002", "DR1000003"]),
    ("DR1000001 and dr 1000001", ["DR1000001"]),
    ("DR1000001 and 1000002", ["DR1000001"]),
    ("DR1000001DR1000002", ["DR1000001"]),
    # other scripts and invisible characters
    ("ＤＲ１００００01", ["DR1000001"]),  # noqa: RUF001 -- full width is the point
    ("DR１０００００１", ["DR1000001"]),  # noqa: RUF001 -- same
    ("D\u200bR1000001", ["DR1000001"]),
    ("DR\u200b1000001", ["DR1000001"]),
    ("\u200eDR1000001\u200e", ["DR1000001"]),
    ("DR100\u00ad0001", ["DR1000001"]),
    ("DR\u0661\u0660\u0660\u0660\u0660\u0660\u0661", []),
    ("DR\u0967\u0966\u0966\u0966\u0966\u0966\u0967", []),
    ("🎉DR1000001🎉", ["DR1000001"]),
    # glued to something else
    ("XDR1000001", []),
    ("1DR1000001", []),
    ("ADR1000001", []),
    ("hydr1000001", []),
    ("DRO1000001", []),
    ("DRR1000001", []),
    ("D R1000001", []),
    # wrong lengths
    ("DR1", []),
    ("DR12345", []),
    ("DR123456789", []),
    ("DR1234567890123", []),
    ("DR 12345", []),
    # no drop at all
    ("", []),
    ("DR", []),
    ("Morning all", []),
    ("1000001", []),
    ("27711234567", []),
    ("Dr Smith 1000001", []),
    # extra separators: drops only behind the switch
    ("DR-1000001", []),
    ("DR:1000001", []),
    ("DR: 1000001", []),
    ("DR#1000001", []),
    ("DR.1000001", []),
]


@pytest.mark.parametrize(("text", "numbers"), GOLDEN)
def test_text_gives_exactly_these_drops(text: str, numbers: list[str]) -> None:
    assert list(find_drops(text).numbers) == numbers


@pytest.mark.parametrize("text", ["DR-1000001", "DR:1000001", "DR: 1000001", "DR#1000001", "DR.1000001"])
def test_extra_separators_make_a_drop_only_when_switched_on(text: str) -> None:
    assert find_drops(text).look_alikes == 1
    assert find_drops(text, extra_separators=True).numbers == ("DR1000001",)


@pytest.mark.parametrize(
    ("text", "look_alikes"),
    [
        ("DR12345", 1),
        ("DR123456789", 1),
        ("DR12345 and DR123456789", 2),
        ("DR1000001", 0),
        ("DR 12", 0),
        ("Morning", 0),
    ],
)
def test_what_looks_like_a_drop_and_is_none_is_counted(text: str, look_alikes: int) -> None:
    found = find_drops(text)
    assert found.look_alikes == look_alikes
    assert "DR12345" not in found.numbers


def test_project_decides_how_many_digits_a_drop_has() -> None:
    assert find_drops("DR12345 DR123456789", min_digits=5, max_digits=9).numbers == ("DR12345", "DR123456789")
    assert find_drops("DR123456", min_digits=7).numbers == ()


def _plainly(text: str) -> list[str]:
    """The specification, character by character, without a regular expression."""
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    found = []
    for start in range(len(text)):
        before = text[start - 1 : start] if start else ""
        if text[start : start + 2].upper() != "DR" or not text[start : start + 2].isascii():
            continue
        if before and before in ASCII_WORD:
            continue
        rest = text[start + 2 :]
        blanks = len(rest) - len(rest.lstrip(" \t"))
        digits = "".join(itertools.takewhile(lambda c: c in "0123456789", rest[blanks:]))
        if blanks <= 2 and 6 <= len(digits) <= 8 and f"DR{digits}" not in found:
            found.append(f"DR{digits}")
    return found


ASCII_WORD = string.ascii_letters + string.digits
FULL_WIDTH = str.maketrans({c: chr(ord(c) + 0xFEE0) for c in "DR0123456789"})
LETTERS = ["DR", "dr", "Dr", "DR".translate(FULL_WIDTH), "x", "X", "O", *map(chr, (0xDF, 0x17F, 0x131))]
BLANKS = [" ", "  ", "\t", "\n", *map(chr, (0xA0, 0x200B, 0xAD))]
DIGITS = [
    "100001",
    "1000001",
    "10000001",
    "12345",
    "123456789",
    "1000001".translate(FULL_WIDTH),
    chr(0x661) * 6,
]
PIECES = st.sampled_from([*LETTERS, *BLANKS, *DIGITS, *"_*/:-."])


@given(st.lists(PIECES, max_size=12).map("".join))
def test_drops_are_those_of_the_plain_specification(text: str) -> None:
    assert list(find_drops(text).numbers) == _plainly(text)


@given(st.text())
def test_any_text_gives_drops_in_canonical_spelling_only(text: str) -> None:
    found = find_drops(text)
    assert len(set(found.numbers)) == len(found.numbers)
    assert all(re.fullmatch("DR[0-9]{6,8}", number) for number in found.numbers)
