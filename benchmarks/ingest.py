"""How fast the monitor is: a backlog, single messages, repair, takeover, and its memory over a long backlog.

The backlog is worked off side by side with a plain implementation: one kept connection, and for each message
one SELECT, one INSERT and its own commit. Both write to the same PostgreSQL, with fsync on. The plain one
gets the first part of the backlog only, since its rate does not change.

Latency is measured from outside: from the return of the bridge's commit to the notification that a trigger
on the dashboard's table sends, which PostgreSQL delivers when the row's transaction has been committed.

Prints a Markdown table and writes it to ``benchmarks/results/ingest.md``. ``--quick`` is a tenth of
everything, to see that it works; it writes no file.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from psycopg import sql

from monitor.database import connect
from monitor.demo.bridge import MAPPED_LIDS, NORTHFIELD, PROJECTS_YAML, SyntheticBridge, fill_map
from monitor.embedded import EmbeddedPostgres
from monitor.identity import Known
from monitor.relay import BATCH_MESSAGES
from monitor.repair import repair
from monitor.schema import prepare
from monitor.settings import DatabaseUrl

RESULT = Path(__file__).parent / "results" / "ingest.md"
REPOSITORY = Path(__file__).parents[1]
BACKLOG_RATE, FACTOR, REPAIR_RATE = 20_000, 8, 20_000
P50_MS, P99_MS, TAKEOVER_MS, MEMORY_MIB = 20, 100, 50, 80
SENDERS = [phone for _, phone in MAPPED_LIDS] + [lid for lid, _ in MAPPED_LIDS]
BEGIN = datetime(2026, 1, 1, 6, tzinfo=UTC)
CHATTER = "Morning all, who has the long ladder?"


@dataclass(frozen=True)
class Line:
    """One measurement beside its target."""

    what: str
    measured: str
    target: str
    met: bool | None


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    backlog: int = 200_000
    plain: int = 20_000
    long_backlog: int = 1_000_000
    posts: int = 3_000
    repairs: int = 100_000
    takeovers: int = 20


class Place:
    """A bridge and a database of their own, and monitors that run between them."""

    def __init__(self, folder: Path, server: EmbeddedPostgres, name: str) -> None:
        self.bridge = SyntheticBridge(folder / name)
        self.bridge.create()
        fill_map(self.bridge)
        self.projects = folder / "projects.yaml"
        self.projects.write_text(PROJECTS_YAML, encoding="utf-8")
        self._log = folder / f"{name}.log"
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute("CHECKPOINT")  # what was measured before is not to be felt
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
        self.url = server.url.replace("/postgres?", f"/{name}?")
        with closing(connect(DatabaseUrl(self.url))) as database:
            prepare(database)

    def fill(self, total: int) -> None:
        """Write a backlog: one message in five names a drop."""
        chance = random.Random(total)  # noqa: S311 -- repeatable
        with closing(sqlite3.connect(self.bridge.messages_db)) as connection:
            connection.execute("INSERT OR REPLACE INTO chats VALUES (?, '', '')", (NORTHFIELD,))
            connection.executemany(
                "INSERT INTO messages (id, chat_jid, sender, content, timestamp, is_from_me, media_type)"
                " VALUES (?, ?, ?, ?, ?, 0, '')",
                (
                    (
                        f"3A{chance.getrandbits(72):018X}",
                        NORTHFIELD,
                        chance.choice(SENDERS),
                        CHATTER if number % 5 else f"DR{1_000_000 + number} done",
                        (BEGIN + timedelta(seconds=number)).isoformat(sep=" "),
                    )
                    for number in range(total)
                ),
            )
            connection.commit()

    @contextmanager
    def monitor(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run a monitor; it is ended with the block if it has not ended by itself."""
        environment = {
            **{name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"},
            "WHATSAPP_DB_PATH": str(self.bridge.folder),
            "DATABASE_URL": self.url,
            "WA_PROJECTS": str(self.projects),
            "WA_SINCE": "beginning",
        }
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-c", "from monitor.app import main; main()", *arguments],
                env=environment,
                cwd=REPOSITORY,
                stdout=log,
                stderr=log,
            )
            try:
                yield process
            finally:
                process.terminate()
                if process.wait(60) != 0:
                    raise SystemExit(f"the monitor failed: {self._log.read_text(encoding='utf-8')[-2000:]}")

    def ask(self, question: str) -> int:
        with psycopg.connect(self.url, autocommit=True) as connection:
            row = connection.execute(question.encode()).fetchone()
        assert row is not None
        return int(row[0] or 0)

    def notify(self, table: str, event: str, payload: str) -> None:
        """Have PostgreSQL tell when a row of a table was committed."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(
                (
                    "CREATE FUNCTION told() RETURNS trigger LANGUAGE plpgsql AS"
                    f" $$ BEGIN PERFORM pg_notify('told', {payload}); RETURN NULL; END $$;"
                    f" CREATE TRIGGER told AFTER {event} ON {table} FOR EACH ROW EXECUTE FUNCTION told()"
                ).encode()
            )


def plain(place: Place, total: int) -> float:
    """Work off `total` messages one by one; return messages a second."""
    with (
        psycopg.connect(place.url) as connection,
        closing(sqlite3.connect(f"file:{place.bridge.messages_db}?mode=ro", uri=True)) as bridge,
    ):
        connection.execute(
            "CREATE TABLE plain (id text, chat text, sender text, content text, PRIMARY KEY (id, chat))"
        )
        connection.commit()
        messages = bridge.execute(
            "SELECT id, chat_jid, sender, content FROM messages ORDER BY rowid LIMIT ?", (total,)
        ).fetchall()
        began = time.perf_counter()
        for message in messages:
            known = connection.execute(
                "SELECT 1 FROM plain WHERE id = %s AND chat = %s", message[:2]
            ).fetchone()
            if known is None:
                connection.execute("INSERT INTO plain VALUES (%s, %s, %s, %s)", message)
            connection.commit()
        return total / (time.perf_counter() - began)


def backlog(folder: Path, server: EmbeddedPostgres, sizes: Sizes) -> list[Line]:
    place = Place(folder, server, "backlog")
    place.fill(sizes.backlog)
    plain_rate = plain(place, sizes.plain)
    began = time.perf_counter()
    with place.monitor("--once") as process:
        process.wait()
    whole_seconds = time.perf_counter() - began
    # Without the start of the process, which is 0.3 to 0.5 s whatever there is to do.
    seconds = (
        place.ask(
            "SELECT extract(epoch FROM max(decided_at) - min(decided_at)) * 1000 FROM wa_monitor.message"
        )
        / 1000
    )
    stored = place.ask("SELECT count(*) FROM wa_monitor.message")
    assert stored == sizes.backlog, stored
    assert place.ask("SELECT count(*) FROM qa_photo_reviews") == sizes.backlog // 5
    rate = (sizes.backlog - BATCH_MESSAGES) / seconds  # the first batch's time is its end
    return [
        Line(
            f"backlog of {sizes.backlog:,} messages, 20 % drops",
            f"{rate:,.0f} messages/s ({sizes.backlog / whole_seconds:,.0f} with the start of the process)",
            "≥ 20,000/s",
            rate >= BACKLOG_RATE,
        ),
        Line("plain implementation, one commit a message", f"{plain_rate:,.0f} messages/s", "", None),
        Line(
            "ours against the plain one",
            f"{rate / plain_rate:.1f}-fold",
            "≥ 8-fold",
            rate >= FACTOR * plain_rate,
        ),
    ]


def latency(folder: Path, server: EmbeddedPostgres, sizes: Sizes) -> list[Line]:
    place = Place(folder, server, "latency")
    place.notify("qa_photo_reviews", "INSERT", "NEW.drop_number")
    written: dict[str, float] = {}
    chance = random.Random(1)  # noqa: S311 -- repeatable
    committed: dict[str, float] = {}
    with (
        place.monitor(),
        psycopg.connect(place.url, autocommit=True) as listener,
        closing(sqlite3.connect(place.bridge.messages_db, isolation_level=None, timeout=5)) as writer,
    ):
        listener.execute("LISTEN told")
        writer.execute("INSERT OR REPLACE INTO chats VALUES (?, '', '')", (NORTHFIELD,))
        _until(lambda: place.ask("SELECT count(*) FROM wa_monitor.cursor WHERE epoch > 0") == 1)
        due = time.perf_counter()
        for number in range(sizes.posts):
            for told in listener.notifies(timeout=max(0.0, due - time.perf_counter())):
                committed[told.payload] = time.perf_counter()
            drop = f"DR{1_000_000 + number}"
            writer.execute(
                "INSERT INTO messages (id, chat_jid, sender, content, timestamp, is_from_me, media_type)"
                " VALUES (?, ?, ?, ?, ?, 0, '')",
                (
                    f"3A{number:018X}",
                    NORTHFIELD,
                    chance.choice(SENDERS),
                    drop,
                    datetime.now(UTC).isoformat(" "),
                ),
            )
            written[drop] = time.perf_counter()
            due += 0.01
        while len(committed) < sizes.posts:
            for told in listener.notifies(timeout=30, stop_after=1):
                committed[told.payload] = time.perf_counter()
    millis = sorted((committed[drop] - at) * 1000 for drop, at in written.items())
    p50, p99 = statistics.median(millis), millis[int(len(millis) * 0.99)]
    return [
        Line("message written → row committed, 100/s, p50", f"{p50:.1f} ms", "≤ 20 ms", p50 <= P50_MS),
        Line("the same, p99", f"{p99:.1f} ms (longest {millis[-1]:.0f} ms)", "≤ 100 ms", p99 <= P99_MS),
    ]


def repairs(folder: Path, server: EmbeddedPostgres, sizes: Sizes) -> list[Line]:
    place = Place(folder, server, "repairs")
    people = {str(100_000_000_000_000 + number): str(27_700_000_000 + number) for number in range(2000)}
    with psycopg.connect(place.url, autocommit=True) as connection, connection.cursor() as cursor:
        with cursor.copy(
            "COPY qa_photo_reviews (drop_number, project, submitted_by, user_name) FROM STDIN"
        ) as copy:
            for number, lid in zip(range(sizes.repairs), list(people) * sizes.repairs, strict=False):
                copy.write_row((f"DR{1_000_000 + number}", "Northfield", lid, lid))
        connection.execute("ANALYZE qa_photo_reviews")
    with closing(connect(DatabaseUrl(place.url))) as database:
        began = time.perf_counter()
        report = repair(database, Known.from_rows(people))
        seconds = time.perf_counter() - began
    assert report.repaired.total() == sizes.repairs
    rate = sizes.repairs / seconds
    return [
        Line(f"repair of {sizes.repairs:,} rows", f"{rate:,.0f} rows/s", "≥ 20,000/s", rate >= REPAIR_RATE)
    ]


def memory(folder: Path, server: EmbeddedPostgres, sizes: Sizes) -> list[Line]:
    place = Place(folder, server, "memory")
    place.fill(sizes.long_backlog)
    seen: list[float] = []
    with place.monitor() as process:
        done = 0
        while done < sizes.long_backlog:
            time.sleep(0.5)
            done = place.ask("SELECT max(place_rowid) FROM wa_monitor.cursor")
            seen.append(_mebibytes(process.pid, "VmRSS"))
        highest = _mebibytes(process.pid, "VmHWM")
    tenth = max(1, len(seen) // 10)
    return [
        Line(
            f"highest RSS over a backlog of {sizes.long_backlog:,} messages",
            f"{highest:.0f} MiB (median of the first tenth {statistics.median(seen[:tenth]):.0f},"
            f" of the last {statistics.median(seen[-tenth:]):.0f})",
            "≤ 80 MiB",
            highest <= MEMORY_MIB,
        )
    ]


def takeovers(folder: Path, server: EmbeddedPostgres, sizes: Sizes) -> list[Line]:
    place = Place(folder, server, "takeovers")
    place.notify(
        "wa_monitor.cursor",
        "UPDATE",
        "NEW.released || ' ' || extract(epoch FROM clock_timestamp())",
    )
    millis = []
    with psycopg.connect(place.url, autocommit=True) as listener:
        listener.execute("LISTEN told")
        for _ in range(sizes.takeovers):
            with place.monitor() as first:
                _until(lambda: place.ask("SELECT count(*) FROM wa_monitor.cursor WHERE NOT released") == 1)
                with place.monitor() as second:
                    _until(lambda: place.ask(_SESSIONS) == len((first, second)))
                    time.sleep(0.5)  # until it stands by
                    list(listener.notifies(timeout=0))
                    first.send_signal(signal.SIGTERM)
                    released, taken = _release_and_claim(listener)
                    millis.append((taken - released) * 1000)
                    first.wait()
    return [
        Line(
            "released → taken over by the standby",
            f"{statistics.median(millis):.0f} ms (median of {len(millis)}, longest {max(millis):.0f} ms)",
            "≤ 50 ms",
            max(millis) <= TAKEOVER_MS,
        )
    ]


_SESSIONS = (
    "SELECT count(*) FROM pg_stat_activity"
    " WHERE datname = current_database() AND application_name = 'wa-monitor'"
)


def _release_and_claim(listener: psycopg.Connection[tuple[object, ...]]) -> tuple[float, float]:
    """Return the server's times of the release of the cursor and of the claim that followed."""
    released = 0.0
    for told in listener.notifies(timeout=30):
        is_released, at = told.payload.split()
        if is_released == "true":
            released = float(at)
        elif released:
            return released, float(at)
    raise SystemExit("the standby did not take over")


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("something that was waited for did not happen")
        time.sleep(0.02)


def _mebibytes(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def report(lines: Sequence[Line], load: float) -> str:
    machine = (
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {load:.1f} before and"
        f" {os.getloadavg()[0]:.1f} after; PostgreSQL from the wheel, fsync on, on the same machine."
    )
    answer = {True: "yes", False: "**no**", None: ""}
    return "\n".join(
        [
            "# Monitor",
            "",
            machine,
            "",
            "| what | measured | target | met |",
            "|---|---|---|---|",
            *(f"| {line.what} | {line.measured} | {line.target} | {answer[line.met]} |" for line in lines),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, no file is written")
    parser.add_argument(
        "--only", choices=[part.__name__ for part in PARTS], help="one part, no file is written"
    )
    given = parser.parse_args()
    sizes = Sizes(20_000, 2_000, 100_000, 300, 10_000, 3) if given.quick else Sizes()
    load = os.getloadavg()[0]
    lines: list[Line] = []
    with (
        tempfile.TemporaryDirectory(prefix="wa-bench-") as folder,
        EmbeddedPostgres(Path(folder) / "postgres") as server,
    ):
        for part in PARTS:
            if given.only in {None, part.__name__}:
                lines += part(Path(folder), server, sizes)
    text = report(lines, load)
    if not (given.quick or given.only):
        RESULT.write_text(text, encoding="utf-8")
    print(text)


PARTS = (backlog, latency, repairs, memory, takeovers)

if __name__ == "__main__":
    main()
