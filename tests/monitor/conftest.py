"""What the tests of the monitor share: settings, one pass of the real relay, and a look into the tables."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

import monitor
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import ProjectsFile
from monitor.relay import Relay, Stop
from monitor.settings import Settings, Values, resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from datetime import datetime

    from monitor.demo.bridge import SyntheticBridge

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def settings(bridge: SyntheticBridge, database_url: str, projects_file: Path) -> Settings:
    """Settings of a monitor that does one pass over everything."""
    return resolve(
        Values(
            bridge=str(bridge.messages_db),
            database_url=database_url,
            projects=str(projects_file),
            since="beginning",
            once=True,
        )
    )


@pytest.fixture
def relay_once(settings: Settings) -> Callable[..., MonitorMetrics]:
    """Run the real relay once over the backlog; fields of the settings can be replaced by name."""

    def run(**changes: Any) -> MonitorMetrics:
        changed = replace(settings, **changes)
        assert changed.projects is not None
        metrics = MonitorMetrics()
        with closing(Stop()) as stop, closing(Notifier()) as notifier:
            Relay(
                changed, ProjectsFile(changed.projects), notifier=notifier, metrics=metrics, stop=stop
            ).run()
        return metrics

    return run


@pytest.fixture
def relay_running(settings: Settings) -> Callable[..., AbstractContextManager[MonitorMetrics]]:
    """Run the real relay in a thread while a block runs; fields of the settings can be replaced by name."""

    @contextmanager
    def run(**changes: Any) -> Iterator[MonitorMetrics]:
        changed = replace(settings, once=False, **changes)
        assert changed.projects is not None
        metrics = MonitorMetrics()
        with closing(Stop()) as stop, closing(Notifier()) as notifier:
            relay = Relay(
                changed, ProjectsFile(changed.projects), notifier=notifier, metrics=metrics, stop=stop
            )
            thread = threading.Thread(target=relay.run)
            thread.start()
            try:
                yield metrics
            finally:
                stop.request()
                thread.join()

    return run


@pytest.fixture
def rows(database_url: str) -> Callable[..., list[tuple[Any, ...]]]:
    """Run a query against the test's database."""

    def query(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url, autocommit=True) as connection:
            result = connection.execute(statement.encode(), parameters or None)
            return result.fetchall() if result.description else []

    return query


@pytest.fixture
def table(rows: Callable[..., list[tuple[Any, ...]]]) -> Callable[..., None]:
    """Make the dashboard's table as an old system has filled it; each row is drop, project, time, sender."""

    def fill(*lines: tuple[str, str, datetime, str | None]) -> None:
        rows((Path(monitor.__file__).parent / "migrations" / "qa_photo_reviews.sql").read_text("utf-8"))
        for number, project, sent_at, sender in lines:
            rows(
                "INSERT INTO qa_photo_reviews (drop_number, project, whatsapp_message_date, review_date,"
                " submitted_by, user_name, incomplete, feedback_sent)"
                " VALUES (%s, %s, %s, %s, %s, %s, true, now())",
                *(number, project, sent_at, sent_at.date(), sender, sender or "typed by hand"),
            )

    return fill


class MonitorProcess:
    """`monitor.app:main` as a process of its own, with a socket for its notifications."""

    def __init__(self, environment: dict[str, str], socket_path: Path) -> None:
        self._inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._inbox.bind(str(socket_path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from monitor.app import main; main()"],
            env={**environment, "NOTIFY_SOCKET": str(socket_path)},
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def await_message(self, wanted: str, seconds: float = 30.0) -> str:
        """Return the first notification that contains `wanted`."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            readable, _, _ = select.select([self._inbox], [], [], left)
            if readable and wanted in (text := self._inbox.recv(4096).decode()):
                return text
        raise AssertionError(f"no notification with {wanted!r} within {seconds} s")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal, wait for the end and return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def output(self) -> str:
        """Return what the ended process wrote."""
        return self.process.communicate(timeout=30)[0]

    def close(self) -> None:
        """End the process, if it has not ended, and close everything."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate(timeout=30)
        self._inbox.close()


@pytest.fixture
def environment(bridge: SyntheticBridge, database_url: str, projects_file: Path) -> dict[str, str]:
    """The environment of a monitor that runs as a process."""
    own = {
        name: value
        for name, value in os.environ.items()
        if name not in {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WA_TREE", "WA_GENERATION", "NEON_DATABASE_URL"}
    }
    return {
        **own,
        "WHATSAPP_DB_PATH": str(bridge.folder),
        "DATABASE_URL": database_url,
        "WA_PROJECTS": str(projects_file),
        "WA_SINCE": "beginning",
    }


@pytest.fixture
def start_monitor(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., MonitorProcess]]:
    """Start monitors as processes; all of them are ended with the test."""
    started: list[MonitorProcess] = []

    def start(**changes: str) -> MonitorProcess:
        path = tmp_path_factory.mktemp("n") / "s"
        started.append(MonitorProcess({**environment, **changes}, path))
        return started[-1]

    yield start
    for process in started:
        process.close()


@pytest.fixture
def eventually() -> Callable[[Callable[[], bool]], None]:
    """Wait until a condition on the outside world holds; for what no event reports."""

    def wait(condition: Callable[[], bool], seconds: float = 30.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            select.select([], [], [], 0.02)

    return wait
