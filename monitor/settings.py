"""Settings of the monitor: environment, then credentials, then a TOML file, then flags; the later one wins.

The rule: one table, `Values`, names every setting once. The sources fill the same table, and `resolve`
turns it into `Settings`, the only form that the rest of the program sees. A key that nobody knows and a
value of the wrong type are refused with the file and the key, because a misspelt setting that is silently
ignored looks like one that does not work.

The database URL is kept in `DatabaseUrl`, which shows itself as `***`: a settings object may be logged
without care. It need not stand in the environment, where every child and `/proc` have it: systemd hands it
over as the file `database-url` in `$CREDENTIALS_DIRECTORY` (systemd.exec(5), `LoadCredential=`). Rejected: a
settings framework that reads the environment by itself, since its errors quote the value that they refuse.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import Annotated, Literal
from zoneinfo import ZoneInfo

import msgspec

from monitor.errors import ConfigError

MESSAGES_DB = "messages.db"
BUSINESS_ZONE: tzinfo = timezone(timedelta(hours=2), "SAST")
"""Johannesburg, which has no daylight saving: it needs no time zone database on the host."""
_BUSINESS_ZONE_NAME = "Africa/Johannesburg"
DEFAULT_SOURCE = "bridge"
_MAX_PORT = 65535
# Beyond lie typing errors, and at the ends of the calendar times that can be written and not read again.
_FIRST_YEAR = 1970
_LAST_YEAR = 2100

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class Values(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting, as a source writes it; None where a source is silent."""

    bridge: _Text | None = None
    database_url: _Text | None = None
    projects: _Text | None = None
    since: _Text | None = None
    once: bool | None = None
    listen: _Text | None = None
    source: _Text | None = None
    scan_interval: _Positive | None = None
    lease: _Positive | None = None
    calling_codes: list[Annotated[int, msgspec.Meta(ge=1, le=999)]] | None = None
    extra_separators: bool | None = None
    own_messages: Literal["skip", "store"] | None = None
    log_level: LogLevel | None = None
    log_numbers: Literal["masked", "full"] | None = None
    log_file: _Text | None = None
    adopt: _Text | None = None
    auto_repair: Annotated[float, msgspec.Meta(ge=0)] | None = None
    business_zone: _Text | None = None
    database_identity: _Text | None = None


# The names that the existing deployment uses stand beside ours; the first one that is set counts.
_ENVIRONMENT: Mapping[str, tuple[str, ...]] = {
    "bridge": ("WHATSAPP_DB_PATH",),
    "database_url": ("DATABASE_URL", "NEON_DATABASE_URL"),
    "projects": ("WA_PROJECTS",),
    "since": ("WA_SINCE",),
    "listen": ("WA_LISTEN",),
    "source": ("WA_SOURCE",),
    "scan_interval": ("SCAN_INTERVAL",),
    "lease": ("WA_LEASE",),
    "log_level": ("LOG_LEVEL",),
    "log_numbers": ("LOG_NUMBERS",),
    "log_file": ("LOG_FILE",),
    "auto_repair": ("WA_AUTO_REPAIR",),
    "business_zone": ("WA_BUSINESS_ZONE",),
    "database_identity": ("WA_DATABASE_IDENTITY",),
}

_CREDENTIALS: Mapping[str, str] = {"database_url": "database-url"}
"""Setting to the name of its file in `$CREDENTIALS_DIRECTORY`."""


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """Where PostgreSQL is, with its password; `reveal` is for the driver alone."""

    _url: str = field(repr=False)

    def reveal(self) -> str:
        """Return the URL as it was given."""
        return self._url

    def __str__(self) -> str:
        """Show nothing of it."""
        return "***"


@dataclass(frozen=True, slots=True)
class Since:
    """Where to begin when there is no cursor yet: with what was sent at `instant`, or with everything."""

    instant: datetime | None
    now: bool = False
    """`instant` is the moment of the start, so that what the file holds already need not be read."""


@dataclass(frozen=True, slots=True)
class Listen:
    """An address to serve metrics on."""

    host: str
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the monitor runs with."""

    bridge: Path
    """`messages.db`; the map lies beside it."""
    database_url: DatabaseUrl | None
    projects: Path | None
    since: Since | None = None
    once: bool = False
    listen: Listen | None = None
    source: str = DEFAULT_SOURCE
    """Names the cursor: one for each bridge that writes to the same PostgreSQL."""
    scan_interval_seconds: float = 1.0
    """The pause between two counts of the LIDs that stand; the bridge is looked at far more often."""
    lease_seconds: float = 30.0
    """After this long without a sign of life the cursor row may be taken over by another host."""
    calling_codes: frozenset[int] = frozenset({27})
    extra_separators: bool = False
    store_own_messages: bool = False
    """Whether posts from the bridge's own phone submit drops; off, because its echo looks the same."""
    log_level: LogLevel = "INFO"
    log_full_numbers: bool = False
    log_file: Path | None = None
    """Where the log is written besides stdout."""
    adopt: Path | None = None
    """The old monitor's `state.json`, for a first start."""
    auto_repair_seconds: float = 60.0
    """How long a LID that the map can resolve may stand before it is replaced; 0: until somebody does."""
    business_zone: tzinfo = BUSINESS_ZONE
    """Where the day begins for which a drop counts."""
    database_identity: str | None = None
    """What the database must call itself; it is given that name if it has none."""


def load(
    flags: Values, *, config: Path | None = None, environment: Mapping[str, str] | None = None
) -> Settings:
    """Merge the sources into `Settings`; every fault is a `ConfigError`.

    `environment` defaults to the process's own.
    """
    environment = os.environ if environment is None else environment
    merged = _merge(
        _from_environment(environment),
        _from_credentials(environment),
        Values() if config is None else _from_file(config),
        flags,
    )
    return resolve(merged)


def resolve(values: Values) -> Settings:
    """Turn raw values into settings: paths, instants and addresses, with defaults for what is absent."""
    if values.bridge is None:
        raise ConfigError("no bridge given; set WHATSAPP_DB_PATH or --bridge to messages.db or to its folder")
    given = {
        "source": values.source,
        "once": values.once,
        "scan_interval_seconds": values.scan_interval,
        "lease_seconds": values.lease,
        "extra_separators": values.extra_separators,
        "log_level": values.log_level,
        "auto_repair_seconds": values.auto_repair,
        "database_identity": values.database_identity,
    }
    settings = Settings(
        bridge=_bridge_file(Path(values.bridge)),
        database_url=None if values.database_url is None else DatabaseUrl(values.database_url),
        projects=None if values.projects is None else Path(values.projects),
        since=None if values.since is None else parse_since(values.since),
        listen=None if values.listen is None else parse_listen(values.listen),
        calling_codes=frozenset(values.calling_codes or {27}),
        store_own_messages=values.own_messages == "store",
        log_full_numbers=values.log_numbers == "full",
        log_file=None if values.log_file is None else Path(values.log_file),
        adopt=None if values.adopt is None else Path(values.adopt),
        business_zone=_zone(values.business_zone or _BUSINESS_ZONE_NAME),
    )
    return replace(settings, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]


def parse_since(value: str) -> Since:
    """Read `beginning`, `now`, or an ISO time with an offset."""
    if value == "beginning":
        return Since(None)
    if value == "now":
        return Since(datetime.now().astimezone(), now=True)
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise ConfigError(
            f"--since {value!r} is no time; give 2026-01-31T06:00:00+02:00, `beginning` or `now`"
        ) from None
    if instant.tzinfo is None:
        raise ConfigError(f"--since {value} has no offset; write {instant.isoformat()}+02:00, or Z for UTC")
    if not _FIRST_YEAR <= instant.year <= _LAST_YEAR:
        raise ConfigError(
            f"--since {value} is outside the years {_FIRST_YEAR} to {_LAST_YEAR};"
            " write `beginning` for everything"
        )
    return Since(instant)


def _zone(name: str) -> tzinfo:
    """Find a time zone; the default one is known without the host's help."""
    if name == _BUSINESS_ZONE_NAME:
        return BUSINESS_ZONE
    try:
        return ZoneInfo(name)
    except (OSError, ValueError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise ConfigError(
            f"business_zone {name!r} is no time zone; write one like {_BUSINESS_ZONE_NAME}"
        ) from error
    except KeyError:
        raise ConfigError(
            f"business_zone {name!r} is not known here; write one like {_BUSINESS_ZONE_NAME},"
            " or install the time zone database (tzdata)"
        ) from None


def parse_listen(value: str) -> Listen:
    """Read `HOST:PORT`; without a host it is the loopback interface."""
    host, _, port = value.rpartition(":")
    if not (port.isascii() and port.isdigit() and int(port) <= _MAX_PORT):
        raise ConfigError(f"--listen {value!r} is no address; give HOST:PORT, say 127.0.0.1:9465")
    return Listen(host.strip("[]") or "127.0.0.1", int(port))


def _bridge_file(path: Path) -> Path:
    """Take `messages.db` or the folder that holds it."""
    return path / MESSAGES_DB if path.is_dir() else path


def contradictions(environment: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return pairs of variables for the same setting that are both set and differ; the first one counts.

    `environment` defaults to the process's own.
    """
    given = os.environ if environment is None else environment
    return [
        (first, other)
        for first, *others in _ENVIRONMENT.values()
        for other in others
        if given.get(first) and given.get(other) and given[first] != given[other]
    ]


def _merge(*sources: Values) -> Values:
    """Put the sources on top of each other, the last one uppermost."""
    merged: dict[str, object] = {}
    for source in sources:
        merged |= {key: value for key, value in msgspec.structs.asdict(source).items() if value is not None}
    return msgspec.structs.replace(Values(), **merged)


def _from_environment(environment: Mapping[str, str]) -> Values:
    """Read the variables; an empty one counts as not set, as env files write it."""
    raw: dict[str, str] = {}
    for key, names in _ENVIRONMENT.items():
        name = next((name for name in names if environment.get(name)), None)
        if name is not None:
            raw[key] = environment[name]
    if "log_level" in raw:
        raw["log_level"] = raw["log_level"].upper()
    try:
        return msgspec.convert(raw, Values, strict=False)
    except msgspec.ValidationError as error:
        key, reason = _place_and_reason(error)
        raise ConfigError(f"environment variable {_ENVIRONMENT[key][0]}: {reason}") from None


def _from_credentials(environment: Mapping[str, str]) -> Values:
    """Read what systemd hands over as files; one that is not there or empty counts as not set."""
    raw: dict[str, str] = {}
    folder = environment.get("CREDENTIALS_DIRECTORY")
    for key, name in _CREDENTIALS.items() if folder else ():
        path = Path(folder or "", name)
        try:
            content = path.read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"credential {path}: {error.strerror}; check LoadCredential=") from error
        except UnicodeDecodeError:
            raise ConfigError(f"credential {path}: not UTF-8; write the one line anew") from None
        if content:
            raw[key] = content
    return msgspec.convert(raw, Values)


def _from_file(path: Path) -> Values:
    """Read the TOML file; `scan-interval` and `scan_interval` are the same key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"settings file {path}: {error.strerror}; check --config") from error
    except ValueError as error:
        raise ConfigError(f"settings file {path}: not valid TOML: {_without_newlines(error)}") from None
    written = {key.replace("-", "_"): key for key in document}
    if isinstance(document.get("since"), datetime):
        document["since"] = document["since"].isoformat()  # TOML has times of its own
    try:
        return msgspec.convert({key.replace("-", "_"): value for key, value in document.items()}, Values)
    except msgspec.ValidationError as error:
        key, reason = _place_and_reason(error)
        if not key:
            unknown = sorted(set(written) - set(Values.__struct_fields__))
            names = ", ".join(written[name] for name in unknown)
            raise ConfigError(f"settings file {path}: unknown key {names}; check its spelling") from None
        raise ConfigError(f"settings file {path}: key {written[key]}: {reason}") from None


def _place_and_reason(error: msgspec.ValidationError) -> tuple[str, str]:
    """Split msgspec's finding into the top-level key, empty for the document itself, and the reason."""
    reason, _, place = str(error).partition(" - at `$")
    return place.strip(".`").partition("[")[0], reason[:1].lower() + reason[1:]


def _without_newlines(error: Exception) -> str:
    return " ".join(str(error).split())
