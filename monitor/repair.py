"""Repair: LIDs that stand where a phone belongs are replaced by the phone that the map gives for them.

The rule: a row is chosen by its value being in the map's `lid` column, now or earlier, never by its length,
so that a foreign phone of twelve digits is safe. The two sender columns are all that changes, in rows that
the batch has locked (not even `updated_at`: nobody edited the review), and what stood there before is kept
under the run's id. One transaction for each batch: an interrupted run has repaired whole batches, and the
next run does the rest.

`undo` puts the old values of a run back, in one transaction, where its new values still stand and nobody has
written the same ones again since. What somebody has changed since is his. What was put back stays so for the
automatic repair; an operator's run repairs it.

An operator's run also cuts the full address of a phone (another writer stored those) to its digits.

Nothing is guessed. What looks like a LID and is not in the map is listed, for a person; and so is a row that
the database does not let be changed, which keeps no other from being repaired.

Rejected: repairing through the relay's own resolver. The value in question went through it once already.
"""

import re
import secrets
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from monitor.census import Doubtful, doubtful_rows, lids_of
from monitor.database import Database
from monitor.errors import ConfigError, StoreRefusedError
from monitor.identity import Known
from monitor.judgement import user_part

_BATCH_ROWS = 10_000
_ROWS_AT_ONCE = 5000
"""By a monitor that has messages to store: a quarter of a second."""
_PHONE_ADDRESS = re.compile(
    r"\s*\+?[1-9][0-9]{5,14}(?:\.[0-9]+)?(?::[0-9]+)?@(?:s\.whatsapp\.net|c\.us|hosted)\s*",
    re.ASCII | re.IGNORECASE,
)

Progress = Callable[[int, int], None]
"""Told after each batch how many rows were done, and of how many."""


class Repaired(NamedTuple):
    """One row: what stood in it, and what stands in it now (or would, in a dry run)."""

    review_id: str
    drop_number: str
    project: str
    old_submitted_by: str | None
    new_submitted_by: str | None
    old_user_name: str | None
    new_user_name: str | None
    place: str = ""
    """Where the row is in the table while it is locked."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A row that the database does not let be repaired, and why."""

    drop_number: str
    project: str
    reason: str


@dataclass
class Report:
    """What a run did."""

    run_id: str
    dry_run: bool
    repaired: Counter[str] = field(default_factory=Counter)
    """Rows by project."""
    refused: list[Refused] = field(default_factory=list)
    unresolved: list[Doubtful] = field(default_factory=list)


@dataclass(frozen=True)
class Undone:
    """What an undo did."""

    restored: Counter[str]
    """Rows by project."""
    left: Sequence[tuple[str, str]]
    """Drop and project of the rows that were changed since, or are gone."""


def repair(
    database: Database,
    known: Known,
    *,
    dry_run: bool = False,
    since: datetime | None = None,
    progress: Progress = lambda _done, _total: None,
) -> Report:
    """Replace every LID that the map can resolve; with `dry_run` only say what would be replaced.

    With `since` only in rows of messages that were sent from then on. Raises `StoreError`.
    """
    report = Report(_new_run_id(), dry_run)
    resolve = _Resolver.of(database, known, addresses=True)
    found = _find(database, resolve, since)
    done = 0
    for batch in [_repaired(found, resolve)] if dry_run else _batches(database, found, resolve, report):
        report.repaired.update(row.project for row in batch)
        done += len(batch)
        progress(done, len(found))
    report.unresolved = doubtful_rows(database, known)
    return report


def repair_some(database: Database, known: Known) -> Report:
    """Do one batch, for a monitor that has other work; what an operator has put back is left."""
    report = Report(_new_run_id(), dry_run=False)
    resolve = _Resolver.of(database, known, addresses=False)
    with database.patient_transaction():
        put_back = set(database.rows("rows_put_back"))
        found = [row for row in _find(database, resolve) if (row[0], row[3], row[4]) not in put_back]
    # A row that a reviewer has locked is waited for within bounds: the messages must not wait for him.
    with database.patient_transaction():
        for batch in _batches(database, found[:_ROWS_AT_ONCE], resolve, report):
            report.repaired.update(row.project for row in batch)
    return report


def undo(database: Database, run_id: str) -> Undone:
    """Put back what a run has replaced; raises `ConfigError` for a run that is not known."""
    run = {"run_id": run_id}
    if not database.rows("repairs_of_run", run)[0][0]:
        latest = ", ".join(found for (found,) in database.rows("repair_runs")) or "none"
        raise ConfigError(f"no repair run {run_id!r} in {database.place}; the latest are: {latest}")
    with database.transaction():
        restored = Counter(project for (project,) in database.rows("undo_repairs", run))
        left = [(number, project) for number, project in database.rows("repairs_not_undone", run)]
    return Undone(restored, left)


@dataclass(frozen=True)
class _Resolver:
    """What is to stand in a column instead of what stands there."""

    phones: Mapping[str, str]
    """LID -> phone, as far as there is exactly one that is no LID itself."""
    lids: Container[str]
    addresses: bool
    """Whether the full address of a phone is cut to its digits."""

    @classmethod
    def of(cls, database: Database, known: Known, *, addresses: bool) -> "_Resolver":
        lids = lids_of(database, known)
        phones = {lid: phone for lid, phone in lids.items() if phone is not None and phone not in lids}
        return cls(phones, lids, addresses)

    def __call__(self, value: str | None) -> str | None:
        """Return the phone for a LID, with or without an address around it; any other value as it is."""
        if value is None:
            return None
        user = user_part(value)
        if self.addresses and user not in self.lids and _PHONE_ADDRESS.fullmatch(value):
            return user
        return self.phones.get(user, value)


def _find(database: Database, resolve: _Resolver, since: datetime | None = None) -> list[tuple[Any, ...]]:
    asked = {"lids": list(resolve.phones), "addresses": resolve.addresses, "since": since}
    return database.rows("lid_rows", asked)


def _batches(
    database: Database, found: Sequence[Sequence[Any]], resolve: _Resolver, report: Report
) -> Iterator[list[Repaired]]:
    """Yield the rows of each batch once they are repaired and committed."""
    for first in range(0, len(found), _BATCH_ROWS):
        yield from _halved(database, found[first : first + _BATCH_ROWS], resolve, report)


def _halved(
    database: Database, part: Sequence[Sequence[Any]], resolve: _Resolver, report: Report
) -> Iterator[list[Repaired]]:
    """Repair these rows in one transaction, or each half by itself, until what is refused is alone."""
    try:
        with database.transaction():
            asked = {"review_ids": [row[0] for row in part], "numbers": [row[1] for row in part]}
            batch = _repaired(database.rows("lock_rows", asked), resolve)
            _apply(database, batch, report.run_id)
    except StoreRefusedError as error:
        if len(part) == 1:
            report.refused.append(Refused(part[0][1], part[0][2], str(error)))
            return
        middle = len(part) // 2
        for half in (part[:middle], part[middle:]):
            yield from _halved(database, half, resolve, report)
    else:
        yield batch


def _repaired(rows: Sequence[Sequence[Any]], resolve: _Resolver) -> list[Repaired]:
    """Say what is to become of rows as the statements return them; those that hold what they should stay."""
    all_rows = [
        Repaired(
            review_id,
            number,
            project,
            submitted_by,
            resolve(submitted_by),
            user_name,
            resolve(user_name),
            *place,
        )
        for review_id, number, project, submitted_by, user_name, *place in rows
    ]
    return [
        row
        for row in all_rows
        if (row.old_submitted_by, row.old_user_name) != (row.new_submitted_by, row.new_user_name)
    ]


def _apply(database: Database, batch: Sequence[Repaired], run_id: str) -> None:
    """Change rows which the batch has locked, and keep their old values."""
    parameters = {
        "run_id": run_id,
        "places": [row.place for row in batch],
        "review_ids": [row.review_id for row in batch],
        "numbers": [row.drop_number for row in batch],
        "projects": [row.project for row in batch],
        "old_submitted_bys": [row.old_submitted_by for row in batch],
        "new_submitted_bys": [row.new_submitted_by for row in batch],
        "old_user_names": [row.old_user_name for row in batch],
        "new_user_names": [row.new_user_name for row in batch],
    }
    database.run("repair_reviews", parameters)
    database.run("record_repairs", parameters)


def _new_run_id() -> str:
    """Return an id that sorts by time and that two runs never share."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
