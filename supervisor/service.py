"""Service: wires the edges to the pipeline and the lifecycle, and turns the one event loop.

The rule: **one thread decides.** Signals, file events, frames, datagrams, commands and deadlines all arrive
in this loop; each becomes an event of the pipeline or of the lifecycle, whose actions are carried out before
the next one is looked at. Other threads (the watcher's, HTTP's) only hand something over or read what was
published.

Signals: SIGHUP reloads, SIGUSR2 replaces this program by the one on disk (:mod:`supervisor.reexec`), SIGTERM
and SIGINT stop. Handlers do nothing; the wake-up descriptor brings the
number to the loop. What may stall is waited for in threads: a terminal in :mod:`supervisor.output`, the disk
in :mod:`supervisor.scribe`.

Rejected: asyncio (its subprocess watcher is a second reaper, and every await is a place where the state may
have changed).
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from prometheus_client.exposition import generate_latest

from supervisor import events, health, lifecycle, lock, orphans
from supervisor.blobs import BlobStore
from supervisor.bytecode import CompileJob, Compiler
from supervisor.checkout import Checkout
from supervisor.chronicle import Chronicle
from supervisor.commands import Commands
from supervisor.configuration import Configuration
from supervisor.control import Client, ControlServer
from supervisor.dirty import Dirty
from supervisor.errors import BlobError, SupervisorError, UsageError
from supervisor.events import AUTOMATIC_TRIGGERS, Action, Reason
from supervisor.fleet import Fleet, Running
from supervisor.forerunner import Forerunner
from supervisor.history import History, Record
from supervisor.lifecycle import Stage
from supervisor.logfile import CHILD_LOG
from supervisor.manifest import Manifest
from supervisor.metrics import ChildMetrics, registry
from supervisor.notify import Notifier, NotifySocket
from supervisor.output import Output
from supervisor.pipeline import Pipeline
from supervisor.processes import Identity
from supervisor.reexec import SIGNALS, Estate, Lived, RefusedError
from supervisor.reload import Reload
from supervisor.remembered import RecordedProcess, Remembered
from supervisor.reporting import Reporting
from supervisor.scribe import Scribe
from supervisor.settings import NOTIFY_SOCKET, Settings
from supervisor.settling import MAX_SETTLE_SECONDS
from supervisor.starting import Starter
from supervisor.status import in_sync_problem
from supervisor.succession import Succession
from supervisor.view import Page, Published, is_loopback
from supervisor.watch import Watcher
from supervisor.web import WebServer
from supervisor.zygote import Zygote

log = logging.getLogger("wa-supervisor")

EXIT_NEVER_READY = 7
"""Stopped by a command before READY=1: systemd takes an exit with 0 for a failure then, and starts us again.

The unit names it in ``RestartPreventExitStatus=``; systemd calls it NOTRUNNING (systemd.exec(5)).
"""

_HOUSEKEEPING_SECONDS = 0.5
_AFTER_LIVE_SECONDS = 0.05
"""Until what the next reload needs is made ready: the processors are for the child that has just begun."""

_HOUSEKEEPING_WAITS_SECONDS = 0.25
"""For how long at most housekeeping lets a reload go first: it takes some milliseconds."""
_LOOP_HANGS_SECONDS = 5.0
_SUSPECT_INTERVAL_SECONDS = 5.0
_GATE_LOOK_SECONDS = 0.02
_SCANS_SHARE = 300
"""A scan is followed by a pause this many times as long: it takes a third of a percent of a core at most."""
_GIT_LOOK_SECONDS = 2.0
_OVERSLEPT_SECONDS = 1.0
_CLOSE_SECONDS = 2.0
_FIRST_METRICS_SECONDS = 0.1
"""After which a generation that went live is asked for its metrics: first it shall do what it is here for."""
_EXTENSION_SECONDS = 10.0
"""What the service manager is asked for with each look, while a start, a reload or a stop goes on."""
_SWITCH_SECONDS = 0.0005
"""For how long who writes metrics keeps the interpreter from the loop; a tenth of what is usual. With less,
on a busy machine, each of many more switches would wait for a processor."""


class Service:
    """One supervisor, from its start to its stop.

    Args:
        settings: what to run and how.
        output: takes what children write, and our own log.
        reread: returns the settings as they are now; raises UsageError.
        compiler: for the bytecode of the tree.
        inherited: the environment to pass on to children.
        estate: what another image of this supervisor has left; None at its start.
        forerunner: what the first generation may become.

    Raises:
        SupervisorError: it cannot start; nothing was started.
    """

    _exit_code = 0

    def __init__(
        self,
        settings: Settings,
        output: Output,
        reread: Callable[[], Settings],
        compiler: Compiler,
        *,
        inherited: Mapping[str, str] = os.environ,
        estate: Estate | None = None,
        forerunner: Forerunner | None = None,
    ) -> None:
        inherited = dict(inherited)
        notify_path = settings.runtime_dir / NOTIFY_SOCKET
        self._configuration = Configuration(settings, reread, inherited, notify_path)
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self._output = output
        self._control = ControlServer(
            settings.runtime_dir, self._selector, self._command, estate.control if estate else None
        )
        self._notify_socket = NotifySocket(notify_path, estate.notify_socket if estate else None)
        self._selector.register(self._notify_socket, selectors.EVENT_READ, self._notified)
        self._state_lock = estate.state_lock if estate else lock.take(settings.state_dir, "--state-dir")
        self._blobs = _open_blobs(settings.state_dir)
        self._checkout = Checkout(settings.tree)
        self._dirty = Dirty(self._selector, inherited)
        self._watcher = Watcher(settings.tree, self._wake, settings.runtime_dir / "watch")
        self._notifier = Notifier(inherited, estate.owed if estate else ())
        metrics_registry = registry()
        self._child_metrics = ChildMetrics(estate.child_metrics if estate else None)
        self._reporting = Reporting(metrics_registry, self._notifier, estate.reporting if estate else None)
        self._scribe = Scribe()
        self._history = History(settings.state_dir / "history.db", self._scribe)
        self._pipeline = Pipeline(
            tree=settings.tree,
            blobs=self._blobs,
            compiler=compiler,
            repository=self._checkout,
            quiet_seconds=settings.quiet_seconds,
            rehash_seconds=settings.rehash_interval_seconds,
            finished=self._reload_finished,
            left=lambda tree: self.happened(events.TreeLeft(tree)),
            quarantined=self._quarantined,
        )
        self._zygote = Zygote(self._selector)
        self._fleet = Fleet(
            target=settings.target,
            blobs=self._blobs.blobs,
            selector=self._selector,
            notify_socket=self._notify_socket.path,
            output=output,
            helpers=self._helpers,
            environment=self._configuration.environment_of,
            disk=lambda: self._pipeline.disk,
            prints=lambda: self._pipeline.prints,
            zygote=self._zygote,
            happened=self.happened,
            metrics=self._child_metrics.update,
            suspected=self._suspected,
            estate=estate.fleet if estate else None,
            forerunner=forerunner,
        )
        self._chronicle = Chronicle(
            settings.state_dir / "state.json", self._history, self._scribe, self._fleet
        )
        self._commands = Commands(
            self,
            fleet=self._fleet,
            pipeline=self._pipeline,
            blobs=self._blobs,
            checkout=self._checkout,
            history=self._history,
            output_log=settings.state_dir / CHILD_LOG,
        )
        self._starter = Starter(
            fleet=self._fleet,
            pipeline=self._pipeline,
            blobs=self._blobs,
            selector=self._selector,
            happened=self.happened,
            later=self.later,
        )
        self._succession = Succession(
            self,
            estate,
            scratch=settings.runtime_dir,
            environment=inherited,
            selector=self._selector,
        )
        self._manifests: dict[str, Manifest] = {}
        self._events: collections.deque[tuple[events.Event, Reload | None]] = collections.deque()
        self._held: list[events.Attested | events.Exited] = []
        """What candidates at their gates have shown while the tree had not come to rest."""
        self._reloads: dict[int, Reload] = {}
        self._launching: Reload | None = None
        self._lived = Reload("start", 0.0)
        self._job: CompileJob | None = None
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._last_live = 0
        self._live_is_new = self._is_untidy = False
        self._changed = True
        self._housekeeping_at = self._git_at = self._scan_at = self._verify_at = self._suspect_at = 0.0
        self._git_facts: dict[str, Any] | None = None
        self._turned_at = self._served_at = time.monotonic()
        self._ailing: str | None = None
        self._status: dict[str, Any] = {}
        self._estate = estate
        self._state = self._adopt(estate) if estate is not None else self._recall()
        self._facts = Published({}, None, None, settings)
        self._web = WebServer(
            settings.listen,
            lambda: generate_latest(metrics_registry) + self._child_metrics.exposition(),
            self._published,
            Page(lambda: self._facts, self._history, self._child_metrics),
            allowed_hosts=lambda: self._settings.allowed_hosts,
            listener=estate.web if estate else None,
        )

    @property
    def _settings(self) -> Settings:
        return self._configuration.settings

    def _recall(self) -> lifecycle.State:
        """Take over what an earlier supervisor of this state directory knew and left behind."""
        state, known, problem = self._chronicle.recall()
        if problem is not None:
            log.error("%s", problem)
            self._scribe.fail("load the state", problem)
        self._sweep_earlier(known)
        for tree in state.known_good:
            try:
                kept = self._blobs.get_manifest(tree)
            except BlobError as error:
                log.warning("a known good tree cannot be started again: %s", error)
                continue
            if kept.roots == self._settings.tree.roots:  # Else it is what ran here before --watch changed.
                self._manifests[tree] = kept
        usable = tuple(tree for tree in state.known_good if tree in self._manifests)
        return lifecycle.State(known_good=usable, quarantine=state.quarantine, next_number=state.next_number)

    def _sweep_earlier(self, known: Remembered) -> None:
        recorded = [
            Identity(process.pid, process.start_ticks, process.boot_id) for process in known.processes
        ]
        swept = orphans.sweep_earlier(self._notify_socket.path, recorded)
        if swept.killed:
            log.warning("killed what an earlier supervisor left behind: %s", ", ".join(swept.killed))
        if swept.left:
            log.error("an earlier supervisor left what cannot be killed: %s", ", ".join(swept.left))

    # --- the loop -----------------------------------------------------------------------------------------

    def run(self) -> int | Estate:
        """Serve until the operator stops it; return the exit status.

        Or until it is to be replaced: then nothing is ended, and what is returned is for another image.
        """
        orphans.become_subreaper()
        sys.setswitchinterval(_SWITCH_SECONDS)
        previous = {number: signal.signal(number, _ignore_here) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(self._wake_writer.fileno(), warn_on_full_buffer=False)
        if self._estate is not None:
            self._succeed(self._estate)
        try:
            self._watcher.start()
            log.info("watching %s (%s)", ", ".join(self._settings.tree.roots), self._watcher.health.mode)
            log.info("status at http://%s/, metrics at /metrics", self._web.address)
            if not is_loopback(self._settings.listen[0]):
                log.warning(
                    "listening on %s: whoever reaches it reads status and metrics; use 127.0.0.1, or a proxy "
                    "that asks who it is",
                    self._web.address,
                )
            self._pipeline.ask("start", time.monotonic())
            self._publish(time.monotonic())
            self._web.start()
            self._turned_at = time.monotonic()
            while not self._state.finished and not self._succession.due:
                self._turn()
        finally:
            if self._succession.due:
                signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            else:
                self._notifier.stopping()
            signal.set_wakeup_fd(wakeup)
            for number, handler in previous.items():
                signal.signal(number, handler)
            if not self._succession.due:
                self._close()
        if self._succession.due:
            return self._leave()
        log.info("stopped")
        return self._exit_code

    def _turn(self) -> None:
        """Wait for something, let all concerned look at it, and decide until nothing is left to decide."""
        timeout = self._timeout()
        entered = time.monotonic()
        due = entered + timeout
        for key, _ in self._selector.select(timeout):
            self._changed = True
            key.data()
        now = time.monotonic()
        slept = (now - due) + (entered - self._turned_at)  # While it waited, or in the middle of its work.
        self._turned_at = now
        if slept > _OVERSLEPT_SECONDS:
            log.warning("the supervisor stood still for %.1f s; nobody's silence counts", slept)
            self._events.appendleft((events.Slept(slept), None))
            self._served_at += slept
        hints = self._watcher.take()
        self._pipeline.hint(hints, now)
        if hints and not self._pipeline.paused:
            self._fleet.prepare()
        doubt = self._watcher.doubt()
        if doubt is not None:
            log.warning("every file is read again: %s", doubt)
            self._pipeline.scan(now, whole=True)
        self._pipeline.trusting = self._watcher.hears_everything
        self._dirty.turn(now)
        self._zygote.reap()
        self._fleet.reap(now)
        self._run_timers(now)
        self._collect_job(now)
        self._starter.collect(now, self._settings.ready_timeout_seconds)
        self._decide()  # What was built is on its way before its reload is taken further.
        found = self._pipeline.advance(
            now, live=self._live_manifest, candidate=self._candidate_reload, outdated=self._outdated
        )
        if found:
            self.happened(events.TreeUnchanged(self._state.live.tree if self._state.live else ""))
        self._follow_job()
        self._see_tree()
        deadline = self._state.deadline()
        if deadline is not None and deadline <= now:
            self.happened(events.Tick())
        self._release_held(now)
        self._decide()
        # Deciding took its time, and what follows counts times that must not run backwards.
        now = time.monotonic()
        self._count_downtime(now)
        if now >= self._housekeeping_due_at:
            self._housekeep(now)
        self._zygote.turn(now, idle=self._is_idle, enabled=self._settings.zygote)
        self._begin_ahead()
        if self._changed:
            self._publish(now)
        self._succession.advance(now)

    def _begin_ahead(self) -> None:
        """Let the next generation import its code while that is judged, if nothing else is under way."""
        unjudged, state = self._pipeline.unjudged, self._state
        if unjudged is None:
            return
        if state.live is None:
            with contextlib.suppress(OSError):  # The start meets it again, and tells.
                self._blobs.put_manifest(unjudged)
        elif state.candidate is None and not state.stopping and self._blobs.holds(unjudged):
            # Else they are kept anew when it is launched.
            self._fleet.begin(state.next_number, unjudged, self._blobs.manifest_file(unjudged))

    @property
    def _is_idle(self) -> bool:
        """Whether there is time for what nobody waits for."""
        state = self._state
        busy = self._pipeline.busy or self._held or state.candidate or state.draining or state.stopping
        return state.live is not None and not busy

    @property
    def _housekeeping_due_at(self) -> float:
        hurried = self._state.candidate is not None or self._pipeline.job is not None
        return self._housekeeping_at + (_HOUSEKEEPING_WAITS_SECONDS if hurried else 0.0)

    def _timeout(self) -> float:
        if self._events:
            return 0.0
        now = time.monotonic()
        times = [
            self._housekeeping_due_at,
            self._state.deadline(),
            self._pipeline.deadline(),
            self._succession.deadline,
        ]
        times += [self._fleet.deadline(now), *(at for at, _ in self._timers)]
        if self._held and not self._pipeline.busy:
            times.append(now + _GATE_LOOK_SECONDS)
        times += [job.deadline for job in self._starter.jobs]
        return max(0.0, min(at for at in times if at is not None) - now)

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
            try:
                self.ask_reload("signal")
            except UsageError as error:
                log.warning("nothing was reloaded: %s", error)
                self._notify_reloading()
                self._notify_reloaded()
        if signal.SIGUSR2 in numbers:
            log.info("SIGUSR2: replace the supervisor in place")
            try:
                self.ask_reexec()
            except SupervisorError as error:
                log.warning("the supervisor was not replaced: %s", error)
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            log.info("stop, by signal")
            self.happened(events.StopRequested())

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
            self._pipeline.scan(now)
            costly = self._pipeline.scan_seconds * _SCANS_SHARE
            self._scan_at = now + max(self._settings.scan_interval_seconds, costly)
            self._read_environment_again()
            self._succession.look()
            if self._state.live is not None and self._state.candidate is None and self._state.retry is None:
                self._pipeline.reconsider(now, self._state.live.tree)
        live = self.live
        if live is not None and now >= self._verify_at:
            self._verify_at = now + self._settings.verify_interval_seconds
            self._fleet.attest(live.number)
        if self._pipeline.busy or now >= self._git_at:
            self._git_at = now + _GIT_LOOK_SECONDS
            self._follow_git(now)
        self._fleet.look()
        self._pipeline.prepare()
        if self._is_untidy and not self._pipeline.busy:
            self._collect_garbage()
        self._hold_to_limits(live, self._reporting.sample(live))
        self._prove_health(now)

    def _prove_health(self, now: float) -> None:
        """Tell the service manager that all is well, as far as that is proven, and how long it is to wait."""
        policy, state = self._configuration.policy, self._state
        if health.underway(state, busy=self._pipeline.busy):
            self._notifier.extend(_EXTENSION_SECONDS)
        if not self._last_live:
            return  # Its watchdog begins with READY=1; before that the time to start is its measure.
        broken = None if self._events else health.broken(policy, state, self._fleet.numbers, now)
        if broken is not None:
            log.critical("%s; the service manager is asked to start everything anew", broken)
            self._notifier.status(f"broken: {broken}")
            self._notifier.broken()
            return
        live = self.live
        if self._is_serving and not (live is not None and live.child.stopped):
            self._served_at = now
        before = self._ailing
        self._ailing = health.ailing(policy, state, now - self._served_at, self._watcher.blind)
        if self._ailing is None:
            self._notifier.alive()
        elif before is None:
            log.error(
                "%s; the service manager's watchdog is not told any more that all is well", self._ailing
            )

    def _hold_to_limits(self, live: Running | None, memory_bytes: int | None) -> None:
        if live is None:
            return
        if self._settings.type == "simple" and not live.child.stopped:
            self.happened(events.Beat(live.number))  # It has no way to say so itself.
        limit = self._settings.max_memory_bytes
        if limit is not None and memory_bytes is not None and memory_bytes > limit:
            used = f"it uses {memory_bytes} bytes of memory, --max-memory is {limit}"
            self.happened(events.Exceeded(live.number, "memory", used))

    # --- settings -----------------------------------------------------------------------------------------

    def ask_reload(
        self, trigger: str, uid: int | None = None, on_finish: Callable[[Reload], None] | None = None
    ) -> None:
        """Read settings, environment and the whole tree again, and reload."""
        renew = self._configuration.read_again()
        self._pipeline.quiet_seconds = self._settings.quiet_seconds
        self._pipeline.rehash_seconds = self._settings.rehash_interval_seconds
        if renew:
            log.info("settings or environment have changed: a new generation takes them over")
        self._notify_reloading()
        self._pipeline.ask("config" if renew else trigger, time.monotonic(), on_finish, uid=uid, renew=renew)

    def _notify_reloading(self) -> None:
        """Tell the service manager of a reload; one that asked for it by signal waits for the answer."""
        if self._last_live and not self._state.stopping:
            self._notifier.reloading()

    def _notify_reloaded(self) -> None:
        """End what was told, also while nothing is live: a service that was ready once stays so for it."""
        if (self._last_live or self._state.live is not None) and not self._state.stopping:
            self._notifier.ready()

    def _read_environment_again(self) -> None:
        """Notice that the environment file was edited; a broken one changes nothing."""
        if self._state.paused:
            return
        try:
            changed = self._configuration.read_environment_again()
        except UsageError as error:
            self._reporting.setting_problem(str(error))
            return
        self._reporting.setting_problem(None)
        if changed:
            log.info("the environment has changed: a new generation takes it over")
            self._pipeline.ask("config", time.monotonic(), renew=True, at_once=False)

    # --- pipeline -----------------------------------------------------------------------------------------

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
            reload = built.reload
            self.happened(events.TreeReady(built.manifest.digest, reload.trigger, reload.renew), reload)

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

    def _helpers(self) -> Collection[int]:
        waiting = [job.pid for job in self._starter.jobs if job.pid is not None]
        others = (
            self._zygote.pids,
            self._fleet.forerunners,
            self._pipeline.helpers,
            self._dirty.pids,
            self._succession.pids,
        )
        return [*waiting, *(pid for pids in others for pid in pids)]

    def _follow_git(self, now: float) -> None:
        """Bring git's facts up to date."""
        moving = self._checkout.is_changing() or self._pipeline.busy
        repository = self._checkout.repository()
        if repository is None:
            self._git_facts = None
            return
        head, disk = repository.head(), self._pipeline.disk
        if not moving:
            self._dirty.follow(repository, (head, disk.digest if disk else None, repository.written()), now)
        self._git_facts = {
            "commit": head.commit,
            "branch": head.branch,
            "dirty": None if moving else self._dirty.value,
        }

    def _see_tree(self) -> None:
        """Lift the quarantine of what is no longer on disk."""
        disk = self._pipeline.disk
        if disk is not None and self._state.quarantine.keys() - {disk.digest}:
            self.happened(events.TreeSeen(disk.digest))

    def _quarantined(self, tree: str) -> tuple[Reason | None, str] | None:
        fault = self._state.quarantine.get(tree)
        return (fault.reason, fault.detail) if fault is not None else None

    def _reload_finished(self, reload: Reload) -> None:
        """Tell everybody of a reload that has its outcome, those who asked for it last."""
        head = self._checkout.head_of(reload.tree)
        reload.commit, reload.branch = head.commit, head.branch
        reload.previous_commit = self._checkout.head_of(reload.previous_tree).commit
        self._reporting.reload(reload)
        self._chronicle.reload(reload)
        self._notify_reloaded()
        if reload.outcome == "rejected" and reload.generation is None:
            self.happened(events.TreeRejected())
        now = time.monotonic()
        self._follow_git(now)
        self._publish(now)
        for call in reload.on_finish:
            call(reload)

    # --- lifecycle ----------------------------------------------------------------------------------------

    def happened(self, event: events.Event, reload: Reload | None = None) -> None:
        """Take an event; it is decided upon in order, after what is being decided now."""
        match event:
            case events.Attested(number):
                self._commands.attested(number)
                if self._is_at_gate(number):
                    self._hold(event)
                    return
            case events.Exited(number, blameless=False) if self._is_at_gate(number):
                self._hold(event)
                return
        self._events.append((event, reload))

    def _hold(self, event: events.Attested | events.Exited) -> None:
        self._reloads[event.number].mark("verify", time.monotonic())
        self._held.append(event)

    def _is_at_gate(self, number: int) -> bool:
        candidate = self._state.candidate
        return candidate is not None and candidate.number == number and candidate.stage is Stage.LAUNCHED

    def _release_held(self, now: float) -> None:
        """Let what was shown at a gate count as soon as the tree has come to rest at what runs there."""
        held, self._held = self._held, []
        for event in held:
            at_gate = self._is_at_gate(event.number) and not self._state.stopping
            if at_gate and not self._pipeline.gate(now, self._reloads[event.number]):
                # It waits for us, or for a running git: that is not its time.
                patience = self._settings.ready_timeout_seconds
                self._events.append((events.Beat(event.number, patience), None))
                self._held.append(event)
                continue
            if at_gate:
                self._reloads[event.number].mark("settle", now)
            self._events.append((event, None))

    def _decide(self) -> None:
        while self._events:
            event, self._launching = self._events.popleft()
            now = time.monotonic()
            self._time_stage(event, now)
            if isinstance(event, events.StopRequested):
                self._succession.refuse("the supervisor stops")
            self._state, actions = lifecycle.step(self._configuration.policy, self._state, event, now)
            for action in actions:
                self._act(action, now)
            if isinstance(event, events.Exited):
                self._configuration.ended(event.number)
                self._child_metrics.end(event.number)
                self._chronicle.ended(event.number)
                if event.error and "PinnedSourceError" in event.error:
                    self._pipeline.heal(now)
            self._follow_live(now)
            self._count_downtime(now)
            self._not_launched(now)
        self._remember()
        if self._live_is_new:
            self._live_is_new, self._is_untidy = False, True
            self.later(_AFTER_LIVE_SECONDS, self._pipeline.prepare)  # The next save may come soon.

    def _remember(self) -> None:
        self._chronicle.remember(
            self._state,
            [
                RecordedProcess(
                    generation=number, pid=found.pid, start_ticks=found.start_ticks, boot_id=found.boot_id
                )
                for number, found in self._fleet.identities.items()
            ],
        )

    def _not_launched(self, now: float) -> None:
        """End a reload that needs no new process: one of its tree is on its way, or we are stopping."""
        reload, self._launching = self._launching, None
        if reload is None:
            return
        candidate = self._candidate_reload
        if candidate is not None and reload.tree in {None, candidate.tree}:
            candidate.on_finish += reload.on_finish  # Who asked for this one hears how that one ends.
            reload.on_finish = []
        fault = self._state.quarantine.get(reload.tree or "")
        if self._state.stopping:
            reload.finish("superseded", now, detail="by the operator's stop")
        elif reload.trigger in AUTOMATIC_TRIGGERS and self._state.paused:
            reload.finish("superseded", now, detail="by the operator's pause")
        elif reload.trigger in AUTOMATIC_TRIGGERS and fault is not None:
            reload.finish("rejected", now, fault.reason or "crash", f"quarantined: {fault.detail}")
        else:
            reload.finish("unchanged", now)
        self._reload_finished(reload)

    def _time_stage(self, event: events.Event, now: float) -> None:
        """Mark the end of the stage of a reload that an event of the candidate ends."""
        match event:
            case events.Imported(number):
                stage = "launch"
            case events.Attested(number):
                stage = "verify"
            case events.Ready(number):
                stage = "handover"
            case _:
                return
        if self._state.candidate is not None and self._state.candidate.number == number:
            self._reloads[number].mark(stage, now)

    def _act(self, action: Action, now: float) -> None:  # noqa: C901 -- a table
        match action:
            case events.Launch():
                self._launch(action, now)
            case events.Attest(number, delay_seconds) if delay_seconds:
                self.later(delay_seconds, lambda: self._fleet.attest(number))
            case events.Attest(number):
                self._fleet.attest(number)
            case events.Go(number):
                self._fleet.go(number)
            case events.Dump(number):
                self._fleet.dump(number)
                self._starter.cancel(number)
            case events.Terminate(number):
                self._fleet.terminate(number)
            case events.Kill(number):
                self._fleet.kill(number)
                self._starter.cancel(number)
            case events.Report():
                self._report(action, now)
            case events.Restarting():
                running = self._fleet.get(action.number)
                self._reporting.restarting(action)
                self._chronicle.restart(action, running.manifest.digest if running else None)
            case events.Drained():
                self._chronicle.drained(action)
            case events.Promoted():
                self._ask_for_modules()
                self._reporting.promoted(action)
                self._chronicle.promoted(action)

    def _launch(self, action: events.Launch, now: float) -> None:
        reload, self._launching = self._launching, None
        if reload is None or reload.tree not in {None, action.tree}:
            self._launching = reload
            reload = Reload(action.trigger, now)
        manifest = self._manifests[action.tree]
        before = self._live_manifest or self._manifests.get(self._state.served or "")
        reload.tree, reload.generation = action.tree, action.number
        reload.previous_tree = before.digest if before else self._state.served
        if before is not None:  # While it was built, nothing may have been live.
            reload.paths = before.changes(manifest)
        reload.previous_generation = self._last_live or None
        self._reloads[action.number] = reload
        self._configuration.started(action.number)
        self._starter.start(action.number, manifest, now)

    def _report(self, report: events.Report, now: float) -> None:
        reload = self._reloads.pop(report.number, None)
        if reload is None:  # It went live, and has failed on probation.
            lived = self._lived
            reload = Reload(report.trigger or "crash", now, generation=report.number)
            reload.tree, reload.paths, reload.previous_tree = lived.tree, lived.paths, lived.previous_tree
        if report.outcome == "superseded" and (reload is self._launching or self._pipeline.has(reload)):
            reload.generation = None
            return  # It goes on, under another number, with what is on disk now.
        if reload.outcome is not None:
            return  # What is on disk now was known already.
        if report.outcome == "superseded" and self._launching is not None:
            reload.make_way(self._launching)
        if report.outcome in {"rejected", "rolled_back"} and reload.tree is not None:
            self._pipeline.rejected(reload.tree, f"{report.reason}: {report.detail}")
        if report.outcome == "live":
            reload.mark("handover", now)
            self._lived = reload
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
        self.later(_AFTER_LIVE_SECONDS, self._ask_for_modules)
        self.later(_FIRST_METRICS_SECONDS, lambda: self._fleet.ask_for_metrics(live.number))
        self._notifier.ready()
        self._live_is_new = True

    def _ask_for_modules(self) -> None:
        """Ask the live generation what the next ones will need."""
        live = self.live
        if live is None:
            return
        try:
            file = self._blobs.put_manifest(live.manifest)
        except OSError as error:
            log.warning("the manifest of generation %d cannot be written: %s", live.number, error)
        else:
            self._fleet.ask_for_modules(live.number, file)

    def _collect_garbage(self) -> None:
        """Forget manifests and blobs that nothing needs any more."""
        self._is_untidy = False
        kept = [manifest for tree, manifest in self._manifests.items() if tree in self._state.trees]
        self._manifests = {manifest.digest: manifest for manifest in (*kept, *self._fleet.manifests)}
        needed = [*self._manifests.values(), *([self._pipeline.disk] if self._pipeline.disk else [])]
        self._blobs.collect(needed)
        self._pipeline.forget(needed)

    # --- the generations as others see them ---------------------------------------------------------------

    @property
    def state(self) -> lifecycle.State:
        """What has been decided."""
        return self._state

    @property
    def live(self) -> Running | None:
        """The process of the generation that serves."""
        return self._fleet.get(self._state.live.number if self._state.live else None)

    @property
    def _live_manifest(self) -> Manifest | None:
        return self._manifests[self._state.live.tree] if self._state.live else None

    @property
    def _outdated(self) -> bool:
        """Whether the live generation was started with other settings than those of now."""
        live = self._state.live
        return live is not None and self._configuration.is_outdated(live.number)

    @property
    def _candidate_reload(self) -> Reload | None:
        return self._reloads[self._state.candidate.number] if self._state.candidate else None

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

    @property
    def _is_serving(self) -> bool:
        """Whether somebody works: one that drains still does, one that said READY=1 does already."""
        state = self._state
        ready = state.candidate if state.candidate is not None and state.candidate.ready else None
        served = next((g for g in (*state.draining, state.live) if g and g.number == self._last_live), None)
        processes = [self._fleet.get(g.number) for g in (served, ready) if g is not None]
        return any(running is not None and not running.over for running in processes)

    def _count_downtime(self, now: float) -> None:
        self._reporting.serving(now, serving=self._is_serving, ever=self._last_live > 0)

    # --- replacing this program in place ------------------------------------------------------------------

    def ask_reexec(self, client: Client | None = None) -> None:
        """Have this program replaced by the one on disk; raises SupervisorError if it cannot be."""
        if self._state.stopping:
            raise RefusedError("the supervisor stops")
        self._succession.ask(client)

    def check_settings(self) -> None:
        """Raise UsageError if the settings as they are now need a new start of the supervisor."""
        self._configuration.check()

    def busy_with(self) -> str | None:
        """Return what must not be interrupted by a replacement, None if there is nothing."""
        state = self._state
        if state.candidate is not None:
            return f"generation {state.candidate.number} is being started"
        if state.draining or (state.live is not None and state.live.killed_for is not None):
            return "a generation is being stopped"
        if self._pipeline.busy or self._starter.jobs:
            return "a change of the tree is being looked at"
        live = state.live.number if state.live is not None else None
        if self._events or self._commands.busy or any(number != live for number in self._fleet.numbers):
            return "something is being waited for"
        return None

    def stop_writing(self) -> None:
        """Bring to rest what could stall, while there is a way back.

        Raises:
            RefusedError: it stalls.
        """
        if not self._scribe.flush(_CLOSE_SECONDS):
            raise RefusedError("the state directory does not take what is to be written")
        if not self._output.stop():
            raise RefusedError("the log file of the children does not take what is to be written")

    def describe(self, listener: int = -1, unwritten: tuple[Record, ...] = ()) -> Estate:
        """Return what this image would leave to the next one now.

        Args:
            listener: descriptor of HTTP's socket, once that is let go.
            unwritten: records that the disk has not taken, once that is known.
        """
        state, lived = self._state, self._lived
        return Estate(
            image=self._succession.next_image,
            began_ns=time.time_ns(),
            left_at=time.monotonic(),
            uid=self._succession.uid,
            asked=self._succession.asked,
            state=state,
            last_live=self._last_live,
            lived=Lived(lived.tree, lived.paths, lived.previous_tree),
            manifests=tuple(self._manifests[tree] for tree in state.trees if tree in self._manifests),
            heads=self._checkout.heads,
            unwritten=unwritten,
            owed=self._notifier.owed,
            web=listener,
            notify_socket=self._notify_socket.fileno(),
            state_lock=self._state_lock,
            configuration=self._configuration.estate(state.live.number if state.live else None),
            fleet=self._fleet.estate,
            control=self._control.estate,
            output=self._output.estate,
            reporting=self._reporting.estate,
            child_metrics=self._child_metrics.known,
        )

    def _leave(self) -> Estate:
        """Let go of everything without ending it, and return it. Nothing is logged behind the estate."""
        self._keep_signals()
        self._notifier.alive()
        self._pipeline.leave()
        self._dirty.close()
        # Whatever else is a child of this image alone is ended here: the next one adopts generations only.
        self._zygote.close()
        self._watcher.close()
        listener = self._web.leave()
        self._history.close()
        unwritten = self._history.unwritten() if self._scribe.close(_CLOSE_SECONDS) else ()
        estate = self.describe(listener, unwritten)
        self._notifier.close()
        self._fleet.let_go()
        self._control.let_go()
        self._notify_socket.let_go()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        return estate

    def _keep_signals(self) -> None:
        """Send ourselves again what has arrived and was not looked at: blocked as it is, it stays pending."""
        with contextlib.suppress(BlockingIOError):
            for number in SIGNALS.intersection(self._wake_reader.recv(4096)):
                os.kill(os.getpid(), number)

    def _adopt(self, estate: Estate) -> lifecycle.State:
        """Go on from where another image of this supervisor has left off."""
        self._last_live = estate.last_live
        self._manifests = {found.digest: found for found in estate.manifests}
        lived = self._lived
        lived.tree, lived.paths = estate.lived.tree, estate.lived.paths
        lived.previous_tree = estate.lived.previous_tree
        self._checkout.heads.update(estate.heads)
        self._pipeline.paused = estate.state.paused
        if estate.state.live is not None:
            self._configuration.adopt(estate.state.live.number, estate.configuration)
        self._chronicle.recall()
        for record in estate.unwritten:
            self._history.add(record)
        return estate.state

    def _succeed(self, estate: Estate) -> None:
        """Begin as another image than the first: prove anew what runs, and tell those who have asked."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        now = time.monotonic()
        self._events.append((events.Slept(now - estate.left_at), None))
        for running in estate.fleet.running:
            self._starter.judge(running.number, running.manifest, now)
        self._ask_for_modules()
        if self._succession.succeeded(estate, self._control.waiting(estate.asked)):
            self._chronicle.operator("reexec", estate.uid)

    # --- commands -----------------------------------------------------------------------------------------

    def _command(self, client: Client, request: dict[str, Any]) -> None:
        self._commands.handle(client, request)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        """Have the loop call back after a time."""
        self._timers.append((time.monotonic() + seconds, call))

    def status(self) -> Mapping[str, Any]:
        """Return the status document of this moment."""
        self._publish(time.monotonic())
        return self._status

    def operator(self, what: str, uid: int | None) -> None:
        """Note for the record what an operator did."""
        if what == "stop" and self._notifier.is_heard and not self._last_live:
            self._exit_code = EXIT_NEVER_READY
        self._chronicle.operator(what, uid)

    # --- what is published --------------------------------------------------------------------------------

    def _problem(self) -> str | None:
        disk = self._pipeline.disk
        fault = self._state.quarantine.get(disk.digest) if disk is not None else None
        return in_sync_problem(
            live=self.live,
            disk=disk,
            problem=f"quarantined: {fault.detail}" if fault is not None else self._pipeline.problem,
            stopping=self._state.stopping,
            paused=self._state.paused,
            ended=self._reporting.ended,
            writer=str(self._checkout.lock) if self._checkout.lock and self._pipeline.busy else None,
            now=time.monotonic(),
        )

    def _publish(self, now: float) -> None:
        self._changed = False
        live, disk = self.live, self._pipeline.disk
        on_disk = live is not None and disk is not None and live.manifest.digest == disk.digest
        self._status = self._reporting.publish(
            now=now,
            state=self._state,
            live=live,
            commit=self._checkout.head_of(live.manifest.digest).commit if live else None,
            dirty=self._git_facts["dirty"] if self._git_facts and on_disk else None,
            reason=self._problem(),
            listen=self._web.address,
            watch={
                **self._watcher.as_json(),
                "last_scan_age_seconds": round(now - (self._pipeline.scanned_at or now), 3),
            },
            git=self._git_facts,
            zygote=self._zygote.status,
            busy=self._pipeline.busy,
            quarantine=self._chronicle.quarantine_json(self._state),
            converge_seconds=MAX_SETTLE_SECONDS
            + self._settings.ready_timeout_seconds
            + self._settings.stop_timeout_seconds,
            problems=(*self._scribe.problems, *self._checkout.problems),
            own=self._succession.as_json,
        )
        self._facts = Published(self._status, live.verdict if live else None, disk, self._settings)

    def _published(self) -> Mapping[str, Any]:
        """Return the last published status (called from the threads of HTTP)."""
        return {**self._status, "loop_alive": time.monotonic() - self._turned_at < _LOOP_HANGS_SECONDS}

    def _close(self) -> None:
        self._zygote.close()
        self._pipeline.close()
        self._starter.close()
        self._dirty.close()
        self._watcher.close()
        self._web.close()
        self._notify_socket.close()
        self._remember()
        self._history.close()
        if not self._scribe.close(_CLOSE_SECONDS):
            log.error("the state directory does not take what is to be written; its last news are lost")
        self._commands.close()
        self._control.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
        os.close(self._state_lock)


def _open_blobs(directory: Path) -> BlobStore:
    try:
        return BlobStore(directory)
    except OSError as error:
        raise UsageError(f"cannot use {directory}: {error.strerror}; name another --state-dir") from error


def _ignore_here(_number: int, _frame: FrameType | None) -> None:
    """Do nothing: the wake-up descriptor has brought the signal to the loop."""
