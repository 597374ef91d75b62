"""Fleet: the processes behind the generations; carries out what was decided and reports what happened.

The rule: it decides nothing. An action of the lifecycle becomes a process, a signal or a frame; a frame, a
datagram or an exit becomes an event of the lifecycle. The numbers of generations are the only thing both
sides speak of.

One reaper: nobody else in the supervisor waits for a child. That one has ended is told when everything it
left behind is gone as well: the next one may want its port.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import selectors
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from supervisor import ends, events, launch, masking, orphans, processes, verify
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.forerunner import Forerunner
from supervisor.history import Ending
from supervisor.launch import Child, ChildEstate, LaunchRequest
from supervisor.manifest import Manifest
from supervisor.notify import Datagram
from supervisor.output import Output
from supervisor.settings import Target
from supervisor.zygote import Plan, Zygote

log = logging.getLogger("wa-supervisor")

_USEC = 1_000_000
_LONGEST_USEC_DIGITS = 15
_SWEEP_LOOK_SECONDS = 0.02
_ENDINGS_KEPT = 100
_DUMP_BEGINS = "Fatal Python error: Aborted"
_OUTPUT_LINES = 50


class Running(Struct):
    """A generation's process and what is known of it.

    Attributes:
        manifest_file: of its manifest, once it was asked what it has loaded.
        nonce: of the last request for attestation that is not answered.
        asked_at: monotonic time of the oldest request since the last answer, None if all are answered.
        over: its program has ended; what is left is the end of the interpreter.
        mute: it closed its end of the channel and lives on: nothing can be learnt from it any more.
        verdict: of its last attestation, None before the first.
        started_at: monotonic time of its start.
        look: how it looked when it was judged to stand still.
        killed: we sent it SIGKILL ourselves.
        adopted: it was started by an earlier image of the supervisor, and the prints of its code are not
            taken yet: it is asked for an attestation when they are.
        status: what it said of itself (STATUS=).
        identity: what its process can be recognised by later, once that was looked up.
    """

    number: int
    manifest: Manifest
    child: Child
    started_wall_seconds: float
    started_at: float
    nonce: str | None = None
    verdict: verify.Verdict | None = None
    asked_at: float | None = None
    over: bool = False
    mute: bool = False
    status: str = ""
    identity: processes.Identity | None = None
    manifest_file: Path | None = None
    failure: Mapping[str, Any] = field(default_factory=dict)
    look: ends.Look | None = None
    killed: bool = False
    adopted: bool = False


class RunningEstate(Struct, frozen=True):
    """A generation's process as it is left to the next image of the supervisor; see :class:`Running`.

    Attributes:
        seen: keys of those who descend from it, as far as they were met.
    """

    number: int
    manifest: Manifest
    child: ChildEstate
    started_wall_seconds: float
    started_at: float
    over: bool
    mute: bool
    status: str
    failure: Mapping[str, Any]
    killed: bool
    seen: frozenset[tuple[int, int]]


class FleetEstate(Struct, frozen=True):
    """All processes of generations, and the children that are none (:class:`orphans.Lineages`)."""

    running: tuple[RunningEstate, ...] = ()
    bystanders: tuple[int, ...] | None = None

    @property
    def descriptors(self) -> list[int]:
        """What has to stay open."""
        return [number for left in self.running for number in left.child.descriptors]


class Fleet:
    """All processes of generations.

    Args:
        target: what each runs.
        blobs: directory of the pinned sources.
        selector: the main loop's.
        notify_socket: where the processes report to.
        output: takes what they write.
        helpers: returns the pids of other children that somebody waits for.
        environment: returns a generation's environment, from its number and its tree digest.
        disk: returns what is on disk now, for comparison.
        prints: returns the prints of the code that each source has, by its sha256.
        zygote: what processes are forked from, if that can be done.
        happened: takes an event of the lifecycle.
        metrics: takes the number of a generation and the families that it sent; returns whether it could.
        suspected: takes the number of a generation and what made it suspicious (``X_SUSPECT=``).
        estate: what another image of the supervisor has left.
        forerunner: what the first generation becomes, if it can.
    """

    def __init__(
        self,
        *,
        target: Target,
        blobs: Path,
        selector: selectors.BaseSelector,
        notify_socket: Path,
        output: Output,
        helpers: Callable[[], Collection[int]],
        environment: Callable[[int, str], Mapping[str, str]],
        disk: Callable[[], Manifest | None],
        prints: Callable[[], Mapping[str, Mapping[str, str]]],
        zygote: Zygote,
        happened: Callable[[events.Event], None],
        metrics: Callable[[int, list[Mapping[str, Any]]], bool],
        suspected: Callable[[int, str], None],
        estate: FleetEstate | None = None,
        forerunner: Forerunner | None = None,
    ) -> None:
        self._target = target
        self._blobs = blobs
        self._selector = selector
        self._environment = environment
        self._disk = disk
        self._prints = prints
        self._zygote = zygote
        self._forerunner = forerunner
        self._happened = happened
        self._metrics = metrics
        self._suspected = suspected
        estate = estate or FleetEstate()
        self._lineages = orphans.Lineages(notify_socket, estate.bystanders)
        self._output = output
        self._helpers = helpers
        # By its name: the folder may be removed and made anew, and ours would be the removed one.
        self._directory = Path.cwd()
        self._running: dict[int, Running] = {}
        self._endings: dict[int, Ending] = {}
        self._early: list[Datagram] = []
        """What a process has said that has begun and is no generation yet."""
        self._kills = ends.OutOfMemoryKills()
        self._kills_before = self._kills.read()
        for left in estate.running:
            self._adopt(left)

    def _adopt(self, left: RunningEstate) -> None:
        self._lineages.add(left.number, left.child.pid, left.seen)
        self._take_in(
            Running(
                number=left.number,
                manifest=left.manifest,
                child=Child.adopt(left.child),
                started_wall_seconds=left.started_wall_seconds,
                started_at=left.started_at,
                over=left.over,
                mute=left.mute,
                status=left.status,
                failure=left.failure,
                killed=left.killed,
                adopted=True,
            )
        )

    def _take_in(self, running: Running) -> None:
        self._running[running.number] = running
        if not running.mute:
            self._selector.register(
                running.child.channel, selectors.EVENT_READ, lambda: self._readable(running)
            )

    @property
    def estate(self) -> FleetEstate:
        """What is left to the next image of the supervisor."""
        running = tuple(self._left(running) for running in self._running.values())
        return FleetEstate(running, self._lineages.bystanders)

    def let_go(self) -> None:
        """Leave all processes to another image of the supervisor; this object is of no more use."""
        if self._forerunner is not None:
            self._forerunner.close()
        for running in self._running.values():
            self._unregister(running)
            running.child.channel.detach()

    def _left(self, running: Running) -> RunningEstate:
        return RunningEstate(
            number=running.number,
            manifest=running.manifest,
            child=running.child.estate,
            started_wall_seconds=running.started_wall_seconds,
            started_at=running.started_at,
            over=running.over,
            mute=running.mute,
            status=running.status,
            failure=running.failure,
            killed=running.killed,
            seen=self._lineages.seen(running.number),
        )

    def get(self, number: int | None) -> Running | None:
        """Return a generation that has a process."""
        return self._running.get(number) if number is not None else None

    @property
    def numbers(self) -> Collection[int]:
        """Of the generations that have a process."""
        return self._running.keys()

    @property
    def manifests(self) -> list[Manifest]:
        """What the processes were started from."""
        return [running.manifest for running in self._running.values()]

    # --- actions ------------------------------------------------------------------------------------------

    def launch(self, number: int, manifest: Manifest, manifest_file: Path) -> None:
        """Start a process; raises OSError if there can be none."""
        self._early.clear()
        request = self._request(number, manifest, manifest_file)
        with self._output.attach(number) as pipes:
            child = launch.launch(request, pipes.stdout, pipes.stderr, self._zygote, self._forerunner)
        self._add(number, manifest, child)

    def take_begun(self, number: int, manifest: Manifest, manifest_file: Path) -> bool:
        """Take over the process that has begun with just this (:meth:`begin`), if there is one."""
        child = launch.begun(self._request(number, manifest, manifest_file), self._zygote)
        if child is None:
            return False
        self._add(number, manifest, child)
        early, self._early = self._early, []
        for message in early:
            self.datagram(message)
        return True

    def _add(self, number: int, manifest: Manifest, child: Child) -> None:
        self._lineages.add(number, child.pid)
        self._take_in(Running(number, manifest, child, time.time(), time.monotonic()))

    def begin(self, number: int, manifest: Manifest, manifest_file: Path) -> None:
        """Let a process import code that is still being judged; :meth:`take_begun` is for when it is good.

        Args:
            number: that the generation will have.
            manifest: what it will run.
            manifest_file: where it will be on disk.
        """
        if not self._zygote.waits:
            return
        self._early.clear()
        request = self._request(number, manifest, manifest_file)
        with contextlib.suppress(OSError), self._output.attach(number) as pipes:
            if not launch.begin(request, pipes.stdout, pipes.stderr, self._zygote):
                self._output.forget(number)

    def _request(self, number: int, manifest: Manifest, manifest_file: Path) -> LaunchRequest:
        return LaunchRequest(
            generation=number,
            tree=manifest.digest,
            manifest=manifest_file,
            blobs=self._blobs,
            target=self._target,
            environment=self._environment(number, manifest.digest),
            directory=self._directory,
            sources=manifest.sources,
        )

    def prepare(self) -> None:
        """Use the time in which it is found out whether a process is to be started."""
        self._zygote.prepare(str(self._directory or Path.cwd()))

    def attest(self, number: int) -> None:
        """Ask for an attestation; a newer request makes an older one's answer void."""
        running = self._running.get(number)
        if running is not None:
            if running.asked_at is None:
                running.asked_at = time.monotonic()
            if running.adopted:
                return
            running.nonce = secrets.token_hex(16)
            running.child.send({"type": "attest", "nonce": running.nonce})

    def judged(self, number: int) -> None:
        """Note that the code of an adopted generation can be compared now, and compare it."""
        running = self._running.get(number)
        if running is not None:
            running.adopted = False
            self.attest(number)

    def ask_for_modules(self, number: int, manifest: Path) -> None:
        """Ask what it has loaded, for the zygote; its manifest is in a file."""
        running = self._running.get(number)
        if running is not None:
            running.manifest_file = manifest
            running.child.send({"type": "modules"})

    def ask_for_metrics(self, number: int) -> None:
        """Ask for its metrics as they are now."""
        running = self._running.get(number)
        if running is not None:
            running.child.send({"type": "metrics"})

    def go(self, number: int) -> None:
        """Let the application start."""
        running = self._running.get(number)
        if running is not None:
            running.child.send({"type": "go"})

    def dump(self, number: int) -> None:
        """Note where a process stands and have it write down its stacks; one that was stopped is killed.

        A stopped process could write nothing before it is continued, and then it would resume its work.
        """
        running = self._running.get(number)
        if running is None:
            return
        running.look = ends.look(running.child.pid)
        if running.look is not None and running.look.stopped:
            self.kill(number)
        else:
            self._lineages.look(number)
            running.child.abort()

    def terminate(self, number: int) -> None:
        """Send SIGTERM."""
        running = self._running.get(number)
        if running is not None:
            self._lineages.look(number)
            running.child.terminate()

    def kill(self, number: int) -> None:
        """Send SIGKILL to the process and its group."""
        running = self._running.get(number)
        if running is not None:
            running.killed = True
            running.look = running.look or ends.look(running.child.pid)
            self._lineages.look(number)
            running.child.kill_group()

    # --- events -------------------------------------------------------------------------------------------

    def reap(self, now: float) -> None:
        """Collect those that have ended, each with all that it left behind."""
        for running in list(self._running.values()):
            if running.child.ended and self._swept(running, now):
                self._collect(running, now)
        self._lineages.reap_strays(self._helpers())

    def deadline(self, now: float) -> float | None:
        """Return when :meth:`reap` is to look again although no process has ended."""
        sweeping = any(running.child.ended for running in self._running.values())
        return now + _SWEEP_LOOK_SECONDS if sweeping else None

    def _swept(self, running: Running, now: float) -> bool:
        swept = self._lineages.sweep(running.number, known=self._helpers(), now=now)
        if swept.over and swept.killed:
            killed = ", ".join(swept.killed)
            log.warning("killed what generation %d left behind: %s", running.number, killed)
        if swept.over and swept.left:
            left = ", ".join(swept.left)
            log.error("generation %d left processes that cannot be killed: %s", running.number, left)
        return swept.over

    def _collect(self, running: Running, now: float) -> None:
        self._drain_channel(running)
        end = ends.end_of(
            launch.reap(running.child),
            kills_before=self._kills_before,
            kills_after=self._kills.read(),
            by_us=running.killed,
        )
        del self._running[running.number]
        self._lineages.remove(running.number)
        self._remember_ending(running, end, now)
        error = running.failure.get("error")
        self._happened(
            events.Exited(
                running.number,
                str(end),
                masking.mask(str(error)) if error else None,
                importing=bool(running.failure.get("importing")),
            )
        )

    def _remember_ending(self, running: Running, end: ends.End, now: float) -> None:
        lines = self._output.tail(running.number)
        self._output.forget(running.number)
        begins = [number for number, line in enumerate(lines) if line.startswith(_DUMP_BEGINS)]
        dump = lines[begins[-1] :] if begins and running.look is not None else ()
        self._endings[running.number] = Ending(
            pid=running.child.pid,
            lived_seconds=round(now - running.started_at, 3),
            exit_status=end.exit_status,
            signal=end.signal,
            oom=end.oom,
            stopped=running.look is not None and running.look.stopped,
            output=lines[-_OUTPUT_LINES:],
            dump=dump or ((str(running.look),) if running.look is not None else ()),
        )
        for number in sorted(self._endings)[:-_ENDINGS_KEPT]:
            del self._endings[number]

    def ending(self, number: int) -> Ending | None:
        """Return how a generation ended, if it was not long ago."""
        return self._endings.get(number)

    def look(self) -> None:
        """Remember what will be needed when a process has ended; for now and then."""
        self._kills_before = self._kills.read()
        for number in self._running:
            self._lineages.look(number)
        if self._forerunner is not None:
            self._forerunner.look()

    @property
    def forerunners(self) -> Collection[int]:
        """The process id of what waits to become the first generation."""
        pid = self._forerunner.pid if self._forerunner is not None else None
        return [pid] if pid is not None else []

    @property
    def identities(self) -> dict[int, processes.Identity]:
        """Number of each generation to what its process can be recognised by later."""
        for running in self._running.values():
            running.identity = running.identity or processes.identify(running.child.pid)
        return {number: r.identity for number, r in self._running.items() if r.identity is not None}

    def datagram(self, message: Datagram) -> None:
        """Take a message of sd_notify; only a generation's own main process is heard."""
        for running in list(self._running.values()):
            if message.pid in {running.child.pid, None}:
                self._notified(running, message.fields)
        if message.pid is not None and self._zygote.begun_by(message.pid):
            self._early.append(message)

    def _notified(self, running: Running, fields: Mapping[str, str]) -> None:
        if "STATUS" in fields:
            running.status = masking.mask(fields["STATUS"])
        if fields.get("READY") == "1":
            self._happened(events.Ready(running.number))
        extend = _seconds(fields.get("EXTEND_TIMEOUT_USEC", ""))
        if fields.get("WATCHDOG") == "1" or extend:
            self._happened(events.Beat(running.number, extend))
        if "X_SUSPECT" in fields:
            self._suspected(running.number, masking.mask(fields["X_SUSPECT"]))

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
                self._happened(events.Imported(running.number))
            case "attestation":
                self._attested(running, frame)
            case "metrics" if isinstance(frame.get("families"), list):
                self._measured(running, frame)
            case "modules":
                self._loaded(running, frame)
            case "pages":
                self._zygote.written(running.child.pid, frame.get("runs"))
            case "ended":
                running.over = True
                if frame.get("traceless") is True and not self._lineages.has_strangers(self._helpers()):
                    self._happened(events.Finished(running.number))
            case "failed":
                running.failure = frame

    def _measured(self, running: Running, frame: Mapping[str, Any]) -> None:
        """Take metrics, and say so: from then on numbers are enough."""
        understood = self._metrics(running.number, frame["families"])
        report = frame.get("report")
        if type(report) is not int or running.child.is_behind:
            return  # It does not ask for an answer, or does not read any.
        if understood:
            running.child.send({"type": "taken", "report": report})
        else:
            running.child.send({"type": "metrics", "whole": True})

    def _loaded(self, running: Running, frame: Mapping[str, Any]) -> None:
        """Tell the zygote what children need, as far as this one shows it."""
        if running.manifest_file is None:
            return  # Nobody has asked.
        target = self._target
        script = self._directory / target.name if target.kind == "script" else None
        environment = self._environment(running.number, running.manifest.digest)
        try:
            modules = [(str(name), str(origin)) for name, origin in frame["modules"]]
            compiled = frozenset((str(digest), str(path)) for digest, path in frame["compiled"])
        except (KeyError, TypeError, ValueError):
            log.warning("generation %d does not say what it has loaded", running.number)
            return
        self._zygote.want(
            Plan(
                modules=modules,
                environment={k: v for k, v in environment.items() if k not in PLACEHOLDERS},
                directory=str(self._directory),
                manifest=str(running.manifest_file),
                blobs=str(self._blobs),
                first_path=str(script.resolve().parent if script is not None else self._directory),
                sources=running.manifest.sources,
                compiled=compiled,
            )
        )

    def _attested(self, running: Running, frame: Mapping[str, Any]) -> None:
        if running.nonce is None or frame.get("nonce") != running.nonce:
            return  # Not the answer to what was asked last.
        running.nonce = running.asked_at = None
        try:
            attestation = verify.parse(frame)
        except verify.AttestationError as error:
            self._happened(events.Attested(running.number, str(error)))
            return
        disk = self._disk() or running.manifest
        verdict = verify.compare(running.manifest, disk, attestation, self._prints())
        running.verdict = verdict
        self._happened(events.Attested(running.number, verdict.problem, importing=attestation.importing))


def _seconds(usec: str) -> float:
    """Return the seconds that a field of sd_notify names in microseconds; 0 for what is no such number."""
    return int(usec) / _USEC if usec.isdecimal() and len(usec) <= _LONGEST_USEC_DIGITS else 0.0
