"""What stands in the table now, counted: LIDs, foreign rows, pending senders, repairs, doubtful values.

The rule: it only reads (an operator's adoption apart), it needs no claim on the cursor, and it counts what is
there, whoever wrote it. A value is certainly a LID if the map lists it (or ever listed it) as one and not as
a phone too, if its address says so, if we stored it and it was judged one then, or if a drop of its sender
waits for a phone. Any other value that cannot be a phone and that the map does not have is doubtful: somebody
else's, shown to a person, not counted as a LID.
"""

from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg.types.json import Jsonb

from monitor.database import Database
from monitor.identity import Known
from monitor.judgement import judge, user_part


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A row whose sender looks like a LID that the map does not have."""

    drop_number: str
    project: str
    value: str


def lids_of(database: Database, known: Known) -> dict[str, str | None]:
    """Return what is certainly a LID: listed or judged as one, now or ever, and not listed as a phone.

    With each its phone; None for one that the map never had, or has forgotten and that had several. The
    bridge's map is a snapshot: who gets a new LID loses the old one there, and the rows that hold it are no
    less wrong.
    """
    # A dry run may look at a database on which no monitor has run.
    exists = {"schema": "wa_monitor", "table": "lid_seen"}
    has_run = database.rows("table_exists", exists)[0][0]
    unlisted = [lid for (lid,) in database.rows("unlisted_lids")] if has_run else []
    seen = dict(database.rows("mappings_seen")) if has_run else {}
    listed = {**dict.fromkeys(unlisted), **dict.fromkeys(known.lids), **seen, **known.phone_of}
    return {lid: phone for lid, phone in listed.items() if lid not in known.lid_of}


def lid_rows(database: Database, known: Known) -> dict[str, int]:
    """Return how many rows hold a LID now, by project (empty for rows without one)."""
    with database.patient_transaction():
        return dict(database.rows("count_lid_rows", {"lids": list(lids_of(database, known))}))


def foreign_rows(database: Database) -> dict[str, int]:
    """Return how many rows another writer put there, by project (empty for rows without one)."""
    with database.patient_transaction():
        return dict(database.rows("count_foreign_rows"))


def adopt_rows(database: Database, source: str) -> int:
    """Take rows of other writers as they are, on an operator's word; return how many."""
    return int(database.rows("adopt_rows", {"source": source, "positions": Jsonb({})})[0][0])


def pending_drops(database: Database, source: str) -> int:
    """Return how many drops of a source wait for their sender."""
    return int(database.rows("count_pending", {"source": source})[0][0])


def usual_messages(database: Database, source: str) -> float:
    """Return how many messages the present hour of the week had on average in the last four weeks."""
    with database.patient_transaction():
        (row,) = database.rows("usual_messages", {"source": source, "now": datetime.now(UTC)})
    return float(row[0])


def repaired_rows(database: Database) -> int:
    """Return how many rows were ever repaired."""
    return int(database.rows("count_repaired")[0][0])


def doubtful_rows(database: Database, known: Known) -> list[Doubtful]:
    """List rows whose sender cannot be a phone and cannot be looked up."""
    resolvable = {lid for lid, phone in lids_of(database, known).items() if phone is not None}
    return [
        Doubtful(drop_number, project, value)
        for drop_number, project, value in database.rows("doubtful_rows")
        if user_part(value) not in resolvable
        and judge(value, None, lids=known.lids, phones=known.lid_of) in {"lid", "unknown"}
    ]
