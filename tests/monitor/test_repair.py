"""Repair: LIDs become phones, nothing else changes, and what stood there is kept."""

from __future__ import annotations

from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from monitor.audit import audit
from monitor.census import lid_rows
from monitor.database import connect
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.errors import ConfigError, StoreUnavailableError
from monitor.identity import Known
from monitor.repair import repair, repair_some, undo
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    Rows = Callable[..., list[tuple[Any, ...]]]

PHONE = "27711234567"
LID = "100000000000017"
KNOWN = Known.from_rows({LID: PHONE, "90000000000019": "263712345678", "27831234560": "918123456789"})
REST = "SELECT to_jsonb(r) - 'submitted_by' - 'user_name' FROM qa_photo_reviews r ORDER BY drop_number"


@pytest.fixture
def table(relay_once: Any, rows: Rows) -> None:
    """A filled table: LIDs in both columns and spellings, foreign phones, and a row typed by hand."""
    relay_once()
    for number, (submitted_by, user_name) in enumerate(
        [
            (LID, LID),
            (PHONE, LID),
            (f"{LID}@lid", "x"),
            (f"{LID}:4@s.whatsapp.net", LID),
            ("27831234560", "27831234560"),  # a LID in the shape of a phone
            ("263712345678", "263712345678"),
            ("2348021234567", "2348021234567"),
            (None, "typed by hand"),
            ("3000000000013", "3000000000013"),  # a LID that the map does not have
        ]
    ):
        rows(
            "INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name, project)"
            " VALUES (%s, %s, %s, %s)",
            f"DR100000{number}",
            submitted_by,
            user_name,
            "Northfield" if number % 2 else "Eastvale",
        )


def _run(database_url: str, *, dry_run: bool = False) -> Any:
    with closing(connect(DatabaseUrl(database_url))) as database:
        return repair(database, KNOWN, dry_run=dry_run)


@pytest.mark.usefixtures("table")
def test_lids_become_phones_and_everything_else_stays(database_url: str, rows: Rows) -> None:
    before = rows(REST)
    report = _run(database_url)
    assert rows("SELECT submitted_by, user_name FROM qa_photo_reviews ORDER BY drop_number") == [
        (PHONE, PHONE),
        (PHONE, PHONE),
        (PHONE, "x"),
        (PHONE, PHONE),
        ("918123456789", "918123456789"),
        ("263712345678", "263712345678"),
        ("2348021234567", "2348021234567"),
        (None, "typed by hand"),
        ("3000000000013", "3000000000013"),
    ]
    assert rows(REST) == before
    assert dict(report.repaired) == {"Eastvale": 3, "Northfield": 2}


@pytest.mark.usefixtures("table")
def test_old_values_are_kept_under_the_run(database_url: str, rows: Rows) -> None:
    report = _run(database_url)
    kept = rows(
        "SELECT run_id, drop_number, old_submitted_by, new_submitted_by, old_user_name, new_user_name"
        " FROM wa_monitor.repair ORDER BY drop_number"
    )
    assert len(kept) == 5
    assert kept[1] == (report.run_id, "DR1000001", PHONE, PHONE, LID, PHONE)


@pytest.mark.usefixtures("table")
def test_lid_that_the_map_does_not_have_is_listed_and_left(database_url: str) -> None:
    report = _run(database_url)
    assert [(row.drop_number, row.value) for row in report.unresolved] == [("DR1000008", "3000000000013")]


@pytest.mark.usefixtures("table")
def test_dry_run_reports_the_same_and_changes_nothing(database_url: str, rows: Rows) -> None:
    before = rows("SELECT to_jsonb(r) FROM qa_photo_reviews r ORDER BY drop_number")
    report = _run(database_url, dry_run=True)
    assert dict(report.repaired) == {"Eastvale": 3, "Northfield": 2}
    assert rows("SELECT to_jsonb(r) FROM qa_photo_reviews r ORDER BY drop_number") == before
    assert rows("SELECT count(*) FROM wa_monitor.repair") == [(0,)]


@pytest.mark.usefixtures("table")
def test_second_run_finds_nothing_to_do(database_url: str) -> None:
    _run(database_url)
    assert not _run(database_url).repaired


@pytest.mark.parametrize(
    "spelling",
    [
        "{}",
        "{}@lid",
        "{}.2@lid",
        "{}:4@lid",
        "{}.2:4@hosted.lid",
        " {}",
        "+{}",
        "{} ",
        "{}@LID ",
        "{}@s.whatsapp.net",
    ],
)
@pytest.mark.parametrize("column", ["submitted_by", "user_name"])
def test_lid_is_found_and_repaired_in_every_spelling(
    relay_once: Any, database_url: str, rows: Rows, spelling: str, column: str
) -> None:
    relay_once()
    rows("INSERT INTO qa_photo_reviews (drop_number, user_name) VALUES ('DR1000001', 'x')")
    rows(f"UPDATE qa_photo_reviews SET {column} = %s", spelling.format(LID))  # noqa: S608 -- our own names
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert audit(database, KNOWN).failed
        assert sum(lid_rows(database, KNOWN).values()) == 1
    _run(database_url)
    assert rows(f"SELECT {column} FROM qa_photo_reviews") == [(PHONE,)]  # noqa: S608 -- our own names
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert audit(database, KNOWN).standing == []


@pytest.mark.parametrize("address", [f"{PHONE}@s.whatsapp.net", f"+{PHONE}.0:3@C.US ", f"{PHONE}:9@hosted"])
def test_full_address_of_a_phone_is_cut_to_its_digits_by_an_operators_run_alone(
    relay_once: Any, database_url: str, rows: Rows, address: str
) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name) VALUES"
        " ('DR1000001', %s, %s), ('DR1000002', %s, 'x'), ('DR1000003', '3000000000013@g.us', 'x')",
        *(address, address, LID),
    )
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert repair_some(database, KNOWN).repaired.total() == 1
        report = repair(database, KNOWN)
        assert report.repaired.total() == 1
        senders = "SELECT submitted_by, user_name FROM qa_photo_reviews ORDER BY drop_number"
        assert rows(senders) == [(PHONE, PHONE), (PHONE, "x"), ("3000000000013@g.us", "x")]
        undo(database, report.run_id)
        assert rows(senders)[0] == (address, address)


def test_phone_in_the_map_that_is_a_lid_itself_repairs_nothing(
    database_url: str, rows: Rows, relay_once: Any
) -> None:
    relay_once()
    rows("INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name) VALUES ('DR1', %s, 'x')", LID)
    with closing(connect(DatabaseUrl(database_url))) as database:
        known = Known.from_rows({LID: "90000000000019", "90000000000019": PHONE})
        assert not repair(database, known).repaired
        assert audit(database, known).failed


def test_lid_that_the_map_has_forgotten_is_found_and_repaired_if_it_had_one_phone(
    relay_once: Any, database_url: str, rows: Rows
) -> None:
    relay_once()
    rows(
        "INSERT INTO wa_monitor.lid_seen (lid, phone) VALUES ('80000000000012', '27821234567'),"
        " ('80000000000013', '27821234567'), ('80000000000013', '27831234567')"
    )
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, user_name, submitted_by) VALUES"
        " ('DR1000001', 'x', '80000000000012'), ('DR1000002', 'x', '80000000000013')"
    )
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert sum(one.rows for one in audit(database, KNOWN).standing) == 2
        assert sum(lid_rows(database, KNOWN).values()) == 2
    report = _run(database_url)
    assert rows("SELECT submitted_by FROM qa_photo_reviews ORDER BY drop_number") == [
        ("27821234567",),
        ("80000000000013",),
    ]
    assert [row.value for row in report.unresolved] == ["80000000000013"]


def test_more_rows_than_a_batch_are_all_repaired(relay_once: Any, database_url: str, rows: Rows) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name, project)"
        " SELECT 'DR' || n, %s, %s, 'Northfield' FROM generate_series(1000000, 1001200) n",
        LID,
        LID,
    )
    assert dict(_run(database_url).repaired) == {"Northfield": 1201}
    assert rows("SELECT count(*) FROM qa_photo_reviews WHERE submitted_by = %s", PHONE) == [(1201,)]


# undo


@pytest.mark.usefixtures("table")
def test_undo_restores_exactly_what_was_and_nothing_that_changed_since(database_url: str, rows: Rows) -> None:
    everything = "SELECT drop_number, to_jsonb(r)::text FROM qa_photo_reviews r ORDER BY drop_number"
    before: dict[str, str] = dict(rows(everything))
    run = _run(database_url)
    rows("UPDATE qa_photo_reviews SET submitted_by = '27821234567' WHERE drop_number = 'DR1000001'")
    ((_, changed),) = rows(
        "SELECT drop_number, to_jsonb(r)::text FROM qa_photo_reviews r WHERE drop_number = 'DR1000001'"
    )
    with closing(connect(DatabaseUrl(database_url))) as database:
        undone = undo(database, run.run_id)
        assert undone.restored.total() == run.repaired.total() - 1
        assert undone.left == [("DR1000001", "Northfield")]
        after: dict[str, str] = dict(rows(everything))
        assert after == {**before, "DR1000001": changed}
        assert undo(database, run.run_id).restored.total() == 0


@pytest.mark.usefixtures("table")
def test_undo_leaves_a_phone_that_was_written_again_since(
    bridge: SyntheticBridge, relay_once: Any, database_url: str, rows: Rows
) -> None:
    rows("INSERT INTO wa_monitor.adopted_row (review_id) SELECT id::text FROM qa_photo_reviews")
    run = _run(database_url)
    bridge.map_lid(LID, PHONE)
    bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000000")
    relay_once()
    rows("UPDATE qa_photo_reviews SET submitted_by = %s WHERE drop_number = 'DR1000001'", LID)
    again = _run(database_url)
    with closing(connect(DatabaseUrl(database_url))) as database:
        undone = undo(database, run.run_id)
        assert undone.left == [("DR1000000", "Eastvale"), ("DR1000001", "Northfield")]
        assert undo(database, again.run_id).restored.total() == 1
    assert rows("SELECT submitted_by FROM qa_photo_reviews WHERE drop_number = 'DR1000000'") == [(PHONE,)]


@pytest.mark.usefixtures("table")
def test_what_an_operator_has_put_back_is_left_by_the_automatic_repair_and_not_by_his_own(
    database_url: str, rows: Rows
) -> None:
    run = _run(database_url)
    with closing(connect(DatabaseUrl(database_url))) as database:
        undo(database, run.run_id)
        assert repair_some(database, KNOWN).repaired.total() == 0
        rows("INSERT INTO qa_photo_reviews (drop_number, user_name) VALUES ('DR2000001', %s)", LID)
        assert repair_some(database, KNOWN).repaired.total() == 1
        assert repair(database, KNOWN).repaired == run.repaired


@pytest.mark.usefixtures("table")
def test_row_that_the_database_does_not_let_be_changed_is_named_and_keeps_no_other(
    database_url: str, rows: Rows
) -> None:
    count = _run(database_url, dry_run=True).repaired.total()
    rows(
        "ALTER TABLE qa_photo_reviews ADD CONSTRAINT frozen"
        " CHECK (drop_number <> 'DR1000000' OR submitted_by = '100000000000017')"
    )
    report = _run(database_url)
    assert report.repaired.total() == count - 1
    assert [(one.drop_number, one.project) for one in report.refused] == [("DR1000000", "Eastvale")]
    assert "frozen" in report.refused[0].reason
    with closing(connect(DatabaseUrl(database_url))) as database:
        assert [one.drop_number for one in repair_some(database, KNOWN).refused] == ["DR1000000"]


@pytest.mark.usefixtures("table")
def test_automatic_repair_waits_within_bounds_for_a_row_that_somebody_holds(database_url: str) -> None:
    with (
        psycopg.connect(database_url) as reviewer,
        closing(connect(DatabaseUrl(database_url))) as database,
    ):
        reviewer.execute(
            "UPDATE qa_photo_reviews SET locked_by = 'a reviewer' WHERE drop_number = 'DR1000001'"
        )
        with pytest.raises(StoreUnavailableError, match="lock timeout"):
            repair_some(database, KNOWN)
        reviewer.rollback()
        assert repair_some(database, KNOWN).repaired.total() > 0


@pytest.mark.usefixtures("table")
def test_unknown_run_is_refused_and_the_latest_are_named(database_url: str) -> None:
    run = _run(database_url)
    with (
        closing(connect(DatabaseUrl(database_url))) as database,
        pytest.raises(ConfigError, match=run.run_id),
    ):
        undo(database, "20200101T000000Z-000000")


@pytest.mark.usefixtures("table")
def test_rows_of_older_messages_are_left_when_since_is_given(database_url: str, rows: Rows) -> None:
    rows("UPDATE qa_photo_reviews SET whatsapp_message_date = now() - interval '9 days'")
    rows("UPDATE qa_photo_reviews SET whatsapp_message_date = now() WHERE drop_number = 'DR1000001'")
    with closing(connect(DatabaseUrl(database_url))) as database:
        done = repair(database, KNOWN, since=datetime.now(UTC) - timedelta(days=1))
    assert done.repaired.total() == 1
    assert rows("SELECT user_name FROM qa_photo_reviews WHERE drop_number = 'DR1000001'") == [(PHONE,)]
