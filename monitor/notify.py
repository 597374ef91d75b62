"""sd_notify: tells the service manager, or the supervisor, that the monitor is ready, alive, or suspicious.

The rule: telling never blocks and never fails the teller. The package `sdnotify` keeps one blocking socket
for ever, swallows every error and encodes as latin-1; here the socket does not block, a lost one is opened
again at the next message, text goes out as UTF-8 without line breaks (a newline would start a new
assignment), and what could not be sent is counted.

Without `NOTIFY_SOCKET` nothing is sent and nothing is counted. Source: sd_notify(3).
"""

import os
import time

from sdnotify import SystemdNotifier

from monitor.logs import mask_numbers

_MIN_PING_GAP_SECONDS = 0.2


class Notifier:
    """The line to whoever started this process.

    `errors_total` counts messages that could not be delivered.
    """

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        self._line: SystemdNotifier | None = None
        self._status = ""
        self._last_ping_seconds = float("-inf")
        self.errors_total = 0

    def ready(self) -> None:
        """Say that work can begin; the first ping goes with it."""
        self._send("READY=1\nWATCHDOG=1")

    def alive(self) -> None:
        """Say that a turn was completed; turns of a few milliseconds share one message."""
        now_seconds = time.monotonic()
        if now_seconds - self._last_ping_seconds >= _MIN_PING_GAP_SECONDS:
            self._last_ping_seconds = now_seconds
            self._send("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Show `text` as the status line, if it is a new one; pages show it, so never with a number."""
        line = mask_numbers(" ".join(text.split()))
        if line != self._status:
            self._status = line
            self._send(f"STATUS={line}")

    def suspect(self, why: str) -> None:
        """Ask the supervisor to check at once that the running code is the code on disk."""
        self._send(f"X_SUSPECT={' '.join(why.split())}")

    def stopping(self) -> None:
        """Say that the end was asked for and has begun."""
        self._send("STOPPING=1")

    def close(self) -> None:
        """Let go of the socket; a later message opens it again."""
        line, self._line = self._line, None
        if line is not None:
            line.socket.close()

    def _send(self, state: str) -> None:
        """Deliver `state` or count that it was not."""
        if not self._address:
            return
        try:
            if self._line is None:
                self._line = SystemdNotifier(debug=True)
                self._line.socket.setblocking(False)
            # The package encodes latin-1, which maps these characters back to the UTF-8 bytes they came from.
            self._line.notify(state.encode("utf-8", "replace").decode("latin-1"))
        except BlockingIOError:
            self.errors_total += 1  # the receiver is behind; the next ping says the same
        except OSError:
            self.errors_total += 1
            self.close()
