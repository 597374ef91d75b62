"""Commands: what an operator asks over the control socket, and the answer.

The rule: a question is answered at once from what is known; a wish becomes an event and is answered when it
has an outcome. A command that cannot be carried out is answered with one sentence that says why; it changes
nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from msgspec import Struct

from supervisor.blobs import BlobStore
from supervisor.checkout import Checkout
from supervisor.control import Client
from supervisor.errors import BlobError, SupervisorError, UsageError
from supervisor.events import (
    Event,
    PauseRequested,
    RestartRequested,
    ResumeRequested,
    RollbackRequested,
    StopRequested,
)
from supervisor.fleet import Fleet, Running
from supervisor.history import History
from supervisor.lifecycle import State
from supervisor.pipeline import Pipeline
from supervisor.reload import Reload
from supervisor.status import ANSWER_SECONDS, verify_document

log = logging.getLogger("wa-supervisor")

_HISTORY_SHOWN = 20

Request = Mapping[str, Any]


class Desk(Protocol):
    """What the commands need of the supervisor's one loop."""

    @property
    def state(self) -> State:
        """What has been decided."""

    @property
    def live(self) -> Running | None:
        """The process of the generation that serves."""

    def happened(self, event: Event, reload: Reload | None = None) -> None:
        """Take an event and the reload that it belongs to."""

    def ask_reload(self, trigger: str, uid: int | None, on_finish: Callable[[Reload], None]) -> None:
        """Read the settings and the whole tree again and reload; raises UsageError for bad settings."""

    def ask_reexec(self, client: Client) -> None:
        """Have this program replaced by the one on disk; raises SupervisorError if that cannot be."""

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Call back after a time."""

    def status(self) -> Mapping[str, Any]:
        """Return the status document of this moment."""

    def operator(self, what: str, uid: int | None) -> None:
        """Note for the record what an operator did."""


class _Verification(Struct, frozen=True):
    """A command that waits for an attestation of one generation."""

    client: Client
    number: int
    began_at: float


class Commands:
    """Carries out the commands.

    Args:
        desk: the loop.
        fleet: the processes.
        pipeline: what is on disk.
        blobs: the pinned sources.
        checkout: git's view of the tree.
        history: of what has happened.
        output_log: the file of the children's last lines.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        fleet: Fleet,
        pipeline: Pipeline,
        blobs: BlobStore,
        checkout: Checkout,
        history: History,
        output_log: Path,
    ) -> None:
        self._desk = desk
        self._fleet = fleet
        self._pipeline = pipeline
        self._blobs = blobs
        self._checkout = checkout
        self._history = history
        self._output_log = output_log
        self._verifications: list[_Verification] = []
        self._stopping: list[Client] = []
        self._commands: Mapping[str, Callable[[Client, Request], None]] = {
            "status": self._status,
            "reload": self._reload,
            "restart": self._restart,
            "rollback": self._rollback,
            "pause": self._pause,
            "resume": self._resume,
            "stop": self._stop,
            "verify": self._verify,
            "diff": self._diff,
            "history": self._tell_history,
            "logs": self._logs,
            "reexec": self._reexec,
        }

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an attestation."""
        return bool(self._verifications)

    def handle(self, client: Client, request: Request) -> None:
        """Carry out one request."""
        name = request.get("command")
        command = self._commands.get(name) if isinstance(name, str) else None
        if command is None:
            refuse(client, f"there is no command {name!r}")
        else:
            command(client, request)

    def close(self) -> None:
        """Tell those who wait for the stop that it is done, and the others that nothing comes any more."""
        for waiting in self._verifications:
            refuse(waiting.client, "the supervisor stops")
        for client in self._stopping:
            client.answer({"ok": True})

    # --- wishes -------------------------------------------------------------------------------------------

    def _reload(self, client: Client, _request: Request) -> None:
        try:
            self._desk.ask_reload("cli", client.uid, _answer_with(client))
        except UsageError as error:
            refuse(client, str(error))

    def _restart(self, client: Client, _request: Request) -> None:
        state = self._desk.state
        if not state.all and state.retry is None:
            refuse(client, "nothing runs that could be started again")
            return
        self._desk.happened(RestartRequested(), self._asked_for(client))

    def _rollback(self, client: Client, _request: Request) -> None:
        target = self._desk.state.earlier_good
        if target is None:
            refuse(client, "no tree before this one has served its probation")
            return
        reload = self._asked_for(client)
        reload.tree, reload.rollback = target, True
        self._pipeline.give_up("by the operator's rollback")
        # What has a problem does not come back by itself, and the problem is what people want to know.
        disk = self._pipeline.disk if self._pipeline.problem is None else None
        event = RollbackRequested(f"rolled back by {_who(client.uid)}", disk.digest if disk else None)
        self._desk.happened(event, reload)

    def _asked_for(self, client: Client) -> Reload:
        reload = Reload("cli", time.monotonic(), uid=client.uid)
        reload.on_finish.append(_answer_with(client))
        return reload

    def _pause(self, client: Client, _request: Request) -> None:
        self._pipeline.paused = True
        self._desk.happened(PauseRequested())
        self._note("pause", client)
        client.answer({"ok": True})

    def _resume(self, client: Client, _request: Request) -> None:
        self._desk.happened(ResumeRequested())
        self._pipeline.resume(time.monotonic())
        self._note("resume", client)
        client.answer({"ok": True})

    def _stop(self, client: Client, _request: Request) -> None:
        self._note("stop", client)
        self._stopping.append(client)
        self._desk.happened(StopRequested())

    def _note(self, what: str, client: Client) -> None:
        log.info("%s, by command of %s", what, _who(client.uid))
        self._desk.operator(what, client.uid)

    def _reexec(self, client: Client, _request: Request) -> None:
        try:
            self._desk.ask_reexec(client)
        except SupervisorError as error:
            refuse(client, str(error))

    # --- questions ----------------------------------------------------------------------------------------

    def _status(self, client: Client, _request: Request) -> None:
        client.answer({"ok": True, "status": dict(self._desk.status())})

    def _tell_history(self, client: Client, request: Request) -> None:
        count = request.get("count", _HISTORY_SHOWN)
        if not isinstance(count, int) or count < 1:
            refuse(client, f"{count!r} is no number of records")
            return
        client.answer({"ok": True, "history": [record.as_json() for record in self._history.last(count)]})

    def _logs(self, client: Client, _request: Request) -> None:
        client.answer({"ok": True, "file": str(self._output_log)})

    def _verify(self, client: Client, _request: Request) -> None:
        """Read the whole disk again and ask the live child; its attestation or the deadline answers."""
        live, now = self._desk.live, time.monotonic()
        if live is None:
            self._nothing_live(client)
            return
        self._pipeline.scan(now, whole=True)
        waiting = _Verification(client, live.number, now)
        self._verifications.append(waiting)
        self._desk.later(ANSWER_SECONDS, lambda: self._expired(waiting))
        self._fleet.attest(live.number)

    def attested(self, number: int) -> None:
        """Answer those who wait for an attestation of this generation."""
        running, disk = self._fleet.get(number), self._pipeline.disk
        if running is None or running.verdict is None:
            return  # No answer is not a verdict; the deadline speaks.
        for waiting in [v for v in self._verifications if v.number == number]:
            self._verifications.remove(waiting)
            document = verify_document(
                running.verdict,
                same_tree=disk is not None and disk.digest == running.manifest.digest,
                duration_seconds=time.monotonic() - waiting.began_at,
            )
            waiting.client.answer({"ok": True, "verify": document})

    def _expired(self, waiting: _Verification) -> None:
        if waiting in self._verifications:
            self._verifications.remove(waiting)
            refuse(waiting.client, f"generation {waiting.number} did not answer within {ANSWER_SECONDS:g} s")

    def _diff(self, client: Client, _request: Request) -> None:
        """Answer with the text of every source that differs between the live generation and the disk."""
        live = self._desk.live
        if live is None:
            self._nothing_live(client)
            return
        self._pipeline.scan(time.monotonic(), whole=True)
        disk = self._pipeline.disk
        if disk is None:
            refuse(client, str(self._pipeline.problem))
            return
        try:
            files = [
                {
                    "path": path,
                    "running": self._text(live.manifest.sources.get(path)),
                    "disk": self._text(disk.sources.get(path)),
                }
                for path in live.manifest.changes(disk)
            ]
        except BlobError as error:
            refuse(client, str(error))
            return
        head = self._checkout.head()
        document = {
            "generation": live.number,
            "running_commit": self._checkout.head_of(live.manifest.digest).commit,
            "disk_commit": head.commit if head else None,
            "files": files,
        }
        client.answer({"ok": True, "diff": document})

    def _text(self, digest: str | None) -> str | None:
        return self._blobs.get(digest).decode("utf-8", "backslashreplace") if digest is not None else None

    def _nothing_live(self, client: Client) -> None:
        refuse(client, f"no generation is live: {self._desk.status()['reason']}")


def refuse(client: Client, why: str) -> None:
    """Answer that a command cannot be carried out."""
    client.answer({"ok": False, "error": why})


def _answer_with(client: Client) -> Callable[[Reload], None]:
    return lambda reload: client.answer({"ok": True, "reload": reload.as_json()})


def _who(uid: int | None) -> str:
    return f"uid {uid}" if uid is not None else "an operator"
