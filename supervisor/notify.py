"""sd_notify, both ways: upwards to systemd, and the socket that children report to.

Upwards the rule is: a message is sent whole or counted as an error; it never blocks, never raises, and a
line break inside a value never forges a variable. A state (``READY``, ``RELOADING``, ``STOPPING``) that could
not be sent is still owed and goes before the next message, in order: a service manager that missed a
``READY`` would wait for it until it gives up. A ping or a status line is not owed, the next one says more.

Downwards the rule is systemd's ``NotifyAccess=main``: a datagram counts only if the kernel says
(SCM_CREDENTIALS) that the process it is about sent it. One that was cut off says nothing, and a child that
sends without end gets no more of the main loop than :data:`_MAX_AT_ONCE` datagrams a turn.

Rejected: the package ``sdnotify`` on this side (its ``notify`` blocks for ever when the receiver stalls,
loses every message after the socket was made anew, drops text outside latin-1, and says nothing of it).

Source: sd_notify(3), unix(7).
"""

from __future__ import annotations

import collections
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from supervisor.errors import UsageError

_CREDENTIALS = struct.Struct("3i")
_MAX_DATAGRAM_BYTES = 4096
_MAX_STATUS_BYTES = 2048
_MAX_OWED = 8
_MAX_AT_ONCE = 256
_SOCKET_PATH_BYTES = 107
_USEC = 1_000_000


class Notifier:
    """Tells the service manager how this supervisor is, if there is one.

    Args:
        environment: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` may stand.
        owed: messages that a predecessor could not send.

    Attributes:
        errors_total: messages that were not taken when they were sent.
        watchdog_seconds: longest silence that the service manager allows; 0 for any.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, owed: Sequence[str] = ()) -> None:
        self.errors_total = 0
        name = environment.get("NOTIFY_SOCKET", "")
        self._address = f"\0{name[1:]}" if name.startswith("@") else name  # The abstract namespace, unix(7).
        self.watchdog_seconds = _watchdog_seconds(environment) if name else 0.0
        self._socket: socket.socket | None = None
        self._owed: collections.deque[str] = collections.deque(owed, maxlen=_MAX_OWED)
        self._last_status = ""

    def ready(self) -> None:
        """The service works (after its start, and after each reload)."""
        self._owe("READY=1")

    def reloading(self) -> None:
        """A reload has begun; :meth:`ready` must follow."""
        self._owe(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service is about to end; nothing may follow."""
        self._owe("STOPPING=1")

    def alive(self) -> None:
        """The main loop turns and all is well (the service manager's watchdog)."""
        if self._settle():
            self._send("WATCHDOG=1")

    def broken(self) -> None:
        """We cannot be trusted any more: the service manager is to end us, and to start us anew."""
        self._send("WATCHDOG=trigger")

    def extend(self, seconds: float) -> None:
        """A start, a reload or a stop goes on: it is to have this long, from now or the next such word."""
        if self._settle():
            self._send(f"EXTEND_TIMEOUT_USEC={seconds * _USEC:.0f}")

    def status(self, text: str) -> None:
        """Show one line about the service in ``systemctl status``."""
        line = _one_line(text)
        if line != self._last_status and self._settle() and self._send(f"STATUS={line}"):
            self._last_status = line

    @property
    def is_heard(self) -> bool:
        """Whether there is a service manager."""
        return bool(self._address)

    @property
    def owed(self) -> tuple[str, ...]:
        """What the service manager has not taken yet."""
        return tuple(self._owed)

    def close(self) -> None:
        """Let go of the socket; a later message opens it again."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _owe(self, message: str) -> None:
        self._owed.append(message)
        self._settle()

    def _settle(self) -> bool:
        """Send what is owed; return whether nothing is left."""
        while self._owed and self._send(self._owed[0]):
            self._owed.popleft()
        return not self._owed

    def _send(self, message: str) -> bool:
        """Return whether a message was taken, or nobody wants it."""
        if not self._address:
            return True
        data = message.encode("utf-8", "replace")
        for _ in range(2):  # The second time with a new connection: the receiver may have been made anew.
            try:
                if self._socket is None:
                    self._socket = self._connected()
                self._socket.send(data)
            except BlockingIOError:
                break  # It is there and does not read; a new connection leads to the same queue.
            except OSError:
                self.close()
            else:
                return True
        self.errors_total += 1
        return False

    def _connected(self) -> socket.socket:
        """Return a connected socket that does not block.

        Raises:
            OSError: nobody listens.
        """
        made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            made.setblocking(False)
            made.connect(self._address)
        except OSError:
            made.close()
            raise
        return made


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """Return what sd_watchdog_enabled(3) would: 0 unless the watchdog is meant for this process."""
    usec = environment.get("WATCHDOG_USEC", "")
    if environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(usec) / _USEC if usec.isascii() and usec.isdecimal() else 0.0


def _one_line(text: str) -> str:
    """Return a text without line breaks and control characters, short enough for a datagram."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line.encode("utf-8", "replace")[:_MAX_STATUS_BYTES].decode("utf-8", "ignore")


class Datagram(Struct, frozen=True):
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
        descriptor: of the socket that a predecessor has bound to it; None for a new one.

    Raises:
        UsageError: there can be no socket of this name.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        check_socket_path(path)
        self.path = path
        if descriptor is not None:
            self._socket = socket.socket(fileno=descriptor)
            return
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            if sys.platform == "linux":
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            self._socket.setblocking(False)
            path.unlink(missing_ok=True)
            self._socket.bind(str(path))
            path.chmod(0o600)
        except OSError as error:
            self._socket.close()
            raise UsageError(
                f"cannot make the socket {path}: {error.strerror}; name another --runtime-dir"
            ) from error

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._socket.fileno()

    def receive(self) -> list[Datagram]:
        """Return messages that have arrived; there may be more, and the descriptor is readable then."""
        messages: list[Datagram] = []
        for _ in range(_MAX_AT_ONCE):
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    _MAX_DATAGRAM_BYTES, socket.CMSG_SPACE(_CREDENTIALS.size)
                )
            except BlockingIOError:
                break
            if not flags & socket.MSG_TRUNC:
                messages.append(Datagram(_sender(ancillary), _assignments(data)))
        return messages

    def let_go(self) -> None:
        """Leave the socket open for another image of the supervisor; this object is of no more use."""
        self._socket.detach()

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
    # Only a newline ends an assignment; str.splitlines() knows ten more characters that a value may hold.
    lines = data.decode("utf-8", "replace").split("\n")
    return {name: value for name, equals, value in (line.partition("=") for line in lines) if equals}
