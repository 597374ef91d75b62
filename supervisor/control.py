"""Control: the socket that the commands speak to, and the client's end of it.

One line of JSON per request, one per answer, each with the version of the protocol. A request that takes time
(``reload``, ``stop``, ``verify``) is answered when it has an outcome; the connection waits, the loop does
not.

The rules: only the owner of the supervisor and root get an answer (SO_PEERCRED; the socket has mode 0600,
too); a line over the limit, a line that is no request, or a client that does not read its answer costs that
client its connection and nobody else anything; one supervisor per runtime directory, held by a lock on a file
that the kernel releases with the process, so a socket left by a dead one is simply replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.errors import AlreadyRunningError, NoSupervisorError, UsageError
from supervisor.notify import check_socket_path

VERSION = 1
_SOCKET = "control.sock"
_LOCK = "lock"
_REQUEST_BYTES = 64 * 1024
_MAX_CLIENTS = 64
_ANSWER_SECONDS = 0.5
_PEER = struct.Struct("3i")

Answer = dict[str, Any]


class Client:
    """One connection of a command, as the supervisor sees it."""

    def __init__(self, connection: socket.socket, uid: int | None) -> None:
        self.connection = connection
        self.uid = uid
        self.received = bytearray()

    @property
    def open(self) -> bool:
        """Whether an answer can still reach the command."""
        return self.connection.fileno() >= 0

    def answer(self, body: Answer) -> None:
        """Send the answer and the end of the connection; a client that does not read it does without."""
        if self.open:
            with contextlib.suppress(OSError):
                self.connection.settimeout(
                    _ANSWER_SECONDS
                )  # The socket's buffer takes nearly every answer at once.
                self.connection.sendall(json.dumps({"v": VERSION, **body}).encode() + b"\n")
        self.close()

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


class ControlServer:
    """Owns a runtime directory and hears the commands that come to it.

    Args:
        directory: runtime directory; created with mode 0700. selector: the main loop's; the server registers
        its own descriptors, with ``(handler,)`` as their data. handle: called with the client and each
        request; answers now or later.

    Raises:
        AlreadyRunningError: another supervisor owns the directory.
        UsageError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        selector: selectors.BaseSelector,
        handle: Callable[[Client, dict[str, Any]], None],
    ) -> None:
        check_socket_path(directory / _SOCKET)
        self._lock = _lock(directory)
        self._path = directory / _SOCKET
        self._path.unlink(missing_ok=True)
        self._selector = selector
        self._handle = handle
        self._clients: set[Client] = set()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self._path))
        self._path.chmod(0o600)
        self._socket.listen(_MAX_CLIENTS)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Stop listening and release the directory."""
        self._selector.unregister(self._socket)
        self._socket.close()
        for client in tuple(self._clients):
            self._drop(client)
        self._path.unlink(missing_ok=True)
        os.close(self._lock)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        uid = _peer_uid(connection)
        if len(self._clients) >= _MAX_CLIENTS or (uid is not None and uid not in {0, os.getuid()}):
            connection.close()
            return
        connection.setblocking(False)
        client = Client(connection, uid)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(client))

    def _read(self, client: Client) -> None:
        try:
            data = client.connection.recv(_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        line, newline, _ = client.received.partition(b"\n")
        if newline:
            self._forget(client)
            self._dispatch(client, bytes(line))
        elif not data or len(client.received) > _REQUEST_BYTES:
            self._drop(client)

    def _dispatch(self, client: Client, line: bytes) -> None:
        try:
            request = json.loads(line)
            if not isinstance(request, dict) or request.get("v") != VERSION:
                raise ValueError(f"this supervisor speaks version {VERSION}")
        except ValueError as error:
            client.answer({"ok": False, "error": f"not a request: {error}"})
            return
        self._handle(client, request)

    def _forget(self, client: Client) -> None:
        """Stop listening to a client that has said all it may say; its connection stays for the answer."""
        self._clients.discard(client)
        self._selector.unregister(client.connection)

    def _drop(self, client: Client) -> None:
        self._forget(client)
        client.close()


def request(
    directory: Path, command: str, *, timeout_seconds: float | None = None, **arguments: object
) -> Answer:
    """Send one command to the supervisor of a runtime directory and return its answer.

    Args:
        directory: the runtime directory.
        command: its name.
        timeout_seconds: longest wait for the answer; None waits for as long as the supervisor lives.
        arguments: of the command.

    Raises:
        NoSupervisorError: nobody answers.
    """
    path = directory / _SOCKET
    line = json.dumps({"v": VERSION, "command": command, **arguments}).encode() + b"\n"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_seconds)
        try:
            connection.connect(str(path))
            connection.sendall(line)
            with connection.makefile("rb") as file:
                answer = file.readline()
        except OSError as error:
            why = (
                "the answer took too long"
                if isinstance(error, TimeoutError)
                else error.strerror or str(error)
            )
            raise NoSupervisorError(
                f"no supervisor answers at {path} ({why}); start one, or name its --runtime-dir"
            ) from error
    if not answer:
        raise NoSupervisorError(f"the supervisor at {path} ended before it had answered")
    body: Answer = json.loads(answer)
    return body


def _lock(directory: Path) -> int:
    """Take the directory for this process and return the descriptor that holds it."""
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(
            f"cannot use the runtime directory {directory}: {error.strerror}; name another one with --runtime-dir"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise AlreadyRunningError(
            f"a supervisor with pid {owner} already owns {directory}; use it, or name another --runtime-dir"
        ) from None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    return descriptor


def _peer_uid(connection: socket.socket) -> int | None:
    if sys.platform != "linux":
        return None  # The mode of the socket decides alone.
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(credentials)[1]
    return uid
