"""The projects file: which WhatsApp group is which project.

The format is the existing one (`projects:`, a list of `name`, `enabled`, `group_jid`, `description`) plus
optional keys of ours. The rule: a file is taken whole or not at all. An unknown key, a wrong type, a group
listed twice or a name used twice is an error that names the file and the place, because a misspelt `enabled`
would otherwise lose drops in silence.

A *drop space* is the set of projects among which a drop number is unique: the same drop posted again within
one space is a resubmission, in another space it is a new drop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import yaml

from monitor.errors import ConfigError

DEFAULT_DROP_SPACE = "qa"

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
_GroupJid = Annotated[str, msgspec.Meta(pattern=r"^[0-9-]+@g\.us$")]


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry of the file."""

    name: _Name
    """As the column `project` spells it."""
    group_jid: _GroupJid
    description: str
    enabled: bool = False
    drop_space: _Name = DEFAULT_DROP_SPACE
    type: Literal["qa", "marketing"] = "qa"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    projects: list[Project]


@dataclass(frozen=True)
class Projects:
    """All projects of the file, found by group and by space."""

    all: tuple[Project, ...]
    by_chat: dict[str, Project] = field(init=False, repr=False)
    space_of: dict[str, str] = field(init=False, repr=False)
    """Project name -> drop space, disabled projects included: their rows still stand in the table."""

    def __post_init__(self) -> None:
        """Index the entries."""
        object.__setattr__(self, "by_chat", {project.group_jid: project for project in self.all})
        object.__setattr__(self, "space_of", {project.name: project.drop_space for project in self.all})

    @property
    def enabled(self) -> tuple[Project, ...]:
        """The projects whose drops are stored."""
        return tuple(project for project in self.all if project.enabled)

    def names_in(self, space: str) -> list[str]:
        """Names of the projects that share `space`."""
        return [project.name for project in self.all if project.drop_space == space]


def load_projects(path: Path) -> Projects:
    """Read and check the file; every fault is a `ConfigError` that names file and place."""
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"projects file {path}: {error.strerror}; set WA_PROJECTS or --projects") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"projects file {path}: not valid YAML: {_yaml_fault(error)}") from error
    try:
        parsed = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(f"projects file {path}: {describe_fault(error)}") from error
    _check(parsed.projects, path)
    return Projects(tuple(parsed.projects))


def describe_fault(error: msgspec.ValidationError) -> str:
    """Put msgspec's finding in the order a person reads: the place, then what is wrong there."""
    finding, _, place = str(error).partition(" - at `$.")
    place = place.removesuffix("`")
    return f"{place}: {finding}" if place else finding


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Return the parser's finding as one line, with the line number where it has one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _check(projects: Sequence[Project], path: Path) -> None:
    """Refuse what no single entry shows: repeated names and groups, and types that nothing stores yet."""
    names: set[str] = set()
    groups: set[str] = set()
    for project in projects:
        if project.name in names:
            raise ConfigError(f"projects file {path}: the name {project.name!r} is used twice")
        if project.group_jid in groups:
            raise ConfigError(f"projects file {path}: the group {project.group_jid} is listed twice")
        if project.enabled and project.type == "marketing":
            raise ConfigError(
                f"projects file {path}: project {project.name!r} has type marketing, which is not stored yet;"
                " set enabled: false"
            )
        names.add(project.name)
        groups.add(project.group_jid)
    if not any(project.enabled for project in projects):
        raise ConfigError(f"projects file {path}: no project is enabled; set enabled: true for one of them")
