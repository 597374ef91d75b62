"""Code that comes by git: another user's pull of 300 files, and the timer that pulls by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.systemd.machine import Machine, Unit

Evidence = Callable[[str], None]

FILES = 300
UPSTREAM = "/srv/upstream.git"
CLONE = "/opt/wa-monitor-dev"
INSTANCE = "wa-monitor@dev.service"

GENERATED = f"""\
set -e
cd {CLONE}
mkdir -p monitor/generated
for number in $(seq -w {FILES}); do
    echo "VALUE = '$0 $number'" > monitor/generated/module_$number.py
done
git add --all
git commit --quiet --message "$0"
git push --quiet
"""
"""Commits as many files in what one calls a word, and brings them upstream."""


@pytest.fixture
def upstream(machine: Machine) -> Iterator[Callable[[str], str]]:
    """A clone that belongs to `deploy`, and what pushes to its upstream and returns the commit."""
    machine.run("sh", "-c", f"rm -rf {UPSTREAM} {CLONE} /home/deploy/work")
    machine.run("install", "-d", "--owner=deploy", UPSTREAM, CLONE)
    machine.run("git", "config", "--global", "--replace-all", "safe.directory", "*", user="deploy")
    machine.run("git", "clone", "--quiet", "--bare", "/opt/wa-monitor", UPSTREAM, user="deploy")
    machine.run("git", "clone", "--quiet", UPSTREAM, CLONE, user="deploy")
    machine.run("cp", "-a", "/opt/wa-monitor/.venv", f"{CLONE}/.venv")
    moved = f"{CLONE}/.venv/bin/wa-* {CLONE}/.venv/lib/*/*/wa-monitor.pth"
    machine.run("sh", "-c", f"sed -i s,/opt/wa-monitor,{CLONE}, {moved}")
    machine.run("git", "clone", "--quiet", UPSTREAM, "/home/deploy/work", user="deploy")

    def push(word: str) -> str:
        machine.run("sh", "-c", GENERATED.replace(CLONE, "/home/deploy/work"), word, user="deploy")
        return machine.run("git", "-C", UPSTREAM, "rev-parse", "HEAD", user="deploy")

    yield push
    machine.run("sh", "-c", f"rm -rf {UPSTREAM} {CLONE} /home/deploy/work")


@pytest.fixture
def dev(machine: Machine, upstream: Callable[[str], str]) -> Iterator[Unit]:
    """An instance that runs the clone and cannot write to it, by the drop-ins as they lie in contrib/."""
    upstream("first")
    machine.run("git", "-C", CLONE, "pull", "--quiet", "--ff-only", user="deploy")
    place = f"/run/systemd/system/{INSTANCE}.d"
    machine.run("mkdir", "-p", place)
    for name in ("several-trees", "tree-read-only"):
        machine.run("cp", f"/opt/repository/contrib/systemd/drop-ins/{name}.conf", place)
    machine.run("sh", "-c", "cp /etc/wa-monitor/env /etc/wa-monitor/dev.env")
    machine.run("sh", "-c", "echo WA_SUPERVISOR_LISTEN=127.0.0.1:9465 >> /etc/wa-monitor/dev.env")
    machine.run("cp", "/etc/wa-monitor/database-url", "/etc/wa-monitor/dev.database-url")
    machine.run("systemctl", "daemon-reload")
    unit = Unit(machine, INSTANCE, "/run/wa-monitor-dev", f"{CLONE}/.venv/bin/wa-supervisor")
    done = unit.systemctl("start")
    assert done.returncode == 0, f"{done.stderr}\n{unit.journal()}"
    unit.until_in_sync()
    unit.forget()
    yield unit
    machine.run("sh", "-c", "rm /etc/wa-monitor/dev.*")  # Else its port is one that an instance has.


def test_pull_by_another_user_is_one_reload(
    dev: Unit, upstream: Callable[[str], str], evidence: Evidence
) -> None:
    before = dev.status()
    commit = upstream("second")
    dev.machine.run("git", "-C", CLONE, "pull", "--ff-only", user="deploy")
    after = dev.until_in_sync(than=before["live"]["generation"])
    assert after["live"]["generation"] == before["live"]["generation"] + 1
    assert (after["git"]["commit"], after["live"]["commit"]) == (commit, commit)
    assert after["last_reload"]["paths_total"] == FILES
    dev.machine.until(lambda: f"commit {commit[:12]}" in dev.show("StatusText"), dev.show("StatusText"))
    reloads = [line for line in dev.journal().splitlines() if "wa-supervisor: reload (" in line]
    assert len(reloads) == 1, reloads
    assert after["pid"] == before["pid"]
    evidence(f"{reloads[0]}\nStatus: {dev.show('StatusText')}")


def test_tree_that_the_service_cannot_write_to_runs_the_same(dev: Unit, evidence: Evidence) -> None:
    main = dev.show("MainPID")
    written = dev.machine.call("nsenter", f"--target={main}", "--mount", "touch", f"{CLONE}/x")
    assert "Read-only file system" in written.stderr
    status = dev.status()
    assert (status["in_sync"], status["bytecode"]["writable"]) == (True, False)
    assert dev.command("verify").returncode == 0
    evidence(f"touch: {written.stderr.strip()}; {dev.show('StatusText')}")


def test_instances_run_side_by_side(dev: Unit, machine: Machine, evidence: Evidence) -> None:
    other = Unit(machine)
    assert other.systemctl("start").returncode == 0, other.journal()
    other.until_in_sync()
    addresses = {dev.status()["listen"], other.status()["listen"]}
    assert addresses == {"127.0.0.1:9464", "127.0.0.1:9465"}
    assert other.systemctl("stop").returncode == 0
    assert dev.status()["in_sync"]
    evidence(f"listening: {', '.join(sorted(addresses))}")


@pytest.fixture
def pull(dev: Unit) -> Unit:
    """The unit that pulls, for the clone and its owner."""
    place = "/run/systemd/system/wa-monitor-pull@dev.service.d"
    tree = f"WorkingDirectory={CLONE}\nReadWritePaths=\nReadWritePaths={CLONE} {UPSTREAM}\n"
    dev.machine.write(f"{place}/test.conf", f"[Service]\nUser=deploy\n{tree}")
    dev.machine.run("systemctl", "daemon-reload")
    return Unit(dev.machine, "wa-monitor-pull@dev.service")


def test_pull_unit_brings_new_code_and_the_service_takes_it_over(
    dev: Unit, pull: Unit, upstream: Callable[[str], str], evidence: Evidence
) -> None:
    before = dev.status()["live"]["generation"]
    commit = upstream("second")
    done = pull.systemctl("start")
    assert done.returncode == 0, pull.journal()
    assert dev.until_in_sync(than=before)["live"]["commit"] == commit
    assert pull.systemctl("start").returncode == 0  # Nothing to do is no failure.
    evidence("\n".join(pull.journal().splitlines()[:4]))
    timer = dev.machine.call("systemctl", "start", "wa-monitor-pull@dev.timer")
    assert timer.returncode == 0, timer.stderr
    listed = dev.machine.run("systemctl", "list-timers", "--no-pager", "wa-monitor-pull@dev.timer")
    assert "wa-monitor-pull@dev.service" in listed
    dev.machine.run("systemctl", "stop", "wa-monitor-pull@dev.timer")


def test_pull_never_throws_local_work_away(
    dev: Unit, pull: Unit, upstream: Callable[[str], str], evidence: Evidence
) -> None:
    before = dev.status()["live"]
    upstream("second")
    local = f"{CLONE}/monitor/generated/module_001.py"
    dev.machine.write(local, "VALUE = 'mine'\n", user="deploy")
    dev.until_in_sync(than=before["generation"])
    assert pull.systemctl("start").returncode != 0
    assert dev.machine.run("cat", local) == "VALUE = 'mine'"
    dev.machine.run("git", "-C", CLONE, "commit", "--quiet", "--all", "--message=Mine", user="deploy")
    assert pull.systemctl("start").returncode != 0
    assert dev.machine.run("cat", local) == "VALUE = 'mine'"
    assert dev.status()["in_sync"]
    evidence("\n".join(line for line in pull.journal().splitlines() if "git[" in line))
