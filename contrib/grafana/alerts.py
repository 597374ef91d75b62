"""The alerts, once: written as rules for Prometheus and as provisioning of Grafana-managed alerts.

usage: alerts.py [FOLDER]    FOLDER, by default this one, gets prometheus/wa-monitor.rules.yml and
provisioning/alerting/wa-monitor.yml.

The rule: a condition is a query that has a value also when all is well, and a threshold. Prometheus gets
`query > threshold`; Grafana gets the query and the threshold apart, as its alerts are made. So neither can
differ from the other, and a query that finds nothing is a mistake that a test can see.

A counter that is first seen above 0 has risen, though `increase()` does not see it: after a start of the
supervisor, or where the target was being scraped before. One that a new Prometheus finds has not.

Templates use the names that Prometheus and Grafana share (`.Labels`), and no `$`: Grafana expands environment
variables in provisioning files.

Sources: https://prometheus.io/docs/practices/rules/ and
https://grafana.com/docs/grafana/latest/alerting/set-up/provision-alerting-resources/file-provisioning/
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any, Final, Literal

import yaml

HEADER: Final = "# Written by contrib/grafana/alerts.py; change that and run `make generate`.\n"
RULES: Final = Path("prometheus", "wa-monitor.rules.yml")
PROVISIONING: Final = Path("provisioning", "alerting", "wa-monitor.yml")
RUNBOOK: Final = "docs/operations.md"
DATASOURCE: Final = "wa-monitor-prometheus"
_LINE: Final = 110
_HISTORY_SECONDS: Final = 600


@dataclass(frozen=True)
class Alert:
    """One condition and what whoever is woken by it has to know."""

    name: str
    severity: Literal["critical", "warning"]
    query: str
    """PromQL that has a value for each instance also when all is well."""
    summary: str
    """One line; `VALUE` stands for what the query says."""
    meaning: str
    command: str
    """The first one to run."""
    tells: str
    """What the command tells, as the end of a sentence."""
    above: float | None = 0
    below: float | None = None
    lasting: str = "0s"
    """For how long it has to hold."""
    record: str | None = None
    """Name under which Prometheus keeps the query's value."""
    no_data: Literal["OK", "Alerting"] = "OK"
    """What Grafana makes of a query that finds nothing."""

    @property
    def comparison(self) -> str:
        """The threshold in PromQL."""
        return f"> {self.above:g}" if self.below is None else f"< {self.below:g}"

    @property
    def description(self) -> str:
        """What it means and what to do first."""
        return f"{self.meaning} First run `{self.command}`: {self.tells}."

    def annotations(self, value: str) -> dict[str, str]:
        """Return summary, description and the link; ``value`` is the template for what the query says."""
        return {
            "summary": self.summary.replace("VALUE", value),
            "description": self.description,
            "runbook_url": f"{RUNBOOK}#{self.name.lower()}",
        }


@dataclass(frozen=True)
class Group:
    """Alerts that are looked at together."""

    name: str
    interval: str | None
    """How often Prometheus looks; its own habit if None."""
    alerts: tuple[Alert, ...]


_LIDS: Final = 'wa_monitor_drops_stored_total{identity="lid"}'
_PENDING: Final = "wa_monitor_lid_pending"


def _increase(series: str, minutes: int, labels: str = "instance, job") -> str:
    return f"sum by ({labels}) (increase({series}[{minutes}m]))"


# Looked at every second: what the alarm is late is then the scrape alone.
LID: Final = Group(
    "wa-monitor-lid",
    "1s",
    (
        Alert(
            name="LidStored",
            severity="critical",
            record="instance_project:wa_monitor_lids_stored:increase5m",
            query=dedent(f"""\
                sum by (instance, job, project) (
                  (
                    ({_LIDS} unless {_LIDS} offset 5m)
                    and on (instance, job) (
                      up offset 5m == 1
                      or time() - process_start_time_seconds < 300
                      and on (instance, job) wa_supervisor_child_up
                    )
                  )
                  or increase({_LIDS}[5m])
                )"""),
            summary="A LID was stored as a phone in {{ .Labels.project }}",
            meaning="Within the last five minutes a row was written that holds a LID where a phone belongs.",
            command="wa-monitor audit",
            tells="it names the rows, the code that stored them and since when; then `wa-supervisor verify`",
        ),
        Alert(
            name="LidRowsStanding",
            severity="warning",
            query="wa_monitor_lid_rows",
            lasting="30s",
            summary="VALUE rows of {{ .Labels.project }} hold a LID where a phone belongs",
            meaning="Whoever wrote them, these drops name nobody that can be called.",
            command="wa-monitor repair-lids --dry-run",
            tells="it says what would become of each; without the option it is done",
        ),
    ),
)

OTHERS: Final = Group(
    "wa-monitor",
    None,
    (
        Alert(
            name="CodeNotInSync",
            severity="critical",
            query="wa_supervisor_code_in_sync",
            above=None,
            below=1,
            lasting="1m",
            summary="The running code of {{ .Labels.instance }} is not provably the code on disk",
            meaning="What was deployed may not be what runs.",
            command="wa-supervisor status",
            tells="it says why",
        ),
        Alert(
            name="ReloadRejected",
            severity="warning",
            record="instance:wa_supervisor_reloads_rejected:increase5m",
            query=_increase('wa_supervisor_reloads_total{outcome="rejected"}', 5),
            summary="A change did not become the running code of {{ .Labels.instance }}",
            meaning="The last good code serves; what is on disk was tried and refused.",
            command="wa-supervisor status",
            tells="the last reload has stage, reason and file",
        ),
        Alert(
            name="RolledBack",
            severity="critical",
            record="instance:wa_supervisor_reloads_rolled_back:increase5m",
            query=_increase('wa_supervisor_reloads_total{outcome="rolled_back"}', 5),
            summary="New code of {{ .Labels.instance }} failed at work and was taken back",
            meaning="The last good code serves again; the new one is quarantined.",
            command="wa-supervisor history -n 5",
            tells="the record has the reason and the last lines that the failed process wrote",
        ),
        Alert(
            name="CrashLoop",
            severity="critical",
            # 2.5: `increase` extrapolates, so that two restarts may count a little more than two.
            query=dedent("""\
                (
                  sum by (instance, job) (
                    increase(wa_supervisor_child_restarts_total{cause=~"crash|hang"}[10m])
                  ) > bool 2.5
                )
                + on (instance, job) (max_over_time(wa_supervisor_child_up[2m]) < bool 1)"""),
            lasting="1m",
            summary="The monitor of {{ .Labels.instance }} does not stay up",
            meaning="It ended or hung three times within ten minutes, or none has served for two.",
            command="wa-supervisor status",
            tells="it says how the last one ended; `wa-supervisor logs -n 50` shows its last words",
        ),
        Alert(
            name="WatcherBlind",
            severity="warning",
            query='wa_supervisor_watch_mode{mode=~"partial|polling"}',
            lasting="1m",
            summary="The watcher of {{ .Labels.instance }} is not told of every change ({{ .Labels.mode }})",
            meaning="Changes are still found by the scan, some seconds later.",
            command="wa-supervisor status",
            tells="it says why and what to do about it",
        ),
        Alert(
            name="NoScrape",
            severity="critical",
            # absent() is 1 where there is no such target at all.
            query='up{job="wa-monitor"} or absent(up{job="wa-monitor"}) - 1',
            above=None,
            below=1,
            lasting="1m",
            no_data="Alerting",
            summary="Prometheus does not reach wa-monitor {{ .Labels.instance }}",
            meaning="It is down, out of reach, or Prometheus was not told of it: all other alerts are blind.",
            command="systemctl status wa-monitor",
            tells="it says whether the supervisor runs; `wa-supervisor status` says where it listens",
        ),
        Alert(
            name="MonitorBehind",
            severity="warning",
            query="wa_monitor_backlog_rows",
            lasting="2m",
            summary="VALUE rows of the bridge have not been read by {{ .Labels.instance }} for two minutes",
            meaning="Messages arrive and are not dealt with. Nothing is lost.",
            command="wa-supervisor status",
            tells="its status line says what the monitor is doing; then `wa-supervisor logs`",
        ),
        Alert(
            name="BridgeSilent",
            severity="critical",
            query="wa_monitor_bridge_last_message_age_seconds * (wa_monitor_bridge_usual_messages > bool 5)",
            above=3600,
            lasting="5m",
            summary="No message for {{ humanizeDuration VALUE }}, in an hour that usually has some",
            meaning="The bridge may run while its connection to WhatsApp is gone. What it misses is lost.",
            command="wa-supervisor status",
            tells="it shows that the monitor looks; then look at the bridge's own log",
        ),
        Alert(
            name="SendersPending",
            severity="warning",
            query=dedent(f"""\
                ({_PENDING} - min_over_time({_PENDING}[6h]) > bool 4)
                + (min_over_time({_PENDING}[1d]) > bool 0)
                * ({_PENDING} offset 1d > bool 0 or {_PENDING} * 0)"""),
            lasting="10m",
            summary="Drops of {{ .Labels.instance }} wait for their sender",
            meaning="Five more than six hours ago, or some for a day: the bridge does not learn the numbers.",
            command="wa-monitor audit",
            tells="it lists them by project, and since when they wait",
        ),
        Alert(
            name="DatabaseDown",
            severity="critical",
            query='wa_monitor_broken{component="database"}',
            lasting="30s",
            summary="The monitor of {{ .Labels.instance }} cannot reach PostgreSQL",
            meaning="No drops are stored. Nothing is lost: they wait in the bridge.",
            command="wa-supervisor status",
            tells="its status line quotes the database's own words",
        ),
        Alert(
            name="MonitorBroken",
            severity="critical",
            # Without a word from the monitor none of its alerts can fire.
            query=dedent("""\
                wa_monitor_broken{component!="database"}
                or (wa_supervisor_child_up unless on (instance, job) wa_monitor_broken)"""),
            lasting="1m",
            summary="No drops are stored by {{ .Labels.instance }}: "
            "{{ with .Labels.component }}broken at the {{ . }}{{ else }}the monitor says nothing{{ end }}",
            meaning="The way from bridge to table is broken, or the monitor's metrics do not arrive.",
            command="wa-supervisor status",
            tells="its status line says what is wrong and what to do",
        ),
        Alert(
            name="SupervisorOutdated",
            severity="warning",
            query="wa_supervisor_self_outdated",
            lasting="10m",
            summary="The supervisor of {{ .Labels.instance }} runs other code than its package on disk",
            meaning="The monitor is not affected; the supervisor's own update has not been taken over.",
            command="wa-supervisor reexec",
            tells="same pid, and the child runs on; or it says why not",
        ),
        Alert(
            name="ForeignRows",
            severity="warning",
            query="wa_monitor_foreign_rows",
            lasting="30s",
            summary="Another writer put VALUE rows into the table, in {{ .Labels.project }}",
            meaning="No message of ours explains them; they are never changed.",
            command="wa-monitor audit",
            tells="find the writer, then accept the rows with --accept-foreign or remove them",
        ),
        Alert(
            name="MessagesRefused",
            severity="warning",
            query=_increase('wa_monitor_store_errors_total{error="store_refused"}', 5),
            summary="{{ .Labels.instance }} could not store a message for what it is",
            meaning="It was set aside with the reason and is tried again at each start.",
            command="wa-monitor audit",
            tells="dead letters have the reason",
        ),
        Alert(
            name="ProjectsRefused",
            severity="warning",
            query="wa_monitor_projects_refused",
            lasting="30s",
            summary="The projects file of {{ .Labels.instance }} is refused",
            meaning="The one before is in force.",
            command="wa-supervisor logs -n 50",
            tells="it names the line",
        ),
    ),
)

GROUPS: Final = (LID, OTHERS)


def rules() -> dict[str, Any]:
    """Return the rules for Prometheus."""
    return {"groups": [_rules_of(group) for group in GROUPS]}


def _rules_of(group: Group) -> dict[str, Any]:
    interval = {"interval": group.interval} if group.interval else {}
    recorded = [{"record": alert.record, "expr": alert.query} for alert in group.alerts if alert.record]
    return {"name": group.name, **interval, "rules": recorded + [_rule(alert) for alert in group.alerts]}


def _rule(alert: Alert) -> dict[str, Any]:
    query = alert.record or alert.query
    compared = f"({query})" if " " in query else query
    return {
        "alert": alert.name,
        "expr": f"{compared} {alert.comparison}",
        "for": alert.lasting,
        "labels": {"severity": alert.severity},
        "annotations": alert.annotations(".Value" if "humanize" in alert.summary else "{{ .Value }}"),
    }


def provisioning() -> dict[str, Any]:
    """Return the same for Grafana."""
    return {
        "apiVersion": 1,
        "groups": [
            {
                "orgId": 1,
                "name": group.name,
                "folder": "wa-monitor",
                "interval": "10s",  # the shortest that Grafana takes
                "rules": [_managed(alert) for alert in group.alerts],
            }
            for group in GROUPS
        ],
    }


def _managed(alert: Alert) -> dict[str, Any]:
    return {
        "uid": f"wa-monitor-{alert.name.lower()}",
        "title": alert.name,
        "condition": "B",
        "data": [
            {
                "refId": "A",
                "datasourceUid": DATASOURCE,
                "relativeTimeRange": {"from": _HISTORY_SECONDS, "to": 0},
                "model": {"refId": "A", "expr": alert.query, "instant": True, "range": False},
            },
            {
                "refId": "B",
                "datasourceUid": "__expr__",
                "relativeTimeRange": {"from": _HISTORY_SECONDS, "to": 0},
                "model": {
                    "refId": "B",
                    "type": "threshold",
                    "expression": "A",
                    "conditions": [
                        {
                            "evaluator": {
                                "type": "gt" if alert.below is None else "lt",
                                "params": [alert.above if alert.below is None else alert.below],
                            }
                        }
                    ],
                },
            },
        ],
        "for": alert.lasting,
        "noDataState": alert.no_data,
        "execErrState": "Error",
        "labels": {"severity": alert.severity},
        "annotations": alert.annotations(
            ".Values.A.Value" if "humanize" in alert.summary else "{{ .Values.A.Value }}"
        ),
        "isPaused": False,
    }


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def main(arguments: list[str]) -> int:
    """Write both files."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent
    for path, document in ((RULES, rules()), (PROVISIONING, provisioning())):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=_LINE, allow_unicode=True)
        target.write_text(HEADER + text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
