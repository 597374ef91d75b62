"""Check: is everything there that a monitor needs, before one is started or while one runs?

The rule: **what is asked is what a start would do, and nothing stays of it.** The bridge is read as the relay
reads it, the database takes the migrations and a trial row and gives all of it back. So what is found here is
what a start would fail by, in the same words; and each thing is looked at for itself, so that one run names
everything that is wrong.

A finding is one sentence about what is, and one about what to do; no password is in either. Others than
people may ask: a supervisor runs ``wa-monitor check --json`` when its operator asks what is wrong, and knows
no more of a monitor than that.

Rejected: asking the running monitor (it may be what does not start, and it tells its own state by metrics).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import perf_counter
from typing import Literal

import msgspec

from monitor import schema
from monitor.bridge import Bridge
from monitor.canary import try_write
from monitor.database import Database, connect
from monitor.errors import MonitorError
from monitor.messages import Message
from monitor.projects import load_projects
from monitor.settings import Settings, Values, contradictions, load

State = Literal["ok", "wrong", "skipped"]

_SILENT_HOURS = 24
"""A bridge that wrote nothing for a day is asked about, also where a group is quiet."""
_CLOCKS_APART_SECONDS = 5.0
_FUTURE = timedelta(minutes=5)
_ELSE = "look at what it names"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What was found about one thing."""

    check: str
    """`settings`, `projects`, `bridge`, `map`, `database`, `table` or `clock`."""
    state: State
    detail: str
    """One sentence: what is."""
    remedy: str | None = None
    """What to do about it; None where nothing is wrong."""


def check(flags: Values, config: Path | None = None) -> list[Finding]:
    """Look at everything that the settings name; what they do not name is a finding, too."""
    try:
        return [*_settings(), *_rest(load(flags, config=config))]
    except MonitorError as error:
        refusal = _wrong("settings", error)
    try:  # If a bridge is all that is missing, the rest can be looked at.
        settings = load(msgspec.structs.replace(flags, bridge=flags.bridge or os.devnull), config=config)
    except MonitorError:
        names = ("projects", "bridge", "map", "database")
        return [refusal, *(_skipped(name, "the settings are wrong") for name in names)]
    rest = [one for one in _rest(settings) if one.check not in {"bridge", "map"}]
    return [refusal, *(_skipped(name, "no bridge is given") for name in ("bridge", "map")), *rest]


def to_json(findings: Sequence[Finding]) -> bytes:
    """Return the documented form."""
    return msgspec.json.encode(
        {"failed": any(one.state == "wrong" for one in findings), "findings": findings}
    )


def _rest(settings: Settings) -> Iterator[Finding]:
    yield from _guarded("projects", lambda: _projects(settings))
    yield from _bridge(settings)
    yield from _guarded("database", lambda: _database(settings))


def _skipped(name: str, why: str) -> Finding:
    return Finding(check=name, state="skipped", detail=f"not looked at: {why}")


def _settings() -> Iterator[Finding]:
    found = contradictions()
    for first, second in found:
        yield Finding(
            check="settings",
            state="wrong",
            detail=f"{first} and {second} are both set and differ; {first} counts",
            remedy=f"remove {second} from where it is set",
        )
    if not found:
        yield Finding(check="settings", state="ok", detail="they can be meant")


def _projects(settings: Settings) -> Iterator[Finding]:
    if settings.projects is None:
        yield Finding(
            check="projects",
            state="wrong",
            detail="no projects file is given",
            remedy="set WA_PROJECTS or --projects to projects.yaml",
        )
        return
    names = ", ".join(project.name for project in load_projects(settings.projects).enabled)
    yield Finding(check="projects", state="ok", detail=f"{settings.projects} enables {names}")


def _bridge(settings: Settings) -> Iterator[Finding]:
    with closing(Bridge(settings.bridge)) as reader:
        yield from _guarded("bridge", lambda: _messages(reader, settings))
        yield from _guarded("map", lambda: _map(reader))


def _messages(reader: Bridge, settings: Settings) -> Iterator[Finding]:
    end = reader.end()
    if not end.key:
        yield Finding(
            check="bridge", state="ok", detail=f"{settings.bridge} can be read; it holds no message"
        )
        return
    now = datetime.now(UTC)
    newest = next((row for row in reader.find([(end.chat_jid, end.key)]) if isinstance(row, Message)), None)
    if newest is not None and newest.sent_at > now + _FUTURE:
        yield Finding(
            check="bridge",
            state="wrong",
            detail=f"its newest message was sent at {newest.sent_at.isoformat()}, which is yet to come",
            remedy="correct the clock of this machine or of the bridge's",
        )
    age_hours = (now.timestamp() - settings.bridge.stat().st_mtime) / 3600
    if age_hours > _SILENT_HOURS:
        yield Finding(
            check="bridge",
            state="wrong",
            detail=f"nothing was written to {settings.bridge} for {age_hours:.0f} hours",
            remedy="look whether the bridge runs and whether WhatsApp still knows its device",
        )
    else:
        yield Finding(
            check="bridge",
            state="ok",
            detail=f"{settings.bridge} can be read; last written {age_hours * 60:.0f} minutes ago",
        )


def _map(reader: Bridge) -> Iterator[Finding]:
    known = reader.known()
    yield Finding(check="map", state="ok", detail=f"it knows the phones of {len(known.phone_of)} LIDs")


def _database(settings: Settings) -> Iterator[Finding]:
    began = perf_counter()
    with closing(connect(settings.database_url)) as database:
        took_ms = (perf_counter() - began) * 1000
        yield Finding(
            check="database", state="ok", detail=f"{database.place} answers, connected in {took_ms:.0f} ms"
        )
        yield from _guarded("table", lambda: _table(database, settings))
        yield from _guarded("clock", lambda: _clock(database))


def _table(database: Database, settings: Settings) -> Iterator[Finding]:
    """Do what a start does to the database, and take it back."""
    with database.trial():
        schema.prepare(database)
        if settings.database_identity is not None:
            schema.check_identity(database, settings.database_identity)
        try_write(database, _a_project(settings))
    yield Finding(
        check="table", state="ok", detail="it takes what a monitor writes; a trial row was taken back"
    )


def _a_project(settings: Settings) -> str:
    """Return the name that a trial row has; without a projects file that can be read, a name of ours."""
    try:
        return load_projects(settings.projects).enabled[0].name if settings.projects else "check"
    except MonitorError:
        return "check"


def _clock(database: Database) -> Iterator[Finding]:
    before = datetime.now(UTC)
    ((theirs,),) = database.rows("server_time")
    after = datetime.now(UTC)
    apart_seconds = max((theirs - after).total_seconds(), (before - theirs).total_seconds(), 0.0)
    if apart_seconds > _CLOCKS_APART_SECONDS:
        yield Finding(
            check="clock",
            state="wrong",
            detail=f"this machine's clock and that of {database.place} are {apart_seconds:.0f} s apart",
            remedy="have both set by NTP (timedatectl set-ntp true)",
        )
    else:
        yield Finding(check="clock", state="ok", detail=f"it agrees with that of {database.place}")


def _guarded(name: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Yield what a look finds; what it fails by is a finding as well."""
    try:
        yield from look()
    except MonitorError as error:
        yield _wrong(name, error)
    except OSError as error:
        yield Finding(
            check=name,
            state="wrong",
            detail=f"{error.filename}: {error.strerror}",
            remedy="make it readable for the monitor's user",
        )


def _wrong(name: str, error: MonitorError) -> Finding:
    """Split a sentence of ours: it says what is, a semicolon, and what to do."""
    what, _, remedy = str(error).rpartition("; ")
    return Finding(check=name, state="wrong", detail=what or remedy, remedy=remedy if what else _ELSE)
