"""Start of a child: load this folder under a private name and hand over to :mod:`.program`.

Run as ``python bootstrap.py FD``. It is a file and not ``python -m supervisor…``, because that would put the
name ``supervisor`` into ``sys.modules`` of an application that may have a module of that name itself, and
because ``-P`` or ``-I`` would change ``sys.flags`` of the application.
"""

import sys

PLAIN_MODULES = frozenset(sys.modules)
"""What plain Python has loaded at this point; all that follows is loaded for us, not for the application."""

from importlib import import_module  # noqa: E402
from importlib.machinery import ModuleSpec  # noqa: E402
from importlib.util import module_from_spec  # noqa: E402
from pathlib import Path  # noqa: E402

PRIVATE_PACKAGE = "_wa_supervisor_child"
"""The name that the child's own modules have in ``sys.modules``; no tree would choose it."""


def load_program() -> object:
    """Import :mod:`.program` under the private package name and return it."""
    spec = ModuleSpec(PRIVATE_PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(Path(__file__).parent)]
    sys.modules[PRIVATE_PACKAGE] = module_from_spec(spec)
    return import_module(f"{PRIVATE_PACKAGE}.program")


if __name__ == "__main__":
    load_program().run(int(sys.argv[1]), PLAIN_MODULES)  # type: ignore[attr-defined]
