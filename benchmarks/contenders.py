"""Contenders: what is compared, how each is started, and which settings it is given.

The rule: each gets the program in the form it is made for, and of its own settings those its documentation
recommends; file events wherever it can use them. Everything else is left as it comes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
OURS = Path(sys.executable).parent
PEERS = Path(os.environ.get("BENCH_PEERS", ROOT / ".venv-peers")).absolute() / "bin"

Family = Literal["ours", "replaces", "patches"]
"""A peer replaces the process by one of the new code, or patches the process that runs."""


@dataclass(frozen=True)
class Place:
    """Folders and files of one run.

    Attributes:
        tree: the code; the working directory.
        state: what a contender may keep from one run to the next.
        scratch: sockets and settings of this run alone.
    """

    tree: Path
    state: Path
    scratch: Path


@dataclass(frozen=True)
class Contender:
    """One way to run the program and to keep it on the code that was saved.

    Attributes:
        package: on PyPI, None if it is ours.
        settings: how it was started, for people.
        command: that starts it.
        after_save: command that has to follow each save, if it does not look at files itself.
        prepare: writes its settings.
        polls_seconds: how long it may take until it looks at the files again; 0 if it is told.
        rest_seconds: how long after its start it does not notice changes.
    """

    name: str
    family: Family
    package: str | None
    settings: str
    command: Callable[[Place], Sequence[str | Path]]
    after_save: Callable[[Place], Sequence[str | Path]] | None = None
    prepare: Callable[[Place], object] | None = None
    polls_seconds: float = 0.0
    rest_seconds: float = 0.0

    @property
    def zygote(self) -> bool:
        """It is ours, with a zygote."""
        return "zygote" in self.name


def has_zygote() -> bool:
    """Return whether this supervisor can be told to do without a zygote, so that it has one."""
    wide = {**os.environ, "COLUMNS": "200", "TERM": "dumb"}
    done = subprocess.run(
        [OURS / "wa-supervisor", "run", "--help"], env=wide, check=True, capture_output=True, text=True
    )
    return "--no-zygote" in done.stdout


def ours(name: str, *options: str) -> Contender:
    """Return the supervisor with these options."""
    given = ("--type=notify", "--watchdog=0", *options)

    def command(place: Place) -> Sequence[str | Path]:
        folders = (f"--runtime-dir={place.scratch}", f"--state-dir={place.state}")
        listen = ("--watch=.", "--listen=127.0.0.1:0")
        return (OURS / "wa-supervisor", "run", *folders, *listen, *given, "main:main")

    shown = " ".join(("wa-supervisor run", *given, "main:main"))
    return Contender(f"wa-supervisor, {name}", "ours", None, f"`{shown}`", command)


def our_ways() -> list[Contender]:
    """Return the supervisor in all ways that this version knows; others are compared with the first."""
    if not has_zygote():
        return [ours("cold, replace"), ours("cold, overlap", "--handover=overlap")]
    return [
        ours("zygote, replace"),
        ours("zygote, overlap", "--handover=overlap"),
        ours("cold, replace", "--no-zygote"),
    ]


def _supervisord(place: Place) -> None:
    socket = place.scratch / "s"
    (place.scratch / "supervisord.conf").write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={place.scratch / 'log'}\npidfile={place.scratch / 'pid'}\n"
        f"[unix_http_server]\nfile={socket}\n[supervisorctl]\nserverurl=unix://{socket}\n"
        "[rpcinterface:supervisor]\n"
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
        f"[program:main]\ncommand={PEERS / 'python'} main.py\ndirectory={place.tree}\n",
        encoding="utf-8",
    )


def peers() -> list[Contender]:
    """Return what we are compared with."""
    python = PEERS / "python"
    return [
        Contender(
            "uvicorn",
            "replaces",
            "uvicorn",
            "`--reload`, installed as `uvicorn[standard]`, so with watchfiles, uvloop and httptools",
            lambda _: (python, "-m", "uvicorn", "web_asgi:application", "--reload", "--port=0"),
        ),
        Contender(
            "gunicorn",
            "replaces",
            "gunicorn",
            "`--reload --reload-engine=inotify`, one worker",
            lambda _: (
                *(python, "-m", "gunicorn", "--reload", "--reload-engine=inotify", "--workers=1"),
                *("--no-control-socket", "--bind=127.0.0.1:0", "web_wsgi:application"),
            ),
        ),
        Contender(
            "watchfiles",
            "replaces",
            "watchfiles",
            "`watchfiles --filter python 'python main.py' .`",
            lambda _: (python, "-m", "watchfiles", "--filter", "python", f"{python} main.py", "."),
        ),
        Contender(
            "hupper",
            "replaces",
            "hupper",
            "`hupper -m main`, with watchdog installed, so with file events; for a second after a start "
            "it does not watch what was imported, so it is left in peace as long",
            lambda _: (PEERS / "hupper", "-m", "main"),
            polls_seconds=1.0,
            rest_seconds=1.5,
        ),
        Contender(
            "Django runserver",
            "replaces",
            "Django",
            "`manage.py runserver`, its own reloader, which looks once a second; it misses what is saved "
            "within a second of a start, so it is left in peace as long",
            lambda _: (python, "manage.py", "runserver", "127.0.0.1:0"),
            polls_seconds=1.0,
            rest_seconds=1.2,
        ),
        Contender(
            "supervisord",
            "replaces",
            "supervisor",
            "its defaults; `supervisorctl restart main` is started right after each save",
            lambda place: (PEERS / "supervisord", "-c", place.scratch / "supervisord.conf"),
            after_save=lambda place: (
                *(PEERS / "supervisorctl", "-c", place.scratch / "supervisord.conf"),
                *("restart", "main"),
            ),
            prepare=_supervisord,
        ),
        Contender(
            "jurigged",
            "patches",
            "jurigged",
            "`jurigged -w . main.py`, its defaults",
            lambda _: (python, "-m", "jurigged", "-w", ".", "main.py"),
        ),
    ]


def alone() -> Contender:
    """Return the program without anybody who looks after it: what memory and time it takes itself."""
    return Contender(
        "the program alone", "replaces", None, "`python main.py`", lambda _: (PEERS / "python", "main.py")
    )
