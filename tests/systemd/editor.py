"""Edits the gauntlet's tree inside the machine: `python editor.py FOLDER`, a line asks, a line answers.

A request is the name of a row, a space and the number of its step; -1 makes the tree. The answer is what
plain Python runs after that.
"""

import shutil
import sys
from pathlib import Path

sys.path.insert(0, "/opt/repository")

from tests.supervisor.helpers_gauntlet import Bench
from tests.supervisor.test_gauntlet import GAUNTLET


def main() -> None:
    """Answer until there are no more requests."""
    folder = Path(sys.argv[1])
    rows = {row.name: row for row in GAUNTLET}
    for line in sys.stdin:
        name, _, step = line.strip().rpartition(" ")
        row = rows[name]
        if step == "-1":
            shutil.rmtree(folder, ignore_errors=True)
            bench = Bench.make(folder, dict(row.environment), row.flags)
            row.prepare(bench)
        else:
            bench = Bench.at(folder, dict(row.environment), row.flags)
            row.steps[int(step)].edit(bench)
        print(bench.plain(), flush=True)


if __name__ == "__main__":
    main()
