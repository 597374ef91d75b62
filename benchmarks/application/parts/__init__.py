"""Modules of the program that change together: all are imported, the first ones are shown in each line."""

import importlib
import pkgutil

SHOWN = 20

MODULES = [
    importlib.import_module(f"{__name__}.{module.name}")
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name)
]


def digits() -> str:
    return "".join(str(module.value()) for module in MODULES[:SHOWN]) or "-"
