"""Lifecycle: what happens to generations, decided without a process, a clock, a socket or a file.

Events go in, actions come out. A *generation* is one child process started from one manifest. It is

    LAUNCHED   importing its code, or waiting at its gate with the first attestation asked for
    HELD       attested; in a ``replace`` handover it waits here until no older child runs
    STARTED    told to go; becomes live when it is ready and attested again
    LIVE       the one that serves
    DRAINING   asked to stop; killed at its deadline

and there is at most one LIVE, and at most one of the first three, the *candidate*. The rules:

- The live child is not touched before the candidate is attested: in ``overlap`` it is asked to stop when the
  candidate went live, in ``replace`` when the candidate stands at its gate with everything imported.
- In ``replace`` nobody is told to go before the program of every other child that was told to go is over:
  never two live mains. It is over with its process, or when it says so and nothing is left of it that
  another one could miss (:mod:`supervisor.child.traces`).
- A tree is *known good* once a generation of it has served its probation: live, attested, neither ended nor
  hung. A tree that fails before that, as a candidate or on probation, is *quarantined*: nothing automatic
  starts it again until the disk holds another one. The newest tree that served without a fault takes its
  place: the live child where there is one, else a new process from its blobs, outcome ``rolled_back``.
- A child that ends and for which there is nothing better is started again from the same tree, after a backoff
  that doubles up to a cap with jitter and is reset by a healthy spell. The same backoff bounds how often a
  child is replaced for its memory or its age. The supervisor never gives up and never storms.
- No wait is without a bound: every stage but LIVE has a deadline. A child that misses it, or whose silence
  outlasts the watchdog, is asked for its stacks and killed a moment later.
- A live child found to run other code than its manifest's is replaced through the ordinary handover, once per
  tree.
- The operator beats everything. After a stop nothing is launched. During a pause no other code is launched
  than what runs; that is kept running.

Time is monotonic seconds, passed in with each event. Every event is defined in every state: one about a
generation that is gone is ignored, because processes end while messages about them are on their way.

Rejected: callbacks between objects that each own a piece of the state (gunicorn's arbiter, supervisord's
subprocess): the interesting cases are those where two things happen at once, and only a pure function can be
asked about all of them. The form is that of h11's ``_state.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum

from msgspec import Struct, field
from msgspec.structs import replace

from supervisor.events import (
    AUTOMATIC_TRIGGERS,
    OPERATOR_TRIGGERS,
    Action,
    Attest,
    Attested,
    Beat,
    Drained,
    Dump,
    Event,
    Exceeded,
    Exited,
    Finished,
    Go,
    Imported,
    Kill,
    Launch,
    PauseRequested,
    Promoted,
    Ready,
    Reason,
    Report,
    Restarting,
    RestartRequested,
    ResumeRequested,
    RollbackRequested,
    Slept,
    StopRequested,
    Terminate,
    Tick,
    TreeLeft,
    TreeReady,
    TreeRejected,
    TreeSeen,
    TreeUnchanged,
)

_LOOK_AGAIN_SECONDS = (0.002, 0.02)
"""Shortest and longest time between two looks at a child that is in the middle of its imports."""

LAST_WORDS_SECONDS = 1.0
"""What a child that failed gets to write down its stacks or to end by itself."""

KNOWN_GOOD_KEPT = 3


class Stage(Enum):
    """Where a generation is in its life; see the module's header."""

    LAUNCHED = "launched"
    HELD = "held"
    STARTED = "started"
    LIVE = "live"
    DRAINING = "draining"


class Policy(Struct, frozen=True):
    """The rules that an operator can set, durations in seconds.

    Attributes:
        overlap: handover ``overlap``; otherwise ``replace``.
        notify: readiness is the child's ``READY=1``; otherwise being alive and attested.
        ready_timeout_seconds: from launch, or from ``go``, to live.
        stop_timeout_seconds: from SIGTERM to SIGKILL.
        watchdog_seconds: longest silence of a live child; 0 for no limit.
        probation_seconds: how long a generation must serve before its tree is known good.
        max_age_seconds: a live child is replaced after this time; None for never.
        backoff_first_seconds: wait before the first restart of a child that ended.
        backoff_cap_seconds: longest wait.
        healthy_seconds: a child that served this long resets the backoff.
        jitter: returns a factor for each wait, about 1.
    """

    overlap: bool
    notify: bool
    ready_timeout_seconds: float = 30.0
    stop_timeout_seconds: float = 20.0
    watchdog_seconds: float = 15.0
    probation_seconds: float = 30.0
    max_age_seconds: float | None = None
    backoff_first_seconds: float = 0.25
    backoff_cap_seconds: float = 30.0
    healthy_seconds: float = 30.0
    jitter: Callable[[], float] = lambda: 1.0


class Generation(Struct, frozen=True):
    """One child as the decisions see it.

    Attributes:
        number: from 1.
        tree: digest of the manifest it was started from.
        trigger: what it was started for.
        stage: where it is.
        since: when it came into this stage.
        deadline: when this stage counts as failed; None while live without a watchdog.
        probation_until: when a live one has served its probation; None once that was noticed.
        renew_at: when a live one is too old; None for never.
        ready: it said READY=1.
        attested: it was attested since it was told to go.
        was_started: it was told to go, so it may be at work.
        finished: its program is over, and what is left of it concerns nobody.
        served_probation: its tree is known good once it has shown nothing wrong from here on:
        proof_due: a proof of its code is still to come,
        beat_due: and a sign of life.
        killed_for: why we killed it, if we did; becomes the cause of its end.
    """

    number: int
    tree: str
    trigger: str
    stage: Stage
    since: float
    deadline: float | None
    probation_until: float | None = None
    renew_at: float | None = None
    ready: bool = False
    attested: bool = False
    was_started: bool = False
    finished: bool = False
    served_probation: bool = False
    proof_due: bool = False
    beat_due: bool = False
    killed_for: str | None = None

    def next_at(self) -> float | None:
        """Return when something is to be decided about it at the earliest."""
        times = (self.deadline, self.probation_until, self.renew_at)
        return min((at for at in times if at is not None), default=None)

    def later(self, seconds: float) -> Generation:
        """Return it with all its times put off."""

        def put_off(at: float | None) -> float | None:
            return at + seconds if at is not None else None

        return replace(
            self,
            deadline=put_off(self.deadline),
            probation_until=put_off(self.probation_until),
            renew_at=put_off(self.renew_at),
        )


class Fault(Struct, frozen=True):
    """Why a tree is in quarantine; ``reason`` is None where the operator put it there."""

    reason: Reason | None
    detail: str


class Retry(Struct, frozen=True):
    """A start that waits for its time.

    Attributes:
        at: monotonic time.
        tree: what to start.
        trigger: why.
    """

    at: float
    tree: str
    trigger: str


class State(Struct, frozen=True):
    """All that is decided upon.

    Attributes:
        live: the generation that serves.
        candidate: the one that is to take over.
        draining: those that were asked to stop.
        served: tree of the newest generation that went live and has not failed on probation.
        known_good: trees that served their probation, newest first.
        quarantine: trees that failed, and how.
        retry: what to start again when its time has come.
        mismatched: tree of the last live child that ran other code than its manifest's; it is replaced once.
        failures: ends in a row without a healthy spell between them.
        renewed_at: when a live child was last replaced for a limit.
        next_number: of the next generation.
        paused: the operator wants no other code to be started.
        stopping: the operator asked to stop.
    """

    live: Generation | None = None
    candidate: Generation | None = None
    draining: tuple[Generation, ...] = ()
    served: str | None = None
    known_good: tuple[str, ...] = ()
    quarantine: Mapping[str, Fault] = field(default_factory=dict)
    retry: Retry | None = None
    mismatched: str | None = None
    failures: int = 0
    renewed_at: float = float("-inf")
    next_number: int = 1
    paused: bool = False
    stopping: bool = False

    @property
    def all(self) -> tuple[Generation, ...]:
        """Every generation that has a process."""
        return (*(g for g in (self.live, self.candidate) if g is not None), *self.draining)

    @property
    def trees(self) -> frozenset[str]:
        """Every tree that may have to be started again, from its blobs."""
        trees = {*self.known_good, *(g.tree for g in self.all)}
        trees |= {self.served} if self.served is not None else set()
        return frozenset(trees | ({self.retry.tree} if self.retry is not None else set()))

    @property
    def earlier_good(self) -> str | None:
        """The known good tree that an operator's rollback leads to."""
        runs = self.live or self.candidate or self.retry
        running = runs.tree if runs is not None else None
        others = sorted(
            (tree for tree in self.known_good if tree != running), key=self.quarantine.__contains__
        )
        return next(iter(others), None)  # What he put away comes last.

    @property
    def finished(self) -> bool:
        """Whether the operator's stop has been carried out."""
        return self.stopping and not self.all

    def deadline(self) -> float | None:
        """Return when :class:`Tick` has something to decide at the earliest, or None."""
        times = [at for g in self.all if (at := g.next_at()) is not None]
        if self.retry is not None:
            times.append(self.retry.at)
        return min(times, default=None)


class _Step(Struct):
    """One event's way through the rules: a state that is replaced, actions that are collected."""

    policy: Policy
    now: float
    state: State
    actions: list[Action] = field(default_factory=list)

    # --- the tree -----------------------------------------------------------------------------------------

    def tree_ready(self, event: TreeReady) -> None:
        if self.state.stopping:
            return
        if event.trigger in AUTOMATIC_TRIGGERS:
            if self.state.paused:
                return
            if event.tree in self.state.quarantine:
                self.tree_rejected()
                return
        self._release(event.tree)
        self._supersede(event.tree, renew=event.renew)
        if self.state.candidate is None:
            self._launch(event.tree, event.trigger)

    def tree_rejected(self) -> None:
        """With nothing running and nothing on its way, what was good runs."""
        state = self.state
        idle = state.live is None and state.candidate is None and state.retry is None
        good = next(iter(self._good()), None)
        if idle and not state.stopping and good is not None:
            self._launch(good, "start")

    def tree_unchanged(self, event: TreeUnchanged) -> None:
        live = self.state.live
        if live is not None and live.tree == event.tree:  # It may have ended since somebody looked.
            self._supersede(event.tree)

    def tree_seen(self, event: TreeSeen) -> None:
        """A quarantine ends with the first change of the disk."""
        kept = {tree: fault for tree, fault in self.state.quarantine.items() if tree == event.tree}
        if kept != self.state.quarantine:
            self.state = replace(self.state, quarantine=kept)

    def tree_left(self, event: TreeLeft) -> None:
        candidate = self.state.candidate
        if candidate is not None and candidate.tree == event.tree and not candidate.was_started:
            self.actions.append(Report(candidate.number, "superseded", detail="the tree has changed again"))
            self._discard(candidate)

    # --- children -----------------------------------------------------------------------------------------

    def imported(self, event: Imported) -> None:
        candidate = self._candidate(event.number)
        if candidate is not None and candidate.stage is Stage.LAUNCHED:
            self.actions.append(Attest(candidate.number))

    def attested(self, event: Attested) -> None:
        live = self._live(event.number)
        if live is not None:
            self._live_attested(live, event)
        candidate = self._candidate(event.number)
        if candidate is None:
            return
        if event.problem is not None:
            self._fail(candidate, "attestation", event.problem)
        elif candidate.stage is Stage.LAUNCHED:
            self._set_candidate(replace(candidate, stage=Stage.HELD, since=self.now))
            self._open_gate()
        elif candidate.stage is Stage.STARTED:
            if event.importing:  # Still in its import statements.
                shortest, longest = _LOOK_AGAIN_SECONDS  # As long again as it has taken so far.
                delay = min(max(shortest, self.now - candidate.since), longest)
                self.actions.append(Attest(candidate.number, delay))
            else:
                self._set_candidate(replace(candidate, attested=True))
                self._promote_if_due()

    def ready(self, event: Ready) -> None:
        candidate = self._candidate(event.number)
        if candidate is not None and candidate.stage is Stage.STARTED and not candidate.ready:
            self._set_candidate(replace(candidate, ready=True))
            self.actions.append(Attest(candidate.number))

    def beat(self, event: Beat) -> None:
        seconds = max(event.extend_seconds, self.policy.watchdog_seconds)
        live, candidate = self._live(event.number), self._candidate(event.number)
        if live is not None and live.deadline is not None and live.killed_for is None:
            self._set_live(replace(live, deadline=self.now + seconds, beat_due=False))
            self._promote_tree_if_due()
        elif candidate is not None and event.extend_seconds and candidate.deadline is not None:
            later = max(candidate.deadline, self.now + event.extend_seconds)
            self._set_candidate(replace(candidate, deadline=later))

    def exceeded(self, event: Exceeded) -> None:
        live = self._live(event.number)
        if live is not None and self._served_since(live) + self._backoff_seconds() <= self.now:
            self._renew(live, event.cause, event.detail)

    def finished(self, event: Finished) -> None:
        draining = next((g for g in self.state.draining if g.number == event.number), None)
        if draining is not None:
            self._replace_draining(replace(draining, finished=True))
            self._open_gate()

    def exited(self, event: Exited) -> None:
        gone = next((g for g in self.state.all if g.number == event.number), None)
        if gone is None:
            return
        self._forget(gone)
        if gone.stage is Stage.LIVE:
            self._live_ended(gone, event)
        elif event.blameless and gone.stage is not Stage.DRAINING:
            self.actions.append(Report(gone.number, "rejected", "crash", event.error))
            if self.state.live is None and not self.state.stopping:
                self._retry(gone.tree, gone.trigger)
        elif gone.stage is not Stage.DRAINING:
            reason: Reason = "import" if gone.stage is not Stage.STARTED or event.importing else "crash"
            self._failed(gone, reason, event.error or f"it ended with {event.how} before it was live")
        self._open_gate()
        if gone.stage is Stage.DRAINING and gone.was_started:
            late = "it did not stop in time: " if gone.killed_for == "stop" else ""
            self.actions.append(Drained(gone.number, gone.tree, late + event.how))

    # --- time ---------------------------------------------------------------------------------------------

    def tick(self) -> None:
        for generation in self.state.all:
            if generation.deadline is not None and generation.deadline <= self.now:
                self._overdue(generation)
        live = self.state.live
        if live is not None and live.probation_until is not None and live.probation_until <= self.now:
            watched = live.deadline is not None  # Its silence may have begun on probation.
            due = replace(live, served_probation=True, proof_due=True, beat_due=watched)
            self._set_live(replace(due, probation_until=None))
            self.actions.append(Attest(live.number))
        live = self.state.live
        if live is not None and live.renew_at is not None and live.renew_at <= self.now:
            self._set_live(replace(live, renew_at=self.now + self.policy.backoff_cap_seconds))
            self._renew(live, "age", f"it served for {self.now - live.since:.0f} s")
        retry = self.state.retry
        if retry is not None and retry.at <= self.now and not self.state.stopping:
            self.state = replace(self.state, retry=None)
            if self.state.candidate is None:
                self._launch(retry.tree, retry.trigger)

    def slept(self, event: Slept) -> None:
        state, seconds = self.state, event.seconds
        self.state = replace(
            state,
            live=state.live.later(seconds) if state.live is not None else None,
            candidate=state.candidate.later(seconds) if state.candidate is not None else None,
            draining=tuple(generation.later(seconds) for generation in state.draining),
        )

    # --- the operator -------------------------------------------------------------------------------------

    def restart_requested(self) -> None:
        state = self.state
        if state.stopping or state.candidate is not None:
            return  # A new process is on its way already.
        if state.live is not None:
            self._launch(state.live.tree, "cli")
        elif state.retry is not None:
            self._launch(state.retry.tree, "cli")

    def rollback_requested(self, event: RollbackRequested) -> None:
        target, live = self.state.earlier_good, self.state.live
        if target is None or self.state.stopping:
            return
        self._release(target)
        self._supersede(target)
        # What is on disk may be on its way, or be what ended: it does not come back by itself either.
        for tree in (live.tree if live is not None else None, event.disk):
            if tree not in {None, target}:
                self._quarantine(str(tree), None, event.detail)
        if self.state.candidate is None:
            self._launch(target, "cli")

    def pause_requested(self) -> None:
        self.state = replace(self.state, paused=True)
        live, candidate = self.state.live, self.state.candidate
        if live is not None and candidate is not None and candidate.trigger in AUTOMATIC_TRIGGERS:
            self._discard(candidate)
            self.actions.append(Report(candidate.number, "superseded", detail="by the operator's pause"))

    def stop_requested(self) -> None:
        self.state = replace(self.state, stopping=True, retry=None)
        if self.state.candidate is not None:
            self.actions.append(
                Report(self.state.candidate.number, "superseded", detail="by the operator's stop")
            )
            self._discard(self.state.candidate)
        if self.state.live is not None:
            self._drain(self.state.live)

    # --- the decisions they share -------------------------------------------------------------------------

    def _live(self, number: int) -> Generation | None:
        live = self.state.live
        return live if live is not None and live.number == number else None

    def _candidate(self, number: int) -> Generation | None:
        candidate = self.state.candidate
        return candidate if candidate is not None and candidate.number == number else None

    def _set_live(self, live: Generation) -> None:
        self.state = replace(self.state, live=live)

    def _set_candidate(self, candidate: Generation | None) -> None:
        self.state = replace(self.state, candidate=candidate)

    def _quarantine(self, tree: str, reason: Reason | None, detail: str) -> None:
        self.state = replace(self.state, quarantine={**self.state.quarantine, tree: Fault(reason, detail)})

    def _release(self, tree: str) -> None:
        if tree in self.state.quarantine:
            kept = {other: fault for other, fault in self.state.quarantine.items() if other != tree}
            self.state = replace(self.state, quarantine=kept)

    def _supersede(self, tree: str, *, renew: bool = False) -> None:
        """Discard a candidate of another tree; one of this tree is on its way and stays, unless outdated."""
        candidate = self.state.candidate
        if candidate is not None and (candidate.tree != tree or renew):
            self.actions.append(Report(candidate.number, "superseded", detail=f"by tree {tree[:12]}"))
            self._discard(candidate)

    def _launch(self, tree: str, trigger: str) -> None:
        number, deadline = self.state.next_number, self.now + self.policy.ready_timeout_seconds
        generation = Generation(number, tree, trigger, Stage.LAUNCHED, self.now, deadline)
        self.state = replace(self.state, candidate=generation, next_number=number + 1, retry=None)
        self.actions.append(Launch(number, tree, trigger))

    def _open_gate(self) -> None:
        """Let a held candidate go if the handover allows it; ``replace`` stops the live child first."""
        candidate = self.state.candidate
        if candidate is None or candidate.stage is not Stage.HELD:
            return
        if not self.policy.overlap:
            if self.state.live is not None:
                self._drain(self.state.live)
            if any(g.was_started and not g.finished for g in self.state.draining):
                # The drain deadline of the others bounds this wait; it does not count against the candidate.
                self._set_candidate(replace(candidate, deadline=None))
                return
        deadline = self.now + self.policy.ready_timeout_seconds
        started = replace(candidate, stage=Stage.STARTED, since=self.now, deadline=deadline, was_started=True)
        self._set_candidate(started)
        self.actions.append(Go(candidate.number))
        if not self.policy.notify:
            self.actions.append(Attest(candidate.number))

    def _promote_if_due(self) -> None:
        candidate = self.state.candidate
        if candidate is None or not candidate.attested or (self.policy.notify and not candidate.ready):
            return
        policy, previous = self.policy, self.state.live
        live = replace(
            candidate,
            stage=Stage.LIVE,
            since=self.now,
            deadline=self.now + policy.watchdog_seconds if policy.watchdog_seconds > 0 else None,
            probation_until=self.now + policy.probation_seconds,
            renew_at=self.now + policy.max_age_seconds if policy.max_age_seconds is not None else None,
        )
        self.state = replace(self.state, live=live, candidate=None, served=live.tree)
        self.actions.append(Report(live.number, "live"))
        if previous is not None:
            self._drain(previous)

    def _live_attested(self, live: Generation, event: Attested) -> None:
        if event.problem is not None:
            self._live_mismatched(live, event.problem)
        else:
            self._set_live(replace(live, proof_due=False))
            self._promote_tree_if_due()

    def _promote_tree_if_due(self) -> None:
        live = self.state.live
        if live is not None and live.served_probation and not (live.proof_due or live.beat_due):
            self._set_live(replace(live, served_probation=False))
            others = (tree for tree in self.state.known_good if tree != live.tree)
            known_good = (live.tree, *others)[:KNOWN_GOOD_KEPT]
            self.state = replace(self.state, known_good=known_good)
            self.actions.append(Promoted(live.number, live.tree))

    def _live_mismatched(self, live: Generation, problem: str) -> None:
        """Replace a child that runs other code, once per tree: a second start would not heal it either."""
        if self.state.candidate is not None or self.state.stopping or live.killed_for is not None:
            return
        if self.state.mismatched == live.tree:
            return
        self.state = replace(self.state, mismatched=live.tree)
        better = self._better_than(live.tree)
        if better is not None:
            self._roll_back(live, better, "mismatch", "attestation", problem)
        else:
            self.actions.append(Restarting(live.number, "mismatch", problem, 0.0))
            self._launch(live.tree, "mismatch")

    def _live_ended(self, gone: Generation, event: Exited) -> None:
        if self.state.stopping:
            return
        if self.now - gone.since >= self.policy.healthy_seconds:
            self.state = replace(self.state, failures=0)
        cause = gone.killed_for or "crash"
        silence = f"silent for {self.policy.watchdog_seconds:g} s; --watchdog 0 turns this off"
        detail = silence if cause == "hang" else event.error or event.how
        better = self._better_than(gone.tree)
        candidate = self.state.candidate
        if candidate is not None:
            self.actions.append(Restarting(gone.number, cause, detail, 0.0))
            # What runs next is on its way; if that fails, it is not this one again.
            if better is not None and candidate.tree != gone.tree:
                self._quarantine(gone.tree, "crash", detail)
        elif better is not None:
            self._roll_back(gone, better, cause, "crash", detail)
        else:
            wait = self._retry(gone.tree, cause)
            self.actions.append(Restarting(gone.number, cause, detail, wait))

    def _better_than(self, tree: str) -> str | None:
        """Return what is to run in place of a tree that failed by itself; None if it is the best there is."""
        if tree in self.state.known_good:
            return None
        # During a pause nothing else is started than what ran before.
        good = [g for g in self._good() if g != tree and (g == self.state.served or not self.state.paused)]
        return next(iter(good), None)

    def _good(self) -> Sequence[str]:
        """Return the trees to run again, best first: what an operator put away has not failed, comes last."""
        state = self.state
        trees = [tree for tree in (state.served, *state.known_good) if tree is not None]
        usable = [t for t in trees if t not in state.quarantine or state.quarantine[t].reason is None]
        return sorted(usable, key=state.quarantine.__contains__)

    def _roll_back(self, failed: Generation, better: str, cause: str, reason: Reason, detail: str) -> None:
        """Bring an earlier tree back in place of a live one that failed on probation."""
        self._quarantine(failed.tree, reason, detail)
        self.state = replace(self.state, failures=self.state.failures + 1)
        self.actions.append(Restarting(failed.number, cause, detail, 0.0))
        self.actions.append(Report(failed.number, "rolled_back", reason, f"on probation: {detail}", cause))
        self._launch(better, cause)

    def _fail(self, candidate: Generation, reason: Reason, detail: str) -> None:
        """End a candidate that still has a process; one that does not move tells where it stands."""
        ending = Dump(candidate.number) if reason == "readiness" else Terminate(candidate.number)
        self._discard(candidate)
        if candidate.was_started or reason == "readiness":
            self.actions[-1] = ending
            draining = next(g for g in self.state.draining if g.number == candidate.number)
            self._replace_draining(replace(draining, deadline=self.now + LAST_WORDS_SECONDS))
        self._failed(candidate, reason, detail)

    def _failed(self, candidate: Generation, reason: Reason, detail: str) -> None:
        """Decide what serves now that a candidate did not become live."""
        live, tree = self.state.live, candidate.tree
        if live is not None:
            better: str | None = live.tree
        elif candidate.trigger in OPERATOR_TRIGGERS:  # He asked for this one, and not for nothing at all.
            better = next((good for good in self._good() if good != tree), None)
        else:
            better = self._better_than(tree)
        if better not in {None, tree} and tree not in self.state.known_good:
            self._quarantine(tree, reason, detail)
        if live is not None or self.state.stopping:
            self.actions.append(Report(candidate.number, "rejected", reason, detail))
        elif better is not None:
            self.actions.append(Report(candidate.number, "rolled_back", reason, detail))
            self._release(better)
            self._launch(better, "crash")
        else:
            self.actions.append(Report(candidate.number, "rejected", reason, detail))
            self._retry(tree, candidate.trigger)

    def _renew(self, live: Generation, cause: str, detail: str) -> None:
        """Replace a live child that is not wrong but has had its time."""
        if self.state.candidate is not None or self.state.stopping or live.killed_for is not None:
            return
        healthy = self.now - self._served_since(live) >= self.policy.healthy_seconds
        failures = 1 if healthy else self.state.failures + 1
        self.state = replace(self.state, failures=failures, renewed_at=self.now)
        self.actions.append(Restarting(live.number, cause, detail, 0.0))
        self._launch(live.tree, cause)

    def _served_since(self, live: Generation) -> float:
        return max(live.since, self.state.renewed_at)

    def _overdue(self, generation: Generation) -> None:
        if generation.stage is Stage.DRAINING:
            self.actions.append(Kill(generation.number))
            self._replace_draining(replace(generation, deadline=None, killed_for="stop"))
        elif generation.stage is Stage.LIVE:
            self._hung(generation)
        else:
            waited = f"not live within {self.policy.ready_timeout_seconds:g} s ({generation.stage.value})"
            self._fail(generation, "readiness", waited)

    def _hung(self, live: Generation) -> None:
        """Have a silent child say where it stands, then kill it; what follows is decided when it is gone."""
        if live.killed_for is None:
            deadline = self.now + LAST_WORDS_SECONDS
            self._set_live(replace(live, deadline=deadline, killed_for="hang"))
            self.actions.append(Dump(live.number))
        else:
            self._set_live(replace(live, deadline=None))
            self.actions.append(Kill(live.number))

    def _backoff_seconds(self) -> float:
        grown = self.policy.backoff_first_seconds * 2.0 ** min(self.state.failures, 32)
        return min(grown, self.policy.backoff_cap_seconds) * self.policy.jitter()

    def _retry(self, tree: str, trigger: str) -> float:
        """Note a start for later and return how long it waits."""
        wait = self._backoff_seconds()
        retry = Retry(self.now + wait, tree, trigger)
        self.state = replace(self.state, retry=retry, failures=self.state.failures + 1)
        return wait

    def _drain(self, generation: Generation) -> None:
        """Ask a generation to stop; it may finish its work until the drain deadline."""
        deadline = self.now + self.policy.stop_timeout_seconds
        self._forget(generation)
        draining = replace(
            generation,
            stage=Stage.DRAINING,
            since=self.now,
            deadline=deadline,
            probation_until=None,
            renew_at=None,
        )
        self.state = replace(self.state, draining=(*self.state.draining, draining))
        self.actions.append(Terminate(generation.number))

    def _discard(self, candidate: Generation) -> None:
        """Stop a candidate: at once while it waits at its gate, with a drain once it may be at work."""
        self._drain(candidate)
        if not candidate.was_started:
            self.actions[-1] = Kill(candidate.number)

    def _forget(self, generation: Generation) -> None:
        state = self.state
        self.state = replace(
            state,
            live=None if self._live(generation.number) else state.live,
            candidate=None if self._candidate(generation.number) else state.candidate,
            draining=tuple(g for g in state.draining if g.number != generation.number),
        )

    def _replace_draining(self, generation: Generation) -> None:
        draining = tuple(generation if g.number == generation.number else g for g in self.state.draining)
        self.state = replace(self.state, draining=draining)


def step(policy: Policy, state: State, event: Event, now: float) -> tuple[State, Sequence[Action]]:  # noqa: C901, PLR0912 -- a table
    """Return the state after an event, and the actions that it asks for in the order to carry them out.

    Args:
        policy: the operator's rules.
        state: before the event.
        event: what happened.
        now: monotonic time in seconds.
    """
    work = _Step(policy, now, state)
    match event:
        case TreeReady():
            work.tree_ready(event)
        case TreeRejected():
            work.tree_rejected()
        case TreeUnchanged():
            work.tree_unchanged(event)
        case TreeSeen():
            work.tree_seen(event)
        case TreeLeft():
            work.tree_left(event)
        case Imported():
            work.imported(event)
        case Attested():
            work.attested(event)
        case Ready():
            work.ready(event)
        case Beat():
            work.beat(event)
        case Exceeded():
            work.exceeded(event)
        case Finished():
            work.finished(event)
        case Exited():
            work.exited(event)
        case Tick():
            work.tick()
        case Slept():
            work.slept(event)
        case RestartRequested():
            work.restart_requested()
        case RollbackRequested():
            work.rollback_requested(event)
        case PauseRequested():
            work.pause_requested()
        case ResumeRequested():
            work.state = replace(state, paused=False)
        case StopRequested():
            work.stop_requested()
    return work.state, work.actions
