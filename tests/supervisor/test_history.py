"""Records outlive the supervisor; neither the disk nor whoever else uses the file is waited for."""

from __future__ import annotations

import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from supervisor import history
from supervisor.history import Ending, History, Record
from supervisor.scribe import Scribe
from supervisor.terminal import print_history

DEADLINE_SECONDS = 10.0

RELOAD = Record(
    kind="reload",
    trigger="watch",
    outcome="live",
    generation=2,
    previous_generation=1,
    tree="a" * 64,
    previous_tree="b" * 64,
    commit="c" * 40,
    previous_commit="d" * 40,
    paths=("modules/answer.py", "modules/\udcff.py"),
    paths_total=2,
    stages={"settle": 0.015, "compile": 0.0071234567},
    total_seconds=0.0431234567,
    uid=1000,
)
CRASH = Record(
    kind="restart",
    trigger="crash",
    outcome="live",
    reason="crash",
    detail="ended by SIGSEGV",
    generation=3,
    ending=Ending(
        pid=123,
        lived_seconds=3.5,
        signal="SIGSEGV",
        oom=False,
        output=("Traceback (most recent call last):", "ValueError: \udcff"),
        dump=("Thread 0x1 (most recent call first):",),
    ),
)


class Opened:
    """A history with its scribe."""

    def __init__(self, path: Path, limit: int = history.LIMIT) -> None:
        self.scribe = Scribe()
        self.history = History(path, self.scribe, limit)

    def add(self, *records: Record) -> None:
        """Add records and wait until they were tried to be written."""
        for record in records:
            self.history.add(record)
        assert self.scribe.flush(DEADLINE_SECONDS)

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.history.last(10_000)]

    def close(self) -> None:
        self.history.close()
        assert self.scribe.close(DEADLINE_SECONDS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "history.db"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Opened]]:
    """Open the history, again and again: ``opened(limit=…)`` closes the one before."""
    made: list[Opened] = []

    def again(limit: int = history.LIMIT) -> Opened:
        while made:
            made.pop().close()
        made.append(Opened(path, limit))
        return made[-1]

    yield again
    while made:
        made.pop().close()


def new(count: int) -> list[Record]:
    return [Record(kind="reload", generation=number) for number in range(1, count + 1)]


def set_aside(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.glob("history.db*.corrupt-*"))


# --- what is kept -----------------------------------------------------------------------------------------


def test_records_come_back_newest_first_after_a_restart(opened: Callable[..., Opened]) -> None:
    first = opened()
    first.add(RELOAD, CRASH)
    assert first.history.last(10) == [CRASH, RELOAD]
    second = opened()
    assert [record.as_json() for record in second.history.last(10)] == [CRASH.as_json(), RELOAD.as_json()]
    assert [record.id for record in second.history.last(1)] == [CRASH.id]
    assert second.history.last(0) == second.history.last(-1) == []
    assert second.scribe.problems == ()


def test_document_has_nothing_but_json_and_times_in_microseconds() -> None:
    document = RELOAD.as_json()
    assert document["paths"] == ["modules/answer.py", "modules/\udcff.py"]
    assert document["stages"] == {"settle": 0.015, "compile": 0.007123}
    assert (document["total_seconds"], document["ending"]) == (0.043123, None)
    ending = CRASH.as_json()["ending"]
    assert (ending["signal"], ending["oom"], ending["exit_status"]) == ("SIGSEGV", False, None)
    assert ending["dump"] == ["Thread 0x1 (most recent call first):"]


def test_every_field_of_a_record_is_documented() -> None:
    reference = Path(__file__).parents[2] / "docs" / "reference.md"
    section = reference.read_text(encoding="utf-8").partition("## `history --json`")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`([a-z_]+)`", section))
    document = CRASH.as_json()
    assert {*document, *document["ending"]} <= documented


def test_records_have_ids_and_times_of_their_own() -> None:
    assert len({record.id for record in new(100)}) == 100
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", RELOAD.at)


def test_only_the_newest_are_kept_in_memory_and_on_disk(path: Path, opened: Callable[..., Opened]) -> None:
    records = new(25)
    first = opened(limit=10)
    for record in records[:12]:
        first.add(record)
    first.add(*records[12:])
    assert first.ids == [record.id for record in reversed(records[15:])]
    with closing(sqlite3.connect(path)) as shell:
        assert shell.execute("SELECT count(*) FROM record").fetchone() == (10,)
    assert opened(limit=10).ids == [record.id for record in reversed(records[15:])]
    assert opened(limit=3).ids == [record.id for record in reversed(records[22:])]


def test_what_a_child_wrote_is_bounded(opened: Callable[..., Opened]) -> None:
    lines = tuple(f"{number} {'x' * 10_000}" for number in range(1_000))
    made = opened()
    made.add(
        Record(
            kind="restart",
            detail="y" * 1_000_000,
            paths=lines,
            paths_total=1_000,
            ending=Ending(output=lines, dump=lines),
        )
    )
    (kept,) = made.history.last(1)
    assert kept.ending is not None
    assert [len(kept.paths), len(kept.ending.output), len(kept.ending.dump)] == [20, 50, 200]
    assert kept.paths_total == 1_000
    assert kept.ending.output[-1].startswith("999 xxx")
    assert kept.ending.dump[-1].endswith("x…")
    assert len(str(kept.as_json())) < 400_000


def test_only_the_owner_may_read_it(path: Path, opened: Callable[..., Opened]) -> None:
    opened().add(RELOAD)
    modes = {entry.name: entry.stat().st_mode & 0o777 for entry in path.parent.iterdir()}
    assert modes == {"history.db": 0o600, "history.db-wal": 0o600, "history.db-shm": 0o600}


def test_closing_leaves_one_file(path: Path, opened: Callable[..., Opened]) -> None:
    made = opened()
    made.history.add(RELOAD)
    made.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["history.db"]


# --- the disk and its other users -------------------------------------------------------------------------


def test_nobody_waits_for_a_disk_that_stalls(opened: Callable[..., Opened]) -> None:
    made = opened()
    made.add(RELOAD)
    begun, answer = threading.Event(), threading.Event()
    made.scribe.submit("begin", begun.set)
    made.scribe.submit("stall", answer.wait)
    assert begun.wait(DEADLINE_SECONDS)
    made.history.add(CRASH)
    assert made.ids == [CRASH.id, RELOAD.id]
    assert not made.scribe.flush(0)
    answer.set()
    assert opened().ids == [CRASH.id, RELOAD.id]


def test_start_does_not_wait_for_a_disk_that_stalls(
    path: Path, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = opened()
    earlier.add(*new(2), RELOAD)
    earlier.close()
    monkeypatch.setattr(history, "_LOAD_SECONDS", 0.01)
    scribe, answer = Scribe(), threading.Event()
    scribe.submit("stall", answer.wait)
    late = History(path, scribe, limit=2)
    late.add(CRASH)
    assert late.last(10) == [CRASH]
    answer.set()
    assert scribe.flush(DEADLINE_SECONDS)
    assert [record.id for record in late.last(10)] == [CRASH.id, RELOAD.id]
    late.close()
    assert scribe.close(DEADLINE_SECONDS)


def test_database_that_somebody_locks_is_told_and_written_later(
    path: Path, opened: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history, "_BUSY_SECONDS", 0.05)
    made = opened()
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN IMMEDIATE")
        made.add(RELOAD)
        assert made.scribe.problems == ("cannot write the history: database is locked",)
        assert made.scribe.errors_total == 1
        shell.execute("ROLLBACK")
    made.add(CRASH)
    assert not made.scribe.problems
    assert opened().ids == [CRASH.id, RELOAD.id]


def test_reader_with_an_open_transaction_is_no_hindrance(path: Path, opened: Callable[..., Opened]) -> None:
    made = opened()
    made.add(RELOAD)
    with closing(sqlite3.connect(path, isolation_level=None)) as shell:
        shell.execute("BEGIN")
        assert shell.execute("SELECT count(*) FROM record").fetchone() == (1,)
        made.add(CRASH)
        assert not made.scribe.problems
        assert shell.execute("SELECT count(*) FROM record").fetchone() == (1,)
    assert set_aside(path) == []


def test_full_disk_is_told_and_what_it_did_not_take_is_written_later(opened: Callable[..., Opened]) -> None:
    made = opened()

    def pages(count: int) -> None:
        assert made.history._connection is not None
        made.history._connection.execute(f"PRAGMA max_page_count = {count}")

    made.scribe.submit("limit", lambda: pages(1))
    records = [replace(record, detail="x" * 3_000) for record in new(20)]
    made.add(*records)
    assert made.scribe.problems == ("cannot write the history: database or disk is full",)
    made.scribe.submit("lift", lambda: pages(10_000))
    made.add(RELOAD)
    assert not made.scribe.problems
    assert opened().ids == [RELOAD.id, *(record.id for record in reversed(records))]


def test_fault_of_ours_costs_no_file(path: Path, opened: Callable[..., Opened]) -> None:
    made = opened()
    made.add(RELOAD)
    assert made.history._connection is not None
    made.scribe.submit("close too early", made.history._connection.close)
    made.add(CRASH)
    assert made.scribe.problems == ("cannot write the history: Cannot operate on a closed database.",)
    assert set_aside(path) == []


def test_directory_that_cannot_be_used_is_told_and_tried_again(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    made = Opened(tmp_path / "file" / "history.db")
    made.add(RELOAD)
    assert (made.ids, made.scribe.errors_total) == ([RELOAD.id], 2)
    assert made.scribe.problems == (f"cannot write the history: File exists ({tmp_path}/file)",)
    (tmp_path / "file").unlink()
    made.add(CRASH)
    assert not made.scribe.problems
    made.close()
    again = Opened(tmp_path / "file" / "history.db")
    assert again.ids == [CRASH.id, RELOAD.id]
    again.close()


# --- files that cannot be used ----------------------------------------------------------------------------


def test_file_that_is_no_database_is_set_aside(path: Path, opened: Callable[..., Opened]) -> None:
    path.parent.mkdir()
    path.write_bytes(b"no database, but long enough to have a header" * 100)
    made = opened()
    (aside,) = set_aside(path)
    assert re.fullmatch(r"history\.db\.corrupt-\d{8}T\d{6}\.\d{6}Z", aside)
    assert made.scribe.problems == (
        f"{path} cannot be used (file is not a database); it was set aside as {aside}, a new one begun",
    )
    made.add(RELOAD)
    assert made.scribe.errors_total == 1
    assert opened().ids == [RELOAD.id]


def test_what_lies_beside_a_file_goes_aside_with_it(path: Path, opened: Callable[..., Opened]) -> None:
    made = opened()
    made.add(RELOAD)
    with closing(sqlite3.connect(path)) as shell:
        shell.execute("DROP TABLE record")
        made.add(CRASH)  # The shell has its files open.
        aside = set_aside(path)
        assert [name.rpartition("Z")[2] for name in aside] == ["", "-shm", "-wal"]
        (tables,) = shell.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchone()
        assert tables == 0
    assert opened().ids == [CRASH.id, RELOAD.id]


def damage(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as shell:
        for statement in statements:
            shell.execute(statement)
        shell.commit()


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("PRAGMA user_version = 7", "it is of version 7, this supervisor knows 1"),
        ("PRAGMA user_version = 0", "it is of version 0, this supervisor knows 1"),
        ("DROP TABLE record", "no such table: record"),
        ("UPDATE record SET body = '{'", "it holds no record: "),
        ("UPDATE record SET body = '[]'", "it holds no record: "),
        ("UPDATE record SET body = x'00'", "it holds no record: "),
        ("UPDATE record SET body = CAST(x'ff' AS TEXT)", "Could not decode to UTF-8"),
        ("UPDATE record SET body = json_set(body, '$.kind', 'party')", "it holds no record: "),
    ],
)
def test_file_of_another_version_or_kind_is_set_aside(
    path: Path, opened: Callable[..., Opened], statement: str, why: str
) -> None:
    first = opened()
    first.add(RELOAD)
    first.close()
    damage(path, statement)
    made = opened()
    assert made.ids == []
    (problem,) = made.scribe.problems
    assert f"cannot be used ({why}" in problem
    made.add(CRASH)
    assert opened().ids == [CRASH.id]


def test_damaged_files_never_stop_us_and_the_next_record_is_kept(
    path: Path, opened: Callable[..., Opened]
) -> None:
    first = opened()
    first.add(*[replace(record, detail="x" * 500) for record in new(40)])
    first.close()
    whole = path.read_bytes()
    found = random.Random(20260102)  # noqa: S311 -- damage
    outcomes = set()
    for round_number in range(60):
        damaged = bytearray(whole)
        if round_number % 2:
            del damaged[found.randrange(len(whole)) :]
        else:
            at = found.choice([found.randrange(100), found.randrange(len(whole))])
            damaged[at : at + 16] = found.randbytes(16)
        path.write_bytes(damaged)
        made = opened()
        made.add(RELOAD)
        assert made.ids[0] == RELOAD.id
        again = opened()
        assert again.ids[0] == RELOAD.id, (round_number, made.scribe.problems)
        outcomes.add(made.scribe.problems == ())
        again.close()
        assert len([name for name in set_aside(path) if name.endswith("Z")]) <= 3
    assert [entry.name for entry in path.parent.iterdir() if entry.name not in set_aside(path)] == [path.name]
    assert outcomes == {True, False}


def test_database_that_breaks_while_in_use_is_begun_anew_from_memory(
    path: Path, opened: Callable[..., Opened]
) -> None:
    made = opened()
    made.add(RELOAD)
    damage(path, "DROP TABLE record")
    made.add(CRASH)
    assert len([name for name in set_aside(path) if name.endswith("Z")]) == 1
    assert opened().ids == [CRASH.id, RELOAD.id]


def test_database_that_a_cleaner_took_away_is_written_anew_from_memory(
    path: Path, opened: Callable[..., Opened]
) -> None:
    made = opened()
    made.add(RELOAD)
    for entry in path.parent.iterdir():
        entry.unlink()
    path.parent.rmdir()
    made.add(CRASH)
    assert not made.scribe.problems
    assert opened().ids == [CRASH.id, RELOAD.id]


ADDING = """
import sys
from pathlib import Path
from supervisor.history import History, Record
from supervisor.scribe import Scribe
scribe = Scribe()
history = History(Path(sys.argv[1]), scribe, limit=50)
while True:
    record = Record(kind="reload", detail="x" * 2000)
    history.add(record)
    assert scribe.flush(10)
    print(record.id, flush=True)
"""


def test_records_survive_kill_9(path: Path, opened: Callable[..., Opened]) -> None:
    told: list[str] = []
    for round_number in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", ADDING, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told += [process.stdout.readline().strip() for _ in range(5 + 20 * round_number)]
        process.kill()
        told += process.stdout.read().split()
        process.wait()
        process.stdout.close()
        made = opened(limit=50)
        assert not made.scribe.problems
        written = made.ids
        made.close()
        # The one on its way may have come through; then it is the newest.
        assert list(reversed(told))[: len(written) - 1] in (written[:-1], written[1:])
        told = list(reversed(written))


# --- for people -------------------------------------------------------------------------------------------


def printed(
    records: list[Record], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    documents: list[dict[str, Any]] = [record.as_json() for record in records]
    print_history(documents)
    return capsys.readouterr().out


def test_people_read_when_what_why_and_where_the_time_went(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "UTC")
    asked = Record(
        kind="operator", at="2026-01-02T03:04:05.678+00:00", trigger="cli", outcome="paused", uid=0
    )
    lines = [line.rstrip() for line in printed([CRASH, RELOAD, asked], capsys, monkeypatch).splitlines()]
    assert re.search(r":\d\d +restart by crash, live \(crash\), generation 3$", lines[0])
    assert lines[1].strip() == "ended by SIGSEGV"
    assert re.search(r"reload by watch, live, generation 2, tree aaaaaaaaaaaa, 2 changed: modules/", lines[2])
    assert lines[3].strip() == "s" * 14 + "c" * 7 + "." * 19 + " 43 ms"
    assert lines[4].strip() == "settle 15.0, compile 7.1"
    assert re.search(r"^2026-01-02 \d\d:\d\d:05 +operator by cli, paused$", lines[5])


def test_history_shows_brackets_and_what_no_terminal_should_get(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = replace(CRASH, detail="[red]x[/] \x1b[2J \udcff")
    assert r"[red]x[/] \x1b[2J \udcff" in printed([odd], capsys, monkeypatch)


def test_empty_history_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed([], capsys, monkeypatch) == "nothing has been recorded yet\n"
