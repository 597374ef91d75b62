"""What a supervisor does about crashes, hangs, leaks and bad commits, and what it remembers of them."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.supervisor.harness import DEADLINE_SECONDS, SUPERVISOR, Supervised, history, is_gone, until

Supervise = Callable[..., Supervised]

NOTIFYING = """\
import os, signal, socket, sys, threading, time
sys.path.insert(0, "modules")
import answer

notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
stopped = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stopped.set())
answer.work()
notify.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"])
print("serving", answer.VALUE, flush=True)
while not stopped.wait(0.05):
    notify.sendto(b"WATCHDOG=1", os.environ["NOTIFY_SOCKET"])
    answer.work()
print("finished", answer.VALUE, flush=True)
"""
GOOD = "VALUE = {}\ndef work(): pass\n"
OVERLAP = ("--type=notify", "--handover=overlap")
REPLACE = ("--type=notify", "--handover=replace")
LIVE = r"reload \(\w+\): live"


@pytest.fixture
def service(tree: Path) -> Path:
    """A tree whose script reports for work; what it does is in ``modules/answer.py``."""
    (tree / "main.py").write_text(NOTIFYING, encoding="utf-8")
    write(tree, GOOD.format(1))
    return tree


def write(tree: Path, text: str) -> None:
    """Save ``modules/answer.py`` as an editor does: whole."""
    new = tree / "answer.new"
    new.write_text(text, encoding="utf-8")
    new.replace(tree / "modules" / "answer.py")


def known_good(supervise: Supervise, tree: Path, *arguments: str, **environment: str) -> Supervised:
    """Start a supervisor and wait until what is on disk is known good."""
    started = supervise("--probation=1", *arguments, "main.py", cwd=tree, **environment)
    started.expect("^serving 1$")
    started.expect(LIVE)
    started.expect("is known good")
    return started


def restart_record(started: Supervised) -> dict[str, Any]:
    """Return the newest record of a child that was started again."""
    return next(record for record in history(started) if record["kind"] == "restart")


DIES_SOON = (
    GOOD
    + "import sys, time\nborn = time.monotonic()\n"
    + ("def work():\n    if time.monotonic() - born > 0.3: sys.exit('boom')\n")
)
BAD = {
    "dies at work": (DIES_SOON.format(2), "crash"),
    "fails at import": (GOOD.format(2) + "import nowhere\n", "import"),
    "is never ready": (GOOD.format(2) + "import time\ndef work(): time.sleep(600)\n", "readiness"),
    "is patched": (
        GOOD.format(2) + "exec(compile('def work(): return 3', __file__, 'exec'), globals())\n",
        "attestation",
    ),
}


@pytest.mark.parametrize("handover", [OVERLAP, REPLACE], ids=["overlap", "replace"])
@pytest.mark.parametrize("commit", BAD)
def test_bad_commit_ends_with_the_good_version_at_work(
    supervise: Supervise, service: Path, handover: tuple[str, ...], commit: str
) -> None:
    started = known_good(supervise, service, *handover, "--ready-timeout=3", "--scan-interval=0.2")
    tree = started.status()["live"]["tree"]
    source, reason = BAD[commit]
    write(service, source)
    outcome = started.expect(rf"reload \(\w+\): (rejected|rolled_back) \({reason}\)").group(1)
    if outcome == "rolled_back":
        started.expect("^serving 1$")
        started.expect(r"reload \(crash\): live")
    status = started.status()
    assert status["live"]["tree"] == tree == status["last_known_good"]
    assert not status["in_sync"]
    assert [fault["reason"] for fault in status["quarantine"]] == [reason]
    write(service, GOOD.format(4))
    started.expect("^serving 4$")
    started.expect("is known good")
    assert started.status()["quarantine"] == []
    assert started.status()["in_sync"]


def test_crash_is_recorded_with_its_cause_and_last_words(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *OVERLAP)
    crash = "import sys\ndef work():\n    print('about to fail', file=sys.stderr)\n    os = 1 / 0\n"
    write(
        service,
        GOOD.format(2)
        + "import time\nborn = time.monotonic()\n"
        + crash.replace("def work():\n", "def work():\n    if time.monotonic() - born < 0.2: return\n"),
    )
    started.expect(r"rolled_back \(crash\): on probation: ZeroDivisionError: division by zero")
    started.expect(LIVE)
    record = restart_record(started)
    assert (record["trigger"], record["ending"]["exit_status"]) == ("crash", 1)
    assert "about to fail" in record["ending"]["output"]
    assert record["ending"]["output"][-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("number", "ending"),
    [
        (signal.SIGKILL, {"exit_status": None, "signal": "SIGKILL"}),
        (signal.SIGSEGV, {"exit_status": None, "signal": "SIGSEGV"}),
        (signal.SIGTERM, {"exit_status": 0, "signal": None}),
    ],
)
def test_end_that_nobody_asked_for_is_recorded_and_healed(
    supervise: Supervise, service: Path, number: signal.Signals, ending: dict[str, Any]
) -> None:
    started = known_good(supervise, service, *OVERLAP)
    started.live().send_signal(number)
    started.expect("generation 1: crash")
    started.expect("^serving 1$")
    started.expect(LIVE)
    record = restart_record(started)
    assert {key: record["ending"][key] for key in ending} == ending
    assert started.status()["restarts"]["crash"] == 1
    if number is signal.SIGSEGV:
        assert any("Fatal Python error: Segmentation fault" in line for line in record["ending"]["output"])


HANGS = GOOD.format(1) + (
    "import os, threading\n"
    "def work():\n    if os.path.exists('hang'): hang_here()\n"
    "def hang_here(): threading.Event().wait()\n"
)


def test_hung_child_leaves_its_stacks_in_log_and_record(supervise: Supervise, service: Path) -> None:
    write(service, HANGS)
    started = known_good(supervise, service, *OVERLAP, "--watchdog=1")
    (service / "hang").touch()
    started.expect("Fatal Python error: Aborted")
    (service / "hang").unlink()
    started.expect("generation 1: hang")
    started.expect("^serving 1$")
    started.expect(LIVE)
    record = restart_record(started)
    assert record["trigger"] == "hang"
    assert any("in hang_here" in line for line in record["ending"]["dump"])
    assert record["ending"]["signal"] == "SIGABRT"


@pytest.mark.parametrize("kind", ["simple", "notify"])
def test_stopped_child_is_killed_and_never_continued(supervise: Supervise, service: Path, kind: str) -> None:
    write(
        service,
        GOOD.format(1) + "import signal\nsignal.signal(signal.SIGCONT, lambda *_: print('continued'))",
    )
    started = known_good(supervise, service, f"--type={kind}", "--watchdog=1")
    started.live().send_signal(signal.SIGSTOP)
    started.expect("generation 1: hang")
    started.expect("^serving 1$")
    started.expect(LIVE)
    ending = restart_record(started)["ending"]
    assert (ending["stopped"], ending["signal"]) == (True, "SIGKILL")
    assert ending["dump"][0].startswith("state T (stopped)")
    assert "continued" not in started.output.lines


def test_child_that_was_stopped_together_with_the_supervisor_is_not_hung(
    supervise: Supervise, service: Path
) -> None:
    started = known_good(supervise, service, *OVERLAP, "--watchdog=1")
    child = started.live()
    supervisor = psutil.Process(started.process.pid)
    for process in (supervisor, child):
        process.suspend()
    threading.Event().wait(2.5)  # Longer than the watchdog: this time is what the test is about.
    for process in (supervisor, child):
        process.resume()
    started.expect("the supervisor stood still")
    assert started.command("verify").returncode == 0
    assert started.live() == child
    assert started.status()["restarts"]["hang"] == 0


def test_child_over_its_memory_limit_is_replaced_without_downtime(
    supervise: Supervise, service: Path
) -> None:
    write(
        service,
        GOOD.format(1) + "import os\nleak = []\ndef work():\n"
        "    if os.path.exists('leak'): leak.append(b'x' * 8_000_000)\n",
    )
    started = known_good(supervise, service, *OVERLAP, "--max-memory=150000000")
    (service / "leak").touch()
    started.expect("generation 1: memory")
    (service / "leak").unlink()
    started.expect(r"reload \(memory\): live")
    started.expect("^finished 1$")
    said = [line for line in started.output.lines if line.startswith(("serving", "finished"))]
    assert said == ["serving 1", "serving 1", "finished 1"]
    assert restart_record(started)["trigger"] == "memory"
    assert started.status()["restarts"]["memory"] == 1


def test_child_that_is_old_is_replaced(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *OVERLAP, "--max-age=2")
    started.expect("generation 1: age")
    started.expect(r"reload \(age\): live")


def test_broken_code_at_boot_runs_what_was_known_good(supervise: Supervise, service: Path) -> None:
    first = known_good(supervise, service, *OVERLAP)
    tree = first.status()["live"]["tree"]
    first.end()
    write(service, "def broken(:\n")
    second = supervise(*OVERLAP, "main.py", cwd=service)
    second.expect(r"rejected \(syntax\).*answer.py, line 1")
    second.expect("^serving 1$")
    second.expect(LIVE)
    status = second.status()
    assert (status["live"]["tree"], status["in_sync"]) == (tree, False)
    assert "answer.py, line 1" in status["reason"]
    verified = json.loads(second.command("verify", "--json").stdout)
    assert verified["functions"]["checked"] > 0, "code from before this supervisor is compared, too"
    write(service, GOOD.format(2))
    second.expect("^serving 2$")


def test_known_good_code_that_takes_long_to_judge_is_started(supervise: Supervise, service: Path) -> None:
    bulk = "".join(f"def f{n}(a): return [a, {n}, lambda: a + {n}]\n" for n in range(15_000))
    (service / "modules" / "bulk.py").write_text(bulk, encoding="utf-8")
    known_good(supervise, service, *OVERLAP).command("stop")
    write(service, "this is no Python\n")
    started = supervise(*OVERLAP, "--ready-timeout=1", "main.py", cwd=service)
    started.expect("^serving 1$")
    assert not [line for line in started.output.lines if "not live within" in line]


def test_quarantine_survives_kill_9_of_the_supervisor(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    first = known_good(supervise, service, *OVERLAP, "--scan-interval=0.2")
    write(service, GOOD.format(2) + "import nowhere\n")
    first.expect(r"rejected \(import\)")
    number = first.status()["live"]["generation"]
    until(lambda: b"nowhere" in (tmp_path / "state" / "state.json").read_bytes())
    first.process.kill()
    first.end()
    second = supervise(*OVERLAP, "main.py", cwd=service)
    second.expect(r"rejected \(import\): quarantined: ")
    second.expect("^serving 1$")
    second.expect(LIVE)
    assert second.status()["live"]["generation"] > number
    assert second.command("reload").returncode == 1, "an operator may try it again"
    second.expect(r"reload \(cli\): rejected \(import\): ModuleNotFoundError")


def test_damaged_state_is_set_aside_and_reported(supervise: Supervise, service: Path, tmp_path: Path) -> None:
    known_good(supervise, service, *OVERLAP).end()
    state = tmp_path / "state" / "state.json"
    state.write_bytes(state.read_bytes()[:-20])
    second = supervise(*OVERLAP, "main.py", cwd=service)
    second.expect("state.json.*set aside")
    second.expect("^serving 1$")
    assert list(state.parent.glob("state.json.corrupt-*"))


def test_restart_is_a_new_process_of_the_same_code_through_the_ordinary_handover(
    supervise: Supervise, service: Path
) -> None:
    started = known_good(supervise, service, *OVERLAP)
    before = started.live()
    record = json.loads(started.command("restart", "--json").stdout)
    assert (record["outcome"], record["trigger"], record["uid"]) == ("live", "cli", os.getuid())
    newest = history(started)[0]
    assert (newest["generation"], newest["previous_generation"]) == (2, 1)
    assert started.live() != before
    started.expect("^finished 1$")
    assert started.status()["in_sync"]


def test_rollback_goes_back_and_the_disk_waits_for_its_next_change(
    supervise: Supervise, service: Path
) -> None:
    started = known_good(supervise, service, *OVERLAP, "--scan-interval=0.2")
    assert started.command("rollback").stderr.endswith("no tree before this one has served its probation\n")
    write(service, GOOD.format(2))
    started.expect("^serving 2$")
    started.expect("is known good")
    answer = started.command("rollback")
    assert answer.returncode == 0, answer.stderr
    started.expect("^serving 1$")
    status = started.status()
    assert (status["in_sync"], status["quarantine"][0]["reason"]) == (False, None)
    assert f"rolled back by uid {os.getuid()}" in status["reason"]
    write(service, GOOD.format(3))
    started.expect("^serving 3$")
    started.expect(LIVE)
    kinds = [(record["kind"], record["uid"]) for record in history(started)]
    assert ("rollback", os.getuid()) in kinds
    assert "rollback" in started.command("history").stdout


def test_pause_holds_automatic_reloads_and_resume_catches_up(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *OVERLAP, "--scan-interval=0.2")
    before = started.live()
    assert started.command("pause").stdout == "paused\n"
    write(service, GOOD.format(2))
    assert started.command("verify").returncode == 3, "the disk is looked at, whatever was asked for"
    status = started.status()
    assert (status["paused"], status["in_sync"]) == (True, False)
    assert status["reason"].startswith("paused: ")
    before.kill()
    started.expect("generation 1: crash")
    started.expect("^serving 1$")
    started.expect(LIVE)
    assert started.command("resume").stdout == "resumed\n"
    started.expect("^serving 2$")
    started.expect(LIVE)
    assert [r["outcome"] for r in history(started) if r["kind"] == "operator"] == ["resume", "pause"]


def test_reload_by_the_operator_goes_through_a_pause(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *OVERLAP)
    started.command("pause")
    write(service, GOOD.format(2))
    assert started.command("reload").returncode == 0
    started.expect("^serving 2$")
    assert started.status()["paused"]


def test_changed_setting_makes_a_new_generation_of_the_same_tree(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    config = tmp_path / "wa.toml"
    config.write_text("watchdog = 15\n", encoding="utf-8")
    started = known_good(supervise, service, *OVERLAP, f"--config={config}")
    before = started.status()["live"]
    config.write_text("watchdog = 20\n", encoding="utf-8")
    record = started.reload()
    assert (record["outcome"], record["trigger"]) == ("live", "config")
    after = started.status()["live"]
    assert (after["tree"], after["generation"]) == (before["tree"], before["generation"] + 1)
    assert "WATCHDOG_USEC=20000000" in psutil.Process(after["pid"]).environ()["WATCHDOG_USEC"].join(
        ["WATCHDOG_USEC=", ""]
    )
    assert started.reload()["outcome"] == "unchanged"
    for text, why in [
        ("watchdog = 'x'\n", "watchdog"),
        ("watchdog = 20\nwatch = ['..']\n", "a change of watch"),
    ]:
        config.write_text(text, encoding="utf-8")
        refused = started.command("reload")
        assert refused.returncode == 1
        assert why in refused.stderr
    assert started.status()["live"] == after


def test_environment_file_is_watched_and_its_values_stay_secret(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    file = tmp_path / "environment"
    file.write_text("# of the service\nSETTING='first secret'\n", encoding="utf-8")
    started = known_good(supervise, service, *OVERLAP, f"--env-file={file}", "--scan-interval=0.2")
    assert started.live().environ()["SETTING"] == "first secret"
    file.write_text("SETTING=second secret\n", encoding="utf-8")
    started.expect(r"reload \(config\): live")
    assert started.live().environ()["SETTING"] == "second secret"
    file.write_text("third secret\n", encoding="utf-8")
    started.expect("environment, line 1 is not NAME=value")
    assert "line 1 is not NAME=value" in started.status()["problems"][0]
    said = "\n".join(started.output.lines) + json.dumps(started.status()) + json.dumps(history(started))
    assert "secret" not in said.replace("its values stay secret", "")


def test_file_that_became_a_pipe_is_not_waited_for(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    file, config = tmp_path / "environment", tmp_path / "wa.toml"
    file.write_text("SETTING=1\n", encoding="utf-8")
    config.write_text("", encoding="utf-8")
    started = known_good(
        supervise, service, *OVERLAP, f"--env-file={file}", f"--config={config}", "--scan-interval=0.2"
    )
    file.unlink()
    os.mkfifo(file)
    started.expect("it is not a regular file; the earlier one goes on to count")
    file.unlink()
    file.write_text("SETTING=2\n", encoding="utf-8")
    started.expect(r"reload \(config\): live")
    config.unlink()
    os.mkfifo(config)
    refused = started.command("reload")
    assert refused.returncode == 1
    assert "it is not a regular file" in refused.stderr
    assert started.status()["in_sync"]


def test_who_waits_for_a_reload_hears_of_the_stop(supervise: Supervise, service: Path) -> None:
    (service / ".git").mkdir()
    (service / ".git" / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    started = known_good(supervise, service, *OVERLAP)
    (service / ".git" / "index.lock").touch()  # Holds the reload.
    answers: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: answers.append(started.reload()))
    waiting.start()
    until(lambda: started.status()["state"] == "reloading")
    started.command("stop")
    waiting.join()
    assert (answers[0]["outcome"], answers[0]["detail"]) == ("superseded", "by the operator's stop")


def test_downtime_of_a_replacement_is_within_its_reload(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *REPLACE)
    spent = 0.0
    for value in range(2, 5):
        write(service, GOOD.format(value))
        started.expect(f"^serving {value}$")
        started.expect(LIVE)
        started.expect("is known good")  # More than half a second later: all that is counted has been.
        spent += started.status()["last_reload"]["stages"]["handover"]
    with urllib.request.urlopen(f"http://{started.status()['listen']}/metrics", timeout=10) as answer:
        found = re.search(
            r"^wa_supervisor_downtime_seconds_total (\S+)$", answer.read().decode(), re.MULTILINE
        )
    assert found is not None
    assert 0 < float(found[1]) <= spent


def test_reload_that_a_pause_held_is_not_called_unchanged(supervise: Supervise, service: Path) -> None:
    bulk = "".join(f"def f{n}(a): return [a, {n}, lambda: a + {n}]\n" for n in range(20_000))
    started = known_good(supervise, service, *OVERLAP)
    (service / "modules" / "bulk.py").write_text(bulk, encoding="utf-8")  # Takes long to compile.
    until(lambda: started.status()["state"] == "reloading")
    started.command("pause")
    until(lambda: started.status()["state"] == "live")
    record = started.status()["last_reload"]
    assert record["trigger"] == "start" or (record["outcome"], record["detail"]) == (
        "superseded",
        "by the operator's pause",
    )
    assert started.status()["reason"].startswith("paused: ")


def test_password_in_what_a_child_says_of_itself_is_masked(supervise: Supervise, service: Path) -> None:
    says = NOTIFYING.replace(
        'b"READY=1"', 'b"READY=1\\nSTATUS=at db://u:s3cret@h\\nX_SUSPECT=db://u:s3cret@h"'
    )
    (service / "main.py").write_text(says, encoding="utf-8")
    started = supervise(*OVERLAP, "main.py", cwd=service)
    started.expect("is suspicious: db://")
    started.expect(LIVE)
    assert started.status()["live"]["status"] == "at db://u:***@h"
    assert "s3cret" not in "\n".join(started.output.lines)


def test_settings_that_failed_are_tried_again_when_the_operator_asks(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    file = tmp_path / "environment"
    file.write_text("SETTING=1\n", encoding="utf-8")
    fails = "import os\nVALUE = int(os.environ['SETTING'])\nassert VALUE != 2\ndef work(): pass\n"
    write(service, fails)
    started = known_good(supervise, service, *OVERLAP, f"--env-file={file}", "--scan-interval=0.2")
    file.write_text("SETTING=2\n", encoding="utf-8")
    started.expect(r"reload \(config\): rejected")
    assert started.reload()["outcome"] == "rejected", "it is not what runs"
    assert started.status()["live"]["generation"] == 1


def test_settings_are_taken_over_by_what_takes_the_place_of_their_generation(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    file = tmp_path / "environment"
    file.write_text("SETTING=1\n", encoding="utf-8")
    started = known_good(supervise, service, *OVERLAP, f"--env-file={file}", "--scan-interval=0.2")
    write(service, GOOD.format(2) + "import time; time.sleep(60)\n")
    until(lambda: (started.status()["candidate"] or {}).get("stage") == "started")
    file.write_text("SETTING=2\n", encoding="utf-8")
    until(lambda: (started.status()["candidate"] or {}).get("generation") == 3)
    write(service, GOOD.format(1))
    started.expect(r"superseded: by tree")
    started.expect(LIVE)
    assert started.live().environ()["SETTING"] == "2"


def test_new_code_starts_though_the_pinned_sources_were_taken_away(
    supervise: Supervise, service: Path, tmp_path: Path
) -> None:
    started = known_good(supervise, service, *OVERLAP)
    shutil.rmtree(tmp_path / "state" / "blobs")
    write(service, GOOD.format(2))
    started.expect("^serving 2$")
    started.expect(LIVE)


def test_candidate_that_waits_for_a_running_git_does_not_run_out_of_time(
    supervise: Supervise, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    (tree / ".git").mkdir(parents=True)
    (tree / ".git" / "HEAD").write_text("ref: refs/heads/main\n", encoding="utf-8")
    (tree / "app").mkdir()
    code = (
        "import threading\n{}\ndef main():\n    print('serving', flush=True)\n    threading.Event().wait()\n"
    )
    (tree / "app" / "__init__.py").write_text(code.format(""), encoding="utf-8")
    started = supervise("--handover=overlap", "--ready-timeout=2", "app:main", cwd=tree)
    started.expect(LIVE)
    (tree / "app" / "__init__.py").write_text(code.format("threading.Event().wait(0.5)"), encoding="utf-8")
    until(lambda: started.status()["candidate"] is not None)
    began = time.monotonic()
    (tree / ".git" / "index.lock").touch()
    (tree / "app" / "other.py").touch()
    until(lambda: time.monotonic() > began + 3)
    (tree / ".git" / "index.lock").unlink()
    started.expect(LIVE)
    assert not [line for line in started.output.lines if "rejected" in line]


@pytest.mark.parametrize("spare", [4])  # Enough to look and to compile, not to start.
def test_new_code_starts_when_there_are_descriptors_again(
    supervise: Supervise, service: Path, spare: int
) -> None:
    started = known_good(supervise, service, *OVERLAP, "--scan-interval=0.2")
    pid = started.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + spare, before[1]))
    write(service, GOOD.format(2))
    started.expect("Too many open files")
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    started.expect("^serving 2$")
    started.expect(LIVE)


DAEMON = """
import os, signal, socket, time
def work(): pass
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        port = socket.socket()
        port.bind(("127.0.0.1", PORT))
        port.listen()
        print("daemon", os.getpid(), flush=True)
        time.sleep(600)
    os._exit(0)
"""


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_what_a_generation_daemonized_is_gone_before_the_next_one_starts(
    supervise: Supervise, service: Path, free_port: int
) -> None:
    write(service, GOOD.format(1) + DAEMON.replace("PORT", str(free_port)))
    started = supervise(*REPLACE, "main.py", cwd=service)
    first = psutil.Process(int(started.expect(r"^daemon (\d+)$").group(1)))
    started.expect(LIVE)
    started.live().kill()
    started.expect(r"^daemon (\d+)$")
    started.expect(LIVE)
    assert is_gone(first)
    assert started.command("restart").returncode == 0
    started.expect(r"^daemon (\d+)$")


def test_next_supervisor_sweeps_what_a_killed_one_left_behind(
    supervise: Supervise, service: Path, free_port: int
) -> None:
    write(service, GOOD.format(1) + DAEMON.replace("PORT", str(free_port)))
    first = supervise(*OVERLAP, "main.py", cwd=service)
    daemon = psutil.Process(int(first.expect(r"^daemon (\d+)$").group(1)))
    first.expect(LIVE)
    first.process.kill()
    first.process.wait()
    assert not is_gone(daemon), "void: without systemd, nobody else kills it"
    second = supervise(*OVERLAP, "main.py", cwd=service)
    second.expect(f"killed what an earlier supervisor left behind: .*{daemon.pid}")
    second.expect(r"^daemon (\d+)$")
    second.expect(LIVE)


def test_last_lines_of_the_child_are_kept_and_followed(supervise: Supervise, service: Path) -> None:
    started = known_good(supervise, service, *OVERLAP)
    (line,) = started.command("logs", "-n", "1").stdout.splitlines()
    assert line.endswith("serving 1")
    follower = subprocess.Popen(
        [SUPERVISOR, "logs", "-f", "-n", "1", f"--runtime-dir={started.runtime}"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert follower.stdout is not None
        assert follower.stdout.readline().endswith("serving 1\n")
        started.command("restart")
        assert re.search("serving 1$|finished 1$", follower.stdout.readline())
        follower.send_signal(signal.SIGINT)
        assert follower.wait(DEADLINE_SECONDS) == 0
    finally:
        follower.kill()
        follower.communicate()
