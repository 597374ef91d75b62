"""Chronicle: what is written down about reloads, restarts and operators, and what must survive a restart.

The rule: **whatever changes which code runs is a record** with its reason, and what a later supervisor needs
to know (known good trees, quarantine, the processes that it may have to sweep) is on disk soon after it is
decided. Both are written by the scribe's thread; nothing here waits for a disk.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Collection
from pathlib import Path
from typing import cast

from msgspec.structs import replace

from supervisor import remembered
from supervisor.events import AUTOMATIC_TRIGGERS, Drained, Promoted, Reason, Restarting
from supervisor.fleet import Fleet
from supervisor.history import PATHS_LIMIT, History, Record
from supervisor.lifecycle import Fault, State
from supervisor.reload import Reload
from supervisor.remembered import Quarantined, RecordedProcess, Remembered
from supervisor.scribe import Scribe

log = logging.getLogger("wa-supervisor")

_REMEMBER = "write the state file"
_ENDED = frozenset({"crash", "hang"})


class Chronicle:
    """Writes history and state file of one state directory.

    Args:
        state_file: is loaded at once.
        history: of records.
        scribe: the thread that writes.
        fleet: knows how processes ended.
    """

    def __init__(self, state_file: Path, history: History, scribe: Scribe, fleet: Fleet) -> None:
        self._state_file = state_file
        self._history = history
        self._scribe = scribe
        self._fleet = fleet
        self._saved: Remembered | None = None
        self._quarantined_at: dict[str, str] = {}
        self._waiting: dict[int, list[Record]] = {}

    def recall(self) -> tuple[State, Remembered, str | None]:
        """Return the state to begin with, what was remembered, and what is wrong with the file."""
        known, problem = remembered.load(self._state_file)
        self._quarantined_at = {tree: fault.at for tree, fault in known.quarantine.items()}
        state = State(
            known_good=known.known_good,
            quarantine={
                tree: Fault(cast("Reason | None", fault.reason), fault.detail)  # A word of ours.
                for tree, fault in known.quarantine.items()
            },
            next_number=known.next_generation,
        )
        return state, known, problem

    def remember(self, state: State, processes: Collection[RecordedProcess]) -> None:
        """Have what a later supervisor needs written, if it has changed."""
        now = dt.datetime.now(dt.UTC).isoformat("T", "milliseconds")
        self._quarantined_at = {tree: self._quarantined_at.get(tree, now) for tree in state.quarantine}
        known = Remembered(
            known_good=state.known_good,
            quarantine={
                tree: Quarantined(reason=fault.reason, detail=fault.detail, at=self._quarantined_at[tree])
                for tree, fault in state.quarantine.items()
            },
            next_generation=state.next_number,
            processes=tuple(processes),
        )
        if known != self._saved:
            self._saved = known
            self._scribe.submit(_REMEMBER, lambda: remembered.save(self._state_file, known))

    def quarantine_json(self, state: State) -> list[dict[str, str | None]]:
        """Return the quarantine as ``status --json`` shows it."""
        return [
            {
                "tree": tree,
                "reason": fault.reason,
                "detail": fault.detail,
                "at": self._quarantined_at.get(tree),
            }
            for tree, fault in state.quarantine.items()
        ]

    def reload(self, reload: Reload) -> None:
        """Note a reload that has its outcome."""
        if reload.outcome == "unchanged" and reload.trigger in AUTOMATIC_TRIGGERS:
            return  # Somebody may touch a file each second for a year.
        rolled_back = reload.rollback or reload.outcome == "rolled_back"
        record = Record(
            kind="rollback" if rolled_back else "reload",
            trigger=reload.trigger,
            outcome=reload.outcome,
            reason=reload.reason,
            detail=reload.detail,
            generation=reload.generation,
            previous_generation=reload.previous_generation,
            tree=reload.tree,
            previous_tree=reload.previous_tree,
            commit=reload.commit,
            branch=reload.branch,
            previous_commit=reload.previous_commit,
            paths=reload.paths[:PATHS_LIMIT],
            paths_total=len(reload.paths),
            stages=dict(reload.stages),
            total_seconds=reload.total_seconds,
            uid=reload.uid,
        )
        if reload.outcome in {"rejected", "rolled_back"} and reload.generation is not None:
            self._with_its_end(reload.generation, record)
        else:
            self._history.add(record)

    def restart(self, action: Restarting, tree: str | None) -> None:
        """Note that a live child is started again, or replaced, because of a fault."""
        record = Record(
            kind="restart",
            trigger=action.cause,
            detail=action.detail,
            generation=action.number,
            tree=tree,
        )
        if action.cause in _ENDED:
            self._with_its_end(action.number, record)
        else:
            self._history.add(record)

    def _with_its_end(self, number: int, record: Record) -> None:
        """Note what a process that is ending belongs to; how it ended is known when it is gone."""
        if self._fleet.get(number) is not None:
            self._waiting.setdefault(number, []).append(record)
        else:
            self._history.add(replace(record, ending=self._fleet.ending(number)))

    def ended(self, number: int) -> None:
        """Complete what waited for the end of this generation's process."""
        for record in self._waiting.pop(number, ()):
            self._history.add(replace(record, ending=self._fleet.ending(number)))

    def drained(self, action: Drained) -> None:
        """Note a child that was asked to stop and ended otherwise than a program does that stops."""
        ending = self._fleet.ending(action.number)
        stopped = ending is None or ending.exit_status == 0 or ending.signal == "SIGTERM"
        if stopped or action.number in self._waiting:  # What it waits for tells the same.
            return
        log.warning("generation %d was asked to stop and ended with %s", action.number, action.how)
        self._history.add(
            Record(
                kind="drain",
                detail=action.how,
                generation=action.number,
                tree=action.tree,
                ending=ending,
            )
        )

    def promoted(self, action: Promoted) -> None:
        """Note a tree that has served its probation."""
        self._history.add(Record(kind="promotion", generation=action.number, tree=action.tree))

    def operator(self, what: str, uid: int | None) -> None:
        """Note what an operator did that is no reload."""
        self._history.add(Record(kind="operator", outcome=what, uid=uid))
