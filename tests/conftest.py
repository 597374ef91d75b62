"""What all tests share: a real PostgreSQL, a synthetic bridge, and a summary of what this machine did not check."""

from __future__ import annotations

import itertools
import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
from psycopg import sql

from monitor.demo.bridge import PROJECTS_YAML, SyntheticBridge
from monitor.embedded import EmbeddedPostgres

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_numbers = itertools.count(1)


@pytest.fixture(scope="session", autouse=True)
def _bytecode_is_written() -> Iterator[None]:
    """Child processes of tests write bytecode: the variable that forbids it hides the stale-bytecode bug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """One server for the whole session."""
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of an empty database of the test's own."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    yield urlunsplit(urlsplit(postgres.url)._replace(path=f"/{name}"))
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


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
