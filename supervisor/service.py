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
from pathlib import Path
from types import FrameType
from typing import Any

from supervisor import git, launch, lifecycle
from supervisor.blobs import BlobStore
from supervisor.bytecode import BytecodeReport, shorten
from supervisor.control import Client, ControlServer
from supervisor.errors import UsageError
from supervisor.fleet import Fleet, Running
from supervisor.lifecycle import Action, Stage
from supervisor.manifest import Manifest
from supervisor.metrics import ChildMetrics, ProcessSampler, SupervisorMetrics, registry
from supervisor.notify import Notifier, NotifySocket
from supervisor.pipeline import Built, Pipeline, Reload
from supervisor.settings import Settings
from supervisor.status import in_sync_problem, sentence, status_document, verify_document
from supervisor.verify import Verdict
from supervisor.watch import Watcher
from supervisor.web import WebServer

log = logging.getLogger("wa-supervisor")

_HOUSEKEEPING_SECONDS = 0.5
_LOOP_HANGS_SECONDS = 5.0
_VERIFY_TIMEOUT_SECONDS = 5.0
_SHORT_DIGEST = 12
_CHILD_SIGNALS = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


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
        self._registry = registry()
        self._metrics = SupervisorMetrics(self._registry)
        self._child_metrics = ChildMetrics()
        self._registry.register(self._child_metrics)
        self._sampler = ProcessSampler(self._metrics)
        try:
            self._blobs = BlobStore(settings.state_dir)
        except OSError as error:
            raise UsageError(
                f"cannot use the state directory {settings.state_dir}: {error.strerror}; name another --state-dir"
            ) from error
        self._notifier = Notifier(inherited)
        self._notify_socket = NotifySocket(settings.runtime_dir / "notify.sock")
        self._selector.register(self._notify_socket, selectors.EVENT_READ, self._notified)
        self._repository = git.find(Path(settings.tree.base))
        self._watcher = Watcher(settings.tree, self.wake)
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
            happened=self._happened,
            metrics=self._child_metrics.update,
            suspected=self._suspected,
        )
        self._policy = lifecycle.Policy(
            overlap=settings.handover == "overlap",
            notify=settings.type == "notify",
            ready_timeout_seconds=settings.ready_timeout_seconds,
            stop_timeout_seconds=settings.stop_timeout_seconds,
            watchdog_seconds=settings.watchdog_seconds,
            jitter=lambda: random.uniform(0.8, 1.2),  # noqa: S311 -- spreads restarts, keeps no secret
        )
        self._state = lifecycle.State()
        self._manifests: dict[str, Manifest] = {}
        self._launching: Reload | None = None
        self._reloads: dict[int, Reload] = {}
        self._held_event: lifecycle.Attested | None = None
        self._last_reload: Reload | None = None
        self._events: collections.deque[lifecycle.Event] = collections.deque()
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._verifications: list[tuple[float, Callable[[Verdict | None], None], int]] = []
        self._stop_clients: list[Client] = []
        self._unwritable: tuple[str, ...] = ()
        self._live_since: float | None = None
        self._down_since: float | None = None
        self._in_sync_since: float | None = None
        self._housekeeping_at = 0.0
        self._scan_at = 0.0
        self._verify_at = 0.0
        self._turned_at = time.monotonic()
        self._status: dict[str, Any] = {}
        self._web = WebServer(settings.listen, self._registry, self._published)

    # --- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Serve until the operator stops it; return the exit status."""
        previous = {number: signal.signal(number, _ignore_here) for number in _CHILD_SIGNALS}
        wakeup = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        try:
            self._watcher.start()
            log.info("watching %s (%s)", ", ".join(self._settings.tree.roots), self._watcher.mode)
            log.info("status and metrics at http://%s/", self._web.address)
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

    def wake(self) -> None:
        """Make the loop turn (from any thread)."""
        try:
            self._wake_writer.send(b"\0")
        except BlockingIOError:
            return  # It is full of wake-ups already.

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._timeout()):
            key.data()
        now = self._turned_at = time.monotonic()
        self._pipeline.hint(self._watcher.take(), now)
        self._fleet.reap()
        self._run_timers(now)
        self._compiled(now)
        if self._pipeline.advance(now, live=self._live_manifest, candidate=self._candidate_reload):
            self._happened(lifecycle.TreeUnchanged(self._live_manifest.digest if self._live_manifest else ""))
        deadline = self._state.deadline()
        if deadline is not None and deadline <= now:
            self._happened(lifecycle.Tick())
        self._open_held_gate()
        self._decide()
        if now >= self._housekeeping_at:
            self._housekeeping_at = now + _HOUSEKEEPING_SECONDS
            self._housekeep(now)
        self._publish(now)

    def _timeout(self) -> float:
        times = [self._housekeeping_at, self._state.deadline(), self._pipeline.deadline(), self._scan_at]
        times += [at for at, _ in self._timers]
        times += [at for at, _, _ in self._verifications]
        if self._events:
            return 0.0
        return max(0.0, min(at for at in times if at is not None) - time.monotonic())

    def _woken(self) -> None:
        try:
            numbers = self._wake_reader.recv(4096)
        except BlockingIOError:
            return
        for number in set(numbers):
            if number == signal.SIGHUP:
                log.info("SIGHUP: reload")
                self._ask_reload("signal")
            elif number in {signal.SIGTERM, signal.SIGINT}:
                log.info("%s: stop", signal.Signals(number).name)
                self._happened(lifecycle.StopRequested())

    def _run_timers(self, now: float) -> None:
        due = [action for at, action in self._timers if at <= now]
        self._timers = [(at, action) for at, action in self._timers if at > now]
        for action in due:
            action()
        expired = [answer for at, answer, _ in self._verifications if at <= now]
        self._verifications = [v for v in self._verifications if v[0] > now]
        for answer in expired:
            answer(None)

    def _housekeep(self, now: float) -> None:
        """What is done on time and not on an event: scan, periodic verification, samples, watchdog."""
        if now >= self._scan_at:
            self._scan_at = now + self._settings.scan_interval_seconds
            self._pipeline.scan(now)
        live = self._live
        if live is not None and now >= self._verify_at:
            self._verify_at = now + self._settings.verify_interval_seconds
            self._fleet.attest(live.number)
        self._sampler.sample(live.child.pid if live else None)
        self._count_downtime(now)
        self._notifier.alive()

    # --- pipeline -----------------------------------------------------------------------------------------------------

    def _ask_reload(self, trigger: str, on_finish: Callable[[Reload], None] | None = None) -> None:
        if self._state.live is not None:
            self._notifier.reloading()
        self._pipeline.ask(trigger, time.monotonic(), on_finish)

    def _compiled(self, now: float) -> None:
        """Collect the compile helper once it has said what it has to say."""
        job = self._pipeline.job
        if job is None:
            return
        if job.fileno() not in self._selector.get_map():
            self._selector.register(job.fileno(), selectors.EVENT_READ, lambda: None)
        fileno = job.fileno()
        report = job.read()
        if report is None:
            return
        self._selector.unregister(fileno)
        self._account_bytecode(report)
        built = self._pipeline.compiled(report, now)
        if built is not None:
            self._start(built)

    def _account_bytecode(self, report: BytecodeReport) -> None:
        self._metrics.pyc_purged.inc(len(report.purged))
        self._metrics.compile_errors.inc(report.error is not None)
        if report.purged:
            log.info("purged %d stale bytecode files: %s", len(report.purged), shorten(report.purged))
        if report.error is None:
            self._unwritable = report.unwritable
            self._metrics.bytecode_writable.set(not report.unwritable)
            if report.unwritable:
                log.warning(
                    "bytecode is not writable, OTHER processes may run stale code (ours cannot): %s",
                    shorten(report.unwritable),
                )

    def _start(self, built: Built) -> None:
        self._manifests[built.manifest.digest] = built.manifest
        self._launching = built.reload
        self._happened(lifecycle.TreeReady(built.manifest.digest, built.reload.trigger))
        self._decide()

    def _reload_finished(self, reload: Reload) -> None:
        """Count, log and answer a reload that has its outcome."""
        self._last_reload = reload
        self._metrics.reloads.labels(reload.outcome, reload.trigger).inc()
        self._metrics.reload_seconds.observe(reload.total_seconds)
        for stage, seconds in reload.stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        if reload.outcome == "rolled_back":
            self._metrics.rollbacks.inc()
        level = logging.WARNING if reload.outcome in {"rejected", "rolled_back"} else logging.INFO
        log.log(level, "%s", sentence(reload))
        if self._state.live is not None:
            self._notifier.ready()
        for call in reload.on_finish:
            call(reload)

    # --- lifecycle ------------------------------------------------------------------------------------------------

    def _happened(self, event: lifecycle.Event) -> None:
        """Take an event; it is decided upon in order, after what is being decided now."""
        if isinstance(event, lifecycle.Attested):
            self._answer_verifications(event)
            candidate = self._state.candidate
            if (
                candidate is not None
                and candidate.number == event.number
                and candidate.stage is Stage.LAUNCHED
            ):
                # The gate opens only for what is on disk: look once more, and wait for what is being looked at.
                self._pipeline.scan(time.monotonic())
                self._held_event = event
                return
        self._events.append(event)

    def _open_held_gate(self) -> None:
        if self._held_event is not None and not self._pipeline.busy:
            self._events.append(self._held_event)
            self._held_event = None

    def _decide(self) -> None:
        while self._events:
            event = self._events.popleft()
            now = time.monotonic()
            before = self._state
            self._time_stages(event, now)
            self._state, actions = lifecycle.step(self._policy, self._state, event, now)
            for action in actions:
                self._act(action, now)
            if isinstance(event, lifecycle.Exited):
                self._child_metrics.end(event.number)
            if before.live != self._state.live:
                self._live_changed(now)

    def _time_stages(self, event: lifecycle.Event, now: float) -> None:
        """Mark the end of a stage of the reload that an event belongs to."""
        stages = {lifecycle.Imported: "launch", lifecycle.Attested: "verify", lifecycle.Ready: "handover"}
        candidate = self._state.candidate
        number = getattr(event, "number", None)
        stage = stages.get(type(event))
        if (
            stage
            and candidate is not None
            and candidate.number == number
            and candidate.number in self._reloads
        ):
            self._reloads[candidate.number].mark(stage, now)

    def _act(self, action: Action, now: float) -> None:
        match action:
            case lifecycle.Launch(generation):
                self._launch(generation, now)
            case lifecycle.Attest(number, delay_seconds):
                self._timers.append((now + delay_seconds, lambda: self._fleet.attest(number)))
                if not delay_seconds:
                    self._run_timers(now)
            case lifecycle.Go(number):
                self._fleet.go(number)
            case lifecycle.Terminate(number):
                self._fleet.terminate(number)
            case lifecycle.Kill(number):
                self._fleet.kill(number)
            case lifecycle.Report():
                self._report(action, now)
            case lifecycle.Restarting(number, cause, detail, wait_seconds):
                self._metrics.child_restarts.labels(cause).inc()
                log.error(
                    "generation %d: %s (%s); starting again in %.2f s", number, cause, detail, wait_seconds
                )

    def _launch(self, generation: lifecycle.Generation, now: float) -> None:
        reload, self._launching = self._launching, None
        if reload is None or reload.tree != generation.tree:
            live = self._live_manifest
            reload = Reload(
                generation.trigger, now, tree=generation.tree, previous_tree=live.digest if live else None
            )
        reload.generation = generation.number
        self._reloads[generation.number] = reload
        manifest = self._manifests[generation.tree]
        try:
            self._fleet.launch(generation.number, manifest, self._blobs.put_manifest(manifest), reload)
        except OSError as error:
            # Out of processes or memory: the lifecycle treats it as a child that ended, with its backoff.
            log.error("generation %d could not be started: %s", generation.number, error)  # noqa: TRY400
            self._events.append(lifecycle.Exited(generation.number, f"no process: {error.strerror}"))

    def _report(self, report: lifecycle.Report, now: float) -> None:
        reload = self._reloads.pop(report.number)
        if report.outcome == "superseded" and self._launching is not None:
            self._launching.on_finish += reload.on_finish
            reload.on_finish = []
        if report.outcome in {"rejected", "rolled_back"} and reload.tree is not None:
            self._pipeline.rejected(reload.tree, f"{report.reason}: {report.detail}")
        if report.outcome == "live":
            reload.mark("handover", now)
        reload.finish(report.outcome, now, report.reason, report.detail)
        self._reload_finished(reload)

    def _live_changed(self, now: float) -> None:
        live = self._state.live
        if live is None or live.stage is not Stage.LIVE:
            if self._live_since is not None and self._down_since is None:
                self._down_since = now
            return
        self._count_downtime(now)
        self._down_since = None
        running = self._live
        if running is not None and self._live_since != live.since:
            self._live_since = live.since
            self._child_metrics.go_live(live.number)
            self._verify_at = now + self._settings.verify_interval_seconds
            self._notifier.ready()
            self._collect_garbage()

    def _collect_garbage(self) -> None:
        """Forget manifests and blobs that nothing needs any more."""
        needed = {m.digest: m for m in self._fleet.manifests}
        for digest in (self._state.good, self._state.retry.tree if self._state.retry else None):
            if digest is not None:
                needed[digest] = self._manifests[digest]
        self._manifests = needed
        disk = [self._pipeline.disk] if self._pipeline.disk else []
        if not self._pipeline.busy:
            self._blobs.collect([*needed.values(), *disk])

    # --- the generations as others see them ---------------------------------------------------------------------------

    @property
    def _live(self) -> Running | None:
        return self._fleet.get(self._state.live.number if self._state.live else None)

    @property
    def _live_manifest(self) -> Manifest | None:
        return self._manifests[self._state.live.tree] if self._state.live else None

    @property
    def _candidate_reload(self) -> Reload | None:
        return self._reloads.get(self._state.candidate.number) if self._state.candidate else None

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
        """The child reports something that wrong code could cause: look at disk and child at once."""
        log.warning("generation %d is suspicious: %s; verifying its code", number, " ".join(why.split()))
        self._pipeline.scan(time.monotonic(), whole=True)
        self._fleet.attest(number)

    # --- commands ---------------------------------------------------------------------------------------------------

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
            case "stop":
                log.info("stop, by command")
                self._stop_clients.append(client)
                self._happened(lifecycle.StopRequested())
            case other:
                client.answer({"ok": False, "error": f"there is no command {other!r}"})

    def _verify(self, client: Client) -> None:
        """Read the whole disk again, ask the live child, and answer with the comparison."""
        live, began = self._live, time.monotonic()
        if live is None:
            client.answer({"ok": False, "error": f"no generation is live: {self._problem()}"})
            return
        self._pipeline.scan(began, whole=True)

        def answer(verdict: Verdict | None) -> None:
            if verdict is None:
                client.answer(
                    {
                        "ok": False,
                        "error": f"generation {live.number} did not answer within {_VERIFY_TIMEOUT_SECONDS:g} s",
                    }
                )
            else:
                disk = self._pipeline.disk
                same_tree = disk is not None and disk.digest == live.manifest.digest
                took = time.monotonic() - began
                client.answer(
                    {
                        "ok": True,
                        "verify": verify_document(verdict, same_tree=same_tree, duration_seconds=took),
                    }
                )

        self._verifications.append((began + _VERIFY_TIMEOUT_SECONDS, answer, live.number))
        self._fleet.attest(live.number)

    def _answer_verifications(self, event: lifecycle.Attested) -> None:
        running = self._fleet.get(event.number)
        waiting = [v for v in self._verifications if v[2] == event.number]
        self._verifications = [v for v in self._verifications if v[2] != event.number]
        for _, answer, _ in waiting:
            answer(running.verdict if running is not None else None)

    # --- what is published ----------------------------------------------------------------------------------------

    def _problem(self) -> str | None:
        return in_sync_problem(
            live=self._live,
            disk=self._pipeline.disk,
            problem=self._pipeline.problem,
            stopping=self._state.stopping,
        )

    def _count_downtime(self, now: float) -> None:
        if self._down_since is not None:
            self._metrics.downtime.inc(now - self._down_since)
            self._down_since = now

    def _publish(self, now: float) -> None:
        """Bring status, metrics and the service manager's status line up to date."""
        problem, live = self._problem(), self._live
        if problem is None:
            self._in_sync_since = self._in_sync_since or now
        else:
            self._in_sync_since = None
        commit = self._repository.commit() if self._repository else None
        self._publish_metrics(live, commit, now)
        self._status = status_document(
            pid=os.getpid(),
            state=self._state,
            live=live,
            reason=problem,
            listen=self._web.address,
            last_reload=self._last_reload,
            restarts={cause: int(n) for cause, n in self._metrics.restarts().items()},
            watch={
                "mode": self._watcher.mode,
                "reason": self._watcher.problem,
                "directories": self._watcher.directories_total,
                "overflows": self._watcher.overflows_total,
                "last_scan_age_seconds": round(now - (self._pipeline.scanned_at or now), 3),
            },
            git={"commit": commit, "dirty": None} if self._repository else None,
            busy=self._pipeline.busy,
            unwritable=self._unwritable,
        )
        shown = (
            f"generation {live.number}, tree {live.manifest.digest[:_SHORT_DIGEST]}"
            if live
            else "no live generation"
        )
        where = f", commit {commit[:_SHORT_DIGEST]}" if commit else ""
        self._notifier.status(f"{shown}{where}: {'in sync' if problem is None else problem}")

    def _publish_metrics(self, live: Running | None, commit: str | None, now: float) -> None:
        metrics = self._metrics
        metrics.in_sync.set(self._in_sync_since is not None)
        metrics.converged_seconds.set(0 if self._in_sync_since is None else now - self._in_sync_since)
        wrong = (
            [m for m in live.verdict.modules if m.state in {"mismatch", "unpinned"}]
            if live and live.verdict
            else []
        )
        metrics.mismatches.set(len(wrong))
        metrics.set_code_info(live.manifest.digest if live else None, commit)
        metrics.child_up.set(live is not None)
        metrics.generation.set(live.number if live else 0)
        metrics.set_watch_mode(self._watcher.mode)
        metrics.last_scan_age.set(now - (self._pipeline.scanned_at or now))
        metrics.follow(metrics.watch_overflows, self._watcher.overflows_total)
        metrics.follow(metrics.notify_errors, self._notifier.errors_total)

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


def _ignore_here(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has brought the signal to the loop."""
