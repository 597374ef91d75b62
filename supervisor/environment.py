"""Environment: what a child gets to know besides its code, and whether that has changed.

``--env-file`` is read as systemd reads ``EnvironmentFile=`` (systemd.exec(5)): ``NAME=value`` a line, ``#``
and ``;`` begin comments, quotes around a value are taken off and may hold line breaks, a backslash takes the
next character as it is and joins lines, nothing is expanded. What systemd would pass over in silence is an
error here. Files in ``$CREDENTIALS_DIRECTORY`` are the child's to read; here they only count as a reason for
a new generation when their content has changed.

The rule: values are secrets. They go into a child's environment and into a digest, never into a sentence.

Rejected: python-dotenv (expands variables, finds files by itself, forgives what is no assignment).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from supervisor import plainfile
from supervisor.errors import UsageError

ESTATE_VARIABLE = "WA_SUPERVISOR_ESTATE"
"""What one image of the supervisor hands to the next: see :mod:`supervisor.reexec`. No child may see it."""

MULTIPROCESS_VARIABLES = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")
"""What makes prometheus_client write numbers to files, by process, as soon as it is imported."""

_NAME = re.compile(r"(export[ \t]+)?([A-Za-z_][A-Za-z0-9_]*)[ \t]*=")
_BEGIN = re.compile(r"[^ \t\n\r]")
_LINE_END = re.compile(r"\r\n?|\n")
_COMMENT = re.compile(r"[#;][^\n\r]*")
_QUOTED = re.compile(r"""[ \t]*(?:'([^']*)'|"((?:[^"\\]|\\.)*)")""", re.DOTALL)
_BARE = re.compile(r"[ \t]*((?:[^\\\n\r]|\\.)*)\\?", re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED_IN_QUOTES = frozenset('"\\`$')


class Environment(Struct, frozen=True):
    """What children are started with.

    Attributes:
        variables: the whole environment, without what is told to each generation.
        digest: of all that a child may read besides its code; equal digests need no new process.
    """

    variables: Mapping[str, str]
    digest: str


def read(inherited: Mapping[str, str], file: Path | None) -> Environment:
    """Return what children are to be started with now.

    Args:
        inherited: the supervisor's own environment.
        file: of ``--env-file``; what it says wins.

    Raises:
        UsageError: the file cannot be read, or has a line that is no assignment.
    """
    variables = {**inherited, **(assignments(file) if file is not None else {})}
    summary = hashlib.sha256()
    for name in sorted(variables):
        summary.update(f"{name}\0{variables[name]}\0".encode("utf-8", "surrogateescape"))
    for path, content in _credentials(inherited.get("CREDENTIALS_DIRECTORY")):
        summary.update(path.encode("utf-8", "surrogateescape") + b"\0" + hashlib.sha256(content).digest())
    return Environment(variables, summary.hexdigest())


def assignments(file: Path, what: str = "--env-file", *, exported: bool = True) -> dict[str, str]:
    """Return the variables that a file of ``NAME=value`` lines gives.

    Args:
        file: what to read.
        what: it is called in an error.
        exported: ``export NAME=value``, which systemd passes over, is taken as well.

    Raises:
        UsageError: the file cannot be read, or has a line that is no assignment.
    """
    try:
        text = plainfile.read(file).decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {what} {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {file} is not UTF-8; write it anew") from error
    variables = {}
    at = 0
    while begun := _BEGIN.search(text, at):
        try:
            name, value, at = _entry(text, begun.start(), exported=exported)
        except ValueError as error:  # The line itself may be a secret.
            line = len(_LINE_END.findall(text, 0, begun.start())) + 1
            raise UsageError(f"{what} {file}, line {line} {error}") from error
        if name:
            variables[name] = value
    return variables


def _entry(text: str, at: int, *, exported: bool) -> tuple[str, str, int]:
    """Read a comment or an assignment; return the name, empty for a comment, the value, and where it ends.

    Raises:
        ValueError: it is neither.
    """
    if comment := _COMMENT.match(text, at):
        if comment[0].endswith("\\"):
            raise ValueError("is a comment that takes in the next line; take away the backslash at its end")
        return "", "", comment.end()
    found = _NAME.match(text, at)
    if found is None or (found[1] and not exported):
        raise ValueError("is not NAME=value; correct it")
    parts, at = [], found.end()
    while quoted := _QUOTED.match(text, at):
        parts.append(quoted[1] if quoted[2] is None else _ESCAPE.sub(_unescaped_in_quotes, quoted[2]))
        at = quoted.end()
    bare = _BARE.match(text, at)
    assert bare is not None  # noqa: S101 -- it matches nothing at all, too
    if bare[1].startswith(("'", '"')):
        raise ValueError("begins a quote that is not closed; close it")
    kept = bare[1].rstrip(" \t")
    if (len(kept) - len(kept.rstrip("\\"))) % 2:
        kept = bare[1][: len(kept) + 1]  # A blank behind a backslash stays.
    value = "".join(parts) + _ESCAPE.sub(lambda pair: "" if pair[1] in "\n\r" else pair[1], kept)
    if "\0" in value:
        raise ValueError("is not NAME=value; correct it")
    return found[2], value, bare.end()


def _unescaped_in_quotes(pair: re.Match[str]) -> str:
    if pair[1] in _ESCAPED_IN_QUOTES:
        return pair[1]
    return "" if pair[1] == "\n" else pair[0]


def _credentials(directory: str | None) -> list[tuple[str, bytes]]:
    """Return name and content of each credential; one that cannot be read is as if it were not there."""
    found = []
    for folder, _, names in os.walk(directory) if directory else ():
        for name in names:
            path = Path(folder, name)
            try:
                found.append((str(path), plainfile.read(path)))
            except OSError:
                continue
    return sorted(found)


def namesake(search_path: Iterable[str]) -> str | None:
    """Return a sentence about PyPI's ``supervisor`` (supervisord), which installs a package of our name.

    Args:
        search_path: where packages are found.
    """
    # By its folder, as pip leaves it: importlib.metadata takes 28 ms of every start to say the same.
    found = (path.name for entry in search_path for path in Path(entry).glob("supervisor-*.*-info"))
    name = next(found, None)
    if name is None:
        return None
    version = name.removeprefix("supervisor-").rpartition(".")[0]
    return (
        f"the package supervisor {version} (supervisord) is installed in this environment and has the same "
        "import name; install wa-monitor in an environment of its own"
    )
