"""What stands in the table now, counted: LIDs, pending senders, repaired rows, doubtful values.

The rule: it only reads, it needs no claim on the cursor, and it counts what is there, whoever wrote it. A
value is certainly a LID if the map lists it as one and not as a phone too, or if its address says so. A
value that cannot be a phone and that the map does not have is doubtful: shown to a person, not counted as a
LID.
"""

from dataclasses import dataclass

from monitor.database import Database
from monitor.identity import Known, parse_jid
from monitor.judgement import judge


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A row whose sender looks like a LID that the map does not have."""

    drop_number: str
    project: str
    value: str


def lids_of(known: Known) -> list[str]:
    """Return what is certainly a LID: listed as one, and not as a phone as well."""
    return [lid for lid in known.phone_of if lid not in known.lid_of]


def lid_rows(database: Database, known: Known) -> dict[str, int]:
    """Return how many rows hold a LID now, by project (empty for rows without one)."""
    with database.patient_transaction():
        return dict(database.rows("count_lid_rows", {"lids": lids_of(known)}))


def pending_drops(database: Database, source: str) -> int:
    """Return how many drops of a source wait for their sender."""
    return int(database.rows("count_pending", {"source": source})[0][0])


def repaired_rows(database: Database) -> int:
    """Return how many rows were ever repaired."""
    return int(database.rows("count_repaired")[0][0])


def doubtful_rows(database: Database, known: Known) -> list[Doubtful]:
    """List rows whose sender cannot be a phone and cannot be looked up."""
    return [
        Doubtful(drop_number, project, value)
        for drop_number, project, value in database.rows("doubtful_rows")
        if parse_jid(value).user not in known.phone_of
        and judge(value, None, lids=known.phone_of, phones=known.lid_of) in {"lid", "unknown"}
    ]
