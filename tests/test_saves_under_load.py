"""Twenty saves while a hundred messages a second arrive: each one live and proven, no drop lost or
doubled."""

from __future__ import annotations

import hashlib
import json
import os
from typing import TYPE_CHECKING, Any

from monitor.demo.compare import compare
from monitor.demo.stage import Stage
from monitor.demo.stream import Stream

if TYPE_CHECKING:
    from pathlib import Path

SAVES = 20
MESSAGES_PER_SECOND = 100.0
EDITED = ("identity.py", "relay.py", "store.py", "app.py")


def save(path: Path, number: int) -> None:
    """Change a comment at the end; every other save keeps size and modification time."""
    source = path.read_bytes()
    mark = b"\n# save "
    before = path.stat()
    path.write_bytes(source.partition(mark)[0] + mark + f"{number:04}\n".encode())
    if number % 2:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def digests(package: Path) -> dict[str, str]:
    """The sha256 of every source on disk, as `verify` names them: relative to what is watched."""
    return {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in package.rglob("*.py")
    }


def test_saves_under_load(database_url: str, tmp_path: Path) -> None:
    with Stage(tmp_path / "stage", url=database_url) as stage:
        stage.supervise("monitor.app:main", options=("--type", "notify", "--handover", "overlap"))
        package = stage.tree / "monitor"
        generation = stage.status()["live"]["generation"]
        stream = Stream(stage.bridge, seed=7, rate=MESSAGES_PER_SECOND, first_drop=1_000_001)
        with stream:
            for number in range(SAVES):
                tree = stage.status()["live"]["tree"]
                save(package / EDITED[number % len(EDITED)], number)

                def live(old_tree: str = tree) -> dict[str, Any] | None:
                    status = stage.status()
                    return status if status["in_sync"] and status["live"]["tree"] != old_tree else None

                reload = stage.wait(f"save {number} is live", live)["last_reload"]
                assert reload["outcome"] == "live"
                assert reload["trigger"] in {"watch", "scan"}
                answer = stage.command("wa-supervisor", "verify", "--json")
                assert answer.returncode == 0, answer.stdout + answer.stderr
                report = json.loads(answer.stdout)
                assert report["in_sync"]
                running = {module["path"]: module["running_sha256"] for module in report["modules"]}
                assert set(EDITED) <= running.keys()
                assert running.items() <= digests(package).items()
        stage.wait(
            "both sides agree",
            lambda: all(
                line.complete
                for line in compare(stage.bridge.messages_db, stage.bridge.whatsapp_db, database_url)
            ),
        )
        lines = compare(stage.bridge.messages_db, stage.bridge.whatsapp_db, database_url)
        assert sum(line.messages_total for line in lines) == stream.posted_total
        assert sum(line.drops_total for line in lines) > SAVES
        assert stage.status()["live"]["generation"] == generation + SAVES
        assert sum(stage.status()["restarts"].values()) == 0
