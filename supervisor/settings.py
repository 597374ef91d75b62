"""Settings: what ``wa-supervisor run`` was asked for, validated once, then passed on as a value.

Flags beat the TOML file, the file beats the defaults. **Every flag of ``run`` is a key of the file**, spelled
the same (``ready-timeout = 30``); an unknown key or a wrong type is a :class:`UsageError` that names file and
key, and a value is held to the same bounds wherever it comes from. TARGET is looked up without importing it:
the supervisor never runs code of the tree.
"""

from __future__ import annotations

import importlib.machinery
import operator
import os
import re
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Struct, field

from supervisor import plainfile
from supervisor.errors import UsageError
from supervisor.manifest import Tree, source_roots

TargetKind = Literal["script", "module", "callable"]
ServiceType = Literal["simple", "notify"]
Handover = Literal["replace", "overlap"]

_MAX_SECONDS = 366 * 24 * 3600.0
"""Longest duration that makes sense, and one that every timer of the system can hold."""

_Seconds = Annotated[float, msgspec.Meta(gt=0, le=_MAX_SECONDS)]
_SecondsOrOff = Annotated[float, msgspec.Meta(ge=0, le=_MAX_SECONDS)]
_Bytes = Annotated[int, msgspec.Meta(gt=0)]
_MAX_PORT = 65535
_PART = r'([a-zA-Z_][a-zA-Z0-9_]*)(?:="([^"]*)")?'
_SELECTION = re.compile(rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({_PART}(?:,\s*{_PART})*)\}})?", re.ASCII)
_FIXED = {
    "tree.roots": "watch",
    "tree.ignore": "ignore",
    "runtime_dir": "runtime-dir",
    "state_dir": "state-dir",
    "listen": "listen",
}


class Target(Struct, frozen=True):
    """What to run.

    Attributes:
        kind: ``script`` (a path), ``module`` (as ``python -m``) or ``callable`` (``package.module:name``).
        name: the path, the module or ``module:name``, as given.
        arguments: become ``sys.argv[1:]``.
    """

    kind: TargetKind
    name: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"-m {self.name}" if self.kind == "module" else self.name


class Flag(Struct, frozen=True):
    """How an option is shown on the command line.

    Attributes:
        help: what it is for; the default of :class:`Options` is added to that.
        metavar: stands for the value; None where the choices do, or where there is no value.
    """

    help: str
    metavar: str | None = None


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """The options of ``run``: the one table that flags, keys of the file, bounds and defaults come from."""

    watch: Annotated[
        tuple[str, ...],
        Flag(
            "Folder of code; repeatable. [default: the target's top package, or the script's folder]",
            "DIR",
        ),
    ] = ()
    ignore: Annotated[
        tuple[str, ...], Flag("Name, or path below the watched folder, to leave out; repeatable.", "GLOB")
    ] = ()
    type: Annotated[
        ServiceType, Flag("simple: ready when alive and attested. notify: waits for READY=1.")
    ] = "simple"
    handover: Annotated[
        Handover, Flag("replace: never two at work. overlap: the new one is ready first.")
    ] = "replace"
    ready_timeout: Annotated[_Seconds, Flag("Seconds until a start has failed.", "SECONDS")] = 30.0
    watchdog: Annotated[
        _SecondsOrOff, Flag("Longest silence of a notify child in seconds; 0 = off.", "SECONDS")
    ] = 15.0
    stop_timeout: Annotated[_Seconds, Flag("Seconds from SIGTERM to SIGKILL.", "SECONDS")] = 20.0
    quiet: Annotated[
        _SecondsOrOff | None,
        Flag("Quiet period in seconds. [default: 0.01, 0.15 for several files]", "SECONDS"),
    ] = None
    scan_interval: Annotated[_Seconds, Flag("Seconds between looks at the tree.", "SECONDS")] = 2.0
    rehash_interval: Annotated[
        _Seconds, Flag("Seconds within which every file is read again.", "SECONDS")
    ] = 300.0
    verify_interval: Annotated[_Seconds, Flag("Seconds between attestations.", "SECONDS")] = 30.0
    probation: Annotated[
        _SecondsOrOff, Flag("Seconds that new code must serve before it is known good.", "SECONDS")
    ] = 30.0
    max_memory: Annotated[
        _Bytes | None, Flag("Resident memory in bytes from which a child is replaced.", "BYTES")
    ] = None
    max_age: Annotated[
        _Seconds | None, Flag("Seconds of service after which a child is replaced.", "SECONDS")
    ] = None
    no_zygote: Annotated[bool, Flag("Start each child by itself, not from a preloaded process.")] = False
    env_file: Annotated[
        str | None,
        Flag("File of NAME=value lines for the child; a change makes a new generation.", "FILE"),
    ] = None
    runtime_dir: Annotated[str | None, Flag("Which supervisor: the directory of its socket.", "DIR")] = None
    state_dir: Annotated[str | None, Flag("Directory for pinned sources.", "DIR")] = None
    allow_host: Annotated[
        tuple[str, ...], Flag("Name by which others call that address; repeatable.", "NAME")
    ] = ()
    show_metric: Annotated[
        tuple[str, ...],
        Flag("Metric of the child on the status page, by these labels; repeatable.", "NAME{LABEL,…}"),
    ] = ()
    alarm: Annotated[
        tuple[str, ...],
        Flag("Metric of the child that is an alarm there if not 0; repeatable.", 'NAME{LABEL="…"}'),
    ] = ()

    listen: Annotated[
        str, Flag("HOST:PORT of /metrics and the status page; port 0 picks one.", "HOST:PORT")
    ] = "127.0.0.1:9464"


class Selection(Struct, frozen=True):
    """Some series of a metric of the child.

    Attributes:
        name: of the metric, as Prometheus shows it or without its suffix.
        labels: by which numbers are added up; none of them: by all.
        only: values that labels must have.
    """

    name: str
    labels: tuple[str, ...] = ()
    only: Mapping[str, str] = field(default_factory=dict)


class Settings(Struct, frozen=True):
    """Everything a supervisor needs to know, resolved.

    Attributes:
        quiet_seconds: fixed quiet period, or None for the adaptive one.
        watchdog_seconds: longest silence of a child before it counts as hung; 0 for never.
        probation_seconds: how long a generation must serve before its tree is known good.
        max_memory_bytes: of resident memory, None for no limit.
        max_age_seconds: a child is replaced after this time, None for never.
        zygote: whether children may be forked from a process that has their libraries loaded.
        env_file: of variables for the children.
        listen: host and port of the HTTP endpoint; port 0 lets the kernel choose.
        allowed_hosts: names by which it may be called, beside addresses and its own.
        shown_metrics: what of the child's metrics the status page shows.
        alarms: what of them is an alarm there if it is not 0.
    """

    target: Target
    tree: Tree
    type: ServiceType
    handover: Handover
    ready_timeout_seconds: float
    watchdog_seconds: float
    stop_timeout_seconds: float
    quiet_seconds: float | None
    scan_interval_seconds: float
    rehash_interval_seconds: float
    verify_interval_seconds: float
    probation_seconds: float
    max_memory_bytes: int | None
    max_age_seconds: float | None
    zygote: bool
    env_file: Path | None
    runtime_dir: Path
    state_dir: Path
    listen: tuple[str, int]
    allowed_hosts: tuple[str, ...] = ()
    shown_metrics: tuple[Selection, ...] = ()
    alarms: tuple[Selection, ...] = ()


def load_file(path: Path) -> dict[str, Any]:
    """Read the options that a TOML file gives, and hold them to their types and bounds.

    Raises:
        UsageError: the file cannot be read, is not TOML, or has an unknown key or a value of a wrong type.
    """
    import tomllib  # noqa: PLC0415 -- a start without a file does not wait for it

    try:
        given = tomllib.loads(plainfile.read(path).decode("utf-8"))
        msgspec.convert(given, Options)
    except OSError as error:
        raise UsageError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}; correct the file") from error
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{path}: {error}; the keys are those of `wa-supervisor run --help` without --"
        ) from error
    return given


def merge(flags: Mapping[str, Any], file: Mapping[str, Any]) -> Options:
    """Return the options: as the flags say, else as the file does, else the defaults.

    Args:
        flags: the values that were given on the command line, by the names of their keys.
        file: from :func:`load_file`.

    Raises:
        UsageError: a flag's value is out of its bounds; the file's are not.
    """
    try:
        return msgspec.convert({**file, **flags}, Options)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise UsageError(f"--{where.rstrip('`')}: {what[:1].lower()}{what[1:]}") from error


def resolve(target: Target, options: Options) -> Settings:
    """Return the settings for running ``target``.

    Raises:
        UsageError: the target or a watched directory does not exist, or a value makes no sense.
    """
    origin = _locate(target)
    roots = [Path(directory) for directory in options.watch or (origin,)]
    for root in roots:
        if not root.is_dir():
            raise UsageError(f"--watch {root} is not a directory; name the folder that holds the code")
    tree = Tree(source_roots(roots), _patterns(options.ignore))
    if target.kind == "script" and not _is_within(Path(target.name), tree):
        raise UsageError(f"TARGET {target} lies in no watched folder; add --watch {origin}")
    if any(_is_within(path, tree) and tree.ignores(str(path)) for path in _sources(target, origin)):
        raise UsageError(f"TARGET {target} is left out by --ignore; take out the pattern that it matches")
    return Settings(
        target=target,
        tree=tree,
        type=options.type,
        handover=options.handover,
        ready_timeout_seconds=options.ready_timeout,
        watchdog_seconds=options.watchdog,
        stop_timeout_seconds=options.stop_timeout,
        quiet_seconds=options.quiet,
        scan_interval_seconds=options.scan_interval,
        rehash_interval_seconds=options.rehash_interval,
        verify_interval_seconds=options.verify_interval,
        probation_seconds=options.probation,
        max_memory_bytes=options.max_memory,
        max_age_seconds=options.max_age,
        zygote=not options.no_zygote,
        env_file=Path(options.env_file).absolute() if options.env_file else None,
        runtime_dir=runtime_dir(options.runtime_dir),
        state_dir=_state_dir(options.state_dir),
        listen=_address(options.listen),
        allowed_hosts=tuple(name.lower().rstrip(".") for name in options.allow_host),
        shown_metrics=tuple(_selection("show-metric", text) for text in options.show_metric),
        alarms=tuple(_selection("alarm", text) for text in options.alarm),
    )


def changeable(old: Settings, new: Settings) -> Settings:
    """Return the new settings, for a supervisor that runs with the old ones.

    Raises:
        UsageError: one has changed that a running supervisor cannot take over.
    """
    for name, option in _FIXED.items():
        value = operator.attrgetter(name)
        if value(old) != value(new):
            raise UsageError(f"a change of {option} needs a new start of the supervisor; nothing was changed")
    return new


def parse_target(words: tuple[str, ...] | list[str]) -> Target:
    """Return the target that the words of the command line name.

    Raises:
        UsageError: they name none.
    """
    first, *arguments = words or [""]
    if first == "-m":
        if not arguments:
            raise UsageError("-m needs the name of a module: wa-supervisor run -m package.module")
        return Target("module", arguments[0], tuple(arguments[1:]))
    if first.endswith(".py") or os.sep in first:
        return Target("script", first, tuple(arguments))
    module, colon, attribute = first.partition(":")
    if colon and all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        return Target("callable", first, tuple(arguments))
    raise UsageError(
        f"TARGET {first!r} is neither a script (path/to/script.py), nor package.module:callable, "
        "nor -m package.module"
    )


def working_directory() -> Path:
    """Return the directory that we work in.

    Raises:
        UsageError: it was removed meanwhile.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise UsageError(
            f"the working directory cannot be named: {error.strerror}; change to one that is there"
        ) from error


NOTIFY_SOCKET = "notify.sock"
"""In the runtime directory: where generations report to."""


def runtime_dir(given: str | None) -> Path:
    """Return the directory of socket and lock: as given, ``$RUNTIME_DIRECTORY``, or the user's own (XDG)."""
    if given or (given := _first_directory("RUNTIME_DIRECTORY")):
        return Path(given).absolute()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base).absolute() / "wa-supervisor"
    import tempfile  # noqa: PLC0415 -- loads shutil, random and more, and under systemd nobody asks for it

    return Path(tempfile.gettempdir()) / f"wa-supervisor-{os.getuid()}"


def _state_dir(given: str | None) -> Path:
    if given or (given := _first_directory("STATE_DIRECTORY")):
        return Path(given).absolute()
    try:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError as error:
        raise UsageError("this user has no home directory; name a place with --state-dir") from error
    return base.absolute() / "wa-supervisor"


def _first_directory(variable: str) -> str:
    """Return what systemd.exec(5) passes on: a unit with several directories has them joined by colons."""
    return os.environ.get(variable, "").partition(":")[0]


def _sources(target: Target, origin: Path) -> tuple[Path, ...]:
    """Return the files that the target is, as far as the folder that it is in tells."""
    if target.kind == "script":
        return (Path(os.path.normpath(Path(target.name).absolute())),)
    place = origin.absolute().joinpath(*target.name.partition(":")[0].split(".")[1:])
    files = (place.with_name(f"{place.name}.py"), place / "__init__.py", place / "__main__.py")
    return tuple(file for file in files if file.is_file())


def _patterns(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return patterns as they are compared: without a slash at the end, or a dot at the beginning."""
    patterns = tuple(pattern.removeprefix("./").rstrip("/") for pattern in given)
    for pattern, text in zip(patterns, given, strict=True):
        if not pattern or pattern.startswith(("/", "../")):
            raise UsageError(f"--ignore {text!r} is no name and no path below the watched folder")
    return patterns


def _selection(option: str, text: str) -> Selection:
    """Return what ``NAME``, ``NAME{LABEL,…}`` or ``NAME{LABEL="VALUE",…}`` selects."""
    found = _SELECTION.fullmatch(text)
    if found is None:
        raise UsageError(f'--{option} {text!r} is no NAME, no NAME{{LABEL,…}} and no NAME{{LABEL="VALUE"}}')
    given = [(part[1], part[2]) for part in re.finditer(_PART, found[2] or "")]
    return Selection(
        found[1],
        tuple(label for label, value in given if value is None),
        {label: value for label, value in given if value is not None},
    )


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > _MAX_PORT:
        raise UsageError(f"--listen {text} is not HOST:PORT, for example {Options().listen}")
    return host.strip("[]") or "127.0.0.1", int(port)


def _is_within(script: Path, tree: Tree) -> bool:
    """Whether a script lies below a root, by the root's name or by its real place."""
    spellings = (Path(os.path.normpath(script.absolute())), Path(os.path.realpath(script)))
    places = [Path(place) for root in tree.roots for place in (root, os.path.realpath(root))]
    return any(path.is_relative_to(place) for path in spellings for place in places)


def _locate(target: Target) -> Path:
    """Return the directory to watch by default: the script's folder, or the target's top package."""
    if target.kind == "script":
        script = Path(target.name)
        if not script.is_file():
            raise UsageError(f"TARGET {script} does not exist or is not a file; name the script to run")
        if script.suffix != ".py":
            raise UsageError(f"TARGET {script} is not watched, only files that end in .py are; rename it")
        # Python imports from beside the real file: a link to a script elsewhere is a script elsewhere.
        return script.resolve().parent if script.is_symlink() else script.absolute().parent
    top = target.name.partition(":")[0].partition(".")[0]
    # Where the child will look: its working directory first, as with python -m.
    here = working_directory()
    spec = importlib.machinery.PathFinder.find_spec(top, [str(here), *sys.path])
    if spec is None or (spec.origin is None and spec.submodule_search_locations is None):
        raise UsageError(
            f"TARGET {target}: there is no module {top!r} in {here} or on the Python path; "
            "start the supervisor in the folder that holds it"
        )
    if spec.submodule_search_locations is not None:
        return Path(next(iter(spec.submodule_search_locations)))
    return _not_the_environment(Path(str(spec.origin)).parent, target)


def _not_the_environment(folder: Path, target: Target) -> Path:
    """Refuse a default that is Python's own library or everything that is installed beside it.

    Raises:
        UsageError: it is; purging bytecode there is nobody's wish.
    """
    own = {
        Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")
    }
    if folder.resolve() in own:
        raise UsageError(
            f"TARGET {target} lies in {folder}, which belongs to Python; name your code with --watch"
        )
    return folder
