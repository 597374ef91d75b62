"""The tour: the main job on invented messages, each claim observed before it is printed.

The rule: a step is printed as done only when what it claims was seen through the public interfaces, within a
deadline; the first one that is not seen ends the tour with exit code 1 and says what was missing. Messages
keep arriving from the first step to the last, so "nothing lost, nothing doubled" is said of a busy system.

Without ``--once`` the stage stays up, messages keep coming, and the reader is told what to try.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psycopg
from rich.console import Console
from rich.table import Table
from rich.text import Text

from monitor.demo import incident
from monitor.demo.bridge import MAPPED_LIDS, NORTHFIELD, UNMAPPED_LID
from monitor.demo.compare import Comparison, compare
from monitor.demo.stage import DemoError, Stage, copy_monitor, refuse_used_database, script
from monitor.demo.stream import Stream
from monitor.errors import MonitorError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_IDENTITY: Final = Path("monitor", "identity.py")
_TARGET: Final = "monitor.app:main"
_OPTIONS: Final = (
    *("--type", "notify", "--handover", "overlap"),
    *("--show-metric", "wa_monitor_drops_stored_total{project,identity}", "--alarm", "wa_monitor_lid_rows"),
)
_SEED: Final = 20251111
_BACKLOG: Final = 60
_FIRST_DROP: Final = 1_000_001
_ALARM_DROP: Final = "DR7000001"
_TOUR_RATE: Final = 20.0
_STAY_RATE: Final = 1.0
_STAY_LOOK_SECONDS: Final = 0.5
_MORE_ROWS: Final = 20
_LIDS: Final = [lid for lid, _ in (*MAPPED_LIDS, UNMAPPED_LID)]
_LOG_COLUMNS: Final = 120
_ASK_PLAIN: Final = """\
import monitor.identity as identity
answer = identity.identify({lid!r}, {chat!r}, identity.Known(), identity.Rules())
print(type(answer).__name__, identity.__file__)
"""


def main(*, once: bool, folder: Path | None, listen: str) -> int:
    """Run the demo in ``folder``, or in a temporary one that is removed afterwards.

    ``listen`` is where the supervisor serves HTTP.

    ``once`` runs the scripted tour and ends; otherwise the demo stays until Ctrl-C. Returns the exit code: 0
    when everything was observed (or the stay was ended by Ctrl-C), 1 otherwise.
    """
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _LOG_COLUMNS)
    with _scratch(folder) as scratch, _interruptible():
        try:
            url = os.environ.get("DATABASE_URL") or os.environ.get("NEON_DATABASE_URL")
            if url:
                refuse_used_database(url)
            with Stage(scratch, url=url, listen=listen) as stage:
                stream = Stream(
                    stage.bridge,
                    seed=_SEED,
                    rate=_TOUR_RATE if once else _STAY_RATE,
                    first_drop=_FIRST_DROP,
                )
                backlog = stream.post(_BACKLOG)
                if once:
                    return _Tour(console, stage, stream, backlog_drops=len(backlog)).run()
                return _stay(console, stage, stream)
        except (MonitorError, psycopg.Error, sqlite3.Error) as error:
            print(f"wa-monitor demo: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            console.print("\nstopped")
            return 1 if once else 0


class _Tour:
    """The scripted steps; each method is one of them and raises ``DemoError`` when its claim is not seen."""

    def __init__(self, console: Console, stage: Stage, stream: Stream, *, backlog_drops: int) -> None:
        self._console = console
        self._backlog_drops = backlog_drops
        self._stage = stage
        self._stream = stream
        self._steps = 0
        self._identity = stage.tree / _IDENTITY
        self._good = self._identity.read_bytes()
        self._bad = incident.with_bug(self._good)

    def run(self) -> int:
        """Take all steps, then tell."""
        began = time.monotonic()
        self._console.print("[bold]wa-monitor, shown on invented messages[/]", end="   ")
        self._console.print(f"scratch folder {self._stage.folder}", markup=False)
        with self._stream:
            self._start()
            self._late_mapping()
            self._control_arm()
            self._bug_comes()
            self._alarm()
            self._bug_goes()
            self._repair()
            self._stream.stop()
            self._count()
        seconds = time.monotonic() - began
        self._console.print(f"\n[bold green]All {self._steps} steps observed[/] in {seconds:.0f} s.")
        return 0

    def _start(self) -> None:
        self._step(
            "Start",
            f"{_BACKLOG} messages wait in the bridge, more arrive; the monitor runs from a copy of its code",
        )
        began = time.monotonic()
        self._stage.supervise(_TARGET, options=_OPTIONS)
        self._seen(f"generation {self._live()['generation']} is live, its code proven, tree {self._tree()}")
        self._stage.wait("the backlog is stored", lambda: self._rows() >= self._backlog_drops)
        self._seen(f"{self._rows()} drops stored {time.monotonic() - began:.1f} s after the start")
        self._seen(f"http://{self._stage.address}/ is the status page, /metrics and /status.json answer")
        self._expect(
            "the audit finds no LID", self._stage.command("wa-monitor", "audit", "--allow-waiting"), 0
        )
        self._why("no phone is guessed: a sender is a phone only on the evidence of the bridge's own map")

    def _late_mapping(self) -> None:
        lid, phone = UNMAPPED_LID
        self._step("A LID without a phone", f"nobody knows yet who {lid} is")
        pending = "SELECT count(*) FROM public.qa_photo_reviews WHERE submitted_by IS NULL"
        known = "SELECT count(*) FROM public.qa_photo_reviews WHERE submitted_by = %s"
        waiting = self._stage.wait("a drop waits for its sender", lambda: self._stage.ask(pending)[0][0])
        self._seen(f"{waiting} drops are stored without a sender: not lost, not delayed, not mislabelled")
        self._stage.bridge.map_lid(lid, phone)
        began = time.monotonic()
        self._stage.wait("the waiting drops get their sender", lambda: not self._stage.ask(pending)[0][0])
        self._seen(
            f"{time.monotonic() - began:.1f} s after the bridge learnt the number, "
            f"{self._stage.ask(known, phone)[0][0]} drops carry {phone}"
        )
        self._why("unresolved is a state, never a value: a LID in a phone column cannot be told apart later")

    def _control_arm(self) -> None:
        self._step("Control: plain Python", "the edit of step 4 on another copy, and an ordinary restart")
        plain = self._stage.folder / "plain"
        copy_monitor(plain)
        target = plain / _IDENTITY
        before = self._ask_plain(plain)
        incident.overwrite(target, self._bad)
        after = self._ask_plain(plain)
        shutil.rmtree(target.parent / "__pycache__")
        fresh = self._ask_plain(plain)
        self._seen(f"before the edit, python says of {UNMAPPED_LID[0]}:  {before}")
        self._seen(f"after the edit, a new process still says:  {after}")
        self._seen(f"what stands in the file, once the cache is deleted:  {fresh}")
        if (before, after, fresh) != ("Lid", "Lid", "Phone"):
            raise DemoError(
                "plain Python did not run stale code here: this machine cannot show the difference"
            )
        self._why(
            "size and time of the file are unchanged, so Python trusts its cache: old code, and no error"
        )

    def _bug_comes(self) -> None:
        self._step(
            "The bug is saved",
            f"identity.py gets `{incident.BUG}`, its size and time stay",
        )
        self._save(self._bad)
        self._why(
            "the content counts: bytecode is purged, compiled anew, and the new process proves its code"
        )

    def _alarm(self) -> None:
        self._step("The alarm", "a message by a LID that the map knows; no guard in the store hides the bug")
        lid, phone = MAPPED_LIDS[0]
        self._stage.bridge.post(chat_jid=NORTHFIELD, sender=lid, content=f"{_ALARM_DROP} done")
        began = time.monotonic()
        question = "SELECT submitted_by FROM public.qa_photo_reviews WHERE drop_number = %s"
        stored = self._stage.wait("the drop is stored", lambda: self._stage.ask(question, _ALARM_DROP))[0][0]
        if stored != lid:
            raise DemoError(f"the bug is live, yet {_ALARM_DROP} was stored with {stored}, not with {lid}")
        self._seen(f"{_ALARM_DROP} is stored with submitted_by {stored}: the LID, not the phone {phone}")
        counted = self._stage.wait("the LID counter rises", self._lids_stored)
        standing = self._stage.wait("the LID gauge rises", lambda: self._stage.metric("wa_monitor_lid_rows"))
        self._seen(
            f"{time.monotonic() - began:.1f} s after the message was posted: "
            f'wa_monitor_drops_stored_total{{identity="lid"}} {counted:.0f}, '
            f"wa_monitor_lid_rows {standing:.0f}"
        )
        self._expect(
            "the audit reports LIDs", self._stage.command("wa-monitor", "audit", "--allow-waiting"), 1
        )
        self._why("a row is judged after the write, against the map, by code that does not ask the resolver")

    def _bug_goes(self) -> None:
        self._step("The fix is saved", "the old text again; same size, same time")
        self._save(self._good)
        self._expect("wa-supervisor verify: running code is the code on disk", self._verify(), 0)
        known = [drop for (drop,) in self._stage.ask("SELECT drop_number FROM public.qa_photo_reviews")]
        fresh = (
            "SELECT count(*), count(*) FILTER (WHERE submitted_by = ANY(%s) OR user_name = ANY(%s))"
            " FROM public.qa_photo_reviews WHERE drop_number <> ALL(%s)"
        )
        stored, wrong = self._stage.wait(
            "drops are stored by the fixed code",
            lambda: next(
                (row for row in self._stage.ask(fresh, _LIDS, _LIDS, known) if row[0] >= _MORE_ROWS), None
            ),
        )
        if wrong:
            raise DemoError(f"{wrong} of {stored} new drops were stored with a LID although the fix is live")
        self._seen(f"{stored} more drops stored, not one with a LID")
        self._why("no restart by hand, no cache to clear, and the claim is checked in the running process")

    def _repair(self) -> None:
        self._step("Repair", "the rows that the bug wrote get their phones; the old values are kept")
        standing = self._stage.metric("wa_monitor_lid_rows")
        self._expect("wa-monitor repair-lids", self._stage.command("wa-monitor", "repair-lids"), 0)
        self._stage.wait("no LID stands", lambda: self._stage.metric("wa_monitor_lid_rows") == 0)
        self._seen(f"LIDs standing: {standing:.0f} before, 0 after")
        self._expect(
            "the audit finds no LID", self._stage.command("wa-monitor", "audit", "--allow-waiting"), 0
        )
        self._why("what a bug wrote while it was live is found by the map, not by the length of a number")

    def _count(self) -> None:
        self._step("The count", "the bridge's file against PostgreSQL, after all of this")
        self._stage.wait("both sides agree", lambda: all(line.complete for line in self._compare()))
        table = Table("   project", box=None, pad_edge=False)
        for heading in ("messages", "drops posted", "in ledger", "drops", "rows", "lost", "doubled", "LIDs"):
            table.add_column(heading, justify="right")
        lines = self._compare()
        for line in lines:
            numbers = (
                *(line.messages_total, line.posts_total, line.events_total, line.drops_total),
                *(line.rows_total, len(line.lost), len(line.doubled), line.lids_total),
            )
            table.add_row(f"   {line.project}", *map(str, numbers))
        self._console.print(table)
        if any(line.lids_total for line in lines):
            raise DemoError("LIDs stand in the table although they were repaired")
        self._why("two reloads under load: every drop stored once, no LID left")

    def _save(self, content: bytes) -> None:
        """Save the one file and wait for the reload that it causes."""
        before = self._live()
        incident.overwrite(self._identity, content)
        status = self._stage.wait("the save is live", lambda: self._reloaded(before["tree"]))
        reload = status["last_reload"]
        if reload["outcome"] != "live":
            raise DemoError(f"the save was seen and its outcome is {reload['outcome']}: {reload}")
        stages = "  ".join(f"{name} {seconds * 1000:.0f}" for name, seconds in reload["stages"].items())
        self._seen(
            f"reload {reload['outcome']}: triggered by {reload['trigger']} on {', '.join(reload['paths'])},"
            f" {reload['total_seconds'] * 1000:.0f} ms from change to live"
        )
        self._seen(f"its stages in ms: {stages}")
        self._seen(
            f"generation {before['generation']} handed over to {status['live']['generation']},"
            f" tree {self._tree()}"
        )

    def _reloaded(self, old_tree: str) -> dict[str, Any] | None:
        status = self._stage.status()
        live = status["live"]
        alone = live is not None and not status["draining"]
        return status if status["in_sync"] and alone and live["tree"] != old_tree else None

    def _verify(self) -> subprocess.CompletedProcess[str]:
        return self._stage.command("wa-supervisor", "verify")

    def _ask_plain(self, plain: Path) -> str:
        """Ask a fresh, ordinary interpreter who the unmapped LID is; it runs the copy below ``plain``."""
        done = subprocess.run(
            [sys.executable, "-c", _ASK_PLAIN.format(lid=UNMAPPED_LID[0], chat=NORTHFIELD)],
            check=False,
            cwd=plain,
            env=self._stage.environment | {"PYTHONPATH": str(plain)},
            capture_output=True,
            text=True,
        )
        answer, _, origin = done.stdout.strip().partition(" ")
        if done.returncode != 0 or Path(origin) != plain / _IDENTITY:
            raise DemoError(f"plain Python did not run the copy in {plain}: {done.stderr.strip() or origin}")
        return answer

    def _live(self) -> dict[str, Any]:
        live: dict[str, Any] = self._stage.status()["live"]
        return live

    def _tree(self) -> str:
        return str(self._live()["tree"])[:12]

    def _rows(self) -> int:
        return int(self._stage.ask("SELECT count(*) FROM public.qa_photo_reviews")[0][0])

    def _compare(self) -> list[Comparison]:
        return compare(self._stage.bridge.messages_db, self._stage.bridge.whatsapp_db, self._stage.url)

    def _lids_stored(self) -> float:
        return self._stage.metric("wa_monitor_drops_stored_total", identity="lid")

    def _expect(self, what: str, done: subprocess.CompletedProcess[str], code: int) -> None:
        """Print what a command is seen to say; any other exit code ends the tour."""
        if done.returncode != code:
            output = (done.stderr or done.stdout).strip().splitlines()
            raise DemoError(f"{what}: exit code {done.returncode} instead of {code}: {' '.join(output[-1:])}")
        self._seen(f"{what} (exit code {code})")

    def _step(self, name: str, what: str) -> None:
        self._steps += 1
        self._console.print(f"\n[bold]{self._steps}  {name}[/]")
        self._line("", what)

    def _seen(self, what: str) -> None:
        self._line("seen", what, style="green")

    def _why(self, what: str) -> None:
        self._line("why", what, style="dim")

    def _line(self, label: str, text: str, *, style: str = "") -> None:
        """Print a text that keeps its indent when it is longer than the screen is wide."""
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=7, justify="right", style=style)
        grid.add_column()
        grid.add_row(label, Text(text))
        self._console.print(grid)


def _stay(console: Console, stage: Stage, stream: Stream) -> int:
    """Keep the stage up until Ctrl-C, say what to try, and report what happens."""
    with stream:
        stage.supervise(_TARGET, options=_OPTIONS)
        _print_invitation(console, stage)
        ended = threading.Event()
        reported: Any = stage.status()["last_reload"]
        lids = 0.0
        while not ended.wait(_STAY_LOOK_SECONDS):
            latest, standing = stage.status()["last_reload"], stage.metric("wa_monitor_lid_rows")
            if latest != reported:
                reported = latest
                paths, took = ", ".join(latest["paths"]), latest["total_seconds"] * 1000
                console.print(f"reload: {latest['outcome']}, {paths}, {took:.0f} ms", markup=False)
            if standing != lids:
                lids = standing
                console.print(f"LIDs standing in the table: {standing:.0f}", markup=False)
    return 0


def _print_invitation(console: Console, stage: Stage) -> None:
    identity = stage.tree / _IDENTITY
    line = incident.line_of_bug(identity.read_bytes())
    names = ("DATABASE_URL", "WHATSAPP_DB_PATH", "WA_PROJECTS")
    setting = " ".join(f"{name}={shlex.quote(stage.environment[name])}" for name in names)
    supervisor = shlex.quote(os.path.relpath(script("wa-supervisor")))
    monitor = shlex.quote(os.path.relpath(script("wa-monitor")))
    run_dir = shlex.quote(str(stage.run_dir))
    rows = (
        ("look", f"http://{stage.address}/"),
        ("", f"{supervisor} status --runtime-dir {run_dir}"),
        ("break it", f"in {identity}"),
        ("", f"insert below line {line}, in decide():"),
        ("", f"    {incident.BUG}"),
        ("", "save: the reload and the LIDs it stores are reported below; take the line out again and save"),
        ("prove it", f"{supervisor} verify --runtime-dir {run_dir}"),
        ("mend it", f"{setting} {monitor} audit    (and repair-lids)"),
        ("stop", "Ctrl-C; everything ends and the folder is removed unless you named it with --folder"),
    )
    console.print(f"[bold]wa-monitor runs on invented messages, {_STAY_RATE:.0f} a second[/]   try this:\n")
    for name, text in rows:
        console.print(f"{name:>10}  {text}", markup=False)
    console.print()


@contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    """Give the folder that was named, or one that lives as long as the demo."""
    if folder is not None:
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="wa-demo-", ignore_cleanup_errors=True) as made:
            yield Path(made)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Take SIGTERM and a closed terminal like Ctrl-C, so that everything is ended and removed."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    wanted = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(TypeError):  # a handler that was not installed from Python cannot be put back
                signal.signal(number, handler)
