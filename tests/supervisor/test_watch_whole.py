"""The whole supervisor over files that change in every way in which files change: the right code, once."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.supervisor.harness import NAMESPACE, SCRIPT, SOAK, Supervised, needs_namespaces, until

Supervise = Callable[..., Supervised]
LIVE = r"reload \((\w+)\): live"
OUTCOME = re.compile(r"reload \(\w+\): (\w+)")


def outcomes(started: Supervised) -> list[str]:
    """What every reload came to, but for those after which nothing had changed."""
    started.reload()  # What was on its way ends before it.
    found = [match[1] for line in started.output.lines if (match := OUTCOME.search(line))]
    return [outcome for outcome in found if outcome != "unchanged"]


def source(tree: Path) -> Path:
    return tree / "modules" / "answer.py"


# --- saves ------------------------------------------------------------------------------------------------


def truncate(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def rename_over(path: Path, text: str) -> None:
    temporary = path.with_name(".answer.py.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def move_in_from_elsewhere(path: Path, text: str) -> None:
    temporary = path.parent.parent.parent / "elsewhere.py"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def keep_a_backup(path: Path, text: str) -> None:
    """As vim does with 'backupcopy=no': the old file away, the new one written under its name."""
    path.rename(path.with_name("answer.py~"))
    path.write_text(text, encoding="utf-8")
    path.with_name("answer.py~").unlink()


def delete_and_write(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text, encoding="utf-8")


def write_in_halves(path: Path, text: str) -> None:
    """As a slow copy does: the file stays open in between."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        time.sleep(0.3)
        file.write(text[len(text) // 2 :])


@pytest.mark.parametrize(
    "save",
    [truncate, rename_over, move_in_from_elsewhere, keep_a_backup, delete_and_write, write_in_halves],
)
def test_save_of_any_kind_is_one_reload(
    supervise: Supervise, tree: Path, save: Callable[[Path, str], None]
) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    save(source(tree), "VALUE = 2\n")
    started.expect("serving 2")
    started.expect(LIVE)
    assert outcomes(started) == ["live", "live"]


# --- roots ------------------------------------------------------------------------------------------------


def app(folder: Path, value: int) -> None:
    (folder / "modules").mkdir(parents=True)
    script = SCRIPT.replace('"modules"', 'os.path.join(os.path.dirname(__file__), "modules")')
    (folder / "main.py").write_text(script, encoding="utf-8")
    (folder / "modules" / "answer.py").write_text(f"VALUE = {value}\n", encoding="utf-8")


def test_turn_of_the_current_release_is_one_reload_of_it(supervise: Supervise, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        app(tmp_path / "releases" / str(number), number)
    current = tmp_path / "current"
    current.symlink_to("releases/1")
    started = supervise("--watch=current", "--scan-interval=0.2", "current/main.py", cwd=tmp_path)
    started.expect(LIVE)
    for number in (2, 3):
        (tmp_path / "next").symlink_to(f"releases/{number}")
        (tmp_path / "next").replace(current)
        started.expect(f"serving {number}")
        started.expect(LIVE)
    source(tmp_path / "releases" / "3").write_text("VALUE = 4\n", encoding="utf-8")
    started.expect("serving 4")
    started.expect(LIVE)
    assert outcomes(started) == ["live"] * 4


def test_root_that_is_deleted_keeps_its_code_serving_until_it_is_restored(
    supervise: Supervise, tmp_path: Path
) -> None:
    app(tmp_path / "app", 1)
    started = supervise("--scan-interval=0.2", "app/main.py", cwd=tmp_path)
    started.expect(LIVE)
    pid = started.status()["live"]["pid"]
    shutil.rmtree(tmp_path / "app")
    until(lambda: started.status()["watch"]["mode"] == "polling")
    until(lambda: not started.status()["in_sync"])
    assert started.status()["live"]["pid"] == pid
    app(tmp_path / "new", 2)
    (tmp_path / "new").rename(tmp_path / "app")
    started.expect("serving 2")
    until(lambda: started.status()["watch"]["mode"] == "events" and started.status()["in_sync"])
    source(tmp_path / "app").write_text("VALUE = 3\n", encoding="utf-8")
    started.expect("serving 3")


def test_directory_that_is_moved_out_and_another_one_in_is_one_reload(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    """Edits in the one that was moved in are told as well; a scan that is never due finds none of this."""
    app(tmp_path / "new", 2)
    started = supervise("--scan-interval=600", "main.py", cwd=tree)
    started.expect(LIVE)
    (tree / "modules").rename(tmp_path / "old")
    (tmp_path / "new" / "modules").rename(tree / "modules")
    started.expect("serving 2")
    assert started.expect(LIVE)[1] == "watch"
    source(tree).write_text("VALUE = 3\n", encoding="utf-8")
    started.expect("serving 3")
    assert started.expect(LIVE)[1] == "watch"
    assert outcomes(started) == ["live"] * 3


def test_change_below_any_of_several_roots_and_behind_links_runs(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    """A root, one nested in it, one apart from it, a linked directory and a linked file."""
    for name in ("apart", "shared"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text("VALUE = 1\n", encoding="utf-8")
    (tmp_path / "single.py").write_text("VALUE = 1\n", encoding="utf-8")
    (tree / "modules" / "linked").symlink_to(tmp_path / "shared")
    (tree / "modules" / "single.py").symlink_to(tmp_path / "single.py")
    source(tree).write_text(
        f"import sys; sys.path += [{str(tmp_path / 'apart')!r}, 'modules/linked']\n"
        "import apart, shared, single\n"
        "VALUE = apart.VALUE, shared.VALUE, single.VALUE\n",
        encoding="utf-8",
    )
    roots = [f"--watch={folder}" for folder in (tree, tree / "modules", tmp_path / "apart")]
    started = supervise(*roots, "--scan-interval=0.2", "main.py", cwd=tree)
    started.expect(r"serving \(1, 1, 1\)")
    started.expect(LIVE)
    for number, path in enumerate(("apart/apart.py", "shared/shared.py", "single.py")):
        (tmp_path / path).write_text("VALUE = 2\n", encoding="utf-8")
        started.expect(re.escape("serving " + str(tuple(2 if n <= number else 1 for n in range(3)))))
        started.expect(LIVE)
    assert outcomes(started) == ["live"] * 4


# --- events that are lost, and those that never come ------------------------------------------------------


def test_edit_that_is_lost_in_an_overflow_runs_and_the_overflow_is_counted(
    supervise: Supervise, tree: Path, measured: Callable[[str], None]
) -> None:
    """A scan that is never due does not find it; and to the sources nothing happened but this one edit."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text(encoding="ascii"))
    started = supervise("--scan-interval=600", "main.py", cwd=tree)
    started.expect(LIVE)
    os.kill(started.process.pid, signal.SIGSTOP)
    for number in range(max(17_000, limit)):
        (tree / f"{number}.txt").touch()
    source(tree).write_text("VALUE = 2\n", encoding="utf-8")
    began = time.monotonic()
    os.kill(started.process.pid, signal.SIGCONT)
    started.expect("serving 2")
    measured(f"edit in an overflow: new code after {time.monotonic() - began:.2f} s")
    assert started.expect(LIVE)[1] == "scan"
    assert outcomes(started) == ["live"] * 2
    watch = started.status()["watch"]
    assert (watch["mode"], watch["overflows"], watch["restarts"]) == ("events", 1, 0)


WITH_LIMITS = """
import os, sys
from pathlib import Path
Path("/proc/sys/user/max_inotify_watches").write_text("5")
os.execv(sys.argv[1], sys.argv[1:])
"""


@needs_namespaces
def test_every_edit_runs_although_there_are_fewer_watches_than_directories(
    supervise: Supervise, tree: Path
) -> None:
    names = [f"p{number}" for number in range(13)]
    for name in names:
        (tree / "modules" / name).mkdir()
        (tree / "modules" / name / "__init__.py").write_text("VALUE = 1\n", encoding="utf-8")
    source(tree).write_text(
        f"import {', '.join(names)}\nVALUE = sum(p.VALUE for p in ({', '.join(names)}))\n", encoding="utf-8"
    )
    started = supervise(
        "--scan-interval=0.1",
        "main.py",
        cwd=tree,
        prefix=[*NAMESPACE, sys.executable, "-c", WITH_LIMITS],
    )
    started.expect("serving 13")
    started.expect(LIVE)
    random.Random(5).shuffle(names)  # noqa: S311 -- a seeded sample
    edits = names if SOAK else names[:5]
    for number, name in enumerate(edits, 1):
        (tree / "modules" / name / "__init__.py").write_text("VALUE = 2\n", encoding="utf-8")
        started.expect(f"serving {13 + number}")
        started.expect(LIVE)
    watch = started.status()["watch"]
    assert (watch["mode"], watch["directories"], watch["watches"]) == ("partial", 15, 5)
    assert watch["reason"].startswith("11 of 15 directories are not watched, ")
    assert watch["remedy"] == "raise the limit, which is 5: sysctl -w user.max_inotify_watches=32"


def test_deleted_runtime_directory_is_no_reason_to_suspect_the_watcher(
    supervise: Supervise, tree: Path
) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    shutil.rmtree(started.runtime / "watch")
    until((started.runtime / "watch" / "canary").exists)
    until(lambda: started.status()["watch"]["mode"] == "events")
    assert started.status()["watch"]["restarts"] == 0
    shutil.rmtree(started.runtime)
    started.expect("watch mode partial: events are not proven: ")
