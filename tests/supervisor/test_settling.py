"""When a change is looked at and when it may take over, in time that is passed in; who writes, for real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.reload import Reload
from supervisor.settling import MAX_SETTLE_SECONDS, Settling
from supervisor.writers import is_written
from tests.supervisor.helpers_edges import folder_for_everybody, run_unprivileged

HOLD = "import sys; file = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"


def settling() -> Settling:
    return Settling(Reload("watch", 0.0), 0.0, 0.0)


def test_one_finished_file_is_looked_at_at_once_and_hands_over_after_the_short_quiet_period() -> None:
    one = settling()
    one.sign("a.py", 1.0, finished=True)
    assert one.may_look_ahead
    assert one.due_at(None) == 1.0
    assert one.calm_at(None) == pytest.approx(1.01)
    one.looked_ahead = True
    assert one.due_at(None) == pytest.approx(1.01), "it is looked at ahead once"


def test_second_path_takes_the_early_look_away_and_makes_the_quiet_period_longer() -> None:
    two = settling()
    two.sign("a.py", 1.0, finished=True)
    two.looked = True
    two.sign("b.py", 1.001, finished=True)
    assert not two.looked
    assert not two.may_look_ahead
    assert two.due_at(None) == two.calm_at(None) == pytest.approx(1.151)


def test_file_that_follows_another_one_is_waited_for_as_for_several() -> None:
    next_one = Settling(Reload("watch", 1.0), 1.0, 1.0, before=frozenset({"a.py"}))
    next_one.sign("a.py", 1.0, finished=True)
    assert next_one.may_look_ahead, "the same file is saved twice"
    next_one.sign("b.py", 1.0, finished=True)
    assert not next_one.may_look_ahead
    assert next_one.due_at(None) == pytest.approx(1.15)


def test_file_that_its_writer_has_not_closed_is_not_looked_at_early() -> None:
    half = settling()
    half.sign("a.py", 1.0, finished=False)
    assert not half.may_look_ahead
    assert half.due_at(None) == pytest.approx(1.15)
    half.sign("a.py", 1.1, finished=True)
    assert half.due_at(None) == 1.1


def test_tree_that_never_rests_is_looked_at_after_the_longest_wait() -> None:
    restless = settling()
    for number in range(1000):
        restless.sign(f"{number % 2}.py", number / 100, finished=False)
    assert restless.due_at(None) == MAX_SETTLE_SECONDS
    assert restless.is_held_by_writer(MAX_SETTLE_SECONDS - 0.1, lambda _: True)
    assert not restless.is_held_by_writer(MAX_SETTLE_SECONDS, lambda _: True)


def test_record_that_has_ended_is_not_used_again() -> None:
    ahead = settling()
    ended = ahead.reload
    ahead.take_up("scan")
    assert ahead.reload is ended
    ended.finish("rejected", 1.0)
    ahead.sign("a.py", 2.0, finished=True)
    ahead.take_up("scan")
    assert (ahead.reload.outcome, ahead.reload.trigger, ahead.reload.began_at) == (None, "scan", 2.0)


def test_quiet_period_of_the_operator_holds_the_handover_and_not_the_look() -> None:
    one = settling()
    one.sign("a.py", 1.0, finished=True)
    assert one.due_at(2.0) == 1.0
    assert one.calm_at(2.0) == 3.0


def test_writer_is_asked_about_again_in_a_moment() -> None:
    held = settling()
    held.sign("a.py", 1.0, finished=True)
    assert held.is_held_by_writer(1.2, lambda _: True)
    assert 1.2 < held.due_at(None) <= 1.25
    assert not held.is_held_by_writer(1.25, lambda _: False)
    assert not held.is_held_by_writer(1.25, lambda _: None), "what cannot be known holds nobody"


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "a.py"
    path.write_text("VALUE = 1\n", encoding="utf-8")
    yield path
    assert path.read_text(encoding="utf-8") == "VALUE = 1\n", "asking changes nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="leases are Linux'")
def test_file_counts_as_written_while_another_process_has_it_open_for_writing(source: Path) -> None:
    if is_written(str(source)) is None:
        pytest.skip("the file system of the temporary folder has no leases")
    for mode, expected in (("r", False), ("a", True), ("r+", True)):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, source, mode], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdin is not None
        assert holder.stdout is not None
        with holder.stdin, holder.stdout:
            holder.stdout.readline()
            assert is_written(str(source)) is expected
        assert holder.wait() == 0
        assert is_written(str(source)) is False


def test_what_is_no_file_of_ours_is_not_known(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    assert is_written(str(tmp_path / "pipe.py")) is None
    assert is_written(str(tmp_path)) is None
    assert is_written(str(tmp_path / "nothing.py")) is None


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be somebody else")
def test_file_of_another_user_is_not_known_about() -> None:
    with folder_for_everybody() as folder:
        path = folder / "a.py"
        path.write_text("", encoding="utf-8")
        path.chmod(0o644)
        imports = "import sys\nfrom supervisor.writers import is_written"
        assert run_unprivileged(imports, "print(is_written(sys.argv[1]))", str(path)) == "None"


def test_stage_that_ends_before_the_one_before_it_by_the_clock_of_its_turn_took_no_time() -> None:
    reload = Reload("watch", 1.0)
    reload.mark("verify", 2.5)
    reload.mark("settle", 2.0)
    reload.mark("handover", 3.0)
    assert reload.stages == {"verify": 1.5, "settle": 0.0, "handover": 0.5}
