"""The synthetic bridge behaves like the real one where that matters to the monitor."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from itertools import islice
from typing import TYPE_CHECKING

import phonenumbers
import pytest

from monitor.demo.bridge import (
    MAPPED_LIDS,
    NORTHFIELD,
    SENDERS,
    UNMAPPED_LID,
    fill_map,
    messages,
)

if TYPE_CHECKING:
    from pathlib import Path

    from monitor.demo.bridge import SyntheticBridge


def rows(path: Path, question: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(question).fetchall()


def test_a_message_sent_again_gets_a_new_rowid(bridge: SyntheticBridge) -> None:
    first = bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="DR1000001")
    second = bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="DR1000002")
    bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="DR1000001 edited", message_id=first)
    assert rows(bridge.messages_db, "SELECT rowid, id FROM messages ORDER BY rowid") == [
        (2, second),
        (3, first),
    ]


def test_ids_have_no_order(bridge: SyntheticBridge) -> None:
    ids = [bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="") for _ in range(12)]
    assert ids != sorted(ids)
    assert all(re.fullmatch(r"[0-9A-F]{16,32}", identifier) for identifier in ids)


def test_times_are_text_with_the_offset_of_the_writer(bridge: SyntheticBridge) -> None:
    sast = timezone(timedelta(hours=2))
    for instant in (datetime(2025, 11, 11, 10, tzinfo=UTC), datetime(2025, 11, 11, 10, tzinfo=sast)):
        bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="", timestamp=instant)
    bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="")
    early, late, now = (row[0] for row in rows(bridge.messages_db, "SELECT timestamp FROM messages"))
    assert (early, late) == ("2025-11-11 10:00:00+00:00", "2025-11-11 10:00:00+02:00")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+02:00", str(now))


def test_files_use_a_rollback_journal(bridge: SyntheticBridge) -> None:
    for path in (bridge.messages_db, bridge.whatsapp_db):
        assert rows(path, "PRAGMA journal_mode") == [("delete",)]


def test_a_phone_has_one_lid_and_a_lid_may_change_its_phone(bridge: SyntheticBridge) -> None:
    bridge.map_lid("100000000000017", "27711234567")
    bridge.map_lid("90000000000019", "27711234567")
    assert rows(bridge.whatsapp_db, "SELECT lid, pn FROM whatsmeow_lid_map") == [
        ("90000000000019", "27711234567")
    ]
    bridge.map_lid("90000000000019", "263712345678")
    assert rows(bridge.whatsapp_db, "SELECT pn FROM whatsmeow_lid_map") == [("263712345678",)]


def test_a_reader_that_holds_its_transaction_is_found_out(
    bridge: SyntheticBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.demo.bridge._BUSY_LIMIT_SECONDS", 0.05)
    bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="DR1000001")
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM messages").fetchall()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="DR1000002")


def test_the_stream_of_posts_is_repeatable_and_tells_the_truth_about_its_drops() -> None:
    posts = list(islice(messages(7), 500))
    assert posts == list(islice(messages(7), 500))
    assert posts != list(islice(messages(8), 500))
    for post in posts:
        found = re.findall(r"DR ?(\d{6,8})(?!\d)", post.content, re.IGNORECASE)
        assert tuple(f"DR{digits}" for digits in found) == post.drops


def test_the_stream_holds_every_kind_of_post() -> None:
    posts = list(islice(messages(7), 500))
    seen: set[str] = set()
    again = 0
    for post in posts:
        again += len(seen.intersection(post.drops))
        seen.update(post.drops)
    assert again
    assert any(len(post.drops) > 1 for post in posts)
    assert any(not post.drops and post.content for post in posts)
    assert any(post.media_type == "image" for post in posts)
    assert {post.sender for post in posts} == set(SENDERS)


def test_lids_are_no_phones_and_phones_are(bridge: SyntheticBridge) -> None:
    fill_map(bridge)
    assert len(rows(bridge.whatsapp_db, "SELECT * FROM whatsmeow_lid_map")) == len(MAPPED_LIDS)
    for lid, phone in (*MAPPED_LIDS, UNMAPPED_LID):
        assert not phonenumbers.is_valid_number(phonenumbers.parse(f"+{lid}"))
        assert phonenumbers.is_valid_number(phonenumbers.parse(f"+{phone}"))
