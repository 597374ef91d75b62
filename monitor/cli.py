"""`wa-monitor`: the command line for people.

The rule: this module turns arguments into settings and results into text, and decides nothing. What a
service needs is in `app`, which a supervisor runs without this module and its libraries. A fault is one
sentence on stderr, without a traceback: exit status 2 for what was asked wrongly, 1 for what failed, and for
an audit, a reconciliation or an explanation that found what should not be, or nothing at all.

Without a database URL the commands use an embedded PostgreSQL in the state directory, for as long as they
run.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress

from monitor import app as program
from monitor import census, check, display, repair, schema
from monitor.audit import audit
from monitor.bridge import Bridge
from monitor.database import Database, connect
from monitor.decision import Decider
from monitor.drops import find_drops
from monitor.errors import ConfigError, MonitorError
from monitor.explain import explain
from monitor.reconcile import reconcile
from monitor.settings import DatabaseUrl, Settings, Values, load, parse_since

commands = typer.Typer(
    name="wa-monitor",
    help="Turns drops that are posted on WhatsApp into rows of PostgreSQL, with the sender's phone number.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Bridge = Annotated[
    str | None,
    typer.Option(
        "--bridge", metavar="PATH", help="messages.db, or the folder that holds it. Env: WHATSAPP_DB_PATH"
    ),
]
_Url = Annotated[
    str | None,
    typer.Option(
        "--database-url", metavar="URL", help="PostgreSQL; without it an embedded one. Env: DATABASE_URL"
    ),
]
_Projects = Annotated[
    str | None, typer.Option("--projects", metavar="FILE", help="projects.yaml. Env: WA_PROJECTS")
]
_AsJson = Annotated[bool, typer.Option("--json", help="Print the findings as JSON")]
_Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="TOML file; every flag is a key")
]


def main() -> None:
    """Run the command line."""
    commands()


@commands.command()
def run(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    projects: _Projects = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="Where a first start begins: ISO time, beginning, now. Env: WA_SINCE"
        ),
    ] = None,
    adopt: Annotated[
        str | None,
        typer.Option(metavar="STATE.JSON", help="First start: go on where the old monitor was, with overlap"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="One pass over the backlog, then exit")] = False,
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve own /metrics (default off)")
    ] = None,
    config: _Config = None,
) -> None:
    """Relay drops until stopped: the monitor alone, in a terminal or under systemd."""
    flags = Values(
        bridge=bridge,
        database_url=database_url,
        projects=projects,
        since=since,
        adopt=adopt,
        once=once or None,
        listen=listen,
    )
    with _faults_said():
        given = load(flags, config=config)
        program.projects_of(given)
        is_told = given.since is not None or given.adopt is not None
        if given.database_url is None and not is_told and not _embedded_exists():
            raise ConfigError(
                "a first start; say where to begin with --since or WA_SINCE (an ISO time with offset,"
                " `beginning` or `now`) or with --adopt STATE.JSON"
            )
        with _with_database(given) as settings:
            program.serve(settings)


@commands.command("check")
def check_command(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    projects: _Projects = None,
    as_json: _AsJson = False,
    config: _Config = None,
) -> None:
    """Look whether all that a monitor needs is there, and change nothing; exit status 1 for what is wrong."""
    findings = check.check(Values(bridge=bridge, database_url=database_url, projects=projects), config)
    if as_json:
        typer.echo(check.to_json(findings).decode())
    else:
        display.show_check(findings)
    raise typer.Exit(1 if any(one.state == "wrong" for one in findings) else 0)


@commands.command("repair-lids")
def repair_lids(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, change nothing")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Only rows of messages sent from then on: ISO time")
    ] = None,
    undo: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Put back what that run replaced and nobody changed since"),
    ] = None,
    config: _Config = None,
) -> None:
    """Replace LIDs that stand where a phone belongs by the phone that the bridge's map gives for them."""
    with _faults_said():
        if undo is not None and (dry_run or since is not None):
            raise ConfigError("--undo goes without --dry-run and --since: it puts back a whole run")
        with _opened(Values(bridge=bridge, database_url=database_url), config) as (
            settings,
            reader,
            database,
        ):
            if dry_run:
                schema.check_reviews(database)
            else:
                schema.prepare(database)
            if undo is not None:
                display.show_undone(repair.undo(database, undo))
                return
            with _progress() as progress:
                report = repair.repair(
                    database, reader.known(), dry_run=dry_run, since=_instant(since), progress=progress
                )
            display.show_repair(report, full_numbers=settings.log_full_numbers)
            raise typer.Exit(1 if report.refused else 0)


@commands.command("audit")
def audit_command(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    as_json: _AsJson = False,
    since: Annotated[
        str | None, typer.Option(metavar="WHEN", help="List the drops stored from then on: ISO time")
    ] = None,
    allow_waiting: Annotated[
        bool, typer.Option("--allow-waiting", help="Drops that wait for their sender are no failure")
    ] = False,
    accept_foreign: Annotated[
        bool, typer.Option("--accept-foreign", help="First take rows of other writers as they are")
    ] = False,
    config: _Config = None,
) -> None:
    """Say whether a LID stands in the table, and by which code; exit status 1 for what is wrong."""
    with (
        _faults_said(),
        _opened(Values(bridge=bridge, database_url=database_url), config) as (settings, reader, database),
    ):
        known = reader.known()
        schema.require(database)
        schema.check_reviews(database)
        if accept_foreign:
            adopted = census.adopt_rows(database, settings.source)
            typer.echo(f"{adopted} rows of other writers were adopted", err=True)
        findings = audit(database, known, since=_instant(since), allow_waiting=allow_waiting)
        if as_json:
            typer.echo(findings.to_json().decode())
        else:
            display.show_findings(
                findings, full_numbers=settings.log_full_numbers, zone=settings.business_zone
            )
        raise typer.Exit(1 if findings.failed else 0)


@commands.command("explain")
def explain_command(
    *,
    drop: Annotated[str, typer.Argument(metavar="DR…", help="A drop number, as in DR1000001")],
    bridge: _Bridge = None,
    database_url: _Url = None,
    projects: _Projects = None,
    config: _Config = None,
) -> None:
    """Say what is known of a drop and of every message that names it; exit status 1 if there is no trace."""
    flags = Values(bridge=bridge, database_url=database_url, projects=projects)
    with _faults_said(), _opened(flags, config) as (settings, reader, database):
        found = find_drops(drop, extra_separators=True, min_digits=5, max_digits=12).numbers
        if len(found) != 1:
            raise ConfigError(f"{drop!r} is no drop number; give one as DR1000001")
        schema.require(database)
        explanation = explain(
            found[0],
            database,
            reader,
            decider=Decider.of(settings, program.projects_of(settings).projects),
            known=reader.known(),
            source=settings.source,
        )
        display.show_explanation(
            explanation, full_numbers=settings.log_full_numbers, zone=settings.business_zone
        )
        raise typer.Exit(0 if explanation.seen else 1)


@commands.command("reconcile")
def reconcile_command(
    *,
    since: Annotated[
        str, typer.Option(metavar="WHEN", help="Messages sent from then on: ISO time, beginning")
    ],
    bridge: _Bridge = None,
    database_url: _Url = None,
    projects: _Projects = None,
    as_json: _AsJson = False,
    config: _Config = None,
) -> None:
    """Compare the bridge with PostgreSQL, message by message; exit status 1 for any difference."""
    flags = Values(bridge=bridge, database_url=database_url, projects=projects)
    with _faults_said(), _opened(flags, config) as (settings, reader, database):
        schema.require(database)
        comparison = reconcile(
            database,
            reader,
            Decider.of(settings, program.projects_of(settings).projects),
            reader.known(),
            source=settings.source,
            since=_instant(since),
        )
        if as_json:
            typer.echo(comparison.to_json().decode())
        else:
            display.show_comparison(comparison, zone=settings.business_zone)
        raise typer.Exit(1 if comparison.failed else 0)


@commands.command()
def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="A scripted tour that ends by itself")] = False,
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Work here and keep it")] = None,
    listen: Annotated[
        str,
        typer.Option(metavar="HOST:PORT", help="Where the supervisor serves its metrics; port 0 picks one"),
    ] = "127.0.0.1:0",
) -> None:
    """Show the whole product on invented messages: a save, a reload, the proof, the bug, the repair."""
    from monitor.demo import tour  # noqa: PLC0415 -- only this command needs it

    with _faults_said():
        raise typer.Exit(tour.main(once=once, folder=folder, listen=listen))


@contextmanager
def _faults_said() -> Iterator[None]:
    """Turn an error of ours into its sentence and its exit status."""
    try:
        yield
    except MonitorError as error:
        _exit(program.fail(error))


def _exit(status: int) -> NoReturn:
    raise typer.Exit(status)


@contextmanager
def _opened(flags: Values, config: Path | None) -> Iterator[tuple[Settings, Bridge, Database]]:
    """Yield settings, bridge and a database that exists; the bridge must be readable before anything else."""
    with (
        _with_standing_database(load(flags, config=config)) as settings,
        closing(Bridge(settings.bridge)) as reader,
    ):
        reader.known()
        with closing(connect(settings.database_url)) as database:
            yield settings, reader, database


def _instant(since: str | None) -> datetime | None:
    return None if since is None else parse_since(since).instant


@contextmanager
def _progress() -> Iterator[repair.Progress]:
    """Yield what draws a bar on a terminal, on stderr, while there is something to do."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("rows", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def _with_database(settings: Settings) -> Iterator[Settings]:
    """Yield the settings with a database: the one that they name, or an embedded one while the block runs."""
    if settings.database_url is not None:
        yield settings
        return
    # Imported here: with a database of one's own, the wheel need not even be installed.
    from monitor.embedded import EmbeddedPostgres  # noqa: PLC0415

    with EmbeddedPostgres(_embedded_directory()) as server:
        typer.echo(f"embedded PostgreSQL: {server.url} (DATABASE_URL for other commands meanwhile)", err=True)
        yield replace(settings, database_url=DatabaseUrl(server.url))


@contextmanager
def _with_standing_database(settings: Settings) -> Iterator[Settings]:
    """Do as `_with_database`, but never create a database: there would be nothing in it to look at."""
    if settings.database_url is None and not _embedded_exists():
        raise ConfigError(
            f"no database given, and no embedded one in {_embedded_directory()};"
            " set DATABASE_URL or --database-url"
        )
    with _with_database(settings) as found:
        yield found


def _embedded_exists() -> bool:
    return (_embedded_directory() / "cluster").is_dir()


def _embedded_directory() -> Path:
    return _state_directory() / "postgres"


def _state_directory() -> Path:
    """Return where the embedded database is kept: systemd's state directory, else the user's."""
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "wa-monitor"
