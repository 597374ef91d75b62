"""How long a save takes to become the running code, and how long nobody serves meanwhile.

An application of one script and one module writes a line each millisecond: the version it runs. The benchmark
saves a new version, waits until the first line of it appears, and looks at the longest gap between two lines.
Prints a Markdown table and writes it to ``benchmarks/results/reload.md``.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
RESULT = Path(__file__).parent / "results" / "reload.md"
SAVES = 40

APPLICATION = """\
import os, signal, sys, time
import psycopg, prometheus_client
import version

signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
out = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
while True:
    os.write(out, f"{time.monotonic_ns()} {version.NUMBER}\\n".encode())
    time.sleep(0.001)
"""


def saved_until_seen(lines: Path, number: int, saved_ns: int) -> float:
    """Return the milliseconds from a save to the first line of the new version."""
    with lines.open(encoding="ascii") as file:
        while True:
            line = file.readline()
            if not line.endswith("\n"):
                file.seek(file.tell() - len(line))
                time.sleep(0.001)
            elif line.endswith(f" {number}\n"):
                return (int(line.split()[0]) - saved_ns) / 1e6


def longest_gap(lines: Path, since_ns: int) -> float:
    """Return the longest time between two lines after ``since_ns``, in milliseconds."""
    stamps = [int(line.split()[0]) for line in lines.read_text(encoding="ascii").splitlines()]
    after = [stamp for stamp in stamps if stamp >= since_ns]
    return max(b - a for a, b in itertools.pairwise(after)) / 1e6


def cold_start() -> float:
    """Return the milliseconds of a plain Python that imports the same two packages."""
    began = time.monotonic_ns()
    subprocess.run([sys.executable, "-c", "import psycopg, prometheus_client"], check=True)
    return (time.monotonic_ns() - began) / 1e6


def measure(folder: Path, handover: str) -> tuple[list[float], list[float], dict[str, float]]:
    """Return latency and gap of each save in milliseconds, and the median of each stage."""
    tree, lines = folder / "tree", folder / "lines"
    tree.mkdir(parents=True)
    (tree / "main.py").write_text(APPLICATION, encoding="utf-8")
    (tree / "version.py").write_text("NUMBER = 0\n", encoding="utf-8")
    runtime = f"--runtime-dir={folder / 'run'}"
    command = [SUPERVISOR, "run", runtime, f"--state-dir={folder / 'state'}", "--listen=127.0.0.1:0"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    latencies, gaps, stages = [], [], []
    with subprocess.Popen(
        [*command, f"--handover={handover}", "main.py", lines],
        cwd=tree, env=environment, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while not lines.exists():
            time.sleep(0.01)
        saved_until_seen(lines, 0, 0)
        for number in range(1, SAVES + 1):
            saved = time.monotonic_ns()
            (tree / "version.py").write_text(f"NUMBER = {number}\n", encoding="utf-8")
            latencies.append(saved_until_seen(lines, number, saved))
            time.sleep(0.2)
            gaps.append(longest_gap(lines, saved))
            status = subprocess.run(
                [SUPERVISOR, "status", "--json", runtime], check=True, capture_output=True, text=True
            )
            stages.append(json.loads(status.stdout)["last_reload"]["stages"])
        process.terminate()
    medians = {name: 1000 * statistics.median(s.get(name, 0.0) for s in stages) for name in stages[0]}
    return latencies, gaps, medians


def main() -> None:
    """Measure both handovers and print the table."""
    cold = statistics.median(cold_start() for _ in range(10))
    rows = [
        "| handover | save to new code, median ms | p95 ms | longest gap, median ms | stages, median ms |",
        "|---|---|---|---|---|",
    ]
    for handover in ("replace", "overlap"):
        with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
            latencies, gaps, medians = measure(Path(folder), handover)
        p95 = statistics.quantiles(latencies, n=20)[-1]
        told = ", ".join(f"{name} {value:.1f}" for name, value in medians.items())
        median, gap = statistics.median(latencies), statistics.median(gaps)
        rows.append(f"| {handover} | {median:.0f} | {p95:.0f} | {gap:.1f} | {told} |")
    version = sys.version.split()[0]
    yardstick = (
        f"A plain `import psycopg, prometheus_client` took {cold:.0f} ms (median of 10) in the same run."
    )
    head = [f"# Reload, {SAVES} saves each", "", f"Python {version}, {os.cpu_count()} cores. {yardstick}", ""]
    text = "\n".join([*head, *rows, ""])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
