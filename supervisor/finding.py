"""Finding: one sentence about what is, and one about what to do; and the tools that several looks use.

The rule: no sentence has a password in it, whoever wrote it (:mod:`supervisor.masking`), and a tool that is
asked is never waited for without end.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from supervisor.masking import mask
from supervisor.subject import Account, Subject

State = Literal["ok", "warning", "wrong", "skipped"]
"""``wrong`` breaks a promise, ``warning`` may be wanted, ``skipped`` could not be looked at."""

Found = tuple[State, str, str | None]
"""What is found: its state, what is, and what to do about it."""

Look = Callable[[Subject], Iterator[Found]]

_TOOL_SECONDS = 20.0


def ok(detail: str) -> Found:
    """Return what is as it should be."""
    return "ok", detail, None


def split(error: Exception) -> tuple[str, str]:
    """Return what is and what to do: a sentence of ours has a semicolon in between."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}", "make it what the service can use"
    what, _, remedy = mask(str(error)).rpartition("; ")
    return (what, remedy) if what else (remedy, "correct what it names")


def run(
    command: Sequence[str],
    account: Account | None = None,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
    seconds: float = _TOOL_SECONDS,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as another user if one is given.

    Raises:
        OSError: it cannot be started.
        subprocess.TimeoutExpired: it took longer.
    """
    return subprocess.run(
        command,
        check=False,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=seconds,
        cwd=folder or "/",
        env=variables,
        **(account.for_a_process() if account is not None else {}),
    )
