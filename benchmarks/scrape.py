"""What a scrape costs and whom it delays: the supervisor's endpoint with a child of many series.

An application exports 1,000 or 10,000 counters and the time at which it was asked for them; it writes a line
when it serves. Measured are the time of a scrape while nothing happens and while reloads run, how old what it
shows is, and the time from a save to the first line of the new code, in turn with nobody scraping and with a
scraper that asks again a moment after it was answered, so that each reload meets a scrape (Prometheus asks
every 15 seconds). Pauses differ, so that reloads meet the child's reports at every point of their interval.
Prints a Markdown table and writes it to ``benchmarks/results/scrape.md``.

usage: scrape.py [SERIES [SCRAPES ROUNDS]]    with any, only tries it: nothing is written.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SUPERVISOR = Path(sys.executable).with_name("wa-supervisor")
RESULT = Path(__file__).parent / "results" / "scrape.md"
SIZES = (1_000, 10_000)
SCRAPES = 300
ROUNDS = 12
PAUSE_SECONDS = 0.02
P99_TARGET_MS, DELAY_TARGET_MS, AGE_TARGET_SECONDS = 50, 10, 1

APPLICATION = """\
import signal, sys, time
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
import version

class Many:
    def collect(self):
        yield GaugeMetricFamily("asked_at_seconds", "When it was asked.", value=time.time())
        family = CounterMetricFamily("served", "Served.", labels=["queue", "shard"])
        for number in range(int(sys.argv[1])):
            family.add_metric([f"queue {number % 100}", str(number)], time.monotonic() * number)
        yield family

REGISTRY.register(Many())
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print("serving", version.NUMBER, flush=True)
while True:
    time.sleep(1)
"""


@dataclass
class Scraper:
    """Asks for the metrics over one connection, and notes how long that took and how old they were."""

    address: str
    times_ms: list[float] = field(default_factory=list)
    ages_seconds: list[float] = field(default_factory=list)
    size_bytes: int = 0
    ageless: int = 0
    """Bodies in which nothing of the child says how old it is."""

    def scrape(self, connection: http.client.HTTPConnection) -> None:
        began = time.perf_counter()
        connection.request("GET", "/metrics")
        body = connection.getresponse().read()
        self.times_ms.append((time.perf_counter() - began) * 1000)
        self.size_bytes = len(body)
        _, found, rest = body.partition(b"\nasked_at_seconds ")
        if found:
            self.ages_seconds.append(time.time() - float(rest.split(b"\n", 1)[0]))
        else:
            self.ageless += 1

    @contextlib.contextmanager
    def scraping(self, pause_seconds: float) -> Iterator[None]:
        """Scrape in a thread for as long as the block lasts."""
        ended = threading.Event()

        def run() -> None:
            connection = http.client.HTTPConnection(self.address)
            while not ended.wait(pause_seconds):
                self.scrape(connection)
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        yield
        ended.set()
        thread.join()


def p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[-1]


@dataclass
class Measured:
    series: int
    idle: Scraper
    reloading: Scraper
    alone_ms: list[float]
    scraped_ms: list[float]

    @property
    def delay_ms(self) -> float:
        return statistics.median(self.scraped_ms) - statistics.median(self.alone_ms)

    @property
    def age_seconds(self) -> float:
        return max(self.idle.ages_seconds + self.reloading.ages_seconds)


def measure(folder: Path, series: int, scrapes: int, rounds: int) -> Measured:
    """Run one supervisor with a child of so many series."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    (tree / "main.py").write_text(APPLICATION, encoding="utf-8")
    (tree / "version.py").write_text("NUMBER = 0\n", encoding="utf-8")
    command = [SUPERVISOR, "run", f"--runtime-dir={folder / 'run'}", f"--state-dir={folder / 'state'}"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with subprocess.Popen(
        [*command, "--listen=127.0.0.1:0", "--handover=overlap", "main.py", str(series)],
        cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = iter(process.stdout)
        address = next(line.split("http://")[1].split("/")[0] for line in lines if "metrics at" in line)

        def saved(number: int) -> float:
            began = time.perf_counter()
            (tree / "version.py").write_text(f"NUMBER = {number}\n", encoding="utf-8")
            took, is_live = 0.0, False
            while not (took and is_live):  # Either may come first.
                line = next(lines)
                is_live = is_live or ": live" in line
                if line == f"serving {number}\n":
                    took = (time.perf_counter() - began) * 1000
            time.sleep(0.7 + number % 7 * 0.13)  # The old one is gone and the zygote waits.
            return took

        next(line for line in lines if line.startswith("serving 0"))
        time.sleep(3)
        idle, reloading = Scraper(address), Scraper(address)
        connection = http.client.HTTPConnection(address)
        for _ in range(scrapes):
            idle.scrape(connection)
            time.sleep(0.02)
        connection.close()
        alone, scraped = [], []
        for number in range(1, 2 * rounds + 1, 2):
            alone.append(saved(number))
            with reloading.scraping(PAUSE_SECONDS):
                scraped.append(saved(number + 1))
        process.terminate()
        for _ in lines:
            pass
    return Measured(series, idle, reloading, alone, scraped)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def report(found: list[Measured], scrapes: int, rounds: int) -> str:
    """Return the tables."""
    heads = ("series of the child", "body, KiB", "scrape, median ms", "p99 ms")
    while_reloading = ("while reloads run: median ms", "p99 ms", "oldest of all, s", "without a time")
    rows = [_row(*heads, *while_reloading), "|---|---|---|---|---|---|---|---|"]
    rows += [
        f"| {one.series:,} | {one.idle.size_bytes / 1024:.0f} "
        f"| {statistics.median(one.idle.times_ms):.1f} | {p99(one.idle.times_ms):.1f} "
        f"| {statistics.median(one.reloading.times_ms):.1f} | {p99(one.reloading.times_ms):.1f} "
        f"| {one.age_seconds:.2f} | {one.idle.ageless + one.reloading.ageless} |"
        for one in found
    ]
    heads = ("series of the child", "save to new code, nobody scrapes: median ms", "p95 ms")
    while_scraped = ("scraped meanwhile: median ms", "p95 ms", "difference of the medians, ms")
    rows += ["", _row(*heads, *while_scraped), "|---|---|---|---|---|---|"]
    for one in found:
        alone, scraped = (
            f"{statistics.median(times):.1f} | {statistics.quantiles(times, n=20)[-1]:.1f}"
            for times in (one.alone_ms, one.scraped_ms)
        )
        rows.append(_row(f"{one.series:,}", alone, scraped, f"{one.delay_ms:.1f}"))
    few, many = found[0], found[-1]
    worst = max(p99(few.idle.times_ms), p99(few.reloading.times_ms))
    oldest = max(one.age_seconds for one in found)
    targets = (
        (f"p99 with {few.series:,} series, also while reloads run, in ms", worst, P99_TARGET_MS),
        (f"delay of a reload by scrapes of {many.series:,} series, in ms", many.delay_ms, DELAY_TARGET_MS),
        ("age of what is shown, in s", oldest, AGE_TARGET_SECONDS),
    )
    rows.append("")
    for what, value, target in targets:
        met = "met" if value <= target else "MISSED"
        rows.append(f"- {what}: {value:.2f}, the target is {target} at most, {met}.")
    head = f"# Scrapes: {scrapes} at rest, then {rounds} saves with and {rounds} without a scraper, in turn"
    machine = (
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores. Load before: {os.getloadavg()[0]:.1f}."
    )
    return "\n".join([head, "", machine, "", *rows, ""])


def main() -> None:
    """Measure all sizes and write the tables."""
    tried = [int(argument) for argument in sys.argv[1:]]
    scrapes, rounds = tried[1:] or (SCRAPES, ROUNDS)
    found = []
    for series in tried[:1] or SIZES:
        with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
            found.append(measure(Path(folder), series, scrapes, rounds))
    text = report(found, scrapes, rounds)
    if not tried:
        RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
