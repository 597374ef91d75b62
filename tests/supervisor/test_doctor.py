"""doctor: each fault that keeps a service from its promises is named, with a remedy and without a secret."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from supervisor import doctor, installation
from supervisor.installation import Places, Scope
from supervisor.unitfile import in_quotes
from tests.supervisor.harness import Supervised, let_others_in, until

ROOT = Path(__file__).parents[2]
UNIT = "wa-monitor@prod.service"
SECRET = "s3cret"  # noqa: S105 -- of the tests
ME = pwd.getpwuid(os.geteuid()).pw_name
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: what another user may do")


@dataclass
class Service:
    """A service whose unit is installed below a root of its own, with nothing wrong to begin with."""

    root: Path
    tree: Path
    state: Path

    def drop_in(self, *lines: str, section: str = "Service") -> None:
        folder = self.root / f"etc/systemd/system/{UNIT}.d"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{len(list(folder.iterdir()))}.conf"
        (folder / name).write_text("\n".join([f"[{section}]", *lines, ""]), encoding="utf-8")

    def command(self, *options: str, program: str | None = None, target: str = "monitor.app:main") -> None:
        """Start the supervisor with further options."""
        own = program or f"{sysconfig.get_path('scripts')}/wa-supervisor"
        words = ["run", "--type", "notify", "--listen", "${WA_SUPERVISOR_LISTEN}", *options, target]
        self.drop_in("ExecStart=", f"ExecStart={in_quotes(own)} {' '.join(words)}")

    @property
    def variables(self) -> Path:
        return self.root / "etc/wa-monitor/prod.env"

    def set(self, *lines: str) -> None:
        with self.variables.open("a", encoding="utf-8") as file:
            file.write("\n".join(["", *lines, ""]))

    def examine(self) -> list[dict[str, Any]]:
        findings: list[dict[str, Any]] = doctor.examine("prod", Scope(root=self.root), None)["findings"]
        for finding in findings:
            assert SECRET not in json.dumps(finding)
            assert finding["state"] in {"ok", "skipped"} or finding["remedy"]
        return findings

    def wrong(self) -> list[tuple[str, str]]:
        return [(one["check"], one["detail"]) for one in self.examine() if one["state"] == "wrong"]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    made = Service(tmp_path / "root", tmp_path / "tree", tmp_path / "state")
    (made.tree / "monitor").mkdir(parents=True)
    (made.tree / "monitor" / "__init__.py").write_text("", encoding="utf-8")
    (made.tree / "monitor" / "app.py").write_text("def main() -> None: ...\n", encoding="utf-8")
    places = Places(str(made.tree), sys.prefix, sysconfig.get_path("scripts"))
    installation.install(UNIT, installation.render(UNIT, places, of_user=False), Scope(root=made.root))
    # The tests' own user and places, which the sandbox of the unit would hide.
    made.drop_in(f"User={ME}", "ProtectHome=no", "PrivateTmp=no")
    made.drop_in("Check=", section="X-Supervisor")
    return made


def test_nothing_is_wrong_with_a_good_service(service: Service) -> None:
    assert service.wrong() == []
    found = {(one["check"], one["state"]) for one in service.examine()}
    for check in ("unit", "permissions", "file system", "inotify", "environment", "port"):
        assert (check, "ok") in found


def _hidden_scratch(service: Service) -> None:
    service.drop_in("PrivateTmp=yes")
    service.set("WA_PROJECTS=/tmp")


def _open_secret(service: Service) -> None:
    service.set(f"DATABASE_URL=postgresql://u:{SECRET}@h/d")
    service.variables.chmod(0o644)


def _home(service: Service) -> None:
    service.drop_in("ProtectHome=yes")
    service.set("WA_PROJECTS=/root")


def _credential(service: Service) -> None:
    file = service.root / "etc/wa-monitor/prod.database-url"
    file.write_text(f"postgresql://u:{SECRET}@h/d\n", encoding="utf-8")
    file.chmod(0o644)


def _set_twice(service: Service) -> None:
    other = service.tree / "child.env"
    other.write_text(f"DATABASE_URL=postgresql://other:{SECRET}@h/d\n", encoding="utf-8")
    service.set(f"DATABASE_URL=postgresql://u:{SECRET}@h/d")
    service.command("--env-file", str(other))


def _no_credential(service: Service) -> None:
    service.drop_in("SetCredential=")


def _other_code(service: Service) -> None:
    shutil.copytree(service.tree / "monitor", service.tree / "old" / "monitor")
    service.set(f"PYTHONPATH={service.tree}:{service.tree}/old")


def _namesake(service: Service) -> None:
    environment = service.tree / "venv"
    (environment / "bin").mkdir(parents=True)
    shutil.copy(f"{sysconfig.get_path('scripts')}/wa-supervisor", environment / "bin")
    (environment / "lib/python3.11/site-packages/supervisor-4.2.5.dist-info").mkdir(parents=True)
    service.command(program=f"{environment}/bin/wa-supervisor")


FAULTS: list[tuple[str, Callable[[Service], object], str, str]] = [
    ("no user", lambda s: s.drop_in("User=nobody-of-that-name"), "unit", "there is no user nobody-of-that-"),
    ("no folder", lambda s: shutil.rmtree(s.tree), "unit", "cannot work in "),
    (
        "no target",
        lambda s: s.command(target="none.app:main"),
        "unit",
        "TARGET none.app:main: there is no module",
    ),
    (
        "no program",
        lambda s: s.command(program="/none/wa-supervisor"),
        "unit",
        "/none/wa-supervisor is not th",
    ),
    ("no variables", lambda s: s.variables.unlink(), "unit", "cannot read the variables in "),
    ("bad variables", lambda s: s.set(f"password {SECRET}"), "unit", "the variables in "),
    ("bad option", lambda s: s.command("--no-such"), "unit", "unrecognized arguments: --no-such"),
    ("bad value", lambda s: s.command("--probation", "x"), "unit", "--probation: invalid float value: 'x'"),
    ("simple", lambda s: s.drop_in("Type=simple"), "unit", "Type=simple: it would count as started before"),
    ("deaf", lambda s: s.drop_in("NotifyAccess=none"), "unit", "NotifyAccess=none: "),
    ("stays away", lambda s: s.drop_in("Restart=no"), "unit", "Restart=no: "),
    ("stays away after a fault", lambda s: s.drop_in("Restart=on-abnormal"), "unit", "Restart=on-abnormal: "),
    ("hangs for ever", lambda s: s.drop_in("WatchdogSec=0"), "unit", "WatchdogSec= is not set: "),
    (
        "given up",
        lambda s: s.drop_in("StartLimitIntervalSec=1min", section="Unit"),
        "unit",
        "systemd gives it up after 5 starts within 60 s, and it pauses 2 s",
    ),
    ("no place", lambda s: s.drop_in("ReadWritePaths=/none"), "unit", "ReadWritePaths=/none is not there: "),
    ("no credential", _no_credential, "unit", "the credential database-url is not there: systemd does not s"),
    (
        "open quote",
        lambda s: s.drop_in('Environment="A=b'),
        "unit",
        "Environment= of the unit has a quote th",
    ),
    ("left over", lambda s: s.drop_in("KillMode=process"), "unit", "KillMode=process: "),
    ("hidden home", _home, "unit", "WA_PROJECTS is /root"),
    (
        "hidden scratch",
        _hidden_scratch,
        "unit",
        "WA_PROJECTS is /tmp, which PrivateTmp= hides from the service",
    ),
    (
        "open secret",
        _open_secret,
        "permissions",
        "everybody may read ",
    ),
    ("open credential", _credential, "permissions", "everybody may read "),
    ("systemd's", lambda s: s.set("NOTIFY_SOCKET=/x"), "environment", "NOTIFY_SOCKET is set in "),
    ("multiprocess", lambda s: s.set("PROMETHEUS_MULTIPROC_DIR=/x"), "environment", "PROMETHEUS_MULTIPROC_D"),
    ("multiprocess, old", lambda s: s.set("prometheus_multiproc_dir=/x"), "environment", "prometheus_multip"),
    ("ours", lambda s: s.set("WA_SUPERVISOR_ESTATE=1"), "environment", "WA_SUPERVISOR_ESTATE is set in "),
    ("other code", _other_code, "environment", "PYTHONPATH is set in "),
    ("python", lambda s: s.set("PYTHONHOME=/x"), "environment", "PYTHONHOME is set in "),
    ("set twice", _set_twice, "environment", "DATABASE_URL is set differently in "),
    ("namesake", _namesake, "environment", "the package supervisor 4.2.5 (supervisord) is inst"),
]


@pytest.mark.parametrize(
    ("do", "check", "detail"), [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS]
)
def test_fault_is_named(service: Service, do: Callable[[Service], object], check: str, detail: str) -> None:
    do(service)
    assert any(found[0] == check and found[1].startswith(detail) for found in service.wrong())


@pytest.mark.parametrize(
    "line",
    ["PYTHONDONTWRITEBYTECODE=1", "PYTHONPYCACHEPREFIX=/x", "PYTHONOPTIMIZE=1", "PYTHONPATH=/x"],
)
def test_variable_that_changes_what_python_does_is_a_warning(service: Service, line: str) -> None:
    service.set(line)
    warned = [one["detail"] for one in service.examine() if one["state"] == "warning"]
    assert any(detail.startswith(f"{line.partition('=')[0]} is set in ") for detail in warned)
    assert service.wrong() == []


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("Unit", "StartLimitBurst=0"),
        ("Unit", "StartLimitIntervalSec=5s"),
        ("Unit", "StartLimitIntervalSec=infinity"),
        ("Service", "ReadWritePaths=-/none"),
        ("Service", "WatchdogSec=1min 30s"),
    ],
)
def test_setting_that_keeps_the_promises_is_right(service: Service, section: str, line: str) -> None:
    service.drop_in(line, section=section)
    assert service.wrong() == []


def test_drop_in_for_another_tree_does_not_make_the_unit_an_old_one(service: Service) -> None:
    moved = service.tree.with_name("moved")
    service.tree.rename(moved)
    service.drop_in(f"WorkingDirectory={moved}", "ReadWritePaths=", f"ReadWritePaths={moved}")
    assert service.wrong() == []


@pytest.mark.parametrize("masked", ["link", "empty"])
def test_masked_unit_is_called_so(service: Service, masked: str) -> None:
    path = service.root / f"etc/systemd/system/{UNIT}"
    path.unlink()
    if masked == "link":
        path.symlink_to("/dev/null")
    else:
        path.touch()
    (found,) = [one for one in service.examine() if one["state"] == "wrong"]
    assert found["detail"] == f"{UNIT} is masked by {path}"
    assert found["remedy"] == f"systemctl unmask {UNIT}"


@as_root
def test_what_another_user_left_in_the_state_directory_is_named(service: Service) -> None:
    let_others_in(service.tree)
    service.drop_in("User=daemon", "StateDirectory=")
    service.command("--state-dir", str(service.state))
    (service.state / "blobs").mkdir(parents=True)
    for path in (service.state, service.state / "blobs"):
        os.chown(path, pwd.getpwnam("daemon").pw_uid, -1)
    assert service.wrong() == []
    for path in (service.state / "blobs" / "a", service.state / "history.db"):
        path.write_text("", encoding="utf-8")
        path.chmod(0o600)
        (found,) = [one for one in service.examine() if one["state"] == "wrong"]
        assert found["detail"].startswith(f"daemon may not use {path}, which somebody else left")
        assert found["remedy"] == f"chown -R daemon: {service.state}"
        path.unlink()


@as_root
def test_cache_that_the_services_user_cannot_write_to_is_a_warning(service: Service) -> None:
    let_others_in(service.tree)
    folder = service.tree / "monitor"
    (folder / "__pycache__").mkdir()
    os.chown(folder, pwd.getpwnam("daemon").pw_uid, -1)
    service.drop_in("User=daemon")
    (found,) = [one for one in service.examine() if one["check"] == "permissions" and one["state"] != "ok"]
    assert f"cannot write bytecode in 1 folders, {folder}/__pycache__ is one" in found["detail"]


@as_root
def test_variables_that_only_root_can_read_are_not_the_services_fault(service: Service) -> None:
    let_others_in(service.root)
    service.drop_in("User=daemon")
    service.variables.chmod(0o600)
    os.seteuid(pwd.getpwnam("daemon").pw_uid)
    try:
        assert service.wrong() == []
        (found,) = [one for one in service.examine() if str(service.variables) in one["detail"]]
    finally:
        os.seteuid(0)
    assert (found["check"], found["state"]) == ("unit", "skipped")
    assert found["detail"].endswith("Permission denied: what is in it is for root to find out")


def test_unit_of_an_older_version_is_to_be_written_again(service: Service) -> None:
    path = service.root / f"etc/systemd/system/{UNIT}"
    text = path.read_text(encoding="utf-8").replace("RestartSec=2", "RestartSec=3").partition("\n")[2]
    path.write_text(f"{installation._MARK}{installation._digest(text)}\n{text}", encoding="utf-8")
    (found,) = [one for one in service.examine() if one["state"] == "wrong"]
    assert "was written by another version" in found["detail"]
    assert found["remedy"] == "wa-supervisor install-unit --instance prod"


def test_edited_unit_is_nobodys_fault(service: Service) -> None:
    path = service.root / f"etc/systemd/system/{UNIT}"
    path.write_text(
        path.read_text(encoding="utf-8").replace("RestartSec=2", "RestartSec=3"), encoding="utf-8"
    )
    assert service.wrong() == []


def test_port_of_somebody_else_is_named(service: Service) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        service.set(f"WA_SUPERVISOR_LISTEN=127.0.0.1:{port}")
        assert service.wrong() == [("port", f"something else listens on port {port}")]


def test_two_services_with_one_port_are_named(service: Service) -> None:
    folder = service.root / "etc/systemd/system"
    other = "wa-monitor@dev.service"
    shutil.copy(folder / UNIT, folder / other)
    shutil.copytree(folder / f"{UNIT}.d", folder / f"{other}.d")
    shutil.copy(service.variables, service.variables.with_name("dev.env"))
    findings = doctor.examine(None, Scope(root=service.root), None)["findings"]
    assert {one["unit"] for one in findings} == {UNIT, other}
    (shared,) = [one for one in findings if one["check"] == "port" and one["state"] == "wrong"]
    assert shared["detail"].startswith(f"{UNIT} listens on port 94")


def test_clock_that_was_set_back_is_named(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    hour_ago_ns = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: hour_ago_ns)
    ((check, detail),) = service.wrong()
    assert check == "clock"
    assert detail.endswith("s from now: the clock was set back")


@as_root
def test_source_that_the_services_user_cannot_read_is_named(service: Service) -> None:
    (service.tree / "monitor" / "app.py").chmod(0o600)
    let_others_in(service.tree)
    service.drop_in("User=daemon", "Group=daemon")
    assert ("permissions", f"cannot read {service.tree}/monitor/app.py: Permission denied") in [
        (check, detail.removeprefix("daemon ")) for check, detail in service.wrong()
    ]
    assert os.geteuid() == 0, "whoever looked as another user is himself again"


@as_root
def test_repository_that_git_refuses_to_the_service_is_named(service: Service) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git here: safe.directory")
    subprocess.run(["git", "init", "-q", service.tree], check=True)  # noqa: S607 -- git of the PATH
    assert service.wrong() == []
    let_others_in(service.tree)
    service.drop_in("User=daemon")
    (found,) = [one for one in service.examine() if one["check"] == "git"]
    assert found["detail"] == f"git refuses {service.tree} to daemon: it belongs to somebody else"
    assert found["remedy"].startswith(f"git config --system --add safe.directory '{service.tree}'")


def test_directories_that_cannot_be_watched_are_named(service: Service) -> None:
    code = (
        "import json, sys; from pathlib import Path; from supervisor import doctor;"
        " from supervisor.installation import Scope;"
        " print(json.dumps(doctor.examine('prod', Scope(root=Path(sys.argv[1])), None)))"
    )
    limited = 'echo 1 > /proc/sys/user/max_inotify_watches && exec "$@"'
    service.drop_in("User=0")
    (service.tree / "monitor" / "more").mkdir()
    done = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", limited, "sh", sys.executable, "-c", code, service.root],  # noqa: S607
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        pytest.skip(f"no user namespaces here: the limit of watches ({done.stderr.strip()[:80]})")
    (found,) = [
        one
        for one in json.loads(done.stdout)["findings"]
        if one["check"] == "inotify" and one["state"] == "wrong"
    ]
    assert "no watch is left" in found["detail"]
    assert found["remedy"].startswith("raise the limit, which is 1: sysctl -w user.max_inotify_watches=")


# --- the command ------------------------------------------------------------------------------------------


def wa_doctor(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supervisor", "doctor", *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_exit_code_says_whether_anything_is_wrong(service: Service) -> None:
    good = wa_doctor("--root", str(service.root), cwd=service.root)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.endswith("nothing is wrong\n")
    service.drop_in("KillMode=process")
    bad = wa_doctor("--root", str(service.root), "--instance=prod", cwd=service.root)
    assert bad.returncode == 1
    assert (
        "wrong    unit: KillMode=process: processes would be left over after a stop\n           -> set Kil"
        in (bad.stdout)
    )
    document = json.loads(wa_doctor("--root", str(service.root), "--json", cwd=service.root).stdout)
    assert document["failed"] is True
    assert document["findings"][0].keys() == {"unit", "check", "state", "detail", "remedy"}


def test_instance_that_is_not_installed_is_wrong(service: Service) -> None:
    done = wa_doctor("--root", str(service.root), "--instance", "none", cwd=service.root)
    assert done.returncode == 1
    assert "no unit wa-monitor@none.service is installed in " in done.stdout


def test_what_the_service_itself_needs_is_asked_of_its_own_check(service: Service) -> None:
    check = service.tree / "check.py"
    said = {
        "check": "bridge",
        "state": "wrong",
        "detail": f"postgresql://u:{SECRET}@h is lost",
        "remedy": "find it",
    }
    check.write_text(
        "import json, os, sys\n"
        "assert os.getcwd() == sys.argv[1] and os.environ['ASKED'] == 'yes' and 'HIDDEN' not in os.environ\n"
        f"print(json.dumps({{'findings': [{said!r}, {{**{said!r}, 'state': 'odd'}}]}}))\n",
        encoding="utf-8",
    )
    service.set("ASKED=yes")
    words = map(in_quotes, (sys.executable, str(check), str(service.tree)))
    service.drop_in(f"Check={' '.join(words)}", section="X-Supervisor")
    found = [one for one in service.examine() if one["check"] == "bridge"]
    assert [(one["state"], one["detail"]) for one in found] == [("wrong", "postgresql://u:***@h is lost")] * 2


@pytest.mark.parametrize("program", ["/none", "/bin/false", "/bin/echo []", "/bin/echo {}"])
def test_check_that_cannot_be_asked_is_wrong(service: Service, program: str) -> None:
    service.drop_in(f"Check={program}", section="X-Supervisor")
    assert [check for check, _ in service.wrong()] == ["check"]


def test_monitors_own_findings_are_among_them(service: Service) -> None:
    own = in_quotes(f"{sysconfig.get_path('scripts')}/wa-monitor")
    service.set(
        f'PYTHONPATH="{ROOT}"',
        f"DATABASE_URL=postgresql://u:{SECRET}@127.0.0.1:1/d",
        "WHATSAPP_DB_PATH=/none",
    )
    service.drop_in(f"Check={own} check --json", "", section="X-Supervisor")
    # The tree of this service has a `monitor` of its own, which is not the one that is asked.
    service.drop_in(f"WorkingDirectory={ROOT}")
    assert {"projects", "bridge", "map", "database"} <= {check for check, _ in service.wrong()}


# --- without a unit ---------------------------------------------------------------------------------------


def test_supervisor_that_runs_without_a_unit_is_examined(
    supervise: Callable[..., Supervised], tree: Path, tmp_path: Path
) -> None:
    started = supervise("--listen", "127.0.0.1:0", "main.py", cwd=tree)
    until(lambda: (started.runtime / "control.sock").exists() and started.status()["in_sync"])
    empty = tmp_path / "no units"
    done = wa_doctor("--root", str(empty), "--runtime-dir", str(started.runtime), "--json", cwd=tree)
    findings = json.loads(done.stdout)["findings"]
    assert [one for one in findings if one["state"] == "wrong"] == []
    assert done.returncode == 0
    states = {one["check"]: one["state"] for one in findings}
    assert (states["supervisor"], states["inotify"], states["unit"]) == ("ok", "ok", "skipped")


def test_where_nothing_is_installed_and_nothing_runs_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "messages.db").mkdir()
    done = wa_doctor(
        *("--root", str(tmp_path), "--json"),
        cwd=ROOT,
        XDG_RUNTIME_DIR=str(tmp_path),
        WHATSAPP_DB_PATH=str(tmp_path),
        DATABASE_URL=f"postgresql://u:{SECRET}@127.0.0.1:1/d",
    )
    assert done.returncode == 1
    assert SECRET not in done.stdout + done.stderr
    wrong = {one["check"]: one for one in json.loads(done.stdout)["findings"] if one["state"] == "wrong"}
    assert wrong["unit"]["remedy"] == "wa-supervisor install-unit"
    assert {"bridge", "database", "projects"} <= wrong.keys()
