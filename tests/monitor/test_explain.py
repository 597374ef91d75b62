"""Explain and reconcile: one drop and all of them, by what bridge and database hold."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest

from monitor.audit import audit
from monitor.bridge import Bridge
from monitor.database import connect
from monitor.decision import Decider
from monitor.demo.bridge import EASTVALE, NORTHFIELD, OWN_JID, WESTMOOR, SyntheticBridge
from monitor.explain import MEANINGS, Explanation, explain
from monitor.identity import Known
from monitor.projects import load_projects
from monitor.reconcile import Comparison, reconcile
from monitor.settings import DatabaseUrl, Since

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from monitor.settings import Settings

    Rows = Callable[..., list[tuple[Any, ...]]]

PHONE = "27711234567"
LATE_LID = "3000000000013"
ELSEWHERE = "120363000000000009@g.us"


def _explain(settings: Settings, number: str) -> Explanation:
    assert settings.database_url is not None
    assert settings.projects is not None
    with (
        closing(Bridge(settings.bridge)) as reader,
        closing(connect(settings.database_url)) as database,
    ):
        return explain(
            number,
            database,
            reader,
            decider=Decider.of(settings, load_projects(settings.projects)),
            known=reader.known(),
            source="bridge",
        )


def _reconcile(settings: Settings, since: datetime | None = None) -> Comparison:
    assert settings.database_url is not None
    assert settings.projects is not None
    with closing(Bridge(settings.bridge)) as reader, closing(connect(settings.database_url)) as database:
        decider = Decider.of(settings, load_projects(settings.projects))
        return reconcile(database, reader, decider, reader.known(), source="bridge", since=since)


def _fill(bridge: SyntheticBridge) -> None:
    """Post a drop for each way in which a drop can be missing from the table, or not be."""
    bridge.set_device(OWN_JID, None)
    posts = [
        (NORTHFIELD, PHONE, "DR1000001"),
        (NORTHFIELD, PHONE, "dr 1000001 again"),
        (NORTHFIELD, LATE_LID, "DR1000002"),
        (ELSEWHERE, PHONE, "DR1000003"),
        (WESTMOOR, PHONE, "DR1000004"),
        (NORTHFIELD, "12015550123", "DR1000005"),
        (NORTHFIELD, PHONE, "DR-1000006"),
        (NORTHFIELD, PHONE, "DR1000007\0"),
    ]
    for chat, sender, content in posts:
        bridge.post(chat_jid=chat, sender=sender, content=content)


@pytest.mark.parametrize(
    ("number", "verdicts"),
    [
        ("DR1000001", ["new", "resubmission"]),
        ("DR1000002", ["new"]),
        ("DR1000003", ["other_chat"]),
        ("DR1000004", ["disabled_project"]),
        ("DR1000005", ["own_message"]),
        ("DR1000006", ["no_drop"]),
        ("DR1000007", ["rejected"]),
        ("DR1000008", ["not_read_yet"]),
        ("DR1000009", []),
    ],
)
def test_incident_35_why_a_drop_is_missing_is_answered_from_what_is_stored(
    bridge: SyntheticBridge,
    relay_once: Any,
    settings: Settings,
    number: str,
    verdicts: list[str],
) -> None:
    _fill(bridge)
    relay_once()
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000008")
    found = _explain(settings, number)
    assert [post.verdict for post in found.posts] == verdicts
    assert found.seen == bool(verdicts)
    assert set(verdicts) <= set(MEANINGS)


def test_sender_that_waits_and_the_moment_of_its_phone_are_told(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings
) -> None:
    _fill(bridge)
    relay_once()
    (post,) = _explain(settings, "DR1000002").posts
    assert (post.sender_state, post.resolved_at) == ("pending", None)
    bridge.map_lid(LATE_LID, PHONE)
    relay_once()
    (post,) = _explain(settings, "DR1000002").posts
    assert post.resolved_at is not None


def test_sender_that_waits_is_told_though_the_row_shows_who_posted_before(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings, database_url: str
) -> None:
    bridge.map_lid("100000000000017", PHONE)
    for sender in (PHONE, LATE_LID, "120363000000000001"):
        bridge.post(chat_jid=NORTHFIELD, sender=sender, content="DR1000001")
    began = datetime.now(UTC)
    relay_once()
    bridge.map_lid(LATE_LID, "27821234567")
    relay_once()
    told = [post.sender_state for post in _explain(settings, "DR1000001").posts]
    assert sorted(filter(None, told)) == ["pending", "phone", "unknown"]
    with closing(connect(DatabaseUrl(database_url))) as database:
        fresh = audit(database, Known(), since=began - timedelta(hours=1)).fresh
    assert sorted(drop.stored_as for drop in fresh) == ["pending", "phone", "unknown"]


def test_message_that_cannot_be_stored_has_its_time_and_is_left_out_before_the_beginning(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings, rows: Rows
) -> None:
    now = datetime.now(UTC).replace(microsecond=0)
    for days in (9, 2):
        sent_at = now - timedelta(days=days)
        bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR100000{days}\0", timestamp=sent_at)
    relay_once(since=Since(now - timedelta(days=3)))
    assert rows("SELECT count(*) FROM wa_monitor.dead_letter") == [(1,)]
    (post,) = _explain(settings, "DR1000002").posts
    assert (post.verdict, post.sent_at) == ("rejected", now - timedelta(days=2))
    (post,) = _explain(settings, "DR1000009").posts
    assert post.verdict == "before_start"
    (rejected,) = _reconcile(settings).rejected
    assert rejected.at == now - timedelta(days=2)
    assert not _reconcile(settings, now - timedelta(days=1)).failed


def test_message_that_is_gone_from_the_bridge_is_still_explained(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings
) -> None:
    _fill(bridge)
    relay_once()
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("DELETE FROM messages WHERE content = 'DR1000002'")
    (post,) = _explain(settings, "DR1000002").posts
    assert (post.verdict, post.in_bridge) == ("new", False)


def test_drop_from_before_the_start_is_told(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings
) -> None:
    now = datetime.now(UTC)
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001", timestamp=now - timedelta(days=9))
    relay_once(since=Since(now - timedelta(days=1)))
    (post,) = _explain(settings, "DR1000001").posts
    assert post.verdict == "before_start"


def test_group_that_was_no_project_then_is_the_reason_still(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings
) -> None:
    bridge.post(chat_jid=WESTMOOR, sender=PHONE, content="DR1000001")
    relay_once()
    assert settings.projects is not None
    text = settings.projects.read_text()
    settings.projects.write_text(text.replace("enabled: false", "enabled: true"))
    (post,) = _explain(settings, "DR1000001").posts
    assert post.verdict == "disabled_project"
    assert not _reconcile(settings).failed


def test_what_the_old_monitor_had_dealt_with_in_one_group_only_is_from_before_the_start(
    bridge: SyntheticBridge, relay_once: Any, settings: Settings, tmp_path: Path
) -> None:
    now = datetime.now(UTC)
    state = tmp_path / "state.json"
    state.write_text(
        json.dumps({NORTHFIELD: now.isoformat(), EASTVALE: (now - timedelta(days=20)).isoformat()})
    )
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000001", timestamp=now - timedelta(days=9))
    bridge.post(chat_jid=EASTVALE, sender=PHONE, content="DR1000002", timestamp=now - timedelta(days=9))
    relay_once(since=None, adopt=state)
    assert [_explain(settings, number).posts[0].verdict for number in ("DR1000001", "DR1000002")] == [
        "before_start",
        "new",
    ]
    assert not _reconcile(settings).failed


# reconcile


def test_clean_run_shows_no_difference(bridge: SyntheticBridge, relay_once: Any, settings: Settings) -> None:
    for number in range(30):
        bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR{1000001 + number % 20}")
    relay_once()
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000099")
    found = _reconcile(settings)
    assert not found.failed
    assert (found.messages, found.drops, found.not_read_yet) == (31, 31, 1)


def test_every_kind_of_difference_is_listed(
    bridge: SyntheticBridge, relay_once: Any, rows: Rows, settings: Settings
) -> None:
    for number in range(1, 4):
        bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR100000{number}")
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content="DR1000007\0")
    relay_once()
    rows("DELETE FROM wa_monitor.drop_event WHERE drop_number = 'DR1000001'")
    rows("DELETE FROM qa_photo_reviews WHERE drop_number = 'DR1000002'")
    rows("INSERT INTO qa_photo_reviews (drop_number, user_name) VALUES ('DR1000009', 'x')")
    found = _reconcile(settings)
    assert found.failed
    assert [one.drop_number for one in found.missing] == ["DR1000001"]
    assert [one.reason for one in found.rejected] == ["holds a NUL byte, which PostgreSQL cannot store"]
    assert [one.drop_number for one in found.gone] == ["DR1000002"]
    assert {one.drop_number for one in found.foreign} == {"DR1000001", "DR1000009"}
    assert _reconcile(settings, datetime.now(UTC) + timedelta(hours=1)).rejected == []
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as connection:
        connection.execute("UPDATE messages SET timestamp = 'soon' WHERE content LIKE 'DR1000007%'")
    later = _reconcile(settings, datetime.now(UTC) + timedelta(hours=1))
    assert len(later.rejected) == 1  # a message without a readable time is never too old
    assert not later.missing + later.gone + later.foreign
