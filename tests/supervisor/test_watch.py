"""File events as hints: what is seen, what is not asked for, and what is said when nothing can be seen."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor.manifest import Tree, source_roots
from supervisor.watch import LOOK_SECONDS, Hint, Watcher

DEADLINE_SECONDS = 10.0
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="it is about inotify")


class Watched:
    """A watcher, a clock that only a test moves, and a way to wait for hints."""

    def __init__(self, *roots: Path) -> None:
        self.now = 0.0
        self._woken = threading.Event()
        self.watcher = Watcher(Tree(source_roots(roots)), self._woken.set, lambda: self.now)
        self.watcher.start()
        self.hints: list[Hint] = []
        self.take()

    def take(self) -> list[Hint]:
        """Take what there is and forget it."""
        found = self.watcher.take()
        self.hints = []
        return found

    def later(self) -> None:
        """Let the time come at which the watcher looks after itself."""
        self.now += LOOK_SECONDS
        self.hints += self.watcher.take()

    def until(self, true: Callable[[], bool]) -> None:
        """Collect hints until something is true."""
        while not true():
            assert self._woken.wait(DEADLINE_SECONDS), f"only {self.hints}"
            self._woken.clear()
            self.hints += self.watcher.take()

    def hears_of(self, path: Path, *, finished: bool | None = None) -> None:
        """Wait for a hint about a path."""
        self.until(lambda: any(h.path == str(path) and finished in {None, h.finished} for h in self.hints))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "pack").mkdir(parents=True)
    (folder / "pack" / "a.py").touch()
    return folder


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    started: list[Watched] = []

    def start(*roots: Path) -> Watched:
        started.append(Watched(*roots))
        return started[-1]

    yield start
    for watched in started:
        watched.watcher.close()


Watch = Callable[..., Watched]


# --- what is seen -----------------------------------------------------------------------------------------


def write(path: Path) -> None:
    path.write_text("A = 2", encoding="utf-8")


def replace_it(path: Path) -> None:
    temporary = path.with_name("temporary")
    temporary.write_text("A = 2", encoding="utf-8")
    temporary.replace(path)


def delete(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("change", [write, replace_it, delete])
def test_finished_change_of_a_source_is_a_hint_that_it_is_finished(
    watch: Watch, root: Path, change: Callable[[Path], None]
) -> None:
    watched = watch(root)
    change(root / "pack" / "a.py")
    watched.hears_of(root / "pack" / "a.py", finished=True)


def test_file_that_is_still_open_is_not_finished(watch: Watch, root: Path) -> None:
    watched = watch(root)
    path = root / "pack" / "a.py"
    with path.open("w", encoding="utf-8") as file:
        file.write("A")
        file.flush()
        watched.hears_of(path, finished=False)
        assert not any(hint.finished for hint in watched.hints)
    watched.hears_of(path, finished=True)


def test_source_in_a_folder_that_was_made_later_is_heard_of(watch: Watch, root: Path) -> None:
    watched = watch(root)
    (root / "later").mkdir()
    watched.hears_of(root / "later")
    (root / "later" / "b.py").touch()
    watched.hears_of(root / "later" / "b.py")


def test_source_in_a_folder_that_was_moved_here_is_heard_of(watch: Watch, root: Path, tmp_path: Path) -> None:
    watched = watch(root)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside").rename(root / "inside")
    watched.hears_of(root / "inside")
    watched.later()
    (root / "inside" / "b.py").touch()
    watched.hears_of(root / "inside" / "b.py")


def test_turn_of_a_link_to_a_directory_is_heard_of(watch: Watch, root: Path) -> None:
    watched = watch(root)
    (root / "link").symlink_to("pack")
    watched.hears_of(root / "link")


def test_root_below_a_folder_with_an_excluded_name_is_watched(watch: Watch, tmp_path: Path) -> None:
    root = tmp_path / "node_modules" / ".git" / "app"
    root.mkdir(parents=True)
    watched = watch(root)
    (root / "a.py").touch()
    watched.hears_of(root / "a.py")


@linux_only
def test_what_is_no_source_and_what_is_only_read_wakes_nobody(watch: Watch, root: Path) -> None:
    """The last change is heard of, and nothing before it: events come in order."""
    for name in ("__pycache__", ".git", "node_modules"):
        (root / name).mkdir()
    watched = watch(root)
    for name in ("data.txt", "__pycache__/a.cpython-311.pyc", ".git/index.lock", "node_modules/x.py"):
        (root / name).touch()
    for _ in range(100):
        (root / "pack" / "a.py").read_bytes()
        list((root / "pack").iterdir())
    (root / "last.py").touch()
    watched.hears_of(root / "last.py")
    assert {hint.path for hint in watched.hints} == {str(root / "last.py")}


# --- places that change under the watcher -----------------------------------------------------------------


def test_root_that_was_made_anew_is_watched_again(watch: Watch, root: Path) -> None:
    watched = watch(root)
    root.rename(root.with_name("old"))
    watched.later()
    assert watched.watcher.mode == "polling"
    root.mkdir()
    watched.later()
    watched.hears_of(root)
    assert watched.watcher.mode == "events"
    (root / "b.py").touch()
    watched.hears_of(root / "b.py")


def test_root_that_is_a_link_is_watched_behind_it_and_after_it_was_turned(
    watch: Watch, tmp_path: Path
) -> None:
    for release in ("1", "2"):
        (tmp_path / release).mkdir()
    current = tmp_path / "current"
    current.symlink_to("1")
    watched = watch(current)
    (tmp_path / "1" / "a.py").touch()
    watched.hears_of(current / "a.py")
    (tmp_path / "next").symlink_to("2")
    (tmp_path / "next").replace(current)
    watched.later()
    watched.hears_of(current)
    (tmp_path / "2" / "b.py").touch()
    watched.hears_of(current / "b.py")


def test_linked_directory_outside_of_the_tree_is_watched(watch: Watch, root: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (root / "modules").symlink_to("../shared")
    watched = watch(root)
    (tmp_path / "shared" / "b.py").touch()
    watched.hears_of(root / "modules" / "b.py")
    assert watched.watcher.mode == "events"


def test_links_in_a_circle_are_watched_and_end(watch: Watch, root: Path) -> None:
    (root / "pack" / "up").symlink_to("..")
    watched = watch(root)
    (root / "b.py").touch()
    watched.hears_of(root / "b.py")


def test_root_that_is_not_there_yet_is_watched_when_it_is(watch: Watch, tmp_path: Path) -> None:
    watched = watch(tmp_path / "later")
    assert (watched.watcher.mode, watched.watcher.directories_total) == ("polling", 0)
    (tmp_path / "later").mkdir()
    watched.later()
    assert (watched.watcher.mode, watched.watcher.directories_total) == ("events", 1)
    (tmp_path / "later" / "a.py").touch()
    watched.hears_of(tmp_path / "later" / "a.py")


def test_watcher_that_is_all_right_does_not_begin_anew(watch: Watch, root: Path) -> None:
    watched = watch(root)
    for _ in range(3):
        watched.later()
    assert watched.hints == []


# --- what cannot be seen ----------------------------------------------------------------------------------


LIMITED = """
import sys
from pathlib import Path
from supervisor.manifest import Tree
from supervisor.watch import Watcher
# The limits below /proc/sys/user are those of the namespace; the machine's own are not ours to touch.
if Path("/proc/self/uid_map").read_text().split()[2] == "4294967295":
    sys.exit("unshare gave no namespace")
for key, value in {"instances": sys.argv[2], "watches": sys.argv[3]}.items():
    Path(f"/proc/sys/user/max_inotify_{key}").write_text(value)
watcher = Watcher(Tree((sys.argv[1],)), lambda: None)
watcher.start()
print(watcher.mode)
print(watcher.problem)
watcher.close()
"""


def with_limits(root: Path, not_checked: Callable[[str], None], *, instances: int, watches: int) -> list[str]:
    """What a watcher says in a user namespace with few inotify instances or watches left."""
    unshare = shutil.which("unshare")
    if unshare is None:
        not_checked("inotify limits: there is no unshare")
        return []
    child = subprocess.run(
        [
            *(unshare, "--user", "--map-root-user"),
            *(sys.executable, "-c", LIMITED, str(root), str(instances), str(watches)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode != 0 and "unshare" in child.stderr:
        not_checked(f"inotify limits: {child.stderr.strip()}")
        return []
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@linux_only
def test_directories_for_which_no_watch_is_left_are_a_problem_with_a_remedy(
    root: Path, not_checked: Callable[[str], None]
) -> None:
    for number in range(12):
        (root / f"d{number}").mkdir()
    said = with_limits(root, not_checked, instances=128, watches=5)
    if said:
        mode, problem = said
        assert mode == "partial"
        assert problem.startswith("9 directories give no file events, ")
        assert "raise fs.inotify.max_user_watches; changes there are found by scanning" in problem


@linux_only
def test_system_without_any_watch_left_is_polling_and_no_error(
    root: Path, not_checked: Callable[[str], None]
) -> None:
    said = with_limits(root, not_checked, instances=0, watches=0)
    if said:
        mode, problem = said
        assert mode == "polling"
        assert problem.startswith("no file events")
        assert problem.endswith("changes are found by scanning")


def test_overflow_is_counted_once_and_makes_the_whole_tree_doubtful(watch: Watch, root: Path) -> None:
    """In the words of watchdog 7.1: the loss, and then each path whose watches it goes through again."""
    watched = watch(root)
    log = logging.getLogger("watchdog.observers.inotify_c")
    log.warning("Inotify queue overflowed; filesystem events were lost")
    log.warning("Inotify queue overflowed; reconciling recursive watches below %r", b"/root")
    watched.hears_of(root)
    assert watched.watcher.overflows_total == 1


HEARING = """
import sys, threading
from supervisor.manifest import Tree
from supervisor.watch import Watcher
woken = threading.Event()
watcher = Watcher(Tree((sys.argv[1],)), woken.set)
watcher.start()
print(watcher.mode, flush=True)
while watcher.overflows_total == 0:
    woken.wait()
    woken.clear()
print([hint.path for hint in watcher.take()].count(sys.argv[1]) > 0, flush=True)
watcher.close()
"""


@linux_only
def test_real_overflow_is_noticed(root: Path) -> None:
    """The kernel's queue is filled while its reader stands still, as under a long checkout."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text(encoding="ascii"))
    with subprocess.Popen(
        [sys.executable, "-c", HEARING, str(root)], stdout=subprocess.PIPE, text=True
    ) as hearing:
        assert hearing.stdout is not None
        assert hearing.stdout.readline() == "events\n"
        hearing.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, hearing.pid, os.WSTOPPED)
        source = root / "pack" / "b.py"
        for _ in range(limit // 2):
            source.touch()
            source.unlink()
        hearing.send_signal(signal.SIGCONT)
        assert hearing.stdout.readline() == "True\n"
    assert hearing.returncode == 0


def test_handler_of_the_log_is_gone_with_the_watcher(root: Path) -> None:
    before = list(logging.getLogger("watchdog").handlers)
    Watched(root).watcher.close()
    assert logging.getLogger("watchdog").handlers == before
