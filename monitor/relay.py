"""The relay: messages of the bridge in, rows of PostgreSQL out. This is the monitor's whole story.

    connect  ->  stand by for the cursor  ->  turn after turn until the stop
                                               learn what the map has learnt, complete what waited for it
                                               read what arrived after the cursor
                                               decide: whose group, which drops, which sender
                                               store rows, ledger, cursor and totals in one transaction
                                               look for LIDs that stand in the table

The rule: nothing lives in memory that is not in the bridge or in PostgreSQL, so the process may die at any
point. What can come back (a bridge that is away or locked, a database that is away, a cursor that another
process took) is waited for, for ever, with growing pauses and in plain sight: status line, log and
`wa_monitor_store_errors_total`. Nothing is skipped meanwhile, because the cursor does not move. What cannot
come back by itself ends a monitor that is not ready yet, and is waited for by one that is.

A process that may not write stands by: it is READY, it looks at the cursor row fifty times a second, and its
watchdog message follows each look. That is what makes the handover to a new generation, and to another host,
a matter of milliseconds.

Rejected: an event loop and threads. One turn of reading, deciding and storing is the unit in which
everything is either done or not done; a second thread could only add interleavings. In a backlog the next
page is read and judged in the moments in which PostgreSQL works (`ahead`), which changes nothing until then.
"""

import os
import random
import select
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from psycopg.types.json import Jsonb

from monitor import census, cursor
from monitor.adoption import OVERLAP, read_state
from monitor.ahead import Ahead
from monitor.batch import Batch
from monitor.bridge import LOOK_BACK_ROWS, WHATSAPP_DB, Bridge, Page
from monitor.canary import try_write
from monitor.cursor import Claim, Cursor, Owner
from monitor.database import Database, connect
from monitor.decision import Decider
from monitor.errors import ConfigError, MonitorError, StoreError, StoreRefusedError
from monitor.identity import Known, Phone
from monitor.ledger import Beginning
from monitor.logs import info_lines, log
from monitor.messages import Message, Place, Unreadable
from monitor.metrics import Counts, MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import Projects, ProjectsFile
from monitor.repair import repair_some
from monitor.schema import check_identity, check_reviews, prepare
from monitor.settings import Settings
from monitor.store import Store, StoredDrop

if TYPE_CHECKING:
    from monitor.wakeup import Wakeup

BATCH_MESSAGES = 3000
# Between two looks at the bridge, with events of the files to wake us and without. The bridge is asked
# itself, by a SELECT that costs some twenty microseconds. The files' times are no substitute: two commits
# within one tick of the clock leave the same time, and the second would be seen late.
_SLOW_POLL_SECONDS = 1.0
_POLL_SECONDS = 0.05
_LOOK_SECONDS = 0.02
_PROJECTS_LOOK_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 5.0
_PING_SECONDS = 1.0
_ALARM_SECONDS = 1.0
_USUAL_SECONDS = 600.0
_RENEWALS_PER_LEASE = 3
# Counting LIDs reads the whole table: on a large one it may take a twenty-fifth of the time, not more.
_COUNT_SHARE = 0.04


class Stop:
    """The wish to end, and a wait that it cuts short; `request` may be called from a signal handler."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe()
        self.requested = False

    def request(self) -> None:
        """Ask for the end; the batch that is being stored is finished first."""
        if not self.requested:
            self.requested = True
            os.write(self._writer, b"x")

    def wait(self, seconds: float, *others: "Wakeup") -> bool:
        """Wait for `seconds`, until the end is asked for, or until one of the others calls: then True."""
        called, _, _ = select.select([self._reader, *(other.fileno() for other in others)], [], [], seconds)
        return bool(called)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._reader)
        os.close(self._writer)


class Relay:
    """Runs the monitor until it is stopped, through every failure that can pass.

    `run` raises `MonitorError` for what cannot: a first start that does not say where to begin, a database
    of another shape; with `--once`, for every failure.
    """

    def __init__(
        self,
        settings: Settings,
        projects: ProjectsFile,
        *,
        notifier: Notifier,
        metrics: MonitorMetrics,
        stop: Stop,
    ) -> None:
        self._settings = settings
        self._projects = projects
        self._projects_look = _Due(_PROJECTS_LOOK_SECONDS)
        self._projects_fault = ""
        self._notifier = notifier
        self._metrics = metrics
        self._stop = stop
        self._owner = Owner.of_this_process()
        self._ready = False
        self._failures = 0
        self._last_failure = ""
        metrics.update(projects=_names(projects.projects))

    def run(self) -> None:
        """Relay until the stop, or with `--once` until the backlog is done."""
        while not self._stop.requested:
            try:
                self._serve()
            except MonitorError as error:
                if self._settings.once or not (error.retry or self._ready):
                    raise
                self._report(error)
                self._pause()
            else:
                break

    def _serve(self) -> None:
        """Relay over one connection to the database, as long as it lasts."""
        # Imported here: its library takes 40 ms, which whoever only loads this module need not wait for.
        from monitor.wakeup import Wakeup  # noqa: PLC0415

        with closing(Bridge(self._settings.bridge)) as bridge:
            bridge.known()
            with closing(connect(self._settings.database_url)) as database:
                self._check(database)
                # Watched from before the first read on, so that nothing comes in between unannounced.
                with closing(
                    Wakeup(self._settings.bridge.parent, (self._settings.bridge.name, WHATSAPP_DB))
                ) as wakeup:
                    claimed = self._stand_by(database, bridge)
                    if claimed is not None:
                        self._relay(bridge, database, wakeup, *claimed)

    def _check(self, database: Database) -> None:
        """Prepare the database; before this process is ready, see that it takes what we write."""
        prepare(database)
        if self._settings.database_identity is not None:
            check_identity(database, self._settings.database_identity)
        if not self._ready:
            try_write(database, self._projects.projects.enabled[0].name)

    def _stand_by(self, database: Database, bridge: Bridge) -> tuple[Claim, Cursor] | None:
        """Wait for the right to write; None if the stop came first."""
        source, lease_seconds = self._settings.source, self._settings.lease_seconds
        while not self._stop.requested:
            seen = cursor.look(database, source)
            if seen is None:
                self._begin(database, bridge)
                continue
            # Also of one who only waits: who is ready shows what every monitor of this cursor shows.
            self._metrics.update(totals=seen.totals, began=seen.created_at)
            self._become_ready(database)
            status = f"standing by, {seen.owner} writes"
            if seen.may_be_claimed() or seen.owner.is_same_process(self._owner):
                claimed = cursor.claim(database, source, seen, self._owner, lease_seconds)
                if claimed is not None:
                    return claimed, seen
                status = (
                    f"standing by: {seen.owner} has ended or gave up, but the cursor row is still locked"
                    " by a session in the database; it is taken over as soon as that session is gone"
                )
            elif self._settings.once:
                raise StoreError(f"cursor {source!r} is held by {seen.owner}; stop that monitor first")
            self._metrics.update(counts=None)  # Who writes counts.
            self._notifier.status(status)
            self._turn_completed()
            self._stop.wait(_LOOK_SECONDS)
        return None

    def _begin(self, database: Database, bridge: Bridge) -> None:
        """Create the cursor where there is none; where to begin is the operator's decision.

        The first cursor of a database adopts the rows that stand in the table.
        """
        source, since = self._settings.source, self._settings.since
        if (since is None) == (self._settings.adopt is None):
            raise ConfigError(
                f"no cursor for source {source!r} in {database.place} yet; say where to begin with --since"
                " or WA_SINCE (an ISO time with offset, `beginning` or `now`) or with --adopt STATE.JSON,"
                " and not with both"
            )
        handled = self._read_state(bridge)
        end = bridge.end()
        starts_now = since is not None and since.now
        with database.transaction():
            began = cursor.begin(
                database,
                source,
                owner=self._owner,
                lease_seconds=self._settings.lease_seconds,
                place=end if starts_now else Place(),
                since=min(handled.values()) - OVERLAP if since is None else since.instant,
                since_rowid=end.rowid if starts_now else None,
            )
            if began and database.rows("other_sources", {"source": source})[0][0] == 0:
                positions = Jsonb({chat: time.isoformat() for chat, time in handled.items()})
                adopted = database.rows("adopt_rows", {"source": source, "positions": positions})
                log.info("Adopted %d rows that stood in the table", adopted[0][0])

    def _read_state(self, bridge: Bridge) -> Mapping[str, datetime]:
        """Return until when the old monitor had dealt with each chat, if its state is to be taken over."""
        if self._settings.adopt is None:
            return {}
        handled = read_state(self._settings.adopt, bridge.find, self._settings.business_zone)
        log.info("Loaded state: %d groups", len(handled))
        return handled

    def _relay(self, bridge: Bridge, database: Database, wakeup: "Wakeup", held: Claim, seen: Cursor) -> None:
        """Turn after turn until the stop; then let the next owner in."""
        log.info(
            "Drop monitor started (epoch %d, source %s, database %s)", held.epoch, held.source, database.place
        )
        self._notifier.status(f"writing, epoch {held.epoch}, database {database.place}")
        beginning = Beginning.of(database, held.source, seen)
        store = Store(
            database,
            held,
            self._projects.projects,
            check_table=check_reviews,
            handled_until=beginning.handled,
            business_zone=self._settings.business_zone,
        )
        writer = _Writer(
            bridge,
            store,
            database,
            seen,
            self._settings,
            beginning=beginning,
            notifier=self._notifier,
            metrics=self._metrics,
        )
        writer.look_back()
        writer.retry_dead_letters()
        in_vain = False
        while not self._stop.requested:
            if self._look_at_projects():
                writer.use(self._projects.projects)
            rung = wakeup.rung()
            found_work = writer.turn()
            if found_work and in_vain and not rung:
                wakeup.missed()
            in_vain = False
            self._turn_completed()
            if not found_work:
                if self._settings.once:
                    writer.count()
                    break
                poll_seconds = _SLOW_POLL_SECONDS if wakeup.trusted else _POLL_SECONDS
                in_vain = not self._stop.wait(min(poll_seconds, writer.idle_seconds()), wakeup)
        writer.release()

    def _look_at_projects(self) -> bool:
        """Tell whether the projects file says something else now; one that is refused changes nothing."""
        if not self._projects_look.now():
            return False
        self._projects_look.done()
        before = _names(self._projects.projects)
        try:
            changed = self._projects.has_changed()
        except ConfigError as error:
            if str(error) != self._projects_fault:
                log.error("%s; the projects that were in force stay", error)
                self._notifier.status(f"{error}; the projects that were in force stay")
            self._projects_fault = str(error)
            self._metrics.update(projects_refused=True)
            return False
        if self._projects_fault and not self._projects.refused:  # put back as it was: nothing has changed
            log.info("The projects file is good again")
            self._notifier.status("writing; the projects file is good again")
            self._projects_fault = ""
            self._metrics.update(projects_refused=False)
        now = _names(self._projects.projects)
        if changed:
            added, removed = sorted(set(now) - set(before)), sorted(set(before) - set(now))
            log.info("Projects file applied: %d enabled, new: %s, gone: %s", len(now), added, removed)
            self._metrics.update(projects=now)
        return changed

    def _become_ready(self, database: Database) -> None:
        """Say once that everything is open, checked, and that this process may or could write."""
        if not self._ready:
            self._ready = True
            log.info("Ready (%d projects, database %s)", len(self._projects.projects.enabled), database.place)
            self._notifier.ready()

    def _turn_completed(self) -> None:
        if self._failures:
            self._metrics.update(broken=None)
        self._failures = 0
        self._last_failure = ""
        self._notifier.alive()

    def _report(self, error: MonitorError) -> None:
        """Show a failure that is being waited out, each kind of it once in the log."""
        self._metrics.count_error(error.label)
        self._metrics.update(broken=error.component)
        self._notifier.status(str(error))
        if str(error) != self._last_failure:
            log.warning("%s", error)
        self._last_failure = str(error)
        self._failures += 1

    def _pause(self) -> None:
        """Wait before the next attempt: longer each time, jittered, and never silent towards the watchdog."""
        longest = min(_FIRST_PAUSE_SECONDS * 2 ** min(self._failures, 10), _LONGEST_PAUSE_SECONDS)
        jitter = random.uniform(0.5, 1.0)  # noqa: S311 -- no secret
        until_seconds = time.monotonic() + longest * jitter
        while not self._stop.requested and (left := until_seconds - time.monotonic()) > 0:
            self._notifier.alive()
            self._stop.wait(min(left, _PING_SECONDS))


@dataclass
class _Due:
    """Something to be done every now and then, whose time depends on what it cost."""

    interval_seconds: float
    next_seconds: float = 0.0

    def now(self) -> bool:
        """Tell whether it is time."""
        return time.monotonic() >= self.next_seconds

    def left_seconds(self) -> float:
        """Return how long it is until then."""
        return max(0.0, self.next_seconds - time.monotonic())

    def done(self, cost_seconds: float = 0.0) -> None:
        """Start the pause, which is longer after something expensive."""
        self.next_seconds = time.monotonic() + max(self.interval_seconds, cost_seconds / _COUNT_SHARE)


class _Writer:
    """The turns of a process that holds the claim."""

    def __init__(
        self,
        bridge: Bridge,
        store: Store,
        database: Database,
        seen: Cursor,
        settings: Settings,
        *,
        beginning: Beginning,
        notifier: Notifier,
        metrics: MonitorMetrics,
    ) -> None:
        self._bridge = bridge
        self._store = store
        self._database = database
        self._settings = settings
        self._beginning = beginning
        self._notifier = notifier
        self._metrics = metrics
        self._decider = Decider.of(settings, store.projects)
        self._place = seen.place
        self._ahead: Ahead | None = None
        """The page after the one that was stored last, in a backlog."""
        self._read: Known | None = None
        """What the bridge's map was when it was last learnt; `_known` holds what it was before as well."""
        self._known = Known()
        self._newest = datetime.min.replace(tzinfo=UTC)
        self._known_rowid = 0
        """Up to here messages were dealt with before: that they are read again says nothing of a lag."""
        self._alarm = _Due(_ALARM_SECONDS)
        self._renewal = _Due(settings.lease_seconds / _RENEWALS_PER_LEASE)
        self._count = _Due(settings.scan_interval_seconds)
        self._usual = _Due(_USUAL_SECONDS)
        self._usual_messages = 0.0
        self._repair = _Due(settings.auto_repair_seconds)
        self._standing = False

    def use(self, projects: Projects) -> None:
        """Judge by these projects from the next batch on."""
        self._store.projects = projects
        self._decider = Decider.of(self._settings, projects)

    def look_back(self) -> None:
        """Read the last rows before the cursor once more: the overlap that makes a takeover safe."""
        if self._place.rowid:
            self._known_rowid = self._place.rowid
            page = self._bridge.read_after(self._place, 1)
            self._note_replacement(page)
            overlap = max(0, self._place.rowid - LOOK_BACK_ROWS)
            self._go_back(overlap if page.rescan_from is None else page.rescan_from, page.end.file)

    def retry_dead_letters(self) -> None:
        """Try once more what was refused, as far as it is not read again anyway.

        What was refused may have been the table's fault, or a former version's. What was left to another
        writer's row, which somebody has removed since, is tried as well.
        """
        self._store.reopen_foreign()
        ids = self._store.dead_letters()
        known = self._learnt()
        for first in range(0, len(ids), BATCH_MESSAGES):
            found = self._bridge.find(ids[first : first + BATCH_MESSAGES])
            rows = sorted((row for row in found if row.rowid <= self._place.rowid), key=lambda row: row.rowid)
            if rows:
                self._store_batch(self._decide(rows, known), self._place, known)
            self._notifier.alive()

    def turn(self) -> bool:
        """Do everything that there is to do once; return whether there was a batch: more may follow."""
        known = self._learnt()
        ahead, self._ahead = self._ahead, None
        found = ahead.take(self._place, self._decider, known, self._beginning) if ahead is not None else None
        page, batch = found or (self._bridge.read_after(self._place, BATCH_MESSAGES), None)
        if page.rescan_from is not None:
            log.warning("The bridge's file is not what it was, reading again from row %d", page.rescan_from)
            self._note_replacement(page)
            self._go_back(page.rescan_from, page.end.file)
        elif page.rows:
            self._store_page(page, known, batch)
        self._look_after()
        return page.rescan_from is not None or bool(page.rows)

    def idle_seconds(self) -> float:
        """Return how long nothing has to be done unless a message comes: the lease is to be renewed."""
        return self._renewal.left_seconds()

    def release(self) -> None:
        """Let the next owner take over."""
        self._store.release()

    def _note_replacement(self, page: Page) -> None:
        """Note that rows have other numbers now.

        After a first start with `--since now` what a new file holds counts as having been there before.
        """
        if page.rescan_from is not None:
            self._known_rowid = min(self._known_rowid, page.rescan_from)
        if self._beginning.since_rowid is not None and page.rescan_from == 0:
            self._beginning = replace(self._beginning, since_rowid=self._bridge.end().rowid)

    def _go_back(self, rowid: int, file: str) -> None:
        """Move the cursor back; the ledger keeps what is read again from being stored again."""
        place = Place(rowid=rowid, file=file)
        self._store.rewind(self._place, place, self._beginning.since_rowid)
        self._place = place

    def _learnt(self) -> Known:
        """Return what is known of identities; new mappings are dealt with first."""
        read = self._bridge.known()
        if read is not self._read:
            self._learn(read)
        return self._known

    def _learn(self, read: Known) -> None:
        """Log new mappings, and complete the drops whose sender they name."""
        known = read.with_history(self._store.remember(read))
        found = [
            (drop, phone)
            for drop in self._store.pending()
            if (phone := self._decider.phone(drop.sender, drop.chat_jid, known)) is not None
        ]
        for first in range(0, len(found), BATCH_MESSAGES):
            completed, totals = self._store.complete(found[first : first + BATCH_MESSAGES], known)
            self._metrics.update(totals=totals)
            for one in completed:
                if one.judgement == "lid":
                    self._raise_alarm(one.drop.number, one.drop.project)
                elif one.judgement is not None:
                    log.info(
                        "Resolved LID %s -> %s for %s", one.drop.sender, one.phone.digits, one.drop.number
                    )
        self._read, self._known = read, known

    def _store_page(self, page: Page, known: Known, batch: Batch | None) -> None:
        """Store a page, whose batch may have been made ahead; in a backlog, make the next one meanwhile."""
        if batch is None:
            rows = [row for row in page.rows if not self._beginning.is_after(row)]
            batch = self._decide(rows, known)
        if len(page.rows) == BATCH_MESSAGES:
            self._ahead = Ahead(
                self._bridge,
                page.end,
                BATCH_MESSAGES,
                decider=self._decider,
                known=known,
                beginning=self._beginning,
            )
            with self._database.meanwhile(self._ahead.step):
                self._store_batch(batch, page.end, known)
        else:
            self._store_batch(batch, page.end, known)
        self._report_times(page.rows)

    def _decide(self, rows: Sequence[Message | Unreadable], known: Known) -> Batch:
        return Batch([self._decider.decide(row, known) for row in rows])

    def _store_batch(self, batch: Batch, end: Place, known: Known) -> None:
        """Store a batch with the new place; show what came of it."""
        began_seconds = time.monotonic()
        written = self._store.write(self._place, batch, end, known)
        self._place = end
        self._renewal.done()
        self._metrics.update(totals=written.totals)
        self._metrics.count_batch(time.monotonic() - began_seconds)
        self._log_drops(written.stored)
        for (chat_jid, key), reason in written.dead.items():
            self._metrics.count_error(StoreRefusedError.label)
            log.error("Dead letter: message %s in %s: %s", key, chat_jid, reason)

    def _log_drops(self, stored: Sequence[StoredDrop]) -> None:
        """Write the lines that operators look for."""
        lines: list[str] = []
        for drop in stored:
            lines.append(f"Found drop: {drop.number} in {drop.project.name}")
            if drop.wrote is not None:
                if isinstance(drop.sender, Phone) and drop.sender.lid is not None:
                    lines.append(f"Resolved LID {drop.sender.lid} -> {drop.sender.digits}")
                if drop.kind == "new":
                    lines.append(f"Created QA review for {drop.number}")
                else:
                    lines.append(f"Resubmission detected: {drop.number}")
                    lines.append(f"Logged resubmission for {drop.number}")
            if drop.kind == "foreign" or (drop.wrote is not None and drop.judgement == "lid"):
                info_lines(lines)
                lines.clear()
                self._raise(drop)
        info_lines(lines)

    def _raise(self, drop: StoredDrop) -> None:
        """Report a drop that another writer has taken, or whose row holds a LID."""
        if drop.kind == "foreign":
            log.error(
                "Another writer put %s in %s into the table; it was left alone",
                drop.number,
                drop.project.name,
            )
        else:
            self._raise_alarm(drop.number, drop.project.name)

    def _raise_alarm(self, number: str, project: str) -> None:
        """Report a LID that was stored where a phone belongs; the supervisor is asked once a second."""
        log.error("LID stored as a sender: %s in %s", number, project)
        self._count.next_seconds = min(self._count.next_seconds, time.monotonic())
        if self._alarm.now():
            self._alarm.done()
            self._notifier.suspect("lid-regression")

    def _report_times(self, rows: Sequence[Message | Unreadable]) -> None:
        """Show how far behind the batch was and when the newest message was sent."""
        messages = [row for row in rows if isinstance(row, Message)]
        if messages:
            self._newest = max(self._newest, *(message.sent_at for message in messages))
            self._metrics.update(last_message_at=self._newest)
        new = [message.sent_at for message in messages if message.rowid > self._known_rowid]
        if new:
            self._metrics.update(lag_seconds=max(0.0, time.time() - max(new).timestamp()))

    def _look_after(self) -> None:
        """Renew the lease and count the LIDs that stand in the table, each when it is due."""
        if self._renewal.now():
            self._store.renew()
            self._renewal.done()
        if self._count.now():
            self.count()

    def count(self) -> None:
        """Count what stands in the table and what is to be read, and repair what has stood for long."""
        began_seconds = time.monotonic()
        known = self._bridge.known()
        standing = census.lid_rows(self._database, known)
        if self._usual.now():
            self._usual_messages = census.usual_messages(self._database, self._settings.source)
            self._usual.done()
        self._metrics.update(
            counts=Counts(
                lid_rows=standing,
                foreign_rows=census.foreign_rows(self._database),
                pending=census.pending_drops(self._database, self._settings.source),
                repaired=census.repaired_rows(self._database),
                backlog=max(0, self._bridge.end().rowid - self._place.rowid),
                usual_messages=self._usual_messages,
            )
        )
        self._repair_what_stands(known, standing=bool(standing))
        self._count.done(time.monotonic() - began_seconds)

    def _repair_what_stands(self, known: Known, *, standing: bool) -> None:
        """Replace LIDs that have stood for a while: first they are seen, then they go."""
        if not standing or not self._settings.auto_repair_seconds:
            self._standing = False
        elif not self._standing:
            self._standing = True
            self._repair.done()
        elif self._repair.now():
            report = repair_some(self._database, known)
            self._repair.done()
            if report.repaired:
                log.warning("Repaired %d rows in run %s", report.repaired.total(), report.run_id)
            for refused in report.refused:
                log.error(
                    "LID not repaired: %s in %s: %s", refused.drop_number, refused.project, refused.reason
                )


def _names(projects: Projects) -> tuple[str, ...]:
    return tuple(project.name for project in projects.enabled)
