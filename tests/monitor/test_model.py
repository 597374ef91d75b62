"""The monitor against a reference of a few plain lines, killed at any statement and at any time.

The reference is `Reference.run`: what a person would say is to become of the messages in the bridge, in the
order in which they lie there. The monitor is run as its own process, forked, and killed by SIGKILL before one
of its exchanges with PostgreSQL; then it is run to its end. Rows, events and totals must be the reference's
exactly, and no LID may stand in a phone column.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from monitor import relay
from monitor.demo.bridge import EASTVALE, NORTHFIELD, SyntheticBridge
from monitor.embedded import EmbeddedPostgres
from monitor.judgement import PENDING_NAME, UNKNOWN_NAME
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import ProjectsFile
from monitor.relay import Relay, Stop
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    from monitor.settings import Settings

    Rows = Callable[..., list[tuple[Any, ...]]]

SOAK = os.environ.get("WA_SOAK") == "1"
pytestmark = pytest.mark.timeout(3600 if SOAK else 120)
BEGIN = datetime(2026, 11, 20, 8, tzinfo=UTC)
LIDS = ("100000000000017", "90000000000019", "100000000000025")
PHONES = ("27711234567", "263712345678", "447400123456")
SENDERS = (*LIDS, *PHONES, f"{LIDS[0]}@lid", f"{PHONES[0]}:3@s.whatsapp.net", "8000000000019")
DROPS = ("DR1000001", "DR1000002", "DR1000003", "DR100004")
CHATS = (NORTHFIELD, EASTVALE)
RESULT = (
    "SELECT drop_number, submitted_by, user_name, resubmitted, whatsapp_message_date"
    " FROM qa_photo_reviews ORDER BY drop_number"
)
EVENTS = "SELECT chat_jid, message_key, drop_number FROM wa_monitor.drop_event"


@dataclass
class Row:
    """What the table should hold for a drop."""

    sender: str | None
    name: str
    sent_at: datetime
    by: int
    """Which post its sender is from: the last one whose sender is known."""
    resubmitted: bool = False


@dataclass
class Reference:
    """What is in the bridge, and what should be in PostgreSQL after the next run."""

    messages: dict[tuple[str, str], tuple[str, tuple[str, ...], datetime]] = field(default_factory=dict)
    """Chat and id -> sender, drops, time; in the order in which they arrived."""
    phones: dict[str, str] = field(default_factory=dict)
    """LID -> phone."""
    rows: dict[str, Row] = field(default_factory=dict)
    done: dict[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    events: set[tuple[str, str, str]] = field(default_factory=set)
    waiting: list[tuple[int, str, str]] = field(default_factory=list)
    """Number of the post, drop, sender."""
    dealt_with: int = 0

    def phone(self, sender: str) -> str | None:
        """Say whose phone it is: by address, by the map, or by being a number of South Africa."""
        user, _, server = sender.partition("@")
        user = user.partition(":")[0]
        is_phone = server == "s.whatsapp.net" or user in self.phones.values() or user.startswith("27")
        return user if is_phone else self.phones.get(user)

    def run(self) -> None:
        """Do what one run should do."""
        for post, drop, sender in list(self.waiting):
            if (phone := self.phone(sender)) is not None:
                self.waiting.remove((post, drop, sender))
                row = self.rows[drop]
                if post >= row.by:
                    row.sender, row.name, row.by = phone, phone, post
        for key, (sender, drops, sent_at) in self.messages.items():
            if self.done.get(key) == drops:
                continue
            self.done[key] = drops
            self.dealt_with += 1
            for drop in drops:
                if (*key, drop) not in self.events:
                    self.events.add((*key, drop))
                    self._store(drop, sender, sent_at)

    def _store(self, drop: str, sender: str, sent_at: datetime) -> None:
        phone = self.phone(sender)
        nobody = UNKNOWN_NAME if sender.partition("@")[0] in PHONES else PENDING_NAME
        post = len(self.events)
        row = self.rows.get(drop)
        if row is None:
            self.rows[drop] = Row(phone, phone or nobody, sent_at, by=post)
        else:
            row.resubmitted = True
            if phone is not None:
                row.sender, row.name, row.by = phone, phone, post
                self.waiting = [one for one in self.waiting if one[1] != drop]
        if phone is None:
            self.waiting.append((post, drop, sender))


class World:
    """A bridge, a database and the reference."""

    def __init__(self, bridge: SyntheticBridge, settings: Settings, rows: Rows) -> None:
        self.bridge = bridge
        self.reference = Reference()
        self._settings = settings
        self._rows = rows

    def post(self, chat: str, key: str, sender: str, drops: tuple[str, ...], minutes: int) -> None:
        """Send a message, or the same or another text again under its id."""
        sent_at = BEGIN + timedelta(minutes=minutes)
        content = " and ".join(drops) or "Morning all"
        self.bridge.post(chat_jid=chat, sender=sender, content=content, message_id=key, timestamp=sent_at)
        self.reference.messages.pop((chat, key), None)  # a known one lies at the end again
        self.reference.messages[chat, key] = (sender, drops, sent_at)

    def map_lid(self, lid: str, phone: str) -> None:
        """Have the bridge learn a mapping; the phone's former LID is forgotten."""
        self.bridge.map_lid(lid, phone)
        phones = {old: of for old, of in self.reference.phones.items() if of != phone}
        self.reference.phones = {**phones, lid: phone}

    def run(self, kill_at: int | None = None, batch_messages: int = relay.BATCH_MESSAGES) -> bool:
        """Run the monitor in a process of its own; return whether it came to its end."""
        pid = os.fork()
        if pid == 0:
            relay.BATCH_MESSAGES = batch_messages
            self._in_the_child(kill_at)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            assert os.WTERMSIG(status) == signal.SIGKILL
            return False
        assert os.waitstatus_to_exitcode(status) == 0
        return True

    def start(self) -> int:
        """Run the monitor until it is killed; return its pid."""
        pid = os.fork()
        if pid == 0:
            self._settings = replace(self._settings, once=False)
            self._in_the_child(None)
        return pid

    def _in_the_child(self, kill_at: int | None) -> None:
        status = 1
        try:
            if kill_at is not None:
                _kill_before(kill_at)
            assert self._settings.projects is not None
            with closing(Stop()) as stop, closing(Notifier()) as notifier:
                Relay(
                    self._settings,
                    ProjectsFile(self._settings.projects),
                    notifier=notifier,
                    metrics=MonitorMetrics(),
                    stop=stop,
                ).run()
            status = 0
        except BaseException as error:  # noqa: BLE001 -- the parent sees the status
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)

    def check(self) -> None:
        """Compare everything with the reference, which must have run as well."""
        wanted = self.reference
        assert self._rows(RESULT) == [
            (drop, row.sender, row.name, row.resubmitted, row.sent_at)
            for drop, row in sorted(wanted.rows.items())
        ]
        assert Counter(self._rows(EVENTS)) == Counter(wanted.events)
        waiting = self._rows("SELECT drop_number, sender FROM wa_monitor.pending")
        assert Counter(waiting) == Counter((drop, sender) for _, drop, sender in wanted.waiting)
        ((totals,),) = self._rows("SELECT totals FROM wa_monitor.cursor") or [({},)]
        assert sum(count for *_, count in totals.get("drops", [])) == len(wanted.events)
        assert sum(totals.get("messages", {}).values()) == wanted.dealt_with
        senders = {sender for (sender,) in self._rows("SELECT submitted_by FROM qa_photo_reviews")}
        assert not senders & set(LIDS)

    def clear(self) -> None:
        """Empty the tables, if there are any."""
        tables = self._rows("SELECT tablename FROM pg_tables WHERE schemaname = 'wa_monitor'")
        ours = [f"wa_monitor.{table}" for (table,) in tables if table != "migration"]
        if ours:
            self._rows(f"TRUNCATE qa_photo_reviews, {', '.join(ours)}")


def _kill_before(exchange: int) -> None:
    """Have this process killed before its n-th exchange with PostgreSQL: a statement, BEGIN, COMMIT."""
    original = psycopg.Connection.wait
    count = 0

    def wait(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal count
        if count == exchange:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return original(self, *arguments, **options)

    psycopg.Connection.wait = wait  # type: ignore[method-assign]


@pytest.fixture
def make_world(
    settings: Settings, rows: Rows, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], World]:
    """Make a world with empty files and tables."""

    def make() -> World:
        bridge = SyntheticBridge(tmp_path_factory.mktemp("bridge"))
        bridge.create()
        world = World(bridge, replace(settings, bridge=bridge.messages_db), rows)
        world.clear()
        return world

    return make


def test_any_history_gives_what_the_reference_gives_however_often_the_monitor_is_killed(
    make_world: Callable[[], World],
) -> None:
    class History(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.world = make_world()
            self.ran = False

        @rule(
            chat=st.sampled_from(CHATS),
            key=st.sampled_from(["3A01", "AC02", "A503", "3EB004", "0005", "FF06"]),
            sender=st.sampled_from(SENDERS),
            drops=st.lists(st.sampled_from(DROPS), max_size=3, unique=True).map(tuple),
            minutes=st.integers(-3000, 3000),
        )
        def message_new_edited_again_or_late(
            self, chat: str, key: str, sender: str, drops: tuple[str, ...], minutes: int
        ) -> None:
            self.world.post(chat, key, sender, drops, minutes)
            self.ran = False

        @rule(lid=st.sampled_from(LIDS), phone=st.sampled_from(PHONES))
        def mapping_new_or_changed(self, lid: str, phone: str) -> None:
            self.world.map_lid(lid, phone)
            self.ran = False

        @rule(
            kills=st.lists(st.integers(0, 45), max_size=3),
            batch_messages=st.sampled_from([1, 2, relay.BATCH_MESSAGES]),
        )
        def run_with_kills(self, kills: list[int], batch_messages: int) -> None:
            for kill_at in kills:
                self.world.run(kill_at, batch_messages)
            assert self.world.run(None, batch_messages)
            self.world.reference.run()
            self.ran = True

        @invariant()
        def everything_is_as_the_reference_says(self) -> None:
            if self.ran:
                self.world.check()

    examples, steps = (150, 30) if SOAK else (6, 14)
    run_state_machine_as_test(
        History,
        settings=hypothesis_settings(
            max_examples=examples, stateful_step_count=steps, deadline=None, print_blob=True
        ),
    )


def _scenario(world: World) -> None:
    """New, edited, again, several, a sender that waits and one that is found, in two runs."""
    world.map_lid(LIDS[0], PHONES[0])
    world.post(NORTHFIELD, "3A01", LIDS[0], ("DR1000001",), 1)
    world.post(NORTHFIELD, "AC02", LIDS[1], ("DR1000002", "DR1000003"), 2)
    world.post(EASTVALE, "A503", PHONES[0], ("DR1000001",), 3)
    world.post(EASTVALE, "0004", PHONES[0], (), 4)
    assert world.run()
    world.reference.run()
    world.map_lid(LIDS[1], PHONES[1])
    world.post(NORTHFIELD, "3A01", LIDS[0], ("DR1000001", "DR100004"), 1)
    world.post(EASTVALE, "FF05", LIDS[2], ("DR1000002",), 5)


def test_incident_13_kill_before_any_exchange_with_the_database_loses_and_doubles_nothing(
    make_world: Callable[[], World],
) -> None:
    kill_at = 0
    chance = random.Random(20261124)  # noqa: S311 -- repeatable
    while True:
        world = make_world()
        _scenario(world)
        ended = world.run(kill_at, batch_messages=chance.choice([1, 2, relay.BATCH_MESSAGES]))
        assert world.run()
        world.reference.run()
        world.check()
        if ended:  # there are no more exchanges
            break
        kill_at += 1 if SOAK else chance.randint(8, 20)
    assert kill_at > 30


def test_kills_at_random_times_while_messages_come_lose_and_double_nothing(
    make_world: Callable[[], World],
) -> None:
    chance = random.Random(7)  # noqa: S311 -- repeatable
    world = make_world()
    world.map_lid(LIDS[0], PHONES[0])
    number = 0
    for _ in range(300 if SOAK else 8):
        pid = world.start()
        for _ in range(chance.randint(1, 12)):
            drop = f"DR{1_000_000 + chance.randint(0, 60)}"
            world.post(chance.choice(CHATS), f"3A{number:06X}", chance.choice(PHONES), (drop,), number)
            number += 1
        time.sleep(chance.uniform(0.0, 0.25))  # the time of the kill is what is random here
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert world.run()
    world.reference.run()
    world.check()


def test_kills_and_restarts_of_postgresql_lose_and_double_nothing(
    bridge: SyntheticBridge, settings: Settings, tmp_path_factory: pytest.TempPathFactory
) -> None:
    chance = random.Random(11)  # noqa: S311 -- repeatable
    data = tmp_path_factory.mktemp("p")
    world: World | None = None
    number = running = 0
    for last in [False] * (40 if SOAK else 2) + [True]:
        with EmbeddedPostgres(data, durable=False) as server:
            if world is None:
                own = replace(settings, database_url=DatabaseUrl(server.url))
                world = World(bridge, own, partial(_ask, server.url))
            running = running or world.start()
            for _ in range(chance.randint(1, 12)):
                drop = f"DR{1_000_000 + chance.randint(0, 60)}"
                world.post(chance.choice(CHATS), f"3A{number:06X}", chance.choice(PHONES), (drop,), number)
                number += 1
            time.sleep(chance.uniform(0.0, 0.25))
            if last or chance.randint(0, 1):  # else the same monitor sees the restart
                os.kill(running, signal.SIGKILL)
                os.waitpid(running, 0)
                running = 0
            if last:
                assert world.run()
                world.reference.run()
                world.check()


def _ask(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        return connection.execute(statement.encode()).fetchall()
