"""The dashboard: what panels.py lists, written with Grafana's own Foundation SDK.

usage: dashboard.py [FILE]    writes the dashboard's JSON; default: dashboards/wa-monitor.json beside this.

The rule: nothing is typed that the SDK knows, so that its types check it. Reloads are shown as annotations
from a query: nothing has to be pushed.

Written for Grafana 11.0 (the SDK of that release, pinned in requirements.txt), which later ones read.
Rejected: JSON by hand or exported from a browser, which nobody can review.

Source: https://github.com/grafana/grafana-foundation-sdk
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    timeseries,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model
from panels import AT, ROWS, Kind, Panel

UID: Final = "wa-monitor"
_TARGET: Final = Path(__file__).parent / "dashboards" / "wa-monitor.json"
_DATASOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
AnyPanel: TypeAlias = stat.Panel | timeseries.Panel | statetimeline.Panel | bargauge.Panel


def build() -> model.Dashboard:
    """Return the dashboard."""
    made = (
        dashboard.Dashboard("wa-monitor")
        .uid(UID)
        .description("Is the running code the code on disk, and does every row name a phone?")
        .tags(["wa-monitor"])
        .editable()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .time("now-6h", "now")
        .refresh("15s")
        .variables(
            [
                _source(),
                _choice("instance", "wa_supervisor_code_in_sync"),
                _choice("project", f"wa_monitor_lid_rows{{{AT}}}"),
            ]
        )
        .annotation(_reloads())
    )
    number = 0
    for title, panels in ROWS:
        number += 1
        made.with_row(dashboard.Row(title).id(number))
        for panel in panels:
            number += 1
            made.with_panel(_panel(panel, number))
    built = made.build()
    for variable in built.templating.list_val or ():
        # Of interval variables alone; the SDK gives them to all, and Grafana's types refuse them.
        variable.auto = variable.auto_min = variable.auto_count = None
    return built


def _source() -> dashboard.DatasourceVariable:
    return dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")


def _choice(label: str, series: str) -> dashboard.QueryVariable:
    everything = model.VariableOption(text="All", value="$__all", selected=True)
    return (
        dashboard.QueryVariable(label)
        .label(label.capitalize())
        .datasource(_DATASOURCE)
        .query({"query": f"label_values({series}, {label})", "refId": label})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


class _Reloads(dashboard.AnnotationQuery):
    """Marks reloads by a query; the SDK has no names for the fields of the Prometheus data source."""

    def build(self) -> model.AnnotationQuery:
        """Build it with those fields, where Grafana 11.0 looks for them and where later ones do."""
        return _PrometheusAnnotation(**vars(super().build()))


class _PrometheusAnnotation(model.AnnotationQuery):
    """What Grafana's Prometheus data source reads of an annotation query."""

    def to_json(self) -> dict[str, object]:
        """Add to what the SDK knows."""
        step = "15s"
        return super().to_json() | {
            "step": step,
            "titleFormat": "reload {{outcome}}",
            "textFormat": "{{instance}}, asked for by {{trigger}}",
            "tagKeys": "outcome,trigger",
            "target": {"refId": "Anno", "expr": self.expr, "interval": step, "datasource": self.datasource},
        }


def _reloads() -> dashboard.AnnotationQuery:
    """Mark the steps in which a reload had its outcome; differences tile time, so that none is missed."""
    series = f'wa_supervisor_reloads_total{{{AT},outcome!="unchanged"}}'
    before = f"{series} offset $__interval"
    return (
        _Reloads()
        .name("Reloads")
        .datasource(_DATASOURCE)
        .enable(True)
        .icon_color("blue")
        .expr(f"({series} - {before} or {series} unless {before}) > 0")
    )


def _panel(panel: Panel, number: int) -> AnyPanel:
    made = _BUILDERS[panel.kind](panel)
    made.id(number).title(panel.title).datasource(_DATASOURCE).span(panel.wide).height(panel.tall)
    made.unit(panel.unit).mappings(list(_mappings(panel))).thresholds(_thresholds(panel))
    if panel.description:
        made.description(panel.description)
    if panel.since is not None:
        made.time_from(panel.since)
    for letter, (query, legend) in zip("ABCD", panel.queries, strict=False):
        made.with_target(_target(panel, letter, query, legend))
    return made


def _target(panel: Panel, letter: str, query: str, legend: str) -> prometheus.Dataquery:
    target = prometheus.Dataquery().datasource(_DATASOURCE).ref_id(letter).expr(query).legend_format(legend)
    return target.instant() if panel.kind in {"stat", "gauge"} else target.range()


def _stat(panel: Panel) -> AnyPanel:
    text = shapes.BigValueTextMode.NAME if panel.names else shapes.BigValueTextMode.VALUE
    return (
        stat.Panel()
        .text_mode(text)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .color_mode(shapes.BigValueColorMode.VALUE)
        .reduce_options(_last())
    )


def _lines(_: Panel) -> AnyPanel:
    return (
        _series()
        .draw_style(shapes.GraphDrawStyle.LINE)
        .line_interpolation(shapes.LineInterpolation.STEP_AFTER)
    )


def _bars(_: Panel) -> AnyPanel:
    stacked = common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A")
    return _series().draw_style(shapes.GraphDrawStyle.BARS).fill_opacity(80).stacking(stacked)


def _series() -> timeseries.Panel:
    below = (
        common.VizLegendOptions()
        .display_mode(shapes.LegendDisplayMode.LIST)
        .placement(shapes.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    return timeseries.Panel().legend(below).show_points(shapes.VisibilityMode.AUTO).min(0)


def _states(_: Panel) -> AnyPanel:
    return statetimeline.Panel().show_value(shapes.VisibilityMode.NEVER)


def _gauge(_: Panel) -> AnyPanel:
    return (
        bargauge.Panel()
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .reduce_options(_last())
    )


_BUILDERS: Final[dict[Kind, Callable[[Panel], AnyPanel]]] = {
    "stat": _stat,
    "lines": _lines,
    "bars": _bars,
    "states": _states,
    "gauge": _gauge,
}


def _last() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().values(False).calcs(["lastNotNull"])


def _mappings(panel: Panel) -> Iterator[model.ValueMapping]:
    if panel.words:
        yield model.ValueMap(
            options={
                value: model.ValueMappingResult(text=text, color=color, index=index)
                for index, (value, text, color) in enumerate(panel.words)
            }
        )


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="green")]
    steps += [model.Threshold(value=value, color=color) for value, color in panel.steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)


def main(arguments: list[str]) -> int:
    """Write the file."""
    target = Path(arguments[0]) if arguments else _TARGET
    target.write_text(json.dumps(build(), cls=JSONEncoder, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
