"""Two things at once: the supervisor's own queue, fed by hand in orders that are hard to hit from outside."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor import blobs
from supervisor.bytecode import Compiler
from supervisor.events import Attested, TreeReady
from supervisor.lifecycle import Generation, Stage, State
from supervisor.manifest import Manifest
from supervisor.output import Output
from supervisor.reload import Reload
from supervisor.service import Service
from supervisor.settings import Options, Target, resolve


@pytest.fixture
def service(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A supervisor whose loop does not turn."""
    monkeypatch.chdir(tree)
    options = Options(
        runtime_dir=str(tmp_path / "run"), state_dir=str(tmp_path / "state"), listen="127.0.0.1:0"
    )
    settings = resolve(Target("script", "main.py"), options)
    output = Output(tmp_path / "child.log")
    compiler = Compiler(
        blobs=blobs.place(settings.state_dir), scratch=settings.runtime_dir, environment=os.environ
    )
    created = Service(settings, output, lambda: settings, compiler, inherited={})
    yield created
    for number in range(1, 4):
        created._fleet.kill(number)
    while created._fleet.manifests:
        created._fleet.reap(time.monotonic())
    created._close()
    output.close()


def manifest(service: Service, mark: str) -> Manifest:
    made = Manifest.of(service._settings.tree, {"main.py": mark * 64})
    service._manifests[made.digest] = made
    return made


def candidate(service: Service, tree: Manifest) -> Reload:
    now = time.monotonic()
    started = Generation(1, tree.digest, "watch", Stage.STARTED, now, now + 30, was_started=True)
    service._state = State(candidate=started, next_number=2)
    service._reloads[1] = Reload("watch", now, tree=tree.digest)
    return service._reloads[1]


def test_build_that_ends_as_a_candidate_goes_live_is_launched(service: Service) -> None:
    older, newer = manifest(service, "a"), manifest(service, "b")
    candidate(service, older)
    service.happened(Attested(1, None))
    service.happened(TreeReady(newer.digest, "watch"), Reload("watch", time.monotonic(), tree=newer.digest))
    service._decide()
    assert service._state.live is not None
    assert service._state.live.tree == older.digest
    assert service._state.candidate is not None
    assert service._state.candidate.tree == newer.digest


def test_reload_whose_tree_is_on_its_way_already_ends_with_it(service: Service) -> None:
    tree = manifest(service, "a")
    under_way = candidate(service, tree)
    told: list[str | None] = []
    asked = Reload("cli", time.monotonic(), tree=tree.digest)
    asked.on_finish.append(lambda reload: told.append(reload.outcome))
    service.happened(TreeReady(tree.digest, "cli"), asked)
    service._decide()
    assert asked.outcome == "unchanged"
    assert told == []
    service.happened(Attested(1, None))
    service._decide()
    assert under_way.outcome == "live"
    assert told == ["live"]
