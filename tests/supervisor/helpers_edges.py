"""Running code as a user whom permission bits bind, whoever runs the tests; and running git."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
_BECOME_NOBODY = f"""
import os
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
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


def run_git(folder: Path, *arguments: str) -> str:
    """Run git without anybody's settings and return what it prints."""
    identity = {
        f"GIT_{who}_{what}": value
        for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "A. Person"), ("EMAIL", "person@example.invalid"))
    }
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    child = subprocess.run(
        ["git", *arguments],  # noqa: S607 -- git is where the system has it
        cwd=folder,
        env=os.environ | identity | plain,
        capture_output=True,
        text=True,
        check=True,
    )
    return child.stdout.strip()
