"""How we compare with what others use for the same purpose: all of them interleaved, in one run.

What is measured, and how it is kept fair, is in ``README.md``; who is measured in ``contenders.py``. Prints
the report and writes it to ``results/peers.md``, the values to ``peers.json`` and a plot to ``peers.png``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comparison
import contenders
import psutil
from contenders import OURS, PEERS, Contender
from service import (
    NotStartedError,
    Service,
    cpu_ns,
    interrupt,
    make_tree,
    memory_mib,
    part,
    serving,
    status,
    write_part,
)

RESULTS = Path(__file__).parent / "results"
SETTLED_SECONDS = 0.3
NEW_CODE_SECONDS = 10.0
FIX_SECONDS = 1.0
UNNOTICED_SECONDS = 2.5
STALE_SECONDS = 0.7
CALM_SECONDS = 1.5
CHECKOUT_FILES = 300
EDITED_AT_ONCE = 20
IDLE_SETTLE_SECONDS = 12.0
OUR_FACTOR = 6
"""Ours is saved so much more often than a peer, because a percentile of it is judged."""

BACK_SECONDS = 6.0
GOOD = "def number() -> int:\n    return 7\n"
BROKEN = {"syntax": f"{GOOD}\nbroken = (\n", "import": f"import no_such_module_anywhere\n\n\n{GOOD}"}
COLD = "import psycopg, prometheus_client"


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    saves: int
    broken_rounds: int
    sizes: Sequence[int]
    saves_in_size: int
    batches: int
    cold_starts: int
    idle_sizes: Sequence[int]
    idle_seconds: float


WHOLE = Plan(3, 4, 1, (500, 5000, 20_000), 3, 5, 6, (20, 5000), 10.0)
QUICK = Plan(1, 2, 1, (500,), 2, 1, 2, (20,), 2.0)


class Result:
    """What was measured of one contender, in the form that is written to ``peers.json``."""

    def __init__(self, contender: Contender) -> None:
        self.values: dict[str, Any] = {
            "name": contender.name, "family": contender.family, "package": contender.package,
            "settings": contender.settings, "problems": [], "saves_ms": {}, "live_ms": {}, "gaps_ms": [],
            "pauses_ms": [], "together_ms": [], "syntax_seconds": [], "import_seconds": [], "idle": {},
            "lost": 0,
        }  # fmt: skip

    def add(self, key: str, value: object) -> None:
        self.values[key].append(value)

    def add_save(self, files: int, first_line: float | None, live: float | None) -> None:
        """Note one save: when its first line came, and when it was told to be live, in milliseconds."""
        if first_line is None:
            self.values["lost"] += 1
            return
        self.values["saves_ms"].setdefault(str(files), []).append(first_line)
        if live is not None:
            self.values["live_ms"].setdefault(str(files), []).append(max(first_line, live))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def noting(result: Result) -> Iterator[None]:
    """Note it with the contender if it cannot be started."""
    try:
        yield
    except NotStartedError as error:
        say(f"  {error}")
        if str(error) not in result.values["problems"]:
            result.add("problems", str(error))


def save_and_wait(service: Service, number: int) -> tuple[int, float | None, float | None]:
    """Save a version; return when, and the milliseconds to its first line and until it is live and proven."""
    saved = service.save(number)
    if not service.until(lambda: service.first(number, saved) is not None, NEW_CODE_SECONDS):
        return saved, None, None
    line = service.first(number, saved)
    assert line is not None
    live = None
    if service.readies:
        service.until(lambda: service.readies_ns[-1] > saved, NEW_CODE_SECONDS)
        live = (service.readies_ns[-1] - saved) / 1e6
    return saved, (line.at_ns - saved) / 1e6, live


def saves(
    service: Service, result: Result, files: int, count: int, *, chance: random.Random, first: int
) -> None:
    """Save ``count`` versions; with the smallest tree the gaps are measured, too."""
    for number in range(first, first + count):
        # Who looks at the files at intervals is met at any moment of one.
        begun = time.monotonic_ns()
        contender = service.contender
        time.sleep(SETTLED_SECONDS + contender.rest_seconds + chance.random() * contender.polls_seconds)
        service.read()
        pause = service.gap_ms(begun)
        saved, first_line, live = save_and_wait(service, number)
        result.add_save(files, first_line, live)
        if first_line is None or files != comparison.SMALLEST:
            continue
        time.sleep(SETTLED_SECONDS)
        service.read()
        result.add("pauses_ms", pause)
        result.add("gaps_ms", service.gap_ms(saved))
        new = service.first(number, saved)
        assert new is not None
        old = [line.at_ns for line in service.shown(saved) if line.number < number]
        result.add("together_ms", (max(old, default=saved) - new.at_ns) / 1e6)


def broken(service: Service, result: Result, kind: str, number: int) -> bool:
    """Save a version that cannot work and a good one a second later; return whether it serves again."""
    time.sleep(SETTLED_SECONDS + service.contender.rest_seconds)
    began = service.write(BROKEN[kind])
    time.sleep(FIX_SECONDS)
    saved = service.save(number)
    back = service.until(lambda: service.first(number, saved) is not None, BACK_SECONDS)
    time.sleep(SETTLED_SECONDS)
    service.read()
    result.add(f"{kind}_seconds", service.gap_ms(began) / 1000 if back else None)
    return back


def one_round(
    contender: Contender, result: Result, base: Path, plan: Plan, *, turn: int, chance: random.Random
) -> None:
    """Measure (a), (b) and (e) once, with the smallest tree."""
    tree = base / f"tree-{contender.name.replace(' ', '-')}"
    if not tree.exists():
        make_tree(tree, comparison.SMALLEST)
    count = plan.saves * (OUR_FACTOR if contender.family == "ours" else 1)
    first = 1000 * (turn + 1)
    with serving(contender, tree, base / f"state-{tree.name}") as service:
        saves(service, result, comparison.SMALLEST, count, chance=chance, first=first)
        again = [] if turn >= plan.broken_rounds else list(BROKEN)
        while again and broken(service, result, kind := again.pop(0), first + count + len(again)):
            pass
    for kind in again:  # What did not come back is started anew for the other fault.
        with serving(contender, tree, base / f"state-{tree.name}") as service:
            broken(service, result, kind, first + count + len(BROKEN))


def in_size(
    contender: Contender, result: Result, base: Path, files: int, *, count: int, chance: random.Random
) -> None:
    """Measure (g): the time from a save to the new code in a tree of this size, in one tree in turn."""
    tree = base / "tree"
    if not tree.exists():
        make_tree(tree, files)
    number = 1000 * (1 + len(list(base.glob("wb-*"))))
    with serving(contender, tree, base / f"state-{contender.name.replace(' ', '-')}") as service:
        time.sleep(SETTLED_SECONDS)
        saves(service, result, files, count, chance=chance, first=number)


def git(tree: Path, *words: str) -> None:
    who = ("-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=tree, check=True, capture_output=True)  # noqa: S607 -- git of the PATH


def make_repository(tree: Path) -> None:
    """Make a repository with two branches that differ in so many files."""
    make_tree(tree, 0, CHECKOUT_FILES)
    (tree / ".gitignore").write_text("__pycache__/\n", encoding="utf-8")
    git(tree, "init", "-q", "-b", "one")
    git(tree, "add", ".")
    git(tree, "commit", "-qm", "one")
    git(tree, "checkout", "-qb", "two")
    for number in range(CHECKOUT_FILES - 1):
        write_part(tree, number, 1)
    (tree / "version.py").write_text("def number() -> int:\n    return 2\n", encoding="utf-8")
    git(tree, "commit", "-qam", "two")
    git(tree, "checkout", "-q", "one")


def checkout(service: Service, result: Result) -> None:
    """Measure (d): how many processes a checkout starts."""
    # Nothing that is checked out is of the second in which the program was read.
    time.sleep(FIX_SECONDS + service.contender.rest_seconds)
    began = time.monotonic_ns()
    git(service.place.tree, "checkout", "-q", "two")
    service.saved()
    seen = service.until(lambda: service.first(2, began) is not None, NEW_CODE_SECONDS)
    calm = [len(service.starts(began)), time.monotonic()]

    def is_calm() -> bool:
        if len(service.starts(began)) != calm[0]:
            calm[:] = [len(service.starts(began)), time.monotonic()]
        return time.monotonic() - calm[1] > CALM_SECONDS

    service.until(is_calm, 2 * NEW_CODE_SECONDS)
    result.values["checkout_starts"] = len(service.starts(began))
    result.values["checkout_seen"] = seen


def stale(service: Service, result: Result, batches: int) -> None:
    """Measure (c): how many of the edits that keep size and time of a file are not what runs then."""
    edits = not_running = unnoticed = 0
    for digit in range(2, 2 + batches):
        began = time.monotonic_ns()
        for number in range(EDITED_AT_ONCE):
            path = part(service.place.tree, number)
            was = path.stat()
            write_part(service.place.tree, number, digit)
            os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))
        service.saved()
        wanted = str(digit) * EDITED_AT_ONCE

        def decided(began: int = began, wanted: str = wanted) -> bool:
            lines, starts = service.shown(began), service.starts(began)
            if lines and lines[-1].digits == wanted:
                return True
            late = starts and time.monotonic_ns() - starts[-1].at_ns > STALE_SECONDS * 1e9
            return bool(late and lines and lines[-1].pid == starts[-1].pid)

        service.until(decided, UNNOTICED_SECONDS)
        lines = service.shown(began)
        shown = (lines[-1].digits if lines else None) or "?" * EDITED_AT_ONCE
        missed = sum(seen != want for seen, want in zip(shown, wanted, strict=True))
        edits += EDITED_AT_ONCE
        not_running += missed
        unnoticed += missed if not service.starts(began) else 0
        time.sleep(SETTLED_SECONDS)
    result.values |= {"edits": edits, "stale": not_running, "unnoticed": unnoticed}


def git_and_stale(contender: Contender, result: Result, base: Path, plan: Plan) -> None:
    """Measure (c) and (d), in one tree."""
    tree = base / contender.name.replace(" ", "-")
    make_repository(tree)
    with serving(contender, tree, base / f"state-{tree.name}") as service:
        checkout(service, result)
        stale(service, result, plan.batches)


def idle(everybody: Sequence[tuple[Contender, Result]], base: Path, files: int, seconds: float) -> None:
    """Measure (f): all of them beside each other, at rest; both figures are the kernel's."""
    with contextlib.ExitStack() as stack:
        running = []
        for contender, result in everybody:
            # We remove the bytecode of others, so ours does not share its tree.
            own = contender.name.replace(" ", "-") if contender.family == "ours" else "peers"
            tree = base / f"idle-{files}-{own}"
            if not tree.exists():
                make_tree(tree, files)
            with noting(result):
                service = stack.enter_context(
                    serving(contender, tree, base / f"state-{tree.name}", idle=True)
                )
                running.append((service, result))
        time.sleep(IDLE_SETTLE_SECONDS)
        groups = [service.processes() for service, _ in running]
        before, began = [cpu_ns(group) for group in groups], time.monotonic_ns()
        time.sleep(seconds)
        took = time.monotonic_ns() - began
        for (_, result), group, used in zip(running, groups, before, strict=True):
            resident, proportional = memory_mib(group)
            result.values["idle"][str(files)] = {
                "cpu_percent": 100 * (cpu_ns(group) - used) / took,
                "rss_mib": resident,
                "pss_mib": proportional,
            }


def cold_start() -> float:
    """Return the milliseconds of a plain Python that imports the same two packages."""
    began = time.monotonic_ns()
    subprocess.run([sys.executable, "-c", COLD], check=True)
    return (time.monotonic_ns() - began) / 1e6


def cold_starts(contender: Contender, result: Result, base: Path, count: int) -> dict[str, list[float]]:
    """Measure a plain Python and the start of our whole service, in turn."""
    plain, service_ms = [], []
    for number in range(count):
        plain += [cold_start(), cold_start()]
        tree = base / f"cold-{number}"
        make_tree(tree, comparison.SMALLEST)
        service = Service(contender, tree, base / f"state-cold-{number}")
        with noting(result):
            service.start()
            service_ms.append((service.readies_ns[0] - service.started_ns) / 1e6)
            service.stop()
    return {"python_ms": plain, "service_ms": service_ms}


def demo() -> dict[str, Any]:
    """Measure the memory of our supervisor and its zygote while the demo of the bundled monitor runs."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [OURS / "wa-monitor", "demo"], env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            return _memory_of_demo(process)
        finally:
            interrupt(process)


def _memory_of_demo(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.5)
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = child.cmdline()
                if "run" not in words or not any(word.endswith("wa-supervisor") for word in words):
                    continue
                told = status(Path(words[words.index("--runtime-dir") + 1]))
                zygote = told.get("zygote")
                state = zygote["state"] if isinstance(zygote, dict) else "none"
                if not told.get("live") or state == "building":
                    continue
                time.sleep(3)
                parts = {"supervisor": memory_mib([child])}
                if isinstance(zygote, dict) and zygote.get("pid"):
                    parts["zygote"] = memory_mib([psutil.Process(int(zygote["pid"]))])
                return {"zygote_state": state} | {
                    name: {"rss_mib": rss, "pss_mib": pss} for name, (rss, pss) in parts.items()
                }
    return {"problem": "the demo had no live generation after 90 s"}


def versions() -> dict[str, str]:
    """Return the installed versions of the peers; empty where their environment is missing."""
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.metadata['Name'].lower(): d.version for d in m.distributions()}))"
    )
    try:
        return dict(json.loads(subprocess.check_output([PEERS / "python", "-c", code], text=True)))
    except (OSError, subprocess.CalledProcessError):
        return {}


def measure(plan: Plan, only: str | None, parts: str, base: Path) -> dict[str, Any]:
    """Measure everything; return what is written to ``peers.json``."""
    began, load = time.monotonic(), os.getloadavg()[0]
    chosen = [c for c in (*contenders.our_ways(), *contenders.peers()) if only is None or only in c.name]
    if not chosen:
        raise SystemExit(f"no contender's name holds {only!r}")
    everybody = [(contender, Result(contender)) for contender in chosen]
    single = [(c, result) for c, result in everybody if "overlap" not in c.name]
    program = (contenders.alone(), Result(contenders.alone()))
    chance = random.Random(6)  # noqa: S311 -- an order, no secret
    starts: dict[str, list[float]] = {"python_ms": [], "service_ms": []}
    first, first_result = everybody[0]
    if first.family == "ours" and "a" in parts:
        say("cold starts")
        starts = cold_starts(first, first_result, base, plan.cold_starts)
    for turn in range(plan.rounds if "a" in parts else 0):
        for contender, result in chance.sample(everybody, len(everybody)):
            say(f"round {turn + 1}: {contender.name}")
            with noting(result):
                one_round(contender, result, base, plan, turn=turn, chance=chance)
    for contender, result in chance.sample(everybody, len(everybody)) if "c" in parts else ():
        say(f"checkout and stale code: {contender.name}")
        with noting(result):
            git_and_stale(contender, result, base / "git", plan)
    for files in plan.sizes if "g" in parts else ():
        here = base / f"size-{files}"
        for contender, result in chance.sample(single, len(single)):
            say(f"{files} files: {contender.name}")
            # Ours as often after a start as in (a): the first save has no child that was forked ahead.
            count = plan.saves * OUR_FACTOR if contender.family == "ours" else plan.saves_in_size
            with noting(result):
                in_size(contender, result, here, files, count=count, chance=chance)
        shutil.rmtree(here)
    for files in plan.idle_sizes if "f" in parts else ():
        say(f"idle with {files} files")
        idle([program, *single], base, files, plan.idle_seconds)
    told = {}
    if "f" in parts:
        say("memory with the demo")
        told = demo()
    return {
        "machine": {
            "python": sys.version.split()[0], "cores": os.cpu_count(), "load_before": load,
            "load_after": os.getloadavg()[0], "seconds": time.monotonic() - began,
        },
        "plan": vars(plan), "our_factor": OUR_FACTOR, "versions": versions(), "starts": starts,
        "contenders": [result.values for _, result in everybody], "alone": program[1].values, "demo": told,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the supervisor with what others use.")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, to see whether it works; keeps nothing"
    )
    parser.add_argument("--only", help="contenders whose name holds this text; keeps nothing")
    parser.add_argument("--parts", default="acgf", help="a: rounds; c: stale code, git; g: sizes; f: idle")
    given = parser.parse_args()
    if (
        signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    ):  # A shell that starts us in the background does that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    whole = not given.quick and given.only is None and given.parts == parser.get_default("parts")
    with tempfile.TemporaryDirectory(prefix="wb-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "git").mkdir()
        measured = measure(QUICK if given.quick else WHOLE, given.only, given.parts, Path(folder))
    text = comparison.report(measured)
    print(text)
    if not whole:
        return
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "peers.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "peers.md").write_text(text, encoding="utf-8")
    plot = [
        PEERS / "python",
        Path(__file__).with_name("plot.py"),
        RESULTS / "peers.json",
        RESULTS / "peers.png",
    ]
    if subprocess.run(plot, check=False).returncode:
        say("no plot: it needs matplotlib in the environment of the peers")


if __name__ == "__main__":
    main()
