"""The incident, whole, in the layout that its users have: a script tree, a filled table, a same-size edit.

``main.py`` puts ``modules`` on the path and imports ``monitor`` -- a module of the tree that is named like
our own package. The modules are those of this repository, laid flat; so the test follows the product.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg

import monitor
from monitor.demo import incident
from monitor.demo.bridge import EASTVALE, MAPPED_LIDS, NORTHFIELD
from monitor.demo.stage import Stage

if TYPE_CHECKING:
    from collections.abc import Callable

PACKAGE = Path(monitor.__file__).parent
NOT_IN_THE_TREE = {"__init__", "__main__", "cli", "embedded", "owned"}
MAIN = """\
import sys

sys.path.insert(0, 'modules')

import monitor

if __name__ == '__main__':
    sys.exit(monitor.main())
"""
IDENTITY = Path("modules", "identity.py")
(LID, PHONE), (OTHER_LID, OTHER_PHONE) = MAPPED_LIDS[:2]

# What stands in the table before anything of ours runs: other people's rows, in every shape that was ever
# written.
FILLED = """
INSERT INTO public.qa_photo_reviews
    (drop_number, project, user_name, submitted_by, review_date, completed, step_01_house_photo, locked_by)
VALUES
    ('DR0900001', 'Northfield', '27711234567',   '27711234567',   '2025-11-11', true,  true,  'reviewer'),
    ('DR0900002', 'Northfield', '263712345678',  '263712345678',  '2025-11-11', false, true,  NULL),
    ('DR0900003', 'Eastvale',   '2348021234567', '2348021234567', '2025-11-12', false, false, NULL),
    ('DR0900004', 'Eastvale',   '3000000000013', '3000000000013', '2025-11-12', false, false, NULL),
    ('DR0900005', NULL,         'typed by hand', NULL,            '2025-11-13', true,  true,  NULL);
"""


def build_script_tree(tree: Path) -> None:
    """Lay the monitor's modules flat into ``modules``; its ``app`` becomes the module ``monitor``."""
    modules = tree / "modules"
    modules.mkdir(parents=True)
    (tree / "main.py").write_text(MAIN, encoding="utf-8")
    for source in PACKAGE.glob("*.py"):
        if source.stem not in NOT_IN_THE_TREE:
            text = source.read_text(encoding="utf-8")
            text = re.sub(r"^( *)from monitor import (.+)$", r"\1import \2", text, flags=re.MULTILINE)
            text = re.sub(r"^( *)from monitor\.(\w+) import ", r"\1from \2 import ", text, flags=re.MULTILINE)
            name = "monitor.py" if source.stem == "app" else source.name
            (modules / name).write_text(text, encoding="utf-8")
    for statements in PACKAGE.glob("*.sql"):
        shutil.copy2(statements, modules)
    shutil.copytree(PACKAGE / "migrations", modules / "migrations")


def run_plainly(stage: Stage) -> None:
    """Start the tree as its users do, let it deal with what waits, and end."""
    done = subprocess.run(
        [sys.executable, "main.py", "--once"],
        check=False,
        cwd=stage.tree,
        env=stage.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def row_of(stage: Stage, drop: str) -> tuple[Any, ...] | None:
    rows = stage.ask(
        "SELECT submitted_by, user_name, resubmitted FROM public.qa_photo_reviews WHERE drop_number = %s",
        drop,
    )
    assert len(rows) <= 1
    return rows[0] if rows else None


def table(stage: Stage) -> dict[str, str]:
    """Every row of the table, whole, by its id."""
    return dict(stage.ask("SELECT id::text, t::text FROM public.qa_photo_reviews t"))


def await_row(stage: Stage, drop: str) -> tuple[Any, ...]:
    return stage.wait(f"{drop} is stored", lambda: row_of(stage, drop))


def save(stage: Stage, content: bytes) -> None:
    """Save ``identity.py`` unseen by size and time, and wait until it is the code that runs."""
    before = stage.status()["live"]["tree"]
    incident.overwrite(stage.tree / IDENTITY, content)

    def reloaded() -> dict[str, Any] | None:
        status = stage.status()
        return status if status["in_sync"] and status["live"]["tree"] != before else None

    reload = stage.wait("the save is live", reloaded)["last_reload"]
    assert (reload["outcome"], reload["paths"]) == ("live", [str(IDENTITY)])


def verify(stage: Stage) -> None:
    done = stage.command("wa-supervisor", "verify")
    assert done.returncode == 0, done.stdout + done.stderr


def lids_stored(stage: Stage) -> float:
    return stage.metric("wa_monitor_drops_stored_total", identity="lid")


def plain_restart_runs_the_old_code(stage: Stage, good: bytes, bad: bytes) -> None:
    """The control arm: the bug is saved over right code, the service is started again, nothing changes."""
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000001 done")
    run_plainly(stage)
    assert row_of(stage, "DR1000001") == (PHONE, PHONE, False)
    incident.overwrite(stage.tree / IDENTITY, bad)
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000002 done")
    run_plainly(stage)
    assert (stage.tree / IDENTITY).read_bytes() == bad
    assert row_of(stage, "DR1000002") == (PHONE, PHONE, False), (
        "plain Python ran the new code: no control arm"
    )
    incident.overwrite(stage.tree / IDENTITY, good)


def good_code_serves(stage: Stage) -> None:
    stage.supervise("main.py")
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000003 done")
    assert await_row(stage, "DR1000003") == (PHONE, PHONE, False)
    assert lids_stored(stage) == 0
    assert stage.command("wa-monitor", "audit").returncode == 0


def saved_bug_is_live_counted_and_found(stage: Stage, bad: bytes) -> None:
    """Both paths are hit: new drops and a resubmission."""
    save(stage, bad)
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000004 done")
    stage.bridge.post(chat_jid=EASTVALE, sender=OTHER_LID, content="DR1000005 and DR1000006")
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000001 updated")
    assert await_row(stage, "DR1000004") == (LID, LID, False)
    assert await_row(stage, "DR1000006") == (OTHER_LID, OTHER_LID, False)
    stage.wait("the resubmission is stored", lambda: row_of(stage, "DR1000001") == (LID, LID, True))
    stage.wait("every LID is counted", lambda: lids_stored(stage) == 4)
    stage.wait("every LID stands", lambda: stage.metric("wa_monitor_lid_rows") == 4)
    assert stage.command("wa-monitor", "audit").returncode == 1
    verify(stage)


def saved_fix_is_live(stage: Stage, good: bytes) -> None:
    save(stage, good)
    verify(stage)
    stage.bridge.post(chat_jid=NORTHFIELD, sender=LID, content="DR1000007 done")
    assert await_row(stage, "DR1000007") == (PHONE, PHONE, False)
    assert lids_stored(stage) == 4


def repair_changes_what_the_bug_wrote_and_nothing_else(stage: Stage) -> None:
    before = table(stage)
    repaired = stage.command("wa-monitor", "repair-lids")
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    after = table(stage)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    kept = stage.ask("SELECT review_id, drop_number, old_submitted_by FROM wa_monitor.repair")
    assert changed == {key for key, _, _ in kept}
    assert {(drop, old) for _, drop, old in kept} == {
        *(("DR1000001", LID), ("DR1000004", LID), ("DR1000005", OTHER_LID), ("DR1000006", OTHER_LID))
    }
    assert row_of(stage, "DR1000001") == (PHONE, PHONE, True)
    assert row_of(stage, "DR1000004") == (PHONE, PHONE, False)
    assert row_of(stage, "DR1000006") == (OTHER_PHONE, OTHER_PHONE, False)
    stage.wait("no LID stands", lambda: stage.metric("wa_monitor_lid_rows") == 0)
    assert stage.command("wa-monitor", "audit").returncode == 0


def test_incident(database_url: str, tmp_path: Path, not_checked: Callable[[str], None]) -> None:
    with Stage(tmp_path / "stage", url=database_url, build=build_script_tree) as stage:
        if os.geteuid() == 0:
            assert (stage.tree / IDENTITY).stat().st_uid == 0
        else:
            not_checked("the script tree belongs to the user who runs the tests, not to root")
        good = (stage.tree / IDENTITY).read_bytes()
        bad = incident.with_bug(good)
        with psycopg.connect(database_url) as connection:
            connection.execute((PACKAGE / "migrations" / "qa_photo_reviews.sql").read_bytes())
            connection.execute(FILLED.encode())
        others = table(stage)
        plain_restart_runs_the_old_code(stage, good, bad)
        good_code_serves(stage)
        saved_bug_is_live_counted_and_found(stage, bad)
        saved_fix_is_live(stage, good)
        repair_changes_what_the_bug_wrote_and_nothing_else(stage)
        assert others.items() <= table(stage).items()
        verify(stage)
