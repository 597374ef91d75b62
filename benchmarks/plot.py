"""Draw (a) against the size of the tree, from ``peers.json``; runs where the peers are, with matplotlib."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl


def main() -> None:
    """Read the first argument and write the second."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 -- after the choice of what draws

    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    figure, axes = plt.subplots(figsize=(9, 5.5))
    for values in measured["contenders"]:
        points = sorted((int(files), statistics.median(found)) for files, found in values["saves_ms"].items())
        if points:
            style = "o-" if values["family"] == "ours" else "s--"
            axes.plot(*zip(*points, strict=True), style, label=values["name"])
    axes.set(xscale="log", yscale="log", xlabel="files in the tree", ylabel="save to new code, median, ms")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(sys.argv[2], dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
