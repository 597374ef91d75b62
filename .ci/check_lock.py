"""Check requirements.lock: every file is named by its hash, comes from PyPI, and belongs to pyproject.toml.

usage: check_lock.py [FOLDER]    FOLDER holds pyproject.toml and requirements.lock; default: the repository.
Exit code 0 and one line, or 1 and one line on stderr for each finding.

The rule: an environment built from the lock is the one that was tested. So each requirement is pinned by
``==`` and has a hash, no line sends pip to another place than the public index, and what pyproject.toml asks
for is what the lock says it was resolved from -- no requirement more, none less, none outside its range.
Whether the *indirect* requirements are complete needs no check here: ``pip install --require-hashes`` refuses
a lock that lacks one.

Rejected: resolving again and comparing, which fails on every day on which somebody publishes a release.
"""

from __future__ import annotations

import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterator

_HOSTS: Final = frozenset({"pypi.org", "files.pythonhosted.org"})
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+[^\s\\'\"]*|\bfile:[^\s\\'\"]*")
_HASH: Final = re.compile(r"--hash=sha256:[0-9a-f]{64}")
_DIRECT: Final = re.compile(r"(?:# via|#) +wa-monitor \(")


@dataclass
class Locked:
    """One requirement of the lock with the lines that belong to it."""

    requirement: Requirement
    line: int
    hashes: int = 0
    direct: bool = False


def main(arguments: list[str]) -> int:
    """Print every finding; return 1 if there was one."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parents[1]
    try:
        text = (folder / "requirements.lock").read_text(encoding="utf-8")
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    except OSError as error:
        print(
            f"{error.filename} cannot be read ({error.strerror}); run make lock in the repository",
            file=sys.stderr,
        )
        return 1
    try:
        locked = list(_read(text))
    except ValueError as error:
        findings = [str(error)]
    else:
        findings = [*_foreign_addresses(text), *_unproven(locked), *_out_of_step(locked, project)]
    for finding in findings:
        print(f"requirements.lock: {finding}", file=sys.stderr)
    if not findings:
        print(f"requirements.lock: {len(locked)} requirements, each with hashes, in step with pyproject.toml")
    return 1 if findings else 0


def _read(text: str) -> Iterator[Locked]:
    """Yield the requirements; raise ``ValueError`` for a line that is no requirement, hash or comment."""
    current: Locked | None = None
    for number, line in enumerate(text.splitlines(), 1):
        content = line.strip().removesuffix("\\").strip()
        if not content:
            continue
        if content.startswith("#"):
            if current is not None and _DIRECT.match(content):
                current.direct = True
        elif content.startswith("--"):
            if current is None or not line.startswith(" ") or not _HASH.fullmatch(content):
                raise ValueError(f"line {number}: an option that is no hash: {content!r}; run make lock")
            current.hashes += 1
        else:
            if current is not None:
                yield current
            try:
                current = Locked(Requirement(content), number)
            except ValueError as error:
                raise ValueError(f"line {number}: not a requirement: {content!r}; run make lock") from error
    if current is not None:
        yield current


def _foreign_addresses(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        for address in _ADDRESS.findall(line):
            parts = urlsplit(address)
            if parts.scheme != "https" or parts.hostname not in _HOSTS:
                yield f"line {number}: {address} is not the public index; run make lock without other indexes"


def _unproven(locked: list[Locked]) -> Iterator[str]:
    for entry in locked:
        pins = [part.operator for part in entry.requirement.specifier]
        if pins != ["=="] or entry.requirement.url is not None:
            yield f"line {entry.line}: {entry.requirement.name} is not pinned by ==; run make lock"
        if entry.hashes == 0:
            yield f"line {entry.line}: {entry.requirement.name} has no hash; run make lock"


def _out_of_step(locked: list[Locked], project: dict[str, Any]) -> Iterator[str]:
    wanted: dict[NormalizedName, list[Requirement]] = {}
    for requirement in _wanted(project):
        wanted.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    direct = {canonicalize_name(entry.requirement.name): entry for entry in locked if entry.direct}
    for name in sorted(wanted.keys() - direct.keys()):
        yield f"{name} of pyproject.toml is missing; run make lock"
    for name in sorted(direct.keys() - wanted.keys()):
        yield f"line {direct[name].line}: {name} is not in pyproject.toml any more; run make lock"
    for name in sorted(wanted.keys() & direct.keys()):
        entry = direct[name]
        versions = [pin.version for pin in entry.requirement.specifier]
        for requirement in wanted[name]:
            if not all(requirement.specifier.contains(version, prereleases=True) for version in versions):
                yield f"line {entry.line}: {entry.requirement} is not {requirement}; run make lock"


def _wanted(project: dict[str, Any]) -> Iterator[Requirement]:
    for text in project["project"]["dependencies"]:
        yield Requirement(text)
    for part in (project["project"]["optional-dependencies"], project["dependency-groups"]):
        for texts in part.values():
            yield from map(Requirement, texts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
