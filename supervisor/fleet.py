"""Fleet: the processes behind the generations; carries out what was decided and reports what happened.

The rule: it decides nothing. An action of the lifecycle becomes a process, a signal or a frame; a frame, a
datagram or an exit becomes an event of the lifecycle. The numbers of generations are the only thing both
sides speak of.

One reaper: nobody else in the supervisor waits for a child.
"""

from __future__ import annotations

import secrets
import selectors
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor import launch, lifecycle, verify
from supervisor.launch import Child, LaunchRequest
from supervisor.manifest import Manifest
from supervisor.notify import Datagram
from supervisor.settings import Target

_USEC = 1_000_000
_LONGEST_USEC_DIGITS = 15


@dataclass
class Running:
    """A generation's process and what is known of it.

    Attributes:
        nonce: of the last request for attestation that is not answered.
        asked_at: monotonic time of the oldest request since the last answer, None if all are answered.
        mute: it closed its end of the channel and lives on: nothing can be learnt from it any more.
        verdict: of its last attestation, None before the first.
        commit: that the tree stood at when it was started, where git knows it.
        status: what it said of itself (STATUS=).
    """

    number: int
    manifest: Manifest
    child: Child
    started_wall_seconds: float
    commit: str | None = None
    nonce: str | None = None
    verdict: verify.Verdict | None = None
    asked_at: float | None = None
    mute: bool = False
    status: str = ""
    failure: Mapping[str, Any] = field(default_factory=dict)


class Fleet:
    """All processes of generations.

    Args:
        target: what each runs.
        blobs: directory of the pinned sources.
        selector: the main loop's.
        environment: returns a generation's environment, from its number and its tree digest.
        disk: returns what is on disk now, for comparison.
        prints: returns the prints of the code that each source has, by its sha256.
        happened: takes an event of the lifecycle.
        metrics: takes the number of a generation and the families that it sent.
        suspected: takes the number of a generation and what made it suspicious (``X_SUSPECT=``).
    """

    def __init__(
        self,
        *,
        target: Target,
        blobs: Path,
        selector: selectors.BaseSelector,
        environment: Callable[[int, str], Mapping[str, str]],
        disk: Callable[[], Manifest | None],
        prints: Callable[[], Mapping[str, Mapping[str, str]]],
        happened: Callable[[lifecycle.Event], None],
        metrics: Callable[[int, list[Mapping[str, Any]]], None],
        suspected: Callable[[int, str], None],
    ) -> None:
        self._target = target
        self._blobs = blobs
        self._selector = selector
        self._environment = environment
        self._disk = disk
        self._prints = prints
        self._happened = happened
        self._metrics = metrics
        self._suspected = suspected
        # By its name: the folder may be removed and made anew, and ours would be the removed one.
        self._directory = Path.cwd()
        self._running: dict[int, Running] = {}

    def get(self, number: int | None) -> Running | None:
        """Return a generation that has a process."""
        return self._running.get(number) if number is not None else None

    @property
    def manifests(self) -> list[Manifest]:
        """What the processes were started from."""
        return [running.manifest for running in self._running.values()]

    # --- actions ------------------------------------------------------------------------------------------

    def launch(self, number: int, manifest: Manifest, manifest_file: Path, commit: str | None = None) -> None:
        """Start a process; raises OSError if there can be none."""
        request = LaunchRequest(
            generation=number,
            tree=manifest.digest,
            manifest=manifest_file,
            blobs=self._blobs,
            target=self._target,
            environment=self._environment(number, manifest.digest),
            directory=self._directory,
        )
        child = launch.launch(request)
        running = Running(number, manifest, child, time.time(), commit)
        self._running[number] = running
        self._selector.register(child.channel, selectors.EVENT_READ, lambda: self._readable(running))

    def attest(self, number: int) -> None:
        """Ask for an attestation; a newer request makes an older one's answer void."""
        running = self._running.get(number)
        if running is not None:
            running.nonce = secrets.token_hex(16)
            if running.asked_at is None:
                running.asked_at = time.monotonic()
            running.child.send({"type": "attest", "nonce": running.nonce})

    def go(self, number: int) -> None:
        """Let the application start."""
        running = self._running.get(number)
        if running is not None:
            running.child.send({"type": "go"})

    def terminate(self, number: int) -> None:
        """Send SIGTERM."""
        running = self._running.get(number)
        if running is not None:
            running.child.terminate()

    def kill(self, number: int) -> None:
        """Send SIGKILL to the process and its group."""
        running = self._running.get(number)
        if running is not None:
            running.child.kill_group()

    # --- events -------------------------------------------------------------------------------------------

    def reap(self) -> None:
        """Collect those that have ended."""
        for running in list(self._running.values()):
            if not running.child.ended:
                continue
            self._drain_channel(running)
            how = launch.reap(running.child)
            del self._running[running.number]
            failure = running.failure
            error = failure.get("error")
            self._happened(
                lifecycle.Exited(
                    running.number,
                    how,
                    str(error) if error else None,
                    importing=bool(failure.get("importing")),
                )
            )

    def datagram(self, message: Datagram) -> None:
        """Take a message of sd_notify; only a generation's own main process is heard."""
        for running in list(self._running.values()):
            if message.pid in {running.child.pid, None}:
                self._notified(running, message.fields)

    def _notified(self, running: Running, fields: Mapping[str, str]) -> None:
        running.status = fields.get("STATUS", running.status)
        if fields.get("READY") == "1":
            self._happened(lifecycle.Ready(running.number))
        extend = _seconds(fields.get("EXTEND_TIMEOUT_USEC", ""))
        if fields.get("WATCHDOG") == "1" or extend:
            self._happened(lifecycle.Beat(running.number, extend))
        if "X_SUSPECT" in fields:
            self._suspected(running.number, fields["X_SUSPECT"])

    def _readable(self, running: Running) -> None:
        try:
            frames = running.child.receive()
        except EOFError:
            running.mute = True
            self._unregister(running)
            return
        for frame in frames:
            self._frame(running, frame)

    def _drain_channel(self, running: Running) -> None:
        """Take the last words of a process that has ended: its error and its final totals."""
        try:
            while frames := running.child.receive():
                for frame in frames:
                    self._frame(running, frame)
        except EOFError:
            pass  # All has been said.
        self._unregister(running)

    def _unregister(self, running: Running) -> None:
        if running.child.channel in self._selector.get_map():
            self._selector.unregister(running.child.channel)

    def _frame(self, running: Running, frame: Mapping[str, Any]) -> None:
        match frame.get("type"):
            case "imported":
                self._happened(lifecycle.Imported(running.number))
            case "attestation":
                self._attested(running, frame)
            case "metrics" if isinstance(frame.get("families"), list):
                self._metrics(running.number, frame["families"])
            case "failed":
                running.failure = frame

    def _attested(self, running: Running, frame: Mapping[str, Any]) -> None:
        if running.nonce is None or frame.get("nonce") != running.nonce:
            return  # Not the answer to what was asked last.
        running.nonce = running.asked_at = None
        try:
            attestation = verify.parse(frame)
        except verify.AttestationError as error:
            self._happened(lifecycle.Attested(running.number, str(error)))
            return
        disk = self._disk() or running.manifest
        verdict = verify.compare(running.manifest, disk, attestation, self._prints())
        running.verdict = verdict
        self._happened(lifecycle.Attested(running.number, verdict.problem, importing=attestation.importing))


def _seconds(usec: str) -> float:
    """Return the seconds that a field of sd_notify names in microseconds; 0 for what is no such number."""
    return int(usec) / _USEC if usec.isdecimal() and len(usec) <= _LONGEST_USEC_DIGITS else 0.0
