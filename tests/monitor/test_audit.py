"""The audit: which LIDs stand, which code stored them, and what merely waits."""

from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

from monitor.audit import Findings, audit
from monitor.database import connect
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.identity import Known, Phone, parse_jid
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

    Rows = Callable[..., list[tuple[Any, ...]]]

PHONE = "27711234567"
LID = "100000000000017"
KNOWN = Known.from_rows({LID: PHONE})


def _audit(database_url: str, *, allow_waiting: bool = False) -> Findings:
    with closing(connect(DatabaseUrl(database_url))) as database:
        return audit(database, KNOWN, allow_waiting=allow_waiting)


def _post(bridge: SyntheticBridge, sender: str, content: str) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=sender, content=content)


def _everything_is_a_phone(sender: str, _chat: str, _known: Known, _rules: object) -> Phone:
    return Phone(parse_jid(sender).user, "certain", "digits")


def test_clean_table_passes(bridge: SyntheticBridge, relay_once: Any, database_url: str) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, LID, "DR1000001")
    relay_once()
    findings = _audit(database_url)
    assert not findings.failed
    assert findings == Findings([], [], [], [], [], [], [])


def test_standing_lid_is_shown_with_the_code_that_stored_it(
    bridge: SyntheticBridge, relay_once: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge.map_lid(LID, PHONE)
    _post(bridge, LID, "DR1000001")
    with monkeypatch.context() as faulty:
        faulty.setenv("WA_TREE", "bad0")
        faulty.setattr("monitor.decision.identify", _everything_is_a_phone)
        relay_once()
    monkeypatch.setenv("WA_TREE", "900d")
    _post(bridge, LID, "DR1000002")
    relay_once()
    findings = _audit(database_url)
    assert findings.failed
    ((project, tree, rows),) = [(one.project, one.tree, one.rows) for one in findings.standing]
    assert (project, tree, rows) == ("Northfield", "bad0", 1)
    assert [(new.tree, new.drops) for new in findings.newly_stored] == [("bad0", 1)]


def test_lid_that_the_map_never_had_is_found_when_a_fault_stores_it(
    bridge: SyntheticBridge, relay_once: Any, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, never = "3000000000013", "90000000000019"
    _post(bridge, never, "DR1000001")
    relay_once()
    with monkeypatch.context() as faulty:
        faulty.setattr("monitor.decision.identify", _everything_is_a_phone)
        _post(bridge, late, "DR1000002")
        metrics = relay_once()
    stored = {
        tuple(sample.labels.values()): sample.value for sample in _samples(metrics, "drops_stored_total")
    }
    assert stored["Northfield", "lid", "new"] == len(("stored", "completed"))
    assert [sample.value for sample in _samples(metrics, "lid_rows")][:1] == [2]
    findings = _audit(database_url)
    assert findings.failed
    assert sum(one.rows for one in findings.standing) == len((late, never))
    assert [new.drops for new in findings.newly_stored] == [1]


def _samples(metrics: Any, name: str) -> list[Any]:
    return [
        sample
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == f"wa_monitor_{name}" and sample.labels["project"] == "Northfield"
    ]


def test_lid_of_another_writer_has_no_code_to_show(relay_once: Any, database_url: str, rows: Rows) -> None:
    relay_once()
    rows("INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name) VALUES ('DR1', %s, 'x')", LID)
    (standing,) = _audit(database_url).standing
    assert (standing.project, standing.tree, standing.since, standing.rows) == ("", None, None, 1)


def test_senders_that_wait_fail_unless_they_are_allowed_and_dead_letters_always(
    bridge: SyntheticBridge, relay_once: Any, database_url: str
) -> None:
    _post(bridge, "3000000000013", "DR1000001")
    _post(bridge, "258821234567", "DR1000002")
    relay_once()
    assert _audit(database_url).failed
    assert not _audit(database_url, allow_waiting=True).failed
    _post(bridge, PHONE, "DR1000003\0")
    relay_once()
    findings = _audit(database_url, allow_waiting=True)
    assert findings.failed
    assert sorted((one.kind, one.drops) for one in findings.waiting) == [("pending", 1), ("unknown", 1)]
    assert [letter.messages for letter in findings.dead_letters] == [1]


def test_digits_that_are_no_phone_and_not_in_the_map_are_doubtful(
    relay_once: Any, database_url: str, rows: Rows
) -> None:
    relay_once()
    rows(
        "INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name) VALUES"
        " ('DR1', '80000000000018', 'x'), ('DR2', '2348021234567', 'x')"
    )
    findings = _audit(database_url)
    assert [(one.drop_number, one.value) for one in findings.doubtful] == [("DR1", "80000000000018")]


def test_findings_are_readable_by_programs(relay_once: Any, database_url: str, rows: Rows) -> None:
    relay_once()
    rows("INSERT INTO qa_photo_reviews (drop_number, submitted_by, user_name) VALUES ('DR1', %s, 'x')", LID)
    document = json.loads(_audit(database_url).to_json())
    assert document["failed"] is True
    assert document["standing"][0]["rows"] == 1
