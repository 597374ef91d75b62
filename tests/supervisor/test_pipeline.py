"""The pipeline over real files with its real helper, in time that is passed in."""

from __future__ import annotations

import hashlib
import os
import random
import select
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from supervisor import manifest
from supervisor.blobs import BlobStore
from supervisor.bytecode import DEADLINE_SECONDS, Compiler
from supervisor.checkout import Checkout
from supervisor.manifest import Manifest, Tree
from supervisor.pipeline import Built, Pipeline
from supervisor.reload import Reload
from supervisor.settling import MAX_SETTLE_SECONDS
from supervisor.watch import Hint
from tests.supervisor.helpers_edges import run_git

CALM_SECONDS = 1.0
"""Longer than any quiet period."""


@dataclass
class Bench:
    """A pipeline, what it told, and a clock that only the test moves."""

    tree: Path
    pipeline: Pipeline
    ended: list[Reload]
    left: list[str]
    now: float = 100.0
    live: Manifest | None = None
    candidate: Reload | None = None
    launched: list[Built] = field(default_factory=list)

    def save(self, name: str, text: str, *, finished: bool = True) -> None:
        """Write a file as an editor does, and say so."""
        (self.tree / name).write_text(text, encoding="utf-8")
        self.pipeline.hint([Hint(str(self.tree / name), finished=finished)], self.now)

    def advance(self, seconds: float = 0.0) -> None:
        """Let time pass, and take what is due, with what the helper has to say."""
        self.now += seconds
        self.pipeline.advance(self.now, live=self.live, candidate=self.candidate)

    def build(self) -> Built | None:
        """Wait for the helper; what it passed is on its way to its gate then."""
        job = self.pipeline.job
        assert job is not None, "nothing is being built"
        while (report := job.read()) is None:
            assert select.select([job], [], [], DEADLINE_SECONDS)[0], "the helper does not end"
        built = self.pipeline.compiled(report, self.now)
        if built is not None:
            self.launched.append(built)
            self.candidate = built.reload
        return built

    def gate(self) -> bool:
        """Ask whether the candidate may take over; if so, it does."""
        assert self.candidate is not None
        if self.pipeline.gate(self.now, self.candidate):
            self.live, self.candidate = self.launched[-1].manifest, None
            return True
        return False

    def disk(self) -> str:
        """Return the digest of what is really on disk."""
        tree = Tree((str(self.tree),))
        return manifest.scan(tree, None, lambda content: hashlib.sha256(content).hexdigest()).manifest.digest


@pytest.fixture
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Bench:
    """A pipeline whose tree of ``a.py`` and ``b.py`` is live."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("a.py", "b.py"):
        (tree / name).write_text("VALUE = 0\n", encoding="utf-8")
    if hasattr(request, "param"):
        run_git(tree, "init", "-q")
    (tmp_path / "run").mkdir()
    ended: list[Reload] = []
    left: list[str] = []
    checkout = Checkout(Tree((str(tree),)))
    blobs = BlobStore(tmp_path / "state")
    pipeline = Pipeline(
        tree=Tree((str(tree),)),
        blobs=blobs,
        compiler=Compiler(blobs=blobs.blobs, scratch=tmp_path / "run", environment=os.environ),
        repository=checkout,
        quiet_seconds=None,
        rehash_seconds=300.0,
        finished=ended.append,
        left=left.append,
    )
    bench = Bench(tree, pipeline, ended, left)
    checkout._clock = lambda: bench.now
    pipeline.trusting = True
    pipeline.ask("start", bench.now)
    bench.advance()
    assert bench.build() is not None
    assert bench.gate()
    return bench


def test_file_is_built_while_the_quiet_period_runs_and_takes_over_after_it(bench: Bench) -> None:
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    built = bench.build()
    assert built is not None
    assert built.manifest.digest == bench.disk()
    assert not bench.gate(), "the quiet period is not over"
    bench.advance(CALM_SECONDS)
    assert bench.gate()
    assert bench.ended == []
    assert built.reload.paths == ("a.py",)


def test_second_file_that_follows_at_once_is_part_of_the_same_reload(bench: Bench) -> None:
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    first = bench.build()
    assert first is not None
    bench.now += 0.001
    bench.save("b.py", "VALUE = 1\n")
    bench.advance(0.1)
    assert bench.pipeline.job is None, "half of a change is not built"
    assert not bench.gate()
    bench.advance(CALM_SECONDS)
    assert bench.left == [first.manifest.digest], "what was started ahead has to go"
    second = bench.build()
    assert second is not None
    assert second.reload is first.reload
    assert bench.gate()
    assert second.reload.paths == ("a.py", "b.py")
    assert bench.ended == [], "nothing is told of the half"


def test_files_that_are_saved_one_after_the_other_are_two_reloads_and_not_as_many_as_files(
    bench: Bench,
) -> None:
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    assert bench.build() is not None
    bench.advance(0.05)
    assert bench.gate()
    for number in range(5):
        bench.save(f"c{number}.py", "VALUE = 1\n")
        bench.advance(0.1)
        assert bench.pipeline.job is None
    bench.advance(0.1)
    second = bench.build()
    assert second is not None
    assert bench.gate()
    assert len(second.reload.paths) == 5
    assert bench.ended == []


def test_half_that_does_not_compile_is_not_told_if_the_rest_follows(bench: Bench) -> None:
    bench.save("a.py", "VALUE = (\n")
    bench.advance()
    assert bench.build() is None
    bench.now += 0.001
    bench.save("a.py", "VALUE = (1)\n")
    bench.advance()
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.gate()
    assert bench.ended == []
    assert bench.pipeline.problem is None


def test_what_does_not_compile_is_rejected_once_the_quiet_period_is_over(bench: Bench) -> None:
    bench.save("a.py", "VALUE = (\n")
    bench.advance()
    assert bench.build() is None
    assert bench.ended == []
    bench.advance(CALM_SECONDS)
    (rejected,) = bench.ended
    assert (rejected.outcome, rejected.reason) == ("rejected", "syntax")
    assert "a.py, line 1" in str(bench.pipeline.problem)
    assert not bench.pipeline.busy


def test_change_that_is_taken_back_while_it_is_built_ends_what_was_started_for_it(bench: Bench) -> None:
    assert bench.live is not None
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    ahead = bench.build()
    assert ahead is not None
    bench.save("a.py", "VALUE = 0\n")
    bench.now += CALM_SECONDS
    same = bench.pipeline.advance(bench.now, live=bench.live, candidate=bench.candidate)
    assert same, "the disk holds what is live: the candidate has to go"
    assert [reload.outcome for reload in bench.ended] == ["unchanged"]
    assert bench.ended[0] is not ahead.reload


def test_change_that_nobody_told_of_closes_the_gate(bench: Bench) -> None:
    """The file that is being handed over is looked at again, an event may be on its way."""
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    first = bench.build()
    bench.advance(CALM_SECONDS)
    (bench.tree / "a.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert not bench.gate()
    bench.advance()
    bench.advance(CALM_SECONDS)
    second = bench.build()
    assert first is not None
    assert second is not None
    assert second.manifest.digest == bench.disk() != first.manifest.digest
    assert bench.gate()


def test_change_elsewhere_closes_the_gate_where_the_watcher_does_not_hear_everything(bench: Bench) -> None:
    bench.pipeline.trusting = False
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    assert bench.build() is not None
    bench.advance(CALM_SECONDS)
    (bench.tree / "b.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert not bench.gate()
    bench.pipeline.trusting = True


@pytest.mark.parametrize("bench", ["git"], indirect=True)
def test_running_git_closes_the_gate_and_holds_the_look(bench: Bench) -> None:
    lock = bench.tree / ".git" / "index.lock"
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    assert bench.build() is not None
    bench.advance(CALM_SECONDS)
    lock.touch()
    assert not bench.gate(), "a checkout has begun"
    bench.save("b.py", "VALUE = 1\n")
    for _ in range(20):
        bench.advance(CALM_SECONDS)
        assert bench.pipeline.job is None, "there is no longest wait for a running git"
    lock.unlink()
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.gate()
    assert bench.launched[-1].manifest.digest == bench.disk()


@pytest.mark.parametrize("bench", ["git"], indirect=True)
@pytest.mark.parametrize("trusting", [True, False])
def test_commit_of_a_tree_is_none_that_head_was_moved_to_while_it_was_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, trusting: bool
) -> None:
    def commit() -> str:
        run_git(bench.tree, "commit", "--quiet", "--allow-empty", "--message=x")
        return run_git(bench.tree, "rev-parse", "HEAD")

    before, put = commit(), BlobStore.put

    def put_late(store: BlobStore, content: bytes) -> str:
        commit()  # The files of this one are not written here; a checkout would have, before it.
        return put(store, content)

    bench.pipeline.trusting = trusting
    bench.save("a.py", "VALUE = 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", put_late)
        bench.advance()
    checkout = bench.pipeline._repository
    assert checkout.head_of(bench.disk()).commit == before
    bench.pipeline.scan(bench.now)
    assert checkout.head_of(bench.disk()).commit == run_git(bench.tree, "rev-parse", "HEAD") != before
    bench.pipeline.close()


@pytest.mark.parametrize("bench", ["git"], indirect=True)
def test_look_during_which_git_wrote_is_not_believed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put = BlobStore.put

    def put_late(store: BlobStore, content: bytes) -> str:
        (bench.tree / "b.py").write_text("VALUE = 1\n", encoding="utf-8")
        run_git(bench.tree, "add", "--all")
        return put(store, content)

    bench.save("a.py", "VALUE = 1\n")
    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", put_late)
        bench.advance()
    assert bench.pipeline.job is None
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.launched[-1].manifest.digest == bench.disk()


@pytest.mark.parametrize("bench", ["git"], indirect=True)
def test_first_event_of_what_git_wrote_is_enough_to_see_all_of_it(bench: Bench) -> None:
    (bench.tree / "b.py").write_text("VALUE = 1\n", encoding="utf-8")
    bench.save("a.py", "VALUE = 1\n")
    run_git(bench.tree, "add", "--all")
    bench.advance()
    assert bench.build() is not None
    assert bench.launched[-1].manifest.digest == bench.disk()


def test_touched_file_is_unchanged(bench: Bench) -> None:
    (bench.tree / "a.py").touch()
    bench.pipeline.hint([Hint(str(bench.tree / "a.py"), finished=True)], bench.now)
    bench.advance()
    bench.advance(CALM_SECONDS)
    assert [reload.outcome for reload in bench.ended] == ["unchanged"]
    assert len(bench.launched) == 1


def test_scan_reads_every_file_again_within_its_time(bench: Bench) -> None:
    """A file system may lie about times: what changed behind equal stat tuples is found by reading."""
    snapshot = bench.pipeline._snapshot
    assert snapshot is not None
    (bench.tree / "a.py").write_text("VALUE = 7\n", encoding="utf-8")
    facts = (bench.tree / "a.py").stat()
    lie = (facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino, facts.st_dev)
    bench.pipeline._snapshot = manifest.Snapshot(snapshot.manifest, snapshot.stats.changed({"a.py": lie}))
    for _ in range(301):
        bench.now += 1.0
        bench.pipeline.scan(bench.now)
        if bench.pipeline.busy:
            break
    bench.advance()
    built = bench.build()
    assert built is not None
    assert built.manifest.digest == bench.disk()
    assert built.reload.trigger == "scan"


def test_random_saves_end_with_what_is_on_disk_and_one_record_each(bench: Bench) -> None:
    seed = random.randrange(2**32)  # noqa: S311 -- keeps no secret
    print("seed", seed)
    chance = random.Random(seed)  # noqa: S311 -- keeps no secret
    for number in range(15):
        for _ in range(chance.randrange(1, 5)):
            name = chance.choice(["a.py", "b.py", "c.py"])
            match chance.randrange(4):
                case 0 if (bench.tree / name).exists() and name == "c.py":
                    (bench.tree / name).unlink()
                    bench.pipeline.hint([Hint(str(bench.tree / name), finished=True)], bench.now)
                case 1:
                    shutil.copy(bench.tree / "a.py", bench.tree / "new")
                    (bench.tree / "new").replace(bench.tree / name)
                    bench.pipeline.hint([Hint(str(bench.tree / name), finished=True)], bench.now)
                case _:
                    bench.save(name, f"VALUE = {number}, {chance.random()}\n", finished=chance.random() < 0.8)
            bench.advance(chance.choice([0.0, 0.001, 0.05]))
            if bench.pipeline.job is not None and chance.random() < 0.7:
                bench.build()
        while bench.pipeline.busy or bench.candidate is not None:
            bench.advance(CALM_SECONDS)
            if bench.pipeline.job is not None:
                bench.build()
            if bench.live is not None and bench.live.digest == bench.disk():
                bench.candidate = None
            elif bench.candidate is not None:
                bench.gate()
        assert bench.live is not None
        assert bench.live.digest == bench.disk()
    ended = [reload.identity for reload in bench.ended]
    assert len(ended) == len(set(ended))


def test_machine_that_cannot_compile_now_is_no_mistake_of_the_sources_and_is_tried_again(
    bench: Bench, tmp_path: Path
) -> None:
    (tmp_path / "run").rename(tmp_path / "away")
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    assert bench.build() is None
    (rejected,) = bench.ended
    assert (rejected.outcome, rejected.reason) == ("rejected", "crash")
    assert "could not be started" in str(rejected.detail)
    (tmp_path / "away").rename(tmp_path / "run")
    bench.advance(60.0)
    assert bench.build() is not None
    assert bench.gate()
    assert bench.launched[-1].manifest.digest == bench.disk()
    assert bench.launched[-1].reload is not rejected


def test_half_a_file_that_is_being_written_when_a_pause_ends_is_not_built(bench: Bench) -> None:
    bench.pipeline.paused = True
    bench.save("b.py", "VALUE = 1\n")
    bench.advance(MAX_SETTLE_SECONDS + CALM_SECONDS)
    with (bench.tree / "a.py").open("w", encoding="utf-8") as file:
        file.write("VALUE = (")
        file.flush()
        bench.pipeline.hint([Hint(str(bench.tree / "a.py"), finished=False)], bench.now)
        bench.pipeline.resume(bench.now)
        bench.advance(CALM_SECONDS)
        assert bench.pipeline.job is None
        file.write("1)\n")
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.ended == []


@pytest.mark.parametrize("bench", ["git"], indirect=True)
def test_a_tree_that_git_has_held_for_long_may_come_to_rest_after_it(bench: Bench) -> None:
    lock = bench.tree / ".git" / "index.lock"
    lock.touch()
    bench.save("b.py", "VALUE = 1\n")
    bench.advance(CALM_SECONDS)
    bench.advance(MAX_SETTLE_SECONDS)
    with (bench.tree / "a.py").open("w", encoding="utf-8") as file:
        file.write("VALUE = (")
        file.flush()
        bench.pipeline.hint([Hint(str(bench.tree / "a.py"), finished=False)], bench.now)
        lock.unlink()
        bench.advance(CALM_SECONDS)
        assert bench.pipeline.job is None
        file.write("1)\n")
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.ended == []


def test_new_settings_that_nobody_waits_for_do_not_hurry_a_tree(bench: Bench) -> None:
    with (bench.tree / "a.py").open("w", encoding="utf-8") as file:
        file.write("VALUE = (")
        file.flush()
        bench.pipeline.hint([Hint(str(bench.tree / "a.py"), finished=False)], bench.now)
        bench.pipeline.ask("config", bench.now, renew=True, at_once=False)
        bench.advance(CALM_SECONDS)
        assert bench.pipeline.job is None
        file.write("1)\n")
    bench.advance(CALM_SECONDS)
    assert bench.build() is not None
    assert bench.ended == []


def test_what_does_not_compile_is_let_go_when_a_pause_holds_what_came_after_it(bench: Bench) -> None:
    bench.save("a.py", "def (\n")
    bench.advance()
    assert bench.build() is None
    bench.pipeline.paused = True
    bench.save("b.py", "VALUE = 1\n")
    bench.advance(CALM_SECONDS)
    assert not bench.pipeline.busy
    assert bench.ended == []


def test_who_waits_for_a_tree_that_never_rests_is_answered_all_the_same(bench: Bench) -> None:
    bench.pipeline.ask("cli", bench.now, lambda _: None)
    for number in range(150):
        bench.save("a.py", f"VALUE = {number}\n", finished=False)
        bench.save("b.py", f"VALUE = {number}\n", finished=False)
        bench.advance(0.1)
    assert [reload.outcome for reload in bench.ended if reload.on_finish] == ["superseded"]
    bench.pipeline.close()


def test_stop_ends_what_is_built_ahead_once(bench: Bench) -> None:
    bench.save("a.py", "VALUE = 1\n")
    bench.advance()
    assert bench.pipeline.job is not None
    bench.pipeline.close()
    assert [reload.outcome for reload in bench.ended] == ["superseded"]
