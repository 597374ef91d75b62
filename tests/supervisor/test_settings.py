"""What ``run`` was asked for: every mistake is one sentence that names what, where and what to do."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from supervisor.errors import UsageError
from supervisor.settings import (
    Options,
    Selection,
    Target,
    changeable,
    load_file,
    merge,
    parse_target,
    resolve,
    runtime_dir,
)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """A script in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "main.py").touch()
    return Target("script", "main.py")


def toml(folder: Path, text: str) -> Path:
    path = folder / "wa.toml"
    path.write_text(text, encoding="utf-8")
    return path


# --- what is left out -------------------------------------------------------------------------------------


def test_patterns_are_taken_as_they_are_compared(script: Target) -> None:
    patterns = ("build/", "./sub/part", "gen_*.py")
    assert resolve(script, Options(ignore=patterns)).tree.ignore == ("build", "sub/part", "gen_*.py")


@pytest.mark.parametrize("pattern", ["", "/", "./", "/srv/code/build", "../build"])
def test_pattern_that_can_match_nothing_is_refused(script: Target, pattern: str) -> None:
    with pytest.raises(UsageError, match=r"--ignore .* is no name and no path below the watched folder"):
        resolve(script, Options(ignore=(pattern,)))


@pytest.mark.parametrize("pattern", ["main.py", "*.py", "m*"])
def test_target_that_is_left_out_is_refused(script: Target, pattern: str) -> None:
    with pytest.raises(UsageError, match=r"TARGET main\.py is left out by --ignore"):
        resolve(script, Options(ignore=(pattern,)))


@pytest.mark.parametrize("pattern", ["app.py", "part", "part/app.py", "*.py"])
@pytest.mark.parametrize("name", ["pack.part.app:main", "pack.part.app"])
def test_module_that_is_left_out_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack" / "part").mkdir(parents=True)
    for file in ("__init__.py", "part/__init__.py", "part/app.py"):
        (tmp_path / "pack" / file).touch()
    target = Target("callable" if ":" in name else "module", name)
    assert resolve(target, Options(ignore=("apps", "app", "pack/*"))).tree.ignore
    with pytest.raises(UsageError, match="is left out by --ignore"):
        resolve(target, Options(ignore=(pattern,)))


def test_change_of_patterns_needs_a_new_start(script: Target) -> None:
    old = resolve(script, Options())
    with pytest.raises(UsageError, match="a change of ignore needs a new start"):
        changeable(old, resolve(script, Options(ignore=("build",))))


# --- TARGET -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (["main.py"], Target("script", "main.py")),
        (["./app/main.py", "--flag", "x"], Target("script", "./app/main.py", ("--flag", "x"))),
        (["-m", "pack.mod", "-v"], Target("module", "pack.mod", ("-v",))),
        (["pack.mod:main"], Target("callable", "pack.mod:main")),
        (["pack:Class.method", "a"], Target("callable", "pack:Class.method", ("a",))),
    ],
)
def test_three_kinds_of_target_are_told_apart(words: list[str], target: Target) -> None:
    assert parse_target(words) == target


@pytest.mark.parametrize(
    "words", [[], [""], ["-m"], ["pack"], ["pack:"], [":main"], ["pack mod:x"], ["a..b:c"]]
)
def test_words_that_name_no_target_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"package\.module"):
        parse_target(words)


@pytest.mark.parametrize(
    ("target", "sentence"),
    [
        (Target("script", "none.py"), "TARGET none.py does not exist or is not a file; name the script"),
        (
            Target("script", "./folder.py"),
            "TARGET folder.py does not exist or is not a file; name the script",
        ),
        (Target("script", "./tool"), "TARGET tool is not watched, only files that end in .py are; rename it"),
        (Target("module", "none"), "TARGET -m none: there is no module 'none' in "),
        (Target("module", ""), "there is no module '' in "),
        (Target("callable", "none.x:main"), "TARGET none.x:main: there is no module 'none' in "),
    ],
)
def test_target_that_is_not_there_is_named(script: Target, target: Target, sentence: str) -> None:
    del script
    Path("folder.py").mkdir()
    Path("tool").touch()
    with pytest.raises(UsageError) as caught:
        resolve(target, Options())
    assert sentence in str(caught.value)
    assert caught.value.exit_code == 2


def test_folder_of_a_script_is_watched_by_default(script: Target, tmp_path: Path) -> None:
    assert resolve(script, Options()).tree.roots == (str(tmp_path),)


def test_top_package_of_a_module_is_watched_by_default_and_nothing_is_imported(
    script: Target, tmp_path: Path
) -> None:
    del script
    package = tmp_path / "a_package_of_this_test" / "inner"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    for target in (
        Target("module", "a_package_of_this_test.inner"),
        Target("callable", "a_package_of_this_test.inner:main"),
    ):
        assert resolve(target, Options()).tree.roots == (str(package.parent),)


def test_module_that_is_one_file_has_its_folder_watched(script: Target, tmp_path: Path) -> None:
    del script
    assert resolve(Target("module", "main"), Options()).tree.roots == (str(tmp_path),)


def test_script_outside_of_what_is_watched_is_refused(script: Target, tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    with pytest.raises(UsageError, match=r"main\.py lies in no watched folder; add --watch"):
        resolve(script, Options(watch=("lib",)))
    assert len(resolve(script, Options(watch=("lib", "."))).tree.roots) == 1


def test_script_is_found_in_a_root_by_its_real_place(script: Target, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(".")
    assert resolve(script, Options(watch=("current",))).tree.roots == (str(tmp_path / "current"),)


def test_watched_folder_that_is_none_is_refused(script: Target) -> None:
    with pytest.raises(UsageError, match=r"--watch main\.py is not a directory; name the folder"):
        resolve(script, Options(watch=("main.py",)))


# --- flags and file ---------------------------------------------------------------------------------------


def test_every_option_is_a_key_of_the_file_spelt_as_the_flag(script: Target, tmp_path: Path) -> None:
    path = toml(
        tmp_path,
        """
        watch = ["."]
        ignore = ["build"]
        type = "notify"
        handover = "overlap"
        ready-timeout = 1
        watchdog = 0
        stop-timeout = 2.5
        quiet = 0
        scan-interval = 3
        rehash-interval = 9
        verify-interval = 4
        probation = 0
        max-memory = 1000
        max-age = 5.5
        no-zygote = true
        env-file = "environment"
        runtime-dir = "run"
        state-dir = "state"
        listen = "localhost:1"
        allow-host = ["Monitor.example."]
        show-metric = ["jobs_total{queue,state}"]
        alarm = ['jobs_failed{queue="a,b", state="x"}']
        """,
    )
    file = load_file(path)
    assert set(file) == {field.encode_name for field in msgspec.structs.fields(Options)}
    options = merge({}, file)
    settings = resolve(script, options)
    assert (settings.type, settings.handover, settings.listen) == ("notify", "overlap", ("localhost", 1))
    assert (settings.ready_timeout_seconds, settings.stop_timeout_seconds) == (1, 2.5)
    assert (settings.watchdog_seconds, settings.quiet_seconds) == (0, 0), "0 is a value and not the default"
    assert (settings.runtime_dir, settings.state_dir) == (tmp_path / "run", tmp_path / "state")
    assert settings.allowed_hosts == ("monitor.example",)
    assert settings.shown_metrics == (Selection("jobs_total", ("queue", "state")),)
    assert settings.alarms == (Selection("jobs_failed", (), {"queue": "a,b", "state": "x"}),)


@pytest.mark.parametrize(
    "text", ["", "a b", "jobs{", "jobs{}", "jobs{a-b}", 'jobs{a="1}', "jobs}{", "jobs{a}b"]
)
@pytest.mark.parametrize("key", ["show-metric", "alarm"])
def test_selection_of_series_that_is_none_is_one_sentence(script: Target, key: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"^--{key} .* is no NAME"):
        resolve(script, merge({key: (text,)}, {}))


def test_flags_beat_the_file_and_the_file_beats_the_defaults(script: Target) -> None:
    merged = merge({"quiet": 0.0}, {"quiet": 1.0, "ready-timeout": 5.0})
    settings = resolve(script, merged)
    assert (settings.quiet_seconds, settings.ready_timeout_seconds, settings.scan_interval_seconds) == (
        0,
        5,
        2,
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("redy-timeout = 1", "unknown field `redy-timeout`"),
        ("ready_timeout = 1", "unknown field `ready_timeout`"),
        ("ready-timeout = 'long'", "got `str` - at `$.ready-timeout`"),
        ("ready-timeout = 0", "at `$.ready-timeout`"),
        ("watch = 'src'", "at `$.watch`"),
        ("type = 'forking'", "at `$.type`"),
        ("quiet = nan", "at `$.quiet`"),
        ("quiet = inf", "at `$.quiet`"),
        ("quiet = true", "at `$.quiet`"),
        ("quiet =", "is not valid TOML: "),
        ("\udcff", "is not valid TOML: "),
    ],
)
def test_mistake_in_the_file_names_file_and_key(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "wa.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as caught:
        load_file(path)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=f"cannot read the configuration {tmp_path / name}"):
        load_file(tmp_path / name)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("ready-timeout", 0.0),
        ("stop-timeout", -1.0),
        ("scan-interval", float("nan")),
        ("verify-interval", float("inf")),
        ("quiet", -0.1),
        ("watchdog", float("-inf")),
    ],
)
def test_flag_out_of_its_bounds_is_refused_as_in_the_file(flag: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"^--{flag}: expected `float` "):
        merge({flag: value}, {})


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        (":9464", ("127.0.0.1", 9464)),
        ("[::1]:80", ("::1", 80)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_address_is_read(script: Target, text: str, address: tuple[str, int]) -> None:
    assert resolve(script, Options(listen=text)).listen == address


@pytest.mark.parametrize("text", ["9464", "host:", "host:port", "host:65536", "host:-1", "http://host"])
def test_address_that_is_none_is_refused_with_an_example(script: Target, text: str) -> None:
    with pytest.raises(UsageError, match=r"is not HOST:PORT, for example 127\.0\.0\.1:9464"):
        resolve(script, Options(listen=text))


# --- directories ------------------------------------------------------------------------------------------


def test_directories_of_systemd_are_used_the_first_of_several(
    script: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/wa:/run/other")
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/wa")
    settings = resolve(script, Options())
    assert (settings.runtime_dir, settings.state_dir) == (Path("/run/wa"), Path("/var/lib/wa"))
    assert runtime_dir("/mine") == Path("/mine")


def test_directories_of_the_user_are_used_else(script: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    settings = resolve(script, Options())
    assert settings.runtime_dir.name.startswith("wa-supervisor-")
    assert settings.state_dir == Path("/home/somebody/.local/state/wa-supervisor")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    monkeypatch.setenv("XDG_STATE_HOME", "/home/somebody/state")
    settings = resolve(script, Options())
    assert (settings.runtime_dir, settings.state_dir) == (
        Path("/run/user/7/wa-supervisor"),
        Path("/home/somebody/state/wa-supervisor"),
    )


def test_user_without_a_home_is_told_to_name_a_place(script: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "STATE_DIRECTORY", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("nobody knows this user")))
    with pytest.raises(UsageError, match="no home directory; name a place with --state-dir"):
        resolve(script, Options())
