"""A browser for tests of the status page: `make page` says where its packages are."""

from __future__ import annotations

import os
import sys

from tests.supervisor.conftest import supervise, tree

__all__ = ["supervise", "tree"]

if packages := os.environ.get("WA_PAGE_PACKAGES"):
    sys.path.append(packages)
