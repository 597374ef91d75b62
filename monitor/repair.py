"""Repair: LIDs that stand where a phone belongs are replaced by the phone that the map gives for them.

The rule: a row is chosen by its value being in the map's `lid` column, now or earlier, never by its length,
so that a foreign phone of twelve digits is safe. The two sender columns are all that changes, in rows that
the batch has locked (not even `updated_at`: nobody edited the review), and what stood there before is kept
under the run's id. One transaction for each batch: an interrupted run has repaired whole batches, and the
next run does the rest.

Nothing is guessed. What looks like a LID and is not in the map is listed, for a person.

Rejected: repairing through the relay's own resolver. The value in question went through it once already.
"""

import secrets
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from monitor.census import Doubtful, doubtful_rows, lids_of
from monitor.database import Database
from monitor.identity import Known
from monitor.judgement import user_part

_BATCH_ROWS = 500


@dataclass(frozen=True, slots=True)
class Repaired:
    """One row: what stood in it, and what stands in it now (or would, in a dry run)."""

    review_id: str
    drop_number: str
    project: str
    old_submitted_by: str | None
    new_submitted_by: str | None
    old_user_name: str | None
    new_user_name: str | None


@dataclass
class Report:
    """What a run did."""

    run_id: str
    dry_run: bool
    repaired: Counter[str] = field(default_factory=Counter)
    """Rows by project."""
    unresolved: list[Doubtful] = field(default_factory=list)


def repair(database: Database, known: Known, *, dry_run: bool) -> Report:
    """Replace every LID that the map can resolve; with `dry_run` only say what would be replaced."""
    report = Report(_new_run_id(), dry_run)
    phones = {lid: phone for lid, phone in lids_of(database, known).items() if phone is not None}
    for batch in _batches(database, phones, report):
        report.repaired.update(row.project for row in batch)
    report.unresolved = doubtful_rows(database, known)
    return report


def _batches(database: Database, phones: Mapping[str, str], report: Report) -> Iterator[list[Repaired]]:
    """Yield the rows of each batch once they are repaired and committed."""
    after = ""
    statement = "lid_rows_to_show" if report.dry_run else "lid_rows_to_repair"
    while True:
        with database.transaction():
            rows = database.rows(statement, {"lids": list(phones), "after": after, "limit": _BATCH_ROWS})
            if not rows:
                return
            found = [_repaired(row, phones) for row in rows]
            if not report.dry_run:
                for row in found:
                    _apply(database, row, report.run_id)
        yield found
        after = rows[-1][0]


def _repaired(row: Sequence[Any], phones: Mapping[str, str]) -> Repaired:
    """Say what is to become of a row as the statements return it."""
    review_id, drop_number, project, submitted_by, user_name = row
    return Repaired(
        review_id=review_id,
        drop_number=drop_number,
        project=project,
        old_submitted_by=submitted_by,
        new_submitted_by=_resolved(submitted_by, phones),
        old_user_name=user_name,
        new_user_name=_resolved(user_name, phones),
    )


def _resolved(value: str | None, phones: Mapping[str, str]) -> str | None:
    """Return the phone for a LID, with or without an address around it; any other value as it is."""
    return None if value is None else phones.get(user_part(value), value)


def _apply(database: Database, row: Repaired, run_id: str) -> None:
    """Change one row, which the batch has locked, and keep its old values."""
    parameters = {"run_id": run_id, **asdict(row)}
    database.run("repair_review", parameters)
    database.run("record_repair", parameters)


def _new_run_id() -> str:
    """Return an id that sorts by time and that two runs never share."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
