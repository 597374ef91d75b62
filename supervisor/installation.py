"""Installation: the unit of systemd for this environment, and the file of variables beside it.

The rule: **nothing that a person wrote is overwritten.** A unit that we write carries, in its first line, the
digest of what follows; a file whose digest does not fit, or that has none, was edited or is somebody else's,
and is left alone. A file of variables that exists keeps every line; at most the port is added to it.

Each instance is a unit of its own (``wa-monitor@NAME.service``), so that instances may run from different
checkouts and environments; it is the template with this environment's paths in it.

The templates are those of ``contrib/systemd``; an installed wheel carries them in ``supervisor/units``. They
are text to this module: it knows where their paths lie and which variable holds the port, and no more of what
they run.

Rejected: a unit template that all instances share (the second checkout would change what the first one runs),
enabling and starting the unit (the operator fills in the variables first), generating the text here
(``contrib/systemd`` is what people read).
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from supervisor import environment, plainfile, unitfile
from supervisor.errors import SupervisorError, UsageError
from supervisor.settings import Options, parse_target, resolve
from supervisor.unitfile import Unit

NAME = "wa-monitor"
"""Of the unit, and what those of its instances begin with."""

LISTEN_VARIABLE = "WA_SUPERVISOR_LISTEN"
"""What a file of variables gives its supervisor to listen on, as HOST:PORT."""

_TREE = "/opt/wa-monitor"
_PLACES = re.compile(rf"{_TREE}(?:/\.venv(?:/bin)?)?(?![\w.-])")
"""Where the templates say that the code, the environment and its commands are."""

_MARK = "# Written by wa-supervisor install-unit; sha256 of what follows: "
_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_PORTS = range(9464, 9564)
_ENV_MODE = 0o640

# What an unprivileged manager can do for its units; the sandbox needs what only the system's one may do.
_OF_A_USER = frozenset(
    {
        *("Description", "Documentation", "StartLimitIntervalSec", "Check", "Type", "NotifyAccess"),
        *("WorkingDirectory", "Environment", "EnvironmentFile", "RuntimeDirectory", "RuntimeDirectoryMode"),
        *("StateDirectory", "StateDirectoryMode", "ConfigurationDirectory", "ExecStart", "ExecReload"),
        *("TimeoutStartSec", "TimeoutStopSec", "TimeoutAbortSec", "WatchdogSec", "Restart", "RestartSec"),
        "RestartPreventExitStatus",
        *("KillMode", "OOMPolicy", "NoNewPrivileges", "UMask"),
    }
)

_VARIABLES = """\
# Settings of this instance, read when the unit starts; `NAME=value` a line, as systemd.exec(5) has it.
# docs/reference.md lists them all.
{variable}=127.0.0.1:{port}
#WHATSAPP_DB_PATH=/srv/bridge/store
#WA_PROJECTS=/etc/wa-monitor/projects.yaml
# First start only: an ISO time with offset, `beginning` or `now`.
#WA_SINCE=now
{secret}"""
_URL_ELSEWHERE = "# The database's URL is no setting here: it is the one line of {path}.\n"
_URL_HERE = "#DATABASE_URL=postgresql://USER:PASSWORD@HOST:5432/NAME\n"


@dataclass(frozen=True)
class Places:
    """What the template's paths become.

    Attributes:
        tree: folder that holds the code.
        environment: of Python.
        commands: folder of its scripts.
    """

    tree: str
    environment: str
    commands: str

    def moved(self, place: str) -> str:
        """Return where a place of the template is."""
        return {
            _TREE: self.tree,
            f"{_TREE}/.venv": self.environment,
            f"{_TREE}/.venv/bin": self.commands,
        }[place]


@dataclass(frozen=True)
class Scope:
    """Whose units: those of the system's manager or of a user's, below which root directory.

    Attributes:
        of_user: the manager of the user who asks.
        root: ``/``, or a directory that stands for it where units and their files are looked for and
            written; what a unit names is where it says.
    """

    of_user: bool = False
    root: Path = Path("/")

    @property
    def configuration(self) -> str:
        """What the specifier ``%E`` stands for."""
        return os.environ.get("XDG_CONFIG_HOME") or f"{Path.home()}/.config" if self.of_user else "/etc"

    @property
    def folder(self) -> Path:
        """Where an administrator's units are."""
        return self.below(f"{self.configuration}/systemd/{'user' if self.of_user else 'system'}")

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where units are looked for, the strongest first (systemd.unit(5))."""
        kind = "user" if self.of_user else "system"
        others = (f"/etc/systemd/{kind}", f"/run/systemd/{kind}", f"/usr/local/lib/systemd/{kind}")
        return (
            self.folder,
            *(
                self.below(path)
                for path in (*others, f"/usr/lib/systemd/{kind}")
                if self.below(path) != self.folder
            ),
        )

    @property
    def systemctl(self) -> str:
        """The command that speaks with this manager."""
        return "systemctl --user" if self.of_user else "systemctl"

    def below(self, path: str) -> Path:
        """Return an absolute path below the root."""
        return self.root / path.lstrip("/")

    def specifiers(self, unit: str) -> Mapping[str, str]:
        """Return what specifiers stand for in a unit, as far as paths are made of them."""
        stem = unit.removesuffix(".service")
        prefix, _, instance = stem.partition("@")
        known = {"%": "%", "E": self.configuration, "i": instance, "I": instance, "p": prefix, "n": unit}
        if not self.of_user:
            return {**known, "N": stem, "S": "/var/lib", "t": "/run", "h": "/root"}
        runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
        # State is in $XDG_STATE_HOME from systemd 254 on.
        return {**known, "N": stem, "S": self.configuration, "t": runtime, "h": str(Path.home())}


@dataclass(frozen=True)
class Installed:
    """What an installation did.

    Attributes:
        unit: its name.
        done: a sentence about each file.
        following: the commands to type next, in their order.
    """

    unit: str
    done: tuple[str, ...]
    following: tuple[str, ...]


def unit_name(instance: str | None) -> str:
    """Return the name of an instance's unit.

    Raises:
        UsageError: no unit and no file can be called so.
    """
    if instance is None:
        return f"{NAME}.service"
    if not _INSTANCE.fullmatch(instance):
        raise UsageError(
            f"--instance {instance!r} is no name for an instance; use letters, digits, - _ and . as in dev-2"
        )
    return f"{NAME}@{instance}.service"


def here(unit: str) -> Places:
    """Return the places of this environment: the code lies in the working directory, or is installed.

    Raises:
        UsageError: the template's target or our own command is not to be found.
    """
    commands = sysconfig.get_path("scripts")
    if not Path(commands, "wa-supervisor").is_file():
        raise UsageError(
            f"there is no wa-supervisor in {commands}; install the package into the environment of"
            f" {sys.executable}, and use its own wa-supervisor"
        )
    command = unitfile.parse([template(unit)], {}).words("ExecStart")
    tree = resolve(parse_target(command[-1:]), Options(runtime_dir="/", state_dir="/")).tree
    return Places(str(Path(tree.roots[0]).parent), sys.prefix, commands)


def template(unit: str) -> str:
    """Return the text that the unit is made from."""
    name = f"{NAME}@.service" if "@" in unit else f"{NAME}.service"
    packed, checkout = Path(__file__).with_name("units"), Path(__file__).parents[1] / "contrib" / "systemd"
    return (packed if packed.is_dir() else checkout).joinpath(name).read_text(encoding="utf-8")


def render(unit: str, places: Places, *, of_user: bool) -> str:
    """Return the text of a unit, with the line that tells whether it was edited.

    Raises:
        UsageError: a path cannot be written in a unit.
    """
    text = unitfile.relocate(template(unit), places.moved, _PLACES)
    if of_user:
        text = "".join(_for_a_user(text))
    return f"{_MARK}{_digest(text)}\n{text}"


def is_ours(text: str) -> bool:
    """Whether a unit stands as we wrote it."""
    first, _, rest = text.partition("\n")
    return first == _MARK + _digest(rest)


def install(unit: str, text: str, scope: Scope) -> Installed:
    """Write a unit and its file of variables.

    Raises:
        SupervisorError: a file was edited, or cannot be written.
    """
    path = scope.folder / unit
    found = _present(path)
    if found is not None and not is_ours(found):
        raise SupervisorError(
            f"{path} was edited or is not ours, and is left as it is; move your changes to a drop-in"
            f" ({scope.systemctl} edit {unit}) and remove the file, or compare it with --print"
        )
    read = unitfile.parse([text], scope.specifiers(unit))
    variables = scope.below(read.all("EnvironmentFile")[-1].removeprefix("-"))
    done = [_write_variables(variables, scope, _group(read), _credential(read, scope))]
    if found == text:
        done.append(f"{path} is up to date")
    else:
        _write(path, text, scope, 0o644)
        done.append(f"{'replaced' if found is not None else 'wrote'} {path}")
    return Installed(unit, tuple(done), tuple(_following(unit, read, variables, scope)))


def port_of(variables: Path) -> int | None:
    """Return the port that a file of variables gives, or None."""
    try:
        return _port(environment.assignments(variables, exported=False).get(LISTEN_VARIABLE, ""))
    except UsageError:
        return None


def _port(address: str) -> int | None:
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else None


def _listens(file: Path, specifiers: Mapping[str, str]) -> str:
    """Return what a unit itself gives its supervisor to listen on; nothing where it cannot be read."""
    with suppress(OSError, UsageError):
        text = plainfile.read(file).decode("utf-8", "replace")
        words = unitfile.parse([text], specifiers).words("Environment")
        return dict(word.partition("=")[::2] for word in words).get(LISTEN_VARIABLE, "")
    return ""


def _for_a_user(text: str) -> Iterator[str]:
    """Yield the lines that the manager of a user understands, with its own targets and places."""
    for line in text.splitlines(keepends=True):
        key, equals, _ = line.partition("=")
        if line.startswith(("[", "#", "\n")) or (equals and key in _OF_A_USER):
            yield line.replace("=/etc/", "=%E/").replace("=-/etc/", "=-%E/")
        elif key == "WantedBy":
            yield "WantedBy=default.target\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _present(path: Path) -> str | None:
    """Return the text of a file, or None where there is none; what is no plain text has no digest."""
    try:
        return plainfile.read(path).decode("utf-8", "replace")
    except FileNotFoundError:
        return "" if path.is_symlink() else None  # A link that leads nowhere is somebody's, too.
    except OSError as error:
        remedy = "do it as root" if isinstance(error, PermissionError) else "look at what it is"
        raise SupervisorError(f"cannot read {path}: {error.strerror}; {remedy}") from error


def _credential(unit: Unit, scope: Scope) -> Path | None:
    """Return the file that the unit loads the database's URL from, or None."""
    loaded = [word.partition(":")[2] for word in unit.words("LoadCredential")]
    return scope.below(loaded[0]) if loaded else None


def _write_variables(path: Path, scope: Scope, group: int, credential: Path | None) -> str:
    """See to a file of variables with a port of its own, and say what was done."""
    present = _present(path)
    if present is not None and (port := port_of(path)) is not None:
        return f"kept {path} (port {port})"
    port = _free_port(path, scope)
    if present is None:
        secret = _URL_HERE if credential is None else _URL_ELSEWHERE.format(path=credential)
        text = _VARIABLES.format(variable=LISTEN_VARIABLE, port=port, secret=secret)
        _write(path, text, scope, _ENV_MODE, group)
        return f"wrote {path} (port {port})"
    line_end = "" if not present or present.endswith("\n") else "\n"
    line = f"{LISTEN_VARIABLE}=127.0.0.1:{port}"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{line_end}{line}\n")
    except OSError as error:
        raise _cannot_write(path, scope, error) from error
    return f"added {line} to {path}"


def _free_port(path: Path, scope: Scope) -> int:
    """Return a port that no other instance has been given and nobody listens on.

    Raises:
        SupervisorError: there is none left.
    """
    taken = {port_of(other) for other in path.parent.glob("*env") if other != path and other.is_file()}
    plain = f"{NAME}.service"
    for file in (
        folder / plain for folder in scope.folders
    ):  # It may be as in contrib/, with a port of its own.
        if path.name != "env" and file.is_file():
            taken.add(_port(_listens(file, scope.specifiers(plain))))
    for port in _PORTS:
        if port not in taken and is_free(port):
            return port
    raise SupervisorError(
        f"no port from {_PORTS[0]} to {_PORTS[-1]} is free;"
        f" write {LISTEN_VARIABLE}=HOST:PORT into {path} yourself"
    )


def is_free(port: int) -> bool:
    """Whether one could listen on a port of this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return True
    return False


def _write(path: Path, text: str, scope: Scope, mode: int, group: int = -1) -> None:
    """Write a file as a whole, or not at all."""
    beside = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
        with open(beside, "x", encoding="utf-8", opener=_private) as file:
            os.fchown(file.fileno(), -1, group)
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink()
        raise _cannot_write(path, scope, error) from error


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _cannot_write(path: Path, scope: Scope, error: OSError) -> SupervisorError:
    remedy = "nothing else was changed"
    if isinstance(error, PermissionError):
        remedy = (
            "become its owner, or name another $XDG_CONFIG_HOME"
            if scope.of_user
            else "do it as root, or use --user"
        )
    return SupervisorError(f"cannot write {path}: {error.strerror}; {remedy}")


def _group(unit: Unit) -> int:
    """Return the group that may read the variables: that of the unit's user, -1 while there is none."""
    import grp  # noqa: PLC0415 -- only where files are written
    import pwd  # noqa: PLC0415

    name = unit.last("Group") or unit.last("User")
    if name is None or os.geteuid() != 0:
        return -1
    with suppress(KeyError):
        return grp.getgrnam(name).gr_gid
    with suppress(KeyError):
        return pwd.getpwnam(name).pw_gid
    return -1


def _following(unit: str, read: Unit, variables: Path, scope: Scope) -> Iterator[str]:
    """Yield the commands that are to be typed next."""
    import pwd  # noqa: PLC0415 -- only where a unit is installed

    user = read.last("User")
    if user is not None and scope.root == Path("/"):
        try:
            pwd.getpwnam(user)
        except KeyError:
            yield f"useradd --system --shell /usr/sbin/nologin {user} && chgrp {user} {_shown(variables)}"
    yield f"${{EDITOR:-vi}} {_shown(variables)}"
    credential = _credential(read, scope)
    if credential is not None and not credential.exists():
        yield (
            f"install -m 600 /dev/stdin {_shown(credential)}"
            "  # then postgresql://USER:PASSWORD@HOST/NAME, Enter, Ctrl-D"
        )
    reload = "" if scope.root != Path("/") else f"{scope.systemctl} daemon-reload && "
    yield f"{reload}{scope.systemctl} enable --now {unit}"
    suffix = " --user" if scope.of_user else ""
    instance = unit.removesuffix(".service").partition("@")[2]
    yield f"wa-supervisor doctor{suffix}{f' --instance {instance}' if instance else ''}"


def _shown(path: Path) -> str:
    import shlex  # noqa: PLC0415 -- only where a command is shown

    return shlex.quote(str(path))
