"""install-unit: a unit that systemd understands, a port of its own, and nothing of a person's overwritten."""

from __future__ import annotations

import importlib
import os
import pwd
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supervisor import installation
from supervisor.errors import SupervisorError
from supervisor.installation import Places, Scope
from supervisor.unitfile import in_quotes
from tests.supervisor.harness import let_others_in

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "contrib" / "systemd"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout in a folder with a name that is hard to write down."""
    folder = tmp_path / "wa 100% $HOME é"
    (folder / "monitor").mkdir(parents=True)
    (folder / "monitor" / "__init__.py").write_text("", encoding="utf-8")
    return folder


def wa(*words: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supervisor", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def install(unit: str, root: Path, tree: Path = ROOT) -> installation.Installed:
    places = Places(str(tree), sys.prefix, sysconfig.get_path("scripts"))
    return installation.install(unit, installation.render(unit, places, of_user=False), Scope(root=root))


def values(text: str, key: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{key}=")]


def test_unit_is_for_this_environment_and_the_code_in_this_folder(tmp_path: Path, tree: Path) -> None:
    root = tmp_path / "root"
    done = wa("install-unit", "--root", str(root), cwd=tree)
    assert done.returncode == 0, done.stderr
    text = (root / "etc/systemd/system/wa-monitor.service").read_text(encoding="utf-8")
    assert values(text, "WorkingDirectory") == [str(tree).replace("%", "%%")]
    assert values(text, "ReadWritePaths") == ['"' + str(tree).replace("%", "%%") + '"']
    own = in_quotes(f"{sysconfig.get_path('scripts')}/wa-supervisor")
    assert values(text, "ExecStart")[0].startswith(f"{own} run ")
    assert "/opt/wa-monitor" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    assert f"wrote {root}/etc/systemd/system/wa-monitor.service\n" in done.stdout
    assert "\n  systemctl enable --now wa-monitor.service\n  wa-supervisor doctor\n" in done.stdout


@pytest.mark.parametrize("words", [(), ("--instance", "prod"), ("--user",), ("--user", "--instance=p-1.x")])
def test_systemd_understands_what_is_printed(
    tmp_path: Path, tree: Path, words: tuple[str, ...], not_checked: Callable[[str], None]
) -> None:
    printed = wa("install-unit", "--print", *words, cwd=tree)
    assert printed.returncode == 0, printed.stderr
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        not_checked("units by systemd-analyze: there is none here")
        return
    file = tmp_path / ("wa-monitor@p.service" if len(words) > 1 else "wa-monitor.service")
    file.write_text(printed.stdout, encoding="utf-8")
    manager = ["--user"] if "--user" in words else []
    said = subprocess.run(
        [analyze, *manager, "verify", "--man=no", file], check=False, capture_output=True, text=True
    )
    # Who verifies for a user needs a runtime directory, which is not about the unit.
    assert [line for line in said.stderr.splitlines() if file.name in line] == []


def test_unit_of_a_user_has_nothing_that_only_the_systems_manager_may_do(tree: Path, tmp_path: Path) -> None:
    environment = {
        "HOME": str(tmp_path),
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "PATH": "/usr/bin:/bin",
    }
    environment["PYTHONPATH"] = str(ROOT)
    done = wa("install-unit", "--user", cwd=tree, env=environment)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "config/systemd/user/wa-monitor.service").read_text(encoding="utf-8")
    assert values(text, "EnvironmentFile") == ["%E/wa-monitor/env"]
    assert values(text, "WantedBy") == ["default.target"]
    for key in ("User", "CapabilityBoundingSet", "PrivateUsers", "ProtectSystem", "LoadCredential", "After"):
        assert values(text, key) == []
    assert "DATABASE_URL" in (tmp_path / "config/wa-monitor/env").read_text(encoding="utf-8")
    assert "systemctl --user enable --now wa-monitor.service" in done.stdout


def test_print_writes_nothing(tmp_path: Path, tree: Path) -> None:
    done = wa("install-unit", "--print", "--root", str(tmp_path / "root"), cwd=tree)
    assert done.returncode == 0
    assert done.stdout.startswith("# Written by wa-supervisor install-unit; ")
    assert not (tmp_path / "root").exists()


def test_edited_unit_is_left_as_it_is(tmp_path: Path) -> None:
    root, unit = tmp_path / "root", "wa-monitor@prod.service"
    install(unit, root)
    path = root / "etc/systemd/system" / unit
    edited = path.read_text(encoding="utf-8").replace("WatchdogSec=30", "WatchdogSec=60")
    path.write_text(edited, encoding="utf-8")
    done = wa("install-unit", "--instance", "prod", "--root", str(root), cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(
        f"wa-supervisor: {path} was edited or is not ours, and is left as it is; move"
    )
    assert path.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize("content", ["[Service]\nExecStart=/bin/true\n", "", None])
def test_unit_that_is_not_ours_is_left_as_it_is(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "etc/systemd/system/wa-monitor.service"
    path.parent.mkdir(parents=True)
    if content is None:
        path.symlink_to("/dev/null")  # As `systemctl mask` does it.
    else:
        path.write_text(content, encoding="utf-8")
    done = wa("install-unit", "--root", str(tmp_path), cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert path.is_symlink() if content is None else path.read_text(encoding="utf-8") == content


def test_unedited_unit_is_replaced_and_an_equal_one_left(tmp_path: Path, tree: Path) -> None:
    unit = "wa-monitor.service"
    path = tmp_path / "etc/systemd/system" / unit
    assert install(unit, tmp_path, tree).done[1] == f"wrote {path}"
    assert install(unit, tmp_path).done[1] == f"replaced {path}"
    assert values(path.read_text(encoding="utf-8"), "WorkingDirectory") == [str(ROOT)]
    assert install(unit, tmp_path).done[1] == f"{path} is up to date"


def test_each_instance_has_a_port_that_nobody_has(tmp_path: Path) -> None:
    first = installation.port_of(_variables(tmp_path, "a"))
    assert first is not None
    with socket.socket() as other:  # Somebody who is no instance of ours.
        other.bind(("127.0.0.1", first + 1))
        other.listen()
        ports = [installation.port_of(_variables(tmp_path, name)) for name in ("b", "c")]
    assert len({first, first + 1, *ports}) == 4
    assert installation.port_of(_variables(tmp_path, "a")) == first, "installed again, it keeps its own"


def _variables(root: Path, name: str) -> Path:
    install(f"wa-monitor@{name}.service", root)
    return root / "etc/wa-monitor" / f"{name}.env"


def test_variables_that_stand_there_are_kept_and_get_a_port(tmp_path: Path) -> None:
    path = tmp_path / "etc/wa-monitor/dev.env"
    path.parent.mkdir(parents=True)
    path.write_text("DATABASE_URL=postgresql://u:s3cret@h/d")  # No line end.
    path.chmod(0o600)
    (said, _) = install("wa-monitor@dev.service", tmp_path).done
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first == "DATABASE_URL=postgresql://u:s3cret@h/d"
    assert said == f"added {second} to {path}"
    assert second.startswith("WA_SUPERVISOR_LISTEN=127.0.0.1:94")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_port_that_the_single_units_own_text_gives_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)
    shutil.copy(UNITS / "wa-monitor.service", folder)  # By hand, and its file of variables gives no port.
    assert installation.port_of(_variables(tmp_path, "a")) != 9464


def test_others_cannot_read_the_variables(tmp_path: Path) -> None:
    assert stat.S_IMODE(_variables(tmp_path, "a").stat().st_mode) == 0o640


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--instance", "a b"], 2, "--instance 'a b' is no name for an instance; "),
        (["--instance", "../x"], 2, "--instance '../x' is no name for an instance; "),
        (["--root", __file__], 1, f"cannot read {__file__}/etc/systemd/system/wa-monitor.service: Not a dir"),
        (["--root", "/proc"], 1, "cannot write /proc/etc/wa-monitor/env: "),
        (["--json"], 2, "unrecognized arguments: --json; "),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words: list[str], code: int, sentence: str) -> None:
    done = wa("install-unit", *words, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (code, "", 1)
    assert done.stderr.startswith(f"wa-supervisor: {sentence}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to become somebody else")
@pytest.mark.parametrize(
    ("of_user", "remedy"),
    [(False, "do it as root, or use --user"), (True, "become its owner, or name another $XDG_CONFIG_HOME")],
)
def test_who_may_not_write_is_told_who_may(tmp_path: Path, of_user: bool, remedy: str) -> None:
    let_others_in(tmp_path)
    scope = Scope(of_user, tmp_path)
    places = Places(str(ROOT), sys.prefix, sysconfig.get_path("scripts"))
    text = installation.render("wa-monitor.service", places, of_user=of_user)
    importlib.import_module("grp")  # Somebody else may not be able to read our interpreter's library.
    os.seteuid(pwd.getpwnam("daemon").pw_uid)
    try:
        with pytest.raises(SupervisorError, match=re.escape(f": Permission denied; {remedy}")):
            installation.install("wa-monitor.service", text, scope)
    finally:
        os.seteuid(0)


def test_path_that_no_unit_can_name_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / 'a"b'
    (folder / "monitor").mkdir(parents=True)
    (folder / "monitor" / "__init__.py").write_text("", encoding="utf-8")
    done = wa("install-unit", "--root", str(tmp_path / "root"), cwd=folder)
    assert done.returncode == 2
    assert "no unit of systemd can name" in done.stderr
    assert not (tmp_path / "root").exists()


def test_wheel_carries_the_units(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed: what a wheel carries")
    built = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        carried = {
            name.removeprefix("supervisor/units/"): wheel.read(name)
            for name in wheel.namelist()
            if name.startswith("supervisor/units/")
        }
    assert carried == {
        str(path.relative_to(UNITS)): path.read_bytes() for path in UNITS.glob("**/*") if path.is_file()
    }
