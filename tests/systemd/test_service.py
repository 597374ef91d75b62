"""The unit under a real systemd: what is done to it and what becomes of it, with the journal as witness."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.systemd.machine import BIN, Machine, Unit

Evidence = Callable[[str], None]

APP = "/opt/wa-monitor/monitor/app.py"


def edit(unit: Unit, text: str = "# edited") -> None:
    """Change a source of the running program, as `sed -i` does it."""
    unit.machine.run("sed", "-i", f"$ a {text}", APP, user="wa-monitor")


def lines(unit: Unit, pattern: str) -> str:
    """Return the lines of the journal that show something."""
    found = "\n".join(line for line in unit.journal().splitlines() if re.search(pattern, line))
    assert found, f"no line with {pattern!r} in:\n{unit.journal()}"
    return found


def test_service_is_active_only_after_a_proven_generation(unit: Unit, evidence: Evidence) -> None:
    assert unit.systemctl("start").returncode == 0
    assert unit.status()["in_sync"], "active, and nothing is proven"
    assert unit.command("verify").returncode == 0
    lines(unit, "live: .*attested")
    unit.machine.until(lambda: "in sync" in unit.show("StatusText"), unit.show("StatusText"))
    status = unit.show("StatusText")
    assert re.match(
        r"in sync: generation \d+ serves, commit [0-9a-f]{12}, tree [0-9a-f]{12}; it says: ", status
    )
    assert (unit.show("ActiveState"), unit.show("NotifyAccess")) == ("active", "main")
    evidence(f"{lines(unit, 'Starting|: live|Started')}\nStatus: {status}")


def test_start_that_is_not_ready_is_not_active_and_gets_its_time(unit: Unit, evidence: Evidence) -> None:
    unit.drop_in(f"{unit.dropped_in}TimeoutStartSec=3\n")
    edit(unit, "import time; time.sleep(5)")
    unit.machine.run("systemctl", "start", "--no-block", unit.name)
    unit.machine.until(lambda: "is being started" in unit.show("StatusText"), "no status")
    assert unit.show("ActiveState") == "activating"
    evidence(f"{unit.show('ActiveState')}: {unit.show('StatusText')}")
    unit.until("Started wa-monitor.service")
    evidence(lines(unit, "Starting|: live|Started"))


def test_reload_returns_with_the_new_code_at_work(started: Unit, evidence: Evidence) -> None:
    assert started.command("pause").returncode == 0  # So that it is the reload that brings it, and no event.
    before = started.status()["live"]
    edit(started)
    done = started.systemctl("reload")
    assert done.returncode == 0, done.stderr
    after = started.status()
    assert (after["live"]["generation"], after["in_sync"]) == (before["generation"] + 1, True)
    assert after["live"]["tree"] != before["tree"]
    assert started.show("ActiveState") == "active"
    evidence(lines(started, "Reloading|reload|Reloaded"))


def test_reload_of_a_syntax_error_fails_and_the_old_code_serves(started: Unit, evidence: Evidence) -> None:
    before = started.status()["live"]
    edit(started, "x = = 1")
    done = started.systemctl("reload")
    assert done.returncode != 0
    after = started.status()
    assert (after["live"]["pid"], after["in_sync"]) == (before["pid"], False)
    assert started.show("ActiveState") == "active"
    started.machine.until(lambda: "invalid syntax" in started.show("StatusText"), "no reason")
    why = lines(started, r"rejected \(syntax\).*app\.py, line \d+: invalid syntax")
    evidence(f"{why}\n{lines(started, 'Reload')}\nsystemctl: {done.stderr.splitlines()[0]}")
    evidence(f"Status: {started.show('StatusText')}")
    started.machine.run("sed", "-i", "$ d", APP, user="wa-monitor")
    assert started.systemctl("reload").returncode == 0
    assert started.until_in_sync()["live"]["pid"] == before["pid"]


def test_two_reloads_at_once_both_return_with_an_outcome(started: Unit, evidence: Evidence) -> None:
    before = started.status()["live"]["generation"]
    edit(started)
    with ThreadPoolExecutor() as both:
        asked = [both.submit(started.systemctl, "reload") for _ in range(2)]
        asked += [both.submit(started.command, "reload") for _ in range(2)]
        assert [one.result().returncode for one in asked] == [0, 0, 0, 0]
    after = started.status()
    assert (after["in_sync"], after["live"]["generation"]) == (True, before + 1)
    assert (started.show("ActiveState"), started.show("SubState")) == ("active", "running")
    evidence(lines(started, "Reload|reload"))


def test_sed_in_place_reloads_by_itself(started: Unit, evidence: Evidence) -> None:
    before = started.status()["live"]["generation"]
    edit(started)
    started.until_in_sync(than=before)
    evidence(lines(started, r"reload \((watch|scan)\): live"))


def test_restart_runs_what_is_on_disk(started: Unit, evidence: Evidence) -> None:
    before = started.status()["live"]
    edit(started)
    assert started.systemctl("restart").returncode == 0
    after = started.until_in_sync()["live"]
    assert after["tree"] != before["tree"]
    assert started.command("verify").returncode == 0
    evidence(lines(started, "Stopp|: live|Started"))


def test_killed_supervisor_is_started_again_and_nobody_is_left(started: Unit, evidence: Evidence) -> None:
    before = started.processes()
    started.send("KILL")
    started.until("Started wa-monitor.service")
    started.until_in_sync()
    assert not set(before) & set(started.processes())
    assert started.show("NRestarts") == "1"
    evidence(lines(started, "Main process exited|Scheduled restart|Killed|: live|Started"))


def test_killed_child_is_started_again_by_its_supervisor(started: Unit, evidence: Evidence) -> None:
    before = started.status()
    started.send("KILL", before["live"]["pid"])
    after = started.until_in_sync(than=before["live"]["generation"])
    assert (after["pid"], after["restarts"]["crash"]) == (before["pid"], 1)
    assert started.show("NRestarts") == "0"
    evidence(lines(started, "SIGKILL|: live"))


def test_hung_child_is_replaced_by_its_supervisor(started: Unit, evidence: Evidence) -> None:
    before = started.status()
    started.send("STOP", before["live"]["pid"])
    after = started.until_in_sync(than=before["live"]["generation"])
    assert (after["pid"], after["restarts"]["hang"]) == (before["pid"], 1)
    assert started.show("NRestarts") == "0"
    evidence(lines(started, "silent|hang|: live"))


def test_hung_supervisor_is_replaced_by_systemd(unit: Unit, evidence: Evidence) -> None:
    unit.drop_in(f"{unit.dropped_in}WatchdogSec=4\n")
    assert unit.systemctl("start").returncode == 0
    unit.until_in_sync()
    before = unit.processes()
    unit.forget()
    unit.send("STOP")
    unit.until("Started wa-monitor.service")
    unit.until_in_sync()
    assert not set(before) & set(unit.processes())
    assert unit.show("NRestarts") == "1"
    evidence(lines(unit, "Watchdog|Main process exited|Scheduled restart|: live|Started"))


def test_watchdog_is_content_while_all_is_well(unit: Unit) -> None:
    unit.drop_in(f"{unit.dropped_in}WatchdogSec=2\n")
    assert unit.systemctl("start").returncode == 0
    first = int(unit.show("WatchdogTimestampMonotonic"))
    unit.machine.until(
        lambda: int(unit.show("WatchdogTimestampMonotonic")) > first + 6_000_000,
        "nobody says that all is well",
    )
    assert unit.show("NRestarts") == "0"


STUBBORN = """\
import os, signal, socket, sys, time

def say(message):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.sendto(message, os.environ["NOTIFY_SOCKET"])

signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork():
        os._exit(0)
    while True:
        time.sleep(60)
say(b"READY=1")
while True:
    say(b"WATCHDOG=1")
    time.sleep(0.5)
"""
"""Neither it nor what it has daemonized ends when it is asked to."""


def test_stop_ends_everything_within_the_drain_deadline(unit: Unit, evidence: Evidence) -> None:
    unit.machine.write("/opt/wa-monitor/stubborn/main.py", STUBBORN, user="wa-monitor")
    command = f"{BIN}/wa-supervisor run --type notify --stop-timeout 4 stubborn/main.py"
    unit.drop_in(f"[Service]\nExecStart=\nExecStart={command}\nTimeoutStopSec=2\n")  # It asks for more.
    assert unit.systemctl("start").returncode == 0
    before = unit.processes()
    assert len(before) > len(("supervisor", "child", "its daemon")) - 1
    unit.forget()
    assert unit.systemctl("stop").returncode == 0
    assert unit.show("Result") == "success", unit.journal()  # Else systemd has had to end it.
    gone = unit.machine.call("sh", "-c", "ls -d " + " ".join(f"/proc/{pid}" for pid in before))
    assert gone.stdout == ""
    evidence(f"{len(before)} processes\n{lines(unit, 'Stopping|stop|Stopped|Deactivated')}")


def test_stop_of_the_monitor_is_clean_and_stays(started: Unit, evidence: Evidence) -> None:
    before = started.processes()
    assert started.systemctl("stop").returncode == 0
    assert (started.show("ActiveState"), started.show("Result")) == ("inactive", "success")
    assert started.machine.call("sh", "-c", "ls -d " + " ".join(f"/proc/{p}" for p in before)).stdout == ""
    evidence(lines(started, "Stopping|stop|Stopped|Deactivated"))


def test_operators_own_stop_is_not_undone(started: Unit, evidence: Evidence) -> None:
    assert started.command("stop").returncode == 0
    started.until("Deactivated successfully")
    assert (started.show("ActiveState"), started.show("NRestarts")) == ("inactive", "0")
    evidence(lines(started, "stop|Deactivated"))


def test_operators_own_stop_of_a_start_is_not_undone(unit: Unit, evidence: Evidence) -> None:
    edit(unit, "import time; time.sleep(60)")
    unit.machine.run("systemctl", "start", "--no-block", unit.name)
    unit.machine.until(lambda: "is being started" in unit.show("StatusText"), "no status")
    assert unit.command("stop").returncode == 0
    unit.until("Main process exited")
    unit.machine.until(lambda: unit.show("ActiveState") == "failed", unit.show("ActiveState"))
    assert unit.show("NRestarts") == "0"  # It would count before the pause.
    evidence(lines(unit, "stop|Main process exited|Failed"))


def test_supervisor_replaced_in_place_stays_the_main_process(started: Unit, evidence: Evidence) -> None:
    before, main = started.status()["live"], started.show("MainPID")
    done = started.command("reexec")
    assert done.returncode == 0, done.stderr
    after = started.until_in_sync()
    assert (after["live"]["pid"], after["self"]["image"]) == (before["pid"], 2)
    assert (started.show("MainPID"), started.show("NRestarts")) == (main, "0")
    first = int(started.show("WatchdogTimestampMonotonic"))
    started.machine.until(
        lambda: int(started.show("WatchdogTimestampMonotonic")) > first, "the new image says nothing"
    )
    assert started.systemctl("reload").returncode == 0
    evidence(lines(started, "replaced in place|Reloaded"))


@pytest.mark.parametrize("how", ["power_off", "pull_the_plug"])
def test_reboot_into_broken_code_runs_the_last_known_good(
    machine: Machine, started: Unit, evidence: Evidence, how: str
) -> None:
    enabled = machine.call("systemctl", "enable", started.name, "wa-database.service")
    assert enabled.returncode == 0, enabled.stderr
    good = started.status()["live"]["tree"]
    machine.until(lambda: started.status()["last_known_good"] == good, "no known good tree")
    machine.write(f"/etc/systemd/system/{started.name}.d/test.conf", started.dropped_in)
    try:
        getattr(machine, how)()
        app = machine.disk / APP[1:]
        app.write_text(app.read_text(encoding="utf-8") + "x = = 1\n", encoding="utf-8")
        machine.boot()
        rebooted = Unit(machine)
        rebooted.whole_journal()
        rebooted.until("Started wa-monitor.service")
        status = rebooted.status()
        assert (status["live"]["tree"], status["in_sync"]) == (good, False)
        machine.until(lambda: "app.py, line" in rebooted.show("StatusText"), rebooted.show("StatusText"))
        evidence(lines(rebooted, r"Starting|reload \(start\)|known good|Started"))
        evidence(f"Status: {rebooted.show('StatusText')}")
    finally:
        machine.run("systemctl", "disable", started.name)
        machine.run("rm", "-r", f"/etc/systemd/system/{started.name}.d")


def test_database_secret_is_a_credential_and_nowhere_else(started: Unit, machine: Machine) -> None:
    pids = started.processes()
    environments = machine.run("sh", "-c", "cat " + " ".join(f"/proc/{pid}/environ" for pid in pids))
    words = machine.run("sh", "-c", "cat " + " ".join(f"/proc/{pid}/cmdline" for pid in pids))
    shown = machine.run("systemctl", "show", started.name) + machine.run("systemctl", "status", started.name)
    journal = machine.run("journalctl", "--no-pager")
    status = str(started.status())
    assert "s3cret-word" in machine.run("cat", "/run/credentials/wa-monitor.service/database-url")
    assert "s3cret-word" not in environments + words + shown + journal + status
    assert "CREDENTIALS_DIRECTORY=" in environments


def test_database_url_may_stand_in_the_environment_file(unit: Unit, machine: Machine) -> None:
    machine.run("mv", "/etc/wa-monitor/database-url", "/etc/wa-monitor/kept")
    machine.run("cp", "/etc/wa-monitor/env", "/etc/wa-monitor/env.kept")
    try:
        machine.run("sh", "-c", "sed s/^/DATABASE_URL=/ /etc/wa-monitor/kept >> /etc/wa-monitor/env")
        assert unit.systemctl("start").returncode == 0, unit.journal()
        unit.until_in_sync()
    finally:
        machine.run("mv", "/etc/wa-monitor/kept", "/etc/wa-monitor/database-url")
        machine.run("mv", "/etc/wa-monitor/env.kept", "/etc/wa-monitor/env")


def test_sandbox_takes_nothing_away_that_the_supervisor_needs(unit: Unit, evidence: Evidence) -> None:
    """The same facts with every option of the sandbox and with none."""
    hardened = facts(unit)
    none = "ProtectProc=default\nProtectSystem=false\nSystemCallFilter=\nCapabilityBoundingSet=~\n"
    words = re.findall(r"^(\w+)=true$", unit.text(), re.MULTILINE)
    unit.drop_in(
        f"{unit.dropped_in}{none}RestrictAddressFamilies=\n" + "".join(f"{word}=false\n" for word in words)
    )
    assert unit.show("PrivateUsers") == "no"
    plain = facts(unit)
    assert hardened == plain
    assert hardened["watch"] == "events"
    assert hardened["zygote"] == "ready"
    assert hardened["bytecode writable"]
    evidence(f"with and without the sandbox: {hardened}")


def facts(unit: Unit) -> dict[str, object]:
    """Start the unit, have it reload by an edit and a fork from the zygote; return what it says of itself."""
    assert unit.systemctl("start").returncode == 0, unit.journal()
    unit.until_in_sync()
    unit.machine.until(lambda: unit.status()["zygote"]["state"] == "ready", str(unit.status()["zygote"]))
    unit.forget()
    edit(unit)
    unit.until_in_sync(than=unit.status()["live"]["generation"] - 1)
    unit.until(": live: generation")
    unit.machine.until(lambda: unit.status()["git"]["dirty"] is not None, "git says nothing")
    status = unit.until_in_sync()
    said = unit.command("verify", "--json")
    found: dict[str, object] = {
        "watch": status["watch"]["mode"],
        "watches": status["watch"]["watches"],
        "zygote": status["zygote"]["state"],
        "forks": status["zygote"]["forks"],
        "left out": status["zygote"]["left_out"],
        "restarts": status["restarts"],
        "bytecode writable": status["bytecode"]["writable"],
        "git dirty": status["git"]["dirty"],
        "problems": status["problems"],
        "quarantine": status["quarantine"],
        "verify": said.returncode,
        "trigger": status["last_reload"]["trigger"],
    }
    assert unit.systemctl("stop").returncode == 0
    unit.machine.run("git", "-C", "/opt/wa-monitor", "checkout", "--quiet", ".", user="wa-monitor")
    unit.machine.run("rm", "-rf", "/var/lib/wa-monitor")
    return found
