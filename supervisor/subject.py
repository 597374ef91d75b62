"""Subject: what a doctor examines, put together from a unit, a process, or what an installation would write.

The rule: **seen with the eyes of the service.** Which user, folder, variables and words a service has is read
where systemd or the kernel has it, and what may be read and written is tried as that user, not as the root
who asks.

Rejected: guessing from the operator's own shell (its user, folder and variables are others), asking the
supervisor for everything (it may be what does not start).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from supervisor import control, environment, installation, processes, unitfile
from supervisor.errors import NoSupervisorError, SupervisorError, UsageError
from supervisor.flags import Parser, parse_run
from supervisor.installation import NAME, Scope
from supervisor.settings import (
    Options,
    Settings,
    load_file,
    merge,
    parse_target,
    resolve,
    runtime_dir,
    working_directory,
)
from supervisor.unitfile import Unit

_ANSWER_SECONDS = 5.0
_EXTRA = "X-Supervisor"
"""The section of a unit that is ours: systemd ignores what begins with ``X-`` (systemd.unit(5))."""


@dataclass(frozen=True)
class Account:
    """A user as a service has it.

    Attributes:
        name: as people know it.
        uid, gid, groups: what the kernel goes by.
        home: of the user.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @property
    def can_be_taken(self) -> bool:
        """Whether we may act as this user."""
        return os.geteuid() in {0, self.uid}

    @contextlib.contextmanager
    def acting(self) -> Iterator[None]:
        """Do what the block does with this user's rights."""
        if os.geteuid() == self.uid:
            yield
            return
        groups, gid = os.getgroups(), os.getegid()
        os.setgroups(self.groups)
        os.setegid(self.gid)
        os.seteuid(self.uid)
        try:
            yield
        finally:
            os.seteuid(0)
            os.setegid(gid)
            os.setgroups(groups)

    def for_a_process(self) -> dict[str, Any]:
        """Return what :class:`subprocess.Popen` needs to start a process of this user."""
        if os.geteuid() == self.uid:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": list(self.groups)}


@dataclass(frozen=True)
class Subject:
    """A service.

    Attributes:
        name: of its unit, or what stands for it.
        scope: the manager.
        unit: what the unit says; None for a process that no unit started.
        file: of the unit; None if it is not installed.
        account: its user; None if there is no such user.
        folder: it works in.
        command: its program and the words after it.
        variables: its environment.
        sources: where each of them is set, by file, the later file counts.
        problems: one sentence each about what of this cannot be found out.
        unseen: of them, those that are about who asks and not about the service.
        settings: of its supervisor; None if they cannot be meant.
        status: of its supervisor; None if none answers.
        silence: why none answers.
        offered: command that tells whether what the service itself needs is there, ``Check=`` in our section.
    """

    name: str
    scope: Scope
    unit: Unit | None
    file: Path | None
    account: Account | None
    folder: Path
    command: tuple[str, ...]
    variables: Mapping[str, str]
    sources: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    settings: Settings | None = None
    status: Mapping[str, Any] | None = None
    silence: str = ""
    offered: tuple[str, ...] = ()


def installed(scope: Scope) -> list[str]:
    """Return the names of the units of ours that are installed or enabled."""
    names = re.compile(rf"{re.escape(NAME)}(?:@[^@]+)?\.service")
    found = {
        path.name
        for folder in scope.folders
        for pattern in ("*.service", "*.wants/*.service")
        for path in folder.glob(pattern)
    }
    return sorted(name for name in found if names.fullmatch(name))


def of_unit(name: str, scope: Scope) -> Subject:
    """Return the service that an installed unit describes.

    Raises:
        SupervisorError: it is not installed.
    """
    template = re.sub("@.*", "@.service", name)
    places = [folder / one for one in dict.fromkeys((name, template)) for folder in scope.folders]
    file = next((path for path in places if path.is_file() or path.is_symlink()), None)
    if file is not None and (file.resolve() == Path(os.devnull) or not file.stat().st_size):
        raise SupervisorError(f"{name} is masked by {file}; {scope.systemctl} unmask {name}")
    if file is None:
        raise SupervisorError(f"no unit {name} is installed in {scope.folder}; `wa-supervisor install-unit`")
    drop_ins = {
        path.name: path
        for folder in reversed(scope.folders)
        for one in dict.fromkeys((template, name))
        for path in sorted((folder / f"{one}.d").glob("*.conf"))
    }
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in (file, *_sorted(drop_ins))]
    return _of_text(name, scope, texts, file)


def of_environment(scope: Scope) -> Subject:
    """Return the service that an installation would write from here, with our own user and variables."""
    name = installation.unit_name(None)
    text = installation.render(name, installation.here(name), of_user=scope.of_user)
    unit = unitfile.parse([text], scope.specifiers(name))
    return _completed(
        Subject(
            name="this environment",
            scope=scope,
            unit=None,
            file=None,
            account=account_of(os.geteuid()),
            folder=Path(unit.last("WorkingDirectory") or "/"),
            command=_command(unit, {installation.LISTEN_VARIABLE: Options().listen, **os.environ}),
            variables=dict(os.environ),
            offered=tuple(unit.words("Check", _EXTRA)),
        ),
        runtime_dir(None),
    )


def of_process(directory: Path, scope: Scope) -> Subject | None:
    """Return the service whose supervisor answers in a runtime directory, or None."""
    status, _ = _ask(directory)
    if status is None:
        return None
    pid = status["pid"]
    words = [os.fsdecode(word) for word in processes.arguments(pid)]
    if "run" not in words:
        return None
    variables = {os.fsdecode(k): os.fsdecode(v) for k, v in processes.environment(pid).items()}
    found = Subject(
        name=f"pid {pid}",
        scope=scope,
        unit=None,
        file=None,
        account=account_of(processes.owner(pid)),
        folder=processes.directory(pid) or Path.cwd(),
        command=tuple(words[words.index("run") - 1 :]),
        variables=variables,
    )
    plan = of_environment(scope)
    same = plan.settings is not None and parse_target(words[-1:]) == plan.settings.target
    offered = plan.offered if same else ()
    return _completed(replace(found, offered=offered), directory)


def account_of(user: str | int | None) -> Account | None:
    """Return the user of a name or number; None if there is none."""
    if user is None:
        return None
    text = str(user)
    try:
        facts = pwd.getpwuid(int(text)) if text.isdecimal() else pwd.getpwnam(text)
    except KeyError:
        return Account(text, int(text), int(text), (), "/") if text.isdecimal() else None
    groups = tuple(os.getgrouplist(facts.pw_name, facts.pw_gid))
    return Account(facts.pw_name, facts.pw_uid, facts.pw_gid, groups, facts.pw_dir)


def _of_text(name: str, scope: Scope, texts: list[str], file: Path) -> Subject:
    unit = unitfile.parse(texts, scope.specifiers(name))
    problems: list[str] = []
    unseen: list[str] = []
    sources: dict[Path, Mapping[str, str]] = {}
    for value in unit.all("EnvironmentFile"):
        path = scope.below(value.removeprefix("-"))
        if value.startswith("-") and not path.exists():
            continue
        try:
            sources[path] = environment.assignments(path, "the variables in", exported=False)
        except UsageError as error:
            # The manager reads it, whoever the service runs as.
            private = isinstance(error.__cause__, PermissionError) and not scope.of_user
            (unseen if private else problems).append(str(error))
    variables = dict(word.split("=", 1) for word in unit.words("Environment") if "=" in word)
    for given in sources.values():
        variables.update(given)
    runtime = unit.words("RuntimeDirectory")[:1]
    base = unit.specifiers["t"]
    account = account_of(os.geteuid() if scope.of_user else unit.last("User") or 0)
    found = Subject(
        name=name,
        scope=scope,
        unit=unit,
        file=file,
        account=account,
        folder=Path(unit.last("WorkingDirectory") or "/"),
        command=_command(unit, variables),
        variables=variables,
        sources=sources,
        problems=tuple(problems),
        unseen=tuple(unseen),
        offered=tuple(unit.words("Check", _EXTRA)),
    )
    return _completed(found, Path(base, *runtime) if runtime else runtime_dir(None))


def _command(unit: Unit, variables: Mapping[str, str]) -> tuple[str, ...]:
    first, *rest = unit.words("ExecStart") or [""]
    return (first.lstrip("@-:+!"), *(unitfile.substitute(word, variables) for word in rest))


def _completed(found: Subject, directory: Path) -> Subject:
    """Add what the words of the command mean, and what the supervisor says."""
    settings, problems = None, list(found.problems)
    try:
        settings = _settings(found, directory)
    except (SupervisorError, OSError) as error:
        if not found.unseen:  # Else it may be for want of what is in there.
            problems.append(str(error))
    status, silence = _ask(settings.runtime_dir if settings else directory)
    return replace(found, settings=settings, problems=tuple(problems), status=status, silence=silence)


def _settings(found: Subject, directory: Path) -> Settings:
    words = list(found.command[1:])
    if words[:1] != ["run"]:
        raise UsageError(f"{found.name} does not start `wa-supervisor run`; see its ExecStart=")
    given = vars(parse_run(Parser("wa-supervisor run"), words[1:]))
    target, config = parse_target(given.pop("target")), given.pop("config")
    here = working_directory()
    try:
        os.chdir(found.folder)
    except OSError as error:
        raise UsageError(
            f"cannot work in {found.folder}: {error.strerror}; correct WorkingDirectory="
        ) from error
    try:
        options = merge(
            {"runtime-dir": str(directory), "state-dir": _state_directory(found), **given},
            load_file(config) if config else {},
        )
        return resolve(target, options)
    finally:
        os.chdir(here)


def _state_directory(found: Subject) -> str:
    if found.unit is not None and (names := found.unit.words("StateDirectory")):
        return str(Path(found.unit.specifiers["S"], names[0]))
    if directory := found.variables.get("STATE_DIRECTORY", "").partition(":")[0]:
        return directory
    home = found.account.home if found.account else "/"
    return f"{found.variables.get('XDG_STATE_HOME') or f'{home}/.local/state'}/wa-supervisor"


def _ask(directory: Path) -> tuple[Mapping[str, Any] | None, str]:
    """Return the status of the supervisor of a runtime directory, or why there is none."""
    try:
        answer = control.request(directory, "status", timeout_seconds=_ANSWER_SECONDS)
    except NoSupervisorError as error:
        return None, str(error)
    return (answer["status"], "") if answer["ok"] else (None, str(answer["error"]))


def _sorted(drop_ins: Mapping[str, Path]) -> list[Path]:
    return [drop_ins[name] for name in sorted(drop_ins)]
