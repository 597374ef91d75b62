"""The stage of the demo: a folder with an invented bridge, a database, a copied monitor, a supervisor.

The rule: the supervisor and the monitor are used as a stranger would use them, by their commands,
``/status.json`` and ``/metrics``; nothing here imports the one or looks inside the other. So what the tour
observes, anybody can.

Layout of the folder: ``tree/monitor/`` the copy that is watched and edited, ``bridge/``, ``projects.yaml``,
``postgres/``, ``run/`` and ``state/`` of the supervisor, ``supervisor.log``. What starts here ends with the
process that started it, even by ``kill -9``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.request import urlopen

import psycopg
from prometheus_client.parser import text_string_to_metric_families

from monitor.demo.bridge import PROJECTS_YAML, SyntheticBridge, fill_map
from monitor.embedded import EmbeddedPostgres
from monitor.errors import MonitorError
from monitor.owned import owned

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

PATIENCE_SECONDS: Final = 15.0
_LOOK_SECONDS: Final = 0.03
_ANSWER_SECONDS: Final = 5.0
_PACKAGE: Final = Path(__file__).parents[1]

# What of the caller's environment would change the demo: where things are, who listens, how Python behaves.
_NOT_PASSED_ON: Final = (
    *(
        "DATABASE_URL",
        "NEON_DATABASE_URL",
        "WHATSAPP_DB_PATH",
        "WA_PROJECTS",
        "WA_SINCE",
        "WA_SOURCE",
        "WA_LISTEN",
    ),
    *("WA_AUTO_REPAIR", "WA_BUSINESS_ZONE", "WA_DATABASE_IDENTITY"),
    *("WA_LEASE", "SCAN_INTERVAL", "LOG_LEVEL", "LOG_FILE", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"),
    *("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "PROMETHEUS_MULTIPROC_DIR"),
    *("PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONPYCACHEPREFIX", "PYTHONOPTIMIZE"),
)

_T = TypeVar("_T")


class DemoError(MonitorError):
    """Something that the demo promised to show did not happen; the sentence says what, and where to look."""

    label = "demo"


def copy_monitor(tree: Path) -> None:
    """Copy the installed ``monitor`` below ``tree``, times kept, without bytecode and without the demo."""
    shutil.copytree(_PACKAGE, tree / "monitor", ignore=shutil.ignore_patterns("__pycache__", "demo"))


def script(name: str) -> str:
    """Return the path of one of our commands: beside the interpreter that runs this.

    Raises ``DemoError`` when it is not installed there.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise DemoError(
            f"the command {name} is not beside {sys.executable}: install wa-monitor into this environment"
        )
    return str(path)


def refuse_used_database(url: str) -> None:
    """Keep invented messages out of a database that somebody uses.

    Raises ``DemoError`` when it holds a table of the monitor or does not answer; the URL is not quoted.
    """
    try:
        with psycopg.connect(url, connect_timeout=10) as connection:
            row = connection.execute(
                "SELECT to_regclass('public.qa_photo_reviews') IS NOT NULL"
                " OR to_regnamespace('wa_monitor') IS NOT NULL"
            ).fetchone()
    except psycopg.Error as error:
        kind = type(error).__name__  # the text may quote the URL
        raise DemoError(
            f"the database of DATABASE_URL cannot be used ({kind}): correct or unset the variable"
        ) from None
    if row is not None and row[0]:
        raise DemoError(
            "the database of DATABASE_URL holds tables of a monitor, and the demo writes invented messages: "
            "give an empty database, or unset DATABASE_URL to use an embedded one"
        )


class Stage:
    """Builds the scratch folder, starts PostgreSQL and the supervisor, and ends both at the end of the block.

    ``url`` is a database to use instead of an embedded one, ``listen`` is the supervisor's address. ``build``
    puts the code below the folder ``tree``. Entering raises ``DemoError`` or another ``MonitorError``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        url: str | None = None,
        listen: str = "127.0.0.1:0",
        build: Callable[[Path], None] = copy_monitor,
    ) -> None:
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100 -- resolve() would follow links
        self.tree = self.folder / "tree"
        self.bridge = SyntheticBridge(self.folder / "bridge")
        self.run_dir = self.folder / "run"
        self.log = self.folder / "supervisor.log"
        self.url = url or ""
        self._listen = listen
        self._build_tree = build
        self._resources = ExitStack()
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._address = ""

    def __enter__(self) -> Self:
        with ExitStack() as resources:
            self._build()
            if not self.url:
                self.url = resources.enter_context(EmbeddedPostgres(self.folder / "postgres")).url
            resources.callback(self._stop_supervisor)
            self._resources = resources.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    @property
    def address(self) -> str:
        """Host and port of the supervisor's page."""
        return self._address

    @property
    def environment(self) -> dict[str, str]:
        """The environment that everything on the stage runs in."""
        passed_on = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        return passed_on | {
            "DATABASE_URL": self.url,
            "WHATSAPP_DB_PATH": str(self.bridge.messages_db),
            "WA_PROJECTS": str(self.folder / "projects.yaml"),
            "WA_SINCE": "beginning",
            "WA_AUTO_REPAIR": "0",  # who plays with the bug repairs by hand, and sees it
        }

    def supervise(self, *target: str, options: tuple[str, ...] = ()) -> None:
        """Start the supervisor over the tree and wait until a generation is live and proven.

        ``target`` is what it runs and the arguments of that, ``options`` are more flags of ``wa-supervisor
        run``.
        """
        command = [
            *(script("wa-supervisor"), "run", *options, "--listen", self._listen),
            *("--runtime-dir", str(self.run_dir), "--state-dir", str(self.folder / "state"), *target),
        ]
        with self.log.open("ab") as log:
            self._supervisor = subprocess.Popen(
                owned(command, death_signal=signal.SIGTERM),
                cwd=self.tree,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the tour, which then stops the supervisor in order
            )
        self._address = self.wait("the supervisor answers", self._listens)
        self.wait("a generation is live and proven", lambda: self.status()["in_sync"])

    def command(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of our commands to its end, as in a terminal beside the supervisor."""
        runtime = ("--runtime-dir", str(self.run_dir)) if name == "wa-supervisor" else ()
        try:
            return subprocess.run(
                [script(name), *arguments, *runtime],
                check=False,
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=PATIENCE_SECONDS,
            )
        except subprocess.TimeoutExpired:
            words = " ".join((name, *arguments))
            raise DemoError(f"`{words}` did not end within {PATIENCE_SECONDS:.0f} s") from None

    def status(self) -> dict[str, Any]:
        """Read ``/status.json``."""
        status: dict[str, Any] = json.loads(self._get("/status.json"))
        return status

    def metric(self, name: str, **labels: str) -> float:
        """Add up the samples called ``name`` that carry these labels; 0 when there is none."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self._get("/metrics"))
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def ask(self, question: str, *values: object) -> list[tuple[Any, ...]]:
        """Ask PostgreSQL."""
        with psycopg.connect(self.url) as connection:
            return connection.execute(question.encode(), values or None).fetchall()

    def wait(
        self, what: str, look: Callable[[], _T | None], *, limit_seconds: float = PATIENCE_SECONDS
    ) -> _T:
        """Look again and again until something is seen, and return it.

        Raises ``DemoError`` when it is not seen within ``limit_seconds``, or when the supervisor has ended.
        """
        deadline = time.monotonic() + limit_seconds
        while not (seen := look()):
            self._raise_if_ended()
            if time.monotonic() > deadline:
                raise DemoError(f"not observed within {limit_seconds:.0f} s: {what}; {self._last_words()}")
            time.sleep(_LOOK_SECONDS)
        return seen

    def _build(self) -> None:
        if self.tree.exists():
            raise DemoError(f"{self.folder} holds an earlier demo: give another folder or remove that one")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._build_tree(self.tree)
        self.bridge.create()
        fill_map(self.bridge)
        (self.folder / "projects.yaml").write_text(PROJECTS_YAML, encoding="utf-8")

    def _listens(self) -> str | None:
        answer = self.command("wa-supervisor", "status", "--json")
        listen = json.loads(answer.stdout).get("listen") if answer.returncode == 0 else None
        return listen if isinstance(listen, str) else None

    def _get(self, path: str) -> str:
        try:
            with urlopen(f"http://{self._address}{path}", timeout=_ANSWER_SECONDS) as answer:
                return str(answer.read().decode())
        except OSError as error:  # of which URLError is one
            self._raise_if_ended(patience_seconds=_ANSWER_SECONDS)
            raise DemoError(
                f"http://{self._address}{path} does not answer: {error}; {self._last_words()}"
            ) from error

    def _raise_if_ended(self, *, patience_seconds: float = 0.0) -> None:
        """Raise ``DemoError`` if the supervisor has ended, or ends within ``patience_seconds``."""
        if self._supervisor is not None:
            with suppress(subprocess.TimeoutExpired):
                code = self._supervisor.wait(patience_seconds)
                raise DemoError(f"the supervisor ended with exit code {code}: {self._last_words()}")

    def _last_words(self) -> str:
        """Return where the log is and its last line."""
        lines = (
            self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.exists() else []
        )
        last = next((line.strip() for line in reversed(lines) if line.strip()), "nothing")
        return f"the last line of {self.log} is: {last}"

    def _stop_supervisor(self) -> None:
        if self._supervisor is None:
            return
        self._supervisor.send_signal(signal.SIGTERM)
        try:
            self._supervisor.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        self._supervisor = None
