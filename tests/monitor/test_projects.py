"""The projects file: the existing format, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from monitor.errors import ConfigError
from monitor.projects import ProjectsFile, load_projects

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
        (ONE.replace("enabled: true", "enabled: true, enabled: false"), ["line 1", "enabled", "twice"]),
        (f"{ONE}\nprojects: []", ["line 2", "projects", "twice"]),
        (ONE.replace("description: d", "description: 2026-13-45"), ["line 1", "2026-13-45", "timestamp"]),
        (ONE.replace("description: d", "description: !!int x"), ["line 1", "int"]),
        (ONE.replace("description: d", "description: !!bool x"), ["line 1", "bool"]),
        (ONE.replace("description: d", "description: !!timestamp x"), ["line 1", "timestamp"]),
        ("projects: &p [*p]", ["line 1", "projects[0]"]),
        ("[" * 20000, ["YAML", "deep"]),
        (ONE.replace("@g.us", '@g.us\\n"').replace("group_jid: ", 'group_jid: "'), ["projects[0].group_jid"]),
        (ONE.replace("Northfield", '"North\\0field"'), ["projects[0]", "control"]),
        (ONE.replace("Northfield", '"North\\ud800field"'), ["projects[0]", "control"]),
        (ONE.replace("Northfield", '" "'), ["projects[0]", "letter"]),
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


def test_fault_names_its_line(tmp_path: Path) -> None:
    good = "projects:\n  - name: A\n    group_jid: 120363000000000001@g.us\n    enabled: true\n"
    good += "    description: d\n"
    for text, line in [
        (good.replace("true", "maybe"), 4),
        (good + good.partition("\n")[2].replace("name: A", "name: B"), 6),
        (good.replace("description", "descriptoin"), 2),
        (good + "    min_digits: 9\n", 2),
        (f"# ours\n{good}groups: []\n", 2),
        (good.replace("description: d", "description: \0"), 5),
    ]:
        with pytest.raises(ConfigError, match=rf"projects\.yaml: (not valid YAML: )?line {line}: "):
            load_projects(_write(tmp_path, text))


def test_file_is_taken_again_when_its_bytes_change_and_refused_once(tmp_path: Path) -> None:
    path = _write(tmp_path, ONE)
    file = ProjectsFile(path)
    before = file.projects
    assert not file.has_changed()
    _write(tmp_path, ONE + "\n# a remark\n")
    assert not file.has_changed()
    _write(tmp_path, "projects: 5")
    with pytest.raises(ConfigError):
        file.has_changed()
    assert not file.has_changed()
    assert file.projects == before
    assert file.refused
    _write(tmp_path, ONE)
    assert not file.has_changed()
    assert not file.refused
    _write(tmp_path, ONE.replace("Northfield", "Southfield"))
    assert file.has_changed()
    assert [project.name for project in file.projects.all] == ["Southfield"]
    path.unlink()
    with pytest.raises(ConfigError, match="No such file"):
        file.has_changed()
    assert file.refused
    _write(tmp_path, ONE.replace("Northfield", "Southfield"))
    assert not file.has_changed()
    assert not file.refused


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*WA_PROJECTS"):
        load_projects(tmp_path / "nowhere.yaml")
