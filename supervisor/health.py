"""Health: whether the service manager may go on to believe that all is well; decided without a clock.

systemd's watchdog is the last resort: it ends the supervisor with all that it has started, and starts it
anew. The rule: **it is kept quiet only by a proof, and called only where a new start may heal more than we.**

- :func:`broken`: what the lifecycle promises does not hold. Nothing that is decided from here on can be
  trusted, so it is called at once (``WATCHDOG=trigger``).
- :func:`ailing`: what was proven is not proven any more. The pings end; if it is not healed before the
  watchdog's time is over, it strikes. A child that is down is ours to heal, with backoff and rollback; when
  that has not brought one that serves within all its bounds, or nothing is on its way to (a child that was
  stopped, with ``--watchdog 0``), it is no longer. A watcher that was proven alive in this process and stays
  blind although it was started again is a reason, too. Where events never came, they do not come after a new
  start either: the scan does the work, and the service goes on.

Rejected: pings that end as soon as nobody serves. A start that is slow, or waits for its backoff, would be
interrupted again and again, and a crash loop would take counters, pause and history's view with it.

Source: sd_notify(3), systemd.service(5) ``WatchdogSec=``.
"""

from __future__ import annotations

from collections.abc import Collection

from supervisor.lifecycle import Policy, Stage, State

NOT_YET = "no generation is live yet"
"""Why nothing is in sync, where nothing is wrong."""

_OVERDUE_SECONDS = 10.0
"""How late a decision may be, at most; each turn of the loop looks whether one is due."""


def broken(policy: Policy, state: State, processes: Collection[int], now: float) -> str | None:
    """Return which promise of :mod:`supervisor.lifecycle` does not hold, None if all do.

    Args:
        policy: the operator's rules.
        state: after everything that has happened was decided upon.
        processes: numbers of the generations that have a process.
        now: monotonic time.
    """
    live = state.live
    if live is not None and live.number not in processes:
        return f"generation {live.number} counts as live and has no process"
    if live is not None and not live.attested:
        return f"generation {live.number} counts as live and was never proven"
    working = [g.number for g in state.all if g.was_started and not g.finished]
    if not policy.overlap and len(working) > 1:
        return f"generations {', '.join(map(str, working))} are at work at the same time"
    for generation in state.all:
        if generation.deadline is not None and now - generation.deadline > _OVERDUE_SECONDS:
            late = now - generation.deadline
            return f"generation {generation.number} ({generation.stage.value}) is {late:.0f} s over its time"
    return None


def ailing(policy: Policy, state: State, unserved_seconds: float, blind: str | None) -> str | None:
    """Return why the service manager is not told that all is well, None if it is.

    Args:
        policy: the operator's rules.
        state: what has been decided.
        unserved_seconds: how long no child has been serving; 0 while one does.
        blind: why changes may go unnoticed although a new start could help, or None.
    """
    # The end of the old one, the longest pause, the start of the new one.
    patience = policy.stop_timeout_seconds + policy.backoff_cap_seconds + policy.ready_timeout_seconds
    live = state.live
    heals = state.candidate or state.retry or state.draining or (live is not None and live.deadline)
    if unserved_seconds > (patience if heals else 0.0) and not state.stopping:
        return f"nobody has been serving for {unserved_seconds:.0f} s"
    return blind


def underway(state: State, *, busy: bool) -> bool:
    """Whether something goes on that has a bound of its own, so that the service manager is to wait for it.

    Args:
        state: what has been decided.
        busy: a change of the tree is being looked at.
    """
    drains = any(generation.deadline is not None for generation in state.draining)
    return drains or state.candidate is not None or (busy and not state.stopping)


def words(state: State, *, code: str, reason: str | None, said: str) -> str:
    """Return one line about the service for whoever asks the service manager.

    Args:
        state: what has been decided.
        code: what the live generation runs; empty if there is none.
        reason: why it is not proven that this is what is on disk, None if it is.
        said: what the live child says of itself.
    """
    live, candidate = state.live, state.candidate
    if state.stopping:
        waits = ", ".join(str(generation.number) for generation in state.draining)
        return f"stopping: generation {waits} finishes its work" if waits else "stopping"
    if live is not None:
        serves = f"generation {live.number} serves, {code}"
        text = f"in sync: {serves}" if reason is None else f"NOT in sync: {reason}; {serves}"
        return f"{text}; it says: {said}" if said else text
    does = f"generation {candidate.number} {_DOES[candidate.stage]}" if candidate is not None else ""
    if reason in {None, NOT_YET}:
        return f"starting: {does}" if does else "starting"
    return f"nobody serves: {reason}" + (f"; {does}" if does else "")


_DOES = {
    Stage.LAUNCHED: "is being started and proven",
    Stage.HELD: "waits for its turn",
    Stage.STARTED: "gets ready",
}
