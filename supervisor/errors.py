"""Errors of the supervisor: one base, and each says what happened, what still runs, what the operator does.

The rule: an error that reaches the command line is one sentence naming what, where and what to do, and
carries the exit code of the contract (1 refused or failed, 2 usage, 4 no supervisor answers). Nothing is
raised for a broken *tree* while a child serves: that is an outcome of a reload (``rejected``), not an error
of the supervisor.
"""

from __future__ import annotations


class SupervisorError(Exception):
    """Something the operator has to know; the message is one sentence for a person.

    Attributes:
        exit_code: what the process exits with when this error ends it.
    """

    exit_code = 1


class UsageError(SupervisorError):
    """The command line, the configuration file or TARGET is wrong; nothing was started.

    Correct it and start again.
    """

    exit_code = 2


class AlreadyRunningError(SupervisorError):
    """Another supervisor owns this directory and goes on running; use it, or name another directory."""


class AddressError(SupervisorError):
    """The address to listen on is not to be had; nothing was started.

    Free it or choose another ``--listen``.
    """


class NoSupervisorError(SupervisorError):
    """No supervisor answers in this runtime directory; start one, or name its ``--runtime-dir``."""

    exit_code = 4


class SourceError(SupervisorError):
    """A source of the tree cannot be taken in; the reload is rejected and the live child keeps serving.

    Args:
        path: the file, absolute.
        why: the operating system's reason.
        remedy: what the operator does about it.
    """

    def __init__(
        self, path: str, why: str, remedy: str = "make it readable for the user of the supervisor"
    ) -> None:
        super().__init__(f"cannot read {path}: {why}; {remedy}")
        self.path = path
        self.why = why
        self.remedy = remedy


class BlobError(SupervisorError):
    """Pinned bytes are missing or damaged in the state directory.

    The generation that needs them is not started; what runs goes on.
    """
