"""Start of a child: load this folder under a private name and hand over to :mod:`.program`.

Run as ``python bootstrap.py FD``, and by :mod:`.spawned` in the processes that a child spawns. It is a file
and not ``python -m supervisor…``, because that would put the name ``supervisor`` into ``sys.modules`` of an
application that may have a module of that name itself, and because ``-P`` or ``-I`` would change
``sys.flags`` of the application.
"""

import sys

PLAIN_MODULES = frozenset(sys.modules)
"""What plain Python has loaded at this point; all that follows is loaded for us, not for the application."""

_WHOLE_PATH = sys.path[:]
_LIBRARY = str(sys.modules["os"].__file__).rpartition("/")[0]
# PYTHONPATH, or the working directory of a spawned process, may hold modules named like the library's.
sys.path[:] = [entry for entry in sys.path if entry.startswith(_LIBRARY)]

from importlib import import_module  # noqa: E402
from importlib.machinery import ModuleSpec  # noqa: E402
from importlib.util import module_from_spec  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

PRIVATE_PACKAGE = "_wa_supervisor_child"
"""The name that the child's own modules have in ``sys.modules``; no tree would choose it."""

SPAWNED = f"{PRIVATE_PACKAGE}.bootstrap"
"""``__name__`` of this file in a spawned process; whoever runs it there sets MANIFEST and BLOBS."""


def load(name: str) -> Any:  # noqa: ANN401 -- a module
    """Import a module of this folder under the private package name and return it."""
    spec = ModuleSpec(PRIVATE_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).parent)]
    sys.modules[PRIVATE_PACKAGE] = module_from_spec(spec)
    module = import_module(f"{PRIVATE_PACKAGE}.{name}")
    sys.path[:] = _WHOLE_PATH
    return module


if __name__ == "__main__":
    load("program").run(int(sys.argv[1]), PLAIN_MODULES, SPAWNED)
elif __name__ == SPAWNED:
    load("spawned").pin(globals()["MANIFEST"], globals()["BLOBS"], SPAWNED, PLAIN_MODULES)
