"""The status page as HTML: all that comes from elsewhere is text, and nothing that matters is left out."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from supervisor import page
from supervisor.page import MODULES_SHOWN, POLICY, RECORDS_SHOWN, Table, View, document, sections, title

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp;\0\udce9"
STATUS: dict[str, Any] = {
    "in_sync": True,
    "reason": None,
    "listen": "127.0.0.1:1",
    "live": {
        "generation": 3,
        "pid": 1,
        "tree": "a" * 64,
        "commit": None,
        "since": "2026-01-02T03:04:05.678+00:00",
        "status": "",
    },
    "watch": {
        "mode": "events",
        "directories": 1,
        "overflows": 0,
        "restarts": 0,
        "last_scan_age_seconds": 1.0,
    },
}
RECORD: dict[str, Any] = {
    "id": "1",
    "at": "2026-01-02T03:04:05.678+00:00",
    "kind": "reload",
    "trigger": "watch",
    "outcome": "live",
    "reason": None,
    "detail": None,
    "generation": 3,
    "commit": "b" * 40,
    "paths": ["a.py"],
    "paths_total": 1,
    "stages": {"settle": 0.01, "launch": 0.03},
    "total_seconds": 0.05,
}
MODULE: dict[str, Any] = {
    "name": "answer",
    "path": "modules/answer.py",
    "disk_sha256": "c" * 64,
    "running_sha256": "d" * 64,
    "state": "outdated",
}


class Read(HTMLParser):
    """The elements of a document, the text of it, and whether each is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs
        if tag not in {"meta", "link"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag not in {"code", "time", "strong", "span", "svg", "rect"}:
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def whole(view: View) -> str:
    return document(title(view), sections(view))


def words(view: View, section: str) -> str:
    return " ".join("".join(Read(sections(view)[section]).words).split())


def everywhere(value: Any, text: str) -> Any:
    """The same document with a hostile text for each text that a child, a disk or a person chose."""
    if isinstance(value, dict):
        kept = {"kind", "state", "mode", "at", "since"}
        return {key: inner if key in kept else everywhere(inner, text) for key, inner in value.items()}
    if isinstance(value, list):
        return [everywhere(inner, text) for inner in value]
    return text if isinstance(value, str) else value


def test_whatever_comes_from_elsewhere_is_text() -> None:
    hostile = View(
        status={
            **everywhere(STATUS, HOSTILE),
            "in_sync": False,
            "reason": HOSTILE,
            "candidate": {"generation": 4, "tree": HOSTILE, "stage": HOSTILE},
            "draining": [2],
            "known_good": [HOSTILE],
            "quarantine": [{"tree": HOSTILE, "reason": HOSTILE, "detail": HOSTILE, "at": HOSTILE}],
            "restarts": {HOSTILE: 1},
            "git": {"commit": HOSTILE, "branch": HOSTILE, "dirty": None},
            "self": {"outdated": True, "reason": HOSTILE},
            "zygote": {"state": HOSTILE},
            "problems": [HOSTILE],
        },
        records=[{**everywhere(RECORD, HOSTILE), "outcome": "live", "detail": HOSTILE, "reason": HOSTILE}],
        modules=[everywhere(MODULE, HOSTILE)],
        foreign=[HOSTILE],
        tables=[Table(HOSTILE, HOSTILE, (HOSTILE,), ((HOSTILE,),), 1, HOSTILE)],
        alarms=[HOSTILE],
        public=True,
    )
    read = Read(whole(hostile))
    assert "img" not in read.names
    assert read.names.count("script") == 1
    assert not [name for name, _ in read.attributes if name.startswith("on") or name == "style"]
    shown = HOSTILE.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\udce9", "?")
    for section in sections(hostile).values():
        assert shown in "".join(Read(section).words), "it is shown, not dropped"


def test_document_holds_all_it_needs_and_its_policy_allows_that_alone() -> None:
    text = whole(View(STATUS))
    style, script = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.DOTALL)
    for kind, content in (("style", style), ("script", script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in POLICY
    assert "default-src 'none'" in POLICY
    assert "unsafe" not in POLICY
    addresses = [value for name, value in Read(text).attributes if name in {"src", "href"}]
    assert addresses == ["data:,", "#main", "status.json", "metrics"]


@pytest.mark.parametrize("status", [{}, {"in_sync": False}, STATUS, {**STATUS, "live": None}])
def test_page_is_made_of_whatever_is_known(status: dict[str, Any]) -> None:
    read = Read(whole(View(status)))
    assert read.names.count("section") == 7


def test_headline_says_whether_it_is_in_sync_and_why_not() -> None:
    assert words(View(STATUS), "headline").startswith(
        "✓ In sync Generation 3 serves tree aaaaaaaaaaaa, since 2026"
    )
    broken = {**STATUS, "in_sync": False, "reason": "a.py, line 1"}
    assert words(View(broken), "headline").startswith("✗ Not in sync a.py, line 1 Generation 3")
    assert words(View({}), "headline") == "✗ Not in sync nothing is known yet"
    assert "Warning: this page listens on 127.0.0.1:1" in words(View(STATUS, public=True), "headline")


def test_alarms_are_told_and_so_is_that_there_are_none() -> None:
    assert words(View(STATUS), "alarms") == "Alarms None are set (--alarm)."
    assert words(View(STATUS, alarms=[]), "alarms") == "Alarms ✓ No alarm"
    assert words(View(STATUS, alarms=["a", "b"]), "alarms") == "Alarms ✗ a ✗ b"
    unknown = "• Not known now, the service does not say it: jobs"
    assert words(View(STATUS, alarms=[], unknown=["jobs"]), "alarms") == f"Alarms {unknown}", "not: no alarm"
    assert words(View(STATUS, alarms=["a"], unknown=["jobs"]), "alarms") == f"Alarms ✗ a {unknown}"
    assert title(View(STATUS, alarms=["a"])) == "1 alarm, in sync · wa-supervisor"


def test_reloads_are_timelines_with_their_stages_in_words() -> None:
    view = View(
        STATUS, records=[RECORD, {**RECORD, "outcome": "rejected", "reason": "syntax", "detail": "why"}]
    )
    made = sections(view)["reloads"]
    assert 'aria-label="Timeline: settle 10.0 ms, launch 30.0 ms"' in made
    assert '<rect x="200.0" y="0" width="600.0" height="10" class="launch"></rect>' in made, "to one scale"
    assert "✗ rejected (syntax) by watch, generation 3, 50 ms, commit bbbbbbbbbbbb" in words(view, "reloads")
    many = View(STATUS, records=[RECORD] * (RECORDS_SHOWN + 1))
    assert sections(many)["reloads"].count("<li>") == RECORDS_SHOWN


def test_stage_that_is_not_known_is_no_part_of_a_timeline() -> None:
    odd = {**RECORD, "stages": {'x" onload="alert(1)': 1.0}}
    assert "svg" not in sections(View(STATUS, records=[odd]))["reloads"]


def test_modules_that_do_not_match_come_first_and_what_is_left_out_is_counted() -> None:
    good = {**MODULE, "name": "good", "state": "match"}
    view = View(STATUS, modules=[*[good] * (MODULES_SHOWN + 1), MODULE], functions=7)
    said = words(view, "modules")
    assert f"{MODULES_SHOWN + 1} match, 1 outdated; 7 pieces" in said
    assert said.index("modules/answer.py outdated") < said.index("good")
    assert said.endswith("and 2 more, not shown here")
    assert '<details id="modules-all" open="">' in sections(view)["modules"], "trouble is shown unasked"
    assert "no file" in words(View(STATUS, modules=[{**MODULE, "disk_sha256": None}]), "modules")


def test_section_that_was_made_before_is_not_made_again() -> None:
    kept = page.Html("<section id=modules></section>")
    assert sections(View(STATUS, made={"modules": kept}))["modules"] is kept
