"""Reload: one way through the pipeline, and its record.

The rule: it begins with the first sign of a change and ends with exactly one outcome. Its record says who
asked, which paths, how long each stage took and why it ended as it did.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from msgspec import Struct, field

from supervisor.events import Outcome, Reason

_SHOWN_PATHS = 20


class Reload(Struct, eq=False):
    """One way through the pipeline, and its record.

    Attributes:
        trigger: what asked for it.
        began_at: monotonic time of the first sign.
        paths: relative paths that differ from what ran before.
        previous_tree: digest of what ran before, None at the first start.
        tree: digest of what was to run, once it is known.
        stages: seconds spent in each stage.
        uid: of the operator who asked for it, None if nobody did.
        renew: a new process is wanted although the sources may be the same.
        rollback: an operator asked for an earlier tree.
        commit: where HEAD stood when ``tree`` was last seen on disk, where git knows it.
        branch: the same; None if HEAD was detached.
        previous_commit: that of ``previous_tree``.
        previous_generation: the one that served when this one was started.
        restless: it was begun although the tree had not come to rest.
        on_finish: called with the record when there is an outcome.
    """

    trigger: str
    began_at: float
    paths: tuple[str, ...] = ()
    previous_tree: str | None = None
    tree: str | None = None
    stages: dict[str, float] = field(default_factory=dict)
    outcome: Outcome | None = None
    reason: Reason | None = None
    detail: str | None = None
    generation: int | None = None
    total_seconds: float = 0.0
    uid: int | None = None
    renew: bool = False
    rollback: bool = False
    commit: str | None = None
    branch: str | None = None
    previous_commit: str | None = None
    previous_generation: int | None = None
    restless: bool = False
    on_finish: list[Callable[[Reload], None]] = field(default_factory=list)
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _marked_at: float | None = None

    def mark(self, stage: str, now: float) -> None:
        """Count the time since the last mark to a stage; none if ``now`` is of earlier in the same turn."""
        since = self.began_at if self._marked_at is None else self._marked_at
        self._marked_at = max(now, since)
        self.stages[stage] = self.stages.get(stage, 0.0) + self._marked_at - since

    def make_way(self, newer: Reload) -> None:
        """Let who waits for this one wait for a newer one; of a tree that never rests there is always one."""
        if not self.restless:
            newer.on_finish += self.on_finish
            self.on_finish = []

    def finish(
        self, outcome: Outcome, now: float, reason: Reason | None = None, detail: str | None = None
    ) -> None:
        """End the reload with its one outcome."""
        self.outcome, self.reason, self.detail = outcome, reason, detail
        self.total_seconds = now - self.began_at

    def as_json(self) -> dict[str, Any]:
        """Return the record as ``status --json`` shows it."""
        return {
            "id": self.identity,
            "outcome": self.outcome,
            "reason": self.reason,
            "detail": self.detail,
            "trigger": self.trigger,
            "paths": list(self.paths[:_SHOWN_PATHS]),
            "paths_total": len(self.paths),
            "previous_tree": self.previous_tree,
            "tree": self.tree,
            "generation": self.generation,
            "stages": {stage: round(seconds, 6) for stage, seconds in self.stages.items()},
            "total_seconds": round(self.total_seconds, 6),
            "uid": self.uid,
        }
