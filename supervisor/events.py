"""Events: what can happen to generations, and what can be done about it, as values.

The vocabulary between :mod:`supervisor.lifecycle`, which turns the first into the second, and those who
observe and act. One fact a class; nothing here decides.

They are msgspec's frozen structs and not frozen dataclasses, which they are like in all that is used of them:
to make so many dataclasses would be a part of each start that can be felt.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Outcome = Literal["live", "unchanged", "superseded", "rejected", "rolled_back"]
Reason = Literal["syntax", "import", "attestation", "readiness", "crash"]

AUTOMATIC_TRIGGERS = frozenset({"start", "watch", "scan", "suspect"})
"""What asks for a reload without an operator: these stand back behind a pause and a quarantine."""

OPERATOR_TRIGGERS = frozenset({"cli", "signal", "config"})
"""What an operator asks for with a reload."""


# --- events -----------------------------------------------------------------------------------------------


class TreeReady(Struct, frozen=True):
    """A manifest passed its compilation and is to become the running code.

    Attributes:
        tree: its digest.
        trigger: what asked for it.
        renew: a new process is wanted although this tree may be live: its settings have changed.
    """

    tree: str
    trigger: str
    renew: bool = False


class TreeRejected(Struct, frozen=True):
    """What is on disk cannot become a manifest that may run."""


class TreeUnchanged(Struct, frozen=True):
    """The tree on disk is the one that is live."""

    tree: str


class TreeSeen(Struct, frozen=True):
    """The disk holds this tree now."""

    tree: str


class TreeLeft(Struct, frozen=True):
    """The disk has not come to rest at this tree, although a candidate was started from it."""

    tree: str


class Imported(Struct, frozen=True):
    """A child stands at its gate with its imports done."""

    number: int


class Attested(Struct, frozen=True):
    """A child's attestation was compared: ``problem`` is None if it runs what it was started from."""

    number: int
    problem: str | None
    importing: bool = False


class Ready(Struct, frozen=True):
    """A child said READY=1."""

    number: int


class Beat(Struct, frozen=True):
    """A child showed that it works, or asked for more time (``extend_seconds``)."""

    number: int
    extend_seconds: float = 0.0


class Exceeded(Struct, frozen=True):
    """A live child uses more than it may.

    Attributes:
        cause: which limit, a cause of restarts.
        detail: for people.
    """

    number: int
    cause: str
    detail: str


class Finished(Struct, frozen=True):
    """A child's program is over, and it holds nothing that another process could miss or wait for."""

    number: int


class Exited(Struct, frozen=True):
    """A child is gone and reaped, with all that it left behind.

    Attributes:
        how: for people, for example ``exit status 7``.
        error: the exception that ended it, where it told us.
        importing: that exception came from loading code.
        blameless: the machine could not start it just now; nothing is known against its tree.
    """

    number: int
    how: str
    error: str | None = None
    importing: bool = False
    blameless: bool = False


class Tick(Struct, frozen=True):
    """Time has passed."""


class Slept(Struct, frozen=True):
    """The supervisor itself stood still: nobody could be heard, and nobody's silence counts."""

    seconds: float


class RestartRequested(Struct, frozen=True):
    """The operator wants a new process of the code that runs."""


class RollbackRequested(Struct, frozen=True):
    """The operator wants the last good code before the one that runs.

    Attributes:
        detail: who and why.
        disk: the tree on disk, which is to wait for its next change; None while it cannot be read.
    """

    detail: str
    disk: str | None = None


class PauseRequested(Struct, frozen=True):
    """The operator wants no other code to be started until he says so."""


class ResumeRequested(Struct, frozen=True):
    """The operator ends the pause."""


class StopRequested(Struct, frozen=True):
    """The operator wants the service stopped."""


Event = (
    TreeReady
    | TreeRejected
    | TreeUnchanged
    | TreeSeen
    | TreeLeft
    | Imported
    | Attested
    | Ready
    | Beat
    | Exceeded
    | Finished
    | Exited
    | Tick
    | Slept
    | RestartRequested
    | RollbackRequested
    | PauseRequested
    | ResumeRequested
    | StopRequested
)

# --- actions ----------------------------------------------------------------------------------------------


class Launch(Struct, frozen=True):
    """Start a process of this tree under this number.

    Attributes:
        trigger: what it is started for.
    """

    number: int
    tree: str
    trigger: str


class Attest(Struct, frozen=True):
    """Ask a child for an attestation, after a delay."""

    number: int
    delay_seconds: float = 0.0


class Go(Struct, frozen=True):
    """Let a child pass its gate."""

    number: int


class Dump(Struct, frozen=True):
    """Note where a child stands that does not move, and have it write down the stacks of its threads."""

    number: int


class Terminate(Struct, frozen=True):
    """Send SIGTERM to a child."""

    number: int


class Kill(Struct, frozen=True):
    """Send SIGKILL to a child and its process group."""

    number: int


class Report(Struct, frozen=True):
    """The attempt to run a tree has ended: to make this generation live, or to keep it live on probation.

    Attributes:
        trigger: of an end on probation: what became of the live child.
    """

    number: int
    outcome: Outcome
    reason: Reason | None = None
    detail: str | None = None
    trigger: str | None = None


class Restarting(Struct, frozen=True):
    """A child that served is started again, or replaced, because of a fault."""

    number: int
    cause: str
    detail: str
    wait_seconds: float


class Drained(Struct, frozen=True):
    """A child that was asked to stop is gone; ``how`` it ended is for people."""

    number: int
    tree: str
    how: str


class Promoted(Struct, frozen=True):
    """A generation survived its probation: its tree is the last known good one."""

    number: int
    tree: str


Action = Launch | Attest | Go | Dump | Terminate | Kill | Report | Restarting | Drained | Promoted
