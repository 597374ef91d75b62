"""A trial write, rolled back: does this database take what this code writes?

The rule: before a process says that it is ready, every statement that stores a drop has run once against the
real tables and left no trace. A column that was renamed, a right that was taken away, a trigger or a
constraint that objects to any row: a new generation finds out while the old one still serves. The outage
of 21 hours began with a writer whose every insert failed, and which ran.

The trial drop has a number and a day that no real one has, so it waits for no other writer's row. Deferred
constraints are checked before the end. Sequences may leave a gap; nothing else is seen by anybody.

Rejected: comparing the schema alone (`schema.check_reviews` does that first, for a better sentence), which
knows nothing of rights, triggers and row security.
"""

from datetime import UTC, date, datetime

from monitor.database import Database
from monitor.errors import StoreRefusedError, StoreSchemaError
from monitor.judgement import PENDING_NAME

_SOURCE = "canary"
_NUMBER = "DR00000000"
_DAY = date(2000, 1, 1)
_SENT_AT = datetime(2000, 1, 1, tzinfo=UTC)


def try_write(database: Database, project: str) -> None:
    """Write a drop of `project`, resubmit it, complete its sender, and take all of it back.

    Raises `StoreSchemaError` when the database refuses any of it.
    """
    try:
        with database.trial():
            _write(database, project)
    except StoreRefusedError as error:
        raise StoreSchemaError(
            f"database {database.place} refuses a trial row ({error});"
            " a constraint or a trigger of qa_photo_reviews has changed"
        ) from error


def _write(database: Database, project: str) -> None:
    new = {
        "numbers": [_NUMBER],
        "user_names": [PENDING_NAME],
        "submitted_bys": [None],
        "projects": [project],
        "sent_ats": [_SENT_AT],
        "days": [_DAY],
        "comments": ["trial of the monitor, rolled back"],
    }
    database.rows("standing_drops", new)
    ((*_, review_id, _, _),) = database.rows("insert_reviews", new)
    code = {"source": _SOURCE, "tree": "", "generation": ""}
    ids = {"chat_jids": [_SOURCE], "keys": [_SOURCE], **code}
    event = {
        **ids,
        "numbers": [_NUMBER],
        "projects": [project],
        "senders": [""],
        "lids": [None],
        "review_ids": [review_id],
    }
    database.run(
        "insert_events",
        {
            **event,
            "spaces": [""],
            "kinds": ["new"],
            "stored_as": ["pending"],
            "phones": [None],
            "reasons": [""],
            "sent_ats": [_SENT_AT],
            "confidences": [None],
        },
    )
    database.run("insert_pending", {**event, "standings": [None]})
    entry = {**ids, "hashes": [""], "outcomes": ["drops"], "projects": [project], "sent_ats": [_SENT_AT]}
    database.run("insert_messages", entry)
    database.run("record_messages", entry)
    database.run("record_dead_letters", {**ids, "projects": [project], "reasons": [""]})
    phone = {"submitted_by": "27711234567", "user_name": "27711234567", "lid": None}
    database.rows_of_each(
        "resubmit_review", [{"number": _NUMBER, "projects": [project], "note": "again", **phone}]
    )
