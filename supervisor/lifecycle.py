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
- In ``replace`` nobody is told to go while another child that was told to go still lives: never two live
  mains.
- A candidate that fails costs the service nothing while the live child serves. If that one was already
  stopped, the last good tree is started again, from its blobs: outcome ``rolled_back``.
- A live child that ends without being asked is started again, from the same tree, after a backoff that
  doubles up to a cap with jitter and is reset by a healthy spell. The supervisor never gives up and never
  storms.
- No wait is without a bound: every stage but LIVE has a deadline.
- A live child found to run other code than its manifest's is replaced through the ordinary handover, once per
  tree.
- The operator's stop beats everything: after it nothing is launched.

Time is monotonic seconds, passed in with each event. Every event is defined in every state: one about a
generation that is gone is ignored, because processes end while messages about them are on their way.

Rejected: callbacks between objects that each own a piece of the state (gunicorn's arbiter, supervisord's
subprocess): the interesting cases are those where two things happen at once, and only a pure function can be
asked about all of them. The form is that of h11's ``_state.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Literal

Outcome = Literal["live", "unchanged", "superseded", "rejected", "rolled_back"]
_LOOK_AGAIN_SECONDS = 0.02
"""Between two looks at a child that is in the middle of its imports."""

Reason = Literal["syntax", "import", "attestation", "readiness", "crash"]


class Stage(Enum):
    """Where a generation is in its life; see the module's header."""

    LAUNCHED = "launched"
    HELD = "held"
    STARTED = "started"
    LIVE = "live"
    DRAINING = "draining"


@dataclass(frozen=True)
class Policy:
    """The rules that an operator can set, durations in seconds.

    Attributes:
        overlap: handover ``overlap``; otherwise ``replace``.
        notify: readiness is the child's ``READY=1``; otherwise being alive and attested.
        ready_timeout_seconds: from launch, or from ``go``, to live.
        stop_timeout_seconds: from SIGTERM to SIGKILL.
        watchdog_seconds: longest silence of a live child; 0 for no limit.
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
    backoff_first_seconds: float = 0.25
    backoff_cap_seconds: float = 30.0
    healthy_seconds: float = 30.0
    jitter: Callable[[], float] = lambda: 1.0


@dataclass(frozen=True)
class Generation:
    """One child as the decisions see it.

    Attributes:
        number: from 1.
        tree: digest of the manifest it was started from.
        trigger: what it was started for.
        stage: where it is.
        since: when it came into this stage.
        deadline: when this stage counts as failed; None while live without a watchdog.
        ready: it said READY=1.
        attested: it was attested since it was told to go.
        was_started: it was told to go, so it may be at work.
        killed_for: why we killed it, if we did; becomes the cause of its end.
    """

    number: int
    tree: str
    trigger: str
    stage: Stage
    since: float
    deadline: float | None
    ready: bool = False
    attested: bool = False
    was_started: bool = False
    killed_for: str | None = None


@dataclass(frozen=True)
class State:
    """All that is decided upon.

    Attributes:
        live: the generation that serves.
        candidate: the one that is to take over.
        draining: those that were asked to stop.
        good: tree of the newest generation that went live.
        retry: what to start again when its time has come.
        mismatched: tree of the last live child that ran other code than its manifest's; it is replaced once.
        failures: ends in a row without a healthy spell between them.
        next_number: of the next generation.
        stopping: the operator asked to stop.
    """

    live: Generation | None = None
    candidate: Generation | None = None
    draining: tuple[Generation, ...] = ()
    good: str | None = None
    retry: Retry | None = None
    mismatched: str | None = None
    failures: int = 0
    next_number: int = 1
    stopping: bool = False

    @property
    def all(self) -> tuple[Generation, ...]:
        """Every generation that has a process."""
        return (*(g for g in (self.live, self.candidate) if g is not None), *self.draining)

    @property
    def finished(self) -> bool:
        """Whether the operator's stop has been carried out."""
        return self.stopping and not self.all

    def deadline(self) -> float | None:
        """Return when :class:`Tick` has something to decide at the earliest, or None."""
        times = [g.deadline for g in self.all if g.deadline is not None]
        if self.retry is not None:
            times.append(self.retry.at)
        return min(times, default=None)


@dataclass(frozen=True)
class Retry:
    """A start that waits for its time.

    Attributes:
        at: monotonic time.
        tree: what to start.
        trigger: why.
    """

    at: float
    tree: str
    trigger: str


# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeReady:
    """A manifest passed its compilation and is to become the running code."""

    tree: str
    trigger: str


@dataclass(frozen=True)
class TreeUnchanged:
    """The tree on disk is the one that is live."""

    tree: str


@dataclass(frozen=True)
class Imported:
    """A child stands at its gate with its imports done."""

    number: int


@dataclass(frozen=True)
class Attested:
    """A child's attestation was compared: ``problem`` is None if it runs what it was started from."""

    number: int
    problem: str | None
    importing: bool = False


@dataclass(frozen=True)
class Ready:
    """A child said READY=1."""

    number: int


@dataclass(frozen=True)
class Beat:
    """A child said WATCHDOG=1, or asked for more time (``extend_seconds``)."""

    number: int
    extend_seconds: float = 0.0


@dataclass(frozen=True)
class Exited:
    """A child is gone and reaped.

    Attributes:
        how: for people, for example ``exit status 7``.
        error: the exception that ended it, where it told us.
        importing: that exception came from loading code.
    """

    number: int
    how: str
    error: str | None = None
    importing: bool = False


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class StopRequested:
    """The operator wants the service stopped."""


Event = TreeReady | TreeUnchanged | Imported | Attested | Ready | Beat | Exited | Tick | StopRequested

# --- actions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """Start a process for this generation."""

    generation: Generation


@dataclass(frozen=True)
class Attest:
    """Ask a child for an attestation, after a delay."""

    number: int
    delay_seconds: float = 0.0


@dataclass(frozen=True)
class Go:
    """Let a child pass its gate."""

    number: int


@dataclass(frozen=True)
class Terminate:
    """Send SIGTERM to a child."""

    number: int


@dataclass(frozen=True)
class Kill:
    """Send SIGKILL to a child and its process group."""

    number: int


@dataclass(frozen=True)
class Report:
    """The attempt to make this generation live has ended."""

    number: int
    outcome: Outcome
    reason: Reason | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Restarting:
    """A child that served has ended unasked and will be started again."""

    number: int
    cause: str
    detail: str
    wait_seconds: float


Action = Launch | Attest | Go | Terminate | Kill | Report | Restarting


@dataclass
class _Step:
    """One event's way through the rules: a state that is replaced, actions that are collected."""

    policy: Policy
    now: float
    state: State
    actions: list[Action] = field(default_factory=list)

    # --- the events, one method each ----------------------------------------------------------------------

    def tree_ready(self, event: TreeReady) -> None:
        if self.state.stopping:
            return
        self._supersede(event.tree)
        if self.state.candidate is None:
            self._launch(event.tree, event.trigger)

    def tree_unchanged(self, event: TreeUnchanged) -> None:
        live = self.state.live
        if live is not None and live.tree == event.tree:  # It may have ended since somebody looked.
            self._supersede(event.tree)

    def imported(self, event: Imported) -> None:
        candidate = self._candidate(event.number)
        if candidate is not None and candidate.stage is Stage.LAUNCHED:
            self.actions.append(Attest(candidate.number))

    def attested(self, event: Attested) -> None:
        live = self.state.live
        if live is not None and live.number == event.number and event.problem is not None:
            self._live_mismatched(live, event.problem)
        candidate = self._candidate(event.number)
        if candidate is None:
            return
        if event.problem is not None:
            self._fail(candidate, "attestation", event.problem)
        elif candidate.stage is Stage.LAUNCHED:
            self._set_candidate(replace(candidate, stage=Stage.HELD, since=self.now))
            self._open_gate()
        elif candidate.stage is Stage.STARTED:
            if event.importing:
                self.actions.append(
                    Attest(candidate.number, _LOOK_AGAIN_SECONDS)
                )  # Still in its import statements.
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
        live, candidate = self.state.live, self._candidate(event.number)
        if live is not None and live.number == event.number and live.deadline is not None:
            self.state = replace(self.state, live=replace(live, deadline=self.now + seconds))
        elif candidate is not None and event.extend_seconds and candidate.deadline is not None:
            later = max(candidate.deadline, self.now + event.extend_seconds)
            self._set_candidate(replace(candidate, deadline=later))

    def exited(self, event: Exited) -> None:
        gone = next((g for g in self.state.all if g.number == event.number), None)
        if gone is None:
            return
        self._forget(gone)
        if gone.stage is Stage.LIVE:
            self._live_ended(gone, event)
        elif gone.stage is not Stage.DRAINING:
            reason: Reason = "import" if gone.stage is not Stage.STARTED or event.importing else "crash"
            self._failed(gone, reason, event.error or f"it ended with {event.how} before it was live")
        self._open_gate()

    def tick(self, _event: Tick) -> None:
        for generation in self.state.all:
            if generation.deadline is None or generation.deadline > self.now:
                continue
            if generation.stage is Stage.DRAINING:
                self.actions.append(Kill(generation.number))
                self._replace_draining(replace(generation, deadline=None))
            elif generation.stage is Stage.LIVE:
                self._kill(generation, "hang")
            else:
                waited = f"not live within {self.policy.ready_timeout_seconds:g} s ({generation.stage.value})"
                self._fail(generation, "readiness", waited)
        retry = self.state.retry
        if retry is not None and retry.at <= self.now and not self.state.stopping:
            self.state = replace(self.state, retry=None)
            if self.state.candidate is None:
                self._launch(retry.tree, retry.trigger)

    def stop_requested(self, _event: StopRequested) -> None:
        self.state = replace(self.state, stopping=True, retry=None)
        if self.state.candidate is not None:
            self.actions.append(
                Report(self.state.candidate.number, "superseded", detail="by the operator's stop")
            )
            self._discard(self.state.candidate)
        if self.state.live is not None:
            self._drain(self.state.live)

    # --- the decisions they share -------------------------------------------------------------------------

    def _candidate(self, number: int) -> Generation | None:
        candidate = self.state.candidate
        return candidate if candidate is not None and candidate.number == number else None

    def _supersede(self, tree: str) -> None:
        """Discard a candidate of another tree; one of this tree is on its way and stays."""
        candidate = self.state.candidate
        if candidate is not None and candidate.tree != tree:
            self.actions.append(Report(candidate.number, "superseded", detail=f"by tree {tree[:12]}"))
            self._discard(candidate)

    def _set_candidate(self, candidate: Generation | None) -> None:
        self.state = replace(self.state, candidate=candidate)

    def _launch(self, tree: str, trigger: str) -> None:
        deadline = self.now + self.policy.ready_timeout_seconds
        generation = Generation(self.state.next_number, tree, trigger, Stage.LAUNCHED, self.now, deadline)
        self.state = replace(self.state, candidate=generation, next_number=generation.number + 1, retry=None)
        self.actions.append(Launch(generation))

    def _open_gate(self) -> None:
        """Let a held candidate go if the handover allows it; ``replace`` stops the live child first."""
        candidate = self.state.candidate
        if candidate is None or candidate.stage is not Stage.HELD:
            return
        if not self.policy.overlap:
            if self.state.live is not None:
                self._drain(self.state.live)
            if any(g.was_started for g in self.state.draining):
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
        previous = self.state.live
        watched = self.policy.notify and self.policy.watchdog_seconds > 0
        deadline = self.now + self.policy.watchdog_seconds if watched else None
        live = replace(candidate, stage=Stage.LIVE, since=self.now, deadline=deadline)
        self.state = replace(self.state, live=live, candidate=None, good=live.tree)
        self.actions.append(Report(live.number, "live"))
        if previous is not None:
            self._drain(previous)

    def _fail(self, candidate: Generation, reason: Reason, detail: str) -> None:
        """End a candidate that still has a process."""
        self._discard(candidate)
        self._failed(candidate, reason, detail)

    def _failed(self, candidate: Generation, reason: Reason, detail: str) -> None:
        """Decide what serves now that a candidate did not become live."""
        if self.state.live is not None or self.state.stopping:
            self.actions.append(Report(candidate.number, "rejected", reason, detail))
            return
        if self.state.good is not None and self.state.good != candidate.tree:
            self.actions.append(Report(candidate.number, "rolled_back", reason, detail))
            self._launch(self.state.good, "crash")
            return
        self.actions.append(Report(candidate.number, "rejected", reason, detail))
        self._retry(candidate.tree, candidate.trigger)

    def _live_ended(self, gone: Generation, event: Exited) -> None:
        if self.state.stopping:
            return
        if self.now - gone.since >= self.policy.healthy_seconds:
            self.state = replace(self.state, failures=0)
        cause = gone.killed_for or "crash"
        silence = f"no WATCHDOG=1 for {self.policy.watchdog_seconds:g} s; --watchdog 0 turns this off"
        detail = silence if cause == "hang" else event.error or event.how
        wait = 0.0 if self.state.candidate is not None else self._retry(gone.tree, cause)
        self.actions.append(Restarting(gone.number, cause, detail, wait))

    def _live_mismatched(self, live: Generation, problem: str) -> None:
        """Replace a child that runs other code, once per tree: a second start would not heal it either."""
        if self.state.candidate is not None or self.state.mismatched == live.tree or self.state.stopping:
            return
        self.state = replace(self.state, mismatched=live.tree)
        self.actions.append(Restarting(live.number, "mismatch", problem, 0.0))
        self._launch(live.tree, "mismatch")

    def _retry(self, tree: str, trigger: str) -> float:
        """Note a start for later and return how long it waits."""
        grown = self.policy.backoff_first_seconds * 2.0 ** min(self.state.failures, 32)
        wait = min(grown, self.policy.backoff_cap_seconds) * self.policy.jitter()
        retry = Retry(self.now + wait, tree, trigger)
        self.state = replace(self.state, retry=retry, failures=self.state.failures + 1)
        return wait

    def _drain(self, generation: Generation) -> None:
        """Ask a generation to stop; it may finish its work until the drain deadline."""
        deadline = self.now + self.policy.stop_timeout_seconds
        self._forget(generation)
        draining = replace(generation, stage=Stage.DRAINING, since=self.now, deadline=deadline)
        self.state = replace(self.state, draining=(*self.state.draining, draining))
        self.actions.append(Terminate(generation.number))

    def _discard(self, candidate: Generation) -> None:
        """Stop a candidate: at once while it waits at its gate, with a drain once it may be at work."""
        self._drain(candidate)
        if not candidate.was_started:
            self.actions[-1] = Kill(candidate.number)

    def _kill(self, live: Generation, cause: str) -> None:
        """Kill the live child for a cause; what follows is decided when it is gone."""
        self.state = replace(self.state, live=replace(live, deadline=None, killed_for=cause))
        self.actions.append(Kill(live.number))

    def _forget(self, generation: Generation) -> None:
        state = self.state
        self.state = replace(
            state,
            live=None if state.live is not None and state.live.number == generation.number else state.live,
            candidate=None if self._candidate(generation.number) else state.candidate,
            draining=tuple(g for g in state.draining if g.number != generation.number),
        )

    def _replace_draining(self, generation: Generation) -> None:
        draining = tuple(generation if g.number == generation.number else g for g in self.state.draining)
        self.state = replace(self.state, draining=draining)


def step(policy: Policy, state: State, event: Event, now: float) -> tuple[State, Sequence[Action]]:
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
        case TreeUnchanged():
            work.tree_unchanged(event)
        case Imported():
            work.imported(event)
        case Attested():
            work.attested(event)
        case Ready():
            work.ready(event)
        case Beat():
            work.beat(event)
        case Exited():
            work.exited(event)
        case Tick():
            work.tick(event)
        case StopRequested():
            work.stop_requested(event)
    return work.state, work.actions
