"""Command line: arguments to settings to exit code.

The rule: an error is one sentence on stderr and the exit code of the contract; nobody sees a traceback for a
mistake of their own. Tables and colour only for people: ``--json`` prints the documents of
:mod:`supervisor.status` unchanged.

``run`` takes everything from TARGET on as the target's own, so its flags never mix with ours.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from supervisor import control
from supervisor.errors import SupervisorError, UsageError
from supervisor.settings import (
    Handover,
    Options,
    ServiceType,
    load_options,
    merge,
    parse_target,
    resolve,
    runtime_dir,
)

EXIT_FAILED = 1
EXIT_DIFFERS = 3
_ANSWER_SECONDS = 10.0
_SHORT_DIGEST = 12

app = typer.Typer(
    help="Keep one Python program running on exactly the code that is on disk, and prove it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RuntimeDir = Annotated[
    str | None,
    typer.Option("--runtime-dir", help="Which supervisor: the directory of its socket.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the documented JSON instead of a table.")]


@app.command(context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def run(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET [ARGS]...",
            help="path/to/script.py, package.module:callable or -m package.module; then its arguments.",
        ),
    ],
    *,
    watch: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of code; repeatable. Default: the target's top package, or the script's folder."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; every flag is a key.")] = None,
    type_: Annotated[
        ServiceType | None,
        typer.Option(
            "--type",
            help="simple: ready when alive and attested. notify: waits for READY=1. [default: simple]",
        ),
    ] = None,
    handover: Annotated[
        Handover | None,
        typer.Option(
            help="replace: never two at work. overlap: the new one is ready first. [default: replace]"
        ),
    ] = None,
    ready_timeout: Annotated[
        float | None, typer.Option(help="Seconds until a start has failed. [default: 30]")
    ] = None,
    watchdog: Annotated[
        float | None,
        typer.Option(help="Longest silence of a notify child in seconds; 0 = off. [default: 15]"),
    ] = None,
    stop_timeout: Annotated[
        float | None, typer.Option(help="Seconds from SIGTERM to SIGKILL. [default: 20]")
    ] = None,
    quiet: Annotated[
        float | None, typer.Option(help="Quiet period in seconds. [default: 0.015, 0.15 for several files]")
    ] = None,
    scan_interval: Annotated[
        float | None, typer.Option(help="Seconds between looks at the tree. [default: 2]")
    ] = None,
    verify_interval: Annotated[
        float | None, typer.Option(help="Seconds between attestations. [default: 30]")
    ] = None,
    runtime_dir: RuntimeDir = None,
    state_dir: Annotated[
        str | None, typer.Option(help="Directory for pinned sources.", show_default=False)
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            help="HOST:PORT of /metrics and /status.json; port 0 picks one. [default: 127.0.0.1:9464]"
        ),
    ] = None,
) -> None:
    """Run TARGET and keep it on the code that is on disk."""
    flags = Options(
        watch=tuple(watch) if watch else None,
        type=type_,
        handover=handover,
        ready_timeout=ready_timeout,
        watchdog=watchdog,
        stop_timeout=stop_timeout,
        quiet=quiet,
        scan_interval=scan_interval,
        verify_interval=verify_interval,
        runtime_dir=runtime_dir,
        state_dir=state_dir,
        listen=listen,
    )
    _refuse_namesake()
    settings = resolve(parse_target(target), merge(flags, load_options(config) if config else Options()))
    # Imported here: the other commands answer without loading watcher, metrics and web server.
    from supervisor.service import Service  # noqa: PLC0415

    under_journal = "JOURNAL_STREAM" in os.environ
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO,
        format="%(name)s: %(message)s" if under_journal else "%(asctime)s %(name)s: %(message)s",
    )
    raise typer.Exit(Service(settings).run())


@app.command()
def status(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Show whether the running code is the code on disk, and what happened last."""
    document = _ask(runtime_dir, "status")["status"]
    if as_json:
        _print_json(document)
    else:
        Console().print(_status_table(document))


@app.command()
def reload(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Look at the tree now, reload if it differs, and return when there is an outcome."""
    record = _ask(runtime_dir, "reload", timeout_seconds=None)["reload"]
    if as_json:
        _print_json(record)
    else:
        print(_reload_line(record))
    if record["outcome"] not in {"live", "unchanged"}:
        raise typer.Exit(EXIT_FAILED)


@app.command()
def stop(*, runtime_dir: RuntimeDir = None) -> None:
    """Stop the child, then the supervisor; return when both are gone."""
    _ask(runtime_dir, "stop", timeout_seconds=None)
    print("stopped")


@app.command()
def verify(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Ask the running process what code it runs, and compare that with the files. Exit 3 if they differ."""
    document = _ask(runtime_dir, "verify")["verify"]
    if as_json:
        _print_json(document)
    else:
        _print_verify(document)
    if not document["in_sync"]:
        raise typer.Exit(EXIT_DIFFERS)


def main() -> None:
    """Entry point of ``wa-supervisor``."""
    try:
        app()
    except SupervisorError as error:
        print(f"wa-supervisor: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _ask(
    directory: str | None, command: str, timeout_seconds: float | None = _ANSWER_SECONDS
) -> dict[str, Any]:
    answer = control.request(runtime_dir(directory), command, timeout_seconds=timeout_seconds)
    if not answer["ok"]:
        raise SupervisorError(f"{command}: {answer['error']}")
    return answer


def _refuse_namesake() -> None:
    """Refuse to start beside PyPI's ``supervisor`` (supervisord), which installs a package of the same name.

    Raises:
        UsageError: it is installed in this environment.
    """
    try:
        namesake = importlib.metadata.version("supervisor")
    except importlib.metadata.PackageNotFoundError:
        return
    raise UsageError(
        f"the package supervisor {namesake} (supervisord) is installed in this environment and has the same import name; "
        "install wa-monitor in an environment of its own"
    )


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()


def _status_table(document: dict[str, Any]) -> Table:
    live, last, watching = document["live"], document["last_reload"], document["watch"]
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("in sync", "[green]yes[/]" if document["in_sync"] else f"[red]no[/]: {document['reason']}")
    table.add_row("state", f"{document['state']} (supervisor pid {document['pid']})")
    if live:
        table.add_row(
            "live",
            f"generation {live['generation']}, pid {live['pid']}, tree {live['tree'][:_SHORT_DIGEST]}, since {live['since']}",
        )
    if document["candidate"]:
        table.add_row(
            "candidate",
            f"generation {document['candidate']['generation']} ({document['candidate']['stage']})",
        )
    if last:
        table.add_row("last reload", _reload_line(last))
    table.add_row("watch", f"{watching['mode']}, last scan {watching['last_scan_age_seconds']:.1f} s ago")
    if document["git"]:
        table.add_row("commit", document["git"]["commit"] or "none yet")
    if not document["bytecode"]["writable"]:
        table.add_row(
            "bytecode",
            f"[yellow]not writable[/]: {len(document['bytecode']['unwritable'])} files, other processes may be stale",
        )
    table.add_row("metrics", f"http://{document['listen']}/metrics")
    return table


def _reload_line(record: dict[str, Any]) -> str:
    why = f" ({record['reason']}: {record['detail']})" if record["reason"] else ""
    generation = f", generation {record['generation']}" if record["generation"] else ""
    paths = (
        f", {record['paths_total']} changed ({', '.join(record['paths'][:3])})"
        if record["paths_total"]
        else ""
    )
    return f"{record['outcome']}{why}{generation}, by {record['trigger']}{paths}, {record['total_seconds'] * 1000:.0f} ms"


def _print_verify(document: dict[str, Any]) -> None:
    console = Console()
    table = Table(box=None)
    for heading in ("module", "path", "running", "disk", ""):
        table.add_column(heading)
    for module in document["modules"]:
        good = module["state"] == "match"
        table.add_row(
            module["name"],
            module["path"],
            (module["running_sha256"] or "?")[:_SHORT_DIGEST],
            (module["disk_sha256"] or "no file")[:_SHORT_DIGEST],
            "[green]match[/]" if good else f"[red]{module['state']}[/]",
        )
    console.print(table)
    verdict = "[green]in sync[/]" if document["in_sync"] else "[red]NOT in sync[/]"
    console.print(
        f"{verdict}: {len(document['modules'])} modules, asked and compared in {document['duration_seconds'] * 1000:.0f} ms"
    )
    console.print("not checked: function objects changed after their import")
