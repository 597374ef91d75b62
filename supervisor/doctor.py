"""Doctor: what is wrong with a service, or would be if it were started, and what to do about each.

The rule: **every finding has a remedy, and nothing is changed.** A look never ends the others; what cannot be
looked at (no systemd, another user's files) is said and counts as neither good nor bad. ``wrong`` is what
keeps a promise from being kept, ``warning`` what an operator should know and may have wanted; only the first
makes the exit code 1. Where a supervisor answers, its own findings go before ours: what works is not doubted.

What the service itself needs (of the monitor: bridge, map, database) this package knows nothing about. The
unit names a command that does, ``Check=`` in its section ``X-Supervisor``, which is run as the service's user
with its variables, and prints ``{"findings": [{"check", "state", "detail", "remedy"}]}``.

No value of a variable is ever shown, and what another command says has its passwords taken out.

Rejected: importing the service's code to ask it (it would run as root, in our process), a monitor that is
asked over HTTP (what does not start answers nothing), a plain list of commands in the documentation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from supervisor import installation, subject
from supervisor.errors import SupervisorError
from supervisor.finding import Look, State, run, split
from supervisor.installation import Scope
from supervisor.looks import LOOKS
from supervisor.masking import mask
from supervisor.settings import runtime_dir
from supervisor.subject import Account, Subject

_CHECK_SECONDS = 60.0


@dataclass(frozen=True)
class Finding:
    """What was found about one thing.

    Attributes:
        unit: which service.
        check: the thing.
        state: ``ok``, ``warning``, ``wrong``, or ``skipped`` where it could not be looked at.
        detail: one sentence about what is.
        remedy: one about what to do; None where there is nothing.
    """

    unit: str
    check: str
    state: State
    detail: str
    remedy: str | None = None


def examine(instance: str | None, scope: Scope, directory: Path | None) -> dict[str, Any]:
    """Examine services and return the document of ``doctor --json``.

    Args:
        instance: of the unit to examine; None for every one that is installed.
        scope: where units are.
        directory: the runtime directory of a supervisor to examine in place of a unit.

    Raises:
        UsageError: the instance cannot be called so.
    """
    findings: list[Finding] = []
    subjects = list(_subjects(instance, scope, directory, findings))
    for one in subjects:
        for check, look in LOOKS:
            findings += _looked(one, check, look)
        findings += _offered(one)
    findings += _shared(subjects)
    failed = any(finding.state == "wrong" for finding in findings)
    return {"failed": failed, "findings": [asdict(finding) for finding in findings]}


def _subjects(
    instance: str | None, scope: Scope, directory: Path | None, findings: list[Finding]
) -> Iterator[Subject]:
    """Yield what there is to examine; what is not there is a finding."""
    wanted = [installation.unit_name(instance)] if instance is not None else subject.installed(scope)
    if directory is None and wanted:
        for name in wanted:
            try:
                yield subject.of_unit(name, scope)
            except (SupervisorError, OSError, ValueError) as error:
                findings.append(Finding(name, "unit", "wrong", *split(error)))
        return
    try:
        running = subject.of_process(directory or runtime_dir(None), scope)
        if running is not None:
            detail = "no unit started this supervisor: nothing starts it again after a crash or a reboot"
            findings.append(Finding(running.name, "unit", "skipped", detail))
            yield running
            return
        planned = subject.of_environment(scope)
    except (SupervisorError, OSError) as error:
        findings.append(Finding("this environment", "unit", "wrong", *split(error)))
        return
    detail = f"none is installed in {scope.folder}; the rest is about what would be installed from here"
    remedy = f"wa-supervisor install-unit{' --user' if scope.of_user else ''}"
    findings.append(Finding(planned.name, "unit", "wrong", detail, remedy))
    yield planned


def _looked(one: Subject, check: str, look: Look) -> Iterator[Finding]:
    """Yield what one look finds; what it fails by is a finding."""
    try:
        for state, detail, remedy in look(one):
            yield Finding(one.name, check, state, mask(detail), mask(remedy) if remedy else None)
    except (SupervisorError, OSError, ValueError) as error:
        yield Finding(one.name, check, "wrong", *split(error))


# --- what the service itself needs ------------------------------------------------------------------------


def _offered(one: Subject) -> Iterator[Finding]:
    """Run the command that the unit names, and pass on what it finds."""
    if not one.offered:
        yield Finding(one.name, "check", "skipped", "the unit names no Check= for what the service needs")
        return
    if one.account is None:
        yield Finding(one.name, "check", "skipped", "not asked: the service's user does not exist")
        return
    if not one.account.can_be_taken:
        detail = f"what {one.account.name} may do is for root to find out"
        yield Finding(one.name, "check", "skipped", detail)
        return
    shown = " ".join(one.offered)
    try:
        with _credentials(one, one.account) as credentials:
            variables = {"PATH": os.defpath, "HOME": one.account.home, **one.variables, **credentials}
            said = run(one.offered, one.account, variables, one.folder, _CHECK_SECONDS)
        found = json.loads(said.stdout)["findings"]
        for each in found:
            remedy = each["remedy"]
            detail = mask(str(each["detail"]))
            yield Finding(
                one.name,
                str(each["check"]),
                _state(each["state"]),
                detail,
                mask(str(remedy)) if remedy else None,
            )
    except (OSError, ValueError, KeyError, TypeError, subprocess.SubprocessError) as error:
        why = (
            f"it took longer than {_CHECK_SECONDS:g} s"
            if isinstance(error, subprocess.TimeoutExpired)
            else ""
        )
        why = why or (error.strerror or "" if isinstance(error, OSError) else "it gave no answer")
        remedy = f"run it as {one.account.name} in {one.folder}, or correct Check="
        yield Finding(one.name, "check", "wrong", f"{shown} cannot be asked: {why}", remedy)


def _state(word: object) -> State:
    known: dict[object, State] = {"ok": "ok", "warning": "warning", "skipped": "skipped"}
    return known.get(word, "wrong")


@contextmanager
def _credentials(one: Subject, account: Account) -> Iterator[dict[str, str]]:
    """Show a command the credentials that the unit loads, for as long as it runs."""
    standing = Path("/run/credentials", one.name)
    if standing.is_dir():
        yield {"CREDENTIALS_DIRECTORY": str(standing)}
        return
    loaded = [word.partition(":") for word in (one.unit.words("LoadCredential") if one.unit else ())]
    if not loaded:
        yield {}
        return
    memory = Path("/dev/shm")  # noqa: S108 -- no disk keeps what is written there
    with tempfile.TemporaryDirectory(prefix="wa-doctor-", dir=memory if memory.is_dir() else None) as folder:
        for name, _, source in loaded:
            path = one.scope.below(source)
            if path.is_file():
                shutil.copyfile(path, Path(folder, name))
                os.chown(Path(folder, name), account.uid, -1)
                Path(folder, name).chmod(0o400)
        os.chown(folder, account.uid, -1)
        yield {"CREDENTIALS_DIRECTORY": folder}


def _shared(subjects: Sequence[Subject]) -> Iterator[Finding]:
    """Yield what two services want for themselves."""
    for number, one in enumerate(subjects):
        for other in subjects[number + 1 :]:
            mine, theirs = one.settings, other.settings
            if mine is None or theirs is None:
                continue
            if mine.listen == theirs.listen and mine.listen[1] != 0:
                detail = f"{other.name} listens on port {mine.listen[1]} as well"
                remedy = f"give one of them another {installation.LISTEN_VARIABLE}="
                yield Finding(one.name, "port", "wrong", detail, remedy)
            if mine.state_dir == theirs.state_dir:
                detail = f"{other.name} uses the state directory {mine.state_dir} as well"
                yield Finding(one.name, "permissions", "wrong", detail, "give one another StateDirectory=")
