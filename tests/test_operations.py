"""docs/operations.md and contrib/systemd name only what exists: commands, flags, paths, metrics, alarms."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import msgspec
import pytest
import yaml
from typer.testing import CliRunner

from monitor import settings as monitor_settings
from monitor.cli import commands as wa_monitor
from supervisor import cli, installation
from supervisor.settings import Options

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
REFERENCE = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
SYSTEMD = ROOT / "contrib" / "systemd"
UNITS = sorted(path for path in SYSTEMD.glob("**/*") if path.is_file())
RULES = ROOT / "contrib" / "grafana" / "prometheus" / "wa-monitor.rules.yml"
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in UNITS} | {"operations.md": PAGE}

# What systemd 252 does not know yet, with the version that does (systemd.service(5)).
NEWER_OPTIONS = {"RestartSteps": 254, "RestartMaxDelaySec": 254}
# Variables that are not ours: of systemd, git, the shell.
OTHERS_VARIABLES = {"RUNTIME_DIRECTORY", "CREDENTIALS_DIRECTORY", "HOME", "EXTEND_TIMEOUT_USEC", "READY"}
OTHERS_VARIABLES |= {
    "AF_UNIX",
    "AF_INET",
    "GIT_TERMINAL_PROMPT",
    "GIT_ASKPASS",
    "GIT_SSH_COMMAND",
    "SIGTERM",
    "SIGKILL",
    "SIGHUP",
}
# Options of other people's commands.
OTHERS_FLAGS = {"--now", "--system", "--shell", "--ff-only", "--no-rebase", "--quiet", "--format"}


def code(text: str) -> str:
    """What stands between backticks."""
    return "\n".join(re.findall(r"```.*?```|`[^`]+`", text, flags=re.DOTALL))


@cache
def help_of(*command: str) -> str:
    """Return a help screen, made in this process: a process for each would take seconds."""
    if command[0] == "wa-monitor":
        help_ = CliRunner().invoke(wa_monitor, [*command[1:], "--help"], env={"COLUMNS": "200"})
        assert help_.exit_code == 0
        return help_.output
    with redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        cli._carry_out([*command[1:], "--help"])
    return out.getvalue()


def commands(script: str) -> set[str]:
    return set(re.findall(r"^[│ ]*([a-z][a-z-]+)(?:  |$)", help_of(script), flags=re.MULTILINE))


def settings_in(path: Path) -> Iterator[tuple[str, str]]:
    """Section and key of every setting of a unit."""
    section = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif not line.startswith("#") and "=" in line:
            yield section, line.partition("=")[0]


# --- commands and flags -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_commands_that_are_named_exist_and_take_the_flags_beside_them(name: str) -> None:
    text = code(TEXTS[name])
    if not name.endswith(".md"):
        text += "\n".join(line for line in TEXTS[name].splitlines() if not line.startswith("#"))
    found = re.findall(
        r"(?:^|[/`= ])(wa-supervisor|wa-monitor) ([a-z][a-z-]+)\b([^`;|#\n]*)", text, re.MULTILINE
    )
    for script, command, rest in found:
        assert command in commands(script), f"{script} {command}"
        for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", rest):
            assert flag in re.findall(r"--?[a-z][a-z-]*", help_of(script, command)), (
                f"{script} {command} {flag}"
            )
    assert found or name not in {"operations.md", "wa-monitor.service", "wa-monitor@.service"}


def test_every_flag_on_the_page_is_one_of_ours_or_of_a_known_command() -> None:
    ours = {f"--{field.encode_name}" for field in msgspec.structs.fields(Options)}
    for script in ("wa-supervisor", "wa-monitor"):
        for command in commands(script):
            ours |= set(re.findall(r"--[a-z][a-z-]*", help_of(script, command)))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) - ours - OTHERS_FLAGS == set()


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_variables_that_are_named_are_read(name: str) -> None:
    read = {variable for names in monitor_settings._ENVIRONMENT.values() for variable in names}
    read |= {installation.LISTEN_VARIABLE}
    text = code(TEXTS[name]) if name.endswith(".md") else TEXTS[name]
    named = set(re.findall(r"(?<![\w%])([A-Z][A-Z]+(?:_[A-Z]+)+)\b", text))
    assert named - read - OTHERS_VARIABLES == set()


def test_keys_of_the_monitor_that_are_named_exist() -> None:
    for key in ("auto_repair",):
        assert f"`{key}`" in PAGE
        assert key in monitor_settings.Values.__struct_fields__


def test_metrics_on_the_page_are_in_the_reference() -> None:
    named = set(re.findall(r"\bwa_(?:supervisor|monitor)_\w+", PAGE))
    assert named
    assert named <= set(re.findall(r"\bwa_\w+", REFERENCE))


def test_every_alarm_has_its_section_and_every_section_its_alarm() -> None:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}
    sections = re.findall(r"^### (\w+)$", PAGE.partition("\n## Alarms\n")[2], flags=re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert alerts <= set(sections)
    assert set(sections) == alerts


def test_each_section_of_an_alarm_begins_with_a_command() -> None:
    for name, text in re.findall(r"^### (\w+)\n(.*?)(?=^###|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL):
        assert re.search(r"`(?:wa-supervisor|wa-monitor|systemctl) [a-z]", text), name


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, flags=re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings


# --- paths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_paths_of_the_repository_that_are_named_exist(name: str) -> None:
    for path in re.findall(r"\b(?:contrib|docs|drop-ins)/[\w./@-]*", TEXTS[name]):
        base = SYSTEMD if path.startswith("drop-ins") else ROOT
        assert (base / path.rstrip(".")).exists(), path


def test_directories_on_the_page_are_those_of_the_units() -> None:
    """What systemd makes for an instance, and what the units read."""
    unit = (SYSTEMD / "wa-monitor@.service").read_text(encoding="utf-8").replace("%i", "prod")
    plain = (SYSTEMD / "wa-monitor.service").read_text(encoding="utf-8")
    known = {"/etc/wa-monitor", "/opt/wa-monitor", "/opt/wa-monitor-dev", "/opt/wa-monitor/.venv/bin"}
    for text in (unit, plain):
        known |= {f"/run/{name}" for name in re.findall(r"^RuntimeDirectory=(\S+)", text, re.MULTILINE)}
        known |= {f"/var/lib/{name}" for name in re.findall(r"^StateDirectory=(\S+)", text, re.MULTILINE)}
        known |= set(re.findall(r"/etc/wa-monitor/[\w.-]+", text))
    named = set(re.findall(r"/(?:etc|run|var/lib|opt)/wa-monitor[\w./@-]*", PAGE))
    assert {path.rstrip("./") for path in named} - known == set()


# --- units ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unknown_to_systemd(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, set[str]], set[str]]:
    """Return which keys of a section this machine's systemd does not know."""
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd-analyze here: options of units")
    folder = tmp_path_factory.mktemp("units")

    def ask(section: str, keys: set[str]) -> set[str]:
        kind = "timer" if section == "Timer" else "service"
        lines = [f"[{section}]", *(f"{key}=" for key in sorted(keys))]
        if section != "Service":
            lines += ["[Service]"] if kind == "service" else []
        (folder / f"asked.{kind}").write_text(
            "\n".join([*lines, "ExecStart=/bin/true", ""]), encoding="utf-8"
        )
        said = subprocess.run(
            [analyze, "verify", "--man=no", folder / f"asked.{kind}"],
            check=False,
            capture_output=True,
            text=True,
        ).stderr
        return set(re.findall(r"Unknown key (?:name )?'(\w+)'", said)) - {"ExecStart"} & keys

    return ask


def test_systemd_knows_every_option_of_the_units(
    unknown_to_systemd: Callable[[str, set[str]], set[str]],
) -> None:
    used: dict[str, set[str]] = {}
    for path in UNITS:
        for section, key in settings_in(path):
            used.setdefault(section, set()).add(key)
    assert {"Unit", "Service", "Install", "Timer", "X-Supervisor"} == used.keys()
    for section, keys in used.items():
        assert unknown_to_systemd(section, keys) <= NEWER_OPTIONS.keys(), section


def test_systemd_would_object_to_an_option_that_does_not_exist(
    unknown_to_systemd: Callable[[str, set[str]], set[str]],
) -> None:
    assert unknown_to_systemd("Service", {"Type", "WatchdogSecs"}) == {"WatchdogSecs"}
    assert unknown_to_systemd("Timer", {"OnBootSec", "OnBoot"}) == {"OnBoot"}


def test_systemd_knows_every_option_on_the_page(
    unknown_to_systemd: Callable[[str, set[str]], set[str]],
) -> None:
    named = set(re.findall(r"`([A-Z][a-z][A-Za-z]+)=", PAGE + REFERENCE))
    assert named
    ours = {"Check"}
    assert unknown_to_systemd("Service", named - ours) == set()


def test_newer_options_are_in_drop_ins_alone_and_their_name_says_from_when() -> None:
    for path in UNITS:
        newer = {NEWER_OPTIONS[key] for _, key in settings_in(path) if key in NEWER_OPTIONS}
        if newer:
            assert path.parent.name == "drop-ins"
            assert path.stem == f"systemd-{max(newer)}"
