"""Control: the socket that the commands speak to, and the client's end of it.

One line of JSON per request, one per answer, each with the version of the protocol. A request that takes time
(``reload``, ``stop``, ``verify``) is answered when it has an outcome; the connection waits, the loop does
not.

The rules: only the owner of the supervisor and root get an answer (SO_PEERCRED; the socket has mode 0600,
too); **nothing a client does or leaves undone costs anybody but itself**: reading and answering never block,
a line over the limit or one that is no request ends its connection, and when there are too many, whoever has
kept us waiting longest makes room; one supervisor per runtime directory, held by a lock on a file that the
kernel releases with the process, so a socket left by a dead one is simply replaced.
"""

from __future__ import annotations

import functools
import json
import os
import select
import selectors
import socket
import stat
import struct
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from msgspec import Struct

from supervisor import lock
from supervisor.errors import NoSupervisorError, UsageError
from supervisor.notify import check_socket_path

VERSION = 1
_SOCKET = "control.sock"
_REQUEST_BYTES = 64 * 1024
_MAX_CLIENTS = 64
_PEER = struct.Struct("3i")

Answer = dict[str, Any]


class ClientEstate(Struct, frozen=True):
    """A connection as it is left to the next image of the supervisor; see :class:`Client`."""

    connection: int
    uid: int | None
    received: bytes
    unsent: bytes
    waits_for_us: bool


class ControlEstate(Struct, frozen=True):
    """The socket as it is left to the next image of the supervisor.

    Attributes:
        listener: descriptor of the socket.
        lock: descriptor that holds the runtime directory.
        clients: the open connections.
    """

    listener: int
    lock: int
    clients: tuple[ClientEstate, ...]

    @property
    def descriptors(self) -> list[int]:
        """What has to stay open."""
        return [self.listener, self.lock, *(client.connection for client in self.clients)]


class Client:
    """One connection of a command, as the supervisor sees it.

    Args:
        connection: non-blocking; owned by this object.
        selector: the main loop's.
        uid: of the process at the other end, None where the platform does not tell.
    """

    def __init__(
        self, connection: socket.socket, selector: selectors.BaseSelector, uid: int | None = None
    ) -> None:
        self.connection = connection
        self.uid = uid
        self.received = bytearray()
        self.waits_for_us = False
        """It has sent its request, and the answer is not yet known."""
        self._selector = selector
        self._unsent = memoryview(b"")

    @property
    def open(self) -> bool:
        """Whether an answer can still reach the command."""
        return self.connection.fileno() >= 0

    def listen(self, event: int, call: Callable[[], None]) -> None:
        """Have the loop call ``call`` when the connection is ready for ``event``, and for nothing else."""
        self.ignore()
        self._selector.register(self.connection, event, call)

    def ignore(self) -> None:
        """Have the loop call nothing."""
        if self.open and self.connection in self._selector.get_map():
            self._selector.unregister(self.connection)

    def answer(self, body: Answer) -> None:
        """Send the answer, then the end of the connection; what does not fit now goes when there is room."""
        if self.open:
            self.waits_for_us = False
            self._unsent = memoryview(json.dumps({"v": VERSION, **body}).encode() + b"\n")
            self.listen(selectors.EVENT_WRITE, self._send)
            self._send()

    def close(self) -> None:
        """End the connection."""
        self.ignore()
        self.connection.close()

    @property
    def estate(self) -> ClientEstate:
        """What is left to the next image of the supervisor."""
        received, unsent = bytes(self.received), bytes(self._unsent)
        return ClientEstate(self.connection.fileno(), self.uid, received, unsent, self.waits_for_us)

    @classmethod
    def adopt(cls, estate: ClientEstate, selector: selectors.BaseSelector) -> Client:
        """Take over a connection; one with an answer on its way goes on with it."""
        connection = socket.socket(fileno=estate.connection)
        connection.setblocking(False)
        client = cls(connection, selector, estate.uid)
        client.received += estate.received
        client.waits_for_us = estate.waits_for_us
        client._unsent = memoryview(estate.unsent)
        if estate.unsent:
            client.listen(selectors.EVENT_WRITE, client._send)
        return client

    def _send(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:
            self._unsent = memoryview(b"")  # It is gone.
        self.close()


class ControlServer:
    """Owns a runtime directory and hears the commands that come to it.

    Args:
        directory: runtime directory; created with mode 0700.
        selector: the main loop's; descriptors are registered with a function to call as their data.
        handle: called with the client and each request; answers now or later.
        estate: what another image of the supervisor has left.

    Raises:
        AlreadyRunningError: another supervisor owns the directory.
        UsageError: the directory cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        selector: selectors.BaseSelector,
        handle: Callable[[Client, dict[str, Any]], None],
        estate: ControlEstate | None = None,
    ) -> None:
        self._path = directory / _SOCKET
        check_socket_path(self._path)
        self._lock = estate.lock if estate is not None else lock.take(directory, "--runtime-dir")
        self._selector = selector
        self._handle = handle
        self._clients: list[Client] = []
        if estate is not None:
            self._socket = socket.socket(fileno=estate.listener)
            self._socket.setblocking(False)
            self._adopt(estate.clients)
        else:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._bind(directory)
        selector.register(self._socket, selectors.EVENT_READ, self._accept)

    def _bind(self, directory: Path) -> None:
        try:
            _refuse_foreign(directory)
            self._socket.setblocking(False)
            self._path.unlink(missing_ok=True)
            self._socket.bind(str(self._path))
            self._path.chmod(0o600)
            self._socket.listen(_MAX_CLIENTS)
        except (OSError, UsageError) as error:
            self._socket.close()
            os.close(self._lock)
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"cannot make the socket {self._path}: {error.strerror}; name another --runtime-dir"
            ) from error

    def _adopt(self, clients: Collection[ClientEstate]) -> None:
        for left in clients:
            client = Client.adopt(left, self._selector)
            self._clients.append(client)
            if client.waits_for_us:
                self._wait_with(client)
            elif not left.unsent:
                client.listen(selectors.EVENT_READ, functools.partial(self._read, client))

    def waiting(self, connections: Collection[int]) -> list[Client]:
        """Return the clients with these descriptors that still wait for us."""
        return [c for c in self._clients if c.waits_for_us and c.connection.fileno() in connections]

    @property
    def estate(self) -> ControlEstate:
        """What is left to the next image of the supervisor."""
        clients = tuple(client.estate for client in self._clients if client.open)
        return ControlEstate(self._socket.fileno(), self._lock, clients)

    def let_go(self) -> None:
        """Leave socket, lock and connections to another image; this object is of no more use."""
        for connection in (self._socket, *(client.connection for client in self._clients)):
            connection.detach()

    def close(self) -> None:
        """Stop listening and release the directory."""
        self._selector.unregister(self._socket)
        self._socket.close()
        for client in self._clients:
            client.close()
        self._path.unlink(missing_ok=True)
        os.close(self._lock)

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError:
            return
        connection.setblocking(False)
        uid = _peer_uid(connection)
        if (uid is not None and uid not in {0, os.getuid()}) or not self._has_room():
            connection.close()
            return
        client = Client(connection, self._selector, uid)
        self._clients.append(client)
        client.listen(selectors.EVENT_READ, lambda: self._read(client))

    def _has_room(self) -> bool:
        """Make room for one more; whoever waits for us keeps its place."""
        self._clients = [client for client in self._clients if client.open]
        if len(self._clients) >= _MAX_CLIENTS:
            oldest = next((client for client in self._clients if not client.waits_for_us), None)
            if oldest is None:
                return False
            oldest.close()
            self._clients.remove(oldest)
        return True

    def _read(self, client: Client) -> None:
        try:
            data = client.connection.recv(_REQUEST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        line, newline, _ = client.received.partition(b"\n")
        if len(line) > _REQUEST_BYTES or not (data or newline):
            client.close()
        elif newline:
            client.waits_for_us = True
            self._wait_with(client)
            self._dispatch(client, bytes(line))

    def _wait_with(self, client: Client) -> None:
        client.listen(selectors.EVENT_READ, lambda: self._heard_more(client))

    def _heard_more(self, client: Client) -> None:
        """Take note that a waiting client has gone; one that has only said its last word may still listen."""
        poll = select.poll()
        poll.register(client.connection, 0)
        if poll.poll(0):  # With nothing asked for, it reports POLLHUP and POLLERR alone.
            client.close()
        else:
            client.ignore()

    def _dispatch(self, client: Client, line: bytes) -> None:
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:  # The second: brackets without end.
            client.answer({"ok": False, "error": f"not a request: {error}"})
            return
        if isinstance(request, dict) and request.get("v") == VERSION:
            self._handle(client, request)
        else:
            client.answer({"ok": False, "error": f"not a request: this supervisor speaks version {VERSION}"})


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
        NoSupervisorError: nobody answers, or not in this language.
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
    if not answer.endswith(b"\n"):
        raise NoSupervisorError(f"the supervisor at {path} ended before it had answered")
    return _answer(answer, path)


def _answer(line: bytes, path: Path) -> Answer:
    try:
        body = json.loads(line)
    except ValueError:
        body = None
    if not isinstance(body, dict) or body.get("v") != VERSION or "ok" not in body:
        raise NoSupervisorError(f"what answers at {path} does not speak version {VERSION} of the protocol")
    return body


def _refuse_foreign(directory: Path) -> None:
    """Refuse a directory in which somebody else could put a socket in place of ours.

    Raises:
        UsageError: it belongs to another user, or everybody may write to it.
    """
    facts = directory.stat()
    if facts.st_uid not in {0, os.getuid()} or facts.st_mode & stat.S_IWOTH:
        raise UsageError(
            f"the runtime directory {directory} belongs to another user or is writable for all; "
            "name another one with --runtime-dir"
        )


def _peer_uid(connection: socket.socket) -> int | None:
    if sys.platform != "linux":
        return None  # The mode of the socket decides alone.
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    uid: int = _PEER.unpack(credentials)[1]
    return uid
