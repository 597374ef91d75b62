"""The relay, end to end: a real bridge in, rows of a real PostgreSQL out."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from monitor.demo.bridge import EASTVALE, NORTHFIELD, WESTMOOR, SyntheticBridge, messages
from monitor.errors import BridgeMissingError, ConfigError, StoreSchemaError
from monitor.judgement import PENDING_NAME, UNKNOWN_NAME
from monitor.settings import Since

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from monitor.metrics import MonitorMetrics

    Rows = Callable[..., list[tuple[Any, ...]]]
    RelayOnce = Callable[..., MonitorMetrics]

PHONE = "27711234567"
OTHER_PHONE = "263712345678"
LID = "100000000000017"
LATE_LID = "3000000000013"
SENDERS = (
    "SELECT drop_number, submitted_by, user_name, resubmitted FROM qa_photo_reviews ORDER BY drop_number"
)


def _post(bridge: SyntheticBridge, sender: str, content: str, **more: Any) -> str:
    return bridge.post(chat_jid=more.pop("chat_jid", NORTHFIELD), sender=sender, content=content, **more)


def _outcomes(rows: Rows) -> dict[str, int]:
    return dict(rows("SELECT outcome, count(*) FROM wa_monitor.message GROUP BY 1"))


# one sender, both paths: {new, resubmission} x {phone, LID mapped, LID unmapped, LID mapped later, full
# address}


@pytest.mark.parametrize(
    ("sender", "stored"),
    [
        (PHONE, (PHONE, PHONE)),
        (LID, (PHONE, PHONE)),
        (f"{LID}@lid", (PHONE, PHONE)),
        (f"{LID}:12@lid", (PHONE, PHONE)),
        (f"{PHONE}:3@s.whatsapp.net", (PHONE, PHONE)),
        (LATE_LID, (None, PENDING_NAME)),
        (f"{LATE_LID}@lid", (None, PENDING_NAME)),
        ("120363000000000001", (None, UNKNOWN_NAME)),
    ],
)
def test_new_drop_shows_a_phone_or_nobody(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, sender: str, stored: tuple[str | None, str]
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, sender, "DR1000001 done")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", *stored, False)]


@pytest.mark.parametrize(
    ("sender", "stored"),
    [
        (PHONE, (PHONE, PHONE)),
        (LID, (PHONE, PHONE)),
        (f"{LID}@lid", (PHONE, PHONE)),
        (f"{PHONE}:3@s.whatsapp.net", (PHONE, PHONE)),
        (LATE_LID, (OTHER_PHONE, OTHER_PHONE)),
        (f"{LATE_LID}@lid", (OTHER_PHONE, OTHER_PHONE)),
    ],
)
def test_resubmission_shows_the_new_sender_once_it_has_a_phone(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, sender: str, stored: tuple[str, str]
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, f"{OTHER_PHONE}@s.whatsapp.net", "DR1000001 done")
    relay_once()
    _post(bridge, sender, "DR1000001 fixed")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", *stored, True)]


@pytest.mark.parametrize(
    ("before", "stored"),
    [
        ((LATE_LID, LATE_LID), (None, PENDING_NAME)),
        ((f"{LATE_LID}:3@lid", "typed by hand"), (None, "typed by hand")),
        ((PHONE, LATE_LID), (PHONE, PENDING_NAME)),
        ((PHONE, PHONE), (PHONE, PHONE)),
    ],
)
def test_incident_05_resubmission_does_not_leave_the_lid_of_its_sender_in_an_old_row(
    relay_once: RelayOnce,
    bridge: SyntheticBridge,
    rows: Rows,
    before: tuple[str, str],
    stored: tuple[str, str],
) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, project, submitted_by, user_name)"
        " VALUES ('DR1000001', 'Northfield', %s, %s)",
        *before,
    )
    rows("INSERT INTO wa_monitor.adopted_row (review_id) SELECT id::text FROM qa_photo_reviews")
    _post(bridge, LATE_LID, "DR1000001 fixed")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", *stored, True)]
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    relay_once()
    assert rows("SELECT submitted_by FROM qa_photo_reviews") == [(OTHER_PHONE,)]


@pytest.mark.parametrize("first", [LATE_LID, f"{LATE_LID}@lid"])
def test_pending_sender_is_completed_when_the_map_learns_it_and_nothing_else_changes(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, first: str
) -> None:
    _post(bridge, first, "DR1000001 done")
    relay_once()
    before = rows("SELECT to_jsonb(r) - 'submitted_by' - 'user_name' FROM qa_photo_reviews r")
    assert rows("SELECT count(*) FROM wa_monitor.pending") == [(1,)]
    bridge.map_lid(LATE_LID, PHONE)
    relay_once()
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, False)]
    assert rows("SELECT to_jsonb(r) - 'submitted_by' - 'user_name' FROM qa_photo_reviews r") == before
    assert rows("SELECT count(*) FROM wa_monitor.pending") == [(0,)]
    assert rows("SELECT lid, phone, resolved_at IS NOT NULL FROM wa_monitor.drop_event") == [
        (LATE_LID, PHONE, True)
    ]


def test_resubmission_by_a_phone_takes_the_row_over_from_a_pending_sender(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, LATE_LID, "DR1000001")
    _post(bridge, LID, "DR1000001 fixed")
    relay_once()
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    relay_once()
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, True)]


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_row_shows_the_last_poster_who_is_known_in_whatever_order_the_map_learns_them(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, order: tuple[int, int], batches: int
) -> None:
    waiting = [(LATE_LID, OTHER_PHONE), ("90000000000027", "447400123456")]
    for sender in (PHONE, *(lid for lid, _ in waiting)):
        _post(bridge, sender, "DR1000001")
        if batches > 1:
            relay_once()
    relay_once()
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, True)]
    for one in order:
        bridge.map_lid(*waiting[one])
        relay_once()
        assert rows(SENDERS) == [("DR1000001", *[waiting[max(one, order[0])][1]] * 2, True)]
    assert rows("SELECT 1 FROM wa_monitor.pending") == []


def test_sender_that_somebody_put_into_the_row_meanwhile_stays(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001")
    _post(bridge, LATE_LID, "DR1000001")
    relay_once()
    rows("UPDATE qa_photo_reviews SET submitted_by = '27821234567'")
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    relay_once()
    assert rows("SELECT submitted_by FROM qa_photo_reviews") == [("27821234567",)]


def test_lid_that_the_map_has_forgotten_is_no_phone_in_a_late_message(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid("27831234560", PHONE)  # in the shape of a phone
    relay_once()
    bridge.map_lid(LID, PHONE)
    _post(bridge, "27831234560", "DR1000001")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", None, PENDING_NAME, False)]


def test_own_post_that_counts_is_completed_when_the_map_learns_its_sender(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.set_device(f"{PHONE}:7@s.whatsapp.net", f"{LATE_LID}:7@lid")
    _post(bridge, LATE_LID, "DR1000001")
    relay_once(store_own_messages=True)
    bridge.map_lid(LATE_LID, PHONE)
    relay_once(store_own_messages=True)
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, False)]


def test_nobody_waits_for_a_row_that_a_phone_took_over_in_the_same_batch(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, LATE_LID, "DR1000001 DR1000002")
    _post(bridge, PHONE, "DR1000001")
    relay_once()
    assert rows("SELECT drop_number FROM wa_monitor.pending") == [("DR1000002",)]


def test_lid_that_gets_another_phone_changes_no_stored_row(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, LID, "DR1000001")
    relay_once()
    bridge.map_lid(LID, OTHER_PHONE)
    _post(bridge, LID, "DR1000002")
    relay_once()
    assert [row[:2] for row in rows(SENDERS)] == [("DR1000001", PHONE), ("DR1000002", OTHER_PHONE)]
    assert rows("SELECT phone FROM wa_monitor.lid_seen WHERE lid = %s ORDER BY phone", LID) == [
        (OTHER_PHONE,),
        (PHONE,),
    ]


# what a row holds


def test_new_drop_carries_message_time_and_local_day(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    late_in_utc = datetime(2026, 11, 22, 22, 30, tzinfo=UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=late_in_utc)
    relay_once()
    ((number, project, day, sent_at, comment),) = rows(
        "SELECT drop_number, project, review_date::text, whatsapp_message_date, comment FROM qa_photo_reviews"
    )
    assert (number, project, day) == ("DR1000001", "Northfield", "2026-11-23")
    assert sent_at == late_in_utc
    assert "2026-11-23 00:30 SAST" in comment


def test_resubmission_starts_the_review_over_and_keeps_steps_day_and_comment(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    first = datetime(2026, 11, 20, 10, tzinfo=UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=first)
    relay_once()
    rows(
        "UPDATE qa_photo_reviews SET incomplete = true, feedback_sent = now(), completed = true,"
        " step_01_house_photo = true, comment = 'blurred', locked_by = 'reviewer'"
    )
    _post(bridge, PHONE, "DR1000001 again", timestamp=first + timedelta(days=2))
    relay_once()
    assert rows(
        "SELECT incomplete, feedback_sent, completed, step_01_house_photo, resubmitted, locked_by,"
        " review_date::text, whatsapp_message_date FROM qa_photo_reviews"
    ) == [(False, None, True, True, True, "reviewer", "2026-11-20", first)]
    ((comment,),) = rows("SELECT comment FROM qa_photo_reviews")
    assert comment.startswith("blurred\n")
    assert "2026-11-22 12:00 SAST" in comment


def test_row_of_the_old_monitor_counts_as_the_drop_that_is_resubmitted(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, table: Callable[..., None]
) -> None:
    table()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, review_date, user_name, project)"
        " VALUES ('DR1000001', '2026-01-01', 'typed by hand', 'Eastvale')"
    )
    _post(bridge, PHONE, "DR1000001")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, True)]


def test_other_drop_space_makes_a_new_drop(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, projects_file: Path
) -> None:
    text = projects_file.read_text()
    projects_file.write_text(
        text.replace("  - name: Eastvale\n", "  - name: Eastvale\n    drop_space: east\n")
    )
    day = datetime(2026, 11, 20, 10, tzinfo=UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=day)
    _post(bridge, PHONE, "DR1000001", chat_jid=EASTVALE, timestamp=day + timedelta(days=1))
    relay_once()
    assert rows("SELECT project, resubmitted FROM qa_photo_reviews ORDER BY 1") == [
        ("Eastvale", False),
        ("Northfield", False),
    ]


def test_all_drops_of_a_message_are_stored_each_once(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000002, dr 1000001 and DR1000002")
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000001", "DR1000002"]
    assert not any(row[3] for row in rows(SENDERS))


def test_same_drop_by_two_people_in_one_batch_is_new_and_resubmitted(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, "27821234567", "DR1000001")
    _post(bridge, LID, "DR1000001")
    relay_once()
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, True)]
    assert rows("SELECT kind FROM wa_monitor.drop_event ORDER BY kind") == [("new",), ("resubmission",)]


# what is left alone


def test_message_that_comes_again_changes_nothing(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    sent_at = datetime(2026, 11, 23, 10, tzinfo=UTC)
    message_id = _post(bridge, LID, "DR1000001", timestamp=sent_at)
    _post(bridge, PHONE, "DR1000002")
    relay_once()
    before = rows("SELECT to_jsonb(r) FROM qa_photo_reviews r ORDER BY drop_number")
    _post(bridge, f"{LID}@lid", "DR1000001", message_id=message_id, timestamp=sent_at)
    relay_once()
    assert rows("SELECT to_jsonb(r) FROM qa_photo_reviews r ORDER BY drop_number") == before


def test_edited_message_adds_only_its_new_drops(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    message_id = _post(bridge, PHONE, "DR1000001")
    relay_once()
    _post(bridge, PHONE, "DR1000001 DR1000002", message_id=message_id)
    relay_once()
    assert [(row[0], row[3]) for row in rows(SENDERS)] == [("DR1000001", False), ("DR1000002", False)]


def test_own_messages_submit_nothing_under_either_identity(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.set_device("12015550123:7@s.whatsapp.net", "100000000000099:7@lid")
    _post(bridge, PHONE, "Invalid Drop Number DR1000001", is_from_me=True)
    _post(bridge, "12015550123", "DR1000002")
    _post(bridge, "100000000000099@lid", "DR1000003")
    relay_once()
    assert rows(SENDERS) == []
    assert _outcomes(rows) == {"own_message": 3}


def test_posts_from_the_bridges_phone_can_be_stored_by_choice(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.set_device(f"{PHONE}:7@s.whatsapp.net", None)
    _post(bridge, PHONE, "DR1000001", is_from_me=True)
    relay_once(store_own_messages=True)
    assert rows(SENDERS) == [("DR1000001", PHONE, PHONE, False)]


def test_unknown_and_disabled_groups_store_no_drop_and_enter_the_ledger(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001", chat_jid="120363000000000009@g.us")
    _post(bridge, PHONE, "DR1000002", chat_jid=WESTMOOR)
    _post(bridge, PHONE, "Morning")
    relay_once()
    assert rows(SENDERS) == []
    assert _outcomes(rows) == {"other_chat": 1, "disabled_project": 1, "no_drop": 1}


# where to begin


def test_first_start_without_since_is_refused_and_creates_no_cursor(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001")
    with pytest.raises(ConfigError, match="--since"):
        relay_once(since=None)
    assert rows("SELECT count(*) FROM wa_monitor.cursor") == [(0,)]
    assert rows(SENDERS) == []


def test_since_leaves_out_what_was_sent_before_also_when_it_arrives_later(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    start = datetime(2026, 11, 20, tzinfo=UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=start - timedelta(seconds=1))
    _post(bridge, PHONE, "DR1000002", timestamp=start)
    relay_once(since=Since(start))
    _post(bridge, PHONE, "DR1000003", timestamp=start - timedelta(days=9))
    _post(bridge, PHONE, "DR1000004", timestamp=start + timedelta(days=1))
    relay_once(since=None)
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002", "DR1000004"]


def test_since_now_leaves_the_backlog_alone(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    now = datetime.now(UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=now - timedelta(hours=1))
    relay_once(since=Since(now, now=True))
    _post(bridge, PHONE, "DR1000002", timestamp=now + timedelta(seconds=1))
    relay_once(since=None)
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002"]


def test_since_now_takes_what_arrives_later_though_it_was_sent_earlier(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    _post(bridge, PHONE, "DR1000001", timestamp=now - timedelta(hours=1))
    relay_once(since=Since(now, now=True))
    _post(bridge, PHONE, "DR1000002", timestamp=now - timedelta(seconds=5))
    relay_once(since=None)
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002"]
    copied = tmp_path / "copied.db"
    shutil.copy(bridge.messages_db, copied)
    shutil.move(copied, bridge.messages_db)  # everything is read again; the backlog stays what it was
    relay_once(since=None)
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002"]


def test_message_of_a_group_that_was_misspelt_is_stored_when_it_is_read_again(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, projects_file: Path
) -> None:
    right = projects_file.read_text()
    projects_file.write_text(right.replace(NORTHFIELD, "120363000000000099@g.us"))
    _post(bridge, PHONE, "DR1000001")
    _post(bridge, PHONE, "DR1000002", chat_jid=WESTMOOR)
    relay_once()
    assert _outcomes(rows) == {"other_chat": 1, "disabled_project": 1}
    projects_file.write_text(right.replace("enabled: false", "enabled: true"))
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000001", "DR1000002"]


def test_second_start_goes_on_where_the_first_ended(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001")
    relay_once()
    _post(bridge, PHONE, "DR1000002")
    relay_once(since=None)
    assert len(rows(SENDERS)) == 2
    assert rows("SELECT epoch, released, place_rowid FROM wa_monitor.cursor") == [(2, True, 2)]


# when the bridge's file is not what it was


def test_replaced_file_loses_and_doubles_nothing(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, tmp_path: Path
) -> None:
    known_ids = [_post(bridge, PHONE, f"DR100000{number}") for number in range(3)]
    relay_once()
    other = SyntheticBridge(tmp_path / "restored")
    other.create()
    _post(other, PHONE, "DR1000007")
    _post(other, PHONE, "DR1000000", message_id=known_ids[0])
    _post(other, PHONE, "DR1000008")
    shutil.move(other.messages_db, bridge.messages_db)
    relay_once()
    assert [(row[0], row[3]) for row in rows(SENDERS)] == [
        (f"DR100000{number}", False) for number in (0, 1, 2, 7, 8)
    ]


def test_older_backup_of_the_file_loses_nothing_that_comes_afterwards(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001")
    backup = bridge.messages_db.read_bytes()
    _post(bridge, PHONE, "DR1000002")
    _post(bridge, PHONE, "DR1000003")
    relay_once()
    bridge.messages_db.write_bytes(backup)
    _post(bridge, PHONE, "DR1000004")
    _post(bridge, PHONE, "DR1000005")
    relay_once()
    assert [(row[0], row[3]) for row in rows(SENDERS)] == [
        (f"DR100000{number}", False) for number in range(1, 6)
    ]


# messages that can never be stored


def test_poisoned_messages_become_dead_letters_and_hold_up_nobody(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001\0")
    _post(bridge, PHONE, "DR1000002", timestamp=datetime(2026, 11, 23, 10))  # noqa: DTZ001 -- no zone is the point
    _post(bridge, PHONE, "DR1000003")
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000003"]
    reasons = [reason for (reason,) in rows("SELECT reason FROM wa_monitor.dead_letter ORDER BY reason")]
    assert len(reasons) == 2
    assert "NUL" in reasons[0]
    assert "offset" in reasons[1]
    assert _outcomes(rows) == {"dead_letter": 2, "drops": 1}


@pytest.mark.parametrize(
    "written", ["9999-12-31 23:59:59+00:00", "0001-01-01 00:00:00+02:00", "2008-12-31 10:00:00+00:00"]
)
def test_time_that_cannot_be_meant_is_a_dead_letter_and_stops_nothing(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, written: str
) -> None:
    _post(bridge, PHONE, "DR1000001")
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("UPDATE messages SET timestamp = ?", (written,))
    _post(bridge, PHONE, "DR1000002")
    relay_once()
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002"]
    ((reason,),) = rows("SELECT reason FROM wa_monitor.dead_letter")
    assert "outside the years" in reason


def test_drop_that_a_constraint_refuses_becomes_a_dead_letter_alone(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD CHECK (drop_number <> 'DR1000002')")
    for number in (1, 2, 3):
        _post(bridge, PHONE, f"DR100000{number}")
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000001", "DR1000003"]
    assert rows("SELECT project FROM wa_monitor.dead_letter") == [("Northfield",)]


def test_drop_that_is_refused_keeps_no_other_of_its_message_from_being_stored(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD CONSTRAINT never CHECK (drop_number <> 'DR1000002')")
    _post(bridge, PHONE, "DR1000001 DR1000002 DR1000003")
    relay_once()
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000001", "DR1000003"]
    ((reason,),) = rows("SELECT reason FROM wa_monitor.dead_letter")
    assert "never" in reason
    rows("ALTER TABLE qa_photo_reviews DROP CONSTRAINT never")
    relay_once()
    relay_once()
    assert [(row[0], row[3]) for row in rows(SENDERS)] == [
        ("DR1000001", False),
        ("DR1000002", False),
        ("DR1000003", False),
    ]
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(0,)]
    assert rows("SELECT totals -> 'messages' -> 'Northfield' FROM wa_monitor.cursor") == [(1,)]


def test_drop_that_a_trigger_objects_to_becomes_a_dead_letter_alone(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    relay_once()
    rows(
        "CREATE FUNCTION object() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF NEW.drop_number = 'DR1000001' THEN RAISE 'not this one'; END IF; RETURN NEW; END $$"
    )
    rows("CREATE TRIGGER objection BEFORE INSERT ON qa_photo_reviews FOR EACH ROW EXECUTE FUNCTION object()")
    _post(bridge, PHONE, "DR1000001")
    _post(bridge, PHONE, "DR1000002")
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000002"]
    assert rows("SELECT reason FROM wa_monitor.dead_letter") == [("not this one",)]


def test_unreadable_message_of_a_foreign_group_is_no_dead_letter(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001\0", chat_jid="120363000000000009@g.us")
    _post(bridge, PHONE, "DR1000001\0", chat_jid=WESTMOOR)
    relay_once()
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(0,)]
    assert _outcomes(rows) == {"other_chat": 1, "disabled_project": 1}


def test_message_ids_and_chats_of_any_length_are_dealt_with(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, PHONE, "DR1000001", message_id="F" * 9000)
    _post(bridge, PHONE, "DR1000002", chat_jid="9" * 9000)
    _post(bridge, PHONE, "DR1000003")
    relay_once()
    assert [row[0] for row in rows(SENDERS)] == ["DR1000001", "DR1000003"]


def test_sender_that_the_table_refuses_goes_on_waiting_and_holds_up_no_other(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    _post(bridge, LATE_LID, "DR1000001")
    _post(bridge, LID, "DR1000002")
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD CHECK (submitted_by <> %s)".replace("%s", f"'{OTHER_PHONE}'"))
    bridge.map_lid(LATE_LID, OTHER_PHONE)
    bridge.map_lid(LID, PHONE)
    relay_once()
    assert [row[1] for row in rows(SENDERS)] == [None, PHONE]
    assert rows("SELECT drop_number FROM wa_monitor.pending") == [("DR1000001",)]


def _refused(metrics: MonitorMetrics) -> float:
    (family,) = [found for found in metrics.collect() if found.name == "wa_monitor_store_errors"]
    return next(sample.value for sample in family.samples if sample.labels["error"] == "store_refused")


def test_dead_letter_is_counted_and_stored_at_the_first_start_that_the_table_lets_it(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD CONSTRAINT no CHECK (drop_number <> 'DR1000002')")
    for number in (1, 2, 3, 4):
        _post(bridge, PHONE, f"DR100000{number}")
    assert _refused(relay_once()) == 1
    monkeypatch.setattr("monitor.relay.LOOK_BACK_ROWS", 1)  # the message is not read again by itself
    assert _refused(relay_once()) == 1
    rows("ALTER TABLE qa_photo_reviews DROP CONSTRAINT no")
    metrics = relay_once()
    assert [row[0] for row in rows(SENDERS)] == [f"DR100000{number}" for number in (1, 2, 3, 4)]
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(0,)]
    assert _outcomes(rows) == {"drops": 4}
    assert _refused(metrics) == 0
    (family,) = [found for found in metrics.collect() if found.name == "wa_monitor_messages"]
    assert next(sample.value for sample in family.samples if sample.labels["project"] == "Northfield") == 4


# errors that are not the message's


@pytest.mark.parametrize(
    ("change", "sentence", "back"),
    [
        ("ADD zz text NOT NULL", "zz", "ALTER zz DROP NOT NULL"),
        (
            "ALTER user_name TYPE varchar(10)",
            "user_name holds only 10 characters",
            "ALTER user_name TYPE varchar(100)",
        ),
    ],
)
def test_table_that_changes_under_a_running_monitor_stops_the_cursor_and_makes_no_dead_letter(
    bridge: SyntheticBridge,
    start_monitor: Any,
    rows: Rows,
    eventually: Any,
    *,
    change: str,
    sentence: str,
    back: str,
) -> None:
    monitor = start_monitor()
    monitor.await_message("writing")
    rows(f"ALTER TABLE qa_photo_reviews {change}")
    for number in range(5):
        _post(bridge, PHONE, f"DR100000{number}")
    assert sentence in monitor.await_message(sentence)
    monitor.await_message("WATCHDOG=1")
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(0,)]
    rows(f"ALTER TABLE qa_photo_reviews {back}")
    eventually(lambda: len(rows(SENDERS)) == 5)
    assert monitor.stop() == 0


def test_column_that_the_monitor_does_not_fill_is_refused_at_the_start(
    relay_once: RelayOnce, rows: Rows
) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ADD tenant integer NOT NULL, ALTER submitted_by SET NOT NULL")
    with pytest.raises(StoreSchemaError, match=r"submitted_by is NOT NULL.*tenant is NOT NULL"):
        relay_once()


def test_dropped_column_stores_nothing_and_moves_no_cursor(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews RENAME COLUMN submitted_by TO sender")
    _post(bridge, PHONE, "DR1000001")
    with pytest.raises(StoreSchemaError, match="no column submitted_by"):
        relay_once()
    assert rows("SELECT place_rowid FROM wa_monitor.cursor") == [(0,)]
    rows("ALTER TABLE qa_photo_reviews RENAME COLUMN sender TO submitted_by")
    relay_once()
    assert len(rows(SENDERS)) == 1


def test_database_that_writes_times_in_another_style_is_named(relay_once: RelayOnce, rows: Rows) -> None:
    relay_once()
    rows(
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET datestyle TO German', current_database()); END $$"
    )
    with pytest.raises(StoreSchemaError, match="DateStyle"):
        relay_once()


def test_column_of_another_kind_is_named(relay_once: RelayOnce, rows: Rows) -> None:
    relay_once()
    rows("ALTER TABLE qa_photo_reviews ALTER COLUMN whatsapp_message_date TYPE timestamp")
    with pytest.raises(StoreSchemaError, match="whatsapp_message_date is timestamp without time zone"):
        relay_once()


def test_table_of_the_dashboard_is_never_altered(relay_once: RelayOnce, rows: Rows) -> None:
    rows(
        "CREATE TABLE public.qa_photo_reviews (id serial PRIMARY KEY, drop_number text NOT NULL,"
        " review_date timestamp, user_name text NOT NULL, project text, whatsapp_message_date timestamptz,"
        " submitted_by text, comment text, incomplete boolean, resubmitted boolean, feedback_sent timestamp,"
        " created_at timestamp DEFAULT now(), updated_at timestamp DEFAULT now(), theirs text)"
    )
    before = rows("SELECT * FROM information_schema.columns WHERE table_name = 'qa_photo_reviews'")
    relay_once()
    assert rows("SELECT * FROM information_schema.columns WHERE table_name = 'qa_photo_reviews'") == before


def test_missing_bridge_ends_a_single_pass(bridge: SyntheticBridge, relay_once: RelayOnce) -> None:
    bridge.messages_db.unlink()
    with pytest.raises(BridgeMissingError):
        relay_once()
    assert not bridge.messages_db.exists()


# totals, metrics, provenance


def test_totals_are_committed_with_the_rows_and_label_sets_start_at_zero(
    bridge: SyntheticBridge, relay_once: RelayOnce
) -> None:
    def drops(metrics: MonitorMetrics) -> dict[tuple[str, ...], float]:
        (family,) = [found for found in metrics.collect() if found.name == "wa_monitor_drops_stored"]
        return {
            tuple(sample.labels.values()): sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    nothing = drops(relay_once())
    assert len(nothing) == 2 * 4 * 2
    assert set(nothing.values()) == {0}
    _post(bridge, PHONE, "DR1000001")
    _post(bridge, LATE_LID, "DR1000002")
    _post(bridge, PHONE, "DR1000001")
    relay_once()
    again = drops(relay_once())
    assert again["Northfield", "phone", "new"] == 1
    assert again["Northfield", "pending", "new"] == 1
    assert again["Northfield", "phone", "resubmission"] == 1
    assert sum(again.values()) == 3


def test_message_that_is_read_again_after_a_reload_is_no_lag(
    bridge: SyntheticBridge, relay_once: RelayOnce
) -> None:
    def lag_seconds(metrics: MonitorMetrics) -> float:
        (family,) = [found for found in metrics.collect() if found.name == "wa_monitor_message_lag_seconds"]
        return family.samples[0].value

    hour_ago = datetime.now(UTC) - timedelta(hours=1)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001", timestamp=hour_ago)
    assert lag_seconds(relay_once()) >= 3600
    assert lag_seconds(relay_once()) == 0
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000002", timestamp=hour_ago)
    assert lag_seconds(relay_once()) >= 3600


def test_standing_lids_are_counted_whoever_stored_them(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    bridge.map_lid(LID, PHONE)
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, user_name, submitted_by, project) VALUES"
        " ('DR1', %s, %s, 'Northfield'), ('DR2', 'x', '100000000000017:3@lid', 'Elsewhere'),"
        " ('DR3', %s, %s, NULL)",
        LID,
        LID,
        PHONE,
        PHONE,
    )
    (family,) = [found for found in relay_once().collect() if found.name == "wa_monitor_lid_rows"]
    assert {sample.labels["project"]: sample.value for sample in family.samples} == {
        "Northfield": 1,
        "Eastvale": 0,
        "other": 1,
    }


def test_ledger_names_the_code_that_decided(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WA_TREE", "c0ffee")
    monkeypatch.setenv("WA_GENERATION", "7")
    _post(bridge, PHONE, "DR1000001")
    relay_once()
    assert rows("SELECT tree, generation FROM wa_monitor.message") == [("c0ffee", "7")]
    assert rows("SELECT tree, generation FROM wa_monitor.drop_event") == [("c0ffee", "7")]


def test_backlog_of_many_batches_is_stored_exactly(
    bridge: SyntheticBridge, relay_once: RelayOnce, rows: Rows
) -> None:
    stream = messages(7)
    posts = [next(stream) for _ in range(1200)]
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        connection.executemany(
            "INSERT INTO messages (id, chat_jid, sender, content, timestamp, is_from_me)"
            " VALUES (?, ?, ?, ?, '2026-11-23 10:00:00+02:00', 0)",
            [(f"3A{n:06}", post.chat_jid, post.sender, post.content) for n, post in enumerate(posts)],
        )
        connection.execute("COMMIT")
    relay_once()
    expected = {number for post in posts if post.chat_jid in {NORTHFIELD, EASTVALE} for number in post.drops}
    assert {number for (number,) in rows("SELECT drop_number FROM qa_photo_reviews")} == expected
    assert rows("SELECT count(*) = count(DISTINCT drop_number) FROM qa_photo_reviews") == [(True,)]
    events = sum(len(post.drops) for post in posts if post.chat_jid in {NORTHFIELD, EASTVALE})
    assert rows("SELECT count(*) FROM wa_monitor.drop_event") == [(events,)]
