"""What the database must hold before anything is written: our own schema and the dashboard's table.

The rule: our tables are ours to create and to migrate, forward only and each step once; `qa_photo_reviews`
belongs to another application and is created only where it does not exist, never altered. If it lacks a
column that the monitor uses, or has one of another kind, or demands what the monitor does not write, that is
said in one sentence and the monitor does not become ready: a writer that starts anyway loses every drop (an
outage of 21 hours began that way).

A database that a newer version has migrated further is accepted: going back to the last good code must work,
so migrations only add.
"""

from collections.abc import Mapping
from pathlib import Path

from monitor.database import Database
from monitor.errors import StoreSchemaError

_MIGRATIONS = Path(__file__).with_name("migrations")
_REVIEWS = ("public", "qa_photo_reviews")
_OURS = ("wa_monitor", "migration")

_TEXT = frozenset({"text", "character varying"})
_FLAG = frozenset({"boolean"})
_INSTANT = frozenset({"timestamp with time zone"})
_SOME_TIME = _INSTANT | {"timestamp without time zone"}
_DAY = _SOME_TIME | {"date"}

# Column -> the types that are known to work. Installations differ in the kinds of their dates; what must not
# differ is that the message's own time keeps its zone.
_NEEDED: Mapping[str, frozenset[str] | None] = {
    "id": None,
    "drop_number": _TEXT,
    "user_name": _TEXT,
    "submitted_by": _TEXT,
    "project": _TEXT,
    "whatsapp_message_date": _INSTANT,
    "review_date": _DAY,
    "comment": _TEXT,
    "incomplete": _FLAG,
    "feedback_sent": _SOME_TIME,
    "resubmitted": _FLAG,
    "created_at": _SOME_TIME,
    "updated_at": _SOME_TIME,
}

# Columns that every new row fills; any other one must be nullable or have a default. `submitted_by` is not
# among them: it is empty as long as the sender has no phone.
_FILLED = frozenset(
    {"drop_number", "user_name", "project", "whatsapp_message_date", "review_date", "comment"}
)
# Characters that the longest value needs: DR and eight digits, an identity of twenty digits, our own note.
_WIDTHS = {"drop_number": 10, "user_name": 20, "submitted_by": 20, "comment": 60}


def prepare(database: Database) -> None:
    """Migrate our schema, create the dashboard's table where there is none, and check it.

    Raises `StoreSchemaError` with every column that is missing or of another kind.
    """
    if not _is_current(database):
        _migrate(database)
    check_reviews(database)


def require(database: Database) -> None:
    """Check, changing nothing, that a monitor of this version has run on this database."""
    if not _exists(database, *_OURS) or database.rows("migrated_version")[0][0] < max(_numbered()):
        raise StoreSchemaError(
            f"database {database.place} has no tables of the monitor, or those of an older version;"
            " check that DATABASE_URL names the right one, or start the monitor on it first"
        )


def check_identity(database: Database, wanted: str) -> None:
    """Check that the database calls itself `wanted`; one without a name gets it.

    Raises `StoreSchemaError` for another name: a copy, or production where tests were meant.
    """
    database.run("name_installation", {"identity": wanted})
    ((found,),) = database.rows("installation")
    if found != wanted:
        raise StoreSchemaError(
            f"database {database.place} calls itself {found!r} and the settings want {wanted!r};"
            " correct DATABASE_URL or WA_DATABASE_IDENTITY"
        )


def check_reviews(database: Database) -> None:
    """Check that `qa_photo_reviews` has what the monitor reads and writes."""
    columns = database.rows("review_columns")
    if not columns:
        raise StoreSchemaError(
            f"database {database.place} has no table qa_photo_reviews that this user may see;"
            " check that DATABASE_URL names the right database"
        )
    present: dict[str, str] = {name: kind for name, kind, _, _ in columns}
    missing = [column for column in _NEEDED if column not in present]
    wrong = [
        f"{column} is {present[column]}"
        for column, types in _NEEDED.items()
        if types is not None and column in present and present[column] not in types
    ]
    wrong += [
        f"{name} holds only {width} characters"
        for name, _, width, _ in columns
        if width is not None and width < _WIDTHS.get(name, 0)
    ]
    wrong += [
        f"{name} is NOT NULL without a default"
        for name, *_, demanded in columns
        if demanded and name not in _FILLED
    ]
    if missing or wrong:
        faults = ([f"no column {', '.join(missing)}"] if missing else []) + wrong
        raise StoreSchemaError(
            f"table qa_photo_reviews in {database.place} does not fit ({'; '.join(faults)});"
            " check that DATABASE_URL names the right database, or change the table"
        )


def _is_current(database: Database) -> bool:
    if not _exists(database, *_OURS) or not _exists(database, *_REVIEWS):
        return False
    return bool(database.rows("migrated_version")[0][0] >= max(_numbered()))


def _migrate(database: Database) -> None:
    """Apply what is missing, all or nothing; a second monitor that starts at once waits and finds it done."""
    with database.transaction():
        database.rows("lock_migrations")
        known = _exists(database, *_OURS)
        applied = database.rows("migrated_version")[0][0] if known else 0
        for version, path in sorted(_numbered().items()):
            if version > applied:
                database.script(path.read_bytes())
                database.run("record_migration", {"version": version})
        if not _exists(database, *_REVIEWS):
            database.script((_MIGRATIONS / "qa_photo_reviews.sql").read_bytes())


def _exists(database: Database, schema: str, table: str) -> bool:
    return bool(database.rows("table_exists", {"schema": schema, "table": table})[0][0])


def _numbered() -> dict[int, Path]:
    return {int(path.name[:4]): path for path in _MIGRATIONS.glob("[0-9][0-9][0-9][0-9]_*.sql")}
