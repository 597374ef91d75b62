"""Pipeline: from a hint to code that may be started, one method a stage.

    watch ──> settle ──> manifest ──> bytecode ──> (lifecycle: launch, verify, handover)

A *reload* is one way through it: it begins with the first sign of a change and ends with exactly one outcome,
and its record says who asked, which paths, how long each stage took and why it ended as it did.

The rules:

- No wait without a bound: a tree that never comes to rest is looked at after :data:`MAX_SETTLE_SECONDS`; only
  a running git that holds its index holds us longer.
- Same content as what is live or on its way: outcome ``unchanged``. Content decides, whatever caused the
  hint.
- A newer change supersedes an older one at every stage; who waited for the older one waits for the newer one.
- During a pause an automatic look ends with the manifest: what is on disk is known, and waits.
- Nothing here touches the live child.

The main loop calls in; nothing here blocks longer than reading what changed.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor import bytecode, manifest
from supervisor.blobs import BlobStore
from supervisor.bytecode import BytecodeReport, CompileJob
from supervisor.errors import SourceError
from supervisor.events import AUTOMATIC_TRIGGERS, OPERATOR_TRIGGERS, Outcome, Reason
from supervisor.git import Repository
from supervisor.manifest import Manifest, Snapshot, Tree
from supervisor.watch import Hint

MAX_SETTLE_SECONDS = 5.0
"""Longest wait for a tree to come to rest."""

_QUIET_ONE_FILE_SECONDS = 0.015
_QUIET_MANY_SECONDS = 0.15
_LOCK_LOOK_SECONDS = 0.05
_TRY_AGAIN_SECONDS = 5.0
_SHOWN_PATHS = 20


@dataclass
class Reload:
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
        commit: that ``tree`` stood at when it was started, where git knows it.
        previous_commit: the same of ``previous_tree``.
        previous_generation: the one that served when this one was started.
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
    previous_commit: str | None = None
    previous_generation: int | None = None
    on_finish: list[Callable[[Reload], None]] = field(default_factory=list)
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    _marked_at: float | None = None

    def mark(self, stage: str, now: float) -> None:
        """Count the time since the last mark to a stage."""
        since = self.began_at if self._marked_at is None else self._marked_at
        self.stages[stage] = self.stages.get(stage, 0.0) + now - since
        self._marked_at = now

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


@dataclass
class _Pending:
    """Signs of a change that has not been looked at.

    Attributes:
        last_at: monotonic time of the newest sign.
        dirty: absolute paths with a hint; their stat tuples are not trusted.
        unfinished: those that somebody may still be writing.
        whole: look at every byte of the tree and at every cache directory.
        not_before: monotonic time before which a running git, or a machine without memory, holds us.
        waits: it was looked at and is held by a pause.
    """

    reload: Reload
    last_at: float
    dirty: set[str] = field(default_factory=set)
    unfinished: set[str] = field(default_factory=set)
    whole: bool = False
    not_before: float = 0.0
    waits: bool = False

    def due_at(self, quiet_seconds: float | None) -> float:
        return max(self.not_before, self._calm_at(quiet_seconds))

    def _calm_at(self, quiet_seconds: float | None) -> float:
        if self.whole:
            return self.reload.began_at
        if quiet_seconds is None:
            calm = len(self.dirty) <= 1 and not self.unfinished
            quiet_seconds = _QUIET_ONE_FILE_SECONDS if calm else _QUIET_MANY_SECONDS
        return min(self.last_at + quiet_seconds, self.reload.began_at + MAX_SETTLE_SECONDS)


@dataclass
class _Build:
    reload: Reload
    manifest: Manifest
    job: CompileJob


@dataclass(frozen=True)
class Built:
    """A manifest whose sources all compile."""

    reload: Reload
    manifest: Manifest


class Pipeline:
    """Watches over what is on disk and prepares it for launch.

    Args:
        tree: the roots.
        blobs: where sources are kept.
        scratch: directory for short-lived files.
        repository: git's view of the tree, where there is one.
        quiet_seconds: fixed quiet period, None for the adaptive one.
        environment: returns the children's environment, for ``PYTHONPYCACHEPREFIX``.
        finished: called with each reload that ended here: unchanged, superseded or rejected.
        quarantined: returns why a tree may not be started without an operator, None if it may.
        clock: monotonic seconds, for what takes time while a step is taken.
    """

    def __init__(
        self,
        *,
        tree: Tree,
        blobs: BlobStore,
        scratch: Path,
        repository: Repository | None,
        quiet_seconds: float | None,
        environment: Mapping[str, str],
        finished: Callable[[Reload], None],
        quarantined: Callable[[str], tuple[Reason | None, str] | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tree = tree
        self._blobs = blobs
        self._scratch = scratch
        self._repository = repository
        self.quiet_seconds = quiet_seconds
        self._environment = environment
        self._finished = finished
        self._quarantined = quarantined
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._pending: _Pending | None = None
        self._build: _Build | None = None
        self._compiled: Manifest | None = None
        self._again: set[str] = set()
        """Relative paths of sources whose bytecode was not left as it should be."""
        self._judged: str | None = None
        self._unreadable = False
        self.prints: dict[str, Mapping[str, str]] = {}
        """Sha256 of a source to the prints of its code objects."""
        self.scanned_at: float | None = None
        self.problem: str | None = None
        """Why what is on disk may not run, or None."""
        self.paused = False
        """The operator wants no reload but his own."""

    @property
    def disk(self) -> Manifest | None:
        """What was on disk at the last look, None while it cannot be read."""
        return self._snapshot.manifest if self._snapshot and not self._unreadable else None

    @property
    def busy(self) -> bool:
        """Whether a change is being looked at."""
        return (self._pending is not None and not self._pending.waits) or self._build is not None

    @property
    def job(self) -> CompileJob | None:
        """The running compile helper, for the main loop to wait on."""
        return self._build.job if self._build else None

    # --- watch --------------------------------------------------------------------------------------------

    def hint(self, hints: Collection[Hint], now: float) -> None:
        """Note file events."""
        if not hints:
            return
        pending = self._begin("watch", now)
        for hint in hints:
            pending.dirty.add(hint.path)
            (pending.unfinished.discard if hint.finished else pending.unfinished.add)(hint.path)

    def ask(
        self,
        trigger: str,
        now: float,
        on_finish: Callable[[Reload], None] | None = None,
        *,
        uid: int | None = None,
        renew: bool = False,
    ) -> None:
        """Ask for a reload now; every byte of the tree is read again.

        Args:
            trigger: what asks for it.
            now: monotonic time.
            on_finish: called with its record when there is an outcome.
            uid: of the operator who asks.
            renew: a new process is wanted although the sources may be the same.
        """
        pending = self._begin(trigger, now)
        pending.whole = True
        reload = pending.reload
        reload.trigger, reload.renew = trigger, reload.renew or renew
        reload.uid = uid if uid is not None else reload.uid
        if on_finish is not None:
            pending.reload.on_finish.append(on_finish)

    def scan(self, now: float, *, whole: bool = False, trigger: str = "scan") -> None:
        """Look at the tree; a difference that no event told of becomes a reload.

        Args:
            now: monotonic time.
            whole: read every file, whatever its stat tuple says.
            trigger: of the reload, if there is to be one.
        """
        before = self.disk
        try:
            snapshot = manifest.scan(self._tree, None if whole else self._snapshot, self._blobs.put)
        except SourceError as error:
            if str(error) != self.problem:
                self._begin(trigger, now)
            self._unreadable, self.problem = True, str(error)
            return
        self.scanned_at = now
        differs = before is None or snapshot.manifest.digest != before.digest
        if differs or self._unreadable or self._touched(snapshot):
            self._begin(trigger, now)
        else:
            self._snapshot = snapshot

    def _touched(self, newer: Snapshot) -> bool:
        """Whether a file was touched and has its old content: somebody may ask why there was no reload."""
        known = self._snapshot.stats if self._snapshot else {}
        return any(known.get(path, stats) != stats for path, stats in newer.stats.items())

    def _begin(self, trigger: str, now: float) -> _Pending:
        if self._pending is None:
            self._pending = _Pending(Reload(trigger, now), now)
        self._pending.last_at = now
        self._pending.waits = False
        return self._pending

    # --- settle -> manifest -> bytecode -------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do at the earliest."""
        waiting = self._pending is not None and not self._pending.waits
        times = [self._pending.due_at(self.quiet_seconds)] if self._pending and waiting else []
        if self._build is not None:
            times.append(self._build.job.deadline)
        return min(times, default=None)

    def advance(
        self, now: float, *, live: Manifest | None, candidate: Reload | None, outdated: bool = False
    ) -> bool:
        """Take the next step that is due.

        Args:
            now: monotonic time.
            live: what the live generation was started from.
            candidate: the reload whose generation is to take over.
            outdated: the live generation was started with other settings than those of now.

        Returns:
            Whether a look at the disk has just shown that it is what is live.
        """
        if self._build is not None and self._build.job.deadline <= now:
            self._again |= self._build.job.paths
            self.compiled(self._build.job.expire(), now)
        pending = self._pending
        if pending is None or pending.waits or pending.due_at(self.quiet_seconds) > now:
            return False
        if self._repository is not None and self._repository.is_changing():
            pending.not_before = now + _LOCK_LOOK_SECONDS
            return False
        self._pending = None
        pending.reload.mark("settle", now)
        found = self._look(pending, now)
        if found is None:
            return False
        held = self.paused and pending.reload.trigger in AUTOMATIC_TRIGGERS
        if held and (live is None or live.digest != found.digest):
            pending.waits, self._pending = True, pending
            return False
        return self._decide(pending, found, now, live=live, candidate=candidate, outdated=outdated)

    def resume(self, now: float) -> None:
        """End a pause: what has changed meanwhile becomes a reload."""
        self.paused, self._judged = False, None
        self._begin("scan", now)

    def _look(self, pending: _Pending, now: float) -> Manifest | None:
        """Stage *manifest*: find out what is on disk; None if it cannot be read."""
        try:
            self._snapshot = manifest.scan(
                self._tree,
                None if pending.whole else self._snapshot,
                self._blobs.put,
                doubtful={self._relative(path) for path in pending.dirty},
            )
        except SourceError as error:
            self.problem, self._unreadable = str(error), True
            self._end(pending.reload, "rejected", "import", str(error))
            return None
        self.scanned_at = now
        if self._unreadable:
            self._unreadable, self._judged, self.problem = False, None, None
        pending.reload.tree = self._snapshot.manifest.digest
        pending.reload.mark("manifest", self._clock())
        return self._snapshot.manifest

    def _decide(
        self,
        pending: _Pending,
        found: Manifest,
        now: float,
        *,
        live: Manifest | None,
        candidate: Reload | None,
        outdated: bool,
    ) -> bool:
        """Decide whether anything follows from what is on disk; return whether it is what is live."""
        reload = pending.reload
        reload.previous_tree = live.digest if live else None
        reload.paths = live.changes(found) if live else ()
        under_way = self._build.reload if self._build is not None else candidate
        if under_way is not None and under_way.tree == found.digest and not reload.renew:
            under_way.on_finish += reload.on_finish  # Who asked for this one hears how that one ends.
            if self._build is not None and reload.trigger in OPERATOR_TRIGGERS:
                under_way.trigger, under_way.uid = reload.trigger, reload.uid  # No pause holds it any more.
            reload.on_finish = []
            self._end(reload, "unchanged")
            return False
        self._supersede_build(reload)
        # What was to bring new settings may have failed, or have made room for this one.
        reload.renew = reload.renew or outdated
        if live is not None and found.digest == live.digest and not reload.renew:
            self._judged, self.problem = live.digest, None
            if (
                pending.whole
            ):  # Somebody asked: the sources are the same, the bytecode beside them need not be.
                self._start_build(reload, found, now, sweep=True)
            else:
                self._end(reload, "unchanged")
            return True
        if reload.trigger in AUTOMATIC_TRIGGERS and not self._may_try(reload, found.digest):
            return False
        self._start_build(reload, found, now, sweep=pending.whole)
        return False

    def _may_try(self, reload: Reload, tree: str) -> bool:
        """Whether nothing is known against a tree that no operator asked for; else end its reload."""
        if tree == self._judged:
            self._end(reload, "unchanged")
            return False
        fault = self._quarantined(tree)
        if fault is not None:
            reason, detail = fault
            self.problem, self._judged = f"quarantined: {detail}", tree
            self._end(reload, "rejected", reason or "crash", self.problem)
            return False
        return True

    def _start_build(self, reload: Reload, found: Manifest, now: float, *, sweep: bool) -> None:
        """Stage *bytecode*: purge and compile in a process of its own."""
        job = bytecode.start(
            tree=self._tree,
            before=self._compiled,
            after=found,
            blobs=self._blobs.blobs,
            scratch=self._scratch,
            environment=self._environment,
            sweep=sweep,
            now=now,
            again=self._again,
        )
        self._build = _Build(reload, found, job)

    def compiled(self, report: BytecodeReport, now: float) -> Built | None:
        """Take the compile helper's report; return what may be launched, None if it was rejected."""
        build = self._build
        if build is None:
            return None
        self._build = None
        build.reload.mark("bytecode", now)
        if report.passing:
            self._begin("scan", now).not_before = now + _TRY_AGAIN_SECONDS
        else:
            self._judged = build.manifest.digest
        if report.error is not None:
            self.problem = report.error
            self._end(build.reload, "rejected", "syntax", report.error)
            return None
        self._again = {self._relative(source) for source in report.stale.values()}
        if build.reload.tree == build.reload.previous_tree and not build.reload.renew:
            self._end(build.reload, "unchanged")
            return None
        self._compiled, self.problem = build.manifest, None
        self.take_prints(build.manifest, report)
        return Built(build.reload, build.manifest)

    def take_prints(self, found: Manifest, report: BytecodeReport) -> None:
        """Keep the prints of a manifest's code."""
        for path, digest in found.sources.items():
            if (prints := report.prints.get(found.absolute(path))) is not None:
                self.prints[digest] = prints

    def knows_prints_of(self, found: Manifest) -> bool:
        """Whether the code of every source of a manifest can be compared."""
        return all(digest in self.prints for digest in found.sources.values())

    def judge(self, found: Manifest, now: float) -> CompileJob:
        """Have the prints of a manifest's code taken from its blobs; nothing on disk is looked at."""
        return bytecode.judge(
            found, blobs=self._blobs.blobs, scratch=self._scratch, environment=self._environment, now=now
        )

    def _supersede_build(self, newer: Reload) -> None:
        build = self._build
        if build is not None:
            build.job.cancel()
            self._again |= build.job.paths
            self._build = None
            newer.on_finish += build.reload.on_finish
            build.reload.on_finish = []
            self._end(build.reload, "superseded", detail=f"by tree {(newer.tree or '')[:12]}")

    def _end(
        self, reload: Reload, outcome: Outcome, reason: Reason | None = None, detail: str | None = None
    ) -> None:
        reload.finish(outcome, self._clock(), reason, detail)
        self._finished(reload)

    def try_again(self, now: float) -> None:
        """Look at the tree again in a while: what kept it from being started was not its fault."""
        self._judged = None
        self._begin("scan", now).not_before = now + _TRY_AGAIN_SECONDS

    def give_up(self, why: str) -> None:
        """Cancel what is being built; its reload ends, and who asked for it hears it."""
        build, self._build = self._build, None
        if build is not None:
            build.job.cancel()
            self._again |= build.job.paths
            self._end(build.reload, "superseded", detail=why)

    def heal(self, now: float) -> None:
        """Write every pinned source anew that is still on disk: some are missing or damaged."""
        self._blobs.distrust()
        self.scan(now, whole=True)

    def reconsider(self, now: float, live: str) -> None:
        """Look again at a tree that is not the live one although nothing speaks against it."""
        if self.disk is not None and self.disk.digest != live and self.problem is None and not self.busy:
            self._judged = None
            self._begin("scan", now)

    def rejected(self, tree: str, why: str) -> None:
        """Note that a generation of this tree did not become live."""
        if self.disk is not None and self.disk.digest == tree:
            self.problem = why

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._tree.base).replace(os.sep, "/")

    def forget(self, keep: Collection[Manifest]) -> None:
        """Forget the prints of sources that none of these manifests has."""
        needed = {digest for manifest in keep for digest in manifest.sources.values()}
        self.prints = {digest: prints for digest, prints in self.prints.items() if digest in needed}

    def close(self) -> None:
        """Stop what is under way; its reloads end, and who asked for them hears it."""
        why = "by the operator's stop"
        self.give_up(why)
        pending, self._pending = self._pending, None
        if pending is not None:
            self._end(pending.reload, "superseded", detail=why)
