"""What is read and judged ahead is what the turn would have made, or it is not used."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from monitor import relay
from monitor.ahead import Ahead
from monitor.batch import Batch, count, entry_of
from monitor.bridge import Bridge
from monitor.database import array, connect
from monitor.decision import Decided, Decider
from monitor.demo.bridge import EASTVALE, NORTHFIELD, SyntheticBridge
from monitor.identity import Known, Rules
from monitor.ledger import Beginning
from monitor.messages import Message, Place, Unreadable
from monitor.projects import load_projects
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from monitor.metrics import MonitorMetrics

    Rows = Callable[..., list[tuple[Any, ...]]]
    RelayOnce = Callable[..., MonitorMetrics]

PHONE = "27711234567"
LATE_LID = "3000000000013"
BEGIN = datetime(2026, 11, 23, 8, tzinfo=UTC)
ALL_OURS = Beginning(None, None)


def fill(bridge: SyntheticBridge, texts: list[str], sender: str = PHONE) -> None:
    for number, text in enumerate(texts):
        sent_at = BEGIN + timedelta(seconds=number)
        bridge.post(chat_jid=NORTHFIELD, sender=sender, content=text, timestamp=sent_at)


@pytest.fixture
def reader(bridge: SyntheticBridge) -> Iterator[Bridge]:
    with closing(Bridge(bridge.messages_db)) as opened:
        yield opened


@pytest.fixture
def decider(projects_file: Path) -> Decider:
    return Decider(load_projects(projects_file), Rules())


def ahead_of(reader: Bridge, decider: Decider, known: Known, place: Place, limit: int = 250) -> Ahead:
    return Ahead(reader, place, limit, decider=decider, known=known, beginning=ALL_OURS)


def test_page_that_was_made_ahead_is_the_one_that_would_be_made_now(
    bridge: SyntheticBridge, reader: Bridge, decider: Decider
) -> None:
    fill(bridge, [f"DR{1_000_000 + number}" if number % 3 else "Morning" for number in range(300)])
    known, begin = Known(), reader.read_after(Place(), 1).end
    ahead = ahead_of(reader, decider, known, begin)
    assert ahead.step(), "a little at a time"
    found = ahead.take(begin, decider, known, ALL_OURS)
    assert found is not None
    page, batch = found
    now = reader.read_after(begin, 250)
    whole = Batch([decider.decide(row, known) for row in now.rows])
    assert page == now
    assert (batch.messages, batch.entry, batch.ids) == (whole.messages, whole.entry, whole.ids)
    assert (batch.with_drops, batch.counted) == (whole.with_drops, whole.counted)
    assert len(batch.messages) == 250
    assert not ahead.step()


def test_it_is_not_used_after_another_place_or_by_another_map_or_other_projects(
    bridge: SyntheticBridge, reader: Bridge, decider: Decider, projects_file: Path
) -> None:
    fill(bridge, ["DR1000001"] * 5)
    known, begin = Known(), reader.read_after(Place(), 1).end
    other_place = reader.read_after(begin, 1).end
    other_decider = Decider(load_projects(projects_file), Rules())
    ahead = ahead_of(reader, decider, known, begin)
    assert ahead.take(other_place, decider, known, ALL_OURS) is None
    assert ahead.take(begin, other_decider, known, ALL_OURS) is None
    assert ahead.take(begin, decider, Known(), ALL_OURS) is None
    assert ahead.take(begin, decider, known, Beginning(None, None)) is None
    assert ahead.take(begin, decider, known, ALL_OURS) is not None, "control"


def test_end_of_the_backlog_and_a_file_that_was_replaced_are_left_to_the_turn(
    bridge: SyntheticBridge, reader: Bridge, decider: Decider
) -> None:
    fill(bridge, ["DR1000001"] * 3)
    known, end = Known(), reader.end()
    assert ahead_of(reader, decider, known, end).take(end, decider, known, ALL_OURS) is None
    elsewhere = replace(end, file="1:1")
    assert ahead_of(reader, decider, known, elsewhere).take(elsewhere, decider, known, ALL_OURS) is None


def test_bridge_that_cannot_be_read_is_left_to_the_turn(
    bridge: SyntheticBridge, reader: Bridge, decider: Decider
) -> None:
    fill(bridge, ["DR1000001"] * 3)
    known, begin = Known(), reader.read_after(Place(), 1).end
    bridge.messages_db.unlink()
    ahead = ahead_of(reader, decider, known, begin)
    assert not ahead.step()
    assert ahead.take(begin, decider, known, ALL_OURS) is None


def test_backlog_of_small_batches_gives_what_one_batch_gives(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    take = Ahead.take

    def noted(ahead: Ahead, *arguments: Any) -> Any:
        found = take(ahead, *arguments)
        made.append(found is not None)
        return found

    monkeypatch.setattr(Ahead, "take", noted)
    monkeypatch.setattr(relay, "BATCH_MESSAGES", 7)
    fill(bridge, [f"DR{1_000_000 + number % 40}" if number % 2 else "Morning" for number in range(100)])
    relay_once()
    assert sum(made) >= 12, "most of fourteen full batches were made ahead"
    assert rows("SELECT count(*), count(DISTINCT drop_number) FROM qa_photo_reviews") == [(20, 20)]
    assert rows("SELECT kind, count(*) FROM wa_monitor.drop_event GROUP BY 1 ORDER BY 1") == [
        ("new", 20),
        ("resubmission", 30),
    ]
    assert rows("SELECT outcome, count(*) FROM wa_monitor.message GROUP BY 1 ORDER BY 1") == [
        ("drops", 50),
        ("no_drop", 50),
    ]


def test_mapping_that_is_learnt_while_a_batch_is_stored_counts_for_the_next_one(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "BATCH_MESSAGES", 2)
    fill(bridge, [f"DR{1_000_000 + number}" for number in range(6)], sender=LATE_LID)
    step, steps = Ahead.step, []

    def learning(ahead: Ahead) -> bool:
        more = step(ahead)
        steps.append(more)
        if not more and steps.count(False) == 1:  # The second batch has just been judged.
            bridge.map_lid(LATE_LID, PHONE)
        return more

    monkeypatch.setattr(Ahead, "step", learning)
    relay_once()
    assert False in steps, "control: it was judged ahead"
    assert rows("SELECT DISTINCT submitted_by FROM qa_photo_reviews") == [(PHONE,)]
    later = "SELECT DISTINCT stored_as FROM wa_monitor.drop_event WHERE drop_number > 'DR1000003'"
    assert rows(later) == [("phone",)], "not pending, and completed afterwards"


def decided(key: str, content: str = "", outcome: Any = "no_drop") -> Decided:
    return Decided(Message(1, key, EASTVALE, PHONE, content, BEGIN, False), outcome)


def test_batch_is_the_same_in_whatever_pieces_it_is_made() -> None:
    whole = [decided(f"3A{number}", f"text {number}") for number in range(10)]
    unreadable = Unreadable(3, "bad", EASTVALE, "h", "holds a NUL byte")
    whole.append(Decided(unreadable, "dead_letter"))
    batch = Batch(whole[:3])
    batch.add([])
    batch.add(whole[3:4])
    batch.add(whole[4:])
    assert batch.entry == Batch(whole).entry == entry_of(whole)
    assert batch.counted == count(whole)
    assert batch.unreadable == {(EASTVALE, "bad"): "holds a NUL byte"}


def test_message_that_comes_twice_in_a_batch_is_in_it_once_as_it_came_last() -> None:
    batch = Batch([decided("3A1", "first"), decided("3A2")])
    batch.add([decided("3A1", "second"), decided("3A3")])
    assert [one.message.key for one in batch.messages.values()] == ["3A1", "3A2", "3A3"]
    last = [decided("3A1", "second"), decided("3A2"), decided("3A3")]
    assert list(batch.messages.values()) == last
    assert batch.entry == entry_of(last)


def test_work_is_done_while_the_server_works_and_not_otherwise(database_url: str) -> None:
    done: list[int] = []

    def work() -> bool:
        done.append(1)
        return len(done) < 5

    with closing(connect(DatabaseUrl(database_url))) as database:
        database.rows("limit_waits")
        assert not done
        with database.meanwhile(work):
            database.script(b"SELECT pg_sleep(0.2)")
        assert len(done) >= 5, "as long as there was more"
        before = len(done)
        database.script(b"SELECT pg_sleep(0.05)")
        assert len(done) == before


def test_error_of_the_server_is_the_same_with_work_in_between(database_url: str) -> None:
    with closing(connect(DatabaseUrl(database_url))) as database, database.meanwhile(lambda: True):
        with pytest.raises(Exception, match="refuses a statement"):
            database.script(b"SELECT 1 FROM no_such_table")
        assert database.rows("limit_waits")


def test_array_of_times_texts_and_nothing() -> None:
    assert array([BEGIN, BEGIN]) == f'{{"{BEGIN}","{BEGIN}"}}'
    assert array([BEGIN, None]) == f'{{"{BEGIN}",NULL}}'
    assert array(["a\\b", 'c"d']) == r'{"a\\b","c\"d"}'
    assert array([]) == "{}"


def test_bytes_that_are_no_utf8_spoil_their_own_message_only(bridge: SyntheticBridge, reader: Bridge) -> None:
    fill(bridge, ["DR1000001", "DR1000002", "DR1000003"])
    with closing(sqlite3.connect(bridge.messages_db)) as connection:
        connection.execute("UPDATE messages SET content = CAST(x'ff' AS TEXT) WHERE content = 'DR1000002'")
        connection.commit()
    for _ in range(2):
        page = reader.read_after(Place(), 10)
        kinds = [type(row).__name__ for row in page.rows]
        assert kinds == ["Message", "Unreadable", "Message"]
