"""Environment: what a child gets to know besides its code, and whether that has changed.

``--env-file`` is read as systemd reads ``EnvironmentFile=`` (systemd.exec(5)), without its continuation
lines: ``NAME=value`` a line, ``#`` and ``;`` begin comments, quotes around a value are taken off, nothing is
expanded. Files in ``$CREDENTIALS_DIRECTORY`` are the child's to read; here they only count as a reason for a
new generation when their content has changed.

The rule: values are secrets. They go into a child's environment and into a digest, never into a sentence.

Rejected: python-dotenv (expands variables, finds files by itself, forgives what is no assignment).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from supervisor import plainfile
from supervisor.errors import UsageError

ESTATE_VARIABLE = "WA_SUPERVISOR_ESTATE"
"""What one image of the supervisor hands to the next: see :mod:`supervisor.reexec`. No child may see it."""

_ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_QUOTES = ("'", '"')


@dataclass(frozen=True)
class Environment:
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


def assignments(file: Path, what: str = "--env-file") -> dict[str, str]:
    """Return the variables that a file of ``NAME=value`` lines gives.

    Args:
        file: what to read.
        what: it is called in an error.

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
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith(("#", ";")):
            continue
        found = _ASSIGNMENT.fullmatch(stripped)
        if found is None or "\0" in stripped:  # The line itself may be a secret.
            raise UsageError(f"{what} {file}, line {number} is not NAME=value; correct it")
        variables[found[1]] = _unquoted(found[2].strip())
    return variables


def _unquoted(value: str) -> str:
    quoted = len(value) > 1 and value[0] in _QUOTES and value[-1] == value[0]
    return value[1:-1] if quoted else value


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
