"""Behind a transaction pooler: a real PgBouncer that gives each transaction whatever connection is free."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest

from monitor.bridge import Bridge
from monitor.canary import try_write
from monitor.database import connect
from monitor.demo.bridge import NORTHFIELD, SyntheticBridge
from monitor.repair import repair
from monitor.schema import prepare
from monitor.settings import DatabaseUrl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from monitor.embedded import EmbeddedPostgres

    Rows = Callable[..., list[tuple[Any, ...]]]
    Eventually = Callable[[Callable[[], bool]], None]

PHONE = "27711234567"
_PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
_PORT = 6432


@pytest.fixture
def pooled_url(postgres: EmbeddedPostgres, database_url: str, eventually: Eventually) -> Iterator[str]:
    """The test's database through a pooler with one connection for everybody."""
    if _PROGRAM is None:
        pytest.skip("PgBouncer is not installed: the monitor behind a transaction pooler")
    server = psycopg.conninfo.conninfo_to_dict(postgres.url)
    name = urlsplit(database_url).path[1:]
    with tempfile.TemporaryDirectory(prefix="wa-pool-", dir="/tmp") as folder:
        settings = Path(folder) / "settings.ini"
        settings.write_text(
            f"[databases]\n{name} = host={server['host']} user=postgres\n"
            f"[pgbouncer]\nlisten_addr =\nunix_socket_dir = {folder}\nlisten_port = {_PORT}\n"
            "auth_type = any\npool_mode = transaction\ndefault_pool_size = 1\n"
            f"logfile = {folder}/log\n"
        )
        # It refuses to be root; as the embedded PostgreSQL, it is somebody else in a namespace of its own.
        someone = ["unshare", "--user", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        pooler = subprocess.Popen(
            [*someone, _PROGRAM, "--quiet", str(settings)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            eventually(lambda: pooler.poll() is not None or (Path(folder) / f".s.PGSQL.{_PORT}").exists())
            if pooler.poll() is not None and someone:
                assert pooler.stdout is not None
                pytest.skip(f"no PgBouncer as root here: {pooler.stdout.read().decode()[-200:]!r}")
            yield f"postgresql://postgres@/{name}?host={folder}&port={_PORT}"
        finally:
            pooler.kill()
            pooler.communicate()


def test_handover_kill_and_repair_work_through_a_transaction_pooler(
    bridge: SyntheticBridge, start_monitor: Any, rows: Rows, eventually: Eventually, pooled_url: str
) -> None:
    with closing(connect(DatabaseUrl(pooled_url))) as database:
        prepare(database)
        try_write(database, "Northfield")
    first = start_monitor(DATABASE_URL=pooled_url)
    first.await_message("writing")
    second = start_monitor(DATABASE_URL=pooled_url)
    second.await_message("standing by")
    third = start_monitor(DATABASE_URL=pooled_url)
    third.await_message("standing by")
    for number in range(60):
        bridge.post(chat_jid=NORTHFIELD, sender=PHONE, content=f"DR{1000000 + number}")
        if number == 20:
            assert first.stop() == 0
            assert "tried again" not in first.output()
        if number == 40:
            eventually(lambda: rows("SELECT epoch FROM wa_monitor.cursor") == [(2,)])
            (second if _writes(rows, second) else third).process.kill()
    eventually(lambda: rows("SELECT count(*) FROM qa_photo_reviews") == [(60,)])
    assert rows("SELECT count(*) FROM wa_monitor.drop_event") == [(60,)]
    assert not rows("SELECT 1 FROM qa_photo_reviews WHERE resubmitted")
    assert rows("SELECT epoch FROM wa_monitor.cursor") == [(3,)]
    rows("UPDATE qa_photo_reviews SET submitted_by = '100000000000017' WHERE drop_number = 'DR1000000'")
    bridge.map_lid("100000000000017", PHONE)
    with (
        closing(connect(DatabaseUrl(pooled_url))) as database,
        closing(Bridge(bridge.messages_db)) as reader,
    ):
        assert repair(database, reader.known()).repaired.total() == 1


def _writes(rows: Rows, monitor: Any) -> bool:
    return bool(rows("SELECT owner_pid FROM wa_monitor.cursor") == [(monitor.process.pid,)])
