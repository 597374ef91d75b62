"""The lines of a batch are lines like any other, although they are one record."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from monitor import logs

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

PREFIX = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} INFO ")


def test_each_line_of_a_batch_has_its_time_and_hides_its_numbers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "log"
    logs.set_up("INFO", full_numbers=False, file=file)
    logs.info_lines([])
    logs.info_lines(["Found drop: DR1000001", "Resolved LID 100000000000017 -> 27711234567", "one\nline"])
    shown = capsys.readouterr().out
    assert file.read_text(encoding="utf-8") == shown
    lines = shown.splitlines()
    assert all(PREFIX.match(line) for line in lines)
    assert [PREFIX.sub("", line) for line in lines] == [
        "Found drop: DR1000001",
        "Resolved LID 10**********017 -> 27******567",
        "one line",
    ]
