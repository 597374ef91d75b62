"""Pipeline: from a hint to code that may be started, one method a stage.

    watch ──> settle ──> manifest ──> bytecode ──> (lifecycle: launch, verify, handover)

The rules:

- Settling delays the handover, not the work: what one finished file makes of the tree is built while the
  quiet period runs (:mod:`supervisor.settling`), and :meth:`Pipeline.gate` holds the handover meanwhile. If
  more changes come, the same reload goes on with what is on disk then.
- Same content as what is live or on its way: outcome ``unchanged``. Content decides, whatever caused the
  hint.
- A newer change supersedes an older one at every stage; who waited for the older one waits for the newer one.
- What a tree that has not come to rest does wrong is not held against it.
- During a pause an automatic look ends with the manifest: what is on disk is known, and waits.
- Nothing here touches the live child.

Between an event and the handover nothing is looked at but the paths that something was said about, as long as
the watcher hears everything; the whole tree is looked at on time and where there is doubt.

The main loop calls in; nothing here blocks longer than reading what changed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Hashable, Mapping

from msgspec import Struct

from supervisor import manifest
from supervisor.blobs import BlobStore
from supervisor.bytecode import BytecodeReport, CompileJob, Compiler
from supervisor.checkout import Checkout
from supervisor.errors import SourceError
from supervisor.events import AUTOMATIC_TRIGGERS, OPERATOR_TRIGGERS, Outcome, Reason
from supervisor.manifest import Manifest, Snapshot, Tree
from supervisor.reload import Reload
from supervisor.settling import BURST_SECONDS, Settling
from supervisor.sharded import Sharded
from supervisor.watch import Hint

_LOCK_LOOK_SECONDS = 0.05
_TRY_AGAIN_SECONDS = 5.0


class _Build(Struct):
    """What is being compiled.

    Attributes:
        rejection: why it may not run; it is told when the tree has come to rest.
    """

    reload: Reload
    manifest: Manifest
    job: CompileJob
    rejection: str | None = None


class Built(Struct, frozen=True):
    """A manifest whose sources all compile."""

    reload: Reload
    manifest: Manifest


class Pipeline:
    """Watches over what is on disk and prepares it for launch.

    Args:
        tree: the roots.
        blobs: where sources are kept.
        compiler: makes their bytecode; it is closed with the pipeline.
        repository: git's view of the tree.
        quiet_seconds: fixed quiet period, None for the adaptive one.
        rehash_seconds: within this time every byte of the tree is read again, whatever the stat tuples say.
        finished: called with each reload that ended here: unchanged, superseded or rejected.
        left: called with a tree that was started ahead and is not what the disk came to rest at.
        quarantined: returns why a tree may not be started without an operator, None if it may.
        clock: monotonic seconds, for what takes time while a step is taken.
    """

    def __init__(
        self,
        *,
        tree: Tree,
        blobs: BlobStore,
        compiler: Compiler,
        repository: Checkout,
        quiet_seconds: float | None,
        rehash_seconds: float,
        finished: Callable[[Reload], None],
        left: Callable[[str], None] = lambda _: None,
        quarantined: Callable[[str], tuple[Reason | None, str] | None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tree = tree
        self._blobs = blobs
        self._compiler = compiler
        self._repository = repository
        self.quiet_seconds = quiet_seconds
        self.rehash_seconds = rehash_seconds
        self._finished = finished
        self._left = left
        self._quarantined = quarantined
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._pending: Settling | None = None
        self._changed_last = "", -math.inf
        """The last path that an event told of, and when."""
        self._build: _Build | None = None
        self._compiled: Manifest | None = None
        self._again: set[str] = set()
        """Relative paths of sources whose bytecode was not left as it should be."""
        self._judged: str | None = None
        self._unreadable = False
        self._torn = False
        """Git was writing during the last look: it may have seen half of a change."""
        self._mark: Hashable = None
        """Of the last look at the whole tree; see :meth:`Checkout.mark`."""
        self.prints: dict[str, Mapping[str, str]] = {}
        """Sha256 of a source to the prints of its code objects."""
        self._comparable = Sharded[str]({})
        """Sources of which all prints are there."""
        self._unread: list[str] = []
        """Relative paths that are still to be read again in this round."""
        self.scanned_at: float | None = None
        self.scan_seconds = 0.0
        """The shorter time of the last two looks at the whole tree: one that was held up does not count."""
        self._scan_took_seconds = math.inf
        self.trusting = False
        """The watcher hears everything: what nothing was said about has not changed."""
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
        return self._build.job if self._build and self._build.rejection is None else None

    @property
    def helpers(self) -> Collection[int]:
        """The process ids of compile helpers: of one that works and of one that waits for work."""
        return [pid for pid in (self.job.pid if self.job else None, self._compiler.pid) if pid is not None]

    def prepare(self) -> None:
        """Use a moment in which nothing is under way for what would only delay the next reload."""
        if not self.busy:
            self._compiler.prepare()

    @property
    def unjudged(self) -> Manifest | None:
        """What the helper still compiles and what may be started before it is judged."""
        build = self._build
        if build is None or self.job is None or build.reload.tree == build.reload.previous_tree:
            return None
        return build.manifest

    # --- watch --------------------------------------------------------------------------------------------

    def hint(self, hints: Collection[Hint], now: float) -> None:
        """Note file events."""
        if not hints:
            return
        pending = self._begin("watch", now)
        for hint in hints:
            pending.sign(hint.path, now, finished=hint.finished)
            self._changed_last = hint.path, now

    def ask(
        self,
        trigger: str,
        now: float,
        on_finish: Callable[[Reload], None] | None = None,
        *,
        uid: int | None = None,
        renew: bool = False,
        at_once: bool = True,
    ) -> None:
        """Ask for a reload; every byte of the tree is read again.

        Args:
            trigger: what asks for it.
            now: monotonic time.
            on_finish: called with its record when there is an outcome.
            uid: of the operator who asks.
            renew: a new process is wanted although the sources may be the same.
            at_once: whether or not the tree has come to rest.
        """
        pending = self._begin(trigger, now)
        pending.whole, pending.at_once = True, pending.at_once or at_once
        reload = pending.reload
        reload.trigger, reload.renew = trigger, reload.renew or renew
        reload.uid = uid if uid is not None else reload.uid
        if on_finish is not None:
            pending.reload.on_finish.append(on_finish)

    def scan(self, now: float, *, whole: bool = False, trigger: str = "scan") -> None:
        """Look at the tree; a difference that no event told of becomes a reload.

        Args:
            now: monotonic time.
            whole: read every file, whatever its stat tuple says; otherwise so many that all have been read
                within ``rehash_seconds``.
            trigger: of the reload, if there is to be one.
        """
        before, began = self._snapshot, self._clock()
        try:
            snapshot = self._scan(None if whole else before, doubtful=self._next_unread(now))
        except SourceError as error:
            if str(error) != self.problem:
                self._begin(trigger, now)
            self._unreadable, self.problem = True, str(error)
            return
        took_seconds = self._clock() - began
        self.scan_seconds, self._scan_took_seconds = min(took_seconds, self._scan_took_seconds), took_seconds
        self.scanned_at = now
        if before is None or self._unreadable:
            self._begin(trigger, now)
            return
        changed = {*before.manifest.changes(snapshot.manifest), *before.touched(snapshot)}
        if changed:
            pending = self._begin(trigger, now)
            for path in changed:
                pending.sign(snapshot.manifest.absolute(path), now, finished=True)
        else:
            self._snapshot = snapshot

    def _next_unread(self, now: float) -> Collection[str]:
        """Return the paths whose turn it is to be read again although nothing was said about them."""
        if self._snapshot is None or self.scanned_at is None:
            return ()
        total = len(self._snapshot.manifest.sources)
        if not self._unread:
            self._unread = sorted(self._snapshot.manifest.sources)
        count = math.ceil(total * (now - self.scanned_at) / self.rehash_seconds)
        turn, self._unread = self._unread[:count], self._unread[count:]
        return turn

    def _scan(self, previous: Snapshot | None, doubtful: Collection[str]) -> Snapshot:
        mark, head = self._repository.mark(), self._repository.head()  # Before the look: git moves HEAD last.
        snapshot = manifest.scan(self._tree, previous, self._blobs.put, doubtful=doubtful)
        self._repository.saw(snapshot, head)
        self._mark = mark
        return snapshot

    def _look_again(self, known: Snapshot, paths: Collection[str]) -> Snapshot | None:
        head = self._repository.head()
        if self._repository.mark() != self._mark:
            return None  # Git has written: events tell of the first files before they tell of the last ones.
        snapshot = manifest.look_again(known, paths, self._blobs.put)
        if snapshot is not None:
            self._repository.saw(snapshot, head)
        return snapshot

    def _begin(self, trigger: str, now: float) -> Settling:
        if self._pending is None:
            path, at = self._changed_last
            before = frozenset({path} if now - at <= BURST_SECONDS else ())
            self._pending = Settling(Reload(trigger, now), now, now, before)
        if self._pending.waits:
            self._pending.since = now
        self._pending.last_at = now
        self._pending.waits = self._pending.looked = False
        self._pending.take_up(trigger)
        return self._pending

    # --- settle -> manifest -> bytecode -------------------------------------------------------------------

    def deadline(self) -> float | None:
        """Return when :meth:`advance` has something to do at the earliest."""
        waiting = self._pending is not None and not self._pending.waits
        times = [self._pending.due_at(self.quiet_seconds)] if self._pending and waiting else []
        if self.job is not None:
            times.append(self.job.deadline)
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
        if self.job is not None and self.job.deadline <= now:
            self._again |= self.job.paths
            self.compiled(self.job.expire(), now)
        self._tell_rejection()
        pending = self._pending
        if pending is None or pending.waits or pending.due_at(self.quiet_seconds) > now:
            return False
        if self._is_held_by_git(now):
            return False
        under_way = self._build.reload if self._build is not None else candidate
        if pending.calm_at(self.quiet_seconds) > now:
            self._look_ahead(pending, now, live=live, under_way=under_way, outdated=outdated)
            return False
        if pending.is_held_by_writer(now):
            return False
        self._pending = None
        if pending.looked:  # It is on its way, and nothing more has happened.
            self._tell_rejection()
            return False
        return self._look(pending, now, live=live, under_way=under_way, outdated=outdated)

    def gate(self, now: float, candidate: Reload) -> bool:
        """Whether the handover to a candidate may begin: the tree has come to rest and is what it runs.

        Args:
            now: monotonic time.
            candidate: the reload of the generation that waits at its gate.
        """
        if self.busy or self._is_held_by_git(now):
            return False
        known = self._snapshot
        if self.trusting and known is not None and not self._unreadable:
            try:
                again = self._look_again(known, candidate.paths)
            except SourceError:
                again = None  # The whole look tells what is wrong.
            if again is not None and again.manifest is known.manifest:
                return True
        self.scan(now)
        return not self.busy

    def _is_held_by_git(self, now: float) -> bool:
        """Whether a running git is in the middle of changing the tree; it is to be asked again then."""
        if not self._repository.is_changing():
            return False
        pending = self._pending or self._begin("watch", now)
        pending.hold(now, _LOCK_LOOK_SECONDS)
        return True

    def resume(self, now: float) -> None:
        """End a pause: what has changed meanwhile becomes a reload."""
        self.paused, self._judged = False, None
        self._begin("scan", now)

    def _look_ahead(
        self,
        pending: Settling,
        now: float,
        *,
        live: Manifest | None,
        under_way: Reload | None,
        outdated: bool,
    ) -> None:
        """Start to build what is on disk before it has come to rest; whatever else follows can wait."""
        pending.looked_ahead = True
        reload, began = pending.reload, self._clock()
        found = None if self.paused else self._find(pending, now)
        known = {self._judged, live.digest if live else None, under_way.tree if under_way else None}
        if found is None or found.digest in known or self._quarantined(found.digest) is not None:
            return
        reload.mark("settle", began)
        reload.mark("manifest", self._clock())
        self._supersede_build(reload, found)
        reload.renew = reload.renew or outdated
        self._start_build(reload, found, now, live=live, sweep=False)
        pending.looked = True

    def _look(
        self,
        pending: Settling,
        now: float,
        *,
        live: Manifest | None,
        under_way: Reload | None,
        outdated: bool,
    ) -> bool:
        """Look at a tree that has come to rest and decide what follows.

        Returns:
            Whether it is what is live.
        """
        pending.take_up(pending.reload.trigger)
        reload, began = pending.reload, self._clock()
        reload.restless = pending.is_overdue(now)
        found = self._find(pending, now)
        if self._torn:
            pending.not_before, self._pending = now + _LOCK_LOOK_SECONDS, pending
            return False
        if reload is under_way and (found is None or (live is not None and found.digest == live.digest)):
            # What was started ahead has an end of its own; what is found now is told apart from it.
            reload = Reload(reload.trigger, reload.began_at)
            if found is None:
                self.give_up("the tree has changed and cannot be read")
                self._left(str(pending.reload.tree))
        reload.mark("settle", began)
        if found is None:
            self._end(reload, "rejected", "import", self.problem)
            return False
        reload.mark("manifest", self._clock())
        if (
            self.paused
            and reload.trigger in AUTOMATIC_TRIGGERS
            and (live is None or live.digest != found.digest)
        ):
            pending.waits, self._pending = True, pending
            if self._build is not None and self._build.reload is reload:
                self._supersede_build(reload, found)  # It is of an older tree, and nobody waits for it.
            return False
        return self._decide(
            reload, found, now, live=live, under_way=under_way, outdated=outdated, whole=pending.whole
        )

    def _find(self, pending: Settling, now: float) -> Manifest | None:
        """Stage *manifest*: find out what is on disk.

        Returns:
            None if it cannot be read, :attr:`problem` says why; or if git was writing meanwhile (`_torn`).
        """
        dirty = {self._relative(path) for path in pending.dirty}
        known = None if pending.whole else self._snapshot
        try:
            again = None
            if known is not None and dirty and self.trusting and not self._unreadable:
                again = self._look_again(known, dirty)
            if again is None:
                again = self._scan(known, doubtful=dirty)
                self.scanned_at = now
        except SourceError as error:
            self.problem, self._unreadable, self._torn = str(error), True, False
            return None
        self._torn = self._repository.mark() != self._mark or self._repository.is_changing()
        if self._torn:
            return None
        self._snapshot = again
        if self._unreadable:
            self._unreadable, self._judged, self.problem = False, None, None
        return again.manifest

    def _decide(
        self,
        reload: Reload,
        found: Manifest,
        now: float,
        *,
        live: Manifest | None,
        under_way: Reload | None,
        outdated: bool,
        whole: bool,
    ) -> bool:
        """Decide whether anything follows from what is on disk; return whether it is what is live."""
        if under_way is not None and under_way.tree == found.digest and not reload.renew:
            self._join(reload, under_way, found, live)
            return False
        self._supersede_build(reload, found)
        if reload is under_way:
            self._left(str(reload.tree))
        # What was to bring new settings may have failed, or have made room for this one.
        reload.renew = reload.renew or outdated
        if live is not None and found.digest == live.digest and not reload.renew:
            self._judged, self.problem = live.digest, None
            if whole:  # Somebody asked: the sources are the same, the bytecode beside them need not be.
                self._start_build(reload, found, now, live=live, sweep=True)
            else:
                self._note(reload, found, live)
                self._end(reload, "unchanged")
            return True
        if reload.trigger in AUTOMATIC_TRIGGERS and not self._may_try(reload, found, live):
            return False
        self._start_build(reload, found, now, live=live, sweep=whole)
        return False

    def _note(self, reload: Reload, found: Manifest, live: Manifest | None) -> None:
        reload.tree = found.digest
        reload.previous_tree = live.digest if live else None
        reload.paths = live.changes(found) if live else ()

    def _join(self, reload: Reload, under_way: Reload, found: Manifest, live: Manifest | None) -> None:
        """Let who asked for what is on its way already hear how that ends."""
        if reload is under_way:
            return
        under_way.on_finish += reload.on_finish
        if self._build is not None and reload.trigger in OPERATOR_TRIGGERS:
            under_way.trigger, under_way.uid = reload.trigger, reload.uid  # No pause holds it any more.
        reload.on_finish = []
        self._note(reload, found, live)
        self._end(reload, "unchanged")

    def _may_try(self, reload: Reload, found: Manifest, live: Manifest | None) -> bool:
        """Whether nothing is known against a tree that no operator asked for; else end its reload."""
        fault = self._quarantined(found.digest)
        if found.digest == self._judged or fault is not None:
            self._note(reload, found, live)
        if found.digest == self._judged:
            self._end(reload, "unchanged")
            return False
        if fault is not None:
            reason, detail = fault
            self.problem, self._judged = f"quarantined: {detail}", found.digest
            self._end(reload, "rejected", reason or "crash", self.problem)
            return False
        return True

    def _start_build(
        self, reload: Reload, found: Manifest, now: float, *, live: Manifest | None, sweep: bool
    ) -> None:
        """Stage *bytecode*: purge and compile in a process of its own."""
        self._note(reload, found, live)
        job = self._compiler.start(
            tree=self._tree,
            before=self._compiled,
            after=found,
            sweep=sweep,
            now=now,
            again=self._again,
        )
        self._build = _Build(reload, found, job)

    def compiled(self, report: BytecodeReport, now: float) -> Built | None:
        """Take the compile helper's report; return what may be launched, None if it was rejected."""
        build, self._build = self._build, None
        if build is None:
            return None
        build.reload.mark("bytecode", now)
        if report.passing:  # It says nothing about the sources, so nothing that follows can put it right.
            self.problem = report.error
            self._end(build.reload, "rejected", "crash", report.error)
            self._begin("scan", now).not_before = now + _TRY_AGAIN_SECONDS
            return None
        self._judged = build.manifest.digest
        if report.error is not None:
            build.rejection, self._build = report.error, build
            self._tell_rejection()
            return None
        self._again = {self._relative(source) for source in report.stale.values()}
        if build.reload.tree == build.reload.previous_tree and not build.reload.renew:
            self._end(build.reload, "unchanged")
            return None
        self._compiled, self.problem = build.manifest, None
        self.take_prints(build.manifest, report)
        return Built(build.reload, build.manifest)

    def _tell_rejection(self) -> None:
        """End a reload whose sources do not compile, once they can no longer be half of a change."""
        build = self._build
        if build is None or build.rejection is None:
            return
        if self._pending is not None and self._pending.reload is build.reload:
            return
        self._build, self.problem = None, build.rejection
        self._end(build.reload, "rejected", "syntax", build.rejection)

    def take_prints(self, found: Manifest, report: BytecodeReport) -> None:
        """Keep the prints of a manifest's code."""
        for path, prints in report.prints.items():  # Few, however large the tree is.
            digest = found.sources.get(self._relative(path))
            if digest is not None:
                self.prints[digest] = prints

    def knows_prints_of(self, found: Manifest) -> bool:
        """Whether the code of every source of a manifest can be compared."""
        altered, _ = self._comparable.difference(found.sources)
        if any(digest not in self.prints for digest in altered.values()):
            return False
        self._comparable = found.sources
        return True

    def judge(self, found: Manifest, now: float) -> CompileJob:
        """Have the prints of a manifest's code taken from its blobs; nothing on disk is looked at."""
        return self._compiler.judge(found, now)

    def _supersede_build(self, newer: Reload, found: Manifest) -> None:
        build = self._build
        if build is None:
            return
        self._cancel(build)
        self._build = None
        if build.reload is not newer:
            build.reload.make_way(newer)
            self._end(build.reload, "superseded", detail=f"by tree {found.digest[:12]}")

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
            self._cancel(build)
            self._end(build.reload, "superseded", detail=why)

    def _cancel(self, build: _Build) -> None:
        if build.rejection is None:
            build.job.cancel()
            self._again |= build.job.paths

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

    def has(self, reload: Reload) -> bool:
        """Whether a reload has more to do here: to settle, or to be built."""
        under_way = (
            self._pending.reload if self._pending else None,
            self._build.reload if self._build else None,
        )
        return any(reload is found for found in under_way)

    def forget(self, keep: Collection[Manifest]) -> None:
        """Forget the prints of sources that none of these manifests has."""
        needed = {digest for manifest in keep for digest in manifest.sources.values()}
        self.prints = {digest: prints for digest, prints in self.prints.items() if digest in needed}
        if not needed.issuperset(self._comparable.values()):
            self._comparable = Sharded({})

    def leave(self) -> None:
        """Let go of a tree that is at rest: another image of the supervisor looks at it anew."""
        self._compiler.close()

    def close(self) -> None:
        """Stop what is under way; its reloads end, and who asked for them hears it."""
        why = "by the operator's stop"
        self.give_up(why)
        pending, self._pending = self._pending, None
        if pending is not None and pending.reload.outcome is None:
            self._end(pending.reload, "superseded", detail=why)
        self._compiler.close()
