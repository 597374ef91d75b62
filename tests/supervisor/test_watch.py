"""File events as hints: what is seen, what is not asked for, and what is said when nothing can be seen."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor import canary
from supervisor.emitter import Followed, TreeEmitter
from supervisor.filesystems import FileSystems
from supervisor.manifest import Tree, source_roots
from supervisor.watch import LOOK_SECONDS, Hint, Watcher, look_interval_seconds
from tests.supervisor.harness import NAMESPACE, needs_namespaces

DEADLINE_SECONDS = 10.0

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="it is about inotify")


class Watched:
    """A watcher, a clock that only a test moves, and a way to wait for hints."""

    def __init__(self, *roots: Path, file_systems: FileSystems | None = None) -> None:
        self.now = 0.0
        self._woken = threading.Event()
        tree = Tree(source_roots(roots))
        self.canary = Path(tree.base).parent / "canary"
        self.watcher = Watcher(tree, self._woken.set, self.canary, lambda: self.now, file_systems)
        self.watcher.start()
        self.hints: list[Hint] = []
        self.take()

    @property
    def mode(self) -> str:
        return self.watcher.health.mode

    def take(self) -> list[Hint]:
        """Take what there is and forget it."""
        found = self.watcher.take()
        self.hints = []
        return found

    def later(self) -> None:
        """Let the time come at which the watcher looks after itself, and what it wrote come back."""
        self.now += 60 * LOOK_SECONDS
        self.hints += self.watcher.take()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.watcher._canary._waited_seconds is not None and time.monotonic() < deadline:
            self.hints += self.watcher.take()
            time.sleep(0.001)

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

    def start(*roots: Path, file_systems: FileSystems | None = None) -> Watched:
        started.append(Watched(*roots, file_systems=file_systems))
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


@pytest.mark.parametrize("change", [write, replace_it])
def test_finished_change_of_a_source_is_a_hint_that_it_is_finished(
    watch: Watch, root: Path, change: Callable[[Path], None]
) -> None:
    watched = watch(root)
    change(root / "pack" / "a.py")
    watched.hears_of(root / "pack" / "a.py", finished=True)


def unlink(path: Path) -> None:
    path.unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_name("a.py~"))


@pytest.mark.parametrize("change", [unlink, move_away])
def test_source_that_is_gone_is_a_hint_that_more_may_come(
    watch: Watch, root: Path, change: Callable[[Path], None]
) -> None:
    """As an editor does that keeps a backup: the old file away, then a new one under its name."""
    watched = watch(root)
    change(root / "pack" / "a.py")
    watched.hears_of(root / "pack" / "a.py", finished=False)


def test_move_out_of_the_tree_holds_nothing_back(watch: Watch, root: Path, tmp_path: Path) -> None:
    """What comes after it is read from the same queue, with nothing in between that waits."""
    (root / "b.py").touch()
    watched = watch(root)
    (root / "pack" / "a.py").rename(tmp_path / "away.py")
    (root / "b.py").write_text("B = 1", encoding="utf-8")
    watched.hears_of(root / "b.py", finished=True)
    assert watched.hints[0].path == str(root / "pack" / "a.py")


def test_change_of_mode_is_heard_of(watch: Watch, root: Path) -> None:
    watched = watch(root)
    (root / "pack" / "a.py").chmod(0o600)
    watched.hears_of(root / "pack" / "a.py")


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
    watched.now += LOOK_SECONDS / 2  # It is not yet time, but something has happened to a directory.
    watched.take()
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
    assert watched.mode == "polling"
    root.mkdir()
    watched.later()
    watched.hears_of(root)
    assert watched.mode == "events"
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
    assert watched.mode == "events"


def test_links_in_a_circle_are_watched_and_end(watch: Watch, root: Path) -> None:
    (root / "pack" / "up").symlink_to("..")
    watched = watch(root)
    (root / "b.py").touch()
    watched.hears_of(root / "b.py")


def test_root_that_is_not_there_yet_is_watched_when_it_is(watch: Watch, tmp_path: Path) -> None:
    watched = watch(tmp_path / "later")
    assert (watched.mode, watched.watcher.directories_total) == ("polling", 0)
    (tmp_path / "later").mkdir()
    watched.later()
    assert (watched.mode, watched.watcher.directories_total) == ("events", 1)
    (tmp_path / "later" / "a.py").touch()
    watched.hears_of(tmp_path / "later" / "a.py")


def test_watcher_that_is_all_right_does_not_begin_anew(watch: Watch, root: Path) -> None:
    watched = watch(root)
    for _ in range(3):
        watched.later()
    assert watched.hints == []
    assert watched.watcher.doubt() is None
    assert watched.watcher.restarts_total == 0


def test_one_of_several_roots_that_is_gone_leaves_the_others_watched(watch: Watch, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    watched = watch(first, second)
    first.rename(tmp_path / "away")
    watched.later()
    assert watched.mode == "partial"
    assert watched.watcher.health.reason == f"{first} cannot be watched: No such file or directory"
    assert watched.watcher.health.remedy == "put it back"
    (second / "a.py").touch()
    watched.hears_of(second / "a.py")


def test_root_whose_parent_was_renamed_is_not_mistaken_for_the_one_that_took_its_place(
    watch: Watch, tmp_path: Path
) -> None:
    """Nothing happens to the root itself, so no event says that its path leads elsewhere."""
    root = tmp_path / "parent" / "root"
    root.mkdir(parents=True)
    watched = watch(root)
    (tmp_path / "parent").rename(tmp_path / "old")
    root.mkdir(parents=True)
    watched.later()
    assert Hint(str(root), finished=True) in watched.hints
    (root / "new.py").touch()
    watched.hears_of(root / "new.py")
    watched.hints.clear()
    (tmp_path / "old" / "root" / "old.py").touch()
    (root / "last.py").touch()
    watched.hears_of(root / "last.py")
    assert not any("old.py" in hint.path for hint in watched.hints)


def test_directory_that_was_moved_out_is_not_heard_of_any_more(
    watch: Watch, root: Path, tmp_path: Path
) -> None:
    watched = watch(root)
    (root / "pack").rename(tmp_path / "away")
    watched.hears_of(root / "pack")
    watched.later()
    watched.hints.clear()
    (tmp_path / "away" / "b.py").touch()
    (root / "last.py").touch()
    watched.hears_of(root / "last.py")
    assert {hint.path for hint in watched.hints} == {str(root / "last.py")}


def test_what_makes_a_folder_a_virtual_environment_is_heard_of(watch: Watch, root: Path) -> None:
    watched = watch(root)
    (root / "pack" / "pyvenv.cfg").touch()
    watched.hears_of(root / "pack" / "pyvenv.cfg")
    watched.later()
    assert watched.watcher.directories_total == 1


def test_source_with_two_names_is_heard_of_under_both(watch: Watch, root: Path) -> None:
    (root / "twin").symlink_to("pack")
    watched = watch(root)
    (root / "pack" / "a.py").write_text("A = 2", encoding="utf-8")
    watched.hears_of(root / "pack" / "a.py", finished=True)
    watched.hears_of(root / "twin" / "a.py", finished=True)


# --- proof of life ----------------------------------------------------------------------------------------


def until(watched: Watched, true: Callable[[], bool]) -> None:
    """Let time pass for the watcher."""
    for _ in range(20):
        watched.now += LOOK_SECONDS
        watched.hints += watched.watcher.take()
        if true():
            return
    watched.later()
    assert true()


def test_watcher_that_is_well_is_proven_alive_again_and_again(watch: Watch, root: Path) -> None:
    watched = watch(root)
    for _ in range(20):
        (watched.canary / "canary").unlink()
        watched.later()
        assert (watched.canary / "canary").exists()
    assert (watched.mode, watched.watcher.restarts_total) == ("events", 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("thread", ["emitter", "observer"])
def test_thread_that_ended_by_an_exception_is_started_again(watch: Watch, root: Path, thread: str) -> None:
    watched = watch(root)
    observer = watched.watcher._observer
    emitter = watched.watcher._emitter
    assert observer is not None
    assert emitter is not None

    def fail(*_: object) -> None:
        raise RuntimeError("by a test")

    ends = emitter if thread == "emitter" else observer
    for handlers in observer._handlers.values():
        for handler in handlers:
            if thread == "observer":
                handler.dispatch = fail  # type: ignore[assignment, method-assign]
    if thread == "emitter":
        emitter.queue_event = fail  # type: ignore[assignment, method-assign]
    (root / "b.py").touch()
    ends.join(DEADLINE_SECONDS)
    assert not ends.is_alive()
    watched.later()
    assert watched.watcher.restarts_total == 1
    assert watched.watcher.doubt() == "the watcher was started again, a thread of it has ended"
    assert watched.mode == "events"
    (root / "c.py").touch()
    watched.hears_of(root / "c.py")


def test_watcher_that_hears_nothing_is_started_again(watch: Watch, root: Path) -> None:
    """All threads live, and the kernel tells of what nobody asked for any more."""
    watched = watch(root)
    emitter = watched.watcher._emitter
    assert emitter is not None
    emitter._names = {}
    emitter.follow = lambda *_: Followed((), {}, 3)  # type: ignore[method-assign]
    until(watched, lambda: watched.watcher.restarts_total == 1)
    assert "did not come back" in (watched.watcher.doubt() or "")
    watched.later()
    assert watched.mode == "events"
    (root / "c.py").touch()
    watched.hears_of(root / "c.py")


def test_watcher_that_never_hears_is_polling_and_started_ever_more_rarely(
    watch: Watch, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TreeEmitter, "queue_event", lambda *_: None)
    watched = watch(root)
    for _ in range(100):
        watched.now += 1.0
        watched.watcher.take()
    assert 2 <= watched.watcher.restarts_total <= 4
    assert watched.mode == "polling"
    assert watched.watcher.health.reason == f"events of {watched.canary / 'canary'} do not come back"
    assert watched.watcher.blind is None, "a new start of the supervisor would not help"


def test_watcher_that_has_heard_and_never_hears_again_is_blind_until_it_does(
    watch: Watch, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = watch(root)
    watched.later()
    assert watched.watcher.blind is None
    with monkeypatch.context() as deaf:
        deaf.setattr(TreeEmitter, "queue_event", lambda *_: None)
        for _ in range(7):
            watched.now += 1.0
            watched.watcher.take()
        assert watched.watcher.blind is None, "it is started again first"
        for _ in range(100):
            watched.now += 1.0
            watched.watcher.take()
        assert "do not come back" in str(watched.watcher.blind)
    watched.watcher.close()
    until(watched, lambda: watched.watcher.blind is None)


def test_watches_that_the_kernel_lost_are_noticed(watch: Watch, root: Path) -> None:
    watched = watch(root)
    emitter = watched.watcher._emitter
    assert emitter is not None
    emitter.count = lambda: 2  # type: ignore[method-assign]
    watched.later()
    assert watched.watcher.restarts_total == 0, "a directory may be deleted while one looks"
    watched.later()
    assert watched.watcher.restarts_total == 1
    assert "fewer watches" in (watched.watcher.doubt() or "")
    assert watched.watcher.as_json()["watches"] == 3


def test_deleted_directory_of_the_canary_is_made_again_and_nobody_is_suspected(
    watch: Watch, root: Path
) -> None:
    watched = watch(root)
    shutil.rmtree(watched.canary)
    for _ in range(20):
        watched.later()
    assert (watched.canary / "canary").exists()
    assert (watched.mode, watched.watcher.restarts_total) == ("events", 0)


def test_canary_that_cannot_be_written_is_no_proof_of_anything(watch: Watch, tmp_path: Path) -> None:
    root = tmp_path / "deep" / "root"
    root.mkdir(parents=True)
    watched = watch(root)
    watched.later()
    shutil.rmtree(watched.canary)
    watched.canary.write_text("in its place", encoding="utf-8")
    watched.later()
    assert watched.mode == "partial"
    assert (watched.watcher.health.reason or "").startswith("events are not proven: ")
    watched.canary.unlink()
    watched.later()
    watched.later()
    assert watched.mode == "events"
    assert watched.watcher.restarts_total == 0


def test_time_in_which_the_loop_stood_still_does_not_count() -> None:
    bird = canary.Canary(Path("/nowhere"))
    bird._waited_seconds = 0.0
    assert not bird.turn(3600.0)
    assert not bird.turn(3600.5)
    assert [bird.turn(3601.0 + n) for n in range(5)].count(True) == 1


# --- what cannot be seen ----------------------------------------------------------------------------------


def test_root_on_a_file_system_of_others_is_polled_with_reason_and_remedy(
    watch: Watch, root: Path, tmp_path: Path
) -> None:
    table, point = tmp_path / "mountinfo", str(root).replace(" ", "\\040")
    table.write_text(
        f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:50 / {point} rw shared:2 - nfs4 server:/export rw\n",
        encoding="utf-8",
    )
    watched = watch(root, file_systems=FileSystems(table))
    assert watched.mode == "polling"
    assert "is on a file system (nfs4) that may change without an event" in (
        watched.watcher.health.reason or ""
    )
    assert watched.watcher.health.remedy == "keep the code on a local one, or rely on --scan-interval"
    (root / "b.py").touch()
    watched.hears_of(root / "b.py")


@pytest.mark.parametrize(
    ("kind", "told"),
    [("ext4", True), ("overlay", True), ("fuseblk", True), ("fuse.sshfs", False), ("9p", False)],
)
def test_file_systems_that_tell_everything_are_known(tmp_path: Path, kind: str, told: bool) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    table = tmp_path / "mountinfo"
    point = str(folder).replace(" ", "\\040")
    table.write_text(f"1 0 8:1 / / rw - ext4 a rw\n2 1 0:5 / {point} rw - {kind} b rw\n", encoding="utf-8")
    found = FileSystems(table).without_all_events(str(folder / "below"))
    assert found == (None if told else kind)
    assert FileSystems(table).without_all_events(str(tmp_path)) is None


def test_look_that_costs_much_is_taken_rarely() -> None:
    assert look_interval_seconds(0.001) == LOOK_SECONDS
    assert look_interval_seconds(0.1) == pytest.approx(30.0)


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
watcher = Watcher(Tree((sys.argv[1],)), lambda: None, Path(sys.argv[1]).parent / "canary")
watcher.start()
print(watcher.health.mode)
print(watcher.health.reason)
print(watcher.health.remedy)
watcher.close()
"""


def with_limits(root: Path, *, instances: int, watches: int) -> list[str]:
    """What a watcher says in a user namespace with few inotify instances or watches left."""
    child = subprocess.run(
        [*NAMESPACE, sys.executable, "-c", LIMITED, str(root), str(instances), str(watches)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.splitlines()


@linux_only
@needs_namespaces
def test_directories_for_which_no_watch_is_left_are_a_problem_with_a_remedy(root: Path) -> None:
    for number in range(12):
        (root / f"d{number}").mkdir()
    mode, reason, remedy = with_limits(root, instances=128, watches=5)
    assert mode == "partial"
    assert reason.startswith("10 of 14 directories are not watched, ")
    assert reason.endswith(" is one: no watch is left")
    assert remedy == "raise the limit, which is 5: sysctl -w user.max_inotify_watches=32"


@linux_only
@needs_namespaces
def test_system_without_any_watch_left_is_polling_and_no_error(root: Path) -> None:
    mode, reason, remedy = with_limits(root, instances=128, watches=0)
    assert (mode, reason.split(",")[0]) == ("polling", "2 of 2 directories are not watched")
    assert "user.max_inotify_watches" in remedy


@linux_only
@needs_namespaces
def test_system_without_any_instance_left_is_polling_and_no_error(root: Path) -> None:
    mode, reason, remedy = with_limits(root, instances=0, watches=100)
    assert (mode, reason) == ("polling", "no file events: Too many open files")
    assert remedy == "raise the limit, which is 0: sysctl -w user.max_inotify_instances=4"


HEARING = """
import signal, sys, threading
from pathlib import Path
from supervisor.manifest import Tree
from supervisor.watch import Watcher
signal.alarm(60)  # A loss that nobody notices ends here.
woken = threading.Event()
watcher = Watcher(Tree((sys.argv[1],)), woken.set, Path(sys.argv[1]).parent / "canary")
watcher.start()
print(watcher.health.mode, flush=True)
for _ in range(2):
    while (why := watcher.doubt()) is None:
        woken.wait(0.5)
        woken.clear()
        watcher.take()
    print(watcher.overflows_total, why, flush=True)
watcher.close()
"""


@linux_only
def test_every_overflow_is_noticed_counted_and_makes_the_whole_tree_doubtful(root: Path) -> None:
    """The kernel's queue is filled while its reader stands still, as under a long checkout."""
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text(encoding="ascii"))
    with subprocess.Popen(
        [sys.executable, "-c", HEARING, str(root)], stdout=subprocess.PIPE, text=True
    ) as hearing:
        assert hearing.stdout is not None
        assert hearing.stdout.readline() == "events\n"
        for number in (1, 2):
            hearing.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, hearing.pid, os.WSTOPPED)
            source = root / "pack" / "b.py"
            for _ in range(limit // 2):
                source.touch()
                source.unlink()
            hearing.send_signal(signal.SIGCONT)
            heard = hearing.stdout.readline()
            assert heard.startswith(f"{number} file events were lost; raise the limit, which is {limit}: ")
            assert "sysctl -w fs.inotify.max_queued_events=" in heard
    assert hearing.returncode == 0


@linux_only
def test_no_child_inherits_a_descriptor_of_the_watcher(watch: Watch, root: Path) -> None:
    """Not even one that is started with all descriptors that may be inherited."""
    look = "import glob, os; print(*(os.path.realpath(p) for p in glob.glob('/proc/self/fd/*')))"

    def run_a_child() -> str:
        child = [sys.executable, "-c", look]
        return subprocess.run(child, close_fds=False, capture_output=True, text=True, check=True).stdout

    before = run_a_child()  # Of what ran in this process earlier, some may be inherited.
    watch(root)
    said = run_a_child()
    ours = [os.path.realpath(descriptor) for descriptor in Path("/proc/self/fd").iterdir()]
    assert any("inotify" in path for path in ours), "void: there is none to be inherited"
    assert "pipe:" in said
    for kind in ("inotify", "eventfd"):
        assert said.count(kind) == before.count(kind)


@linux_only
def test_closed_watcher_leaves_no_thread_and_no_descriptor(root: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    Watched(root).watcher.close()
    assert (len(list(Path("/proc/self/fd").iterdir())), threading.active_count()) == before
