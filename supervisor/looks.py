"""Looks: the machine, the files and the variables that a service has, one look for each.

The rule: what can be tried is tried, with the rights of the service's user: a watch on each directory, an
access to each source, a question to git. Where a supervisor answers, its own word goes first: what works is
not doubted.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from supervisor import git, inotify, installation, processes
from supervisor.environment import ESTATE_VARIABLE, MULTIPROCESS_VARIABLES, assignments, namesake
from supervisor.errors import SourceError, SupervisorError
from supervisor.filesystems import FileSystems
from supervisor.finding import Found, Look, ok, run, split
from supervisor.inotify import Inotify
from supervisor.masking import mask
from supervisor.subject import Account, Subject
from supervisor.unitlooks import unit

_LEAST_FREE_BYTES = 64 * 1024**2
_LEAST_QUEUE = 1024
_SECOND_NS = 1_000_000_000
_FUTURE_SECONDS = 5.0
_TIME_ERROR = 5
_TIMEX_BYTES = 256

_OF_THE_MANAGER = frozenset(
    {
        *("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "MAINPID"),
        *("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "CREDENTIALS_DIRECTORY", "JOURNAL_STREAM"),
    }
)
_OURS = frozenset({ESTATE_VARIABLE, "WA_TREE", "WA_GENERATION"})
_BREAKS = {
    "PYTHONHOME": "Python takes its library from elsewhere",
    "PYTHONINSPECT": "Python does not end when the program does",
    "PYTHONSAFEPATH": "code in the working directory is not found",
    **dict.fromkeys(
        MULTIPROCESS_VARIABLES,
        "prometheus_client writes numbers to files; the supervisor leaves it out, other commands do not",
    ),
}
_DISTURBS = {
    "PYTHONDONTWRITEBYTECODE": "every start of Python compiles what it imports anew, and a restart by hand"
    " does not show what stale bytecode does",
    "PYTHONPYCACHEPREFIX": "bytecode lies elsewhere than where other programs leave and read it",
    "PYTHONOPTIMIZE": "assertions are left out of the code that runs",
    "PYTHONWARNINGS": "a warning may end what runs well without it",
}


# --- what runs --------------------------------------------------------------------------------------------


def _supervisor(one: Subject) -> Iterator[Found]:
    status = one.status
    if status is None:
        yield "skipped", one.silence or "none answers", None
        return
    if status["in_sync"]:
        yield ok("it answers, and the code that runs is the code on disk")
    else:
        yield "wrong", f"it is not in sync: {status['reason']}", "wa-supervisor status, then history"
    for problem in status["problems"]:
        yield "wrong", *split(SupervisorError(problem))
    if status["self"]["outdated"]:
        yield "wrong", f"it is outdated: {status['self']['reason']}", "wa-supervisor reexec"
    if status["bytecode"]["stale_total"]:
        stale = ", ".join(status["bytecode"]["stale"][:3])
        yield (
            "wrong",
            f"{status['bytecode']['stale_total']} files of stale bytecode cannot be removed: {stale}",
            "remove them as their owner, or let the service's user write there",
        )
    if status["paused"]:
        yield "warning", "it is paused: no other code is started", "wa-supervisor resume"


# --- files ------------------------------------------------------------------------------------------------


def _permissions(one: Subject) -> Iterator[Found]:
    for file, variables in one.sources.items():
        # What masking would hide is a secret.
        secrets = [name for name, value in variables.items() if mask(f"{name}={value}") != f"{name}={value}"]
        if secrets and file.stat().st_mode & 0o007:
            yield "wrong", f"everybody may read {file}, which holds {secrets[0]}", f"chmod o= {file}"
    for word in one.unit.words("LoadCredential") if one.unit is not None else ():
        file = one.scope.below(word.partition(":")[2])
        if file.is_file() and file.stat().st_mode & 0o007:
            yield "wrong", f"everybody may read {file}, which holds a secret", f"chmod o= {file}"
    if one.account is None or one.settings is None:
        return
    if not one.account.can_be_taken:
        yield "skipped", f"what {one.account.name} may do is for root to find out", None
        return
    with one.account.acting():
        yield from _readable(one, one.account)
        yield from _state_directory(one, one.account)


def _readable(one: Subject, account: Account) -> Iterator[Found]:
    assert one.settings is not None  # noqa: S101 -- asked by the caller
    program = Path(one.command[0])
    if (
        one.unit is not None
        and program.exists()
        and not os.access(program.resolve(), os.X_OK, effective_ids=True)
    ):
        yield "wrong", f"{account.name} may not run {program}", "let it enter the folders above, and run it"
    tree, unwritable, files = one.settings.tree, [], 0
    try:
        for folder in tree.folders():
            paths = [os.path.join(folder.path, name) for name in folder.sources]  # noqa: PTH118 -- thousands
            files += len(paths)
            for path in paths:
                if not os.access(path, os.R_OK, effective_ids=True):
                    raise SourceError(path, os.strerror(errno.EACCES))  # noqa: TRY301 -- as the manifest says it
            caches = f"{folder.path}/__pycache__"
            ours = [caches, folder.path] if os.path.isdir(caches) else [folder.path]  # noqa: PTH112 -- as above
            unwritable += [
                path for path in ours if paths and not os.access(path, os.W_OK, effective_ids=True)
            ]
    except SourceError as error:
        yield "wrong", f"{account.name} cannot read {error.path}: {error.why}", error.remedy
        return
    yield ok(f"{account.name} can read all {files} sources of {', '.join(tree.roots)}")
    if unwritable:
        detail = (
            f"{account.name} cannot write bytecode in {len(unwritable)} folders, {unwritable[0]} is one:"
            " what others left there stays, and other programs may run it"
        )
        remedy = f"let {account.name} write there, or leave it if nobody else runs this code"
        yield "warning", detail, remedy


def _state_directory(one: Subject, account: Account) -> Iterator[Found]:
    assert one.settings is not None  # noqa: S101 -- asked by the caller
    made = one.unit is not None and bool(one.unit.words("StateDirectory"))
    directory = one.settings.state_dir
    other = next(_of_others(directory), None)
    if other is not None:
        yield (
            "wrong",
            f"{account.name} may not use {other}, which somebody else left in the state directory",
            f"chown -R {account.name}: {directory}",
        )
    if made:
        return  # systemd makes it, and gives it to the user; not what is in it, if it is the user's already.
    standing = next(path for path in (directory, *directory.parents) if path.exists())
    if os.access(standing, os.W_OK | os.X_OK, effective_ids=True):
        yield ok(f"{account.name} can use the state directory {directory}")
    else:
        yield "wrong", f"{account.name} may not write to {standing}", "name another place with --state-dir"


def _of_others(directory: Path) -> Iterator[Path]:
    """Yield what in a state directory cannot be read and written."""
    for folder, _, names in os.walk(directory):
        for path, needed in ((folder, os.W_OK | os.X_OK), *((f"{folder}/{name}", 0) for name in names)):
            if not os.access(path, os.R_OK | needed, effective_ids=True):
                yield Path(path)
    for file in directory.glob("*"):
        if file.is_file() and not os.access(file, os.W_OK, effective_ids=True):
            yield file


def _file_system(one: Subject) -> Iterator[Found]:
    if one.settings is None:
        return
    mounts = FileSystems()
    for root in one.settings.tree.roots:
        kind = mounts.without_all_events(root)
        if kind is None:
            yield ok(f"{root} is on a local file system")
        else:
            yield (
                "wrong",
                f"{root} is on a file system ({kind}) that may change without an event",
                "keep the code on a local one; until then a change is seen within --scan-interval",
            )
    directory = one.settings.state_dir
    standing = next(path for path in (directory, *directory.parents) if path.exists())
    kind = mounts.without_all_events(str(standing))
    if kind is not None:
        yield (
            "wrong",
            f"the state directory {directory} is on a file system ({kind}) whose locks may be others'",
            "name a local one with --state-dir",
        )
    facts = os.statvfs(standing)
    free_bytes = facts.f_bavail * facts.f_frsize
    if free_bytes < _LEAST_FREE_BYTES or (facts.f_files and not facts.f_favail):
        yield (
            "wrong",
            f"the disk of the state directory {directory} is full ({free_bytes // 1024**2} MiB left)",
            "free some space, or name another place with --state-dir",
        )


def _inotify(one: Subject) -> Iterator[Found]:
    if one.settings is None:
        return
    watch = one.status["watch"] if one.status is not None else None
    if watch is not None:
        if watch["mode"] == "events":
            yield ok(f"all {watch['directories']} directories are watched")
        else:
            yield (
                "wrong",
                f"changes are found by the scan ({watch['mode']}): {watch['reason']}",
                watch["remedy"],
            )
        if watch["overflows"]:
            yield "warning", f"events were lost {watch['overflows']} times", inotify.queue_remedy()
    elif one.account is not None and one.account.can_be_taken:
        tree = one.settings.tree
        directories = [path for root in tree.roots for path in tree.directories(root)]
        with one.account.acting():
            yield from _tried(directories)
    length = _number(Path("/proc/sys/fs/inotify/max_queued_events"))
    if length is not None and length < _LEAST_QUEUE:
        yield "wrong", f"the kernel keeps no more than {length} events", inotify.queue_remedy()


def _tried(directories: Sequence[str]) -> Iterator[Found]:
    """Watch everything, for a moment."""
    try:
        instance = Inotify()
    except OSError as error:
        yield "wrong", f"nothing can be watched: {error.strerror}", inotify.instances_remedy(error)
        return
    with closing(instance):
        for number, path in enumerate(directories):
            try:
                instance.add(path)
            except OSError as error:
                if error.errno != inotify.NO_WATCH_LEFT:
                    continue  # Gone meanwhile, or not readable: others say so.
                left = len(directories) - number
                detail = f"{left} of {len(directories)} directories cannot be watched: no watch is left"
                yield "wrong", detail, inotify.watches_remedy(left)
                return
    yield ok(f"all {len(directories)} directories can be watched")


# --- git, variables, ports --------------------------------------------------------------------------------


def _git(one: Subject) -> Iterator[Found]:
    if one.settings is None or one.account is None:
        return
    repositories = {
        found.worktree for root in one.settings.tree.roots if (found := git.find(Path(root))) is not None
    }
    program = shutil.which("git")
    if not repositories or program is None:
        yield "skipped", "there is no git" if program is None else "the code lies in no repository", None
        return
    if not one.account.can_be_taken:
        yield "skipped", f"what git says to {one.account.name} is for root to find out", None
        return
    for place in sorted(repositories):
        # Its configuration may say what git runs, so git is asked as the service, and only for a name.
        said = run(
            [program, "-C", str(place), "rev-parse", "--git-dir"],
            one.account,
            {"HOME": one.account.home, "PATH": os.defpath, "LC_ALL": "C"},
        )
        if said.returncode == 0:
            yield ok(f"git works in {place}")
        elif "dubious ownership" in said.stderr:
            yield (
                "wrong",
                f"git refuses {place} to {one.account.name}: it belongs to somebody else",
                f"git config --system --add safe.directory '{place}', or give it to {one.account.name}",
            )
        else:
            why = (said.stderr.strip().splitlines() or ["no reason given"])[-1]
            yield (
                "wrong",
                f"git does not work in {place} for {one.account.name}: {why}",
                "repair the repository",
            )


def _variables(one: Subject) -> Iterator[Found]:
    found = list(_collisions(one))
    yield from found
    if not found:
        yield ok("nothing in it is in anybody's way")


def _collisions(one: Subject) -> Iterator[Found]:
    other = namesake(_search_path(one))
    if other is not None:
        yield "wrong", *split(SupervisorError(other))
    written = {name: str(file) for file, given in one.sources.items() for name in given}
    for name in sorted(one.variables):
        where = written.get(name, f"the environment of {one.name}")
        if name in _BREAKS:
            yield "wrong", f"{name} is set in {where}: {_BREAKS[name]}", f"remove {name} there"
        elif name in _DISTURBS and one.variables[name]:
            yield "warning", f"{name} is set in {where}: {_DISTURBS[name]}", f"remove {name} there"
        elif name in _OF_THE_MANAGER and one.unit is not None:
            yield (
                "wrong",
                f"{name} is set in {where}: it belongs to the service manager",
                f"remove {name} there",
            )
        elif name in _OURS and (one.unit is not None or name == ESTATE_VARIABLE):
            yield "wrong", f"{name} is set in {where}: it belongs to the supervisor", f"remove {name} there"
    yield from _shadowed(one, written.get("PYTHONPATH", f"the environment of {one.name}"))
    yield from _set_twice(one)
    if one.status is not None:
        yield from _outlived(one, processes.environment(one.status["pid"]))


def _shadowed(one: Subject, where: str) -> Iterator[Found]:
    """Find folders of PYTHONPATH: what is in them goes before what is installed."""
    roots = [Path(root) for root in (one.settings.tree.roots if one.settings else ())]
    names = {"supervisor", *(root.name for root in roots)}
    own = [str(one.folder), *(str(root.parent) for root in roots), *_search_path(one)]
    known = {os.path.realpath(path) for path in own}
    for entry in filter(None, one.variables.get("PYTHONPATH", "").split(os.pathsep)):
        place = one.folder / entry
        if os.path.realpath(place) in known:
            continue
        found = [name for name in sorted(names) if (place / name).is_dir() or (place / f"{name}.py").exists()]
        if found:
            detail = f"PYTHONPATH is set in {where}: {', '.join(found)} would be taken from {place}"
            yield "wrong", detail, "remove PYTHONPATH there"
        else:
            detail = f"PYTHONPATH is set in {where}: what lies in {place} goes before what is installed"
            yield "warning", detail, "remove PYTHONPATH there, unless that is meant"


def _set_twice(one: Subject) -> Iterator[Found]:
    """Find variables that two files give different values."""
    given = [*one.sources.items()]
    if one.settings is not None and one.settings.env_file is not None:
        given.append((one.settings.env_file, assignments(one.settings.env_file)))
    for number, (first, earlier) in enumerate(given):
        for second, later in given[number + 1 :]:
            for name in sorted(earlier.keys() & later.keys()):
                if earlier[name] != later[name]:
                    detail = f"{name} is set differently in {first} and {second}, and {second} counts"
                    yield "wrong", detail, f"remove it from {first}"


def _outlived(one: Subject, running: Mapping[bytes, bytes]) -> Iterator[Found]:
    """Find variables whose file has changed since the supervisor was started; systemd reads it once."""
    now = {name: value for given in one.sources.values() for name, value in given.items()}
    stale = [name for name, value in now.items() if running.get(os.fsencode(name)) != os.fsencode(value)]
    if running and stale:
        yield (
            "wrong",
            f"{', '.join(sorted(stale))}: the file holds another value than the supervisor was started with",
            f"{one.scope.systemctl} restart {one.name}",
        )


def _search_path(one: Subject) -> list[str]:
    """Return where the service's interpreter finds packages."""
    library = Path(one.command[0]).parent.parent
    found = [str(path) for path in library.glob("lib/python3*/site-packages")]
    return found if one.unit is not None else sys.path


def _port(one: Subject) -> Iterator[Found]:
    if one.settings is None:
        return
    host, port = one.settings.listen
    if one.status is not None:
        yield ok(f"it listens on {one.status['listen']}")
    elif port == 0 or installation.is_free(port):
        yield ok(f"{host}:{port} is free")
    else:
        yield (
            "wrong",
            f"something else listens on port {port}",
            f"write another {installation.LISTEN_VARIABLE}= into its file of variables, or stop the other",
        )


# --- clock ------------------------------------------------------------------------------------------------


def _clock(one: Subject) -> Iterator[Found]:
    now_ns = time.time_ns()
    if one.settings is not None:
        for folder in one.settings.tree.folders():
            for name in folder.sources:
                path = Path(folder.path, name)
                ahead = (path.stat().st_ctime_ns - now_ns) / _SECOND_NS
                if ahead > _FUTURE_SECONDS:
                    yield (
                        "wrong",
                        f"{path} was changed {ahead:.0f} s from now: the clock was set back",
                        "timedatectl set-ntp true",
                    )
                    return
    if _is_synchronized():
        yield ok("the kernel says that it is synchronised")
    else:
        yield (
            "warning",
            "the kernel says that nothing keeps it right",
            "timedatectl set-ntp true, or leave it to the host of this machine",
        )


def _is_synchronized() -> bool:
    """Ask adjtimex(2), which changes nothing when no mode is given."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "adjtimex", None)
    return call is None or int(call(ctypes.create_string_buffer(_TIMEX_BYTES))) != _TIME_ERROR


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


LOOKS: Sequence[tuple[str, Look]] = (
    ("unit", unit),
    ("supervisor", _supervisor),
    ("permissions", _permissions),
    ("file system", _file_system),
    ("inotify", _inotify),
    ("git", _git),
    ("environment", _variables),
    ("port", _port),
    ("clock", _clock),
)
