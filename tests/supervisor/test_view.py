"""What the status page is about: references of the loop, numbers of the child, and only what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from supervisor.families import Family, parse
from supervisor.history import History, Record
from supervisor.manifest import Manifest
from supervisor.metrics import ChildMetrics
from supervisor.scribe import Scribe
from supervisor.settings import Options, Selection, Settings, Target, resolve
from supervisor.verify import ModuleVerdict, Verdict
from supervisor.view import Page, Published, is_loopback, standing, table

SAMPLES = [
    ["jobs_total", {"queue": "a", "state": "done", "kind": "new"}, 2],
    ["jobs_total", {"queue": "a", "state": "done", "kind": "old"}, 3],
    ["jobs_total", {"queue": "b", "state": "failed", "kind": "new"}, 1],
]


@pytest.fixture
def jobs() -> Family:
    return parse({"name": "jobs", "documentation": "Jobs", "type": "counter", "samples": SAMPLES})


def test_numbers_are_added_up_by_the_labels_that_are_asked_for(jobs: Family) -> None:
    grid = table(jobs, Selection("jobs_total", ("queue", "state")))
    assert (grid.heads, grid.labels, grid.across) == (("queue", "done", "failed"), 1, "state")
    assert grid.rows == (("a", "5", "0"), ("b", "0", "1"))
    by_one = table(jobs, Selection("jobs_total", ("queue",)))
    assert (by_one.heads, by_one.rows) == (("queue", "number"), (("a", "5"), ("b", "1")))
    by_all = table(jobs, Selection("jobs_total"))
    assert (by_all.heads, len(by_all.rows)) == (("kind", "queue", "state", "number"), 3)
    only = table(jobs, Selection("jobs_total", ("queue",), {"kind": "old"}))
    assert only.rows == (("a", "3"),)


def test_histogram_is_shown_by_its_count() -> None:
    samples = [["lag_bucket", {"le": "1"}, 2], ["lag_count", {}, 3], ["lag_sum", {}, 9.5]]
    lag = parse({"name": "lag", "documentation": "Lag", "type": "histogram", "samples": samples})
    assert table(lag, Selection("lag")).rows == (("3",),)


def test_alarm_stands_for_each_series_that_is_not_zero(jobs: Family) -> None:
    failed = Selection("jobs_total", (), {"state": "failed"})
    assert standing(jobs, failed) == ["Jobs: 1 (jobs_total, kind new, queue b, state failed)"]
    assert standing(replace(jobs, values=dict.fromkeys(jobs.values, 0.0)), failed) == []
    broken = replace(jobs, values={("jobs_total", ()): float("nan")})
    assert standing(broken, Selection("jobs_total")) == ["Jobs: nan (jobs_total)"], "unknown is not well"


@pytest.mark.parametrize(
    ("host", "yes"),
    [
        *(("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)),
        *(("0.0.0.0", False), ("::", False), ("192.0.2.1", False), ("example.org", False)),  # noqa: S104
    ],
)
def test_only_loopback_is_private(host: str, yes: bool) -> None:
    assert is_loopback(host) is yes


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    scribe = Scribe()
    made = History(tmp_path / "history.db", scribe)
    yield made
    made.close()
    scribe.close(10)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").touch()
    options = Options(show_metric=("jobs_total",), alarm=("failed",), state_dir=str(tmp_path / "state"))
    return resolve(Target("script", "main.py"), options)


def test_page_follows_disk_history_and_numbers_and_keeps_what_is_the_same(
    history: History, settings: Settings
) -> None:
    row = ModuleVerdict("answer", "answer.py", "1", "1", "match")
    child = ChildMetrics()
    facts = [Published({}, Verdict((row,), 3), Manifest.of(settings.tree, {"answer.py": "1"}), settings)]
    page = Page(lambda: facts[0], history, child)
    _, first = page()
    assert "1 match" in first["modules"]
    assert "None yet" in first["reloads"]
    assert "None are asked for" in first["counts"]
    assert "Not known now" in first["alarms"], "nobody has said yet that nothing has failed"
    _, again = page()
    assert again["modules"] is first["modules"]
    facts[0] = replace(facts[0], disk=Manifest.of(settings.tree, {"answer.py": "2"}))
    history.add(Record(kind="reload", outcome="rejected", trigger="watch"))
    history.add(Record(kind="promotion"))
    child.go_live(1)
    failed = [{"name": "failed", "documentation": "Failed", "type": "gauge", "samples": [["failed", {}, 1]]}]
    child.update(
        1, [{"name": "jobs", "documentation": "Jobs", "type": "counter", "samples": SAMPLES}, *failed]
    )
    title, later = page()
    assert "1 outdated" in later["modules"], "the proof is old, the comparison is of now"
    assert later["reloads"].count("<li>") == 1, "a promotion is no reload"
    assert "Jobs" in later["counts"]
    assert "Failed: 1 (failed)" in later["alarms"]
    assert "Not known now" not in later["alarms"]
    assert title.startswith("1 alarm, ")
    assert page()[1]["reloads"] is later["reloads"]
