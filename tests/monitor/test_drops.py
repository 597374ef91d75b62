"""Drop numbers in texts: a golden table, and the history of the pattern as rows of it."""

from __future__ import annotations

import pytest

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
