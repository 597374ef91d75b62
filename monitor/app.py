"""The monitor as a program: settings in, relay running, exit status out.

`monitor.app:main` is what a supervisor runs. The rule: starting is quick and plain. A new generation is
forked, attested and taken over while messages arrive, so nothing is imported here that only a person at a
terminal needs (typer, rich), and no database is started: a reload would end it. `wa-monitor run` has the
same options and calls the same `serve`.

Exit status: 0 after SIGTERM, SIGINT or a finished `--once`; 2 for settings that cannot be meant; 1 for
anything else that went wrong, with one sentence on stderr in both cases.
"""

import argparse
import gc
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType

from prometheus_client import REGISTRY

from monitor import logs
from monitor.errors import ConfigError, MonitorError
from monitor.metrics import MonitorMetrics
from monitor.notify import Notifier
from monitor.projects import ProjectsFile
from monitor.relay import Relay, Stop
from monitor.settings import Settings, Values, load

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main() -> None:
    """Run the monitor with the options in `sys.argv`; raises `SystemExit` unless it ended well."""
    status = _main(sys.argv[1:])
    if status:
        raise SystemExit(status)


_GC_THRESHOLDS = (50_000, 20, 100)
"""A batch makes tens of thousands of objects and no cycles: to look for some after each 700 objects, as is
usual, takes a tenth of the time."""


def serve(settings: Settings) -> None:
    """Run the relay until a signal or the end of `--once`.

    Raises `MonitorError` for what cannot be waited out.
    """
    projects = projects_of(settings)
    gc.set_threshold(*_GC_THRESHOLDS)
    logs.set_up(settings.log_level, full_numbers=settings.log_full_numbers, file=settings.log_file)
    metrics = MonitorMetrics()
    with (
        closing(Stop()) as stop,
        closing(Notifier()) as notifier,
        _exported(metrics, settings),
        _stopped_by_signal(stop),
    ):
        Relay(settings, projects, notifier=notifier, metrics=metrics, stop=stop).run()
        notifier.stopping()


def projects_of(settings: Settings) -> ProjectsFile:
    """Open the projects file; raises `ConfigError` if there is none or it cannot be meant."""
    if settings.projects is None:
        raise ConfigError("no projects file given; set WA_PROJECTS or --projects to projects.yaml")
    return ProjectsFile(settings.projects)


def fail(error: MonitorError) -> int:
    """Say on stderr what went wrong, and return the exit status for it."""
    sys.stderr.write(f"wa-monitor: {error}\n")
    return error.exit_code


def _main(arguments: Sequence[str]) -> int:
    try:
        flags, config = _parse(arguments)
        serve(load(flags, config=config))
    except MonitorError as error:
        return fail(error)
    return 0


def _parse(arguments: Sequence[str]) -> tuple[Values, Path | None]:
    """Read the flags; argparse ends the program with status 2 for one that it does not know."""
    parser = argparse.ArgumentParser(prog="monitor.app", allow_abbrev=False)
    parser.add_argument("--bridge", metavar="PATH", help="messages.db or the folder that holds it")
    parser.add_argument("--database-url", metavar="URL", help="PostgreSQL")
    parser.add_argument("--projects", metavar="FILE", help="projects.yaml")
    parser.add_argument(
        "--since", metavar="WHEN", help="where a first start begins: ISO time, beginning, now"
    )
    parser.add_argument("--adopt", metavar="STATE.JSON", help="the old monitor's state, for a first start")
    parser.add_argument(
        "--once", action="store_true", default=None, help="one pass over the backlog, then exit"
    )
    parser.add_argument("--listen", metavar="HOST:PORT", help="serve own /metrics (default off)")
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with the same keys")
    given = vars(parser.parse_args(arguments))
    config: Path | None = given.pop("config")
    return Values(**given), config


@contextmanager
def _stopped_by_signal(stop: Stop) -> Iterator[None]:
    """Ask for the end at SIGTERM and SIGINT; the handlers that were there come back afterwards."""

    def handler(_signal: int, _frame: FrameType | None) -> None:
        stop.request()

    previous = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


@contextmanager
def _exported(metrics: MonitorMetrics, settings: Settings) -> Iterator[None]:
    """Show the metrics in the process's registry, and on an address of our own if one is set.

    They stay registered: a supervisor asks for the last totals when the monitor has ended.
    """
    REGISTRY.register(metrics)
    if settings.listen is None:
        yield
        return
    # Imported here: under a supervisor there is one endpoint, and it is not ours.
    from monitor.endpoint import listening  # noqa: PLC0415

    with listening(settings.listen, REGISTRY):
        yield
