"""Command line: words to settings to exit code.

The rule: an error is one sentence on stderr and the exit code of the contract; nobody sees a traceback for a
mistake of their own. Tables and colour only for people: ``--json`` prints the documents of
:mod:`supervisor.status` unchanged.

A command loads what it needs and no more: none waits for what only another one uses.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from supervisor import control, flags, logfile
from supervisor.environment import ESTATE_VARIABLE, MULTIPROCESS_VARIABLES, namesake
from supervisor.errors import SupervisorError, UsageError
from supervisor.flags import Parser
from supervisor.logfile import CHILD_LOG
from supervisor.output import Output, fill_standard_descriptors
from supervisor.settings import (
    NOTIFY_SOCKET,
    Settings,
    load_file,
    merge,
    parse_target,
    resolve,
    runtime_dir,
    working_directory,
)

if TYPE_CHECKING:
    from supervisor.forerunner import Forerunner
    from supervisor.installation import Scope

log = logging.getLogger("wa-supervisor")

EXIT_FAILED = 1
EXIT_DIFFERS = 3
EXIT_INTERRUPTED = 130
_ANSWER_SECONDS = 10.0


# --- the commands -----------------------------------------------------------------------------------------


def _run(given: argparse.Namespace) -> int:
    """Run TARGET and keep it on the code that is on disk.

    TARGET is path/to/script.py, package.module:callable or -m package.module; all that follows belongs to it.
    """
    if (problem := namesake(sys.path)) is not None:
        raise UsageError(problem)
    options = vars(given)
    target, config = parse_target(options.pop("target")), options.pop("config")
    here = working_directory()

    def read_settings() -> Settings:
        try:
            os.chdir(here)  # By its name: it may have been moved away, and another one put in its place.
        except OSError as error:
            raise UsageError(f"cannot work in {here}: {error.strerror}; put it back") from error
        return resolve(target, merge(options, load_file(config) if config else {}))

    settings = read_settings()
    # Before anything imports prometheus_client, which would end us where such a folder cannot be written.
    taken_out = [name for name in MULTIPROCESS_VARIABLES if os.environ.pop(name, None) is not None]
    # Imported here: the other commands answer without loading watcher, metrics and web server.
    from supervisor import blobs  # noqa: PLC0415
    from supervisor.bytecode import Compiler  # noqa: PLC0415

    handed_over = os.environ.pop(ESTATE_VARIABLE, None)  # No child of ours shall take it for its own.
    compiler = Compiler(
        blobs=blobs.place(settings.state_dir), scratch=settings.runtime_dir, environment=os.environ
    )
    with closing(compiler), ExitStack() as closed:
        forerunner = None
        if handed_over is None:  # Their interpreters start while ours is busy with what is imported next.
            compiler.prepare()
            forerunner = _forerunner(settings)
            if forerunner is not None:
                closed.callback(forerunner.close)
        from supervisor import reexec  # noqa: PLC0415
        from supervisor.service import Service  # noqa: PLC0415

        _collect_garbage_again()
        ended: int | reexec.Estate | None = reexec.received(handed_over) if handed_over else None
        while not isinstance(ended, int):
            output = Output(settings.state_dir / CHILD_LOG, estate=ended.output if ended else None)
            _log_to(output.handler())
            for name in taken_out:
                log.warning(
                    "%s is left out: our numbers are shown, not written; a child that needs it gets it by"
                    " --env-file",
                    name,
                )
            taken_out.clear()
            try:
                ended = Service(
                    settings, output, read_settings, compiler, estate=ended, forerunner=forerunner
                ).run()
            finally:
                output.close()
            if isinstance(ended, reexec.Estate):
                ended = reexec.replace_image(ended)
    return ended


def _forerunner(settings: Settings) -> Forerunner | None:
    """Start what the first generation may become; None if it takes a process of its own."""
    from supervisor import environment, forerunner, launch  # noqa: PLC0415 -- as in :func:`_run`

    if not (settings.zygote and forerunner.possible):
        return None
    variables = launch.child_environment(
        environment.read(os.environ, settings.env_file).variables,
        notify_socket=settings.runtime_dir / NOTIFY_SOCKET,
        watchdog_seconds=settings.watchdog_seconds,
        generation=1,
        tree="",
    )
    try:
        return forerunner.Forerunner(variables, str(Path.cwd()))
    except OSError:
        return None  # The start meets it again, and tells.


def _collect_garbage_again() -> None:
    """End what :mod:`supervisor.__main__` has begun; what is there by now is never looked at again."""
    gc.freeze()
    gc.enable()


def _status(given: argparse.Namespace) -> int:
    """Show whether the running code is the code on disk, and what happened last."""
    document = _ask(given, "status")["status"]
    if given.json:
        _print_json(document)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_status(document)
    return 0


def _reload(given: argparse.Namespace) -> int:
    """Look at the tree now, reload if it differs, and return when there is an outcome."""
    return _reloaded(given, "reload")


def _restart(given: argparse.Namespace) -> int:
    """Replace the running process by a new one of the same code; return when there is an outcome."""
    return _reloaded(given, "restart")


def _rollback(given: argparse.Namespace) -> int:
    """Go back to the known good code before the one that runs; what is on disk waits for the next change."""
    return _reloaded(given, "rollback")


def _pause(given: argparse.Namespace) -> int:
    """Start no other code until `resume`; what runs is kept running."""
    _ask(given, "pause")
    print("paused")
    return 0


def _resume(given: argparse.Namespace) -> int:
    """End a pause; what has changed meanwhile is reloaded."""
    _ask(given, "resume")
    print("resumed")
    return 0


def _stop(given: argparse.Namespace) -> int:
    """Stop the child, then the supervisor; return when both are gone."""
    _ask(given, "stop", timeout_seconds=None)
    print("stopped")
    return 0


def _reexec(given: argparse.Namespace) -> int:
    """Replace the supervisor by its own package on disk; what it supervises runs on."""
    answer = _ask(given, "reexec", timeout_seconds=None)
    runs_on = f"generation {answer['live']} runs on" if answer["live"] is not None else "nothing is live"
    print(f"replaced (image {answer['self']['image']}); {runs_on}")
    return 0


def _verify(given: argparse.Namespace) -> int:
    """Ask the running process what code it runs, and compare that with the files. Exit 3 if they differ."""
    document = _ask(given, "verify")["verify"]
    if given.json:
        _print_json(document)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_verify(document)
    return 0 if document["in_sync"] else EXIT_DIFFERS


def _diff(given: argparse.Namespace) -> int:
    """Show how the code that runs differs from the files, as a unified diff. Exit 3 if it does."""
    document = _ask(given, "diff")["diff"]
    from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

    terminal.print_diff(document)
    return EXIT_DIFFERS if document["files"] else 0


def _history(given: argparse.Namespace) -> int:
    """Show every reload, restart and rollback with its reason and who asked for it."""
    records = _ask(given, "history", count=given.count)["history"]
    if given.json:
        _print_json(records)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        terminal.print_history(records)
    return 0


def _logs(given: argparse.Namespace) -> int:
    """Show the last lines that the child wrote."""
    file = Path(_ask(given, "logs")["file"])
    lines = logfile.follow(file, given.count) if given.follow else logfile.read_last(file, given.count)
    try:
        for line in lines:
            print(line, flush=given.follow)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise SupervisorError(f"logs: cannot read {file}: {error.strerror}") from error
    except KeyboardInterrupt:
        pass  # The way to end `logs -f`.
    return 0


def _doctor(given: argparse.Namespace) -> int:
    """Look for all that is wrong with a service or would be, and say what to do about each. Exit 1 if so.

    Without --instance and --runtime-dir: every unit that is installed; where none is, the supervisor that
    answers; where none does, what install-unit would install from here.
    """
    from supervisor import doctor, terminal  # noqa: PLC0415 -- nobody else waits for what only a doctor needs

    directory = Path(given.runtime_dir) if given.runtime_dir else None
    document = doctor.examine(given.instance, _scope(given), directory)
    if given.json:
        _print_json(document)
    else:
        terminal.print_findings(document)
    return EXIT_FAILED if document["failed"] else 0


def _install_unit(given: argparse.Namespace) -> int:
    """Write the unit of systemd for this environment, and its file of variables with a free port."""
    from supervisor import installation  # noqa: PLC0415 -- only this command writes units

    unit, scope = installation.unit_name(given.instance), _scope(given)
    text = installation.render(unit, installation.here(unit), of_user=scope.of_user)
    if given.print:
        print(text, end="")
        return 0
    installed = installation.install(unit, text, scope)
    print("\n".join(installed.done))
    print("next:")
    for command in installed.following:
        print(f"  {command}")
    return 0


def _scope(given: argparse.Namespace) -> Scope:
    from supervisor.installation import Scope  # noqa: PLC0415 -- as above

    return Scope(given.user, Path(given.root).absolute())


# --- which there are, and their flags ---------------------------------------------------------------------


def _records(parser: Parser) -> None:
    flags.add_count(parser, "How many records, the newest first.", least=1, default=20)


def _lines(parser: Parser) -> None:
    parser.add_argument(
        "-f", dest="follow", action="store_true", help="Go on with what is written from now on."
    )
    flags.add_count(parser, "How many lines.", least=0, default=50)


def _which_unit(parser: Parser) -> None:
    parser.add_argument("--instance", metavar="NAME", help="Which one of several: wa-monitor@NAME.service.")
    parser.add_argument("--user", action="store_true", help="Of your own manager, not of the system's.")
    parser.add_argument(
        "--root", metavar="DIR", default="/", help="Units and their files are below DIR. [default: /]"
    )


def _only_print(parser: Parser) -> None:
    parser.add_argument("--print", action="store_true", help="Show the unit, write nothing.")


class _Command(Struct, frozen=True):
    """What carries it out and returns the exit code, and what adds the flags that not every command has."""

    carry_out: Callable[[argparse.Namespace], int]
    add_flags: Sequence[Callable[[Parser], None]] = ()
    about_a_supervisor: bool = True
    """It is about one, which --runtime-dir names."""


_COMMANDS = {
    "run": _Command(_run),
    "status": _Command(_status, [flags.add_json]),
    "reload": _Command(_reload, [flags.add_json]),
    "restart": _Command(_restart, [flags.add_json]),
    "rollback": _Command(_rollback, [flags.add_json]),
    "pause": _Command(_pause),
    "resume": _Command(_resume),
    "stop": _Command(_stop),
    "reexec": _Command(_reexec),
    "verify": _Command(_verify, [flags.add_json]),
    "diff": _Command(_diff),
    "history": _Command(_history, [_records, flags.add_json]),
    "logs": _Command(_logs, [_lines]),
    "doctor": _Command(_doctor, [_which_unit, flags.add_json]),
    "install-unit": _Command(_install_unit, [_which_unit, _only_print], about_a_supervisor=False),
}


def main() -> None:
    """Entry point of ``wa-supervisor``."""
    fill_standard_descriptors()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # A path need not be UTF-8.
    try:
        try:
            code = _carry_out(sys.argv[1:])
        finally:
            print(end="", flush=True)
    except SupervisorError as error:
        print(f"wa-supervisor: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # Nobody reads on, as in `wa-supervisor history | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code)


def _carry_out(words: list[str]) -> int:
    """Do what the words of the command line ask for; return the exit code."""
    if not words:
        _overview().print_help(sys.stderr)
        return UsageError.exit_code
    name, *rest = words
    if name not in _COMMANDS:
        overview = _overview()
        overview.parse_args([name])  # Shows its help, or says what is wrong.
        overview.error("COMMAND is missing")
    command = _COMMANDS[name]
    parser = Parser(f"wa-supervisor {name}", command.carry_out.__doc__)
    if name == "run":
        return command.carry_out(flags.parse_run(parser, rest))
    _collect_garbage_again()
    for add in command.add_flags:
        add(parser)
    if command.about_a_supervisor:
        flags.add_runtime_dir(parser)
    return command.carry_out(parser.parse_args(rest))


def _overview() -> Parser:
    parser = Parser(
        "wa-supervisor", "Keep one Python program running on exactly the code that is on disk, and prove it."
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands", parser_class=Parser)
    for name, command in _COMMANDS.items():
        commands.add_parser(name, help=(command.carry_out.__doc__ or "").partition("\n\n")[0])
    return parser


# --- what they share --------------------------------------------------------------------------------------


def _log_to(handler: logging.Handler) -> None:
    under_journal = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(
        logging.Formatter("%(name)s: %(message)s" if under_journal else "%(asctime)s %(name)s: %(message)s")
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)


def _ask(
    given: argparse.Namespace,
    command: str,
    timeout_seconds: float | None = _ANSWER_SECONDS,
    **arguments: object,
) -> dict[str, Any]:
    answer = control.request(
        runtime_dir(given.runtime_dir), command, timeout_seconds=timeout_seconds, **arguments
    )
    if not answer["ok"]:
        raise SupervisorError(f"{command}: {answer['error']}")
    return answer


def _reloaded(given: argparse.Namespace, command: str) -> int:
    """Ask for a reload, print its record, and return 1 if it did not become live."""
    record = _ask(given, command, timeout_seconds=None)["reload"]
    if given.json:
        _print_json(record)
    else:
        from supervisor import terminal  # noqa: PLC0415 -- a start does not wait for what draws tables

        print(terminal.reload_line(record))
    return 0 if record["outcome"] in {"live", "unchanged"} else EXIT_FAILED


def _print_json(document: object) -> None:
    json.dump(document, sys.stdout, indent=2)
    print()
