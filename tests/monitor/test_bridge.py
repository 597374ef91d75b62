"""Reading the bridge: real SQLite files, a real writer, and rowids that stop meaning what they meant."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from monitor.bridge import LOOK_BACK_ROWS, Bridge
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.errors import (
    BridgeBusyError,
    BridgeError,
    BridgeFormatError,
    BridgeMissingError,
    BridgeSchemaError,
    MapUnavailableError,
)
from monitor.messages import Message, Place, Unreadable

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[2]
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


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-23 10:00:00+02:00",
        "2026-11-23T08:00:00Z",
        "2026-11-23 10:00:00+0200",
        "2026-11-23 08:00:00.000000000+00:00",
        "2026-11-23 10:00:00 +0200 SAST",
        "2026-11-23 08:00:00 +0000 UTC",
        "2026-11-23 08:00:00 +0000 +0000",
        "2026-11-23 10:00:00.0000001 +0200 SAST m=+12.345678901",
    ],
)
def test_every_spelling_of_an_instant_is_the_same_instant(
    bridge: SyntheticBridge, reader: Bridge, text: str
) -> None:
    _insert(bridge, timestamp=text)
    (message,) = reader.read_after(Place(), 10).rows
    assert isinstance(message, Message)
    assert message.sent_at == datetime(2026, 11, 23, 8, tzinfo=UTC)


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


def test_message_with_an_empty_id_stays_the_same_in_another_zone_and_spelling_of_its_sender(
    bridge: SyntheticBridge, reader: Bridge
) -> None:
    keys = []
    for time, sender in [
        ("2026-11-11 12:25:30+02:00", PHONE),
        ("2026-11-11 10:25:30+00:00", f"{PHONE}:3@s.whatsapp.net"),
    ]:
        _insert(bridge, id="", timestamp=time, sender=sender)
        (row,) = reader.read_after(Place(), 10).rows
        keys.append(row.key)
        with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
            connection.execute("DELETE FROM messages")
    assert keys[0] == keys[1]


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


def _restore(bridge: SyntheticBridge, backup: bytes) -> None:
    """Write a backup over the file, which stays the same one."""
    bridge.messages_db.write_bytes(backup)


def test_backup_that_grew_beyond_the_place_over_a_gap_is_read_from_the_beginning(
    bridge: SyntheticBridge,
) -> None:
    _post(bridge, "old")
    backup = bridge.messages_db.read_bytes()
    rows = LOOK_BACK_ROWS + 10
    _many(bridge, "lost", rows)
    with closing(Bridge(bridge.messages_db)) as reader:
        end = reader.read_after(Place(), rows + 10).end
    _restore(bridge, backup)
    _many(bridge, "new", rows + 10)
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM messages WHERE rowid = ?", (end.rowid,))
    with closing(Bridge(bridge.messages_db)) as reader:
        assert reader.read_after(end, 10).rescan_from == 0


def test_backup_below_a_place_that_was_just_gone_back_to_is_read_from_the_beginning(
    bridge: SyntheticBridge,
) -> None:
    _post(bridge, "old")
    with closing(Bridge(bridge.messages_db)) as reader:
        file = reader.end().file
        assert reader.read_after(Place(rowid=5000, file=file), 10).rescan_from == 0
        assert reader.read_after(Place(rowid=1, file=file), 10).rescan_from is None


def _many(bridge: SyntheticBridge, prefix: str, rows: int) -> None:
    with closing(sqlite3.connect(bridge.messages_db)) as connection:
        connection.executemany(
            "INSERT INTO messages (id, chat_jid, sender, content, timestamp, is_from_me)"
            " VALUES (?, ?, ?, '', '2026-11-23 10:00:00+02:00', 0)",
            [(f"{prefix}{number}", NORTHFIELD, PHONE) for number in range(rows)],
        )
        connection.commit()


def test_map_that_was_away_meanwhile_is_read_again(bridge: SyntheticBridge, reader: Bridge) -> None:
    assert reader.known().phone_of == {}
    away = bridge.whatsapp_db.rename(bridge.folder / "away")
    with pytest.raises(MapUnavailableError):
        reader.known()
    with closing(sqlite3.connect(away, isolation_level=None)) as connection:
        connection.execute("INSERT INTO whatsmeow_lid_map VALUES (?, ?)", (LID, PHONE))
    away.rename(bridge.whatsapp_db)
    assert reader.known().phone_of == {LID: PHONE}


def test_map_is_cut_to_user_parts_and_what_is_nobody_is_left_out(
    bridge: SyntheticBridge, reader: Bridge
) -> None:
    with closing(sqlite3.connect(bridge.whatsapp_db, isolation_level=None)) as connection:
        connection.executemany(
            "INSERT INTO whatsmeow_lid_map VALUES (?, ?)",
            [
                (f"{LID}:7@lid", f"{PHONE}.0:3@s.whatsapp.net"),
                ("", "1"),
                ("\0", "2"),
                (b"\xff", "3"),
                ("\u00b2" * 14, "4"),
                ("90000000000019", "\u0662" * 11),
            ],
        )
    known = reader.known()
    assert known.phone_of == {LID: PHONE}
    assert known.lid_of == {PHONE: LID}
    assert known.lids == {LID, "90000000000019"}


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
    bridge.set_device("12015550123:7@s.whatsapp.net", "100000000000099:7@lid")
    second = reader.known()
    assert second is not first
    with closing(sqlite3.connect(bridge.whatsapp_db, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE another (a)")
    assert reader.known() is second
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


def test_transaction_that_a_killed_bridge_left_is_waited_for(bridge: SyntheticBridge, tmp_path: Path) -> None:
    _post(bridge, "before")
    killed = tmp_path / "killed"
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("PRAGMA cache_size = 1")
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            "INSERT INTO messages (id, chat_jid, content) VALUES (?, ?, ?)",
            [(str(number), NORTHFIELD, "x" * 500) for number in range(500)],
        )
        shutil.copytree(bridge.folder, killed)
    with closing(Bridge(killed / "messages.db")) as reader:
        with pytest.raises(BridgeError, match="did not finish"):
            reader.read_after(Place(), 10)
        with closing(sqlite3.connect(killed / "messages.db")) as bridge_again:
            bridge_again.execute("SELECT count(*) FROM messages").fetchall()
        assert _texts(reader.read_after(Place(), 10).rows) == ["before"]


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


def test_bridge_that_rests_with_a_write_ahead_log_is_read_without_leaving_a_file(
    bridge: SyntheticBridge, reader: Bridge
) -> None:
    _write_ahead(bridge)
    _post(bridge, "one")
    before = sorted(bridge.folder.iterdir())
    assert _texts(reader.read_after(Place(), 10).rows) == ["one"]
    assert reader.known().phone_of == {}
    assert sorted(bridge.folder.iterdir()) == before
    _post(bridge, "two")  # it wrote, and ended again
    bridge.map_lid(LID, PHONE)
    assert sorted(bridge.folder.iterdir()) == before
    assert _texts(reader.read_after(Place(), 10).rows) == ["one", "two"]
    assert reader.known().phone_of == {LID: PHONE}
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        writer.execute("INSERT OR REPLACE INTO chats VALUES ('x', '', '')")
        _post(bridge, "three")
        assert _texts(reader.read_after(Place(), 10).rows) == ["one", "two", "three"]
    _post(bridge, "four")
    assert _texts(reader.read_after(Place(), 10).rows) == ["one", "two", "three", "four"]


def _write_ahead(bridge: SyntheticBridge) -> None:
    for path in (bridge.messages_db, bridge.whatsapp_db):
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA journal_mode = wal").fetchone() == ("wal",)


_ON_A_READ_ONLY_MOUNT = """
import sys
from pathlib import Path
from monitor.bridge import Bridge
from monitor.messages import Place
reader = Bridge(Path(sys.argv[1]))
for line in sys.stdin:
    print(len(reader.read_after(Place(), 10).rows), len(reader.known().phone_of), flush=True)
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
@pytest.mark.parametrize("is_up", [True, False])
def test_bridge_on_a_read_only_mount_is_read_in_every_state(
    bridge: SyntheticBridge, tmp_path: Path, mode: str, is_up: bool
) -> None:
    if mode == "wal":
        _write_ahead(bridge)
    mount = tmp_path / "mount"
    mount.mkdir()
    script = 'mount --bind "$1" "$2" && mount -o remount,bind,ro "$2" && exec "$3" -c "$4" "$2/messages.db"'
    given = [str(bridge.folder), str(mount), sys.executable, _ON_A_READ_ONLY_MOUNT]
    reader = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh", *given],  # noqa: S607
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stderr is not None
        _post(bridge, "one")
        if is_up:
            writer.execute("INSERT OR REPLACE INTO chats VALUES ('x', '', '')")
        else:
            writer.close()
        seen = []
        for number in range(2):
            reader.stdin.write("\n")
            reader.stdin.flush()
            seen.append(reader.stdout.readline())
            bridge.map_lid(LID, PHONE)
            _post(bridge, f"later {number}")
    _, complaint = reader.communicate(timeout=30)
    if "unshare" in complaint or "mount:" in complaint:
        pytest.skip(f"no mount of one's own here: a bridge on a read-only mount ({complaint.strip()[-80:]})")
    assert seen == ["1 0\n", "2 1\n"], complaint
