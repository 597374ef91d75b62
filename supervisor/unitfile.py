"""Unit file: what a unit of systemd says, and how a path is written into one.

The rule: **a value is read and written by the syntax of its own setting.** Command lines and lists of paths
are words, with quotes and backslashes; ``WorkingDirectory=`` and ``EnvironmentFile=`` take the rest of the
line as it is; ``Documentation=`` takes URLs. In all of them ``%`` begins a specifier, in the arguments of a
command line ``$`` begins a variable. A path with a space or a ``%`` in it is right only in its own
spelling.

What cannot be written in a unit at all is refused: a line break, what is not UTF-8, and quotes and
backslashes, which systemd takes in no name of a program.

Sources: systemd.syntax(7), systemd.unit(5) (specifiers, drop-ins), systemd.service(5) (command lines).
Rejected: :mod:`configparser` (repeated keys, ``%`` and continued lines mean other things to it), asking
``systemctl show`` (needs a manager that runs and has loaded the unit).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from urllib.parse import quote

from msgspec import Struct

from supervisor.errors import UsageError

_COMMENT = ("#", ";")
_AS_WRITTEN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._-+:=@,%$")
_UNWRITABLE = frozenset("\"'\\")
_SPECIFIER = re.compile(r"%(.)")
_VARIABLE = re.compile(r"\$(?:\$|\{(\w+)\}|(\w+)$)")
_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)\s*")
_UNITS = {
    **dict.fromkeys(("", "s", "sec", "second", "seconds"), 1.0),
    **dict.fromkeys(("ms", "msec"), 0.001),
    **dict.fromkeys(("us", "usec"), 0.000001),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_WHOLE_LINE = frozenset({"WorkingDirectory", "EnvironmentFile"})
_URLS = frozenset({"Documentation"})


class Unit(Struct, frozen=True):
    """What a unit and its drop-ins say.

    Attributes:
        values: of each section and key, in order; an empty assignment forgets those before it.
        specifiers: the letter of each one that is known here to what it stands for.
    """

    values: Mapping[tuple[str, str], tuple[str, ...]]
    specifiers: Mapping[str, str]

    def all(self, key: str, section: str = "Service") -> tuple[str, ...]:
        """Return every value of a setting that may be given several times, specifiers resolved."""
        return tuple(expand(value, self.specifiers) for value in self.values.get((section, key), ()))

    def last(self, key: str, section: str = "Service") -> str | None:
        """Return the value of a setting that counts once, or None."""
        return next(iter(reversed(self.all(key, section))), None)

    def words(self, key: str, section: str = "Service") -> list[str]:
        """Return the words of all values of a setting.

        Raises:
            UsageError: a quote is not closed.
        """
        raw = self.values.get((section, key), ())
        try:
            return [expand(word, self.specifiers) for value in raw for word in shlex.split(value)]
        except ValueError as error:
            raise UsageError(f"{key}= of the unit has a quote that is not closed; close it") from error


def parse(texts: Iterable[str], specifiers: Mapping[str, str]) -> Unit:
    """Return what the files of a unit say: its own first, then its drop-ins in their order."""
    values: dict[tuple[str, str], tuple[str, ...]] = {}
    for text in texts:
        section = ""
        for line in _lines(text):
            if line.startswith("[") and line.endswith("]"):
                section = line[1:-1]
                continue
            key, equals, value = (part.strip() for part in line.partition("="))
            if equals:
                place = (section, key)
                values[place] = (*values.get(place, ()), value) if value else ()
    return Unit(values, specifiers)


def _lines(text: str) -> Iterable[str]:
    """Yield the lines that mean something; one that ends in a backslash goes on in the next."""
    begun = ""
    for line in text.splitlines():
        if line.lstrip().startswith(_COMMENT):
            continue
        if line.endswith("\\"):
            begun += line[:-1] + " "
            continue
        whole, begun = (begun + line).strip(), ""
        if whole:
            yield whole


def expand(value: str, specifiers: Mapping[str, str]) -> str:
    """Resolve the specifiers that are known; the others stay as they are."""
    return _SPECIFIER.sub(lambda found: specifiers.get(found[1], found[0]), value)


def substitute(word: str, environment: Mapping[str, str]) -> str:
    """Replace the variables in one word of a command line; an unknown one is empty."""
    return _VARIABLE.sub(
        lambda found: "$" if found[0] == "$$" else environment.get(found[1] or found[2], ""), word
    )


def seconds(span: str) -> float | None:
    """Return a time span of systemd.time(7) in seconds; None for ``infinity`` and for what is none."""
    parts = _SPAN.findall(span)
    if not parts or _SPAN.sub("", span).strip() or any(unit not in _UNITS for _, unit in parts):
        return None
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def relocate(text: str, moved: Callable[[str], str], places: re.Pattern[str]) -> str:
    """Return the text of a unit with other paths in it.

    Args:
        text: in which each path that moves is written plainly, without quotes.
        moved: returns where a place that was found is in truth.
        places: finds the paths that move.

    Raises:
        UsageError: a path cannot be written in a unit.
    """
    return "".join(_relocated(line, moved, places) for line in text.splitlines(keepends=True))


def _relocated(line: str, moved: Callable[[str], str], places: re.Pattern[str]) -> str:
    key, equals, value = line.partition("=")
    if line.startswith(_COMMENT) or not equals or not places.search(value):
        return line

    def place(found: re.Match[str]) -> str:
        return writable(moved(found[0])).replace("%", "%%")

    if key in _WHOLE_LINE:
        return f"{key}={places.sub(place, value)}"
    if key in _URLS:
        return f"{key}=" + places.sub(
            lambda found: quote(writable(moved(found[0]))).replace("%", "%%"), value
        )

    def word_with_places(number: int, word: str) -> str:
        if not places.search(word):
            return word
        # The program's own path is taken as it is; in what follows it a $ would name a variable.
        is_argument = key.startswith("Exec") and number > 0
        return in_quotes(
            places.sub(lambda at: place(at).replace("$", "$$") if is_argument else place(at), word)
        )

    words = (word_with_places(number, word) for number, word in enumerate(value.split()))
    return f"{key}={' '.join(words)}\n"


def in_quotes(word: str) -> str:
    """Return a word so that systemd reads it as one."""
    return word if _AS_WRITTEN.issuperset(word) else f'"{word}"'


def writable(path: str) -> str:
    """Return a path that can be written in a unit.

    Raises:
        UsageError: no unit can name it.
    """
    if not path.isprintable() or path != path.strip() or not _UNWRITABLE.isdisjoint(path):
        shown = path.encode("unicode_escape").decode()
        raise UsageError(
            f"no unit of systemd can name {shown}: it has a quote, a backslash, a control character,"
            " a blank at an end, or is not UTF-8; move it"
        )
    return path
