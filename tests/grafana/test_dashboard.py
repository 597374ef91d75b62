"""The dashboard: written by our code, of Grafana's own types, and naming only what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.grafana.environment import DASHBOARD, ENVIRONMENT, GRAFANA, heavy

CHECK = Path(__file__).with_name("types") / "check.ts"
PACKAGES = ENVIRONMENT / "types"
OPTIONS = ("--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--moduleResolution", "bundler")


def check(folder: Path, package: str, dashboard: str) -> subprocess.CompletedProcess[str]:
    """Check a dashboard's JSON against the types of one version of `@grafana/schema`."""
    (folder / "node_modules").symlink_to((PACKAGES / "node_modules").absolute())
    before, _, after = CHECK.read_text(encoding="utf-8").rpartition("DASHBOARD")
    source = folder / "check.ts"
    source.write_text(
        before.replace('from "GRAFANA', f'from "{package}') + dashboard + after, encoding="utf-8"
    )
    node = shutil.which("node")
    assert node is not None
    compiler = folder / "node_modules" / "typescript" / "bin" / "tsc"
    command = [node, str(compiler), *OPTIONS, "--module", "esnext", str(source)]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder)


needs_types = pytest.mark.skipif(
    not (PACKAGES / "node_modules").is_dir() or shutil.which("node") is None,
    reason="Grafana's TypeScript types are not here: `make grafana` installs them where there is npm",
)


@heavy
def test_the_dashboard_is_what_its_code_writes(tmp_path: Path) -> None:
    written = tmp_path / "written.json"
    python = ENVIRONMENT / "bin" / "python"
    subprocess.run([python, GRAFANA / "dashboard.py", written], check=True, timeout=60)
    assert written.read_text(encoding="utf-8") == DASHBOARD.read_text(encoding="utf-8"), "run `make generate`"


@heavy
def test_the_code_of_the_dashboard_has_the_types_of_the_sdk() -> None:
    python = ENVIRONMENT / "bin" / "python"
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", str(python), "dashboard.py"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=GRAFANA, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


@heavy
@needs_types
@pytest.mark.parametrize("package", ["@grafana/schema", "grafana-13"])
def test_the_dashboard_has_the_types_of_the_oldest_and_the_newest_grafana(
    tmp_path: Path, package: str
) -> None:
    done = check(tmp_path, package, DASHBOARD.read_text(encoding="utf-8").rstrip())
    assert done.returncode == 0, done.stdout


@heavy
@needs_types
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ('"uid": "wa-monitor"', '"uuid": "wa-monitor"'),
        ('"drawStyle": "bars"', '"drawStyle": "bar"'),
        ('"textMode": "value"', '"textmode": "value"'),
        ('"iconColor": "blue"', '"iconColor": 7'),
        ('"mode": "absolute"', '"mode": "relative"'),
    ],
)
def test_a_dashboard_of_other_types_is_refused(tmp_path: Path, good: str, bad: str) -> None:
    dashboard = DASHBOARD.read_text(encoding="utf-8")
    assert good in dashboard
    done = check(tmp_path, "@grafana/schema", dashboard.replace(good, bad, 1).rstrip())
    assert done.returncode != 0
    assert "error TS" in done.stdout


def panels() -> list[dict[str, Any]]:
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    return [panel for panel in document["panels"] if panel["type"] != "row"]


def test_no_two_panels_lie_on_each_other_and_none_leaves_the_grid() -> None:
    document = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    taken: set[tuple[int, int]] = set()
    for panel in document["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
    numbers = [panel["id"] for panel in document["panels"]]
    assert len(set(numbers)) == len(numbers)


def test_every_query_is_of_the_chosen_source_and_instance() -> None:
    for panel in panels():
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            selectors = re.findall(r"\bwa_\w+(\{[^}]*\})?", target["expr"])
            assert all('instance=~"$instance"' in selector for selector in selectors), target["expr"]
