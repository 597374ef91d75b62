"""The projects file: which WhatsApp group is which project.

The format is the existing one (`projects:`, a list of `name`, `enabled`, `group_jid`, `description`) plus
optional keys of ours. The rule: a file is taken whole or not at all. An unknown key, a wrong type, a group
listed twice or a name used twice is an error that names the file, the line and the place, because a misspelt
`enabled` would otherwise lose drops in silence.

The file is read again while the monitor runs (`ProjectsFile`). Its bytes decide, not its times; one that is
refused changes nothing.

A *drop space* is the set of projects among which a drop number is unique: the same drop posted again within
one space is a resubmission, in another space it is a new drop.
"""

import re
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from yaml.constructor import ConstructorError

from monitor.drops import MAX_DIGITS, MIN_DIGITS
from monitor.errors import ConfigError

DEFAULT_DROP_SPACE = "qa"

_STEP = re.compile(r"[^.\[\]]+")
_GROUP = re.compile(r"[0-9-]{1,250}@g\.us", re.ASCII)
_NOT_STORED = frozenset({"Cc", "Cs"})
"""Control characters and lone surrogates: PostgreSQL takes not all of them, and no name has one."""
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]


class Project(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One entry of the file."""

    name: _Name
    """As the column `project` spells it."""
    group_jid: str
    description: str
    enabled: bool = False
    drop_space: _Name = DEFAULT_DROP_SPACE
    type: Literal["qa", "marketing"] = "qa"
    min_digits: Annotated[int, msgspec.Meta(ge=5, le=12)] = MIN_DIGITS
    max_digits: Annotated[int, msgspec.Meta(ge=5, le=12)] = MAX_DIGITS
    """How many digits a drop of this project has."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    projects: list[Project]


class _Loader(yaml.SafeLoader):
    """The safe loader, but strict: a key that is there twice is a fault, and every fault has its line.

    PyYAML takes the last of two keys in silence, and a value that only looks like a date or a number ends it
    with whatever the conversion raises.
    """

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:  # noqa: ANN401 -- PyYAML's
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise ConstructorError(
                None, None, f"{node.value!r} cannot be read as {node.tag.rpartition(':')[2]}", node.start_mark
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConstructorError(None, None, f"the key {key.value} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


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
    """Read and check the file; every fault is a `ConfigError` that names file, line and place."""
    return parse_projects(_read(path), path)


def parse_projects(content: bytes, path: Path) -> Projects:
    """Check the content of the file `path`, as `load_projects` does."""
    try:
        document = yaml.load(content, Loader=_Loader)  # noqa: S506 -- a safe loader
    except yaml.YAMLError as error:
        raise ConfigError(f"projects file {path}: not valid YAML: {_yaml_fault(error, content)}") from error
    except RecursionError as error:
        raise ConfigError(f"projects file {path}: not valid YAML: it is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"projects file {path}: not valid YAML: it is not UTF-8") from error
    try:
        parsed = msgspec.convert(document, _File)
    except msgspec.ValidationError as error:
        fault = describe_fault(error)
        raise ConfigError(f"projects file {path}: {_line(content, fault)}{fault}") from error
    _check(parsed.projects, content, path)
    return Projects(tuple(parsed.projects))


class ProjectsFile:
    """The file, looked at again and again; `projects` is what is in force."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content: bytes | None = _read(path)
        self.projects = parse_projects(self._content, path)
        self.refused = False
        """Whether something else is in force than what the file said at the last look."""

    def has_changed(self) -> bool:
        """Tell whether other projects are in force than at the last look.

        Raises `ConfigError` once for each content that is refused, and as long as there is no file; what was
        in force stays so.
        """
        try:
            content = _read(self._path)
        except ConfigError:
            self._content, self.refused = None, True
            raise
        if content == self._content:
            return False
        self._content, self.refused = content, True
        before, self.projects = self.projects, parse_projects(content, self._path)
        self.refused = False
        return self.projects != before


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"projects file {path}: {error.strerror}; set WA_PROJECTS or --projects") from error


def describe_fault(error: msgspec.ValidationError) -> str:
    """Put msgspec's finding in the order a person reads: the place, then what is wrong there."""
    finding, _, place = str(error).partition(" - at `$.")
    place = place.removesuffix("`")
    return f"{place}: {finding}" if place else finding


def _yaml_fault(error: yaml.YAMLError, content: bytes) -> str:
    """Return the parser's finding as one line, with the line number where it has one."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    if isinstance(error, yaml.reader.ReaderError):
        line = content[: error.position].count(b"\n") + 1
        return f"line {line}: a character that YAML does not allow"
    return " ".join(str(error).split())


def _line(content: bytes, fault: str) -> str:
    """Return `line N: ` for a fault that begins with its place, `projects[1].enabled: ...`.

    A fault of the whole file is in the line where its content begins; an empty one has no line.
    """
    place = fault.partition(": ")[0]
    node = yaml.compose(content, Loader=yaml.SafeLoader)
    line = 0 if node is None else node.start_mark.line + 1
    for step in _STEP.findall(place):
        if isinstance(node, yaml.SequenceNode) and step.isdigit() and int(step) < len(node.value):
            node = node.value[int(step)]
        elif isinstance(node, yaml.MappingNode):
            found = [value for key, value in node.value if key.value == step]
            if not found:
                break
            node = found[0]
        else:
            break
        line = node.start_mark.line + 1
    return f"line {line}: " if line else ""


def _is_name(text: str) -> bool:
    return bool(text.strip()) and not any(unicodedata.category(one) in _NOT_STORED for one in text)


def _check(projects: Sequence[Project], content: bytes, path: Path) -> None:
    """Refuse what no field shows by itself: repetitions, and types that nothing stores yet."""
    names: set[str] = set()
    groups: set[str] = set()
    for index, project in enumerate(projects):
        fault = None
        if project.name in names:
            fault = f"the name {project.name!r} is used twice"
        elif not _GROUP.fullmatch(project.group_jid):
            fault = (
                f"projects[{index}].group_jid: {project.group_jid!r} is no group; write its digits and @g.us"
            )
        elif not _is_name(project.name) or not _is_name(project.drop_space):
            fault = f"projects[{index}]: name and drop_space need a letter and no control characters"
        elif project.group_jid in groups:
            fault = f"the group {project.group_jid} is listed twice"
        elif project.enabled and project.type == "marketing":
            fault = (
                f"project {project.name!r} has type marketing, which is not stored yet; set enabled: false"
            )
        elif project.min_digits > project.max_digits:
            fault = f"project {project.name!r} has more min_digits than max_digits"
        if fault is not None:
            raise ConfigError(f"projects file {path}: {_line(content, f'projects[{index}]: ')}{fault}")
        names.add(project.name)
        groups.add(project.group_jid)
    if not any(project.enabled for project in projects):
        raise ConfigError(f"projects file {path}: no project is enabled; set enabled: true for one of them")
