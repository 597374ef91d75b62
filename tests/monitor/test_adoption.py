"""A first start on a filled table: the old monitor's state, the rows that stand there, and other writers."""

from __future__ import annotations

import json
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from monitor.adoption import read_state
from monitor.audit import audit
from monitor.database import connect
from monitor.demo.bridge import EASTVALE, NORTHFIELD, SyntheticBridge
from monitor.errors import ConfigError
from monitor.identity import Known
from monitor.settings import BUSINESS_ZONE, DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    from monitor.audit import Findings

    Rows = Callable[..., list[tuple[Any, ...]]]
    Table = Callable[..., None]

PHONE = "27711234567"
OTHER_PHONE = "263712345678"
DAY = datetime(2026, 11, 11, 10, tzinfo=UTC)
EVERYTHING = "SELECT to_jsonb(r)::text FROM qa_photo_reviews r ORDER BY drop_number, created_at"


@pytest.fixture
def past(bridge: SyntheticBridge, table: Table) -> dict[str, str]:
    """Messages that the old monitor had dealt with, their rows, and the ids of the last ones by group."""
    ids = {}
    for number in range(1, 6):
        chat = NORTHFIELD if number % 2 else EASTVALE
        ids[chat] = bridge.post(
            chat_jid=chat,
            sender=PHONE,
            content=f"DR100000{number}",
            timestamp=DAY + timedelta(minutes=number),
        )
    # A resubmission that it had dealt with as well: the row still has the time of the first post.
    ids[NORTHFIELD] = bridge.post(
        chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001 fixed", timestamp=DAY + timedelta(minutes=6)
    )
    table(
        *(
            (
                f"DR100000{number}",
                "Northfield" if number % 2 else "Eastvale",
                DAY + timedelta(minutes=number),
                PHONE,
            )
            for number in range(1, 6)
        ),
        ("DR1000009", "Northfield", DAY - timedelta(days=40), None),
    )
    return ids


def _audit(database_url: str) -> Findings:
    with closing(connect(DatabaseUrl(database_url))) as database:
        return audit(database, Known())


def _states(ids: dict[str, str]) -> dict[str, object]:
    last = (DAY + timedelta(minutes=6)).astimezone(BUSINESS_ZONE)
    return {
        "ids": ids,
        "times": {chat: last.isoformat(sep=" ") for chat in ids},
        "one time": {"last_check_time": last.isoformat(), "processed_message_ids": list(ids.values())},
        "one time without zone": {"last_check_time": last.replace(tzinfo=None).isoformat()},
    }


@pytest.mark.parametrize("form", ["ids", "times", "one time", "one time without zone"])
def test_filled_table_and_old_state_change_no_row_and_pass_the_audit(
    past: dict[str, str], relay_once: Any, rows: Rows, tmp_path: Path, form: str
) -> None:
    before = rows(EVERYTHING)
    state = tmp_path / "state.json"
    state.write_text(json.dumps(_states(past)[form]))
    metrics = relay_once(since=None, adopt=state)
    assert rows(EVERYTHING) == before
    standing = {
        family.name: sum(sample.value for sample in family.samples)
        for family in metrics.collect()
        if family.name in {"wa_monitor_lid_rows", "wa_monitor_foreign_rows"}
    }
    assert set(standing.values()) == {0}
    assert dict(rows("SELECT kind, count(*) FROM wa_monitor.drop_event GROUP BY 1")) == {"known": 6}
    assert rows("SELECT rows_total FROM wa_monitor.adoption") == [(6,)]


def test_incident_15_messages_behind_the_old_position_that_were_never_stored_are_stored_now(
    past: dict[str, str], bridge: SyntheticBridge, relay_once: Any, rows: Rows, tmp_path: Path
) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000007", timestamp=DAY + timedelta(minutes=2))
    state = tmp_path / "state.json"
    state.write_text(json.dumps(_states(past)["times"]))
    relay_once(since=None, adopt=state)
    assert rows("SELECT kind FROM wa_monitor.drop_event WHERE drop_number = 'DR1000007'") == [("new",)]
    bridge.post(
        chat_jid=NORTHFIELD, sender=OTHER_PHONE, content="DR1000001", timestamp=DAY + timedelta(hours=1)
    )
    relay_once(since=None, adopt=state)
    assert rows("SELECT resubmitted FROM qa_photo_reviews WHERE drop_number = 'DR1000001'") == [(True,)]


def test_message_whose_row_has_its_drop_and_time_changes_nothing(
    past: dict[str, str], relay_once: Any, rows: Rows
) -> None:
    assert past
    before = rows(EVERYTHING)
    relay_once()  # from the beginning: only what was really posted twice is a resubmission
    changed = set(rows(EVERYTHING)) - set(before)
    assert [json.loads(row)["drop_number"] for (row,) in changed] == ["DR1000001"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file"),
        ("{", "not valid JSON"),
        ("[]", "no state"),
        ("{}", "no state"),
        ('{"27711234567": "x"}', "no state"),
        ('{"last_check_time": "yesterday"}', "no time"),
        (json.dumps({NORTHFIELD: "3A00"}), "is not in the bridge"),
        ("[" * 100_000, "not valid JSON"),
        ('{"last_check_time": "0001-01-01T00:00:00Z"}', "no time"),
        (json.dumps({NORTHFIELD: "9999-12-31T23:59:59-10:00"}), "is not in the bridge"),
        (json.dumps({NORTHFIELD: "20251111A122530B4567"}), "is not in the bridge"),
        (json.dumps({NORTHFIELD: "3A\0"}), "no state"),
        (json.dumps({f"\ud800{NORTHFIELD}": "3A00"}), "no state"),
    ],
)
def test_state_that_cannot_be_understood_is_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "state.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        read_state(path, lambda _ids: [], BUSINESS_ZONE)


def test_two_answers_to_where_to_begin_are_refused(relay_once: Any, tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(ConfigError, match="not with both"):
        relay_once(adopt=tmp_path / "state.json")
    assert rows("SELECT 1 FROM wa_monitor.cursor") == []


# another writer


def test_incident_38_row_of_another_writer_is_reported_and_never_overwritten(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, database_url: str, table: Table
) -> None:
    table()
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, project, user_name, incomplete)"
        " VALUES ('DR1000001', 'Northfield', '100000000000017', true)"
    )
    before = rows(EVERYTHING)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001 done")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001 done")
    metrics = relay_once()
    assert rows(EVERYTHING) == before
    findings = _audit(database_url)
    assert findings.failed
    ((project, found, posted),) = [(one.project, one.rows, one.posted) for one in findings.foreign_rows]
    assert (project, found, posted) == ("Northfield", 1, 1)
    shown = {
        sample.labels["project"]: sample.value
        for family in metrics.collect()
        if family.name == "wa_monitor_foreign_rows"
        for sample in family.samples
    }
    assert shown["Northfield"] == 1


def test_drop_that_was_left_to_a_row_of_another_writer_is_stored_once_that_row_is_gone(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows
) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, project, user_name)"
        " VALUES ('DR1000001', 'Northfield', 'x')"
    )
    for sender, text in [(PHONE, "DR1000001 DR1000002"), ("263712345678@s.whatsapp.net", "DR1000001 fixed")]:
        bridge.post(chat_jid=NORTHFIELD, sender=sender, content=text)
    relay_once()
    assert rows("SELECT kind FROM wa_monitor.drop_event ORDER BY 1") == [("foreign",), ("foreign",), ("new",)]
    rows("DELETE FROM qa_photo_reviews WHERE user_name = 'x'")
    relay_once()
    relay_once()
    assert rows("SELECT drop_number, submitted_by, resubmitted FROM qa_photo_reviews ORDER BY 1") == [
        ("DR1000001", "263712345678", True),
        ("DR1000002", PHONE, False),
    ]
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(0,)]
    assert rows("SELECT DISTINCT outcome FROM wa_monitor.message") == [("drops",)]
    assert rows("SELECT totals -> 'messages' -> 'Northfield' FROM wa_monitor.cursor") == [(2,)]


def test_row_of_another_writer_that_was_accepted_is_resubmitted_like_any_other(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, database_url: str
) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, project, user_name)"
        " VALUES ('DR1000001', 'Northfield', 'typed by hand')"
    )
    with closing(connect(DatabaseUrl(database_url))) as database:
        from monitor.census import adopt_rows  # noqa: PLC0415 -- only here

        assert adopt_rows(database, "bridge") == 1
    assert not _audit(database_url).failed
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001")
    relay_once()
    assert rows("SELECT resubmitted, submitted_by FROM qa_photo_reviews") == [(True, PHONE)]
