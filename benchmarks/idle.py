"""What a supervisor costs while nothing happens: processor time and memory, with a small and a large tree.

The supervised program sleeps. After a settling time the processor time that the supervisor and its helpers
(all its children but the program) have used in a minute is read from the kernel. Prints a Markdown table and
writes it to ``benchmarks/results/idle.md``. Target: less than 1 % of one core with 5,000 files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
RESULT = Path(__file__).parent / "results" / "idle.md"
SIZES = (20, 5000)
SETTLE_SECONDS = 10.0
WINDOW_SECONDS = 60.0
FILES_IN_A_FOLDER = 50
PROGRAM = "import time\nwhile True:\n    time.sleep(60)\n"


def make_tree(tree: Path, files: int) -> None:
    """Write a program and ``files`` modules of some forty lines beside it."""
    tree.mkdir(parents=True)
    (tree / "main.py").write_text(PROGRAM, encoding="utf-8")
    for number in range(files - 1):
        path = tree / f"package_{number // FILES_IN_A_FOLDER}" / f"module_{number}.py"
        path.parent.mkdir(exist_ok=True)
        lines = [f"def function_{line}(value):\n    return value + {number}\n\n" for line in range(13)]
        path.write_text("".join(lines), encoding="utf-8")


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the processor time that processes have used, user and system."""
    return sum(sum(process.cpu_times()[:2]) for process in processes)


def memory(process: psutil.Process) -> tuple[float, float]:
    """Return resident and proportional memory in MiB."""
    facts = process.memory_full_info()
    return facts.rss / 2**20, facts.pss / 2**20


def measure(folder: Path, files: int) -> str:
    """Return the table row of a tree of this size."""
    tree, runtime = folder / "tree", f"--runtime-dir={folder / 'run'}"
    make_tree(tree, files)
    command = [SUPERVISOR, "run", runtime, f"--state-dir={folder / 'state'}", "--listen=127.0.0.1:0"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        [*command, "main.py"], cwd=tree, env=environment, stderr=subprocess.DEVNULL
    ) as popen:
        live = None
        while live is None:
            time.sleep(0.2)
            answer = subprocess.run(
                [SUPERVISOR, "status", "--json", runtime], check=False, capture_output=True, text=True
            )
            live = (
                json.loads(answer.stdout)["live"] if answer.returncode in {0, 1} and answer.stdout else None
            )
        time.sleep(SETTLE_SECONDS)
        supervisor = psutil.Process(popen.pid)
        helpers = [child for child in supervisor.children() if child.pid != live["pid"]]
        before, began = cpu_seconds([supervisor, *helpers]), time.monotonic()
        time.sleep(WINDOW_SECONDS)
        used = cpu_seconds([supervisor, *helpers]) - before
        share = 100 * used / (time.monotonic() - began)
        resident, proportional = memory(supervisor)
        beside = [memory(helper) for helper in helpers]
        popen.terminate()
    return (
        f"| {files} | {share:.2f} | {resident:.0f} | {proportional:.0f} "
        f"| {sum(rss for rss, _ in beside):.0f} | {sum(pss for _, pss in beside):.0f} |"
    )


def main() -> None:
    """Measure each size and print the table."""
    rows = [
        "| files | % of one core | supervisor RSS, MiB | PSS | its helpers' RSS, MiB | PSS |",
        "|---|---|---|---|---|---|",
    ]
    for files in SIZES:
        with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
            rows.append(measure(Path(folder), files))
    version = sys.version.split()[0]
    what = f"Python {version}, {os.cpu_count()} cores; over {WINDOW_SECONDS:g} s in which nothing changed."
    text = "\n".join(["# Idle", "", what, "", *rows, ""])
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
