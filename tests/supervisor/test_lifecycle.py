"""Decisions about generations, under a clock that only the tests move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supervisor import health
from supervisor.events import (
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
from supervisor.lifecycle import LAST_WORDS_SECONDS, Fault, Policy, Stage, State, step

REPLACE = Policy(overlap=False, notify=False, watchdog_seconds=0)
OVERLAP = Policy(overlap=True, notify=True)


class Run:
    """A state and its clock; ``happens`` feeds an event and returns the actions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.state = State()
        self.now = 100.0

    def happens(self, event: Event, after: float = 0.0) -> list[Action]:
        self.now += after
        self.state, actions = step(self.policy, self.state, event, self.now)
        return list(actions)

    def goes_live(self, tree: str, trigger: str = "watch") -> int:
        """Take a tree all the way; return the number of its generation."""
        self.happens(TreeReady(tree, trigger))
        return self.candidate_goes_live()

    def candidate_goes_live(self) -> int:
        """Take the candidate there is all the way; return the number of its generation."""
        assert self.state.candidate is not None
        number = self.state.candidate.number
        self.happens(Imported(number))
        self.happens(Attested(number, None))
        for old in self.state.draining:
            self.happens(Exited(old.number, "exit status 0"))
        if self.policy.notify:
            self.happens(Ready(number))
        self.happens(Attested(number, None))
        assert self.state.live is not None
        assert self.state.live.number == number
        return number

    def becomes_known_good(self, tree: str) -> int:
        """Take a tree all the way and through its probation; return the number of its generation."""
        number = self.goes_live(tree)
        beats = int(self.policy.probation_seconds // 10)
        for _ in range(beats):
            self.happens(Beat(number), after=10)
        assert Attest(number) in self.happens(Tick())
        self.happens(Attested(number, None))
        self.happens(Beat(number))
        assert self.state.known_good[0] == tree
        return number


def reports(actions: Sequence[Action]) -> list[tuple[str, str | None]]:
    return [(action.outcome, action.reason) for action in actions if isinstance(action, Report)]


def launched(actions: Sequence[Action]) -> list[str]:
    return [action.tree for action in actions if isinstance(action, Launch)]


def test_first_start_goes_through_every_gate() -> None:
    run = Run(OVERLAP)
    assert launched(run.happens(TreeReady("a", "start"))) == ["a"]
    assert run.happens(Imported(1)) == [Attest(1)]
    assert run.happens(Attested(1, None)) == [Go(1)]
    assert run.happens(Ready(1)) == [Attest(1)]
    assert reports(run.happens(Attested(1, None))) == [("live", None)]
    assert run.state.served == "a"
    assert run.state.known_good == ()


def test_simple_service_is_live_once_it_is_attested_at_work() -> None:
    run = Run(REPLACE)
    run.happens(TreeReady("a", "start"))
    run.happens(Imported(1))
    assert run.happens(Attested(1, None)) == [Go(1), Attest(1)]
    again = run.happens(Attested(1, None, importing=True))
    assert [type(action) for action in again] == [Attest]
    assert reports(run.happens(Attested(1, None))) == [("live", None)]


def test_overlap_stops_the_old_one_after_the_new_one_is_live() -> None:
    run = Run(OVERLAP)
    old = run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(2))
    assert run.happens(Attested(2, None)) == [Go(2)]
    run.happens(Ready(2))
    assert run.happens(Attested(2, None)) == [Report(2, "live"), Terminate(old)]


def test_replace_lets_the_new_one_go_when_the_old_one_is_gone() -> None:
    run = Run(REPLACE)
    old = run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(2))
    assert run.happens(Attested(2, None)) == [Terminate(old)]
    assert run.happens(Tick(), after=REPLACE.ready_timeout_seconds + 1)[:1] == [Kill(old)]
    late = Drained(old, "a", "it did not stop in time: signal SIGKILL")
    assert run.happens(Exited(old, "signal SIGKILL")) == [Go(2), Attest(2), late]


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        ([Exited(2, "exit status 1", "ImportError: x", importing=True)], "import"),
        ([Imported(2), Attested(2, "module x runs other bytes")], "attestation"),
        ([Imported(2), Attested(2, None), Ready(2), Attested(2, "patched")], "attestation"),
        ([Imported(2), Attested(2, None), Exited(2, "exit status 1")], "crash"),
        ([Imported(2), Attested(2, None), Exited(2, "x", "ImportError", importing=True)], "import"),
    ],
)
def test_failed_candidate_costs_the_live_one_nothing_in_overlap(events: list[Event], reason: str) -> None:
    run = Run(OVERLAP)
    old = run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    actions = [action for event in events for action in run.happens(event)]
    assert reports(actions) == [("rejected", reason)]
    assert Terminate(old) not in actions
    assert run.state.live is not None
    assert run.state.live.number == old
    assert run.state.candidate is None


def test_candidate_that_is_never_ready_is_rejected_at_its_deadline() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(2))
    run.happens(Attested(2, None))
    run.happens(Beat(1), after=14)
    run.happens(Beat(1), after=14)
    actions = run.happens(Tick(), after=3)
    assert reports(actions) == [("rejected", "readiness")]
    assert Dump(2) in actions
    assert run.happens(Tick(), after=LAST_WORDS_SECONDS) == [Kill(2)]


def test_failure_after_the_old_one_stopped_brings_the_good_tree_back() -> None:
    run = Run(REPLACE)
    old = run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(2))
    run.happens(Attested(2, None))
    run.happens(Exited(old, "exit status 0"))
    actions = run.happens(Exited(2, "exit status 1", "ImportError", importing=True))
    assert reports(actions) == [("rolled_back", "import")]
    assert launched(actions) == ["a"]


def test_newer_tree_supersedes_a_candidate_and_the_same_one_does_not() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    assert run.happens(TreeReady("b", "cli")) == []
    actions = run.happens(TreeReady("c", "watch"))
    assert reports(actions) == [("superseded", None)]
    assert Kill(2) in actions
    assert launched(actions) == ["c"]
    assert reports(run.happens(TreeUnchanged("a"))) == [("superseded", None)]
    assert run.state.candidate is None


def test_backoff_doubles_up_to_the_cap_and_is_reset_by_a_healthy_spell() -> None:
    run = Run(REPLACE)
    number = run.goes_live("a")
    waits = []
    for _ in range(10):
        (restarting,) = run.happens(Exited(number, "signal SIGSEGV"), after=1)
        assert isinstance(restarting, Restarting)
        waits.append(restarting.wait_seconds)
        assert launched(run.happens(Tick(), after=restarting.wait_seconds)) == ["a"]
        number = run.candidate_goes_live()
    assert waits == [0.25, 0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    (restarting,) = run.happens(Exited(number, "exit status 0"), after=REPLACE.healthy_seconds)
    assert isinstance(restarting, Restarting)
    assert restarting.wait_seconds == 0.25


def test_tree_that_fails_before_anything_was_good_is_tried_again() -> None:
    run = Run(REPLACE)
    run.happens(TreeReady("a", "start"))
    assert reports(run.happens(Exited(1, "exit status 1", "ImportError", importing=True))) == [
        ("rejected", "import")
    ]
    assert launched(run.happens(Tick(), after=1)) == ["a"]


def test_silent_live_child_is_killed_as_hung_and_a_beat_prevents_it() -> None:
    run = Run(OVERLAP)
    number = run.goes_live("a")
    run.happens(Beat(number), after=10)
    assert run.happens(Tick(), after=10) == []
    assert run.happens(Tick(), after=5) == [Dump(number)]
    assert run.happens(Beat(number)) == []
    assert run.happens(Tick(), after=LAST_WORDS_SECONDS) == [Kill(number)]
    (restarting,) = run.happens(Exited(number, "signal SIGKILL"))
    assert isinstance(restarting, Restarting)
    assert restarting.cause == "hang"


def test_mismatch_of_the_live_child_replaces_it_once() -> None:
    run = Run(REPLACE)
    number = run.goes_live("a")
    restarting, launch = run.happens(Attested(number, "module x runs other bytes"))
    assert isinstance(restarting, Restarting)
    assert restarting.cause == "mismatch"
    assert isinstance(launch, Launch)
    run.happens(Imported(2))
    run.happens(Attested(2, None))
    run.happens(Exited(number, "exit status 0"))
    run.happens(Attested(2, None))
    assert run.happens(Attested(2, "module x runs other bytes")) == []


def test_more_time_asked_for_by_a_candidate_is_granted() -> None:
    run = Run(OVERLAP)
    run.happens(TreeReady("a", "start"))
    run.happens(Beat(1, extend_seconds=100))
    assert run.happens(Tick(), after=31) == []


def test_stop_beats_everything_and_ends_when_all_are_gone() -> None:
    run = Run(OVERLAP)
    old = run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    actions = run.happens(StopRequested())
    assert reports(actions) == [("superseded", None)]
    assert Terminate(old) in actions
    assert Kill(2) in actions
    assert run.happens(TreeReady("c", "watch")) == []
    run.happens(Exited(2, "signal SIGKILL"))
    assert not run.state.finished
    assert run.happens(Tick(), after=OVERLAP.stop_timeout_seconds) == [Kill(old)]
    run.happens(Exited(old, "signal SIGKILL"))
    assert run.state.finished


def test_crash_on_probation_brings_the_known_good_tree_back_and_quarantines_the_other() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    bad = run.goes_live("b")
    run.happens(Exited(1, "exit status 0"))
    actions = run.happens(Exited(bad, "exit status 7"), after=3)
    assert [type(action) for action in actions] == [Restarting, Report, Launch]
    assert reports(actions) == [("rolled_back", "crash")]
    assert launched(actions) == ["a"]
    run.candidate_goes_live()
    assert run.happens(TreeReady("b", "scan")) == []
    assert run.state.quarantine["b"].detail == "exit status 7"


def test_hang_and_mismatch_on_probation_bring_the_known_good_tree_back() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    run.goes_live("b")
    run.happens(Tick(), after=OVERLAP.watchdog_seconds)
    actions = run.happens(Exited(2, "signal SIGABRT"))
    assert reports(actions) == [("rolled_back", "crash")]
    assert launched(actions) == ["a"]
    run.candidate_goes_live()
    run.goes_live("c")
    actions = run.happens(Attested(4, "function c:f does not run the code of its source"))
    assert reports(actions) == [("rolled_back", "attestation")]
    assert launched(actions) == ["a"]
    assert run.state.live is not None, "what serves goes on until the other one is ready"


def test_known_good_tree_that_crashes_is_started_again_and_not_rolled_back() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    second = run.becomes_known_good("b")
    (restarting,) = run.happens(Exited(second, "signal SIGSEGV"))
    assert isinstance(restarting, Restarting)
    assert launched(run.happens(Tick(), after=1)) == ["b"]


def test_tree_that_served_takes_precedence_over_an_older_known_good_one() -> None:
    run = Run(REPLACE)
    run.becomes_known_good("a")
    run.goes_live("b")
    run.happens(TreeReady("c", "watch"))
    run.happens(Imported(3))
    run.happens(Attested(3, None))
    run.happens(Exited(2, "exit status 0"))
    actions = run.happens(Exited(3, "exit status 1"))
    assert reports(actions) == [("rolled_back", "crash")]
    assert launched(actions) == ["b"]


def test_candidate_of_half_a_change_goes_and_one_that_was_told_to_go_stays() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    run.happens(TreeReady("half", "watch"))
    assert run.happens(TreeLeft("other")) == []
    actions = run.happens(TreeLeft("half"))
    assert reports(actions) == [("superseded", None)]
    assert Kill(2) in actions
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(3))
    run.happens(Attested(3, None))
    assert run.happens(TreeLeft("b")) == [], "it may be at work"
    assert run.state.live is not None


def test_replacement_begins_when_the_old_program_is_over_and_has_left_nothing() -> None:
    run = Run(REPLACE)
    run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    run.happens(Imported(2))
    assert Terminate(1) in run.happens(Attested(2, None))
    assert run.happens(Finished(2)) == [], "it is not the one that is waited for"
    assert Go(2) in run.happens(Finished(1))
    assert [g.number for g in run.state.draining] == [1], "its process is still to end"
    actions = run.happens(Exited(1, "exit status 0"))
    assert not any(isinstance(action, Go) for action in actions), "nobody is told twice"


def test_quarantine_is_lifted_by_another_tree_and_by_the_operator() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    for lift in (TreeSeen("c"), TreeReady("b", "cli")):
        run.happens(TreeReady("b", "watch"))
        run.happens(Exited(run.state.next_number - 1, "exit status 1"))
        assert set(run.state.quarantine) == {"b"}
        run.happens(TreeSeen("b"))
        assert run.happens(TreeReady("b", "scan")) == []
        run.happens(lift)
        assert not run.state.quarantine


def test_broken_tree_at_the_start_runs_what_was_known_good() -> None:
    for event in (TreeRejected(), TreeReady("b", "start")):
        run = Run(REPLACE)
        run.state = State(known_good=("a",), quarantine={"b": Fault("crash", "exit status 7")})
        assert launched(run.happens(event)) == ["a"]
        assert run.happens(TreeRejected()) == []


def test_newest_known_good_trees_are_kept_in_order() -> None:
    run = Run(OVERLAP)
    for tree in "abcda":
        run.becomes_known_good(tree)
    assert run.state.known_good == ("a", "d", "c")


def test_tree_is_not_known_good_without_a_fresh_proof() -> None:
    run = Run(REPLACE)
    number = run.goes_live("a")
    assert run.happens(Attested(number, None), after=29) == []
    assert run.happens(Tick(), after=1) == [Attest(number)]
    assert run.happens(Tick(), after=100) == []
    assert run.happens(Attested(number, None)) == [Promoted(number, "a")]
    assert run.happens(Attested(number, None)) == []


def test_child_that_fell_silent_on_probation_is_not_known_good() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    number = run.goes_live("b")
    run.happens(Beat(number), after=20)
    assert Attest(number) in run.happens(Tick(), after=10)
    assert run.happens(Attested(number, None)) == []
    run.happens(Tick(), after=5)
    assert reports(run.happens(Exited(number, "signal SIGABRT"))) == [("rolled_back", "crash")]


def test_limits_replace_the_child_without_a_storm() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    over = "it uses 9 bytes"
    assert run.happens(Exceeded(1, "memory", over), after=0.1) == []
    restarting, launch = run.happens(Exceeded(1, "memory", over), after=1)
    assert restarting == Restarting(1, "memory", over, 0.0)
    assert launch == Launch(2, "a", "memory")
    assert run.happens(Exceeded(1, "memory", over), after=1) == []
    starts = 0
    for _ in range(600):
        if run.state.candidate is not None:
            run.happens(Exited(run.state.candidate.number, "exit status 1"))
        starts += len(launched(run.happens(Exceeded(1, "memory", over), after=0.1)))
    assert starts < 10
    assert run.state.quarantine == {}


def test_child_that_is_too_old_is_replaced() -> None:
    run = Run(Policy(overlap=True, notify=False, watchdog_seconds=0, max_age_seconds=3600))
    run.becomes_known_good("a")
    assert run.happens(Tick(), after=3500) == []
    restarting, launch = run.happens(Tick(), after=100)
    assert isinstance(restarting, Restarting)
    assert restarting.cause == "age"
    assert launch == Launch(2, "a", "age")


def test_time_in_which_the_supervisor_stood_still_is_nobodys_silence() -> None:
    run = Run(OVERLAP)
    number = run.goes_live("a")
    run.happens(Slept(600.0), after=600)
    assert run.happens(Tick(), after=OVERLAP.watchdog_seconds - 1) == []
    assert Dump(number) in run.happens(Tick(), after=1)


def test_restart_makes_a_new_process_of_what_runs() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    assert run.happens(RestartRequested()) == [Launch(2, "a", "cli")]
    assert run.happens(RestartRequested()) == []
    run.candidate_goes_live()
    run.happens(Exited(2, "exit status 1"))
    assert launched(run.happens(RestartRequested())) == ["a"], "the operator does not wait for the backoff"


def test_changed_settings_make_a_new_process_of_the_same_tree() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    assert launched(run.happens(TreeReady("a", "config", renew=True))) == ["a"]
    actions = run.happens(TreeReady("a", "config", renew=True))
    assert reports(actions) == [("superseded", None)]
    assert launched(actions) == ["a"]


def test_rollback_by_the_operator_goes_to_the_good_tree_before_this_one() -> None:
    run = Run(OVERLAP)
    assert run.happens(RollbackRequested("uid 0")) == []
    run.becomes_known_good("a")
    assert run.state.earlier_good is None
    run.becomes_known_good("b")
    assert launched(run.happens(RollbackRequested("uid 0"))) == ["a"]
    assert run.happens(TreeReady("b", "scan")) == [], "what is on disk does not come back by itself"
    run.candidate_goes_live()
    assert launched(run.happens(RollbackRequested("uid 0"))) == ["b"]


def test_rollback_leads_further_back_each_time() -> None:
    run = Run(OVERLAP)
    for tree in "abc":
        run.becomes_known_good(tree)
    assert launched(run.happens(RollbackRequested("uid 0"))) == ["b"]
    run.candidate_goes_live()
    assert launched(run.happens(RollbackRequested("uid 0"))) == ["a"]


def test_rollback_puts_away_what_is_on_disk_and_on_its_way() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    run.becomes_known_good("b")
    run.happens(TreeReady("c", "watch"))
    actions = run.happens(RollbackRequested("uid 0", disk="c"))
    assert reports(actions) == [("superseded", None)]
    assert launched(actions) == ["a"]
    assert run.happens(TreeReady("c", "scan")) == []
    run.happens(TreeSeen("d"))
    assert launched(run.happens(TreeReady("d", "watch"))) == ["d"]


def test_what_the_operator_put_away_is_the_last_to_run_at_the_next_start() -> None:
    run = Run(OVERLAP)
    run.state = State(known_good=("b", "a"), quarantine={"b": Fault(None, "rolled back")})
    assert launched(run.happens(TreeRejected())) == ["a"]
    run.state = State(known_good=("b",), quarantine={"b": Fault(None, "rolled back")})
    assert launched(run.happens(TreeRejected())) == ["b"]


def test_end_on_probation_does_not_put_away_a_new_process_of_the_same_tree() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    number = run.goes_live("b")
    run.happens(RestartRequested())
    run.happens(Exited(number, "exit status 1"))
    assert not run.state.quarantine
    run.candidate_goes_live()


def test_candidate_that_fails_in_a_pause_after_the_old_one_was_stopped_brings_that_back() -> None:
    run = Run(REPLACE)
    run.becomes_known_good("a")
    old = run.goes_live("b")
    run.happens(TreeReady("c", "watch"))
    new = old + 1
    run.happens(Imported(new))
    run.happens(Attested(new, None))
    run.happens(PauseRequested())
    run.happens(Exited(old, "exit status 0"))
    actions = run.happens(Exited(new, "exit status 1"))
    assert reports(actions) == [("rolled_back", "crash")]
    assert launched(actions) == ["b"]


def test_tree_that_the_machine_could_not_start_is_not_put_away() -> None:
    run = Run(OVERLAP)
    run.happens(TreeReady("a", "watch"))
    assert reports(run.happens(Exited(1, "no process", "no memory", blameless=True))) == [
        ("rejected", "crash")
    ]
    assert launched(run.happens(Tick(), after=1)) == ["a"]
    run.candidate_goes_live()
    run.happens(TreeReady("b", "watch"))
    run.happens(Exited(3, "no process", "no memory", blameless=True))
    assert not run.state.quarantine
    assert launched(run.happens(TreeReady("b", "scan"))) == ["b"]


def test_rollback_while_good_code_is_on_its_way_leads_further_back() -> None:
    run = Run(OVERLAP)
    run.state = State(known_good=("b", "a"))
    assert launched(run.happens(TreeRejected())) == ["b"]
    assert run.state.earlier_good == "a"


def test_rollback_that_fails_does_not_end_with_nothing() -> None:
    run = Run(REPLACE)
    run.becomes_known_good("a")
    run.becomes_known_good("b")
    run.happens(RollbackRequested("uid 0"))
    run.happens(Imported(3))
    run.happens(Attested(3, None))
    run.happens(Exited(2, "exit status 0"))
    actions = run.happens(Exited(3, "exit status 1"))
    assert reports(actions) == [("rolled_back", "crash")]
    assert launched(actions) == ["b"]


def test_pause_keeps_what_runs_running_and_starts_nothing_else() -> None:
    run = Run(OVERLAP)
    run.becomes_known_good("a")
    number = run.goes_live("b")
    run.happens(PauseRequested())
    assert run.happens(TreeReady("c", "watch")) == []
    run.happens(Exited(number, "exit status 7"))
    assert launched(run.happens(Tick(), after=1)) == ["b"]
    assert launched(run.happens(TreeReady("d", "cli"))) == ["d"]
    run.happens(ResumeRequested())
    assert launched(run.happens(TreeReady("c", "watch"))) == ["c"]


def test_pause_takes_back_other_code_that_is_on_its_way() -> None:
    run = Run(OVERLAP)
    run.goes_live("a")
    run.happens(TreeReady("b", "watch"))
    assert reports(run.happens(PauseRequested())) == [("superseded", None)]
    run = Run(OVERLAP)
    run.goes_live("a")
    run.happens(TreeReady("b", "cli"))
    assert run.happens(PauseRequested()) == []


class AnythingCanHappen(RuleBasedStateMachine):
    """Every event at any time, about any generation; the promises hold in every state."""

    policy = OVERLAP

    def __init__(self) -> None:
        super().__init__()
        self.run = Run(self.policy)
        self.alive: set[int] = set()
        self.gone_through: set[int] = set()
        self.finished: set[int] = set()
        self.proven: set[int] = set()
        self.reported: dict[int, int] = {}
        self.stopped = False
        self.tree_of: dict[int, str] = {}
        self.went_live: set[int] = set()
        self.killed: set[int] = set()

    def may_be_launched(self, tree: str, trigger: str) -> bool:
        """Whether a launch is allowed: during a pause what was tried before it, and what he asks for."""
        return not self.run.state.paused or trigger in OPERATOR_TRIGGERS or tree in {*self.tree_of.values()}

    def happens(self, event: Event, after: float = 0.0) -> None:
        for action in self.run.happens(event, after):
            match action:
                case Launch(number, tree, trigger):
                    assert not self.stopped, "launched after the operator's stop"
                    assert self.may_be_launched(tree, trigger), "other code started during a pause"
                    assert number not in self.tree_of, "a number was given twice"
                    self.tree_of[number] = tree
                    self.alive.add(number)
                case Go(number):
                    assert number in self.proven, "told to go without an attestation"
                    mains = self.alive & self.gone_through - self.finished
                    assert self.policy.overlap or not mains, "two mains"
                    self.gone_through.add(number)
                case Kill(number):
                    self.killed.add(number)
                case Report(number, "rolled_back") if number in self.went_live:
                    assert self.run.state.known_good, "rolled back to nothing"
                case Report(number, outcome):
                    if outcome == "live":
                        self.went_live.add(number)
                    self.reported[number] = self.reported.get(number, 0) + 1
                case _:
                    pass

    @rule(
        tree=st.sampled_from("abc"), trigger=st.sampled_from(["watch", "start", "cli"]), renew=st.booleans()
    )
    def tree_changes(self, tree: str, trigger: str, *, renew: bool) -> None:
        self.happens(TreeSeen(tree))
        self.happens(TreeReady(tree, trigger, renew=renew))

    @rule()
    def tree_is_broken(self) -> None:
        self.happens(TreeRejected())

    @rule(
        event=st.sampled_from(
            [
                RestartRequested(),
                RollbackRequested("x"),
                RollbackRequested("x", "b"),
                PauseRequested(),
                ResumeRequested(),
            ]
        )
    )
    def operator_asks(self, event: Event) -> None:
        self.happens(event)

    @rule(data=st.data())
    def live_child_grows(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive) or [0]))
        self.happens(Exceeded(number, "memory", "too much"))

    @rule()
    def supervisor_stands_still(self) -> None:
        self.happens(Slept(100.0), 100.0)

    @rule(tree=st.sampled_from("abc"))
    def tree_goes_on_changing(self, tree: str) -> None:
        self.happens(TreeLeft(tree))

    @rule(tree=st.sampled_from("abc"))
    def tree_returns(self, tree: str) -> None:
        live = self.run.state.live
        self.happens(TreeUnchanged(live.tree if live else tree))

    @rule(data=st.data(), problem=st.sampled_from([None, None, None, "other bytes"]), importing=st.booleans())
    def attested(self, data: st.DataObject, problem: str | None, *, importing: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive) or [0]))
        if problem is None:
            self.proven.add(number)
        self.happens(Attested(number, problem, importing=importing))

    @rule(data=st.data(), kind=st.sampled_from([Imported, Ready, Beat]))
    def speaks(self, data: st.DataObject, kind: Any) -> None:
        self.happens(kind(data.draw(st.sampled_from(sorted(self.alive) or [0]))))

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), importing=st.booleans(), blameless=st.booleans())
    def ends(self, data: st.DataObject, *, importing: bool, blameless: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive)))
        self.alive.discard(number)
        self.happens(Exited(number, "exit status 1", importing=importing, blameless=blameless))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def finishes(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.alive)))
        self.finished |= {g.number for g in self.run.state.draining if g.number == number}
        self.happens(Finished(number))

    @rule(seconds=st.sampled_from([0.1, 1.0, 16.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.happens(Tick(), seconds)

    @precondition(lambda self: self.run.now > 130)
    @rule()
    def operator_stops(self) -> None:
        self.stopped = True
        self.happens(StopRequested())

    def teardown(self) -> None:
        """From wherever that led: once the children behave, something serves, and in bounded time."""
        if self.stopped:
            return
        self.happens(ResumeRequested())
        self.happens(TreeSeen("z"))
        self.happens(TreeReady("z", "watch"))
        began, policy = self.run.now, self.policy
        bound = policy.ready_timeout_seconds + policy.stop_timeout_seconds + policy.backoff_cap_seconds
        while (live := self.run.state.live) is None or live.tree != "z":
            assert self.run.now - began <= bound, f"not in sync: {self.run.state}"
            candidate = self.run.state.candidate
            if candidate is not None and candidate.stage is Stage.LAUNCHED:
                self.happens(Imported(candidate.number))
                self.attest(candidate.number)
            elif candidate is not None and candidate.stage is Stage.STARTED:
                self.happens(Ready(candidate.number))
                self.attest(candidate.number)
            self.happens(Tick(), 1.0)
            self.end_those_that_were_killed()

    def attest(self, number: int) -> None:
        self.proven.add(number)
        self.happens(Attested(number, None))

    def end_those_that_were_killed(self) -> None:
        for number in sorted(self.killed & self.alive):
            self.alive.discard(number)
            self.happens(Exited(number, "signal SIGKILL"))

    @invariant()
    def processes_are_those_of_the_state(self) -> None:
        assert {generation.number for generation in self.run.state.all} == self.alive

    @invariant()
    def live_child_is_proven(self) -> None:
        live = self.run.state.live
        assert live is None or (live.stage is Stage.LIVE and live.number in self.proven)

    @invariant()
    def nothing_waits_for_ever(self) -> None:
        """Whoever is not live has a deadline of its own, was killed, or waits for somebody who has one."""
        state = self.run.state
        candidate = state.candidate
        if candidate is not None and candidate.deadline is None:
            assert candidate.stage is Stage.HELD
            assert state.draining
        if not state.stopping and state.served is not None:
            assert state.live or candidate or state.retry, "a good version exists and nothing is to run it"

    @invariant()
    def service_manager_is_not_called(self) -> None:
        assert health.broken(self.policy, self.run.state, self.alive, self.run.now) is None

    @invariant()
    def quarantined_tree_is_neither_on_its_way_nor_to_be_tried_again(self) -> None:
        state = self.run.state
        starting = {
            state.candidate.tree if state.candidate else None,
            state.retry.tree if state.retry else None,
        }
        assert not starting & state.quarantine.keys()

    @invariant()
    def what_may_have_to_be_started_again_is_named(self) -> None:
        assert {*self.run.state.known_good} <= self.run.state.trees

    @invariant()
    def every_attempt_has_at_most_one_outcome(self) -> None:
        assert all(count == 1 for count in self.reported.values())


class AnythingCanHappenInReplace(AnythingCanHappen):
    """The same without two mains at once."""

    policy = REPLACE


TestOverlap = AnythingCanHappen.TestCase
TestReplace = AnythingCanHappenInReplace.TestCase
TestOverlap.settings = TestReplace.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
