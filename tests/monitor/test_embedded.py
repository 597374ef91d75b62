"""The embedded PostgreSQL: there when asked for, gone with its owner, and clear about what it needs."""

from __future__ import annotations

import importlib.util
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from monitor import embedded
from monitor.embedded import EmbeddedPostgres, EmbeddedPostgresError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

OWNER = """
import sys
from pathlib import Path
from monitor.embedded import EmbeddedPostgres
with EmbeddedPostgres(Path(sys.argv[1]), durable=False) as server:
    pid = (Path(sys.argv[1]) / "cluster" / "postmaster.pid").read_text().split()[0]
    print(pid, server.url, flush=True)
    sys.stdin.read()
"""
LIMIT_SECONDS = 20


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], int, str]]]:
    """Start another process that owns a server in ``tmp_path / data``: it, the server's pid, the URL."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], int, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path / "data")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        pid, url = process.stdout.readline().split()
        return process, int(pid), url

    yield start
    for process in started:
        process.kill()
        process.communicate()


def await_end(pidfd: int) -> None:
    """Wait until the process behind ``pidfd`` has ended."""
    ended, _, _ = select.select([pidfd], [], [], LIMIT_SECONDS)
    assert ended, f"still running after {LIMIT_SECONDS} s"


def answer(url: str, question: str) -> object:
    with psycopg.connect(url) as connection:
        row = connection.execute(question.encode()).fetchone()
    assert row is not None
    return row[0]


def test_listens_on_its_socket_alone(postgres: EmbeddedPostgres) -> None:
    assert answer(postgres.url, "SHOW listen_addresses") == ""
    assert answer(postgres.url, "SHOW server_encoding") == "UTF8"


def test_keeps_data_over_a_restart(tmp_path: Path) -> None:
    with (
        EmbeddedPostgres(tmp_path / "data", durable=False) as server,
        psycopg.connect(server.url) as connection,
    ):
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    with EmbeddedPostgres(tmp_path / "data", durable=False) as server:
        assert answer(server.url, "SELECT value FROM kept") == 7


def test_is_durable_unless_told_otherwise(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "data") as server:
        assert answer(server.url, "SHOW fsync") == "on"
        assert answer(server.url, "SHOW synchronous_commit") == "on"


@pytest.mark.parametrize("name", ["with space", "with,comma", "it's quoted", "l" * 120])
def test_runs_below_any_directory_name_and_leaves_nothing_in_tmp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    (tmp_path / "t").mkdir()
    with EmbeddedPostgres(tmp_path / name, durable=False) as server:
        assert answer(server.url, "SELECT 1") == 1
    assert list((tmp_path / "t").iterdir()) == []


def test_ends_with_its_owner_even_by_kill_9_and_starts_again_at_once(
    owner: Callable[[], tuple[subprocess.Popen[str], int, str]], tmp_path: Path
) -> None:
    process, server_pid, url = owner()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 7 AS value")
    with closing(os.fdopen(os.pidfd_open(server_pid), "rb")) as watched:
        process.kill()
        with EmbeddedPostgres(tmp_path / "data", durable=False) as server:
            assert answer(server.url, "SELECT value FROM kept") == 7
        await_end(watched.fileno())


def test_removes_the_socket_directory_that_a_killed_owner_left(
    owner: Callable[[], tuple[subprocess.Popen[str], int, str]], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir(mode=0o700)
    left = Path(tempfile.mkdtemp(prefix="wa-postgres-"))
    (tmp_path / "data" / "socket").symlink_to(left)
    process, _, _ = owner()
    assert not left.exists()
    process.kill()


def test_leaves_ctrl_c_in_the_terminal_to_its_owner(
    owner: Callable[[], tuple[subprocess.Popen[str], int, str]],
) -> None:
    process, server_pid, _ = owner()
    assert os.getpgid(server_pid) != os.getpgid(process.pid)


def test_refuses_a_directory_that_another_process_runs_a_server_on(
    owner: Callable[[], tuple[subprocess.Popen[str], int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, _, url = owner()
    monkeypatch.setattr(embedded, "_LOCK_LIMIT_SECONDS", 0.0)
    with (
        pytest.raises(EmbeddedPostgresError, match=r"already running on .*data.*DATABASE_URL"),
        EmbeddedPostgres(tmp_path / "data"),
    ):
        pass
    assert answer(url, "SELECT 1") == 1


def test_an_interrupted_first_start_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "data" / "cluster.unfinished" / "base").mkdir(parents=True)
    with EmbeddedPostgres(tmp_path / "data", durable=False) as server:
        assert answer(server.url, "SELECT 1") == 1


def test_a_damaged_cluster_is_reported_with_the_servers_own_reason(tmp_path: Path) -> None:
    with EmbeddedPostgres(tmp_path / "data", durable=False):
        pass
    (tmp_path / "data" / "cluster" / "PG_VERSION").write_text("9.4\n")
    with (
        pytest.raises(EmbeddedPostgresError, match=r"did not start: .*incompatible.*DATABASE_URL"),
        EmbeddedPostgres(tmp_path / "data"),
    ):
        pass


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(EmbeddedPostgresError, match="file/data: Not a directory; choose another"),
        EmbeddedPostgres(tmp_path / "file" / "data"),
    ):
        pass


def test_without_the_wheel_the_sentence_names_both_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    wanted = "not built for Python" if sys.version_info >= (3, 14) else r"wa-monitor\[embedded\]"
    with (
        pytest.raises(EmbeddedPostgresError, match=f"{wanted}.*DATABASE_URL"),
        EmbeddedPostgres(tmp_path / "data"),
    ):
        pass
    assert not (tmp_path / "data").exists()


def test_on_a_python_without_a_build_the_sentence_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(sys, "version_info", (3, 14, 0, "final", 0))
    with (
        pytest.raises(EmbeddedPostgresError, match=r"not built for Python 3\.14: .*DATABASE_URL"),
        EmbeddedPostgres(tmp_path / "data"),
    ):
        pass


def test_is_refused_outside_the_main_thread(tmp_path: Path) -> None:
    refused: list[EmbeddedPostgresError] = []

    def start() -> None:
        try:
            with EmbeddedPostgres(tmp_path / "data"):
                pass
        except EmbeddedPostgresError as error:
            refused.append(error)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(LIMIT_SECONDS)
    assert "main thread" in str(refused[0])


def test_has_no_url_while_it_is_not_running(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path / "data", durable=False)
    with pytest.raises(EmbeddedPostgresError, match="not running"):
        _ = server.url


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: how the server runs where root has no user namespaces"
)
def test_runs_as_nobody_where_root_has_no_user_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_names, **_options: None)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        with EmbeddedPostgres(Path(folder) / "data", durable=False) as server:
            assert answer(server.url, "SELECT 1") == 1
            assert (Path(folder) / "data" / "cluster").stat().st_uid != 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: how another user is served")
def test_runs_as_an_ordinary_user_and_ends_with_that_owner() -> None:
    python = readable_python()
    if python is None:
        pytest.skip(
            "no interpreter of this version that other users may run: the embedded PostgreSQL of others"
        )
    repository = Path(embedded.__file__).parents[1]
    packages = Path(psycopg.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, 65534, 65534)
        with subprocess.Popen(
            [python, "-c", OWNER, f"{folder}/data"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=65534,
            group=65534,
            extra_groups=[],
            cwd="/",
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": f"{repository}:{packages}",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        ) as process:
            assert process.stdout is not None
            server_pid = int(process.stdout.readline().split()[0])
            assert Path(f"/proc/{server_pid}").stat().st_uid == 65534
            with closing(os.fdopen(os.pidfd_open(server_pid), "rb")) as watched:
                process.send_signal(signal.SIGKILL)
                await_end(watched.fileno())


def readable_python() -> str | None:
    """Find an interpreter of the running version that another user may execute."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            subprocess.run(
                [candidate, "-c", ""], check=True, user=65534, group=65534, extra_groups=[], cwd="/", env={}
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        return candidate
    return None
