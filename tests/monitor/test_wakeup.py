"""Being woken by the bridge's writes, and what happens where no event comes."""

from __future__ import annotations

import select
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import ProjectsFile
from monitor.relay import Relay, Stop
from monitor.wakeup import Wakeup

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from monitor.settings import Settings

    Rows = Callable[..., list[tuple[Any, ...]]]
    Eventually = Callable[[Callable[[], bool]], None]

PHONE = "27711234567"
_LONG_SECONDS = 20.0


@pytest.fixture
def wakeup(bridge: SyntheticBridge) -> Iterator[Wakeup]:
    with closing(Wakeup(bridge.folder, ("messages.db", "whatsapp.db"))) as opened:
        yield opened


def _rings(wakeup: Wakeup, seconds: float = _LONG_SECONDS) -> bool:
    return bool(select.select([wakeup], [], [], seconds)[0]) and wakeup.rung()


def _post(bridge: SyntheticBridge, number: int) -> None:
    bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR{1000000 + number}")


def _quiet(wakeup: Wakeup) -> None:
    while _rings(wakeup, 0.2):
        pass


def test_write_rings_once_its_transaction_is_over(bridge: SyntheticBridge, wakeup: Wakeup) -> None:
    assert wakeup.trusted
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("INSERT INTO chats VALUES ('x', '', '')")
        assert (bridge.folder / "messages.db-journal").stat().st_size
        assert not _rings(wakeup, 0.2)
        writer.execute("COMMIT")
        assert _rings(wakeup)


@pytest.mark.usefixtures("wakeup")
def test_descriptor_is_not_passed_on_to_other_programs() -> None:
    code = "import os; print(*(os.path.realpath(fd) for fd in os.scandir('/proc/self/fd')))"
    listed = subprocess.run(
        [sys.executable, "-c", code], close_fds=False, check=True, capture_output=True, text=True
    )
    assert "inotify" not in listed.stdout


def test_map_rings_too(bridge: SyntheticBridge, wakeup: Wakeup) -> None:
    bridge.map_lid("100000000000017", PHONE)
    assert _rings(wakeup)


@pytest.mark.parametrize("mode", ["wal", "truncate"])
def test_other_journal_modes_ring(bridge: SyntheticBridge, wakeup: Wakeup, mode: str) -> None:
    with closing(sqlite3.connect(bridge.messages_db, isolation_level=None)) as writer:
        writer.execute(f"PRAGMA journal_mode = {mode}")
        _quiet(wakeup)
        writer.execute("INSERT INTO chats VALUES ('x', '', '')")
        assert _rings(wakeup)


def test_reading_does_not_ring(bridge: SyntheticBridge, wakeup: Wakeup) -> None:
    _post(bridge, 1)
    _quiet(wakeup)
    with closing(sqlite3.connect(f"file:{bridge.messages_db}?mode=ro", uri=True)) as reader:
        assert reader.execute("SELECT count(*) FROM messages").fetchone() == (1,)
    (bridge.folder / "notes.txt").write_text("not ours")
    assert not _rings(wakeup, 0.2)


def test_replaced_file_rings(bridge: SyntheticBridge, wakeup: Wakeup) -> None:
    other = bridge.folder / "restored"
    other.write_bytes(bridge.messages_db.read_bytes())
    _quiet(wakeup)
    other.replace(bridge.messages_db)
    assert _rings(wakeup)


def test_what_no_event_announced_ends_the_trust_and_the_next_event_restores_it(
    bridge: SyntheticBridge, wakeup: Wakeup
) -> None:
    wakeup.missed()
    assert not wakeup.trusted
    _post(bridge, 1)
    assert _rings(wakeup)
    assert wakeup.trusted


def test_folder_that_cannot_be_watched_is_looked_at(
    bridge: SyntheticBridge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "no watches left")

    monkeypatch.setattr("watchdog.observers.api.BaseObserver.schedule", refuse)
    with closing(Wakeup(bridge.folder, ("messages.db",))) as blind:
        assert not blind.trusted


@pytest.mark.parametrize("blind", [False, True])
def test_messages_are_stored_with_and_without_events(
    bridge: SyntheticBridge,
    settings: Settings,
    rows: Rows,
    eventually: Eventually,
    monkeypatch: pytest.MonkeyPatch,
    *,
    blind: bool,
) -> None:
    if blind:
        monkeypatch.setattr("monitor.wakeup._Ringer.dispatch", lambda *_: None)
    assert settings.projects is not None
    with closing(Stop()) as stop, closing(Notifier()) as notifier:
        relay = Relay(
            replace(settings, once=False),
            ProjectsFile(settings.projects),
            notifier=notifier,
            metrics=MonitorMetrics(),
            stop=stop,
        )
        thread = threading.Thread(target=relay.run)
        thread.start()
        try:
            for number in range(5):
                _post(bridge, number)
                stored = [(number + 1,)]
                eventually(partial(_holds, rows, stored))
        finally:
            stop.request()
            thread.join()


def _holds(rows: Rows, stored: list[tuple[int]]) -> bool:
    try:
        return rows("SELECT count(*) FROM qa_photo_reviews") == stored
    except psycopg.errors.UndefinedTable:  # the relay has only just begun
        return False
