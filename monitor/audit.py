"""Audit: is there a LID in the table now, which code put it there, and what else is not as it should be?

The rule: the audit reads the table and the map and trusts nobody's memory. It shares `judgement` with the
store and nothing with `identity`, so it finds what a faulty resolver has stored. Each LID is shown with the
digest of the code that stored it, from the events: after a fault one wants to know which version it was, and
since when.

A LID that stands is a failure (exit status 1), and so is a dead letter, a message that could not be stored,
a foreign row, which another writer put there, and a drop without a sender. Those that are pending complete
themselves as soon as the map knows who it was; `allow_waiting` is for who looks in the meantime. A LID that
was stored and is repaired is listed and no failure: else there would be no success after a repair.
"""

from dataclasses import dataclass
from datetime import datetime

import msgspec

from monitor.census import Doubtful, doubtful_rows, lids_of
from monitor.database import Database
from monitor.identity import Known


@dataclass(frozen=True, slots=True)
class Standing:
    """LIDs that stand in the table now, of one project and one version of the code."""

    project: str
    tree: str | None
    """Digest of the code that stored them; None for rows that no message of ours explains."""
    since: datetime | None
    rows: int


@dataclass(frozen=True, slots=True)
class NewlyStored:
    """Drops that held a LID right after they were stored, repaired or not."""

    project: str
    tree: str
    first_at: datetime
    last_at: datetime
    drops: int


@dataclass(frozen=True, slots=True)
class Waiting:
    """Drops without a sender."""

    project: str
    kind: str
    """`pending` for a LID that the map may learn, `unknown` for what may never be a person."""
    drops: int
    since: datetime


@dataclass(frozen=True, slots=True)
class Foreign:
    """Rows that another writer put into the table; they were left as they are."""

    project: str
    rows: int
    first_at: datetime
    last_at: datetime
    posted: int
    """In how many of them a message names the drop as well."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """A drop that was stored lately, and how its sender was judged."""

    drop_number: str
    project: str
    kind: str
    stored_as: str
    confidence: str | None
    reason: str
    stored_at: datetime
    resolved_at: datetime | None


@dataclass(frozen=True, slots=True)
class DeadLetters:
    """Messages that could not be stored, and are tried again at each start."""

    project: str
    reason: str
    messages: int
    last_at: datetime


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that the audit found."""

    standing: list[Standing]
    newly_stored: list[NewlyStored]
    waiting: list[Waiting]
    dead_letters: list[DeadLetters]
    doubtful: list[Doubtful]
    foreign_rows: list[Foreign]
    fresh: list[Fresh]
    """Only when they were asked for."""
    allow_waiting: bool = False

    @property
    def failed(self) -> bool:
        """Tell whether something stands in the table that should not, or a message was refused."""
        waiting = self.waiting and not self.allow_waiting
        return bool(self.standing or self.dead_letters or self.foreign_rows or waiting)

    def to_json(self) -> bytes:
        """Return the findings as JSON: the fields above, times in ISO form, and `failed`."""
        document = {"failed": self.failed, **msgspec.to_builtins(self)}
        return msgspec.json.format(msgspec.json.encode(document), indent=2)


def audit(
    database: Database, known: Known, *, since: datetime | None = None, allow_waiting: bool = False
) -> Findings:
    """Look at everything; raises `StoreError` when the database does not let it.

    With `since` the drops are listed that were stored from then on.
    """
    standing = database.rows("audit_standing", {"lids": list(lids_of(database, known))})
    return Findings(
        standing=[Standing(*row) for row in standing],
        newly_stored=[NewlyStored(*row) for row in database.rows("audit_newly_stored")],
        waiting=[
            Waiting(project, "pending" if is_lid else "unknown", drops, since)
            for project, is_lid, drops, since in database.rows("audit_pending")
        ],
        dead_letters=[DeadLetters(*row) for row in database.rows("audit_dead_letters")],
        doubtful=doubtful_rows(database, known),
        foreign_rows=[Foreign(*row) for row in database.rows("audit_foreign")],
        fresh=[]
        if since is None
        else [Fresh(*row) for row in database.rows("audit_drops", {"since": since})],
        allow_waiting=allow_waiting,
    )
