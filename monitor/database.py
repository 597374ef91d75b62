"""The connection to PostgreSQL: opening it, running named statements, and saying what went wrong.

The rule: nothing depends on the session. Production URLs are often transaction poolers, behind which session
locks, LISTEN, SET and server-side prepared statements do not survive; so each statement is either alone or
inside one `transaction()`, and `prepare_threshold=None` keeps the driver from preparing.

Errors of the driver become ours here and nowhere else, by what somebody can do about them: wait
(`StoreUnavailableError`), change the database (`StoreSchemaError`), or look at the value that it refuses
(`StoreRefusedError`). A text of the server is quoted; the URL never is, nor anything that could be a part of
its password.

Rejected: an ORM and a pool. There is one connection, in one thread, and every statement is in `queries.sql`.
"""

import re
import select
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.waiting import Wait

from monitor.errors import ConfigError, StoreRefusedError, StoreSchemaError, StoreUnavailableError
from monitor.settings import DatabaseUrl

# A serverless database needs up to five seconds to wake; the watchdog's default is fifteen.
_CONNECT_TIMEOUT_SECONDS = 10
_KEEPALIVE_SECONDS = 5
_KEEPALIVES = 2
# A host that is gone without a word: the kernel alone would wait for a quarter of an hour.
_ANSWER_MILLISECONDS = 15_000
_NAME = "-- name: "
_MAX_PORT = 65535
# What libpq says of an option before it connects anywhere, by its text: it has no codes for that.
_WRONG_OPTION = re.compile(
    r"connection is bad: (?:invalid (?P<option>[a-z_]+)|definition of service|service file)"
)
_AUTHORITY = re.compile(r"[a-z]+://(?P<authority>[^/?]*)", re.IGNORECASE)
# What the server says about a value, not about itself: a length, a constraint, a trigger's objection.
_REFUSALS = (psycopg.DataError, psycopg.IntegrityError, psycopg.errors.RaiseException)

Parameters = Mapping[str, object]
_NONE: Parameters = {}


def load_queries(path: Path) -> dict[str, bytes]:
    """Read the named statements of a file: `-- name: NAME` begins one, the next such line ends it."""
    queries: dict[str, bytes] = {}
    for block in path.read_text(encoding="utf-8").split(_NAME)[1:]:
        name, _, statement = block.partition("\n")
        queries[name.strip()] = statement.strip().encode()
    return queries


_QUERIES = load_queries(Path(__file__).with_name("queries.sql"))


_Result = TypeVar("_Result")


class Database:
    """One connection. Its methods raise subclasses of `StoreError`."""

    def __init__(self, connection: "_Connection", place: str) -> None:
        self._connection = connection
        self.place = place
        """`host:port/name`, for people: what the log and the status line may show."""

    @classmethod
    def connect(cls, url: DatabaseUrl) -> "Database":
        """Open the connection.

        Raises `ConfigError` for a URL that is none, `StoreUnavailableError` when nobody answers or lets us
        in.
        """
        parameters = _parameters(url)
        named = _names_its_parts(url)
        place = _place(parameters) if named else "the address in DATABASE_URL"
        try:
            connection = _Connection.connect(
                make_conninfo("", **parameters), autocommit=True, prepare_threshold=None
            )
        except psycopg.Error as error:
            _refuse_wrong_option(error)
            reason = _reason(error, parameters) if named else "written without USER:PASSWORD@, so not shown"
            raise StoreUnavailableError(
                f"PostgreSQL at {place} cannot be reached ({reason});"
                " check that it runs and that DATABASE_URL names it"
            ) from None
        return cls(connection, place)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Run the block in one transaction, or in a savepoint of the one that is open."""
        with self._explained(), self._connection.transaction():
            yield

    @contextmanager
    def patient_transaction(self) -> Iterator[None]:
        """Run the block in one transaction that waits for locks and statements, but not for ever.

        A wait that is too long raises `StoreUnavailableError`: it may be tried again.
        """
        with self.transaction():
            self.rows("limit_waits")
            yield

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Run the block in a patient transaction that is rolled back, its deferred constraints checked."""
        with self.patient_transaction():
            yield
            self.run("check_constraints_now")
            raise psycopg.Rollback

    def rows(self, name: str, parameters: Parameters = _NONE) -> list[tuple[Any, ...]]:
        """Run the named statement and return its rows."""
        with self._explained(), self._connection.cursor() as cursor:
            return cursor.execute(_QUERIES[name], _with_arrays(parameters)).fetchall()

    def run(self, name: str, parameters: Parameters = _NONE) -> int:
        """Run the named statement and return how many rows it touched."""
        with self._explained(), self._connection.cursor() as cursor:
            return cursor.execute(_QUERIES[name], _with_arrays(parameters)).rowcount

    def rows_of_each(self, name: str, parameters: Sequence[Parameters]) -> list[tuple[Any, ...] | None]:
        """Run the named statement once for each item, in order, in one round trip; return each first row."""
        if not parameters:
            return []
        with self._explained(), self._connection.cursor() as cursor:
            cursor.executemany(_QUERIES[name], [_with_arrays(one) for one in parameters], returning=True)
            return [result.fetchone() for result in cursor.results()]

    @contextmanager
    def meanwhile(self, work: Callable[[], bool]) -> Iterator[None]:
        """Have other work done in the block whenever the server works: by us, there is no second thread.

        `work` does a little of it, a millisecond or a few, and returns whether there is more; it raises
        nothing and does not use this database.
        """
        self._connection.work = work
        try:
            yield
        finally:
            self._connection.work = None

    def script(self, text: bytes) -> None:
        """Run a migration: several statements, without parameters."""
        with self._explained():
            self._connection.execute(text)

    def close(self) -> None:
        """Close the connection; a transaction that is open is rolled back by the server."""
        self._connection.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn the driver's errors into ours."""
        try:
            yield
        except psycopg.errors.NotNullViolation as error:
            # We leave no column empty that we know may not be, so the column is somebody's new one.
            raise StoreSchemaError(
                f"table {error.diag.table_name} in {self.place} demands a value in its column"
                f" {error.diag.column_name}, which the monitor does not write; give the column a default"
            ) from error
        except _REFUSALS as error:
            raise StoreRefusedError(_reason_of(error)) from error
        except NotImplementedError as error:  # the driver's, which reads times in ISO style alone
            raise StoreSchemaError(
                f"database {self.place} writes times in a style that cannot be read;"
                " set its DateStyle to ISO, for the database or for the user"
            ) from error
        except psycopg.ProgrammingError as error:
            raise StoreSchemaError(
                f"database {self.place} refuses a statement ({_first_line(error)});"
                " its tables or rights differ from what the monitor needs"
            ) from error
        except psycopg.Error as error:
            raise StoreUnavailableError(
                f"PostgreSQL at {self.place} failed ({_first_line(error)});"
                " nothing was written, it is tried again"
            ) from error


class _Connection(psycopg.Connection[tuple[Any, ...]]):
    """A connection on which waiting for the server leaves time for something else."""

    work: Callable[[], bool] | None = None

    def wait(self, gen: Generator[Any, Any, _Result], *args: Any, **options: Any) -> _Result:  # noqa: ANN401 -- the driver's
        """Consume a generator of the driver, which yields what it waits for."""
        if self.work is not None:
            gen = self._between(gen, self.work)
        return super().wait(gen, *args, **options)

    def _between(
        self, gen: Generator[Any, Any, _Result], work: Callable[[], bool]
    ) -> Generator[Any, Any, _Result]:
        """Yield what `gen` yields, and work before that for as long as the server has nothing for us."""
        poll = select.poll()
        try:
            awaited = next(gen)
            while True:
                wanted = (select.POLLIN if awaited & Wait.R else 0) | (
                    select.POLLOUT if awaited & Wait.W else 0
                )
                poll.register(self.fileno(), wanted)
                while not poll.poll(0) and work():
                    pass
                awaited = gen.send((yield awaited))
        except StopIteration as end:
            result: _Result = end.value
            return result


def connect(url: DatabaseUrl | None) -> Database:
    """Open the connection that the settings name; without a URL, say what can be done."""
    if url is None:
        raise ConfigError(
            "no database given; set DATABASE_URL or --database-url,"
            " or use `wa-monitor run` or `wa-monitor demo`, which start an embedded PostgreSQL"
        )
    return Database.connect(url)


def _with_arrays(parameters: Parameters) -> dict[str, object]:
    """Write lists as PostgreSQL's array literals, which the statements cast.

    The driver's own way looks at each element several times, and took a third of the time of a batch.
    """
    if parameters is None:
        return None
    return {name: array(value) if isinstance(value, list) else value for name, value in parameters.items()}


def array(values: list[Any]) -> str:
    """Return a list as PostgreSQL's array literal, which the statements cast."""
    try:
        joined = "\0".join(values)
    except TypeError:  # not all of them are texts
        if set(map(type, values)) == {datetime}:
            return '{"' + '","'.join(map(str, values)) + '"}'
        return "{" + ",".join(map(_element, values)) + "}"
    if joined.count("\0") != len(values) - 1:  # none, or one that PostgreSQL is to refuse
        return "{" + ",".join(map(_element, values)) + "}"
    return '{"' + _escaped(joined).replace("\0", '","') + '"}'


def arrays_joined(literals: Sequence[str]) -> str:
    """Return one array literal of the elements of several."""
    return "{" + ",".join([literal[1:-1] for literal in literals]) + "}"


def _element(value: object) -> str:
    if isinstance(value, str):
        return f'"{_escaped(value)}"'
    if value is None:
        return "NULL"
    return f'"{value}"'  # dates and times as ISO texts, numbers


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"")


def _reason_of(error: psycopg.Error) -> str:
    """Return the driver's reason in one line, without the values that it quotes in its detail."""
    return error.diag.message_primary or _first_line(error)


def _parameters(url: DatabaseUrl) -> dict[str, Any]:
    """Split the URL, or refuse it without quoting any of it."""
    try:
        parameters = dict(conninfo_to_dict(url.reveal()))
    except psycopg.Error:
        raise ConfigError(
            "DATABASE_URL is not a PostgreSQL URL; write postgresql://USER:PASSWORD@HOST:PORT/NAME, special"
            " characters in it percent-encoded"
        ) from None
    if any("@" in str(parameters.get(key, "")) for key in ("host", "port", "dbname")):
        # An unescaped @ or / in the password: parts of it would pass for host, port or name in every error
        # text.
        raise ConfigError("DATABASE_URL is ambiguous; percent-encode @ : / ? # in its password (%40 for @)")
    if not all(_is_port(port) for port in str(parameters.get("port") or "5432").split(",")):
        raise ConfigError(
            "DATABASE_URL has a port that is no number from 1 to 65535 (not shown, it may be a password);"
            " write postgresql://USER:PASSWORD@HOST:PORT/NAME"
        )
    parameters.setdefault("connect_timeout", _CONNECT_TIMEOUT_SECONDS)
    parameters.setdefault("application_name", "wa-monitor")
    parameters.setdefault("keepalives_idle", _KEEPALIVE_SECONDS)
    parameters.setdefault("keepalives_interval", _KEEPALIVE_SECONDS)
    parameters.setdefault("keepalives_count", _KEEPALIVES)
    parameters.setdefault("tcp_user_timeout", _ANSWER_MILLISECONDS)
    parameters["client_encoding"] = "utf8"
    return parameters


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and 0 < int(text) <= _MAX_PORT


def _names_its_parts(url: DatabaseUrl) -> bool:
    """Tell whether host, port and name can be what they seem.

    In a URL with an authority and no `@` in it, user and password may have taken their places.
    """
    found = _AUTHORITY.match(url.reveal().strip())
    return found is None or not found["authority"] or "@" in found["authority"]


def _refuse_wrong_option(error: psycopg.Error) -> None:
    """Raise `ConfigError` for an option that no server was even asked about; its value is not quoted."""
    found = _WRONG_OPTION.match(_first_line(error))
    if found is None and not isinstance(error, psycopg.ProgrammingError):
        return
    option = "service" if found is None else (found["option"] or "service")
    if isinstance(error, psycopg.ProgrammingError):
        option = "connect_timeout"
    raise ConfigError(
        f"DATABASE_URL has an option with a wrong value: {option}; correct or remove it"
    ) from None


def _place(parameters: Mapping[str, Any]) -> str:
    host = parameters.get("host") or parameters.get("hostaddr") or "local socket"
    return (
        f"{host}:{parameters.get('port') or 5432}/{parameters.get('dbname') or parameters.get('user') or ''}"
    )


def _reason(error: psycopg.Error, parameters: Mapping[str, Any]) -> str:
    """Return why the connection failed; libpq does not print passwords, and this makes sure of it."""
    text = _first_line(error)
    password = parameters.get("password")
    return text.replace(str(password), "***") if password else text


def _first_line(error: psycopg.Error) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]
