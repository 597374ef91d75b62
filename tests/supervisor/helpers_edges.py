"""Running code as a user whom permission bits bind, whoever runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NOBODY = 65534
_BECOME_NOBODY = f"""
import os
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({_NOBODY})
    os.setuid({_NOBODY})
"""


@contextmanager
def folder_for_everybody() -> Iterator[Path]:
    """A folder that other users may reach; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def run_unprivileged(imports: str, code: str, *arguments: str) -> str:
    """Run code after its imports as a user who is not root, and return what it prints."""
    child = subprocess.run(
        [sys.executable, "-c", f"{imports}\n{_BECOME_NOBODY}\n{code}", *arguments],
        capture_output=True,
        text=True,
        check=False,
        # Coverage could not write its file as that user.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
    )
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()
