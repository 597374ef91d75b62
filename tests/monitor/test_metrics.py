"""The monitor's metrics: what is not known is not shown."""

from __future__ import annotations

import pytest
from prometheus_client.samples import Sample

from monitor.metrics import Counts, MonitorMetrics

COUNTED = (
    "wa_monitor_lid_rows",
    "wa_monitor_foreign_rows",
    "wa_monitor_lid_pending",
    "wa_monitor_backlog_rows",
)


@pytest.fixture
def metrics() -> MonitorMetrics:
    made = MonitorMetrics()
    made.update(projects=("Northfield",))
    return made


def samples(metrics: MonitorMetrics) -> dict[str, list[Sample]]:
    return {family.name: family.samples for family in metrics.collect()}


def test_nothing_is_called_zero_that_nobody_has_counted(metrics: MonitorMetrics) -> None:
    assert not samples(metrics).keys() & {*COUNTED, "wa_monitor_lid_repaired"}
    metrics.update(counts=Counts(lid_rows={"Northfield": 2}))
    assert samples(metrics).keys() >= {*COUNTED, "wa_monitor_lid_repaired"}
    standing = {sample.labels["project"]: sample.value for sample in samples(metrics)["wa_monitor_lid_rows"]}
    assert standing == {"Northfield": 2, "other": 0}
    metrics.update(counts=None)
    assert not samples(metrics).keys() & set(COUNTED), "who stands by does not say what stood when it wrote"
