"""Flags: the words of the command line as values.

The rule: ``run`` has one flag for each of :class:`supervisor.settings.Options`, named, typed and defaulted as
it is there; the TOML file is read by the same table. What was not given is not in the result. All from TARGET
on is the target's, also what looks like a flag of ours.

A mistake is a :class:`UsageError`, one sentence that names the flag. No abbreviations: a flag that a later
version adds may not change what a command line means.

Rejected: typer (its import was a quarter of a start, and 10 MiB for as long as the supervisor lives), and
argparse's own remainder, which makes something of ``-m`` and ``--`` among the target's arguments.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from supervisor.errors import UsageError
from supervisor.settings import Flag, Options

_COLUMNS = 100


class Parser(argparse.ArgumentParser):
    """Of one command.

    Args:
        prog: the words before its flags.
        description: what it is for; None adds nothing.
    """

    def __init__(self, prog: str, description: str | None = None) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_formatter)

    def error(self, message: str) -> NoReturn:
        """Refuse the command line; raises UsageError."""
        raise UsageError(f"{message.removeprefix('argument ')}; see {self.prog} --help")


def _formatter(prog: str) -> argparse.HelpFormatter:
    # With its width: left to itself, argparse loads shutil at each start to ask for the terminal's.
    try:
        columns = os.get_terminal_size().columns
    except OSError:
        columns = 0
    return argparse.HelpFormatter(prog, max_help_position=30, width=min(columns or _COLUMNS, _COLUMNS))


def add_json(parser: Parser) -> None:
    """Add the flag for a document in place of a table."""
    parser.add_argument("--json", action="store_true", help="Print the documented JSON instead of a table.")


def add_runtime_dir(parser: Parser) -> None:
    """Add the flag that names a supervisor."""
    parser.add_argument("--runtime-dir", metavar="DIR", help="Which supervisor: the directory of its socket.")


def add_count(parser: Parser, help_: str, *, least: int, default: int) -> None:
    """Add the flag for how many there shall be."""

    def read(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number from {least} on")
        return int(word)

    text = f"{help_} [default: {default}]"
    parser.add_argument("-n", dest="count", type=read, default=default, metavar="N", help=text)


def parse_run(parser: Parser, words: list[str]) -> argparse.Namespace:
    """Read what follows ``run``.

    Returns:
        ``config`` (a path or None), ``target`` (its words and all that follow them), and by the name of its
        key the value of each option that was given.

    Raises:
        UsageError: an option is not known or has no such values, or there is no TARGET.
    """
    parser.usage = "%(prog)s [OPTIONS] TARGET [ARGS]..."
    config = parser.add_argument(
        "--config", type=Path, metavar="FILE", help="TOML file; every flag is a key."
    )
    with_value = {
        word
        for action in [config, *_add_options(parser)]
        if action.nargs is None
        for word in action.option_strings
    }
    ours: list[str] = []
    while words and words[0].startswith("-") and words[0] not in {"-m", "--"}:
        word, *words = words
        if word in with_value and words:
            word, *words = f"{word}={words[0]}", *words[1:]  # As one word, a value may begin with a dash.
        ours.append(word)
    given = parser.parse_args(ours)
    given.target = words[1:] if words[:1] == ["--"] else words
    if not given.target:
        parser.error("TARGET is missing: path/to/script.py, package.module:callable or -m package.module")
    return given


def _add_options(parser: Parser) -> list[argparse.Action]:
    types, annotated = get_type_hints(Options), get_type_hints(Options, include_extras=True)
    defaults = Options()
    added = []
    for name in Options.__struct_fields__:
        key = name.replace("_", "-")
        flag: Flag = annotated[name].__metadata__[-1]
        default = getattr(defaults, name)
        shown = f"{default:g}" if isinstance(default, float) else default
        added.append(
            parser.add_argument(
                f"--{key}",
                dest=key,
                default=argparse.SUPPRESS,
                help=f"{flag.help} [default: {shown}]" if default else flag.help,
                **_reading(types[name], flag),
            )
        )
    return added


def _reading(kind: Any, flag: Flag) -> dict[str, Any]:  # noqa: ANN401 -- a type of whatever form
    """Return how argparse is to read values of a type."""
    of = [part for part in get_args(kind) if part is not type(None)]
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is tuple:
        return {"action": "append", "metavar": flag.metavar}
    if get_origin(kind) is Literal:
        return {"choices": of}
    return {"type": of[0] if of else kind, "metavar": flag.metavar}
