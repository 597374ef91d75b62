"""Command line: arguments to settings to exit code.

The rule: an error is one sentence on stderr and the exit code of the contract; nobody sees a traceback for a
mistake of their own. Tables and colour only for people: ``--json`` prints the documents of
:mod:`supervisor.status` unchanged.

``run`` takes everything from TARGET on as the target's own, so its flags never mix with ours.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from supervisor import control, logfile
from supervisor.errors import SupervisorError, UsageError
from supervisor.logfile import CHILD_LOG
from supervisor.output import Output, fill_standard_descriptors
from supervisor.settings import (
    Handover,
    Options,
    ServiceType,
    Settings,
    load_options,
    merge,
    parse_target,
    resolve,
    runtime_dir,
)

EXIT_FAILED = 1
EXIT_DIFFERS = 3
_ANSWER_SECONDS = 10.0

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
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Name, or path below the watched folder, to leave out; repeatable."
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
    rehash_interval: Annotated[
        float | None,
        typer.Option(help="Seconds within which every file is read again. [default: 300]"),
    ] = None,
    verify_interval: Annotated[
        float | None, typer.Option(help="Seconds between attestations. [default: 30]")
    ] = None,
    probation: Annotated[
        float | None,
        typer.Option(help="Seconds that new code must serve before it is known good. [default: 30]"),
    ] = None,
    max_memory: Annotated[
        int | None, typer.Option(help="Resident memory in bytes from which a child is replaced.")
    ] = None,
    max_age: Annotated[
        float | None, typer.Option(help="Seconds of service after which a child is replaced.")
    ] = None,
    no_zygote: Annotated[
        bool | None,
        typer.Option("--no-zygote", help="Start each child by itself, not from a preloaded process."),
    ] = None,
    env_file: Annotated[
        str | None,
        typer.Option(help="File of NAME=value lines for the child; a change makes a new generation."),
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
        ignore=tuple(ignore) if ignore else None,
        type=type_,
        handover=handover,
        ready_timeout=ready_timeout,
        watchdog=watchdog,
        stop_timeout=stop_timeout,
        quiet=quiet,
        scan_interval=scan_interval,
        rehash_interval=rehash_interval,
        verify_interval=verify_interval,
        probation=probation,
        max_memory=max_memory,
        max_age=max_age,
        no_zygote=no_zygote,
        env_file=env_file,
        runtime_dir=runtime_dir,
        state_dir=state_dir,
        listen=listen,
    )
    _refuse_namesake()
    words = parse_target(target)

    def read_settings() -> Settings:
        return resolve(words, merge(flags, load_options(config) if config else Options()))

    settings = read_settings()
    # Imported here: the other commands answer without loading watcher, metrics and web server.
    from supervisor import reexec  # noqa: PLC0415
    from supervisor.service import Service  # noqa: PLC0415

    ended: int | reexec.Estate | None = reexec.received()
    while not isinstance(ended, int):
        output = Output(settings.state_dir / CHILD_LOG, estate=ended.output if ended else None)
        _log_to(output.handler())
        try:
            ended = Service(settings, output, read_settings, estate=ended).run()
        finally:
            output.close()
        if isinstance(ended, reexec.Estate):
            ended = reexec.replace_image(ended)
    raise typer.Exit(ended)


def _log_to(handler: logging.Handler) -> None:
    under_journal = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        logging.Formatter("%(name)s: %(message)s" if under_journal else "%(asctime)s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


@app.command()
def status(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Show whether the running code is the code on disk, and what happened last."""
    document = _ask(runtime_dir, "status")["status"]
    if as_json:
        _print_json(document)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_status(document)


@app.command()
def reload(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Look at the tree now, reload if it differs, and return when there is an outcome."""
    _print_reload(_ask(runtime_dir, "reload", timeout_seconds=None)["reload"], as_json=as_json)


@app.command()
def restart(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Replace the running process by a new one of the same code; return when there is an outcome."""
    _print_reload(_ask(runtime_dir, "restart", timeout_seconds=None)["reload"], as_json=as_json)


@app.command()
def rollback(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Go back to the known good code before the one that runs; what is on disk waits for the next change."""
    _print_reload(_ask(runtime_dir, "rollback", timeout_seconds=None)["reload"], as_json=as_json)


@app.command()
def pause(*, runtime_dir: RuntimeDir = None) -> None:
    """Start no other code until `resume`; what runs is kept running."""
    _ask(runtime_dir, "pause")
    print("paused")


@app.command()
def resume(*, runtime_dir: RuntimeDir = None) -> None:
    """End a pause; what has changed meanwhile is reloaded."""
    _ask(runtime_dir, "resume")
    print("resumed")


@app.command()
def stop(*, runtime_dir: RuntimeDir = None) -> None:
    """Stop the child, then the supervisor; return when both are gone."""
    _ask(runtime_dir, "stop", timeout_seconds=None)
    print("stopped")


@app.command()
def reexec(*, runtime_dir: RuntimeDir = None) -> None:
    """Replace the supervisor by its own package on disk; what it supervises runs on."""
    answer = _ask(runtime_dir, "reexec", timeout_seconds=None)
    runs_on = f"generation {answer['live']} runs on" if answer["live"] is not None else "nothing is live"
    print(f"replaced (image {answer['self']['image']}); {runs_on}")


@app.command()
def verify(*, runtime_dir: RuntimeDir = None, as_json: AsJson = False) -> None:
    """Ask the running process what code it runs, and compare that with the files. Exit 3 if they differ."""
    document = _ask(runtime_dir, "verify")["verify"]
    if as_json:
        _print_json(document)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_verify(document)
    if not document["in_sync"]:
        raise typer.Exit(EXIT_DIFFERS)


@app.command()
def diff(*, runtime_dir: RuntimeDir = None) -> None:
    """Show how the code that runs differs from the files, as a unified diff. Exit 3 if it does."""
    document = _ask(runtime_dir, "diff")["diff"]
    from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

    terminal.print_diff(document)
    if document["files"]:
        raise typer.Exit(EXIT_DIFFERS)


@app.command()
def history(
    *,
    count: Annotated[int, typer.Option("-n", min=1, help="How many records, the newest first.")] = 20,
    runtime_dir: RuntimeDir = None,
    as_json: AsJson = False,
) -> None:
    """Show every reload, restart and rollback with its reason and who asked for it."""
    records = _ask(runtime_dir, "history", count=count)["history"]
    if as_json:
        _print_json(records)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_history(records)


@app.command()
def logs(
    *,
    follow: Annotated[bool, typer.Option("-f", help="Go on with what is written from now on.")] = False,
    count: Annotated[int, typer.Option("-n", min=0, help="How many lines.")] = 50,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Show the last lines that the child wrote."""
    file = Path(_ask(runtime_dir, "logs")["file"])
    try:
        for line in logfile.follow(file, count) if follow else logfile.read_last(file, count):
            print(line, flush=follow)
    except OSError as error:
        raise SupervisorError(f"logs: cannot read {file}: {error.strerror}") from error
    except KeyboardInterrupt:
        return


def main() -> None:
    """Entry point of ``wa-supervisor``."""
    fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # A path need not be UTF-8.
    try:
        app()
    except SupervisorError as error:
        print(f"wa-supervisor: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _ask(
    directory: str | None,
    command: str,
    timeout_seconds: float | None = _ANSWER_SECONDS,
    **arguments: object,
) -> dict[str, Any]:
    answer = control.request(runtime_dir(directory), command, timeout_seconds=timeout_seconds, **arguments)
    if not answer["ok"]:
        raise SupervisorError(f"{command}: {answer['error']}")
    return answer


def _refuse_namesake() -> None:
    """Refuse to start beside PyPI's ``supervisor`` (supervisord), which installs a package of the same name.

    Raises:
        UsageError: it is installed in this environment.
    """
    # By its folder, as pip leaves it: importlib.metadata takes 28 ms of every start to say the same.
    found = (path.name for entry in sys.path for path in Path(entry).glob("supervisor-*.*-info"))
    namesake = next(found, None)
    if namesake is None:
        return
    version = namesake.removeprefix("supervisor-").rpartition(".")[0]
    raise UsageError(
        f"the package supervisor {version} (supervisord) is installed in this environment and has the same "
        "import name; install wa-monitor in an environment of its own"
    )


def _print_reload(record: dict[str, Any], *, as_json: bool) -> None:
    """Print the record of a reload that was asked for, and exit 1 if it did not become live."""
    if as_json:
        _print_json(record)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        print(terminal.reload_line(record))
    if record["outcome"] not in {"live", "unchanged"}:
        raise typer.Exit(EXIT_FAILED)


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()
