r"""Text of a chat message -> the drop numbers in it.

The rule: a drop is `DR` and six to eight ASCII digits (or as many as the project says), in either case, with
up to two blanks between, not glued to a letter or digit in front and not followed by a further digit. All of
them count, in order, each once; the result is spelled `DR` + digits, whatever the sender typed, so that one
drop has one key.

Text is put into NFKC form first (full-width digits and letters become plain, a no-break space a space) and
format characters (zero-width space, soft hyphen) are removed. A line break never joins `DR` to digits.

Rejected: `\bDR\s?\d{6,8}\b`, which takes the first drop only, joins over line breaks and leaves the break in
the stored key, accepts digits of any script, and misses `DR1000001done`. `DR-1000001` and its like are taken
only when `extra_separators` is on; switched off they are counted with what merely looks like a drop (five
digits, nine and more), so that an operator sees what a stricter or looser pattern would change.
"""

import re
import unicodedata
from typing import NamedTuple

MIN_DIGITS = 6
MAX_DIGITS = 8

# Wider than a drop on purpose: what matches and is none is a look-alike. One digit below the shortest drop
# is the commonest typing error; fewer digits are other words ("DR 12").
_CANDIDATE = re.compile(r"(?<![A-Za-z0-9])DR([ \t:#.\-]{0,2})([0-9]{5,})", re.IGNORECASE | re.ASCII)
_EXTRA_SEPARATORS = frozenset(":#.-")


class FoundDrops(NamedTuple):
    """What one text holds."""

    numbers: tuple[str, ...]
    """Drop numbers in their canonical spelling, in the order of the text, without repetition."""
    look_alikes: int
    """How many places look like a drop and are none; they are counted and never stored."""


_NONE = FoundDrops((), 0)


def find_drops(
    text: str, *, extra_separators: bool = False, min_digits: int = MIN_DIGITS, max_digits: int = MAX_DIGITS
) -> FoundDrops:
    """Return the drops of `text`; with `extra_separators`, `DR-1000001` and `DR: 1000001` are drops too.

    `min_digits` is at least 5: below that, `DR` and a number are just words.
    """
    plain = _plain(text)
    if "DR" not in plain.upper():  # Most messages: the pattern need not be tried at each place.
        return _NONE
    numbers: dict[str, None] = {}
    look_alikes = 0
    for match in _CANDIDATE.finditer(plain):
        separators, digits = match.groups()
        too_loose = not extra_separators and not _EXTRA_SEPARATORS.isdisjoint(separators)
        if too_loose or not min_digits <= len(digits) <= max_digits:
            look_alikes += 1
        else:
            numbers[f"DR{digits}"] = None
    return FoundDrops(tuple(numbers), look_alikes)


def _plain(text: str) -> str:
    """Return `text` in NFKC form and without format characters; plain ASCII is returned as it is."""
    if text.isascii():
        return text
    normal = unicodedata.normalize("NFKC", text)
    return "".join(character for character in normal if unicodedata.category(character) != "Cf")
