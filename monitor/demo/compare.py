"""Bridge against PostgreSQL: what was posted, read from the bridge's own file, beside what is stored.

The rule: nothing here comes from the monitor. The drops of the bridge are found by a pattern of this module,
in the texts that this demo posts, and counted before any row is looked at; so the two columns can differ, and
a lost or a doubled drop shows.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psycopg

from monitor.demo.bridge import EASTVALE, NORTHFIELD

if TYPE_CHECKING:
    from pathlib import Path

_PROJECTS: Final = {NORTHFIELD: "Northfield", EASTVALE: "Eastvale"}
_DROP: Final = re.compile(r"(?<![A-Za-z0-9])DR ?([0-9]{6,8})(?![0-9])", re.IGNORECASE)


@dataclass(frozen=True)
class Comparison:
    """One project: what the bridge holds, and what PostgreSQL does.

    ``posts_total`` counts pairs of message and drop, a resubmission again; ``events_total`` is the ledger's
    count of the same. ``lost`` and ``foreign`` are drop numbers of one side only, ``doubled`` those with more
    than one row.
    """

    project: str
    messages_total: int
    posts_total: int
    events_total: int
    drops_total: int
    rows_total: int
    lost: frozenset[str]
    foreign: frozenset[str]
    doubled: frozenset[str]
    lids_total: int

    @property
    def complete(self) -> bool:
        """Whether both sides hold the same, each drop once, each post once."""
        same = self.posts_total == self.events_total and self.drops_total == self.rows_total
        return same and not (self.lost or self.foreign or self.doubled)


def compare(messages_db: Path, whatsapp_db: Path, database_url: str) -> list[Comparison]:
    """Count both sides, a line for each project of the demo.

    The bridge is read first: messages that arrive meanwhile are missing on the PostgreSQL side only until the
    monitor has stored them. Raises ``sqlite3.Error`` or ``psycopg.Error``.
    """
    messages: Counter[str] = Counter()
    posts: Counter[str] = Counter()
    owner: dict[str, str] = {}
    for chat_jid, content in _rows(messages_db, "SELECT chat_jid, content FROM messages ORDER BY rowid"):
        project = _PROJECTS.get(chat_jid)
        if project is not None:
            drops = {f"DR{digits}" for digits in _DROP.findall(content)}
            messages[project] += 1
            posts[project] += len(drops)
            for drop in drops:
                owner.setdefault(drop, project)
    lids = [lid for (lid,) in _rows(whatsapp_db, "SELECT lid FROM whatsmeow_lid_map")]
    with psycopg.connect(database_url) as connection:
        rows = connection.execute(
            "SELECT project, drop_number, submitted_by = ANY(%(lids)s) OR user_name = ANY(%(lids)s)"
            " FROM public.qa_photo_reviews",
            {"lids": lids},
        ).fetchall()
        events: dict[str, int] = dict(
            connection.execute(
                "SELECT project, count(*) FROM wa_monitor.drop_event GROUP BY project"
            ).fetchall()
        )
    return [
        _line(
            project,
            {drop for drop, first in owner.items() if first == project},
            [(drop, bool(lid)) for of, drop, lid in rows if of == project],
            (messages[project], posts[project], events.get(project, 0)),
        )
        for project in _PROJECTS.values()
    ]


def _line(
    project: str, drops: set[str], rows: list[tuple[str, bool]], totals: tuple[int, int, int]
) -> Comparison:
    counted = Counter(drop for drop, _ in rows)
    return Comparison(
        project=project,
        messages_total=totals[0],
        posts_total=totals[1],
        events_total=totals[2],
        drops_total=len(drops),
        rows_total=len(rows),
        lost=frozenset(drops - counted.keys()),
        foreign=frozenset(counted.keys() - drops),
        doubled=frozenset(drop for drop, times in counted.items() if times > 1),
        lids_total=sum(lid for _, lid in rows),
    )


def _rows(path: Path, question: str) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
        return connection.execute(question).fetchall()
