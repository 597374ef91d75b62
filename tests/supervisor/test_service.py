"""The whole supervisor: real processes, real files, real signals."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from supervisor import control
from tests.supervisor.harness import DEADLINE_SECONDS, SUPERVISOR, Supervised, is_gone

Supervise = Callable[..., Supervised]

GIT = shutil.which("git") or "git"
LIVE = r"reload \((\w+)\): live"

NOTIFYING = """\
import os, signal, socket, sys, threading
sys.path.insert(0, "modules")
import answer

def tell(message):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message.encode(), os.environ["NOTIFY_SOCKET"])

signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("finished", answer.VALUE, flush=True)))
answer.serve(tell)
while True:
    signal.pause()
"""


def write(tree: Path, text: str) -> None:
    (tree / "modules" / "answer.py").write_text(text, encoding="utf-8")


def get(started: Supervised, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{started.status()['listen']}{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def series(started: Supervised, name: str) -> float:
    lines = get(started, "/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))


def test_a_save_becomes_the_running_code_and_is_proven(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect("serving 1")
    started.expect(LIVE)
    write(tree, "VALUE = 2\n")
    started.expect("serving 2")
    assert started.expect(LIVE).group(1) == "watch"
    verified = started.command("verify", "--json")
    assert verified.returncode == 0
    document = json.loads(verified.stdout)
    assert document["in_sync"]
    assert {module["path"]: module["state"] for module in document["modules"]} == {
        "main.py": "match",
        "modules/answer.py": "match",
    }
    record = started.status()["last_reload"]
    assert (record["outcome"], record["trigger"], record["paths"]) == ("live", "watch", ["modules/answer.py"])
    assert {"settle", "manifest", "bytecode", "launch", "verify", "handover"} == record["stages"].keys()


def test_same_size_edit_with_restored_mtime_runs_here_and_everywhere(
    supervise: Supervise, tree: Path
) -> None:
    source = tree / "modules" / "answer.py"
    look = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, 'modules'); import answer; print(answer.VALUE)",
    ]

    def plain() -> str:
        return subprocess.run(look, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()

    assert plain() == "1"  # This caches timestamp bytecode.
    before = source.stat()
    started = supervise("main.py", "--not-ours", cwd=tree)
    started.expect(LIVE)
    started.end()
    subprocess.run([sys.executable, "-m", "py_compile", source], check=True)  # Timestamp bytecode again.
    source.write_text("VALUE = 2\n", encoding="utf-8")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert plain() == "1", "void: a plain restart was expected to run the stale code"
    again = supervise("main.py", cwd=tree)
    again.expect("serving 2")
    again.expect(LIVE)
    assert plain() == "2"
    assert again.command("verify").returncode == 0


def test_syntax_error_is_rejected_and_the_old_child_keeps_serving(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    serving = started.live().pid
    write(tree, "VALUE = = 2\n")
    rejected = started.reload()
    assert (rejected["outcome"], rejected["reason"]) == ("rejected", "syntax")
    assert "answer.py, line 1" in rejected["detail"]
    status = started.status()
    assert status["live"]["pid"] == serving
    assert not status["in_sync"]
    assert "answer.py" in status["reason"]
    assert started.command("verify").returncode == 3
    assert started.command("reload").returncode == 1
    write(tree, "VALUE = 3\n")
    started.expect("serving 3")
    started.expect(LIVE)
    assert started.status()["in_sync"]


def test_diff_shows_the_running_source_against_the_file(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    assert (started.command("diff").returncode, started.command("diff").stdout) == (0, "")
    write(tree, "VALUE = 1\nVALUE = = 2\n")
    (tree / "more.py").write_text("X = 1\n", encoding="utf-8")
    started.expect(r"rejected \(syntax\)")
    shown = started.command("diff")
    assert shown.returncode == 3
    assert shown.stdout.splitlines() == [
        "--- modules/answer.py (generation 1)", "+++ modules/answer.py (on disk)", "@@ -1 +1,2 @@",
        " VALUE = 1", "+VALUE = = 2",
        "--- /dev/null", "+++ more.py (on disk)", "@@ -0,0 +1 @@", "+X = 1",
    ]  # fmt: skip


def test_touch_without_a_change_of_content_is_unchanged(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    serving = started.live().pid
    os.utime(tree / "modules" / "answer.py")
    started.expect(r"reload \((watch|scan)\): unchanged")
    assert started.live().pid == serving


def test_script_that_fails_at_import_is_rolled_back(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    write(tree, "import a_module_that_is_not_there\n")
    started.expect(r"rolled_back \(import\): ModuleNotFoundError")
    started.expect("serving 1")
    started.expect(LIVE)
    status = started.status()
    assert "a_module_that_is_not_there" in status["reason"]
    assert (
        status["live"]["tree"] != status["last_reload"]["tree"] or status["last_reload"]["trigger"] == "crash"
    )
    assert series(started, "wa_supervisor_rollbacks_total") == 1


def test_callable_that_fails_at_import_costs_the_old_child_nothing(
    supervise: Supervise, tmp_path: Path
) -> None:
    package = tmp_path / "app" / "service"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "entry.py").write_text(
        "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "def main():\n    print('serving', __name__, sys.argv, flush=True)\n    time.sleep(600)\n",
        encoding="utf-8",
    )
    started = supervise("service.entry:main", "one", cwd=package.parent)
    started.expect(r"serving service.entry \['service.entry:main', 'one'\]")
    started.expect(LIVE)
    serving = started.live()
    (package / "__init__.py").write_text("1 / 0\n", encoding="utf-8")
    started.expect(r"rejected \(import\): ZeroDivisionError")
    assert serving.is_running()
    assert started.live().pid == serving.pid


def test_overlap_stops_the_old_child_only_when_the_new_one_is_ready(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(tree, "VALUE = 1\ndef serve(tell): tell('READY=1\\nSTATUS=at work')\n")
    started = supervise("--type=notify", "--handover=overlap", "--ready-timeout=3", "main.py", cwd=tree)
    started.expect(LIVE)
    serving = started.live().pid
    write(tree, "VALUE = 2\ndef serve(tell): print('never ready', flush=True)\n")
    started.expect("never ready")
    assert {started.status()["candidate"]["stage"], started.status()["state"]} == {"started", "reloading"}
    started.expect(r"rejected \(readiness\)")
    assert started.live().pid == serving
    write(tree, "VALUE = 3\ndef serve(tell): print('ready soon', flush=True); tell('READY=1')\n")
    started.expect("ready soon")
    started.expect("finished 1")
    assert "finished 1" not in started.output.lines[: started.output.lines.index("ready soon")]
    assert series(started, "wa_supervisor_downtime_seconds_total") == 0


def test_ready_from_another_process_than_the_child_does_not_count(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(
        tree,
        "import subprocess, sys\nVALUE = 1\nCODE = '''import os, socket\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        's.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])\n'
        "s.close()'''\n"
        "def serve(tell):\n    subprocess.run([sys.executable, '-c', CODE], check=True)\n"
        "    print('told by another', flush=True)\n",
    )
    started = supervise("--type=notify", "--ready-timeout=2", "main.py", cwd=tree)
    started.expect("told by another")
    started.expect(r"rejected \(readiness\)")


def test_crashed_child_is_started_again_with_its_cause_counted(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    started.live().kill()
    assert "signal SIGKILL" in started.expect("generation 1: crash .*").group()
    started.expect("serving 1")
    started.expect(r"reload \(crash\): live")
    assert started.status()["restarts"]["crash"] == 1
    assert series(started, "wa_supervisor_downtime_seconds_total") > 0


def test_silent_child_counts_as_hung(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(tree, "VALUE = 1\ndef serve(tell): tell('READY=1')\n")
    started = supervise("--type=notify", "--watchdog=0.5", "main.py", cwd=tree)
    started.expect(LIVE)
    started.expect(r"generation 1: hang \(silent for 0.5 s")
    started.expect(r"reload \(hang\): live")


def test_suspicion_of_the_child_is_followed_by_a_verification(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(tree, "VALUE = 1\ndef serve(tell): tell('READY=1'); tell('X_SUSPECT=lid-regression')\n")
    started = supervise("--type=notify", "main.py", cwd=tree)
    started.expect("suspicious: lid-regression")
    started.expect(LIVE)
    assert started.status()["in_sync"]


def test_function_patched_in_memory_is_found_named_and_replaced_by_a_fresh_generation(
    supervise: Supervise, tree: Path
) -> None:
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(
        tree,
        "import os\nVALUE = 1\ndef decide(): return 'right'\n"
        "def serve(tell):\n"
        "    tell('READY=1')\n"
        "    if os.environ['WA_GENERATION'] == '1':\n"
        "        open(os.environ['GO']).read()\n"
        "        exec('def decide(): return 0', globals())\n"
        "        tell('X_SUSPECT=odd')\n",
    )
    pipe = tree.parent / "go"
    os.mkfifo(pipe)
    started = supervise("--type=notify", "main.py", cwd=tree, GO=str(pipe))
    started.expect(LIVE)
    verified = json.loads(started.command("verify", "--json").stdout)
    assert verified["functions"]["foreign"] == []
    assert verified["functions"]["checked"] >= 2
    pipe.write_text("", encoding="utf-8")
    started.expect(r"generation 1: mismatch \(function answer:decide does not run the code of its source\)")
    assert started.expect(LIVE).group(1) == "mismatch"
    assert started.command("verify").returncode == 0


def test_child_is_gone_when_the_supervisor_was_killed(supervise: Supervise, tree: Path) -> None:
    write(tree, "import signal\nVALUE = 1\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n")
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    child = started.live()
    started.process.kill()
    assert child.wait(timeout=5) is None


def test_sigterm_lets_the_child_finish_and_ends_with_0(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    child = started.live()
    started.process.send_signal(signal.SIGTERM)
    started.expect("finished 1")
    assert started.process.wait(10) == 0
    assert is_gone(child)


def test_stop_kills_a_child_that_does_not_end_and_what_it_started(supervise: Supervise, tree: Path) -> None:
    write(
        tree,
        "import signal, subprocess, sys\nVALUE = 1\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "print('grandchild', subprocess.Popen(sleep).pid, flush=True)\n",
    )
    (tree / "main.py").write_text(
        "import sys, signal\nsys.path.insert(0, 'modules')\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "import answer\nwhile True: signal.pause()\n",
        encoding="utf-8",
    )
    started = supervise("--stop-timeout=0.5", "main.py", cwd=tree)
    grandchild = psutil.Process(int(started.expect(r"grandchild (\d+)").group(1)))
    started.expect(LIVE)
    child = started.live()
    stopped = started.command("stop")
    assert (stopped.returncode, stopped.stdout) == (0, "stopped\n")
    assert started.process.wait(10) == 0
    assert is_gone(child)
    assert is_gone(grandchild)


def test_sighup_looks_at_the_tree(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    started.process.send_signal(signal.SIGHUP)
    started.expect(r"reload \(signal\): unchanged")


def test_many_files_at_once_are_one_reload(supervise: Supervise, tree: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    for number in range(30):
        (tree / "modules" / f"more_{number}.py").write_text("", encoding="utf-8")
    write(tree, "VALUE = 2\n")
    started.expect("serving 2")
    started.expect(LIVE)
    assert started.status()["last_reload"]["paths_total"] == 31
    # A process that was started for the first file alone never goes live, and has no reload of its own.
    records = json.loads(started.command("history", "--json").stdout)
    assert [record["outcome"] for record in records if record["kind"] == "reload"] == ["live", "live"]


def test_running_git_holds_the_reload(supervise: Supervise, tree: Path) -> None:
    subprocess.run([GIT, "init", "-q", tree], check=True)
    lock = tree / ".git" / "index.lock"
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    lock.touch()
    write(tree, "VALUE = 2\n")
    assert started.status()["live"]["generation"] == 1
    lock.unlink()
    started.expect("serving 2")
    started.expect(LIVE)


def test_totals_of_the_child_survive_its_replacement(supervise: Supervise, tree: Path) -> None:
    write(
        tree,
        "from prometheus_client import Counter, Gauge\nVALUE = 1\n"
        "Counter('app_jobs', 'Jobs done.').inc(5)\nGauge('app_level', 'Level.').set(VALUE)\n",
    )
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    source = tree / "modules" / "answer.py"
    source.write_text(source.read_text(encoding="utf-8").replace("VALUE = 1", "VALUE = 2"), encoding="utf-8")
    started.expect("finished 1")  # It sent its last totals before it ended.
    started.expect(LIVE)
    write(tree, "VALUE = 3\n")
    started.expect("finished 2")
    started.expect(LIVE)
    assert series(started, "app_jobs_total") == 10


def test_probes_tell_whether_a_generation_serves(supervise: Supervise, tree: Path) -> None:
    write(tree, "VALUE = ='\n")
    started = supervise("main.py", cwd=tree)
    started.expect(r"rejected \(syntax\)")
    assert get(started, "/livez")[0] == 200
    code, why = get(started, "/readyz")
    assert code == 503
    assert "answer.py" in why
    assert started.status()["state"] == "starting"
    write(tree, "VALUE = 1\n")
    started.expect(LIVE)
    assert get(started, "/readyz")[0] == 200
    assert json.loads(get(started, "/status.json")[1])["in_sync"]


def test_tree_may_have_our_names_and_a_virtual_environment(supervise: Supervise, tree: Path) -> None:
    for name in ("monitor", "supervisor", "child"):
        (tree / "modules" / f"{name}.py").write_text(f"WHO = 'the tree: {name}'\n", encoding="utf-8")
    (tree / "venv" / "lib").mkdir(parents=True)
    (tree / "venv" / "pyvenv.cfg").touch()
    (tree / "venv" / "lib" / "broken.py").write_text("=", encoding="utf-8")
    (tree / "main.py").write_text(
        "import json, os, sys, time\nfirst = sys.path[0]\nsys.path.insert(0, 'modules')\n"
        "import monitor, supervisor, child\n"
        "print(json.dumps([__name__, __file__, sys.argv, os.getcwd(), first,"
        " monitor.WHO, supervisor.WHO, child.WHO, sys.flags.safe_path]), flush=True)\ntime.sleep(600)\n",
        encoding="utf-8",
    )
    started = supervise("main.py", "-v", "--watch", "x", cwd=tree)
    seen = json.loads(started.expect(r"^\[.*\]$").group())
    main = str(tree / "main.py")
    assert seen == [
        "__main__", main, ["main.py", "-v", "--watch", "x"], str(tree), str(tree),
        "the tree: monitor", "the tree: supervisor", "the tree: child", False,
    ]  # fmt: skip
    started.expect(LIVE)
    document = json.loads(started.command("verify", "--json").stdout)
    assert document["in_sync"]
    assert [module["path"] for module in document["modules"]] == [
        "main.py", "modules/child.py", "modules/monitor.py", "modules/supervisor.py",
    ]  # fmt: skip


def test_module_target_runs_like_python_m(supervise: Supervise, tmp_path: Path) -> None:
    package = tmp_path / "work" / "pack"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys, time\nfrom . import part\n"
        "print(__name__, __package__, sys.argv[1:], part.X, flush=True)\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    (package / "part.py").write_text("X = 1\n", encoding="utf-8")
    started = supervise("-m", "pack", "a", cwd=package.parent)
    started.expect(r"__main__ pack \['a'\] 1")
    started.expect(LIVE)
    assert started.command("verify").returncode == 0


def test_second_supervisor_is_refused_with_the_pid_of_the_first(supervise: Supervise, tree: Path) -> None:
    first = supervise("main.py", cwd=tree)
    first.expect(LIVE)
    second = supervise("main.py", cwd=tree)
    assert second.process.wait(20) == 1
    assert f"pid {first.process.pid}" in second.output.join()
    assert first.status()["in_sync"]


def test_state_directory_belongs_to_one_supervisor(supervise: Supervise, tree: Path, tmp_path: Path) -> None:
    first = supervise("main.py", cwd=tree)
    first.expect(LIVE)
    second = supervise(f"--state-dir={tmp_path / 'state'}", "main.py", cwd=tree, folder=tmp_path / "second")
    assert second.process.wait(20) == 1
    assert f"pid {first.process.pid}" in second.output.join()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.py"], 2, "nowhere.py does not exist"),
        (["no_such_package.module:main"], 2, "there is no module 'no_such_package'"),
        (["main"], 2, "neither a script"),
        (["--watch=nowhere", "main.py"], 2, "--watch nowhere is not a directory"),
        (["--listen=here", "main.py"], 2, "not HOST:PORT"),
        (["--config=bad.toml", "main.py"], 2, "bad.toml: Object contains unknown field `qiuet`"),
        (["--config=type.toml", "main.py"], 2, "type.toml: Expected `float"),
        (["--config=none.toml", "main.py"], 2, "cannot read the configuration none.toml"),
    ],
)
def test_bad_input_is_one_sentence(
    supervise: Supervise, tree: Path, arguments: list[str], code: int, words: str
) -> None:
    (tree / "bad.toml").write_text("qiuet = 1\n", encoding="utf-8")
    (tree / "type.toml").write_text("quiet = 'long'\n", encoding="utf-8")
    started = supervise(*arguments, cwd=tree)
    assert started.process.wait(20) == code
    text = started.output.join()
    assert words in text
    assert len(text.splitlines()) == 1
    assert text.startswith("wa-supervisor: ")


def test_port_in_use_is_one_sentence(supervise: Supervise, tree: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        started = supervise(f"--listen=127.0.0.1:{taken.getsockname()[1]}", "main.py", cwd=tree)
        assert started.process.wait(20) == 1
    assert "already in use; free it or choose another --listen" in started.output.join()


def test_supervisord_in_the_same_environment_is_refused(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    facts = tmp_path / "site" / "supervisor-4.2.5.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: supervisor\nVersion: 4.2.5\n", encoding="utf-8"
    )
    started = supervise("main.py", cwd=tree, PYTHONPATH=str(facts.parent))
    assert started.process.wait(20) == 2
    assert "supervisor 4.2.5 (supervisord) is installed" in started.output.join()


@pytest.mark.parametrize("name", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_numbers_are_shown_and_not_written_whatever_the_environment_asks_of_prometheus_client(
    supervise: Supervise, tree: Path, tmp_path: Path, name: str
) -> None:
    child = 'import os; print([name for name in os.environ if "multiproc" in name.lower()])\n'
    (tree / "main.py").write_text(f"{child}while True: __import__('time').sleep(1)\n", encoding="utf-8")
    started = supervise("main.py", cwd=tree, **{name: str(tmp_path / "none")})
    started.expect(LIVE)
    started.expect(r"\[\]")
    started.expect(f"{name} is left out")
    wanted = tmp_path / "child.env"
    wanted.write_text(f"{name}={tmp_path}\n", encoding="utf-8")
    asked = supervise(f"--env-file={wanted}", "main.py", cwd=tree, folder=tmp_path / "second")
    asked.expect(LIVE)
    asked.expect(rf"\['{name}'\]")


def test_options_of_the_file_count_and_flags_beat_them(supervise: Supervise, tree: Path) -> None:
    (tree / "options.toml").write_text("watch = ['modules']\nscan-interval = 60\n", encoding="utf-8")
    started = supervise("--config=options.toml", "--watch=.", "main.py", cwd=tree)
    started.expect(f"watching {tree} ")
    started.expect(LIVE)


def test_service_manager_hears_ready_status_and_the_end(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(20)
        started = supervise("main.py", cwd=tree, NOTIFY_SOCKET=str(tmp_path / "n"), WATCHDOG_USEC="10000000")
        heard: list[str] = []

        def hear(prefix: str) -> str:
            while not (message := manager.recv(4096).decode()).startswith(prefix):
                heard.append(message)
            return message

        hear("READY=1")
        assert hear("STATUS=in sync").startswith("STATUS=in sync: generation 1 serves, tree ")
        hear("WATCHDOG=1")
        started.process.send_signal(signal.SIGHUP)
        assert "\nMONOTONIC_USEC=" in hear("RELOADING=1")
        hear("READY=1")
        started.process.terminate()
        hear("STOPPING=1")
        assert "NOTIFY_SOCKET" not in "".join(heard)


@pytest.mark.parametrize("heard", [True, False])
def test_stop_by_command_before_anything_was_live_is_told_to_the_service_manager(
    supervise: Supervise, tree: Path, tmp_path: Path, heard: bool
) -> None:
    (tree / "main.py").write_text("x = = 1\n", encoding="utf-8")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        variables = {"NOTIFY_SOCKET": str(tmp_path / "n")} if heard else {}
        started = supervise("main.py", cwd=tree, **variables)
        started.expect(r"rejected \(syntax\)")
        control.request(started.runtime, "stop", timeout_seconds=DEADLINE_SECONDS)
        assert started.process.wait(DEADLINE_SECONDS) == (7 if heard else 0)


def test_service_manager_that_asked_for_a_reload_is_always_answered(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    config = tmp_path / "wa.toml"
    config.write_text("", encoding="utf-8")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(DEADLINE_SECONDS)
        started = supervise(f"--config={config}", "main.py", cwd=tree, NOTIFY_SOCKET=str(tmp_path / "n"))

        def hear(prefix: str) -> None:
            while not manager.recv(4096).startswith(prefix.encode()):
                pass

        hear("READY=1")
        config.write_text("watchdog =", encoding="utf-8")
        started.process.send_signal(signal.SIGHUP)
        hear("RELOADING=1")
        hear("READY=1")
        started.expect("nothing was reloaded: ")
        config.write_text("", encoding="utf-8")
        (tree / "main.py").write_text("import sys\nsys.exit(7)\n", encoding="utf-8")
        started.live().kill()
        started.expect("starting again in .* s|rejected")
        started.process.send_signal(signal.SIGHUP)
        hear("RELOADING=1")
        hear("READY=1")


def test_folder_that_cannot_be_written_is_reported_and_no_failure(
    tree: Path, not_checked: Callable[[str], None]
) -> None:
    mount = ["unshare", "--mount", "--map-root-user", "--user"] if os.getuid() else ["unshare", "--mount"]
    probe = subprocess.run([*mount, "true"], check=False, capture_output=True)
    if probe.returncode:
        not_checked("a read-only tree: no mount namespace here")
        return
    subprocess.run([sys.executable, "-m", "compileall", "-q", tree], check=True)
    script = f"mount --bind '{tree}' '{tree}' && mount -o remount,bind,ro '{tree}' && exec \"$@\""
    runtime = tree.parent / "ro"
    command: list[Any] = [
        *mount, "sh", "-c", script, "sh", SUPERVISOR, "run",
        f"--runtime-dir={runtime}", f"--state-dir={runtime}-state", "--listen=127.0.0.1:0", "main.py",
    ]  # fmt: skip
    with subprocess.Popen(
        command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "): live" in line:
                process.terminate()
    assert "bytecode is not writable" in said
    assert "serving 1" in said


def test_script_behind_a_link_is_watched_where_it_lies(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "app.py").symlink_to(tree / "main.py")
    started = supervise("app.py", cwd=tmp_path / "bin")
    started.expect(f"watching {tree} ")
    started.expect("no module|ModuleNotFoundError|serving 1")


def test_program_that_works_inside_an_import_is_taken_as_started(supervise: Supervise, tree: Path) -> None:
    (tree / "main.py").write_text("import bot\n", encoding="utf-8")
    (tree / "bot.py").write_text("import time\nprint('at work', flush=True)\nwhile True: time.sleep(60)\n")
    started = supervise("--stop-timeout=1", "main.py", cwd=tree)
    started.expect("at work")
    started.expect(LIVE)


def test_proof_that_cannot_be_renewed_no_longer_counts(supervise: Supervise, tree: Path) -> None:
    pipe = tree.parent / "go"
    os.mkfifo(pipe)
    write(tree, "VALUE = 1\n")
    (tree / "main.py").write_text(
        "import os, sys, time\nprint('serving', flush=True)\nopen(os.environ['GO']).read()\n"
        'other = "import time; print(1 + 1, flush=True); time.sleep(600)"\n'
        "os.execv(sys.executable, [sys.executable, '-c', other])\n",
        encoding="utf-8",
    )
    started = supervise("--stop-timeout=1", "main.py", cwd=tree, GO=str(pipe))
    started.expect(LIVE)
    assert started.status()["in_sync"]
    pipe.write_text("", encoding="utf-8")
    started.expect("^2$")
    status = started.status()
    assert not status["in_sync"]
    assert "closed its channel" in status["reason"]
    assert series(started, "wa_supervisor_code_in_sync") == 0


def test_child_that_does_not_answer_is_neither_a_match_nor_a_mismatch(
    supervise: Supervise, tree: Path, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "n"))
        manager.settimeout(20)
        started = supervise(
            "--verify-interval=0.5",
            "--stop-timeout=1",
            "main.py",
            cwd=tree,
            NOTIFY_SOCKET=str(tmp_path / "n"),
        )
        started.expect(LIVE)
        child = started.live()
        child.suspend()
        deadline = time.monotonic() + DEADLINE_SECONDS
        while "has not answered" not in manager.recv(4096).decode():
            assert time.monotonic() < deadline, started.status()["reason"]
    status = started.status()
    assert not status["in_sync"]
    assert status["live"]["pid"] == child.pid
    assert status["restarts"]["mismatch"] == 0
    assert started.command("verify").returncode == 1


def test_lost_blobs_are_written_anew(supervise: Supervise, tree: Path, tmp_path: Path) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    for blob in (tmp_path / "state" / "blobs").iterdir():
        blob.write_bytes(b"#" * blob.stat().st_size)
    started.live().kill()
    started.expect("PinnedSourceError")
    started.expect(r"reload \((start|crash|scan)\): live")
    assert started.command("verify").returncode == 0


def test_asking_for_a_reload_sweeps_bytecode_that_was_planted_beside_equal_sources(
    supervise: Supervise, tree: Path
) -> None:
    import py_compile  # noqa: PLC0415

    source = tree / "modules" / "answer.py"
    look = [
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, 'modules'); import answer; print(answer.VALUE)",
    ]
    started = supervise("main.py", cwd=tree)
    started.expect(LIVE)
    old = tree / "old.txt"
    old.write_text("VALUE = 0\n", encoding="utf-8")
    cached = importlib.util.cache_from_source(str(source))
    py_compile.compile(
        str(old),
        cfile=cached,
        dfile=str(source),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    plain = subprocess.run(look, cwd=tree, capture_output=True, text=True, check=True)
    assert plain.stdout == "0\n", "void: plain Python was expected to run the planted code"
    assert started.reload()["outcome"] == "unchanged"
    assert subprocess.run(look, cwd=tree, capture_output=True, text=True, check=True).stdout == "1\n"


def test_unusable_state_directory_is_one_sentence(supervise: Supervise, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "blobs").touch()
    started = supervise("main.py", cwd=tree)
    assert started.process.wait(20) == 2
    assert "name another --state-dir" in started.output.join()


def test_python_itself_is_never_the_default_tree(supervise: Supervise, tree: Path) -> None:
    started = supervise("os:abort", cwd=tree)
    assert started.process.wait(20) == 2
    assert "belongs to Python; name your code with --watch" in started.output.join()


def test_working_directory_that_was_moved_away_and_copied_back_is_reloaded_by_its_name(
    supervise: Callable[..., Supervised], tree: Path
) -> None:
    started = supervise("main.py", cwd=tree)
    started.expect("^serving 1$")
    started.expect(LIVE)
    tree.rename(tree.with_name("away"))
    refused = started.command("reload")
    assert refused.returncode == 1
    assert f"cannot work in {tree}: No such file or directory" in refused.stderr
    shutil.copytree(tree.with_name("away"), tree)
    (tree / "modules" / "answer.py").write_text("VALUE = 2\n", encoding="utf-8")
    assert started.command("reload").returncode == 0
    started.expect("^serving 2$")
