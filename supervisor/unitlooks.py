"""Unit looks: what a unit of systemd says, and what the manager made of it.

The rule: what an operator has changed on purpose is respected, as far as the promises hold: only settings
that would break one of them are wrong. A unit that we wrote is compared with what we would write today.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from supervisor import installation, unitfile
from supervisor.errors import SupervisorError
from supervisor.finding import Found, ok, run, split
from supervisor.installation import Places
from supervisor.subject import Subject

_START_LIMIT_SECONDS, _START_LIMIT_BURST, _RESTART_SECONDS = "10s", "5", "100ms"
"""What counts where a unit says nothing (systemd-system.conf(5), systemd.service(5))."""

_INLINE = ("SetCredential", "SetCredentialEncrypted")
_YES = frozenset({"1", "yes", "true", "on"})
_HOMES = ("/home", "/root", "/run/user")
_SCRATCH = ("/tmp", "/var/tmp")  # noqa: S108 -- what PrivateTmp= replaces


def unit(one: Subject) -> Iterator[Found]:
    """Look at the unit."""
    for problem in one.problems:
        yield "wrong", *split(SupervisorError(problem))
    for problem in one.unseen:
        yield "skipped", f"{problem}: what is in it is for root to find out", None
    if one.unit is None or one.file is None:
        return
    control = f"{one.scope.systemctl} daemon-reload"
    yield from _text(one, one.file)
    user = one.unit.last("User")
    if one.account is None:
        yield (
            "wrong",
            f"there is no user {user}",
            f"useradd --system --shell /usr/sbin/nologin {user}, or name another with User=",
        )
    elif one.account.uid == 0 and not one.scope.of_user:
        yield "warning", "the service runs as root", "name an unprivileged user with User="
    if one.command and not os.access(one.command[0], os.X_OK):
        yield "wrong", f"{one.command[0]} is not there or is no program", _again(one)
    for key, good, why in _DEMANDS:
        value = one.unit.last(key)
        if value not in good:
            wanted = good[0]
            yield "wrong", f"{key}={value or ''}: {why}", f"set {key}={wanted}, then {control}"
    yield from _given_up(one)
    yield from _missing(one)
    yield from _sandboxed(one)
    yield from _verified(one, one.file)
    yield from _as_loaded(one)


_DEMANDS: Sequence[tuple[str, tuple[str | None, ...], str]] = (
    ("Type", ("notify", "notify-reload"), "it would count as started before any code was proven"),
    ("NotifyAccess", ("main", None, "exec", "all"), "systemd would not hear that the service is ready"),
    ("Restart", ("on-failure", "always"), "a supervisor that is killed or fails would stay away"),
    ("KillMode", ("mixed", "control-group", None), "processes would be left over after a stop"),
)


def _given_up(one: Subject) -> Iterator[Found]:
    """Find what would leave a service down, or hung, for good."""
    assert one.unit is not None  # noqa: S101 -- asked by the caller
    control = f"{one.scope.systemctl} daemon-reload"
    if not unitfile.seconds(one.unit.last("WatchdogSec") or "0"):
        yield (
            "wrong",
            "WatchdogSec= is not set: a supervisor that hangs would hang for ever",
            f"set WatchdogSec=30, then {control}",
        )
    interval = unitfile.seconds(one.unit.last("StartLimitIntervalSec", "Unit") or _START_LIMIT_SECONDS)
    burst = one.unit.last("StartLimitBurst", "Unit") or _START_LIMIT_BURST
    pause = unitfile.seconds(one.unit.last("RestartSec") or _RESTART_SECONDS)
    if interval is None or pause is None or not burst.isdecimal() or not interval or not int(burst):
        return
    if int(burst) * pause <= interval:
        yield (
            "wrong",
            f"systemd gives it up after {burst} starts within {interval:g} s, and it pauses {pause:g} s",
            f"set StartLimitIntervalSec=0 in [Unit], then {control}",
        )


def _missing(one: Subject) -> Iterator[Found]:
    """Find what systemd needs to be there before it starts anything."""
    assert one.unit is not None  # noqa: S101 -- asked by the caller
    for key in ("ReadWritePaths", "ReadOnlyPaths", "BindPaths", "BindReadOnlyPaths"):
        for word in one.unit.words(key):
            path = Path(word.lstrip("+").partition(":")[0])
            if not word.startswith("-") and path.is_absolute() and not path.exists():
                yield (
                    "wrong",
                    f"{key}={path} is not there: systemd does not start it",
                    f"make it, or write {key}=-{path}",
                )
    replaced = {word.partition(":")[0] for key in _INLINE for word in one.unit.words(key)}
    for word in one.unit.words("LoadCredential"):
        name, _, source = word.partition(":")
        file = one.scope.below(source)
        if source.startswith("/") and name not in replaced and not file.exists():
            yield "wrong", f"the credential {name} is not there: systemd does not start it", f"write {file}"


def _text(one: Subject, file: Path) -> Iterator[Found]:
    """Compare a unit with what we would write for its own places."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if not installation.is_ours(text):
        yield ok(f"{file}, written by hand or edited")
        return
    written = unitfile.parse([text], one.scope.specifiers(one.name))  # What drop-ins change is not its own.
    commands = Path(written.words("ExecStart")[0]).parent
    places = Places(str(written.last("WorkingDirectory")), str(commands.parent), str(commands))
    if text == installation.render(one.name, places, of_user=one.scope.of_user):
        yield ok(f"{file}, as install-unit writes it")
    else:
        yield "wrong", f"{file} was written by another version of wa-monitor", _again(one)


def _again(one: Subject) -> str:
    instance = one.name.removesuffix(".service").partition("@")[2]
    return f"wa-supervisor install-unit{f' --instance {instance}' if instance else ''}" + (
        " --user" if one.scope.of_user else ""
    )


def _verified(one: Subject, file: Path) -> Iterator[Found]:
    """Ask systemd whether it understands the unit; its exit code is 0 also where it warns."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None or one.scope.root != Path("/"):
        return
    manager = ["--user"] if one.scope.of_user else []
    path = file if "@." not in file.name else file.with_name(one.name)
    said = run([analyze, "verify", "--man=no", *manager, str(path)])
    about = [line for line in said.stderr.splitlines() if one.name in line or file.name in line]
    if about:
        yield "wrong", f"systemd-analyze verify: {about[0]}", f"correct {file}, or {_again(one)}"
    else:
        yield ok("systemd understands it")


def _as_loaded(one: Subject) -> Iterator[Found]:
    """Ask the manager what it makes of the unit."""
    if not Path("/run/systemd/system").is_dir() or one.scope.root != Path("/"):
        yield "skipped", "systemd does not run here", None
        return
    words = one.scope.systemctl.split()
    names = "LoadState,UnitFileState,ActiveState,Result,NeedDaemonReload"
    said = run([*words, "show", one.name, f"--property={names}"])
    if said.returncode != 0:
        yield "skipped", f"{one.scope.systemctl} does not answer: {said.stderr.strip()[:200]}", None
        return
    facts = dict(line.split("=", 1) for line in said.stdout.splitlines() if "=" in line)
    control = one.scope.systemctl
    if facts.get("NeedDaemonReload") == "yes":
        yield "wrong", "the unit has changed since systemd read it", f"{control} daemon-reload"
    if facts.get("UnitFileState") not in {"enabled", "enabled-runtime"}:
        yield "wrong", "it is not started when the machine is", f"{control} enable {one.name}"
    state = facts.get("ActiveState", "")
    if state == "failed":
        reason = facts.get("Result", "")
        journal = f"journalctl{' --user' if one.scope.of_user else ''} -u {one.name}"
        yield "wrong", f"it has failed ({reason})", f"{journal} says why; {control} restart {one.name}"
    elif state not in {"active", "reloading"}:
        yield "wrong", f"it is not running ({state})", f"{control} start {one.name}"
    else:
        yield ok(f"systemd has it {state}")


def _sandboxed(one: Subject) -> Iterator[Found]:
    """Find places that the service needs and that its own unit hides from it."""
    if one.unit is None or one.settings is None:
        return
    homes = (one.unit.last("ProtectHome") or "no").lower()
    hidden = {place: "ProtectHome=" for place in _HOMES if homes in _YES | {"tmpfs"}}
    if (one.unit.last("PrivateTmp") or "no").lower() in _YES | {"disconnected"}:
        hidden |= dict.fromkeys(_SCRATCH, "PrivateTmp=")
    shown = [
        Path(word.lstrip("-+").partition(":")[0])
        for key in ("BindPaths", "BindReadOnlyPaths")
        for word in one.unit.words(key)
    ]
    for what, path in _needed(one):
        for place, option in hidden.items():
            if path.is_relative_to(place) and not any(path.is_relative_to(bound) for bound in shown):
                detail = f"{what} is {path}, which {option} hides from the service"
                show = f"BindReadOnlyPaths={path} in a drop-in ({one.scope.systemctl} edit {one.name})"
                yield "wrong", detail, f"move it, or show it with {show}"


def _needed(one: Subject) -> Iterator[tuple[str, Path]]:
    assert one.settings is not None  # noqa: S101 -- asked by the caller
    yield "the working directory", one.folder
    yield "its program", Path(one.command[0])
    yield "its interpreter", Path(os.path.realpath(Path(one.command[0]).with_name("python")))
    for root in one.settings.tree.roots:
        yield "the code", Path(root)
    for name, value in one.variables.items():
        if value.startswith("/") and Path(value).exists():
            yield f"{name}", Path(value)
