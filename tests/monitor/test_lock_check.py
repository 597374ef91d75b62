"""The check of the lock, where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / ".ci" / "check_lock.py"


def test_missing_lock_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "requirements.lock cannot be read" in done.stderr
    assert done.stderr.count("\n") == 1
