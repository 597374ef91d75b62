"""Writing what was decided: ledger, drops, place and totals of a batch, in one transaction.

The rule: a batch is one transaction that begins by locking the cursor row under its own epoch and ends by
moving the place. Either everything of it is stored or nothing, and then the cursor has not moved. A message
that the ledger knows is not stored again, so a batch may be repeated in whole or in part.

A sender enters a row only as a typed identity (`Phone`, `Lid`, `Unknown`), never as text, and the two
columns that show it are filled in one place, `_sender_columns`, for new drops and for resubmissions. What
the row holds afterwards is judged from the row (`judgement`), and only counted: the store is no second
opinion about identities.

A message that PostgreSQL refuses for what it is (a constraint, a value too long) must not hold up the rest:
the batch is tried again message by message, each in a savepoint, and that one becomes a dead letter. Before
that the table itself is checked: one that has changed so that it takes no drop at all is nobody's dead letter
but an error that stops the cursor. A dead letter is no verdict for ever: whenever its message is read again,
it is tried again.

A drop whose sender has no phone yet is stored at once: `submitted_by` stays NULL, which the dashboard knows
from rows typed in by hand, `user_name` (NOT NULL) gets a placeholder, and the row is completed when the map
learns the sender. A resubmission does not move `whatsapp_message_date` or `review_date`: the drop would
count for another day.

Rejected: `ON CONFLICT` on the dashboard's unique key, which changed three times and does not say what a
resubmission is.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import Literal

from psycopg.types.json import Jsonb

from monitor import cursor
from monitor.cursor import Claim
from monitor.database import Database
from monitor.errors import StoreRefusedError, StoreUnavailableError
from monitor.identity import Known, Lid, Phone, Sender, parse_jid
from monitor.judgement import PENDING_NAME, UNKNOWN_NAME, Judgement, judge
from monitor.messages import Message, Place, Unreadable
from monitor.projects import Project, Projects
from monitor.totals import Kind, Totals

# The day a drop counts for begins at midnight in South Africa, which has no daylight saving; a fixed offset
# needs no time zone database on the host.
BUSINESS_ZONE = timezone(timedelta(hours=2), "SAST")

_NOT_FOR_EVER = frozenset({"dead_letter", "other_chat", "disabled_project"})
"""Outcomes that another projects file, table or version of the code may change."""

Outcome = Literal["drops", "no_drop", "own_message", "other_chat", "disabled_project", "dead_letter"]
_MessageId = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Decided:
    """A message and what is to become of it."""

    message: Message | Unreadable
    outcome: Outcome
    project: Project | None = None
    drops: tuple[str, ...] = ()
    sender: Sender | None = None
    """Set when there are drops."""

    @property
    def id(self) -> _MessageId:
        """What the ledger knows the message by."""
        return (self.message.chat_jid, self.message.key)


@dataclass(frozen=True, slots=True)
class StoredDrop:
    """A drop of a message, and the row that shows it now."""

    message: Message
    number: str
    project: Project
    sender: Sender
    kind: Kind
    review_id: str
    submitted_by: str | None
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Written:
    """What one batch did."""

    stored: Sequence[StoredDrop] = ()
    dead: Mapping[_MessageId, str] = field(default_factory=dict)
    """Dead letters of the batch and their reasons."""
    totals: Totals = field(default_factory=Totals)
    """The totals after the batch, as the cursor row holds them."""


@dataclass(frozen=True, slots=True)
class PendingDrop:
    """A stored drop whose sender was not known."""

    chat_jid: str
    key: str
    number: str
    project: str
    sender: str
    review_id: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Completed:
    """A drop that was pending and whose row was filled in, or need not be any more."""

    drop: PendingDrop
    phone: Phone
    judgement: Judgement | None
    """What its row holds after the write; None if the row had got a sender meanwhile and was left alone."""


@dataclass(frozen=True, slots=True)
class _Drop:
    """A drop on its way into a row."""

    message: Message
    number: str
    project: Project
    sender: Sender


class Store:
    """Writer for one source under one claim.

    Every method that writes raises `CursorLostError`, having written nothing, when another process has taken
    over. `check_table` raises `StoreSchemaError` when the dashboard's table does not fit (any more).
    """

    def __init__(
        self,
        database: Database,
        held: Claim,
        projects: Projects,
        *,
        check_table: Callable[[Database], None],
    ) -> None:
        self._database = database
        self._held = held
        self._projects = projects
        self._check_table = check_table

    def write(self, start: Place, decided: Sequence[Decided], end: Place, known: Known) -> Written:
        """Store a batch that was read after `start` and move the cursor to `end`.

        `known` is the reading of the map by which the rows are judged.
        """
        with self._database.patient_transaction():
            totals = self._lock(start)
            fresh, counted_before = self._not_in_ledger(decided)
            stored, dead = self._store_drops([one for one in fresh if one.drops], known)
            dead |= {
                one.id: one.message.reason
                for one in fresh
                if isinstance(one.message, Unreadable) and one.outcome == "dead_letter"
            }
            self._record(fresh, dead)
            totals += _count([one for one in fresh if one.id not in counted_before], stored)
            self._move(end, totals)
        return Written(stored, dead, totals)

    def rewind(self, start: Place, to: Place, since_rowid: int | None) -> None:
        """Move the cursor back, to read again what may have changed; the ledger prevents doubles.

        `since_rowid` is where the rows begin that arrived after a first start with `--since now`.
        """
        with self._database.patient_transaction():
            self._move(to, self._lock(start))
            self._database.run("set_since_rowid", {**self._held.key, "since_rowid": since_rowid})

    def pending(self) -> list[PendingDrop]:
        """Return the drops that wait for their sender, oldest first."""
        return [PendingDrop(*row) for row in self._database.rows("pending", {"source": self._held.source})]

    def dead_letters(self) -> list[_MessageId]:
        """Return chat and key of the messages that were refused, oldest first."""
        return [(chat, key) for chat, key in self._database.rows("dead_letters", self._ids([]))]

    def complete(
        self, found: Sequence[tuple[PendingDrop, Phone]], known: Known
    ) -> tuple[list[Completed], Totals]:
        """Fill in the phones of senders that were pending; return what was done and the totals after it.

        Counted as resolved is what holds a phone afterwards. A row that holds a LID then counts as a drop
        stored with one, and goes on waiting: this is a third way into the table, judged like the others.
        """
        with self._database.patient_transaction():
            totals = self._lock(None)
            done = [self._complete(drop, phone, known) for drop, phone in found]
            completed = [one for one in done if one is not None]
            totals += Totals(
                resolved=sum(one.judgement == "phone" for one in completed),
                drops=Counter(
                    (one.drop.project, one.judgement, one.drop.kind)
                    for one in completed
                    if one.judgement == "lid"
                ),
            )
            self._database.run("set_totals", {**self._held.key, "totals": Jsonb(totals.to_json())})
        return completed, totals

    def remember(self, known: Known) -> None:
        """Log mappings that were not seen before: the bridge's own map forgets."""
        with self._database.patient_transaction():
            self._database.run(
                "remember_mappings", {"lids": list(known.phone_of), "phones": list(known.phone_of.values())}
            )

    def renew(self) -> None:
        """Show a sign of life between batches."""
        cursor.renew(self._database, self._held)

    def release(self) -> None:
        """Let the next owner take over at once."""
        cursor.release(self._database, self._held)

    def _lock(self, start: Place | None) -> Totals:
        """Lock the cursor row and return its totals; it must be ours, and where we left it."""
        idle_timeout = f"{int(self._held.lease_seconds * 1000)}ms"
        rows = self._database.rows("lock", {**self._held.key, "idle_timeout": idle_timeout})
        if not rows or (start is not None and rows[0][0] != start.rowid):
            raise cursor.lost(self._held)
        return Totals.from_json(rows[0][1])

    def _move(self, place: Place, totals: Totals) -> None:
        self._database.run(
            "move", {**self._held.key, **cursor.place_parameters(place), "totals": Jsonb(totals.to_json())}
        )

    def _not_in_ledger(self, decided: Sequence[Decided]) -> tuple[list[Decided], set[_MessageId]]:
        """Leave out what was dealt with before; of an edited message only its new drops remain.

        Dead letters, and messages of groups that were not ours then, are not dealt with. Returned second are
        the dead letters among them, which the totals have counted already.
        """
        asked = {one.id: one for one in decided}
        known = {
            (chat, key): (content_hash, outcome)
            for chat, key, content_hash, outcome in self._database.rows("known_messages", self._ids(asked))
        }
        settled = {one: found[0] for one, found in known.items() if found[1] not in _NOT_FOR_EVER}
        dead = {one for one, found in known.items() if found[1] == "dead_letter"}
        fresh = [one for one in asked.values() if settled.get(one.id) != one.message.content_hash]
        return self._without_stored_drops(fresh, [one.id for one in fresh if one.id in known]), dead

    def _without_stored_drops(
        self, fresh: Sequence[Decided], edited: Collection[_MessageId]
    ) -> list[Decided]:
        """Leave out the drops that are stored already of messages that the ledger knows."""
        if not edited:
            return list(fresh)
        stored = {
            (chat, key, number)
            for chat, key, number in self._database.rows("known_events", self._ids(edited))
        }
        return [
            replace(one, drops=tuple(number for number in one.drops if (*one.id, number) not in stored))
            for one in fresh
        ]

    def _store_drops(
        self, decided: Sequence[Decided], known: Known
    ) -> tuple[list[StoredDrop], dict[_MessageId, str]]:
        """Store the drops of all messages, or of each by itself if one of them is refused."""
        try:
            with self._database.transaction():
                return self._write_drops(decided, known), {}
        except StoreRefusedError as error:
            self._check_table(self._database)
            if len(decided) == 1:
                return [], {decided[0].id: str(error)}
        stored: list[StoredDrop] = []
        dead: dict[_MessageId, str] = {}
        for one in decided:
            stored_of_one, dead_of_one = self._store_drops([one], known)
            stored += stored_of_one
            dead |= dead_of_one
        return stored, dead

    def _write_drops(self, decided: Iterable[Decided], known: Known) -> list[StoredDrop]:
        """Write rows, events and the waiting list for the drops of these messages."""
        drops = list(_drops(decided))
        if not drops:
            return []
        new, again = self._split(drops)
        stored = [*self._insert(new, known), *self._resubmit(again, known)]
        self._record_events(stored)
        self._record_pending(stored)
        return stored

    def _split(self, drops: Sequence[_Drop]) -> tuple[list[_Drop], list[_Drop]]:
        """Tell new drops from resubmissions: in its space a drop is new once, batch included."""
        rows = self._database.rows("standing_drops", {"numbers": [drop.number for drop in drops]})
        standing = {(self._projects.space_of.get(project), number) for number, project in rows}
        new: list[_Drop] = []
        again: list[_Drop] = []
        for drop in drops:
            key = (drop.project.drop_space, drop.number)
            (again if key in standing else new).append(drop)
            standing.add(key)
        return new, again

    def _insert(self, drops: Sequence[_Drop], known: Known) -> list[StoredDrop]:
        if not drops:
            return []
        columns = [_sender_columns(drop.sender) for drop in drops]
        parameters = {
            "numbers": [drop.number for drop in drops],
            "user_names": [user_name for _, user_name in columns],
            "submitted_bys": [submitted_by for submitted_by, _ in columns],
            "projects": [drop.project.name for drop in drops],
            "sent_ats": [drop.message.sent_at for drop in drops],
            "days": [drop.message.sent_at.astimezone(BUSINESS_ZONE).date() for drop in drops],
            "comments": [f"Posted on WhatsApp {_local(drop.message.sent_at)}" for drop in drops],
        }
        rows = {row[:2]: row[2:] for row in self._database.rows("insert_reviews", parameters)}
        return [_judged(drop, "new", rows[drop.number, drop.project.name], known) for drop in drops]

    def _resubmit(self, drops: Sequence[_Drop], known: Known) -> list[StoredDrop]:
        rows = self._database.rows_of_each("resubmit_review", [self._resubmission(drop) for drop in drops])
        stored = []
        for drop, row in zip(drops, rows, strict=True):
            if row is None:
                raise StoreUnavailableError(
                    f"the row of {drop.number} was deleted while it was resubmitted; the batch is tried again"
                )
            stored.append(_judged(drop, "resubmission", row[2:], known))
        return stored

    def _resubmission(self, drop: _Drop) -> dict[str, object]:
        submitted_by, user_name = _sender_columns(drop.sender)
        return {
            "number": drop.number,
            "projects": self._projects.names_in(drop.project.drop_space),
            "submitted_by": submitted_by,
            "user_name": user_name,
            "note": f"Resubmitted on WhatsApp {_local(drop.message.sent_at)}",
        }

    def _record_events(self, stored: Sequence[StoredDrop]) -> None:
        self._database.run(
            "insert_events",
            {
                **self._code(),
                **_event_ids(stored),
                "spaces": [one.project.drop_space for one in stored],
                "kinds": [one.kind for one in stored],
                "stored_as": [one.judgement for one in stored],
                "phones": [one.sender.digits if isinstance(one.sender, Phone) else None for one in stored],
                "reasons": [one.sender.reason for one in stored],
                "sent_ats": [one.message.sent_at for one in stored],
            },
        )

    def _record_pending(self, stored: Sequence[StoredDrop]) -> None:
        """Put drops without a sender on the waiting list, and take rows off it that have got one."""
        taken = [
            one.review_id for one in stored if isinstance(one.sender, Phone) and one.kind == "resubmission"
        ]
        if taken:
            self._database.run("drop_pending_of_reviews", {"review_ids": taken})
        waiting = [one for one in stored if one.submitted_by is None and not isinstance(one.sender, Phone)]
        if waiting:
            self._database.run("insert_pending", {**self._code(), **_event_ids(waiting)})

    def _record(self, fresh: Sequence[Decided], dead: Mapping[_MessageId, str]) -> None:
        """Enter messages into the ledger, and those that could not be stored into the dead letters."""
        if fresh:
            alive = [one.id for one in fresh if one.outcome != "dead_letter" and one.id not in dead]
            self._database.run("forget_dead_letters", self._ids(alive))
            self._database.run(
                "record_messages",
                {
                    **self._code(),
                    **self._ids([one.id for one in fresh]),
                    "hashes": [one.message.content_hash for one in fresh],
                    "outcomes": ["dead_letter" if one.id in dead else one.outcome for one in fresh],
                    "projects": [_name(one.project) for one in fresh],
                    "sent_ats": [
                        one.message.sent_at if isinstance(one.message, Message) else None for one in fresh
                    ],
                },
            )
        if dead:
            projects = {one.id: _name(one.project) for one in fresh}
            self._database.run(
                "record_dead_letters",
                {
                    **self._code(),
                    **self._ids(dead),
                    "projects": [projects[key] for key in dead],
                    "reasons": list(dead.values()),
                },
            )

    def _complete(self, drop: PendingDrop, phone: Phone, known: Known) -> Completed | None:
        """Give one row its sender, note it in the event, and take it off the waiting list.

        None if nothing was done: the table refuses the value, or what stands there is no phone and was put
        there before. The drop goes on waiting then, and holds up no other.
        """
        is_phone = self._judge((phone.digits, None), known) == "phone"
        event: dict[str, object] = {
            "source": self._held.source,
            "chat_jid": drop.chat_jid,
            "key": drop.key,
            "number": drop.number,
            "review_id": drop.review_id,
            "phone": phone.digits,
            "known_phone": phone.digits if is_phone else None,
            "unresolved": parse_jid(drop.sender).user,
            "placeholders": [PENDING_NAME, UNKNOWN_NAME],
            "tree": self._held.owner.tree,
        }
        try:
            with self._database.transaction():
                rows = self._database.rows("complete_review", event)
                judgement = self._judge(rows[0], known) if rows else None
                settled = is_phone and judgement in {None, "phone"}
                if rows or settled:
                    self._database.run("complete_event", event)
                if settled:
                    self._database.run("delete_pending", event)
        except StoreRefusedError:
            return None
        return Completed(drop, phone, judgement) if rows or settled else None

    @staticmethod
    def _judge(row: Sequence[str | None], known: Known) -> Judgement:
        return judge(*row, lids=known.phone_of, phones=known.lid_of)

    def _ids(self, ids: Collection[_MessageId]) -> dict[str, object]:
        return {
            "source": self._held.source,
            "chat_jids": [chat for chat, _ in ids],
            "keys": [key for _, key in ids],
        }

    def _code(self) -> dict[str, object]:
        """Name the code that decides, for whoever asks later which version stored a row."""
        owner = self._held.owner
        return {"source": self._held.source, "tree": owner.tree, "generation": owner.generation}


def _sender_columns(sender: Sender) -> tuple[str | None, str]:
    """Return `submitted_by` and `user_name` for a sender; the only place that fills them."""
    if isinstance(sender, Phone):
        return sender.digits, sender.digits
    return None, PENDING_NAME if isinstance(sender, Lid) else UNKNOWN_NAME


def _drops(decided: Iterable[Decided]) -> Iterator[_Drop]:
    """Yield the drops of messages that have a project and a sender."""
    for one in decided:
        if isinstance(one.message, Message) and one.project is not None and one.sender is not None:
            for number in one.drops:
                yield _Drop(one.message, number, one.project, one.sender)


def _judged(drop: _Drop, kind: Kind, row: Sequence[str], known: Known) -> StoredDrop:
    """Judge a row by what it holds after the write: its id and its two sender columns."""
    review_id, submitted_by, user_name = row
    judgement = judge(submitted_by, user_name, lids=known.phone_of, phones=known.lid_of)
    return StoredDrop(
        drop.message, drop.number, drop.project, drop.sender, kind, review_id, submitted_by, judgement
    )


def _event_ids(stored: Sequence[StoredDrop]) -> dict[str, object]:
    """Return the columns that events and the waiting list share."""
    return {
        "chat_jids": [one.message.chat_jid for one in stored],
        "keys": [one.message.key for one in stored],
        "numbers": [one.number for one in stored],
        "projects": [one.project.name for one in stored],
        "senders": [one.message.sender for one in stored],
        "lids": [one.sender.lid if isinstance(one.sender, Phone | Lid) else None for one in stored],
        "review_ids": [one.review_id for one in stored],
    }


def _count(fresh: Iterable[Decided], stored: Iterable[StoredDrop]) -> Totals:
    """Count a batch: messages of enabled projects, and drops by what their rows hold."""
    return Totals(
        drops=Counter((one.project.name, one.judgement, one.kind) for one in stored),
        messages=Counter(
            one.project.name for one in fresh if one.project is not None and one.project.enabled
        ),
    )


def _name(project: Project | None) -> str | None:
    return None if project is None else project.name


def _local(instant: datetime) -> str:
    return f"{instant.astimezone(BUSINESS_ZONE):%Y-%m-%d %H:%M %Z}"
