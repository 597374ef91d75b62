"""Web: the HTTP endpoint, read only. Scrapes and probes; nothing here decides anything.

The rule: **the main loop owes HTTP nothing and HTTP cannot hold it up.** The loop publishes a status;
requests are answered in threads of their own from the last one. Their number and their time are bounded: over
the bound a connection is closed at once, and a client that does not speak or does not read loses its
connection after a few seconds.

Rejected: ``prometheus_client.start_http_server`` (all interfaces by default, a thread for each connection
without limit or timeout, one raising collector turns the whole scrape into an error).
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from supervisor.errors import AddressError

_MAX_CONNECTIONS = 32
_TIMEOUT_SECONDS = 5.0

Status = Mapping[str, Any]


class WebServer:
    """Serves ``/metrics``, ``/livez``, ``/readyz`` and ``/status.json``.

    Args:
        address: host and port; port 0 lets the kernel choose.
        registry: what ``/metrics`` shows.
        status: returns the last published status; called from other threads.

    Raises:
        AddressError: the address is not to be had.
    """

    def __init__(
        self, address: tuple[str, int], registry: CollectorRegistry, status: Callable[[], Status]
    ) -> None:
        def handler(*args: Any) -> _Handler:  # noqa: ANN401 -- what the server passes on
            return _Handler(*args, registry=registry, status=status)

        try:
            self._server = _Server(address, handler)
        except (OSError, OverflowError) as error:
            where = f"{address[0]}:{address[1]}"
            why = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                f"cannot listen on {where}: {why}; free it or choose another --listen"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """``HOST:PORT`` that is listened on."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self._slots = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the name that the base class does, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Answer in a thread if there is one left, else close the connection."""
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Answer one connection and give its place back."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Stay silent about clients that went away or were too slow; anything else is printed by the base class."""
        import sys  # noqa: PLC0415

        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "wa-supervisor"
    sys_version = ""
    timeout = _TIMEOUT_SECONDS

    def __init__(self, *args: Any, registry: CollectorRegistry, status: Callable[[], Status]) -> None:  # noqa: ANN401
        self._registry = registry
        self._status = status
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer GET (and HEAD, without a body)."""
        path = self.path.partition("?")[0]
        status = self._status()
        if path == "/metrics":
            self._send(HTTPStatus.OK, generate_latest(self._registry), CONTENT_TYPE_LATEST)
        elif path == "/status.json":
            self._send(HTTPStatus.OK, json.dumps(status, indent=2).encode(), "application/json")
        elif path == "/livez":
            self._probe(bool(status["loop_alive"]), "the main loop turns", "the main loop hangs")
        elif path == "/readyz":
            live = status["live"] is not None
            self._probe(
                live, "a live, attested generation serves", str(status["reason"] or "no live generation")
            )
        else:
            self._send(HTTPStatus.NOT_FOUND, b"see /metrics /livez /readyz /status.json\n", "text/plain")

    do_HEAD = do_GET  # noqa: N815 -- the name is http.server's

    def log_message(self, *args: object) -> None:
        """Keep quiet: a scrape every few seconds is no news."""

    def _probe(self, good: bool, yes: str, no: str) -> None:
        code = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        self._send(code, f"{yes if good else no}\n".encode(), "text/plain; charset=utf-8")

    def _send(self, code: HTTPStatus, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
