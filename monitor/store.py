"""Writing what was decided: ledger, drops, place and totals of a batch, in one transaction.

The rule: a batch is one transaction that begins by locking the cursor row under its own epoch and ends by
moving the place. Either everything of it is stored or nothing, and then the cursor has not moved. A message
that the ledger knows is not stored again, so a batch may be repeated in whole or in part.

A sender enters a row only as a typed identity (`Phone`, `Lid`, `Unknown`), never as text, and the two
columns that show it are filled in one place, `_sender_columns`, for new drops and for resubmissions. What
the row holds afterwards is judged from the row (`judgement`), and only counted: the store is no second
opinion about identities.

A message that PostgreSQL refuses for what it is (a constraint, a value too long) must not hold up the rest:
the batch is tried again message by message, each in a savepoint, and that one drop by drop: what of it can be
stored is, and for the rest it becomes a dead letter. Before that the table itself is checked: one that has
changed so that it takes no drop at all is nobody's dead letter but an error that stops the cursor. A dead
letter is no verdict for ever: whenever its message is read again, it is tried again.

A drop whose sender has no phone yet is stored at once: `submitted_by` stays NULL, which the dashboard knows
from rows typed in by hand, `user_name` (NOT NULL) gets a placeholder, and the row is completed when the map
learns the sender. A resubmission by such a sender leaves the former one in the row until then: a row shows
the last poster who is known. (His own LID, which an old system left there, is nobody known: it goes.) A
resubmission does not move `whatsapp_message_date` or `review_date`: the drop would count for another day.

A row that was there before the monitor is taken as the drop's row: a message that has its drop and its time
already is entered and changes nothing (`known`), and so is every message that the old monitor had dealt with,
whose drop has a row. A row that neither we nor the past explain was put there by another writer. It is left
alone, and the message is entered as `foreign`: one table, one writer, and who breaks that is to be found, not
painted over. Once somebody has removed that row, its message is tried again like a dead letter.

Rejected: `ON CONFLICT` on the dashboard's unique key, which changed three times and does not say what a
resubmission is.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from typing import Literal, NamedTuple

from psycopg.types.json import Jsonb

from monitor import cursor
from monitor.batch import Batch, count, entry_of, ids_of
from monitor.cursor import Claim
from monitor.database import Database
from monitor.decision import Decided, MessageId
from monitor.errors import StoreRefusedError, StoreUnavailableError
from monitor.identity import Known, Lid, Phone, Sender, Unknown, parse_jid
from monitor.judgement import PENDING_NAME, UNKNOWN_NAME, Judgement, judge
from monitor.messages import Message, Place
from monitor.projects import Project, Projects
from monitor.settings import BUSINESS_ZONE
from monitor.totals import KINDS, DropSeries, Kind, Totals

_NOT_FOR_EVER = frozenset({"dead_letter", "other_chat", "disabled_project"})
"""Outcomes that another projects file, table or version of the code may change."""

EventKind = Literal["new", "resubmission", "known", "foreign"]
"""The first two write a row; `known` finds the drop's own row, `foreign` another writer's, and leave it."""
_WRITES: Mapping[EventKind, Kind] = {kind: kind for kind in KINDS}


class StoredDrop(NamedTuple):
    """A drop of a message, and the row that shows it now."""

    message: Message
    number: str
    project: Project
    sender: Sender
    kind: EventKind
    review_id: str
    submitted_by: str | None
    judgement: Judgement

    @property
    def wrote(self) -> Kind | None:
        """How its row was written; None if it was left alone."""
        return _WRITES.get(self.kind)


@dataclass(frozen=True, slots=True)
class Written:
    """What one batch did."""

    stored: Sequence[StoredDrop] = ()
    dead: Mapping[MessageId, str] = field(default_factory=dict)
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


class _Drop(NamedTuple):
    """A drop on its way into a row."""

    message: Message
    number: str
    project: Project
    sender: Sender


class _Row(NamedTuple):
    """A row of the dashboard's table, as the statement `standing_drops` returns it."""

    number: str
    project: str | None
    review_id: str
    sent_at: datetime | None
    submitted_by: str | None
    user_name: str | None
    explained: bool
    adopted: bool


class Store:
    """Writer for one source under one claim.

    Every method that writes raises `CursorLostError`, having written nothing, when another process has taken
    over. `check_table` raises `StoreSchemaError` when the dashboard's table does not fit (any more).
    `handled_until` says per chat until when the old monitor had dealt with it ("" stands for all other
    chats).
    """

    def __init__(
        self,
        database: Database,
        held: Claim,
        projects: Projects,
        *,
        check_table: Callable[[Database], None],
        handled_until: Mapping[str, datetime] | None = None,
        business_zone: tzinfo = BUSINESS_ZONE,
    ) -> None:
        self._database = database
        self._held = held
        self._check_table = check_table
        self._handled_until = handled_until or {}
        self._zone = business_zone
        self._seen: set[tuple[str, str]] = set()
        """LIDs and phones that are in the log of mappings."""
        self.projects = projects

    def write(self, start: Place, batch: Batch, end: Place, known: Known) -> Written:
        """Store a batch that was read after `start` and move the cursor to `end`.

        `known` is the reading of the map by which the rows are judged.
        """
        with self._database.patient_transaction():
            totals = self._lock(start)
            fresh, before = self._not_in_ledger(batch)
            stored, dead = self._store_drops(fresh.with_drops, known)
            dead |= fresh.unreadable
            self._record(fresh, dead, before)
            counted = {id_ for id_, outcome in before.items() if outcome == "dead_letter"}
            uncounted = [one for id_, one in fresh.messages.items() if id_ not in counted]
            totals += (count(uncounted) if counted else fresh.counted) + _count_drops(stored)
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

    def reopen_foreign(self) -> None:
        """Make dead letters of messages that were left to another writer's row which is gone now."""
        with self._database.patient_transaction():
            self._lock(None)
            self._database.run("reopen_foreign", self._code())

    def dead_letters(self) -> list[MessageId]:
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

    def remember(self, known: Known) -> Collection[tuple[str, str]]:
        """Log mappings that were not seen before and return all: the bridge's own map forgets."""
        with self._database.patient_transaction():
            seen = self._seen or set(self._database.rows("mappings"))
            new = sorted(known.phone_of.items() - seen)
            if new:
                lids, phones = zip(*new, strict=True)
                self._database.run("remember_mappings", {"lids": list(lids), "phones": list(phones)})
        self._seen = seen.union(new)
        return self._seen

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

    def _not_in_ledger(self, batch: Batch) -> tuple[Batch, dict[MessageId, str]]:
        """Leave out what was dealt with before; of an edited message only its new drops remain.

        Dead letters, and messages of groups that were not ours then, are not dealt with. Returned second is
        what the ledger says of those messages that it knows; dead letters among them are counted already.
        """
        before: dict[MessageId, str] = {}
        settled: dict[MessageId, str] = {}
        asked = {"source": self._held.source, **batch.ids}
        for chat, key, content_hash, outcome in self._database.rows("known_messages", asked):
            before[chat, key] = outcome
            if outcome not in _NOT_FOR_EVER:
                settled[chat, key] = content_hash
        if not before:
            return batch, before
        fresh = [
            one
            for id_, one in batch.messages.items()
            if id_ not in settled or settled[id_] != one.message.content_hash
        ]
        edited = [one.id for one in fresh if one.id in before]
        return Batch(self._without_stored_drops(fresh, edited)), before

    def _without_stored_drops(self, fresh: Sequence[Decided], edited: Collection[MessageId]) -> list[Decided]:
        """Leave out the drops that are stored already of messages that the ledger knows."""
        if not edited:
            return list(fresh)
        stored = {
            (chat, key, number)
            for chat, key, number in self._database.rows("known_events", self._ids(edited))
        }
        return [
            one._replace(drops=tuple(number for number in one.drops if (*one.id, number) not in stored))
            for one in fresh
        ]

    def _store_drops(
        self, decided: Sequence[Decided], known: Known
    ) -> tuple[list[StoredDrop], dict[MessageId, str]]:
        """Store the drops of all messages, or each by itself if one of them is refused."""
        try:
            with self._database.transaction():
                return self._write_drops(decided, known), {}
        except StoreRefusedError as error:
            self._check_table(self._database)
            parts = _parts(decided)
            if len(parts) == 1:
                return [], {decided[0].id: str(error)}
        stored: list[StoredDrop] = []
        dead: dict[MessageId, str] = {}
        for one in parts:
            stored_of_one, dead_of_one = self._store_drops([one], known)
            stored += stored_of_one
            dead |= dead_of_one
        return stored, dead

    def _write_drops(self, decided: Iterable[Decided], known: Known) -> list[StoredDrop]:
        """Write rows, events and the waiting list for the drops of these messages."""
        drops = list(_drops(decided))
        if not drops:
            return []
        new, again, left = self._split(drops)
        stored = [
            *self._insert(new, known),
            *self._resubmit(again, known),
            *(
                _judged(drop, kind, (row.review_id, row.submitted_by, row.user_name), known)
                for drop, kind, row in left
            ),
        ]
        self._record_events(stored)
        self._record_pending([one for one in stored if one.wrote])
        return stored

    def _split(
        self, drops: Sequence[_Drop]
    ) -> tuple[list[_Drop], list[_Drop], list[tuple[_Drop, EventKind, _Row]]]:
        """Tell new drops from resubmissions and from those whose row is to be left as it is.

        In its space a drop is new once, batch included.
        """
        standing: dict[tuple[str | None, str], list[_Row]] = {}
        for values in self._database.rows(
            "standing_drops", {"numbers": list({drop.number for drop in drops})}
        ):
            row = _Row(*values)
            space = None if row.project is None else self.projects.space_of.get(row.project)
            standing.setdefault((space, row.number), []).append(row)
        new: list[_Drop] = []
        again: list[_Drop] = []
        left: list[tuple[_Drop, EventKind, _Row]] = []
        begun: set[tuple[str, str]] = set()
        for drop in drops:
            key = (drop.project.drop_space, drop.number)
            rows = standing.get(key, [])
            found = self._row_to_leave(drop, rows)
            if found is not None:
                left.append((drop, *found))
            elif rows or key in begun:
                again.append(drop)
            else:
                new.append(drop)
                begun.add(key)
        return new, again, left

    def _row_to_leave(self, drop: _Drop, rows: Sequence[_Row]) -> tuple[EventKind, _Row] | None:
        """Return the row that this drop must not change, and why it is there; None if it may change one."""
        if not rows:
            return None
        chat = drop.message.chat_jid
        handled = self._handled_until.get(chat, self._handled_until.get(""))
        own = [row for row in rows if row.sent_at == drop.message.sent_at and not row.explained]
        if own:
            return ("known" if own[0].adopted else "foreign"), own[0]
        if handled is not None and drop.message.sent_at <= handled:
            return "known", rows[0]
        if not (rows[0].explained or rows[0].adopted):
            return "foreign", rows[0]
        return None

    def _insert(self, drops: Sequence[_Drop], known: Known) -> list[StoredDrop]:
        if not drops:
            return []
        columns = [_sender_columns(drop.sender) for drop in drops]
        locals_ = [drop.message.sent_at.astimezone(self._zone) for drop in drops]
        parameters = {
            "numbers": [drop.number for drop in drops],
            "user_names": [user_name for _, user_name in columns],
            "submitted_bys": [submitted_by for submitted_by, _ in columns],
            "projects": [drop.project.name for drop in drops],
            "sent_ats": [drop.message.sent_at for drop in drops],
            "days": [local.date() for local in locals_],
            "comments": [f"Posted on WhatsApp {_minute(local)}" for local in locals_],
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
            "projects": self.projects.names_in(drop.project.drop_space),
            "submitted_by": submitted_by,
            "user_name": user_name,
            "lid": drop.sender.lid if isinstance(drop.sender, Lid) else None,
            "note": f"Resubmitted on WhatsApp {_minute(drop.message.sent_at.astimezone(self._zone))}",
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
                "confidences": [
                    None if isinstance(one.sender, Unknown) else one.sender.confidence for one in stored
                ],
            },
        )

    def _record_pending(self, stored: Sequence[StoredDrop]) -> None:
        """Put drops without a sender on the waiting list, and take rows off it that have got one.

        A row may get one within the batch: who came before that does not wait either. Who comes after waits
        for a row that shows somebody else.
        """
        waiting: dict[str, list[StoredDrop]] = {}
        taken: list[str] = []
        for one in stored:
            if isinstance(one.sender, Phone):
                waiting.pop(one.review_id, None)
                if one.kind == "resubmission":
                    taken.append(one.review_id)
            else:
                waiting.setdefault(one.review_id, []).append(one)
        if taken:
            self._database.run("drop_pending_of_reviews", {"review_ids": taken})
        if waiting:
            drops = list(itertools.chain.from_iterable(waiting.values()))
            standings = [one.submitted_by for one in drops]
            self._database.run(
                "insert_pending", {**self._code(), **_event_ids(drops), "standings": standings}
            )

    def _record(self, fresh: Batch, dead: Mapping[MessageId, str], before: Mapping[MessageId, str]) -> None:
        """Enter messages into the ledger, and those that could not be stored into the dead letters."""
        if not (dead or before):
            self._enter("insert_messages", fresh.entry if fresh.messages else None)
            return
        new = [one for id_, one in fresh.messages.items() if id_ not in before]
        again = [one for id_, one in fresh.messages.items() if id_ in before]
        self._enter("insert_messages", entry_of(new, dead) if new else None)
        self._enter("record_messages", entry_of(again, dead) if again else None)
        alive = [
            one.id
            for one in again
            if one.outcome != "dead_letter" and one.id not in dead and before[one.id] == "dead_letter"
        ]
        if alive:
            self._database.run("forget_dead_letters", self._ids(alive))
        if dead:
            self._database.run(
                "record_dead_letters",
                {
                    **self._code(),
                    **self._ids(dead),
                    "projects": [_name(fresh.messages[id_].project) for id_ in dead],
                    "reasons": list(dead.values()),
                },
            )

    def _enter(self, statement: str, entry: Mapping[str, object] | None) -> None:
        if entry is not None:
            self._database.run(statement, {**self._code(), **entry})

    def _complete(self, drop: PendingDrop, phone: Phone, known: Known) -> Completed | None:
        """Give one row its sender, note it in the event, and take it off the waiting list.

        None if nothing was done: the table refuses the value, or what stands there is no phone and was put
        there before. The drop goes on waiting then, and holds up no other.
        """
        is_phone = _judge(phone.digits, None, known, drop.sender) == "phone"
        event: dict[str, object] = {
            "source": self._held.source,
            "chat_jid": drop.chat_jid,
            "key": drop.key,
            "number": drop.number,
            "phone": phone.digits,
            "known_phone": phone.digits if is_phone else None,
            "unresolved": parse_jid(drop.sender).user,
            "placeholders": [PENDING_NAME, UNKNOWN_NAME],
            "tree": self._held.owner.tree,
        }
        try:
            with self._database.transaction():
                rows = self._database.rows("complete_review", event)
                judgement = _judge(rows[0][0], rows[0][1], known, drop.sender) if rows else None
                settled = is_phone and judgement in {None, "phone"}
                if rows or settled:
                    self._database.run("complete_event", event)
                if rows and settled:
                    self._database.run("move_standing", event)
                if settled:
                    self._database.run("delete_pending", event)
        except StoreRefusedError:
            return None
        return Completed(drop, phone, judgement) if rows or settled else None

    def _ids(self, ids: Collection[MessageId]) -> dict[str, object]:
        return {"source": self._held.source, **ids_of(ids)}

    def _code(self) -> dict[str, object]:
        """Name the code that decides, for whoever asks later which version stored a row."""
        owner = self._held.owner
        return {"source": self._held.source, "tree": owner.tree, "generation": owner.generation}


def _minute(local: datetime) -> str:
    return f"{local:%Y-%m-%d %H:%M %Z}"


def _sender_columns(sender: Sender) -> tuple[str | None, str]:
    """Return `submitted_by` and `user_name` for a sender; the only place that fills them."""
    if isinstance(sender, Phone):
        return sender.digits, sender.digits
    return None, PENDING_NAME if isinstance(sender, Lid) else UNKNOWN_NAME


def _parts(decided: Sequence[Decided]) -> Sequence[Decided]:
    """Take messages apart: several into each, one into its drops."""
    if len(decided) > 1:
        return decided
    return [one._replace(drops=(number,)) for one in decided for number in one.drops]


def _drops(decided: Iterable[Decided]) -> Iterator[_Drop]:
    """Yield the drops of messages that have a project and a sender."""
    for one in decided:
        if isinstance(one.message, Message) and one.project is not None and one.sender is not None:
            for number in one.drops:
                yield _Drop(one.message, number, one.project, one.sender)


def _judged(
    drop: _Drop, kind: EventKind, row: tuple[str, str | None, str | None], known: Known
) -> StoredDrop:
    """Judge a row by what it holds after the write: its id and its two sender columns."""
    review_id, submitted_by, user_name = row
    judgement = _judge(submitted_by, user_name, known, drop.message.sender)
    return StoredDrop(
        drop.message, drop.number, drop.project, drop.sender, kind, review_id, submitted_by, judgement
    )


def _judge(submitted_by: str | None, user_name: str | None, known: Known, sender: str) -> Judgement:
    """Judge the two columns of a row; `sender` is what the bridge has as its message's sender."""
    return judge(
        submitted_by,
        user_name,
        lids=known.lids,
        phones=known.lid_of,
        past_phones=known.phones,
        sender=sender,
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


def _count_drops(stored: Iterable[StoredDrop]) -> Totals:
    """Count drops by what their rows hold."""
    drops: Counter[DropSeries] = Counter()
    for drop in stored:
        if drop.wrote is not None:
            drops[drop.project.name, drop.judgement, drop.wrote] += 1
    return Totals(drops=drops)


def _name(project: Project | None) -> str | None:
    return None if project is None else project.name
