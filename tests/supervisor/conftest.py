"""Fixtures for tests of the supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.supervisor.harness import SCRIPT, Supervised


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervised]]:
    """Start supervisors that are stopped at the end of the test: ``supervise(*arguments, cwd=…)``."""
    with ExitStack() as stack:

        def start(
            *arguments: str,
            cwd: Path,
            folder: Path | None = None,
            prefix: Sequence[str] = (),
            **environment: str,
        ) -> Supervised:
            started = Supervised(folder or tmp_path, list(arguments), cwd, environment, prefix)
            stack.callback(started.end)
            return started

        yield start


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A script tree: ``main.py`` beside ``modules/answer.py``, which says 1."""
    folder = tmp_path / "tree"
    (folder / "modules").mkdir(parents=True)
    (folder / "main.py").write_text(SCRIPT, encoding="utf-8")
    (folder / "modules" / "answer.py").write_text("VALUE = 1\n", encoding="utf-8")
    return folder


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring coverage loads half the standard library before any program starts."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)
