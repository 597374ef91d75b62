"""Reporting: what people and machines hear of: log, metrics, the service manager's status line, the document.

The rule: it is told facts and decides nothing. Whatever is worth a log line is counted, too, so that an alert
can find it; whatever is counted can be found in the log with its reason.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct, field
from prometheus_client import CollectorRegistry

from supervisor import health
from supervisor.bytecode import BytecodeReport, shorten
from supervisor.events import Promoted, Restarting
from supervisor.families import Values
from supervisor.fleet import Running
from supervisor.lifecycle import State
from supervisor.metrics import ProcessSampler, SupervisorMetrics
from supervisor.notify import Notifier
from supervisor.reload import Reload
from supervisor.status import sentence, status_document

log = logging.getLogger("wa-supervisor")

_SHORT_DIGEST = 12
_SHOWN_PATHS = 100


class ReportingEstate(Struct, frozen=True):
    """What was told, as it is left to the next image of the supervisor.

    Attributes:
        totals: of the supervisor's own series.
        counted: pid of the live child and its processor time that is in them, in seconds.
        down_since: monotonic time since when nobody serves, None if somebody does.
        ended: see :class:`Reporting`.
    """

    totals: Values = field(default_factory=dict)
    counted: tuple[int | None, float] = (None, 0.0)
    down_since: float | None = None
    ended: str | None = None


class Reporting:
    """What is known from outside about one supervisor.

    Args:
        registry: where the supervisor's own series are registered.
        notifier: towards the service manager.
        estate: what another image of the supervisor has left.
    """

    def __init__(
        self, registry: CollectorRegistry, notifier: Notifier, estate: ReportingEstate | None = None
    ) -> None:
        estate = estate or ReportingEstate()
        self._metrics = metrics = SupervisorMetrics(registry, estate.totals)
        self._notifier = notifier
        self._sampler = ProcessSampler(metrics, estate.counted)
        self._last_reload: Reload | None = None
        self._purged: Sequence[str] = ()
        self._stale: Sequence[str] = ()
        self._unwritable: frozenset[str] = frozenset()
        self._setting_problem: str | None = None
        self.ended = estate.ended
        """One sentence about the last live child that is started again, or replaced, because of a fault."""
        self._in_sync_since: float | None = None
        self._down_since = estate.down_since

    @property
    def estate(self) -> ReportingEstate:
        """What is left to the next image of the supervisor."""
        return ReportingEstate(self._metrics.totals, self._sampler.counted, self._down_since, self.ended)

    def reload(self, reload: Reload) -> None:
        """Tell of a reload that has its outcome."""
        self._last_reload = reload
        self._metrics.reloads.labels(reload.outcome, reload.trigger).inc()
        self._metrics.reload_seconds.observe(reload.total_seconds)
        for stage, seconds in reload.stages.items():
            self._metrics.stage_seconds.labels(stage).observe(seconds)
        if reload.outcome == "rolled_back" or (reload.rollback and reload.outcome == "live"):
            self._metrics.rollbacks.inc()
        level = logging.WARNING if reload.outcome in {"rejected", "rolled_back"} else logging.INFO
        log.log(level, "%s", sentence(reload))

    def bytecode(self, report: BytecodeReport) -> None:
        """Tell of what the compile helper did."""
        self._purged = report.purged
        self._metrics.pyc_purged.inc(len(report.purged))
        if report.purged:
            log.info("purged %d stale bytecode files: %s", len(report.purged), shorten(report.purged))
        if report.error is not None:
            self._metrics.compile_errors.inc()
            return
        before = frozenset() if report.swept else self._unwritable
        self._unwritable = before.union(report.unwritable)
        self._metrics.bytecode_writable.set(not self._unwritable)
        self._stale = sorted(report.stale)
        if report.stale:
            log.warning(
                "bytecode is not writable, OTHER processes may run stale code (ours cannot): %s",
                shorten(report.stale),
            )
        elif report.unwritable:
            log.warning("bytecode is not writable; none of it is stale: %s", shorten(report.unwritable))

    def restarting(self, action: Restarting) -> None:
        """Tell of a live child that is to be replaced because of a fault."""
        self._metrics.child_restarts.labels(action.cause).inc()
        self.ended = (
            f"generation {action.number}: {action.cause} ({action.detail}); "
            f"starting again in {action.wait_seconds:.2f} s"
        )
        log.error("%s", self.ended)

    def promoted(self, action: Promoted) -> None:
        """Tell of a tree that has served its probation."""
        log.info(
            "generation %d has served its probation: tree %s is known good",
            action.number,
            action.tree[:_SHORT_DIGEST],
        )

    def setting_problem(self, problem: str | None) -> None:
        """Tell once of settings that cannot be taken over; what was read before goes on to count."""
        if problem is not None and problem != self._setting_problem:
            log.error("%s; the earlier one goes on to count", problem)
        self._setting_problem = problem

    def serving(self, now: float, *, serving: bool, ever: bool) -> None:
        """Count the time without a child at work.

        Args:
            now: monotonic time.
            serving: whether one is at work now.
            ever: whether one has been; before that it is a start, not a downtime.
        """
        if self._down_since is not None:
            self._metrics.downtime.inc(now - self._down_since)
        self._down_since = None if serving or not ever else now

    def sample(self, live: Running | None) -> int | None:
        """Measure the live child and return its resident memory in bytes; None if that cannot be had."""
        return self._sampler.sample(live.child.pid if live else None)

    def publish(
        self,
        *,
        now: float,
        state: State,
        live: Running | None,
        commit: str | None,
        dirty: bool | None,
        reason: str | None,
        listen: str,
        watch: Mapping[str, Any],
        git: Mapping[str, Any] | None,
        zygote: Mapping[str, Any],
        busy: bool,
        quarantine: Sequence[Mapping[str, Any]],
        converge_seconds: float,
        problems: Sequence[str],
        own: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Bring metrics and the service manager's status line up to date and return the status document.

        ``commit`` and ``dirty`` are of what runs, ``git`` is about the disk.
        """
        if reason is not None:
            self._in_sync_since = None
        elif self._in_sync_since is None:
            self._in_sync_since = now
        self._set_gauges(live, watch, now)
        self._metrics.set_code_info(live.manifest.digest if live else None, commit, dirty=dirty)
        self._metrics.self_outdated.set(own["outdated"])
        self._notifier.status(
            health.words(
                state, code=_code(live, commit, dirty), reason=reason, said=live.status if live else ""
            )
        )
        return status_document(
            pid=os.getpid(),
            state=state,
            live=live,
            commit=commit,
            reason=reason,
            listen=listen,
            last_reload=self._last_reload,
            restarts=self._metrics.restarts(),
            watch=watch,
            git=git,
            zygote=zygote,
            busy=busy,
            quarantine=quarantine,
            converge_seconds=converge_seconds,
            problems=(*problems, *([self._setting_problem] if self._setting_problem else ())),
            bytecode={
                "writable": not self._unwritable,
                "stale": self._stale[:_SHOWN_PATHS],
                "stale_total": len(self._stale),
                "purged": self._purged[:_SHOWN_PATHS],
                "purged_total": len(self._purged),
            },
            own=own,
        )

    def _set_gauges(self, live: Running | None, watch: Mapping[str, Any], now: float) -> None:
        metrics, since = self._metrics, self._in_sync_since
        metrics.in_sync.set(since is not None)
        metrics.converged_seconds.set(0 if since is None else now - since)
        modules = live.verdict.modules if live and live.verdict else ()
        foreign = live.verdict.foreign if live and live.verdict else ()
        wrong = sum(module.state in {"mismatch", "unpinned"} for module in modules)
        metrics.mismatches.set(wrong + len(foreign))
        metrics.child_up.set(live is not None)
        metrics.generation.set(live.number if live else 0)
        metrics.set_watch_mode(watch["mode"])
        metrics.last_scan_age.set(watch["last_scan_age_seconds"])
        metrics.follow(metrics.watch_overflows, watch["overflows"])
        metrics.follow(metrics.watch_restarts, watch["restarts"])
        metrics.follow(metrics.notify_errors, self._notifier.errors_total)


def _code(live: Running | None, commit: str | None, dirty: bool | None) -> str:
    """Return what people call the code that runs."""
    if live is None:
        return ""
    tree = f"tree {live.manifest.digest[:_SHORT_DIGEST]}"
    changed = " with local changes" if dirty else ""
    return f"commit {commit[:_SHORT_DIGEST]}{changed}, {tree}" if commit else tree
