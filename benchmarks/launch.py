"""Where the time of a start goes, with the zygote and without: stage by stage, for one callable.

An application of one package imports psycopg and prometheus_client. It is started again and again, each time
from a changed source, as the supervisor does it: a process, its imports, the attestation at the gate, ``go``,
the application's first word, the attestation at work, and from SIGTERM to the end of the process. Cold starts
and forks take turns. Prints a Markdown table and writes it to ``benchmarks/results/launch.md``.
"""

from __future__ import annotations

import itertools
import os
import select
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from supervisor import launch, orphans, verify
from supervisor.blobs import BlobStore
from supervisor.child.codeprint import codeprint, every
from supervisor.child.zygote import PLACEHOLDERS
from supervisor.launch import Child, LaunchRequest
from supervisor.manifest import Manifest, Tree, scan
from supervisor.settings import Target
from supervisor.zygote import Plan, Zygote

RESULT = Path(__file__).parent / "results" / "launch.md"
STARTS = 40
APPLICATION = """\
import os, signal, sys
import psycopg, prometheus_client
NUMBER = {number}

def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.write(os.open(sys.argv[1], os.O_WRONLY), b"begun")
    while True:
        signal.pause()
"""
STAGES = ("process", "imported", "attested at the gate", "first word", "attested at work", "gone")


class Bench:
    def __init__(self, folder: Path) -> None:
        self.tree = folder / "app"
        self.tree.mkdir()
        (self.tree / "__init__.py").touch()
        self.fifo = folder / "word"
        os.mkfifo(self.fifo)
        self.blobs = BlobStore(folder / "state")
        self.number = 0
        self.folder = folder
        self.selector = selectors.DefaultSelector()
        self.zygote = Zygote(self.selector)
        self.environment = {k: v for k, v in os.environ.items() if k not in PLACEHOLDERS}

    def save(self) -> tuple[Manifest, dict[str, dict[str, str]]]:
        self.number += 1
        (self.tree / "main.py").write_text(APPLICATION.format(number=self.number), encoding="utf-8")
        manifest = scan(Tree((str(self.tree),)), None, self.blobs.put).manifest
        prints = {}
        for path, digest in manifest.sources.items():
            code = compile(Path(manifest.absolute(path)).read_bytes(), "<any>", "exec", dont_inherit=True)
            prints[digest] = {codeprint(part): part.co_qualname for part in every(code)}
        return manifest, prints

    def start(self, zygote: Zygote | None) -> dict[str, float]:
        manifest, prints = self.save()
        request = LaunchRequest(
            generation=self.number,
            tree=manifest.digest,
            manifest=self.blobs.put_manifest(manifest),
            blobs=self.blobs.blobs,
            target=Target("callable", "app.main:main", (str(self.fifo),)),
            environment=self.environment | {"WA_TREE": manifest.digest, "WA_GENERATION": str(self.number)},
            directory=self.folder,
            sources=manifest.sources,
        )
        word = os.open(self.fifo, os.O_RDONLY | os.O_NONBLOCK)
        times = [time.monotonic()]
        child = launch.launch(request, zygote=zygote)
        times.append(time.monotonic())
        frame(child, "imported")
        times.append(time.monotonic())
        self.attest(child, manifest, prints)
        times.append(time.monotonic())
        child.send({"type": "go"})
        select.select([word], [], [])
        times.append(time.monotonic())
        self.attest(child, manifest, prints)
        times.append(time.monotonic())
        child.send({"type": "modules"})  # As the supervisor does when it is live.
        self.tell(request, frame(child, "modules"))
        self.attest(child, manifest, prints)
        asked = time.monotonic()
        child.terminate()
        assert child.pidfd is not None
        select.select([child.pidfd], [], [])
        gone = time.monotonic()
        launch.reap(child)
        os.close(word)
        steps = [*(b - a for a, b in itertools.pairwise(times)), gone - asked]
        return {stage: 1000 * step for stage, step in zip(STAGES, steps, strict=True)}

    def attest(self, child: Child, manifest: Manifest, prints: dict[str, dict[str, str]]) -> None:
        child.send({"type": "attest", "nonce": "n"})
        verdict = verify.compare(manifest, manifest, verify.parse(frame(child, "attestation")), prints)
        assert verdict.attested, verdict.problem

    def tell(self, request: LaunchRequest, loaded: dict[str, Any]) -> None:
        environment = {k: v for k, v in request.environment.items() if k not in PLACEHOLDERS}
        plan = Plan(
            modules=loaded["modules"],
            environment=environment,
            directory=str(self.folder),
            manifest=str(request.manifest),
            blobs=str(request.blobs),
            first_path=str(self.folder),
            sources=request.sources,
            compiled=frozenset(map(tuple, loaded["compiled"])),
        )
        self.zygote.want(plan)
        while self.zygote.status["state"] != "ready":
            self.zygote.reap()
            self.zygote.turn(time.monotonic(), idle=True, enabled=True)
            for key, _ in self.selector.select(0.1):
                key.data()


def frame(child: Child, kind: str) -> dict[str, Any]:
    while True:
        select.select([child.channel], [], [])
        for received in child.receive():
            if received["type"] == kind:
                return received


def plain() -> float:
    """Return the milliseconds of a plain Python that imports the same two packages."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import psycopg, prometheus_client"], check=True)
    return 1000 * (time.monotonic() - began)


def main() -> None:
    orphans.become_subreaper()
    with tempfile.TemporaryDirectory(prefix="wa-bench-") as folder:
        bench = Bench(Path(folder))
        bench.start(None)
        forked, cold, yardstick = [], [], []
        for _ in range(STARTS):
            forked.append(bench.start(bench.zygote))
            cold.append(bench.start(None))
            yardstick.append(plain())
        state = bench.zygote.status
        assert state["state"] == "ready", state
        bench.zygote.close()
    machine = (
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end. "
        "Milliseconds; median and 95th percentile. A plain `import psycopg, prometheus_client` took "
        f"{statistics.median(yardstick):.0f} in the same run."
    )
    rows = [
        f"# Launch, {STARTS} starts each",
        "",
        machine,
        "",
        "| until | zygote: median | p95 | cold: median | p95 |",
        "|---|---|---|---|---|",
    ]
    for stage in STAGES:
        cells = [spread([times[stage] for times in runs]) for runs in (forked, cold)]
        rows.append(f"| {stage} | {' | '.join(cells)} |")
    up_to_word = [spread([sum(times[s] for s in STAGES[:4]) for times in runs]) for runs in (forked, cold)]
    rows.append(f"| launch to first word, together | {' | '.join(up_to_word)} |")
    text = "\n".join([*rows, ""])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(text, encoding="utf-8")
    print(text)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} | {statistics.quantiles(values, n=20)[-1]:.1f}"


if __name__ == "__main__":
    main()
