"""What all tests share: a real PostgreSQL, a synthetic bridge, and a word on what was not checked."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from psycopg import sql

from monitor.demo.bridge import PROJECTS_YAML, SyntheticBridge
from monitor.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_EMPTY = """
DO $$
DECLARE
    schema name;
BEGIN
    PERFORM pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid();
    FOR schema IN SELECT nspname FROM pg_namespace
                  WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE format('DROP SCHEMA %I CASCADE', schema);
    END LOOP;
    CREATE SCHEMA public;
    EXECUTE format('ALTER DATABASE %I RESET ALL', current_database());
END
$$
"""

# How fast examples are made and run is a property of the machine, and it may be busy.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def _children_run_as_installed() -> Iterator[None]:
    """Take the caller's habits out of the environment of children.

    Bytecode that is never written hides the stale-bytecode bug; unbuffered output tears lines apart in a pipe
    that two processes share; a shell that starts us in the background has them ignore Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One server for the whole session."""
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def _database(postgres: EmbeddedPostgres) -> str:
    """One database for the whole session, since making one takes ten times as long as emptying it."""
    name = f"test_{os.getpid()}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return urlunsplit(urlsplit(postgres.url)._replace(path=f"/{name}"))


@pytest.fixture
def database_url(_database: str) -> Iterator[str]:
    """The URL of an empty database; whoever is still connected to it at the end is thrown out."""
    yield _database
    with psycopg.connect(_database, autocommit=True) as connection:
        connection.execute(_EMPTY)


@pytest.fixture
def bridge(tmp_path: Path) -> SyntheticBridge:
    """An empty bridge: both files, no message, no mapping."""
    created = SyntheticBridge(tmp_path / "bridge")
    created.create()
    return created


@pytest.fixture
def projects_file(tmp_path: Path) -> Path:
    """Northfield and Eastvale are enabled, Westmoor is not."""
    path = tmp_path / "projects.yaml"
    path.write_text(PROJECTS_YAML, encoding="utf-8")
    return path


@pytest.fixture
def not_checked(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Say in the summary what this test could not check here, although it passed."""

    def say(what: str) -> None:
        request.node.user_properties.append(("not_checked", what))

    return say


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print a figure in the summary. It depends on the machine, so no test asserts it."""

    def say(what: str) -> None:
        request.node.user_properties.append(("measured", what))

    return say


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name everything that was left out, a green run on a small machine promises no more than it saw."""
    lines, figures = [], []
    for reports in terminalreporter.stats.values():
        for report in reports:
            if not isinstance(report, pytest.TestReport):
                continue
            if report.skipped and isinstance(report.longrepr, tuple):
                lines.append(f"{report.nodeid}: {report.longrepr[2].removeprefix('Skipped: ')}")
            if report.when == "teardown":
                continue
            said = [(key, f"{report.nodeid}: {what}") for key, what in report.user_properties]
            lines += [line for key, line in said if key == "not_checked"]
            figures += [line for key, line in said if key == "measured" and report.when == "call"]
    if figures:
        terminalreporter.section("measured on this machine")
        for line in sorted(figures):
            terminalreporter.write_line(line)
    terminalreporter.section("not checked on this machine")
    for line in sorted(set(lines)) or ["nothing was left out"]:
        terminalreporter.write_line(line)
