"""The command line: what it means, and that a mistake in it is one sentence that names the flag."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from supervisor import cli, flags
from supervisor.bytecode import Compiler
from supervisor.environment import ESTATE_VARIABLE
from supervisor.errors import UsageError
from supervisor.flags import Parser
from supervisor.settings import Options, load_file, merge
from tests.supervisor.harness import SUPERVISOR

OWN = ("target", "config")


def parse(*words: str) -> dict[str, Any]:
    """Return what was given, and the words of TARGET."""
    return vars(flags.parse_run(Parser("wa-supervisor run"), list(words)))


def supervisor(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "supervisor", *words], capture_output=True, text=True, check=False, **options
    )


# --- run: our flags, and what belongs to TARGET -------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["main.py"], ["main.py"]),
        (["main.py", "--quiet", "1", "--help"], ["main.py", "--quiet", "1", "--help"]),
        (["main.py", "--", "--no-zygote"], ["main.py", "--", "--no-zygote"]),
        (["-m", "pack.mod", "--no-zygote", "--", "x"], ["-m", "pack.mod", "--no-zygote", "--", "x"]),
        (["--", "main.py", "--", "x"], ["main.py", "--", "x"]),
        (["--", "-m", "pack"], ["-m", "pack"]),
        (["--", "--odd.py"], ["--odd.py"]),
        (["--", "--", "x"], ["--", "x"]),
    ],
)
def test_all_from_target_on_is_the_targets(words: list[str], target: list[str]) -> None:
    given = parse("--quiet", "2", *words)
    assert given == {"quiet": 2.0, "config": None, "target": target}


@pytest.mark.parametrize("words", [["--ignore", "-x", "--quiet=-1"], ["--ignore=-x", "--quiet", "-1"]])
def test_value_may_begin_with_a_dash(words: list[str]) -> None:
    assert parse(*words, "main.py") == {
        "ignore": ["-x"],
        "quiet": -1.0,
        "config": None,
        "target": ["main.py"],
    }


def test_repeated_flag_adds_if_it_is_a_list_and_the_last_one_counts_else() -> None:
    given = parse("--watch", "a", "--watch=b", "--quiet=1", "--quiet=2", "--no-zygote", "--no-zygote", "x.py")
    assert (given["watch"], given["quiet"], given["no-zygote"]) == (["a", "b"], 2.0, True)


def test_every_key_of_the_file_is_a_flag_and_means_the_same(tmp_path: Path) -> None:
    values = {
        "watch": ["a", "b"],
        "ignore": ["c"],
        "type": "notify",
        "handover": "overlap",
        "max-memory": 7,
        "no-zygote": True,
        **{key: ["a"] for key in ("allow-host", "show-metric", "alarm")},
        **dict.fromkeys(("env-file", "runtime-dir", "state-dir", "listen"), "text"),
    }
    words, lines = [], []
    for key in (field.encode_name for field in msgspec.structs.fields(Options)):
        value = values.get(key, 1.5)  # All others are durations.
        several = value if isinstance(value, list) else [value]
        words += [f"--{key}"] if value is True else [f"--{key}={one}" for one in several]
        lines.append(f"{key} = {msgspec.json.encode(value).decode()}\n")
    (tmp_path / "wa.toml").write_text("".join(lines), encoding="utf-8")
    given = parse(*words, "main.py")
    for name in OWN:
        del given[name]
    from_flags, from_file = merge(given, {}), merge({}, load_file(tmp_path / "wa.toml"))
    assert from_flags == from_file
    assert all(
        getattr(from_flags, field.name) != field.default for field in msgspec.structs.fields(Options)
    ), "a value that is the default would show nothing"


def test_what_is_not_given_is_left_to_the_file() -> None:
    assert parse("main.py").keys() == {*OWN}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--quiet", "x", "main.py"], "--quiet: invalid float value: 'x'"),
        (["--max-memory", "1.5", "main.py"], "--max-memory: invalid int value: '1.5'"),
        (["--type", "forking", "main.py"], "--type: invalid choice: 'forking' (choose from "),
        (["--no-zygote=1", "main.py"], "--no-zygote: "),
        (["--quiet"], "--quiet: expected one argument"),
        (["--bogus", "main.py"], "unrecognized arguments: --bogus"),
        (["--bogus=1", "main.py"], "unrecognized arguments: --bogus=1"),
        (["--quie", "1", "main.py"], "unrecognized arguments: --quie"),
        (["--no-zyg", "main.py"], "unrecognized arguments: --no-zyg"),
        (["-x", "main.py"], "unrecognized arguments: -x"),
        ([], "TARGET is missing: path/to/script.py, "),
        (["--quiet", "1"], "TARGET is missing: "),
        (["--quiet", "1", "--"], "TARGET is missing: "),
    ],
)
def test_mistake_is_one_sentence_that_names_the_flag(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(*words)
    assert str(caught.value).startswith(sentence)
    assert str(caught.value).endswith("; see wa-supervisor run --help")
    assert "\n" not in str(caught.value)


# --- the program ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["nope"], 2, "COMMAND: invalid choice: 'nope' (choose from "),
        (["--json", "status"], 2, "unrecognized arguments: --json; see wa-supervisor --help"),
        (["status", "--jso"], 2, "unrecognized arguments: --jso; see wa-supervisor status --help"),
        (["pause", "--json"], 2, "unrecognized arguments: --json; see wa-supervisor pause --help"),
        (["status", "extra"], 2, "unrecognized arguments: extra; see wa-supervisor status --help"),
        (["history", "-n", "0"], 2, "-n: '0' is not a whole number from 1 on; see wa-supervisor history"),
        (["logs", "-n-1"], 2, "-n: '-1' is not a whole number from 0 on; see wa-supervisor logs --help"),
        (["run", "--quiet=-1", "main.py"], 2, "--quiet: expected `float` >= 0.0"),
        (["run", "none.py"], 2, "TARGET none.py does not exist or is not a file; name the script to run"),
        (["logs", "-fn5", "--runtime-dir", "none"], 4, "no supervisor answers at "),
        (["history", "-n5", "--json", "--runtime-dir=none"], 4, "no supervisor answers at "),
    ],
)
def test_mistake_is_said_on_stderr_and_has_its_exit_code(
    tmp_path: Path, words: list[str], code: int, sentence: str
) -> None:
    ended = supervisor(*words, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr.startswith(f"wa-supervisor: {sentence}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code"), [(["run", "pack.app:main"], 2), (["install-unit", "--print"], 2), (["doctor"], 1)]
)
def test_working_directory_that_was_removed_is_named_in_a_sentence(
    tmp_path: Path, words: list[str], code: int
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    removed = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", removed, "sh", gone, SUPERVISOR, *words],  # noqa: S607
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == code
    assert "Traceback" not in ended.stderr
    assert "the working directory cannot be named: No such file or directory" in ended.stdout + ended.stderr


def test_without_words_its_commands_are_shown_on_stderr() -> None:
    ended = supervisor()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == supervisor("--help").stdout


def test_help_of_run_has_every_option_with_its_default() -> None:
    ended = supervisor("run", "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    words = " ".join(ended.stdout.split())
    assert words.startswith("usage: wa-supervisor run [OPTIONS] TARGET [ARGS]... ")
    for field in msgspec.structs.fields(Options):
        assert f" --{field.encode_name} " in words
    assert "until a start has failed. [default: 30] " in words
    assert "[default: simple]" in words
    assert words.endswith("[default: 127.0.0.1:9464]")


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["status", "--runtime-dir=none"], {"supervisor.service", "supervisor.bytecode", "rich", "typer"}),
        (
            ["run", "none.py"],
            {"supervisor.service", "supervisor.terminal", "rich", "typer", "shutil", "tomllib"},
        ),
    ],
)
def test_command_loads_nothing_that_only_others_use(
    tmp_path: Path, words: list[str], unwanted: set[str]
) -> None:
    program = (
        "import sys\nfrom supervisor import cli\n"
        "try:\n    cli.main()\nfinally:\n    print(*sys.modules, sep='\\n')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    loaded = set(ended.stdout.split())
    assert "supervisor.cli" in loaded
    assert not loaded & unwanted


@pytest.mark.parametrize(("estate", "is_early"), [(None, True), ("adopt 0", False)])
def test_compile_helper_starts_while_the_service_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estate: str | None, *, is_early: bool
) -> None:
    closed: list[int | None] = []
    close = Compiler.close

    def note(compiler: Compiler) -> None:
        closed.append(compiler.pid)
        close(compiler)

    monkeypatch.setattr(Compiler, "close", note)
    monkeypatch.setitem(sys.modules, "supervisor.service", None)  # Its import fails.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").touch()
    monkeypatch.delenv(ESTATE_VARIABLE, raising=False)
    if estate is not None:
        monkeypatch.setenv(ESTATE_VARIABLE, estate)
    with pytest.raises(ModuleNotFoundError):
        cli._carry_out(["run", "--runtime-dir=run", "--state-dir=state", "main.py"])
    assert ESTATE_VARIABLE not in os.environ
    assert [pid is not None for pid in closed] == [is_early], "whoever takes over has a tree that is compiled"
    assert all(pid is None or not Path(f"/proc/{pid}").exists() for pid in closed)


def test_reader_that_has_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "supervisor", "--help"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert ended.stderr == ""
