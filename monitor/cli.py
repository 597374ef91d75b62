"""`wa-monitor`: the command line for people.

The rule: this module turns arguments into settings and results into text, and decides nothing. What a
service needs is in `app`, which a supervisor runs without this module and its libraries. A fault is one
sentence on stderr, without a traceback: exit status 2 for what was asked wrongly, 1 for what failed or for
an audit that found a LID or a dead letter.

Without a database URL the commands use an embedded PostgreSQL in the state directory, for as long as they
run.
"""

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from monitor import app as program
from monitor import schema
from monitor.audit import Findings, audit
from monitor.bridge import Bridge
from monitor.database import connect
from monitor.errors import ConfigError, MonitorError
from monitor.logs import mask_numbers
from monitor.repair import Report, repair
from monitor.settings import DatabaseUrl, Settings, Values, load
from monitor.store import BUSINESS_ZONE

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
    projects: Annotated[
        str | None, typer.Option(metavar="FILE", help="projects.yaml. Env: WA_PROJECTS")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="WHEN", help="Where a first start begins: ISO time, beginning, now. Env: WA_SINCE"
        ),
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
        once=once or None,
        listen=listen,
    )
    with _faults_said():
        given = load(flags, config=config)
        program.projects_of(given)
        if given.database_url is None and given.since is None and not _embedded_exists():
            raise ConfigError(
                "a first start; say where to begin with --since or WA_SINCE: an ISO time with offset,"
                " `beginning` or `now`"
            )
        with _with_database(given) as settings:
            program.serve(settings)


@commands.command("repair-lids")
def repair_lids(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would change, change nothing")] = False,
    config: _Config = None,
) -> None:
    """Replace LIDs that stand where a phone belongs by the phone that the bridge's map gives for them."""
    flags = Values(bridge=bridge, database_url=database_url)
    with (
        _faults_said(),
        _with_standing_database(load(flags, config=config)) as settings,
        closing(Bridge(settings.bridge)) as reader,
    ):
        known = reader.known()
        with closing(connect(settings.database_url)) as database:
            if dry_run:
                schema.check_reviews(database)
            else:
                schema.prepare(database)
            _show_repair(repair(database, known, dry_run=dry_run), full_numbers=settings.log_full_numbers)


@commands.command("audit")
def audit_command(
    *,
    bridge: _Bridge = None,
    database_url: _Url = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON")] = False,
    config: _Config = None,
) -> None:
    """Say whether a LID stands in the table, and by which code; exit status 1 for that or a dead letter."""
    flags = Values(bridge=bridge, database_url=database_url)
    with (
        _faults_said(),
        _with_standing_database(load(flags, config=config)) as settings,
        closing(Bridge(settings.bridge)) as reader,
    ):
        known = reader.known()
        with closing(connect(settings.database_url)) as database:
            schema.require(database)
            schema.check_reviews(database)
            findings = audit(database, known)
    if as_json:
        typer.echo(findings.to_json().decode())
    else:
        _show_findings(findings, full_numbers=settings.log_full_numbers)
    raise typer.Exit(1 if findings.failed else 0)


@commands.command()
def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="A scripted tour that ends by itself")] = False,
    folder: Annotated[Path | None, typer.Option(metavar="DIR", help="Work here and keep it")] = None,
) -> None:
    """Show the whole product on invented messages: a save, a reload, the proof, the bug, the repair."""
    from monitor.demo import tour  # noqa: PLC0415 -- only this command needs it

    with _faults_said():
        raise typer.Exit(tour.main(once=once, folder=folder))


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


def _moment(instant: datetime) -> str:
    return f"{instant.astimezone(BUSINESS_ZONE):%Y-%m-%d %H:%M:%S %Z}"


def _say(console: Console, text: str) -> None:
    """Print a line as it is: whole, and brackets in it are no markup."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _show_repair(report: Report, *, full_numbers: bool) -> None:
    """Print what a repair did, by project, and what it had to leave."""
    console = Console()
    if report.repaired:
        what = "would be repaired" if report.dry_run else f"were repaired in run {report.run_id}"
        _say(console, f"{report.repaired.total()} rows {what}:")
        table = Table("project", "rows")
        for project in sorted(report.repaired):
            table.add_row(escape(project) or "(none)", str(report.repaired[project]))
        console.print(table)
    else:
        _say(console, "No LID that the map can resolve stands in the table.")
    for row in report.unresolved:
        value = row.value if full_numbers else mask_numbers(row.value)
        _say(
            console,
            f"not resolved: {row.drop_number} in {row.project or '(none)'}:"
            f" the map has no phone for {value}, or had several",
        )


def _show_findings(findings: Findings, *, full_numbers: bool) -> None:
    """Print the findings: first what is wrong, then what waits."""
    console = Console()
    if findings.standing:
        _say(console, f"LIDs stand in {sum(one.rows for one in findings.standing)} rows of the table:")
        table = Table("project", "rows", "stored by tree", "since")
        for one in findings.standing:
            since = _moment(one.since) if one.since else "unknown"
            table.add_row(escape(one.project) or "(none)", str(one.rows), one.tree or "(no record)", since)
        console.print(table)
    else:
        _say(console, "No LID stands in the table.")
    for new in findings.newly_stored:
        _say(
            console,
            f"stored as LID: {new.drops} in {new.project} by tree {new.tree or '(not supervised)'},"
            f" {_moment(new.first_at)} to {_moment(new.last_at)}",
        )
    for waiting in findings.waiting:
        _say(
            console,
            f"{waiting.kind}: {waiting.drops} in {waiting.project} since {_moment(waiting.since)}",
        )
    for letter in findings.dead_letters:
        _say(console, f"dead letters: {letter.messages} in {letter.project or '(none)'}: {letter.reason}")
    for row in findings.doubtful:
        value = row.value if full_numbers else mask_numbers(row.value)
        _say(
            console,
            f"doubtful: {row.drop_number} in {row.project or '(none)'}: {value} is no phone, nor in the map",
        )
