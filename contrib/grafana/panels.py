"""What the dashboard shows: panels as a table, row by row.

The rule: the first row answers the one question this product exists for -- is the running code the code on
disk? since when, which commit, and were LIDs stored today -- and everything below says why. Only queries that
any Prometheus answers which scrapes the endpoint: none needs our recording rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

AT: Final = 'instance=~"$instance"'
_OF: Final = 'instance=~"$instance",project=~"$project"'

Kind: TypeAlias = Literal["stat", "lines", "bars", "states", "gauge"]


@dataclass(frozen=True)
class Panel:
    """What one panel shows."""

    title: str
    description: str
    kind: Kind
    queries: tuple[tuple[str, str], ...]
    """PromQL, and the legend of its series."""
    unit: str = "short"
    wide: int = 6
    """Of 24 columns."""
    tall: int = 7
    words: tuple[tuple[str, str, str], ...] = ()
    """What values mean: value, text, colour."""
    steps: tuple[tuple[float, str], ...] = ()
    """From which value on it has which colour; green below."""
    since: str | None = None
    """Shows this span of time, whatever span the dashboard shows."""
    names: bool = False
    """Shows the names of the series, not their values."""


_RED_ABOVE_0: Final = ((1.0, "red"),)
_YES: Final = (("0", "NO", "red"), ("1", "yes", "green"))
_UP: Final = (("0", "down", "red"), ("1", "up", "green"))


def _rise(series: str, by: str, span: str = "$__rate_interval") -> str:
    return f"sum by ({by}) (increase({series}[{span}]))"


def _rate(series: str, by: str) -> str:
    return f"sum by ({by}) (rate({series}[$__rate_interval]))"


def _short(series: str, label: str) -> str:
    return f'label_replace({series}, "{label}", "$1", "{label}", "(.{{12}}).*")'


ROWS: Final[tuple[tuple[str, tuple[Panel, ...]], ...]] = (
    (
        "Is the running code the code on disk?",
        (
            Panel(
                "The running code is the code on disk",
                "Attested: each source that runs has the file's digest. `wa-supervisor status` says why not.",
                "stat",
                ((f"min(wa_supervisor_code_in_sync{{{AT}}})", "in sync"),),
                words=_YES,
                wide=5,
                tall=5,
            ),
            Panel(
                "Since when",
                "Start of the present stretch of time in sync; empty while it is not.",
                "stat",
                ((f"max(time() - (wa_supervisor_converged_seconds{{{AT}}} > 0)) * 1000", "since"),),
                unit="dateTimeFromNow",
                wide=4,
                tall=5,
            ),
            Panel(
                "Which commit",
                "Commit where git knows it, and the beginning of the digest of all sources.",
                "stat",
                (
                    (
                        _short(_short(f"wa_supervisor_code_info{{{AT}}}", "tree"), "commit"),
                        "{{commit}} tree {{tree}} dirty {{dirty}}",
                    ),
                ),
                names=True,
                wide=5,
                tall=5,
            ),
            Panel(
                "LIDs stored today",
                "Rows that were written today with a LID where a phone belongs. Any is an alarm.",
                "stat",
                (
                    (
                        f'ceil(sum(increase(wa_monitor_drops_stored_total{{identity="lid",{_OF}}}[$__range])))',
                        "LIDs",
                    ),
                ),
                steps=_RED_ABOVE_0,
                since="now/d",
                wide=4,
                tall=5,
            ),
            Panel(
                "LIDs in the table now",
                "`wa-monitor repair-lids` puts the phones in their place.",
                "stat",
                ((f"sum(wa_monitor_lid_rows{{{_OF}}})", "rows"),),
                steps=_RED_ABOVE_0,
                wide=3,
                tall=5,
            ),
            Panel(
                "Alerts firing",
                "Of the rules in contrib/grafana/prometheus, where Prometheus has loaded them.",
                "stat",
                ((f'count(ALERTS{{alertstate="firing",job="wa-monitor",{AT}}}) or vector(0)', "alerts"),),
                steps=_RED_ABOVE_0,
                wide=3,
                tall=5,
            ),
        ),
    ),
    (
        "Reloads",
        (
            Panel(
                "Reloads by outcome",
                "unchanged: the content was live. rejected, rolled_back: the last good code serves.",
                "bars",
                ((_rise(f"wa_supervisor_reloads_total{{{AT}}}", "outcome"), "{{outcome}}"),),
                wide=8,
            ),
            Panel(
                "Time from change to outcome",
                "Half of the reloads, and all but one in twenty, took at most so long.",
                "lines",
                tuple(
                    (
                        f"histogram_quantile({share}, "
                        + _rise(f"wa_supervisor_reload_seconds_bucket{{{AT}}}", "le", "$__range")
                        + ")",
                        name,
                    )
                    for share, name in ((0.5, "half"), (0.95, "19 of 20"))
                ),
                unit="s",
                wide=8,
            ),
            Panel(
                "Mean time of each stage",
                "Over the time shown.",
                "gauge",
                (
                    (
                        _rise(f"wa_supervisor_reload_stage_seconds_sum{{{AT}}}", "stage", "$__range")
                        + " / ("
                        + _rise(f"wa_supervisor_reload_stage_seconds_count{{{AT}}}", "stage", "$__range")
                        + " > 0)",
                        "{{stage}}",
                    ),
                ),
                unit="s",
                wide=8,
            ),
            Panel(
                "Outcomes and what asked for them",
                "Over the time shown.",
                "gauge",
                (
                    (
                        "round("
                        + _rise(f"wa_supervisor_reloads_total{{{AT}}}", "outcome, trigger", "$__range")
                        + ") > 0",
                        "{{outcome}} by {{trigger}}",
                    ),
                ),
                wide=12,
            ),
            Panel(
                "Generation",
                "Number of the process that serves; each reload that goes live adds one.",
                "lines",
                ((f"wa_supervisor_generation{{{AT}}}", "{{instance}}"),),
                wide=6,
            ),
            Panel(
                "Rollbacks, sources that do not compile, stale bytecode removed",
                "",
                "bars",
                (
                    (_rise(f"wa_supervisor_rollbacks_total{{{AT}}}", "instance"), "rollbacks"),
                    (_rise(f"wa_supervisor_compile_errors_total{{{AT}}}", "instance"), "compile errors"),
                    (_rise(f"wa_supervisor_pyc_purged_total{{{AT}}}", "instance"), "bytecode removed"),
                ),
                wide=6,
            ),
        ),
    ),
    (
        "The child",
        (
            Panel(
                "A child serves",
                "",
                "states",
                ((f"wa_supervisor_child_up{{{AT}}}", "{{instance}}"),),
                words=_UP,
            ),
            Panel(
                "Restarts by cause",
                "Starts in place of a live child that failed.",
                "bars",
                ((_rise(f"wa_supervisor_child_restarts_total{{{AT}}}", "cause"), "{{cause}}"),),
            ),
            Panel(
                "Time without a child",
                "Seconds of downtime in each step.",
                "bars",
                ((_rise(f"wa_supervisor_downtime_seconds_total{{{AT}}}", "instance"), "{{instance}}"),),
                unit="s",
            ),
            Panel(
                "Code that is not of its source",
                "Modules and functions of the live child that the attestation did not find in the files.",
                "stat",
                ((f"sum(wa_supervisor_code_mismatches{{{AT}}})", "mismatches"),),
                steps=_RED_ABOVE_0,
            ),
            Panel(
                "Memory",
                "Resident.",
                "lines",
                ((f"wa_supervisor_child_resident_memory_bytes{{{AT}}}", "{{instance}}"),),
                unit="bytes",
                wide=8,
            ),
            Panel(
                "Processor",
                "Share of one core.",
                "lines",
                ((_rate(f"wa_supervisor_child_cpu_seconds_total{{{AT}}}", "instance"), "{{instance}}"),),
                unit="percentunit",
                wide=8,
            ),
            Panel(
                "Open files and threads",
                "",
                "lines",
                (
                    (f"wa_supervisor_child_open_fds{{{AT}}}", "{{instance}} open files"),
                    (f"wa_supervisor_child_threads{{{AT}}}", "{{instance}} threads"),
                ),
                wide=8,
            ),
        ),
    ),
    (
        "The watcher and the supervisor",
        (
            Panel(
                "How changes are noticed",
                "events: at once. partial, polling: by the scan, later. `wa-supervisor status`: the remedy.",
                "states",
                ((f"wa_supervisor_watch_mode{{{AT}}}", "{{mode}}"),),
                words=(("0", "no", "transparent"), ("1", "yes", "blue")),
            ),
            Panel(
                "Age of the last look at the whole tree",
                "",
                "lines",
                ((f"wa_supervisor_last_scan_age_seconds{{{AT}}}", "{{instance}}"),),
                unit="s",
            ),
            Panel(
                "Overflows and restarts of the watcher, messages to systemd that failed",
                "",
                "bars",
                (
                    (_rise(f"wa_supervisor_watch_overflows_total{{{AT}}}", "instance"), "overflows"),
                    (_rise(f"wa_supervisor_watch_restarts_total{{{AT}}}", "instance"), "restarts"),
                    (_rise(f"wa_supervisor_notify_errors_total{{{AT}}}", "instance"), "notify errors"),
                ),
            ),
            Panel(
                "Bytecode can be written",
                "If not, other processes may run stale bytecode; the child cannot.",
                "stat",
                ((f"min(wa_supervisor_bytecode_writable{{{AT}}})", "writable"),),
                words=_YES,
                wide=3,
            ),
            Panel(
                "The supervisor itself is outdated",
                "`wa-supervisor reexec` replaces it in place.",
                "stat",
                ((f"max(wa_supervisor_self_outdated{{{AT}}})", "outdated"),),
                words=(("0", "no", "green"), ("1", "YES", "orange")),
                wide=3,
            ),
        ),
    ),
    (
        "Drops",
        (
            Panel(
                "Drops stored per project, by what stands in the row",
                "pending: the sender is not known yet. lid: an alarm.",
                "bars",
                (
                    (
                        _rise(f"wa_monitor_drops_stored_total{{{_OF}}}", "project, identity"),
                        "{{project}} {{identity}}",
                    ),
                ),
                wide=12,
                tall=8,
            ),
            Panel(
                "New drops and resubmissions",
                "",
                "bars",
                ((_rise(f"wa_monitor_drops_stored_total{{{_OF}}}", "kind"), "{{kind}}"),),
                tall=8,
            ),
            Panel(
                "Messages dealt with",
                "Of enabled projects, a second.",
                "lines",
                ((_rate(f"wa_monitor_messages_total{{{_OF}}}", "project"), "{{project}}"),),
                unit="cps",
                tall=8,
            ),
            Panel(
                "LIDs in the table",
                "Rows that hold a LID now.",
                "lines",
                ((f"wa_monitor_lid_rows{{{_OF}}}", "{{project}}"),),
            ),
            Panel(
                "Drops that wait for their sender",
                "",
                "lines",
                ((f"wa_monitor_lid_pending{{{AT}}}", "{{instance}}"),),
            ),
            Panel(
                "Senders found and rows repaired",
                "",
                "bars",
                (
                    (_rise(f"wa_monitor_lid_resolved_total{{{AT}}}", "instance"), "senders found"),
                    (_rise(f"wa_monitor_lid_repaired_total{{{AT}}}", "instance"), "rows repaired"),
                ),
            ),
            Panel(
                "Rows of another writer",
                "",
                "lines",
                ((f"wa_monitor_foreign_rows{{{_OF}}}", "{{project}}"),),
            ),
        ),
    ),
    (
        "From the bridge to the table",
        (
            Panel(
                "Lag",
                "Age of the newest message of a batch when it was committed.",
                "lines",
                ((f"wa_monitor_message_lag_seconds{{{AT}}}", "{{instance}}"),),
                unit="s",
            ),
            Panel(
                "Rows of the bridge not read yet",
                "",
                "lines",
                ((f"wa_monitor_backlog_rows{{{AT}}}", "{{instance}}"),),
            ),
            Panel(
                "Age of the newest message",
                "A bridge that is silent in an hour that usually has messages is broken.",
                "lines",
                ((f"wa_monitor_bridge_last_message_age_seconds{{{AT}}}", "{{instance}}"),),
                unit="s",
            ),
            Panel(
                "Time of a batch",
                "To decide and to commit; 19 of 20 took at most so long.",
                "lines",
                (
                    (
                        "histogram_quantile(0.95, "
                        + _rise(f"wa_monitor_batch_seconds_bucket{{{AT}}}", "le", "$__range")
                        + ")",
                        "19 of 20",
                    ),
                ),
                unit="s",
            ),
            Panel(
                "Broken at",
                "The part of the way that cannot be used now.",
                "states",
                ((f"wa_monitor_broken{{{AT}}}", "{{component}}"),),
                words=(("0", "works", "green"), ("1", "BROKEN", "red")),
                wide=12,
            ),
            Panel(
                "Failures of reading and writing",
                "",
                "bars",
                ((_rise(f"wa_monitor_store_errors_total{{{AT}}}", "error"), "{{error}}"),),
            ),
            Panel(
                "The projects file is refused",
                "The one before is in force.",
                "stat",
                ((f"max(wa_monitor_projects_refused{{{AT}}})", "refused"),),
                words=(("0", "no", "green"), ("1", "YES", "orange")),
            ),
        ),
    ),
)
