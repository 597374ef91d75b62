"""Errors of the monitor: one base, and one class for each thing that somebody has to do something about.

The rule: an error's text is one sentence that says what is wrong, where, and what to do. It never holds a
password, because it ends up on stderr, in the log, in the status line and in a metric's label.

Whether to retry is a property of the class, not of the call site: the relay keeps trying while `retry` is
true and the service is up, a command line ends with `exit_code`. Rejected: error codes in one big enum,
which says no more than a class and cannot be caught by kind.
"""

from typing import ClassVar, Literal, get_args

Component = Literal["settings", "bridge", "map", "database", "table", "cursor"]
COMPONENTS: tuple[Component, ...] = get_args(Component)


class MonitorError(Exception):
    """Base of everything the monitor raises on purpose; its text is meant for a person.

    `label` is the value of the label `error` in `wa_monitor_store_errors_total`, `exit_code` what a command
    ends with, `retry` says that the cause can go away without a change of code or settings, and `component`
    which part of the way from the bridge to the table is broken.
    """

    label: ClassVar[str] = "internal"
    component: ClassVar[Component] = "settings"
    exit_code: ClassVar[int] = 1
    retry: ClassVar[bool] = False


class ConfigError(MonitorError):
    """A flag, an environment variable or a file says something that cannot be meant; nothing was started."""

    label = "config"
    exit_code = 2


class BridgeError(MonitorError):
    """The bridge's files cannot be read now; the cursor stays where it is and the next scan tries again."""

    label = "bridge"
    component: ClassVar[Component] = "bridge"
    retry = True


class BridgeMissingError(BridgeError):
    """There is no file where the bridge's database should be, or it may not be read. It was not created."""

    label = "bridge_missing"


class BridgeFormatError(BridgeError):
    """The file is there and is no SQLite database, or is a damaged one."""

    label = "bridge_format"


class BridgeSchemaError(BridgeError):
    """The database lacks a table or a column that the monitor reads."""

    label = "bridge_schema"


class BridgeBusyError(BridgeError):
    """The bridge held its lock for longer than the busy timeout."""

    label = "bridge_busy"


class MapUnavailableError(BridgeError):
    """The LID map cannot be read: nobody's identity can be judged, so nothing is read until it can."""

    label = "bridge_map"
    component: ClassVar[Component] = "map"


class StoreError(MonitorError):
    """PostgreSQL did not do what was asked; the transaction was rolled back and the cursor has not moved."""

    label = "store"
    component: ClassVar[Component] = "database"


class StoreUnavailableError(StoreError):
    """PostgreSQL does not answer, refuses the login, or broke the connection; it is tried again."""

    label = "store_unavailable"
    retry = True


class StoreSchemaError(StoreError):
    """The database lacks a table, a column, a type or a right; somebody has to change it."""

    label = "store_schema"
    component: ClassVar[Component] = "table"


class StoreRefusedError(StoreError):
    """PostgreSQL refuses a value for what it is (a constraint, a length); only its message is affected."""

    label = "store_refused"
    component: ClassVar[Component] = "table"


class CursorLostError(StoreError):
    """Another writer holds the cursor row now. This one has written nothing and goes back to standby."""

    label = "cursor_lost"
    component: ClassVar[Component] = "cursor"
    retry = True


def error_labels(*bases: type[MonitorError]) -> tuple[str, ...]:
    """Return the labels of these errors and of all that derive from them, each once."""
    found: dict[str, None] = {}
    for base in bases:
        found[base.label] = None
        found |= dict.fromkeys(error_labels(*base.__subclasses__()))
    return tuple(found)
