"""Settings: which source wins, and what is refused in one sentence."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from monitor.errors import ConfigError
from monitor.settings import Listen, Since, Values, load, parse_listen, parse_since, resolve

if TYPE_CHECKING:
    from pathlib import Path

URL = "postgresql://monitor:s3cret-word@db.example/wa"


def test_flag_beats_file_beats_environment(tmp_path: Path) -> None:
    config = tmp_path / "wa.toml"
    config.write_text('bridge = "/file/messages.db"\nprojects = "/file/projects.yaml"\n')
    environment = {
        "WHATSAPP_DB_PATH": "/env/messages.db",
        "WA_PROJECTS": "/env/projects.yaml",
        "DATABASE_URL": URL,
    }
    settings = load(Values(bridge="/flag/messages.db"), config=config, environment=environment)
    assert str(settings.bridge) == "/flag/messages.db"
    assert str(settings.projects) == "/file/projects.yaml"
    assert settings.database_url is not None
    assert settings.database_url.reveal() == URL


def test_folder_means_the_messages_file_in_it(tmp_path: Path) -> None:
    assert load(Values(bridge=str(tmp_path)), environment={}).bridge == tmp_path / "messages.db"


def test_variables_of_the_existing_deployment_are_read() -> None:
    environment = {
        "WHATSAPP_DB_PATH": "/b/messages.db",
        "NEON_DATABASE_URL": URL,
        "SCAN_INTERVAL": "15",
        "LOG_LEVEL": "debug",
    }
    settings = load(Values(), environment=environment)
    assert settings.scan_interval_seconds == 15
    assert settings.log_level == "DEBUG"
    assert settings.database_url is not None


def test_empty_variable_counts_as_not_set() -> None:
    assert load(Values(bridge="b"), environment={"DATABASE_URL": "", "LOG_LEVEL": ""}).database_url is None


def test_settings_never_show_the_database_url() -> None:
    settings = load(Values(bridge="b"), environment={"DATABASE_URL": URL})
    assert "s3cret" not in repr(settings) + str(settings) + f"{settings.database_url}"


def test_key_may_be_written_with_dashes_and_times_as_toml_times(tmp_path: Path) -> None:
    config = tmp_path / "wa.toml"
    config.write_text("scan-interval = 3\nsince = 2026-01-31T06:00:00+02:00\ncalling_codes = [27, 258]\n")
    settings = load(Values(bridge="b"), config=config, environment={})
    assert settings.scan_interval_seconds == 3
    assert settings.since == Since(datetime(2026, 1, 31, 4, tzinfo=UTC))
    assert settings.calling_codes == {27, 258}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('brigde = "x"', ["wa.toml", "unknown key", "brigde"]),
        ("scan-interval = true", ["wa.toml", "scan-interval"]),
        ('scan_interval = "fast"', ["wa.toml", "scan_interval"]),
        ("scan_interval = 0", ["wa.toml", "scan_interval"]),
        ("bridge = 7", ["wa.toml", "bridge"]),
        ('log_level = "LOUD"', ["wa.toml", "log_level"]),
        ("calling_codes = [0]", ["wa.toml", "calling_codes"]),
        ("once = 1", ["wa.toml", "once"]),
        ("bridge = ", ["wa.toml", "TOML"]),
    ],
)
def test_fault_in_the_file_is_one_sentence_with_file_and_key(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    config = tmp_path / "wa.toml"
    config.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Values(bridge="b"), config=config, environment={})
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in words:
        assert word in sentence


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        load(Values(bridge="b"), config=tmp_path / "nowhere.toml", environment={})


def test_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match="SCAN_INTERVAL"):
        load(Values(bridge="b"), environment={"SCAN_INTERVAL": "soon"})


def test_missing_bridge_names_both_ways_to_give_it() -> None:
    with pytest.raises(ConfigError, match=r"WHATSAPP_DB_PATH or --bridge"):
        load(Values(), environment={})


def test_since_takes_an_instant_beginning_and_now() -> None:
    assert parse_since("beginning") == Since(None)
    assert parse_since("2026-01-31T06:00:00Z").instant == datetime(2026, 1, 31, 6, tzinfo=UTC)
    now = parse_since("now")
    assert now.now
    assert now.instant is not None
    assert now.instant.tzinfo is not None


@pytest.mark.parametrize(
    "text",
    [
        "yesterday",
        "2026-13-01T00:00:00Z",
        "2026-01-31T06:00:00",
        "2026-01-31",
        "0001-01-01T00:00:00Z",
        "9999-12-31T23:59:59-10:00",
    ],
)
def test_since_without_a_clear_instant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="since"):
        parse_since(text)


def test_listen_defaults_to_the_loopback_interface() -> None:
    assert parse_listen(":9465") == Listen("127.0.0.1", 9465)
    assert parse_listen("[::1]:0") == Listen("::1", 0)


@pytest.mark.parametrize("text", ["9465x", "host:", "host:99999", "nonsense"])
def test_listen_that_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        parse_listen(text)


def test_business_zone_is_south_africa_unless_another_is_named() -> None:
    noon = datetime(2026, 7, 1, 12, tzinfo=UTC)
    assert f"{noon.astimezone(resolve(Values(bridge='x')).business_zone):%H:%M %Z}" == "14:00 SAST"
    other = resolve(Values(bridge="x", business_zone="Europe/Lisbon")).business_zone
    assert f"{noon.astimezone(other):%H:%M}" == "13:00"


@pytest.mark.parametrize("zone", ["Nowhere/City", "../etc/passwd", "/etc/passwd"])
def test_business_zone_that_is_none_is_refused(zone: str) -> None:
    with pytest.raises(ConfigError, match="business_zone"):
        resolve(Values(bridge="x", business_zone=zone))


def credentials(folder: Path, content: bytes) -> dict[str, str]:
    (folder / "database-url").write_bytes(content)
    return {"WHATSAPP_DB_PATH": "/b/messages.db", "CREDENTIALS_DIRECTORY": str(folder)}


def test_database_url_is_taken_from_the_credential(tmp_path: Path) -> None:
    environment = credentials(tmp_path, f"{URL}\n".encode()) | {"DATABASE_URL": "postgresql://elsewhere/wa"}
    settings = load(Values(), environment=environment)
    assert settings.database_url is not None
    assert settings.database_url.reveal() == URL


def test_empty_credential_counts_as_not_set(tmp_path: Path) -> None:
    environment = credentials(tmp_path, b"\n")
    assert load(Values(), environment=environment).database_url is None
    settings = load(Values(), environment=environment | {"DATABASE_URL": URL})
    assert settings.database_url is not None
    assert settings.database_url.reveal() == URL


def test_directory_of_credentials_may_hold_others(tmp_path: Path) -> None:
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path), "DATABASE_URL": URL}
    assert load(Values(bridge="b"), environment=environment).database_url is not None


def test_credential_that_cannot_be_read_is_named_without_its_content(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="database-url: not UTF-8; write") as refused:
        load(Values(), environment=credentials(tmp_path, b"s3cret\xff"))
    assert "s3cret" not in str(refused.value)
    (tmp_path / "database-url").unlink()
    (tmp_path / "database-url").mkdir()
    with pytest.raises(ConfigError, match=r"database-url: Is a directory; check LoadCredential="):
        load(Values(), environment={"CREDENTIALS_DIRECTORY": str(tmp_path)})
