"""sd_notify, both ways: upwards to systemd, and the socket that children report to.

Upwards the package ``sdnotify`` knows where the socket is; sending is ours, because its own ``notify`` blocks
for ever when the receiver stalls, drops text outside latin-1 and loses every message after the socket was
made anew. The rule: a message is sent whole or counted as an error; it never blocks, never raises, and a
newline inside a value never forges a variable.

Downwards the rule is systemd's ``NotifyAccess=main``: a datagram counts only if the kernel says
(SCM_CREDENTIALS) that the process it is about sent it.

Source: sd_notify(3), unix(7).
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import sdnotify

from supervisor.errors import UsageError

_CREDENTIALS = struct.Struct("3i")
_MAX_DATAGRAM_BYTES = 4096
_SOCKET_PATH_BYTES = 107


class Notifier:
    """Tells the service manager how this supervisor is, if there is one.

    Args:
        environment: where ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC`` may stand.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self.errors_total = 0
        self._wanted = bool(environment.get("NOTIFY_SOCKET"))
        usec = environment.get("WATCHDOG_USEC", "")
        self.watchdog_seconds = int(usec) / 1_000_000 if usec.isdecimal() and self._wanted else 0.0
        self._socket: socket.socket | None = None
        self._last_status = ""

    def ready(self) -> None:
        """The service works (after its start, and after each reload)."""
        self._send("READY=1")

    def reloading(self) -> None:
        """A reload has begun; :meth:`ready` must follow."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service is about to end; nothing may follow."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The main loop turns and all is well (the service manager's watchdog)."""
        self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Show one line about the service in ``systemctl status``."""
        line = " ".join(text.split())
        if line != self._last_status:
            self._last_status = line
            self._send(f"STATUS={line}")

    def _send(self, message: str) -> None:
        if not self._wanted:
            return
        data = message.encode("utf-8", "replace")
        for _ in range(2):  # The second time with a new connection: the receiver may have been made anew.
            try:
                if self._socket is None:
                    self._socket = sdnotify.SystemdNotifier().socket
                    if self._socket is None:
                        raise ConnectionError("the notify socket does not answer")
                    self._socket.setblocking(False)
                self._socket.send(data)
            except OSError:
                if self._socket is not None:
                    self._socket.close()
                self._socket = None
            else:
                return
        self.errors_total += 1


@dataclass(frozen=True, slots=True)
class Datagram:
    """One message of a child.

    Attributes:
        pid: of the process that sent it, as the kernel says; None where the platform does not tell.
        fields: its assignments, for example ``{"READY": "1"}``.
    """

    pid: int | None
    fields: Mapping[str, str]


class NotifySocket:
    """The socket that children find in ``NOTIFY_SOCKET``.

    Args:
        path: is replaced if it exists.

    Raises:
        UsageError: the path is too long for a socket.
    """

    def __init__(self, path: Path) -> None:
        check_socket_path(path)
        self.path = path
        path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        if sys.platform == "linux":
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._socket.setblocking(False)
        self._socket.bind(str(path))
        path.chmod(0o600)

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def receive(self) -> list[Datagram]:
        """Return the messages that have arrived."""
        messages: list[Datagram] = []
        while True:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(
                    _MAX_DATAGRAM_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                return messages
            messages.append(Datagram(_sender(ancillary), _assignments(data)))

    def close(self) -> None:
        """Close the socket and remove its file."""
        self._socket.close()
        self.path.unlink(missing_ok=True)


def check_socket_path(path: Path) -> None:
    """Refuse a path that the kernel cannot take as the name of a socket.

    Raises:
        UsageError: it is longer than 107 bytes.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_BYTES:
        raise UsageError(f"{path} is too long for a socket (107 bytes); choose a shorter --runtime-dir")


def _sender(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    if sys.platform == "linux":
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid: int = _CREDENTIALS.unpack(data[: _CREDENTIALS.size])[0]
                return pid
    return None


def _assignments(data: bytes) -> dict[str, str]:
    lines = data.decode("utf-8", "replace").splitlines()
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
