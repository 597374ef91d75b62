"""What processes leave behind: daemons, strangers' children, an earlier supervisor's.

Whoever becomes a subreaper inherits everything below it, so each scenario runs in a process of its own.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import orphans, processes
from supervisor.orphans import Lineages, Swept
from supervisor.processes import Identity
from tests.supervisor.harness import DEADLINE_SECONDS, is_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel has no subreaper")

PROGRAM = """\
import os, select, signal, socket, subprocess, sys, time

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def detached(then):
    "Run a function in a process that nothing but the subreaper holds."
    if os.fork() == 0:
        os.setsid()
        between = os.getpid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            while os.getppid() == between:
                time.sleep(0.001)
            then()
        os._exit(0)
    os.wait()

def serve():
    with socket.create_server(("127.0.0.1", 0)) as server:
        say(os.getpid(), server.getsockname()[1])
        sleep()

def sleep():
    time.sleep(60)

def until_alone():
    "Wait for the end of whoever holds the other end of our stdin."
    poll = select.poll()
    poll.register(0, 0)
    poll.poll()

def cleaned(code="pass", **environment):
    code = f"import os, sys, time; {code}; os.write(1, f'{os.getpid()}\\\\n'.encode()); time.sleep(60)"
    os.execve(sys.executable, [sys.executable, "-S", "-c", code], environment)
"""


def program(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", f"{PROGRAM}\n{code}"]


class Keeper:
    """A supervisor, as far as it holds processes: what ends below it wakes it, nothing else does."""

    def __init__(self, folder: Path) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        assert orphans.become_subreaper()
        self.socket = folder / "notify.sock"
        self.lineages = Lineages(self.socket)
        self.mains: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, number: int, code: str) -> list[int]:
        """Start a generation and return the numbers in the first line that its processes say."""
        self.mains[number] = subprocess.Popen(
            program(code),
            env=os.environ | {"NOTIFY_SOCKET": str(self.socket), "WA_GENERATION": str(number)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self.lineages.add(number, self.mains[number].pid)
        return self.hear(number)

    def hear(self, number: int) -> list[int]:
        stream = self.mains[number].stdout
        assert stream is not None
        return [int(word) for word in stream.readline().split()]

    def end(self, number: int, *, kill: bool = True) -> Swept:
        """End a generation's main process and sweep, one turn for each death, until it is over."""
        main = self.mains[number]
        if kill:
            self.kill(number)
        os.waitid(os.P_PID, main.pid, os.WEXITED | os.WNOWAIT)
        while not (swept := self.sweep(number)).over:
            assert signal.sigtimedwait({signal.SIGCHLD}, DEADLINE_SECONDS) is not None, swept
        self.lineages.remove(number)
        main.wait()
        del self.mains[number]
        return swept

    def kill(self, number: int) -> None:
        """Kill a main process without collecting it, which is what Popen would do to one that has ended."""
        os.kill(self.mains[number].pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.mains[number].pid, os.WEXITED | os.WNOWAIT)

    def tell(self, number: int) -> None:
        """Let a generation go on that reads a line."""
        stream = self.mains[number].stdin
        assert stream is not None
        stream.write(b"\n")
        stream.flush()

    def sweep(self, number: int) -> Swept:
        return self.lineages.sweep(number, known=(), now=time.monotonic())

    def finish(self) -> None:
        for number in list(self.mains):
            self.end(number)


def alone(scenario: Callable[[Keeper], Any], folder: Path) -> Any:
    """Run a scenario in a process of its own and return what it returns."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_keep, scenario, folder).result()


def _keep(scenario: Callable[[Keeper], Any], folder: Path) -> Any:
    signal.alarm(int(DEADLINE_SECONDS))
    keeper = Keeper(folder)
    try:
        return scenario(keeper)
    finally:
        keeper.finish()


def lives(pid: int) -> bool:
    process = processes.read(pid)
    return process is not None and process.state not in "ZX"


# --- sweep: what an ended generation left -------------------------------------------------------------------


def _daemon_with_a_port(keeper: Keeper) -> dict[str, Any]:
    daemon, port = keeper.start(1, "detached(serve); sleep()")
    os.killpg(keeper.mains[1].pid, signal.SIGKILL)
    os.kill(daemon, signal.SIGTERM)
    survived = lives(daemon)
    swept = keeper.end(1)
    with socket.create_server(("127.0.0.1", port)):
        pass
    return {"survived": survived, "lives": lives(daemon), "daemon": daemon, "swept": swept}


def test_daemon_that_left_the_session_is_gone_and_its_port_is_free(tmp_path: Path) -> None:
    facts = alone(_daemon_with_a_port, tmp_path)
    assert facts["survived"], "void: the kill of the group was expected to miss it"
    assert not facts["lives"]
    assert facts["swept"].killed[0].startswith(f"{facts['daemon']} (")
    assert (facts["swept"].left, facts["swept"].spared) == ((), ())


def _generations_side_by_side(keeper: Keeper) -> list[bool]:
    (old, _) = keeper.start(1, "detached(serve); sleep()")
    (new, _) = keeper.start(2, "detached(serve); sleep()")
    keeper.end(1)
    first = [lives(old), lives(new)]
    (newest, _) = keeper.start(3, "detached(serve); sleep()")
    keeper.end(3)
    return [*first, lives(new), lives(newest)]


def test_only_the_lineage_of_the_generation_that_ended_is_killed(tmp_path: Path) -> None:
    assert alone(_generations_side_by_side, tmp_path) == [False, True, True, False]


def _cleaned_and_older_than_the_other_generation(keeper: Keeper) -> tuple[bool, Swept]:
    (daemon,) = keeper.start(1, "detached(cleaned); sleep()")
    time.sleep(0.02)  # Start times have a grain of 10 ms.
    keeper.start(2, "say(); sleep()")
    swept = keeper.end(1)
    return lives(daemon), swept


def test_daemon_without_an_environment_belongs_to_who_was_there_before_it(tmp_path: Path) -> None:
    alive, swept = alone(_cleaned_and_older_than_the_other_generation, tmp_path)
    assert not alive
    assert swept.spared == ()


def _cleaned_and_younger_than_the_other_generation(keeper: Keeper) -> tuple[int, list[bool], Swept]:
    keeper.start(1, "say(); sys.stdin.readline(); detached(cleaned); sleep()")
    keeper.start(2, "say(); sleep()")
    keeper.tell(1)
    (daemon,) = keeper.hear(1)
    swept = keeper.end(1)
    alive = [lives(daemon)]
    keeper.end(2)
    return daemon, [*alive, lives(daemon)], swept


def test_daemon_that_may_be_the_live_generations_is_spared_named_and_ends_with_it(tmp_path: Path) -> None:
    daemon, alive, swept = alone(_cleaned_and_younger_than_the_other_generation, tmp_path)
    assert alive == [True, False]
    assert [name.partition(" ")[0] for name in swept.spared] == [str(daemon)]


def _seen_while_its_parent_lived(keeper: Keeper) -> bool:
    keeper.start(1, "say(); sys.stdin.readline(); os.fork() or (os.setsid(), cleaned()); sleep()")
    keeper.start(2, "say(); sleep()")
    keeper.tell(1)
    (helper,) = keeper.hear(1)
    keeper.lineages.look(1)
    keeper.end(1)
    return lives(helper)


def test_helper_without_an_environment_is_known_if_it_was_seen(tmp_path: Path) -> None:
    assert not alone(_seen_while_its_parent_lived, tmp_path)


def _deep(keeper: Keeper) -> list[bool]:
    deeper = "detached(lambda: (os.fork() and sleep(), os.setsid(), os.fork() and sleep(), os.setsid(), {}))"
    (_, lowest) = keeper.start(1, deeper.format("(say(os.getppid(), os.getpid()), sleep())") + "; sleep()")
    keeper.start(2, "say(); sleep()")
    keeper.end(1)
    return [lives(lowest), lives(keeper.mains[2].pid)]


def test_lineage_of_a_daemon_is_killed_level_by_level(tmp_path: Path) -> None:
    assert alone(_deep, tmp_path) == [False, True]


FORKS_AND_LEAVES = """
def hop():
    os.setsid()
    for hop in range(20000):
        if os.fork():
            os._exit(0)
        if hop == 20:
            say(os.getpid())
if os.fork() == 0:
    hop()
sleep()
"""


def _fork_faster(keeper: Keeper) -> tuple[list[int], Swept]:
    keeper.start(1, FORKS_AND_LEAVES)
    swept = keeper.end(1)
    return processes.children(os.getpid()), swept


def test_what_forks_while_it_is_swept_does_not_get_away(tmp_path: Path) -> None:
    left, swept = alone(_fork_faster, tmp_path)
    assert (left, swept.left) == ([], ())


HOLDS_ANOTHER = """
def holder():
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(write, str(os.getpid()).encode())
        sleep()
    say(os.getpid(), os.read(read, 20).decode())
    sleep()
sys.stdin.readline()
detached(holder)
sleep()
"""


def _ends_at_a_look(keeper: Keeper, module_function: str) -> bool:
    """Sweep a daemon that ends at the moment when it is looked at, and say whether its own child lives."""
    keeper.start(1, f"say(){HOLDS_ANOTHER}")
    keeper.start(2, "say(); sleep()")
    keeper.tell(1)
    (daemon, lower) = keeper.hear(1)
    keeper.kill(1)
    ordinary = getattr(processes, module_function)

    def look_and_end(pid: int) -> Any:
        found = ordinary(pid) if module_function == "children" else None
        if lives(daemon) and pid in {daemon, os.getpid()}:
            os.kill(daemon, signal.SIGKILL)
            os.waitid(os.P_PID, daemon, os.WEXITED | os.WNOWAIT)
        return ordinary(pid) if found is None else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, module_function, look_and_end)
        keeper.end(1)
    return lives(lower)


@pytest.mark.parametrize("module_function", ["children", "environment"])
def test_what_ends_while_it_is_looked_at_does_not_hide_whom_it_started(
    tmp_path: Path, module_function: str
) -> None:
    assert not alone(partial(_ends_at_a_look, module_function=module_function), tmp_path)


def _not_started_by_us(keeper: Keeper) -> dict[str, Any]:
    before = subprocess.Popen(
        program("say(); sys.stdin.readline(); detached(serve); sleep()"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert before.stdin is not None
    assert before.stdout is not None
    before.stdout.readline()
    keeper.lineages = Lineages(keeper.socket)
    keeper.start(1, "say(); sleep()")
    before.stdin.write(b"\n")
    before.stdin.flush()
    (its_daemon, _) = map(int, before.stdout.readline().split())
    swept = keeper.end(1)
    alive = [lives(before.pid), lives(its_daemon)]
    before.kill()
    os.kill(its_daemon, signal.SIGKILL)
    return {"alive": alive, "daemon": its_daemon, "spared": swept.spared}


def test_children_that_were_there_before_us_and_theirs_are_left_alone(tmp_path: Path) -> None:
    facts = alone(_not_started_by_us, tmp_path)
    assert facts["alive"] == [True, True]
    assert [name.partition(" ")[0] for name in facts["spared"]] == [str(facts["daemon"])]


def _below_a_daemon(keeper: Keeper) -> bool:
    lower = "(os.fork() or (os.setsid(), cleaned()), sleep())"
    keeper.start(1, f"say(); sys.stdin.readline(); detached(lambda: {lower}); sleep()")
    keeper.start(2, "say(); sleep()")
    keeper.tell(1)
    (lowest,) = keeper.hear(1)
    keeper.end(1)
    return lives(lowest)


def test_what_a_daemon_started_without_an_environment_goes_with_it(tmp_path: Path) -> None:
    assert not alone(_below_a_daemon, tmp_path)


def _of_a_supervisor_below(keeper: Keeper) -> bool:
    (daemon,) = keeper.start(
        1, "detached(lambda: cleaned(NOTIFY_SOCKET='/elsewhere', WA_GENERATION='2')); sleep()"
    )
    time.sleep(0.02)  # Start times have a grain of 10 ms.
    keeper.start(2, "say(); sleep()")
    keeper.end(1)
    return lives(daemon)


def test_number_of_another_supervisors_generation_says_nothing(tmp_path: Path) -> None:
    assert not alone(_of_a_supervisor_below, tmp_path)


def _in_the_live_session(keeper: Keeper) -> bool:
    wrong = f"cleaned(NOTIFY_SOCKET={str(keeper.socket)!r}, WA_GENERATION='7')"
    keeper.start(1, "say(); sleep()")
    (orphan,) = keeper.start(2, f"os.fork() or (os.fork() or {wrong}, os._exit(0)); os.wait(); sleep()")
    keeper.end(1)
    return lives(orphan)


def test_session_of_the_live_generation_counts_more_than_an_environment(tmp_path: Path) -> None:
    assert alone(_in_the_live_session, tmp_path)


def _does_not_die(keeper: Keeper) -> list[Any]:
    (daemon, _) = keeper.start(1, "detached(serve); sleep()")
    keeper.kill(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(orphans, "_kill", lambda _: True)
        turns = [keeper.lineages.sweep(1, known=(), now=now) for now in (0.0, 0.9, 1.0)]
    os.kill(daemon, signal.SIGKILL)
    return [daemon, *turns]


def test_what_does_not_die_is_named_when_its_time_is_up(tmp_path: Path) -> None:
    daemon, *turns = alone(_does_not_die, tmp_path)
    assert [turn.over for turn in turns] == [False, False, True]
    (name,) = turns[-1].left
    assert re.fullmatch(rf"{daemon} \(.+, state [RS]\)", name)


def _not_ours_to_signal(keeper: Keeper) -> tuple[int, Swept]:
    code = "detached(lambda: (say(os.getpid()), until_alone())); sys.stdin.readline()"
    (daemon,) = keeper.start(1, code)
    keeper.lineages.look(1)
    os.setresuid(65534, 65534, 65534)
    keeper.tell(1)
    swept = keeper.end(1, kill=False)
    return daemon, swept


@pytest.mark.skipif(os.getuid() != 0, reason="needs processes of two users")
def test_process_of_another_user_is_named_and_not_waited_for(tmp_path: Path) -> None:
    daemon, swept = alone(_not_ours_to_signal, tmp_path)
    assert swept.over
    assert [name.endswith(", not ours to signal)") for name in swept.left] == [True]
    assert swept.left[0].startswith(f"{daemon} (")


# --- strays: one reaper per pid -----------------------------------------------------------------------------


def _strays(keeper: Keeper) -> dict[str, Any]:
    (stray,) = keeper.start(1, "detached(lambda: (say(os.getpid()), os._exit(3))); sleep()")
    os.waitid(os.P_PID, stray, os.WEXITED | os.WNOWAIT)
    reaped = keeper.lineages.reap_strays(())
    helper = subprocess.Popen(program("sys.exit(7)"))
    os.waitid(os.P_PID, helper.pid, os.WEXITED | os.WNOWAIT)
    not_stolen = keeper.lineages.reap_strays({helper.pid})
    keeper.kill(1)
    others = [not_stolen, keeper.lineages.reap_strays({helper.pid})]
    statuses = [helper.wait(), keeper.mains.pop(1).wait()]
    return {"stray": stray, "reaped": reaped, "others": others, "statuses": statuses}


def test_strays_are_collected_and_no_status_is_stolen(tmp_path: Path) -> None:
    facts = alone(_strays, tmp_path)
    assert facts["reaped"] == [facts["stray"]]
    assert facts["others"] == [[], []]
    assert facts["statuses"] == [7, -signal.SIGKILL]


# --- sweep_earlier: what a supervisor that was killed left --------------------------------------------------

SWEEP = """\
import json, sys
from pathlib import Path
from supervisor import orphans
from supervisor.processes import Identity
socket, recorded = json.loads(sys.argv[1])
swept = orphans.sweep_earlier(Path(socket), [Identity(*one) for one in recorded])
print(json.dumps([swept.killed, swept.left]))
"""


def sweep_as_the_next_supervisor(socket_path: Path, *recorded: Identity) -> list[list[int]]:
    """Return the pids that were killed and those that could not be."""
    request = json.dumps([str(socket_path), [[r.pid, r.start_ticks, r.boot_id] for r in recorded]])
    printed = subprocess.run(
        [sys.executable, "-c", SWEEP, request], capture_output=True, text=True, check=True
    ).stdout
    return [[int(name.partition(" ")[0]) for name in names] for names in json.loads(printed)]


class Leftovers:
    """Processes that nobody holds, and their pids; killed at the end of the test."""

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []
        self._known: list[psutil.Process] = []

    def start(self, code: str, environment: Mapping[str, str]) -> list[int]:
        """Start a session and return its leader's pid and those in the first line that is said."""
        process = subprocess.Popen(
            program(code), env=dict(environment), stdout=subprocess.PIPE, start_new_session=True
        )
        self._started.append(process)
        assert process.stdout is not None
        said = [int(word) for word in process.stdout.readline().split()]
        self._known += [psutil.Process(pid) for pid in said if psutil.pid_exists(pid)]
        return [process.pid, *said]

    def end_leader(self) -> None:
        self._started[-1].kill()
        self._started[-1].wait()

    def lives(self) -> list[bool]:
        """Say who lives, of those that were said."""
        return [not is_gone(process) for process in self._known]

    def end(self) -> None:
        for process in self._known:
            process.kill()
        for started in self._started:
            started.kill()
            started.communicate()


@pytest.fixture
def leftovers() -> Iterator[Leftovers]:
    held = Leftovers()
    yield held
    held.end()


def named(pid: int) -> Identity:
    identity = processes.identify(pid)
    assert identity is not None
    return identity


def reporting_to(socket_path: Path) -> dict[str, str]:
    return {"NOTIFY_SOCKET": str(socket_path), "WA_GENERATION": "4"}


def test_recorded_process_its_session_and_what_left_that_are_killed(
    tmp_path: Path, leftovers: Leftovers
) -> None:
    main, daemon, member = leftovers.start(
        "r, w = os.pipe()\n"
        "detached(lambda: (os.write(w, str(os.getpid()).encode()), sleep()))\n"
        "member = os.fork() or sleep()\n"
        "say(os.read(r, 20).decode(), member); sleep()",
        reporting_to(tmp_path / "s"),
    )
    killed, left = sweep_as_the_next_supervisor(tmp_path / "s", named(main))
    assert (sorted(killed), left) == (sorted([main, daemon, member]), [])
    assert leftovers.lives() == [False, False]


@pytest.mark.parametrize("mistaken", ["start_ticks", "boot_id"])
def test_recycled_pid_is_never_killed(tmp_path: Path, leftovers: Leftovers, mistaken: str) -> None:
    main, member = leftovers.start("member = os.fork() or sleep(); say(member); sleep()", {})
    now = named(main)
    then = {
        "start_ticks": Identity(main, now.start_ticks - 1, now.boot_id),
        "boot_id": Identity(main, now.start_ticks, "another"),
    }[mistaken]
    assert sweep_as_the_next_supervisor(tmp_path / "s", then) == [[], []]
    assert leftovers.lives() == [True]
    killed, _ = sweep_as_the_next_supervisor(tmp_path / "s", now)
    assert sorted(killed) == sorted([main, member])


def test_session_of_an_ended_leader_counts_if_a_member_names_our_socket(
    tmp_path: Path, leftovers: Leftovers
) -> None:
    main, marked, cleaned = leftovers.start(
        "member = os.fork() or sleep(); os.fork() or cleaned(f'os.write(1, b\"{member} \")'); sleep()",
        reporting_to(tmp_path / "s"),
    )
    recorded = named(main)
    leftovers.end_leader()
    killed, _ = sweep_as_the_next_supervisor(tmp_path / "s", recorded)
    assert sorted(killed) == sorted([marked, cleaned])

    main, *_ = leftovers.start("a = os.fork() or sleep(); b = os.fork() or sleep(); say(a, b); sleep()", {})
    recorded = named(main)
    leftovers.end_leader()
    assert sweep_as_the_next_supervisor(tmp_path / "s", recorded) == [[], []]
    assert leftovers.lives() == [False, False, True, True]


def test_what_reports_to_another_socket_is_not_ours(tmp_path: Path, leftovers: Leftovers) -> None:
    leftovers.start("member = os.fork() or sleep(); say(member); sleep()", reporting_to(tmp_path / "other"))
    assert sweep_as_the_next_supervisor(tmp_path / "s") == [[], []]
    assert leftovers.lives() == [True]


def test_supervisor_started_by_its_own_leftover_does_not_kill_its_way_up(tmp_path: Path) -> None:
    request = json.dumps([str(tmp_path / "s"), []])
    code = f"say(subprocess.run({[sys.executable, '-c', SWEEP, request]!r}).returncode)"
    done = subprocess.run(
        program(code),
        env=os.environ | reporting_to(tmp_path / "s"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[[], []]", "0"]


def test_socket_of_the_same_name_in_a_container_is_another_one(
    tmp_path: Path, leftovers: Leftovers, not_checked: Callable[[str], None]
) -> None:
    if subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode:  # noqa: S607
        not_checked("mount namespaces: may not be made here")
        return
    behind = ["unshare", "-m", *program("say(os.getpid()); sleep()")]
    code = f"say(os.getpid()); os.execvp('unshare', {behind!r})"
    leftovers.start(code, os.environ | reporting_to(tmp_path / "s"))
    first = leftovers._started[-1].stdout
    assert first is not None
    first.readline()  # Said by what was executed, behind the wall.
    assert sweep_as_the_next_supervisor(tmp_path / "s") == [[], []]
    assert leftovers.lives() == [True]


# --- processes ----------------------------------------------------------------------------------------------


def test_name_of_a_process_may_hold_anything(leftovers: Leftovers) -> None:
    code = "open('/proc/self/comm', 'w').write('a) R 1 (\\nb'); say(os.getpid()); sleep()"
    _, pid = leftovers.start(code, {})
    process = processes.read(pid)
    assert process is not None
    assert (process.name, process.parent, process.session) == ("a) R 1 (?b", os.getpid(), pid)


def test_children_are_the_same_on_a_kernel_that_does_not_list_them(
    leftovers: Leftovers, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, *said = leftovers.start(
        "x = os.fork() or sleep(); y = os.fork() or sleep(); say(x, y); sleep()", {}
    )

    def missing(_: Path) -> bytes:
        raise FileNotFoundError

    assert processes.children(main) == said
    monkeypatch.setattr(Path, "read_bytes", missing)
    assert processes.children(main) == said


def test_process_that_is_gone_is_none() -> None:
    child = subprocess.Popen(program("pass"))
    child.wait()
    assert processes.identify(child.pid) is None
    assert processes.children(child.pid) == []
    assert processes.environment(child.pid) == {b"": b""}
