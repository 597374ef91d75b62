"""The application's Prometheus metrics as plain data, if it uses ``prometheus_client`` at all.

The rule: look, never import. An application that did not import the library pays nothing and sends nothing.
Metrics of the process and of the interpreter are left out: the supervisor measures its child from outside,
without its help.
"""

from __future__ import annotations

import sys
from typing import Any

_ABOUT_THE_PROCESS = ("process_", "python_")


def families() -> list[dict[str, Any]] | None:
    """Return the metric families of the default registry, or None where the application has no such library.

    Each is ``{name, documentation, type, samples: [[name, labels, value], …]}``. A collector of the
    application that raises costs its scrape, not the application: the answer is then one family that says so.
    """
    library = sys.modules.get("prometheus_client")
    registry = getattr(library, "REGISTRY", None)
    if registry is None:
        return None
    try:
        return [
            {
                "name": family.name,
                "documentation": family.documentation,
                "type": family.type,
                "samples": [[s.name, dict(s.labels), float(s.value)] for s in family.samples],
            }
            for family in registry.collect()
            if not family.name.startswith(_ABOUT_THE_PROCESS)
        ]
    except Exception as error:  # noqa: BLE001 -- a collector is foreign code and may raise anything
        return [failure(f"collecting them raised {type(error).__name__}")]


def failure(why: str) -> dict[str, Any]:
    """Return the family that stands for metrics which cannot be shown."""
    return {
        "name": "wa_supervisor_child_scrape_error",
        "documentation": f"The child's metrics are missing: {why}",
        "type": "gauge",
        "samples": [["wa_supervisor_child_scrape_error", {}, 1.0]],
    }
