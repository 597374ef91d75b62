"""Status: what the supervisor says about itself, as the documents that commands and ``/status.json`` show.

The rule: *in sync* means proven: a live generation, attested, whose manifest is the manifest on disk.
Everything else has a reason in words. Functions of what is passed in; the JSON is a contract.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from typing import Any

from supervisor.fleet import Running
from supervisor.health import NOT_YET
from supervisor.lifecycle import State
from supervisor.manifest import Manifest
from supervisor.reload import Reload
from supervisor.verify import Verdict

ANSWER_SECONDS = 5.0
"""Longest wait for an attestation; after it the last one no longer counts."""


def in_sync_problem(  # noqa: PLR0911 -- one for each reason
    *,
    live: Running | None,
    disk: Manifest | None,
    problem: str | None,
    stopping: bool,
    paused: bool,
    ended: str | None,
    writer: str | None,
    now: float,
) -> str | None:
    """Return why the running code is not, or not provably, the code on disk; None if it is.

    Args:
        live: the generation that serves.
        disk: what is on disk; None if it cannot be read.
        problem: why what is on disk may not run.
        stopping: the operator asked to stop.
        paused: the operator asked for no other code than what runs.
        ended: what became of the last live generation, for as long as there is no other.
        writer: who is in the middle of writing the tree; what was seen of it last no longer counts.
        now: monotonic time.
    """
    if stopping:
        return "stopping"
    if live is None:
        return problem or ended or NOT_YET
    if disk is None:
        return problem or "the tree has not been read yet"
    if writer is not None:
        return f"the tree is being written: {writer}"
    if live.manifest.digest != disk.digest:
        if paused and problem is None:
            return "paused: the tree has changed; `wa-supervisor resume` catches up"
        return problem or "the tree has changed; a reload is on its way"
    if live.verdict is None:
        return "the live generation has not been attested"
    return live.verdict.problem or _silence(live, now)


def _silence(live: Running, now: float) -> str | None:
    """Return why the last proof no longer counts: no answer is no mismatch, and no match either."""
    if live.mute:
        return "the live generation closed its channel: nothing proves its code any more"
    if live.asked_at is not None and now - live.asked_at > ANSWER_SECONDS:
        return f"the live generation has not answered for {now - live.asked_at:.0f} s which code it runs"
    return None


def status_document(
    *,
    pid: int,
    state: State,
    live: Running | None,
    commit: str | None,
    reason: str | None,
    listen: str,
    last_reload: Reload | None,
    restarts: Mapping[str, float],
    watch: Mapping[str, Any],
    git: Mapping[str, Any] | None,
    zygote: Mapping[str, Any],
    busy: bool,
    quarantine: Sequence[Mapping[str, Any]],
    converge_seconds: float,
    problems: Sequence[str],
    bytecode: Mapping[str, Any],
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the document of ``status --json``."""
    candidate = state.candidate
    return {
        "state": _state_word(state, busy=busy),
        "pid": pid,
        "in_sync": reason is None,
        "reason": reason,
        "listen": listen,
        "live": live
        and {
            "generation": live.number,
            "pid": live.child.pid,
            "tree": live.manifest.digest,
            "commit": commit,
            "since": dt.datetime.fromtimestamp(live.started_wall_seconds, dt.UTC).isoformat(
                "T", "milliseconds"
            ),
            "status": live.status,
        },
        "candidate": candidate
        and {"generation": candidate.number, "tree": candidate.tree, "stage": candidate.stage.value},
        "draining": [generation.number for generation in state.draining],
        "last_known_good": next(iter(state.known_good), None),
        "known_good": list(state.known_good),
        "quarantine": [dict(fault) for fault in quarantine],
        "paused": state.paused,
        "converge_seconds": converge_seconds,
        "problems": list(problems),
        "last_reload": last_reload.as_json() if last_reload else None,
        "restarts": {cause: int(count) for cause, count in restarts.items()},
        "watch": dict(watch),
        "git": git,
        "zygote": dict(zygote),
        "bytecode": dict(bytecode),
        "self": dict(own),
    }


def verify_document(verdict: Verdict, *, same_tree: bool, duration_seconds: float) -> dict[str, Any]:
    """Return the document of ``verify --json``.

    Args:
        verdict: of an attestation made for this request.
        same_tree: the tree on disk, read anew, is the one that the generation was started from.
        duration_seconds: from the request to the answer.
    """
    return {
        "in_sync": verdict.attested and verdict.on_disk and same_tree,
        "modules": module_rows(verdict),
        "functions": {"checked": verdict.functions_checked, "foreign": list(verdict.foreign)},
        "duration_seconds": round(duration_seconds, 6),
    }


def module_rows(verdict: Verdict, disk: Manifest | None = None) -> list[dict[str, Any]]:
    """Return a row for each module of a verdict, compared with what is on disk now where that is given."""
    shown = verdict.against(disk) if disk is not None else verdict
    return [
        {
            "name": module.name,
            "path": module.path,
            "disk_sha256": module.disk_sha256,
            "running_sha256": module.running_sha256,
            "state": module.state,
        }
        for module in shown.modules
    ]


def sentence(reload: Reload) -> str:
    """Return one line for the log about a reload that has ended."""
    subject = f"reload ({reload.trigger})"
    what = f"{subject}: {reload.outcome}"
    if reload.reason:
        what += f" ({reload.reason})"
    if reload.detail:
        what += f": {reload.detail}"
    if reload.generation is not None and reload.outcome == "live":
        what += f": generation {reload.generation} runs tree {(reload.tree or '')[:12]}, attested"
    stages = " ".join(f"{stage} {seconds * 1000:.1f}" for stage, seconds in reload.stages.items())
    changed = f", {len(reload.paths)} changed: {', '.join(reload.paths[:3])}" if reload.paths else ""
    return f"{what} [{reload.total_seconds * 1000:.0f} ms: {stages}]{changed}"


def _state_word(state: State, *, busy: bool) -> str:
    if state.stopping:
        return "stopping"
    if state.live is None:
        return "down" if state.served is not None else "starting"
    return "reloading" if busy or state.candidate is not None else "live"
