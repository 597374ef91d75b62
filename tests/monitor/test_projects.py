"""The projects file: the existing format, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from monitor.errors import ConfigError
from monitor.projects import load_projects

if TYPE_CHECKING:
    from pathlib import Path

ONE = "projects: [{name: Northfield, enabled: true, group_jid: 120363000000000001@g.us, description: d}]"


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "projects.yaml"
    path.write_text(text)
    return path


def test_existing_format_is_read(projects_file: Path) -> None:
    projects = load_projects(projects_file)
    assert [project.name for project in projects.enabled] == ["Northfield", "Eastvale"]
    assert projects.by_chat["120363000000000002@g.us"].name == "Eastvale"
    assert len(projects.all) == 3


def test_projects_share_one_drop_space_unless_told_otherwise(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        """
projects:
  - {name: Northfield, enabled: true, group_jid: 120363000000000001@g.us, description: d}
  - {name: Eastvale, enabled: true, group_jid: 120363000000000002@g.us, description: d}
  - {name: Trial, enabled: true, group_jid: 120363000000000004@g.us, description: d, drop_space: trial}
""",
    )
    projects = load_projects(path)
    assert projects.names_in("qa") == ["Northfield", "Eastvale"]
    assert projects.space_of["Trial"] == "trial"


def test_project_is_disabled_unless_enabled(tmp_path: Path) -> None:
    path = _write(tmp_path, ONE.replace("enabled: true, ", ""))
    with pytest.raises(ConfigError, match="no project is enabled"):
        load_projects(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ONE.replace("enabled: true", "enabeld: true"), ["projects[0]", "enabeld"]),
        (ONE.replace("enabled: true", "enabled: maybe"), ["projects[0].enabled", "bool"]),
        (ONE.replace("name: Northfield", "name: 7"), ["projects[0].name", "str"]),
        (ONE.replace("@g.us", "@s.whatsapp.net"), ["projects[0].group_jid"]),
        (ONE.replace(", description: d", ""), ["description"]),
        ("projects: 5", ["projects", "array"]),
        ("[]", ["object"]),
        ("", ["object"]),
        ("projects: [{name: a", ["YAML", "line 1"]),
        ("projects:\n  - name: a\n   enabled: true", ["YAML", "line 3"]),
        (ONE.replace("description: d", "description: d, type: marketing"), ["marketing", "Northfield"]),
        (
            f"{ONE[:-1]}, {{name: Northfield, group_jid: 120363000000000002@g.us, description: d}}]",
            ["Northfield", "twice"],
        ),
        (
            f"{ONE[:-1]}, {{name: Eastvale, group_jid: 120363000000000001@g.us, description: d}}]",
            ["120363000000000001@g.us", "twice"],
        ),
    ],
)
def test_fault_is_one_sentence_with_file_and_place(tmp_path: Path, text: str, words: list[str]) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_projects(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in [str(path), *words]:
        assert word in sentence


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*WA_PROJECTS"):
        load_projects(tmp_path / "nowhere.yaml")
