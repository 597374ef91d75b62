"""Reading the bridge: real SQLite files, a real writer, and rowids that stop meaning what they meant."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest

from monitor.bridge import LOOK_BACK_ROWS, Bridge
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.errors import (
    BridgeBusyError,
    BridgeFormatError,
    BridgeMissingError,
    BridgeSchemaError,
    MapUnavailableError,
)
from monitor.messages import Message, Place, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PHONE = "27711234567"
LID = "100000000000017"


@pytest.fixture
def reader(bridge: SyntheticBridge) -> Iterator[Bridge]:
    with closing(Bridge(bridge.messages_db)) as opened:
        yield opened


def _post(bridge: SyntheticBridge, content: str, message_id: str | None = None) -> str:
    return bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=content, message_id=message_id)


def _texts(rows: object) -> list[str]:
    return [row.content for row in rows if isinstance(row, Message)]  # type: ignore[attr-defined]


def test_rows_come_in_order_of_arrival_whatever_their_ids_and_times(
    bridge: SyntheticBridge, reader: Bridge
) -> None:
    long_ago = datetime(2026, 1, 1, tzinfo=UTC)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="first", message_id="FF")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="second", message_id="00", timestamp=long_ago)
    page = reader.read_after(Place(), 10)
    assert _texts(page.rows) == ["first", "second"]
    assert page.end.rowid == 2
    assert reader.read_after(page.end, 10).rows == ()


def test_limit_is_kept_and_the_rest_follows(bridge: SyntheticBridge, reader: Bridge) -> None:
    for number in range(5):
        _post(bridge, str(number))
    first = reader.read_after(Place(), 2)
    second = reader.read_after(first.end, 2)
    assert _texts(first.rows) + _texts(second.rows) == ["0", "1", "2", "3"]


def test_both_offsets_of_one_column_become_the_same_instants(bridge: SyntheticBridge, reader: Bridge) -> None:
    noon = datetime(2026, 11, 23, 12, tzinfo=timezone(timedelta(hours=2)))
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="a", timestamp=noon)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="b", timestamp=noon.astimezone(UTC))
    first, second = reader.read_after(Place(), 10).rows
    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert first.sent_at == second.sent_at == noon


def _insert(bridge: SyntheticBridge, **columns: object) -> None:
    values = {
        "id": "3A00",
        "chat_jid": NORTHFIELD,
        "sender": PHONE,
        "content": "DR1000001",
        "timestamp": "2026-11-23 10:00:00+02:00",
        "is_from_me": 0,
        **columns,
    }
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute(
            f"INSERT INTO messages ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})",  # noqa: S608 -- names of this test
            tuple(values.values()),
        )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"timestamp": "2026-11-23 10:00:00"}, "offset"),
        ({"timestamp": "soon"}, "no time"),
        ({"timestamp": None}, "not text"),
        ({"timestamp": 1763892000}, "not text"),
        ({"content": "DR1000001\0"}, "NUL"),
        ({"sender": "2771\0"}, "NUL"),
        ({"id": "3A\0"}, "NUL"),
        ({"content": b"DR1000001\xff"}, "UTF-8"),
    ],
)
def test_row_that_can_be_no_message_says_why_and_spoils_no_other(
    bridge: SyntheticBridge, reader: Bridge, columns: dict[str, object], reason: str
) -> None:
    _insert(bridge, **columns)
    _post(bridge, "fine")
    bad, good = reader.read_after(Place(), 10).rows
    assert isinstance(bad, Unreadable)
    assert reason in bad.reason
    assert "\0" not in bad.key
    assert isinstance(good, Message)


def test_text_that_is_not_utf8_spoils_only_its_own_message(bridge: SyntheticBridge, reader: Bridge) -> None:
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute(
            "INSERT INTO messages (id, chat_jid, sender, content, timestamp, is_from_me)"
            " VALUES ('3A01', ?, ?, CAST(x'4452ff' AS TEXT), '2026-11-23 10:00:00+02:00', 0)",
            (NORTHFIELD, PHONE),
        )
    _post(bridge, "fine")
    bad, good = reader.read_after(Place(), 10).rows
    assert isinstance(bad, Unreadable)
    assert isinstance(good, Message)


def test_empty_ids_are_told_apart_by_their_content(bridge: SyntheticBridge, reader: Bridge) -> None:
    _post(bridge, "one", message_id="")
    first = reader.read_after(Place(), 10)
    _post(bridge, "two", message_id="")
    second = reader.read_after(Place(), 10)
    assert first.rows[0].key != second.rows[0].key


def test_redelivery_of_an_old_message_arrives_again(bridge: SyntheticBridge, reader: Bridge) -> None:
    _post(bridge, "old", message_id="3A")
    _post(bridge, "new", message_id="3B")
    end = reader.read_after(Place(), 10).end
    _post(bridge, "old", message_id="3A")
    assert _texts(reader.read_after(end, 10).rows) == ["old"]


def test_redelivery_of_the_newest_message_rescans_a_window(bridge: SyntheticBridge, reader: Bridge) -> None:
    for number in range(LOOK_BACK_ROWS + 10):
        _insert(bridge, id=f"3A{number:06}")
    end = reader.end()
    _insert_or_replace_last(bridge, end)
    page = reader.read_after(end, 10)
    assert page.rows == ()
    assert page.rescan_from == end.rowid - LOOK_BACK_ROWS


def _insert_or_replace_last(bridge: SyntheticBridge, end: Place) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001", message_id=end.key)


def test_replaced_file_is_read_from_the_beginning(
    bridge: SyntheticBridge, reader: Bridge, tmp_path: Path
) -> None:
    _post(bridge, "before")
    end = reader.read_after(Place(), 10).end
    other = SyntheticBridge(tmp_path / "other")
    other.create()
    for text in ("a", "b", "c"):
        _post(other, text)
    shutil.move(other.messages_db, bridge.messages_db)
    page = reader.read_after(end, 10)
    assert page.rescan_from == 0
    assert _texts(reader.read_after(Place(file=page.end.file), 10).rows) == ["a", "b", "c"]


def test_reused_rowid_is_noticed(bridge: SyntheticBridge, reader: Bridge) -> None:
    _post(bridge, "one")
    _post(bridge, "two")
    end = reader.read_after(Place(), 10).end
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM messages WHERE rowid = 2")
    _post(bridge, "three")
    assert reader.read_after(end, 10).rescan_from == 0


def test_file_that_lost_rows_is_noticed(bridge: SyntheticBridge, reader: Bridge) -> None:
    _post(bridge, "one")
    _post(bridge, "two")
    end = reader.read_after(Place(), 10).end
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM messages WHERE rowid = 2")
    assert reader.read_after(end, 10).rescan_from == 0


def test_map_is_read_in_both_directions_with_the_own_account(bridge: SyntheticBridge, reader: Bridge) -> None:
    bridge.map_lid(LID, PHONE)
    bridge.set_device("12015550123:7@s.whatsapp.net", "100000000000099:7@lid")
    known = reader.known()
    assert known.phone_of == {LID: PHONE}
    assert known.lid_of == {PHONE: LID}
    assert known.own == {"12015550123", "100000000000099"}


def test_map_is_read_again_only_after_a_change(bridge: SyntheticBridge, reader: Bridge) -> None:
    first = reader.known()
    assert reader.known() is first
    bridge.map_lid(LID, PHONE)
    assert reader.known().phone_of == {LID: PHONE}


def test_unavailable_map_is_an_error_and_never_an_empty_map(bridge: SyntheticBridge, reader: Bridge) -> None:
    bridge.whatsapp_db.unlink()
    with pytest.raises(MapUnavailableError, match="map is unavailable"):
        reader.known()
    assert not bridge.whatsapp_db.exists()


def test_missing_file_is_named_and_not_created(tmp_path: Path) -> None:
    path = tmp_path / "no" / "messages.db"
    with closing(Bridge(path)) as reader, pytest.raises(BridgeMissingError, match="WHATSAPP_DB_PATH"):
        reader.end()
    assert not path.exists()


def test_file_that_is_no_database_is_named(bridge: SyntheticBridge, reader: Bridge) -> None:
    bridge.messages_db.write_bytes(b"no database at all, only some text" * 100)
    with pytest.raises(BridgeFormatError, match=r"messages\.db"):
        reader.end()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("DROP TABLE messages", "no table messages"),
        ("ALTER TABLE messages RENAME COLUMN sender TO author", "lacks the column sender"),
    ],
)
def test_other_schema_is_named(bridge: SyntheticBridge, change: str, word: str) -> None:
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("PRAGMA foreign_keys = off")
        connection.execute(change)
    with closing(Bridge(bridge.messages_db)) as reader, pytest.raises(BridgeSchemaError, match=word):
        reader.end()


def test_locked_database_is_an_error_to_be_tried_again(
    bridge: SyntheticBridge, reader: Bridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("monitor.bridge.BUSY_TIMEOUT_SECONDS", 0.05)
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        with pytest.raises(BridgeBusyError, match="locked"):
            reader.end()
        writer.execute("ROLLBACK")
    assert reader.end().rowid == 0


def test_reader_never_keeps_the_writer_waiting(bridge: SyntheticBridge, reader: Bridge) -> None:
    _post(bridge, "one")
    page = reader.read_after(Place(), 10)
    reader.known()
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None, timeout=0)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        writer.execute("ROLLBACK")
    assert len(page.rows) == 1


@pytest.mark.parametrize("name", ["with space", "what?", "per%cent", "ha#sh", "ümlaut"])
def test_path_with_special_characters_is_opened(tmp_path: Path, name: str) -> None:
    bridge = SyntheticBridge(tmp_path / name)
    bridge.create()
    _post(bridge, "one")
    with closing(Bridge(bridge.messages_db)) as reader:
        assert _texts(reader.read_after(Place(), 10).rows) == ["one"]
        assert reader.known().phone_of == {}


def test_bridge_with_a_write_ahead_log_is_read_while_it_writes_and_after_it_ended(
    bridge: SyntheticBridge,
) -> None:
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = wal")
        bridge.post(chat_jid=NORTHFIELD, sender="27711234567", content="one")
        with closing(Bridge(bridge.messages_db)) as reader:
            assert len(reader.read_after(Place(), 10).rows) == 1
            writer.execute("BEGIN IMMEDIATE")
            writer.execute("UPDATE messages SET content = 'two'")
            ((first,),) = [[row.content for row in reader.read_after(Place(), 10).rows]]
            assert first == "one"
            writer.execute("COMMIT")
            assert [row.content for row in reader.read_after(Place(), 10).rows] == ["two"]
            assert (bridge.folder / "messages.db-wal").exists()
    with closing(Bridge(bridge.messages_db)) as reader:
        assert [row.content for row in reader.read_after(Place(), 10).rows] == ["two"]
