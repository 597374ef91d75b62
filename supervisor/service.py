"""Service: wires the edges to the pipeline and the lifecycle, and turns the one event loop.

The rule: **one thread decides.** Signals, file events, frames, datagrams, commands and deadlines all arrive
in this loop; each becomes an event of the pipeline or of the lifecycle, whose actions are carried out before
the next one is looked at. Other threads (the watcher's, HTTP's) only hand something over or read what was
published.

Signals: SIGHUP reloads, SIGTERM and SIGINT stop. Handlers do nothing; the wake-up descriptor brings the
number to the loop.

Rejected: asyncio (its subprocess watcher is a second reaper, and every await is a place where the state may
have changed).
"""

from __future__ import annotations

import collections
import logging
import os
import random
import selectors
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from supervisor import git, launch, lifecycle, lock
from supervisor.blobs import BlobStore
from supervisor.bytecode import CompileJob
from supervisor.control import Client, ControlServer
from supervisor.errors import BlobError, UsageError
from supervisor.fleet import Fleet, Running
from supervisor.lifecycle import Action, Stage
from supervisor.manifest import Manifest
from supervisor.metrics import ChildMetrics, SupervisorMetrics, registry
from supervisor.notify import Notifier, NotifySocket
from supervisor.pipeline import Pipeline, Reload
from supervisor.reporting import Reporting
from supervisor.settings import Settings
from supervisor.status import ANSWER_SECONDS, in_sync_problem, verify_document
from supervisor.watch import Watcher
from supervisor.web import WebServer

log = logging.getLogger("wa-supervisor")

_HOUSEKEEPING_SECONDS = 0.5
_LOOP_HANGS_SECONDS = 5.0
_SUSPECT_INTERVAL_SECONDS = 5.0
_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


@dataclass(frozen=True)
class _Verification:
    """A command that waits for an attestation of one generation."""

    client: Client
    number: int
    began_at: float


class Service:
    """One supervisor, from its start to its stop.

    Args:
        settings: what to run and how.
        inherited: the environment to pass on to children.

    Raises:
        SupervisorError: it cannot start; nothing was started.
    """

    def __init__(self, settings: Settings, inherited: Mapping[str, str] = os.environ) -> None:
        self._settings = settings
        self._inherited = dict(inherited)
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._control = ControlServer(settings.runtime_dir, self._selector, self._command)
        self._notify_socket = NotifySocket(settings.runtime_dir / "notify.sock")
        self._selector.register(self._notify_socket, selectors.EVENT_READ, self._notified)
        self._state_lock = lock.take(settings.state_dir, "--state-dir")
        self._blobs = _open_blobs(settings.state_dir)
        self._repository = git.find(Path(settings.tree.base))
        self._watcher = Watcher(settings.tree, self._wake)
        self._notifier = Notifier(inherited)
        metrics_registry = registry()
        self._child_metrics = ChildMetrics()
        metrics_registry.register(self._child_metrics)
        self._reporting = Reporting(SupervisorMetrics(metrics_registry), self._notifier)
        self._pipeline = Pipeline(
            tree=settings.tree,
            blobs=self._blobs,
            scratch=settings.runtime_dir,
            repository=self._repository,
            quiet_seconds=settings.quiet_seconds,
            environment=self._inherited,
            finished=self._reload_finished,
        )
        self._fleet = Fleet(
            target=settings.target,
            blobs=self._blobs.blobs,
            selector=self._selector,
            environment=self._environment,
            disk=lambda: self._pipeline.disk,
            prints=lambda: self._pipeline.prints,
            happened=self._happened,
            metrics=self._child_metrics.update,
            suspected=self._suspected,
        )
        self._policy = _policy(settings)
        self._state = lifecycle.State()
        self._events: collections.deque[lifecycle.Event] = collections.deque()
        self._held: lifecycle.Attested | None = None
        self._manifests: dict[str, Manifest] = {}
        self._reloads: dict[int, Reload] = {}
        self._launching: Reload | None = None
        self._job: CompileJob | None = None
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._verifications: list[_Verification] = []
        self._stop_clients: list[Client] = []
        self._last_live = 0
        self._live_is_new = False
        self._changed = True
        self._housekeeping_at = self._scan_at = self._verify_at = self._suspect_at = 0.0
        self._directories = 0
        self._git_facts: dict[str, Any] | None = None
        self._turned_at = time.monotonic()
        self._status: dict[str, Any] = {}
        self._web = WebServer(settings.listen, metrics_registry, self._published)

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until the operator stops it; return the exit status."""
        previous = {number: signal.signal(number, _ignore_here) for number in _SIGNALS}
        wakeup = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        try:
            self._watcher.start()
            log.info("watching %s (%s)", ", ".join(self._settings.tree.roots), self._watcher.mode)
            log.info("status at http://%s/status.json, metrics at /metrics", self._web.address)
            if self._watcher.problem:
                log.warning("%s", self._watcher.problem)
            self._pipeline.ask("start", time.monotonic())
            while not self._state.finished:
                self._turn()
        finally:
            self._notifier.stopping()
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._close()
        log.info("stopped")
        return 0

    def _turn(self) -> None:
        """Wait for something, let all concerned look at it, and decide until nothing is left to decide."""
        for key, _ in self._selector.select(self._timeout()):
            self._changed = True
            key.data()
        now = self._turned_at = time.monotonic()
        self._pipeline.hint(self._watcher.take(), now)
        self._fleet.reap()
        self._run_timers(now)
        self._collect_job(now)
        if self._pipeline.advance(now, live=self._live_manifest, candidate=self._candidate_reload):
            self._happened(lifecycle.TreeUnchanged(self._state.live.tree if self._state.live else ""))
        self._follow_job()
        deadline = self._state.deadline()
        if deadline is not None and deadline <= now:
            self._happened(lifecycle.Tick())
        self._release_held()
        self._decide()
        # Deciding took its time, and what follows counts times that must not run backwards.
        now = time.monotonic()
        if now >= self._housekeeping_at:
            self._housekeep(now)
        if self._changed:
            self._publish(now)

    def _timeout(self) -> float:
        times = [self._housekeeping_at, self._state.deadline(), self._pipeline.deadline()]
        times += [at for at, _ in self._timers]
        return (
            max(0.0, min(at for at in times if at is not None) - time.monotonic())
            if not self._events
            else 0.0
        )

    def _wake(self) -> None:
        """Make the loop turn (called from any thread)."""
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            return  # It is full of wake-ups already.

    def _woken(self) -> None:
        """Read the numbers of the signals that arrived; other wake-ups are zeros."""
        try:
            numbers = set(self._wake_reader.recv(4096))
        except BlockingIOError:
            return
        if signal.SIGHUP in numbers:
            log.info("SIGHUP: reload")
            self._ask_reload("signal")
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            log.info("stop, by signal")
            self._happened(lifecycle.StopRequested())

    def _run_timers(self, now: float) -> None:
        due = [action for at, action in self._timers if at <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for action in due:
            action()

    def _housekeep(self, now: float) -> None:
        """Do what is done on time and not on an event: scan, verification, samples, systemd's watchdog."""
        self._housekeeping_at = now + _HOUSEKEEPING_SECONDS
        self._changed = True
        if now >= self._scan_at:
            self._scan_at = now + self._settings.scan_interval_seconds
            self._pipeline.scan(now)
            self._directories = self._watcher.directories_total
            if self._state.live is not None and self._state.candidate is None and self._state.retry is None:
                self._pipeline.reconsider(now, self._state.live.tree)
        if self._live is not None and now >= self._verify_at:
            self._verify_at = now + self._settings.verify_interval_seconds
            self._fleet.attest(self._live.number)
        if self._repository is not None:
            self._git_facts = {"commit": self._repository.commit(), "dirty": None}
        self._reporting.sample(self._live)
        self._count_downtime(now)
        self._notifier.alive()

    # --- pipeline -----------------------------------------------------------------------------------------

    def _ask_reload(self, trigger: str, on_finish: Callable[[Reload], None] | None = None) -> None:
        if self._state.live is not None:
            self._notifier.reloading()
        self._pipeline.ask(trigger, time.monotonic(), on_finish)

    def _collect_job(self, now: float) -> None:
        """Take the report of the compile helper once it has ended."""
        report = self._pipeline.job.read() if self._pipeline.job is not None else None
        if report is None:
            return
        self._reporting.bytecode(report)
        built = self._pipeline.compiled(report, now)
        self._follow_job()
        if built is not None:
            self._manifests[built.manifest.digest] = built.manifest
            self._launching = built.reload
            self._happened(lifecycle.TreeReady(built.manifest.digest, built.reload.trigger))

    def _follow_job(self) -> None:
        """Wait on the compile helper there is, before its predecessor's descriptor is used again."""
        job = self._pipeline.job
        if job is self._job:
            return
        if self._job is not None:
            self._selector.unregister(self._job)
        if job is not None:
            self._selector.register(job, selectors.EVENT_READ, lambda: None)
        self._job = job

    def _reload_finished(self, reload: Reload) -> None:
        """Tell everybody of a reload that has its outcome, those who asked for it last."""
        self._reporting.reload(reload)
        if self._state.live is not None:
            self._notifier.ready()
        self._publish(time.monotonic())
        for call in reload.on_finish:
            call(reload)

    # --- lifecycle ----------------------------------------------------------------------------------------

    def _happened(self, event: lifecycle.Event) -> None:
        """Take an event; it is decided upon in order, after what is being decided now."""
        if isinstance(event, lifecycle.Attested):
            self._answer_verifications(event.number)
            candidate = self._state.candidate
            at_gate = (
                candidate is not None
                and candidate.number == event.number
                and candidate.stage is Stage.LAUNCHED
            )
            if at_gate and event.problem is None:
                # The gate opens only for what is on disk: look once more, wait while anything is.
                self._pipeline.scan(time.monotonic())
                self._held = event
                return
        self._events.append(event)

    def _release_held(self) -> None:
        if self._held is not None and not self._pipeline.busy:
            self._events.append(self._held)
            self._held = None

    def _decide(self) -> None:
        while self._events:
            event = self._events.popleft()
            now = time.monotonic()
            self._time_stage(event, now)
            self._state, actions = lifecycle.step(self._policy, self._state, event, now)
            for action in actions:
                self._act(action, now)
            if isinstance(event, lifecycle.Exited):
                self._child_metrics.end(event.number)
            self._count_downtime(now)
            self._follow_live(now)
            if isinstance(event, lifecycle.TreeReady) and self._launching is not None:
                self._not_launched(now)
            if isinstance(event, lifecycle.Exited) and event.error and "PinnedSourceError" in event.error:
                self._pipeline.heal(now)
        if self._live_is_new:
            self._live_is_new = False
            self._collect_garbage()

    def _not_launched(self, now: float) -> None:
        """End a reload that needs no new process: one of its tree is on its way, or we are stopping."""
        reload, self._launching = self._launching, None
        if reload is None:
            return
        candidate = self._candidate_reload
        if candidate is not None and candidate.tree == reload.tree:
            candidate.on_finish += reload.on_finish  # Who asked for this one hears how that one ends.
            reload.on_finish = []
        reload.finish("superseded" if self._state.stopping else "unchanged", now)
        self._reload_finished(reload)

    def _time_stage(self, event: lifecycle.Event, now: float) -> None:
        """Mark the end of the stage of a reload that an event of the candidate ends."""
        match event:
            case lifecycle.Imported(number):
                stage = "launch"
            case lifecycle.Attested(number):
                stage = "verify"
            case lifecycle.Ready(number):
                stage = "handover"
            case _:
                return
        if self._state.candidate is not None and self._state.candidate.number == number:
            self._reloads[number].mark(stage, now)

    def _act(self, action: Action, now: float) -> None:
        match action:
            case lifecycle.Launch(generation):
                self._launch(generation, now)
            case lifecycle.Attest(number, delay_seconds) if delay_seconds:
                self._timers.append((now + delay_seconds, lambda: self._fleet.attest(number)))
            case lifecycle.Attest(number):
                self._fleet.attest(number)
            case lifecycle.Go(number):
                self._fleet.go(number)
            case lifecycle.Terminate(number):
                self._fleet.terminate(number)
            case lifecycle.Kill(number):
                self._fleet.kill(number)
            case lifecycle.Report():
                self._report(action, now)
            case lifecycle.Restarting():
                self._reporting.restarting(action)

    def _launch(self, generation: lifecycle.Generation, now: float) -> None:
        reload = self._launching
        if reload is not None and reload.tree == generation.tree:
            self._launching = None
        else:
            reload = Reload(generation.trigger, now, tree=generation.tree)
            reload.previous_tree = self._state.live.tree if self._state.live else self._state.good
        reload.generation = generation.number
        self._reloads[generation.number] = reload
        manifest = self._manifests[generation.tree]
        try:
            commit = self._repository.commit() if self._repository else None
            self._fleet.launch(generation.number, manifest, self._blobs.put_manifest(manifest), commit)
        except OSError as error:
            # Out of processes or memory: to the lifecycle it is a child that ended, with its backoff.
            self._events.append(
                lifecycle.Exited(generation.number, "no process", f"cannot start a process: {error}")
            )

    def _report(self, report: lifecycle.Report, now: float) -> None:
        reload = self._reloads.pop(report.number)
        if report.outcome == "superseded" and self._launching is not None:
            self._launching.on_finish += reload.on_finish  # Who waited for this one waits for the newer one.
            reload.on_finish = []
        if report.outcome in {"rejected", "rolled_back"} and reload.tree is not None:
            self._pipeline.rejected(reload.tree, f"{report.reason}: {report.detail}")
        if report.outcome == "live":
            reload.mark("handover", now)
        reload.finish(report.outcome, now, report.reason, report.detail)
        self._reload_finished(reload)

    def _follow_live(self, now: float) -> None:
        """Notice that another generation is live than before."""
        live = self._state.live
        if live is None or live.number == self._last_live:
            return
        self._last_live = live.number
        self._child_metrics.go_live(live.number)
        self._verify_at = now + self._settings.verify_interval_seconds
        self._notifier.ready()
        self._live_is_new = True

    def _collect_garbage(self) -> None:
        """Forget manifests and blobs that nothing needs any more."""
        if self._pipeline.busy:
            return
        trees = {self._state.good, self._state.retry.tree if self._state.retry else None}
        kept = [manifest for digest, manifest in self._manifests.items() if digest in trees]
        self._manifests = {manifest.digest: manifest for manifest in (*kept, *self._fleet.manifests)}
        needed = [*self._manifests.values(), *([self._pipeline.disk] if self._pipeline.disk else [])]
        self._blobs.collect(needed)
        self._pipeline.forget(needed)

    # --- the generations as others see them ---------------------------------------------------------------

    @property
    def _live(self) -> Running | None:
        return self._fleet.get(self._state.live.number if self._state.live else None)

    @property
    def _live_manifest(self) -> Manifest | None:
        return self._manifests[self._state.live.tree] if self._state.live else None

    @property
    def _candidate_reload(self) -> Reload | None:
        return self._reloads[self._state.candidate.number] if self._state.candidate else None

    def _environment(self, number: int, tree: str) -> Mapping[str, str]:
        return launch.child_environment(
            self._inherited,
            notify_socket=self._notify_socket.path,
            watchdog_seconds=self._settings.watchdog_seconds,
            generation=number,
            tree=tree,
        )

    def _notified(self) -> None:
        for message in self._notify_socket.receive():
            self._fleet.datagram(message)

    def _suspected(self, number: int, why: str) -> None:
        """The child reports what wrong code could cause: look at disk and child at once."""
        now = time.monotonic()
        if now < self._suspect_at:
            return
        self._suspect_at = now + _SUSPECT_INTERVAL_SECONDS
        log.warning("generation %d is suspicious: %s; verifying its code", number, " ".join(why.split()))
        self._pipeline.scan(now, whole=True, trigger="suspect")
        self._fleet.attest(number)

    def _count_downtime(self, now: float) -> None:
        """A child that drains still works, so a downtime begins when it is gone."""
        at_work = {
            generation.number for generation in (*self._state.draining, self._state.live) if generation
        }
        self._reporting.serving(now, serving=self._last_live in at_work, ever=self._last_live > 0)

    # --- commands -----------------------------------------------------------------------------------------

    def _command(self, client: Client, request: dict[str, Any]) -> None:
        match request.get("command"):
            case "status":
                self._publish(time.monotonic())
                client.answer({"ok": True, "status": self._status})
            case "reload":
                self._ask_reload(
                    "cli", lambda reload: client.answer({"ok": True, "reload": reload.as_json()})
                )
            case "verify":
                self._verify(client)
            case "diff":
                self._diff(client)
            case "stop":
                log.info("stop, by command")
                self._stop_clients.append(client)
                self._happened(lifecycle.StopRequested())
            case other:
                client.answer({"ok": False, "error": f"there is no command {other!r}"})

    def _verify(self, client: Client) -> None:
        """Read the whole disk again and ask the live child; its attestation or the deadline answers."""
        live, now = self._live, time.monotonic()
        if live is None:
            client.answer({"ok": False, "error": f"no generation is live: {self._problem()}"})
            return
        self._pipeline.scan(now, whole=True)
        waiting = _Verification(client, live.number, now)
        self._verifications.append(waiting)
        self._timers.append((now + ANSWER_SECONDS, lambda: self._verification_expired(waiting)))
        self._fleet.attest(live.number)

    def _diff(self, client: Client) -> None:
        """Answer with the text of every source that differs between the live generation and the disk."""
        live = self._live
        if live is None:
            client.answer({"ok": False, "error": f"no generation is live: {self._problem()}"})
            return
        self._pipeline.scan(time.monotonic(), whole=True)
        disk = self._pipeline.disk
        if disk is None:
            client.answer({"ok": False, "error": str(self._pipeline.problem)})
            return
        commit = self._repository.commit() if self._repository else None
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
            client.answer({"ok": False, "error": str(error)})
            return
        document = {
            "generation": live.number, "running_commit": live.commit, "disk_commit": commit, "files": files,
        }  # fmt: skip
        client.answer({"ok": True, "diff": document})

    def _text(self, digest: str | None) -> str | None:
        return self._blobs.get(digest).decode("utf-8", "backslashreplace") if digest is not None else None

    def _verification_expired(self, waiting: _Verification) -> None:
        if waiting in self._verifications:
            self._verifications.remove(waiting)
            error = f"generation {waiting.number} did not answer within {ANSWER_SECONDS:g} s"
            waiting.client.answer({"ok": False, "error": error})

    def _answer_verifications(self, number: int) -> None:
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

    # --- what is published --------------------------------------------------------------------------------

    def _problem(self) -> str | None:
        return in_sync_problem(
            live=self._live,
            disk=self._pipeline.disk,
            problem=self._pipeline.problem,
            stopping=self._state.stopping,
            now=time.monotonic(),
        )

    def _publish(self, now: float) -> None:
        self._changed = False
        self._status = self._reporting.publish(
            now=now,
            state=self._state,
            live=self._live,
            reason=self._problem(),
            listen=self._web.address,
            watch={
                "mode": self._watcher.mode,
                "reason": self._watcher.problem,
                "directories": self._directories,
                "overflows": self._watcher.overflows_total,
                "last_scan_age_seconds": round(now - (self._pipeline.scanned_at or now), 3),
            },
            git=self._git_facts,
            busy=self._pipeline.busy,
        )

    def _published(self) -> Mapping[str, Any]:
        """Return the last published status (called from the threads of HTTP)."""
        return {**self._status, "loop_alive": time.monotonic() - self._turned_at < _LOOP_HANGS_SECONDS}

    def _close(self) -> None:
        self._pipeline.close()
        self._watcher.close()
        self._web.close()
        self._notify_socket.close()
        for client in self._stop_clients:
            client.answer({"ok": True})
        self._control.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        os.close(self._state_lock)


def _policy(settings: Settings) -> lifecycle.Policy:
    return lifecycle.Policy(
        overlap=settings.handover == "overlap",
        notify=settings.type == "notify",
        ready_timeout_seconds=settings.ready_timeout_seconds,
        stop_timeout_seconds=settings.stop_timeout_seconds,
        watchdog_seconds=settings.watchdog_seconds,
        jitter=lambda: random.uniform(0.8, 1.2),  # noqa: S311 -- spreads restarts, keeps no secret
    )


def _open_blobs(directory: Path) -> BlobStore:
    try:
        return BlobStore(directory)
    except OSError as error:
        raise UsageError(f"cannot use {directory}: {error.strerror}; name another --state-dir") from error


def _ignore_here(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has brought the signal to the loop."""
