"""What `make grafana` provides, and where the files are that are tested."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "contrib" / "grafana"
DASHBOARD = GRAFANA / "dashboards" / "wa-monitor.json"
ALERTING = GRAFANA / "provisioning" / "alerting" / "wa-monitor.yml"
ENVIRONMENT = ROOT / os.environ.get("WA_GRAFANA", ".venv-grafana")

heavy = pytest.mark.skipif("WA_GRAFANA" not in os.environ, reason="takes minutes: `make grafana` runs it")
