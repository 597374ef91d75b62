"""What can be checked of the benchmarks without running them, and that documents quote only their results."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
RESULTS = BENCHMARKS / "results"
DOCUMENTS = [ROOT / "README.md", BENCHMARKS / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
Values = dict[str, Any]
PARTS = ("comparison", "contenders", "service", "peers")


@pytest.fixture(scope="module")
def parts() -> Any:
    """The modules of ``make bench``, imported as its script imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield {name: importlib.import_module(name) for name in PARTS}
        for name in PARTS:
            sys.modules.pop(name)


def contender(name: str, family: str, save_ms: float, gap_ms: float, together_ms: float = 1.0) -> Values:
    return {
        "name": name, "family": family, "package": None, "settings": "as it comes",
        "problems": [], "lost": 0,
        "saves_ms": {"20": [save_ms] * 3, "5000": [save_ms]}, "live_ms": {"20": [save_ms] * 3},
        "gaps_ms": [gap_ms] * 3, "pauses_ms": [1.0], "together_ms": [together_ms],
        "syntax_seconds": [1.0], "import_seconds": [None], "idle": {},
        "edits": 100, "stale": 100, "unnoticed": 0,
    }  # fmt: skip


def measured(*contenders: Values) -> Values:
    return {
        "machine": {"python": "3", "cores": 2, "load_before": 0.0, "load_after": 0.0, "seconds": 1.0},
        "plan": {
            "rounds": 1, "saves": 3, "broken_rounds": 1, "saves_in_size": 1,
            "sizes": [5000], "idle_sizes": [20],
        },
        "our_factor": 2, "versions": {}, "starts": {"python_ms": [200.0], "service_ms": [500.0]},
        "contenders": list(contenders), "alone": contender("alone", "replaces", 1.0, 1.0), "demo": {},
    }  # fmt: skip


def verdicts(parts: Any, *contenders: Values) -> dict[str, str]:
    return {target.what: target.verdict for target in parts["comparison"].targets(measured(*contenders))}


def test_everybody_is_compared_and_every_peer_is_pinned(parts: Any) -> None:
    pinned = dict(
        line.lower().split("==")
        for line in (BENCHMARKS / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    )
    packages = {peer.package.lower() for peer in parts["contenders"].peers()}
    assert packages <= set(pinned)
    assert packages == {"uvicorn", "gunicorn", "watchfiles", "hupper", "django", "supervisor", "jurigged"}
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for shared in ("psycopg", "psycopg-binary", "prometheus_client"):
        assert f"{shared.replace('_', '-')}=={pinned[shared]} " in lock, "all import the same"


def test_targets_are_judged_by_what_was_measured(parts: Any) -> None:
    ours = contender("wa-supervisor, zygote, replace", "ours", 10.0, 3.0)
    told = verdicts(parts, ours, contender("peer", "replaces", 70.0, 200.0))
    assert told["zygote, replace: save to verified and live, median, to 0.15 x a cold Python"] == "met"
    assert told["zygote, replace: save to verified and live, median, to 1/6 of peer"] == "met"
    assert told["the same, to 1/40 of peer"] == "met"
    assert told["start of the service to live, median, to 2 x a cold Python"] == "missed"
    assert told["zygote, replace: save to verified and live, median, to 0.5 x jurigged"] == "not measured"
    slow = contender("wa-supervisor, zygote, replace", "ours", 40.0, 6.0)
    told = verdicts(parts, slow, contender("peer", "replaces", 70.0, 200.0))
    assert set(told.values()) <= {"missed", "not measured", "met"}
    assert told["zygote, replace: save to verified and live, median, to 0.15 x a cold Python"] == "missed"
    assert told["longest gap, `replace`, median"] == "missed"


def test_overlap_with_a_moment_without_a_live_child_is_missed(parts: Any) -> None:
    ours = contender("wa-supervisor, zygote, replace", "ours", 10.0, 3.0)
    what = "longest time without a live child, `overlap`, of all saves"
    for together_ms, verdict in ((2.0, "met"), (-0.5, "missed")):
        overlap = contender("wa-supervisor, zygote, overlap", "ours", 10.0, 3.0, together_ms)
        assert verdicts(parts, ours, overlap)[what] == verdict


def test_report_says_what_could_not_be_started_or_came_not_back(parts: Any) -> None:
    ours = contender("wa-supervisor, cold, replace", "ours", 10.0, 3.0)
    absent = contender("peer", "replaces", 70.0, 200.0) | {
        "problems": ["cannot be started: not installed"], "saves_ms": {}, "gaps_ms": [],
    }  # fmt: skip
    text = parts["comparison"].report(measured(ours, absent))
    assert "cannot be started: not installed" in text
    assert re.search(r"^\| peer \| - \|", text, flags=re.MULTILINE)
    assert "not back (1 of 1)" in text


def test_program_that_is_compared_compiles(parts: Any, tmp_path: Path) -> None:
    parts["service"].make_tree(tmp_path / "tree", parts["comparison"].SMALLEST)
    sources = sorted((tmp_path / "tree").rglob("*.py"))
    assert len(sources) == parts["comparison"].SMALLEST
    for source in [*sources, BENCHMARKS / "plot.py"]:
        compile(source.read_text(encoding="utf-8"), str(source), "exec")


def test_make_bench_hands_on_its_arguments() -> None:
    done = subprocess.run(
        ["make", "-n", "bench", "ARGS=--quick"],  # noqa: S607 -- make of the PATH
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "benchmarks/peers.py --quick" in done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documents_quote_figures_of_others_only_from_results(parts: Any, document: Path) -> None:
    """A line that names a peer beside a measured quantity has to stand in a result, word for word."""
    names = "|".join(re.escape(peer.name) for peer in parts["contenders"].peers())
    written = {
        line for result in RESULTS.glob("*.md") for line in result.read_text(encoding="utf-8").splitlines()
    }
    quoted = [
        line
        for line in document.read_text(encoding="utf-8").splitlines()
        if re.search(names, line) and re.search(r"\d ?(ms|MiB|x|%|s)\b|\|\s*[\d.]+\s*\|", line)
    ]
    assert [line for line in quoted if line not in written] == []
