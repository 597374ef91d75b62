"""Web: the HTTP endpoint, read only. Scrapes and probes; nothing here decides anything.

The rule: **the main loop owes HTTP nothing and HTTP cannot hold it up.** The loop publishes a status;
requests are answered in threads of their own from the last one. Their number is bounded, and **a scrape
always gets through**: when all places are taken, a connection on which nothing is being answered makes room,
the oldest first, and a client that neither speaks nor reads loses its connection after a few seconds anyway.

Writing out 10,000 series takes its time of the interpreter, so scrapes that arrive together share one
exposition, made after the last of them had arrived.

The status page (:mod:`supervisor.page`) is followed by server-sent events: a section is sent when it has
changed. Streams have places of their own number among the connections, and are the next to make room after
those that are silent; a browser comes back by itself.

**A page of somebody else reads nothing here**, not even after it has made its own name mean our address (DNS
rebinding): a request is answered when it names an address, this machine, or a name that the settings allow,
and when no other origin has asked for it.

Rejected: websockets (a protocol of its own for one direction), ``prometheus_client.start_http_server`` (all
interfaces by default, a thread for each connection without limit or timeout, one raising collector turns the
whole scrape into an error).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import select
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Generic, TypeVar

from prometheus_client.exposition import CONTENT_TYPE_LATEST

from supervisor import page
from supervisor.errors import AddressError
from supervisor.threads import without_signals

_MAX_CONNECTIONS = 32
_MAX_STREAMS = 8
_STREAM_LOOK_SECONDS = 0.5
_STREAM_SILENCE_SECONDS = 10.0
"""After which a stream says something that means nothing, so that a side that is gone is noticed."""
_TIMEOUT_SECONDS = 5.0
_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")
_RELIEF_SECONDS = 0.1
_ANSWERS_SECONDS = 1.0

Status = Mapping[str, Any]
Sections = Mapping[str, str]
_Made = TypeVar("_Made")

_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class WebServer:
    """Serves the status page, ``/metrics``, ``/livez``, ``/readyz`` and ``/status.json`` once it is started.

    Args:
        address: host and port; port 0 lets the kernel choose.
        exposition: returns what ``/metrics`` shows. All three are called from other threads, one at a time.
        status: returns the last published status.
        sections: returns the title of the status page and its sections by their ids.
        allowed_hosts: returns names by which the address may be called, beside its own and this machine's.
        listener: descriptor of a socket that another image of the supervisor listened on; None for a new one.

    Raises:
        AddressError: the address is not to be had.
    """

    def __init__(
        self,
        address: tuple[str, int],
        exposition: Callable[[], bytes],
        status: Callable[[], Status],
        sections: Callable[[], tuple[str, Sections]],
        *,
        allowed_hosts: Callable[[], Collection[str]] = tuple,
        listener: int | None = None,
    ) -> None:
        served = _Served(
            _Shared(exposition),
            status,
            _Shared(sections, reused_seconds=_STREAM_LOOK_SECONDS / 2),
            lambda: {address[0].lower(), os.uname().nodename.lower(), "localhost", *allowed_hosts()},
        )

        def handler(*args: Any) -> _Handler:  # noqa: ANN401 -- what the server passes on
            return _Handler(*args, served=served)

        try:
            self._server = _Server(address, handler, listener)
        except (OSError, OverflowError, TypeError) as error:  # The last: a name that IDNA has not.
            where = f"{address[0]}:{address[1]}"
            why = getattr(error, "strerror", None) or str(error)
            raise AddressError(
                f"cannot listen on {where}: {why}; free it or choose another --listen"
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="web", daemon=True)

    def start(self) -> None:
        """Begin to answer; whoever has connected before has waited for it."""
        with without_signals():
            self._thread.start()

    @property
    def address(self) -> str:
        """``HOST:PORT`` that is listened on, as it stands in a URL."""
        host, port = self._server.server_address[:2]
        return f"[{host!s}]:{port}" if ":" in str(host) else f"{host!s}:{port}"

    def leave(self) -> int:
        """Answer what was asked, and return the descriptor that is listened on; who connects now waits.

        This object is of no more use.
        """
        self._end_thread()
        self._server.connections.wait_for_answers()
        listener = self._server.socket.detach()
        self._server.server_close()
        return listener

    def close(self) -> None:
        """Stop listening, and end the connections there are."""
        self._end_thread()
        self._server.server_close()

    def _end_thread(self) -> None:
        self._server.stop()
        if self._thread.is_alive():
            self._thread.join()


class _Connections:
    """The open connections, oldest first, and whether each is being answered."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._answering: dict[socket.socket, bool] = {}
        self._unheard: set[socket.socket] = set()
        """Those that have not asked anything yet: their first words may be on the way."""
        self._streams: set[socket.socket] = set()

    def add(self, connection: socket.socket) -> None:
        """Take a connection in; where there is no place left, another one is ended."""
        with self._changed:
            if len(self._answering) >= _MAX_CONNECTIONS:
                idle = [known for known, answering in self._answering.items() if not answering]
                silent = (known for known in idle if known not in self._streams)
                self._end(next(silent, next(iter((*idle, *self._answering)))))
            self._answering[connection] = False
            self._unheard.add(connection)

    def answering(self, connection: socket.socket, *, now: bool) -> None:
        """Note that an answer begins, or that it is done."""
        with self._changed:
            if connection in self._answering:
                self._answering[connection] = now
                self._unheard.discard(connection)
                self._changed.notify_all()

    def stream(self, connection: socket.socket) -> bool:
        """Note that from now on a connection is told what is new; False if there are too many of these."""
        with self._changed:
            if len(self._streams) >= _MAX_STREAMS or connection not in self._answering:
                return False
            self._streams.add(connection)
            self._answering[connection] = False
            self._changed.notify_all()
            return True

    def remove(self, connection: socket.socket) -> None:
        """Let go of a connection whose thread is done with it."""
        with self._changed:
            self._answering.pop(connection, None)
            self._unheard.discard(connection)
            self._streams.discard(connection)
            self._changed.notify_all()

    def wait_for_answers(self) -> None:
        """Wait until everybody who has connected was answered, for a moment."""
        with self._changed:
            self._changed.wait_for(self._all_answered, _ANSWERS_SECONDS)

    def _all_answered(self) -> bool:
        return not self._unheard and not any(self._answering.values())

    def end_all(self) -> None:
        """End every connection and wait until their threads have let go of them."""
        with self._changed:
            for connection in self._answering:
                _shut_down(connection)
            self._changed.wait_for(lambda: not self._answering, _TIMEOUT_SECONDS)

    def _end(self, connection: socket.socket) -> None:
        """Wake the thread of a connection with its end; the thread closes it."""
        del self._answering[connection]
        self._unheard.discard(connection)
        self._streams.discard(connection)
        _shut_down(connection)


def _shut_down(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # It may have been ended from the other side.
        connection.shutdown(socket.SHUT_RDWR)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        handler: Callable[..., BaseHTTPRequestHandler],
        listener: int | None,
    ) -> None:
        self._listener = listener
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.connections = _Connections()
        self._stop_reader, self._stop_writer = socket.socketpair()
        try:
            super().__init__(address, handler)
        except BaseException:
            self._close_stop()
            raise

    def server_bind(self) -> None:
        """Bind without the reverse look-up of the name that the base class does, which may take seconds."""
        if self._listener is not None:
            self.socket.close()
            self.socket = socket.socket(fileno=self._listener)
            self.socket.setblocking(False)
            self.server_address = self.socket.getsockname()
            return
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.setblocking(False)  # Who was there when the loop was woken may be gone when it accepts.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def serve_forever(self, poll_interval: float = 0.0) -> None:
        """Accept connections until :meth:`stop`; the base class would look for that twice a second."""
        del poll_interval
        with selectors.DefaultSelector() as selector:
            selector.register(self, selectors.EVENT_READ)
            selector.register(self._stop_reader, selectors.EVENT_READ)
            while self._stop_reader not in [key.fileobj for key, _ in selector.select()]:
                self._accept()

    def stop(self) -> None:
        """End :meth:`serve_forever` and all streams (from another thread)."""
        self._stop_writer.close()

    def waits(self, connection: socket.socket, seconds: float) -> bool:
        """Wait, and return whether neither the server nor the client of a stream has ended it."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._stop_reader, select.POLLIN)
        return not poll.poll(seconds * 1000)

    def server_close(self) -> None:
        """Close everything; the threads of open connections end with them."""
        super().server_close()
        self.connections.end_all()
        self._close_stop()

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Answer in a thread; the place for it is made first."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Close a connection and give its place back."""
        self.connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 -- as in the base class
        """Stay silent about clients that went away or were too slow; the base class prints anything else."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def _accept(self) -> None:
        try:
            connection, peer = self.get_request()
        except BlockingIOError:
            return
        except OSError:
            # Out of descriptors, most likely: a moment later there may be one, and asking at once is no use.
            select.select([self._stop_reader], [], [], _RELIEF_SECONDS)
            return
        try:
            self.process_request(connection, peer)
        except RuntimeError:  # There can be no more threads.
            self.shutdown_request(connection)

    def _close_stop(self) -> None:
        self._stop_reader.close()
        self._stop_writer.close()


class _Shared(Generic[_Made]):
    """Something that is made once for all who ask at the same time.

    Args:
        make: makes it; never called twice at a time.
        reused_seconds: for how long it is good enough for who asks later.
    """

    def __init__(self, make: Callable[[], _Made], reused_seconds: float = 0.0) -> None:
        self._make = make
        self._reused_seconds = reused_seconds
        self._good_until = 0.0
        self._asking = threading.Lock()
        self._writing = threading.Lock()
        self._asked = 0
        self._written = 0
        self._made: _Made | None = None

    def current(self) -> _Made:
        """Return one that was begun after this call, or one that is good enough."""
        with self._asking:
            self._asked += 1
            mine = self._asked
        with self._writing:
            made, now = self._made, time.monotonic()
            if made is None or (self._written < mine and now >= self._good_until):
                with self._asking:
                    written = self._asked
                made = self._made = self._make()
                self._written, self._good_until = written, now + self._reused_seconds
            return made


class _Served:
    """What is served, and who may ask for it."""

    def __init__(
        self,
        exposition: _Shared[bytes],
        status: Callable[[], Status],
        sections: _Shared[tuple[str, Sections]],
        hosts: Callable[[], Collection[str]],
    ) -> None:
        self.exposition = exposition
        self.status = status
        self.sections = sections
        self._hosts = hosts

    def knows(self, host: str) -> bool:
        """Whether a Host header names us: an address cannot be made to mean another one, a name can."""
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        try:
            ipaddress.ip_address(found["address"] or found["name"])
        except ValueError:
            name = (found["name"] or "").lower().rstrip(".")
            return name in self._hosts() or name.endswith(".localhost")
        return True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "wa-supervisor"
    sys_version = ""
    timeout = _TIMEOUT_SECONDS
    server: _Server

    def __init__(self, *args: Any, served: _Served) -> None:  # noqa: ANN401 -- what the server passes on
        self._served = served
        super().__init__(*args)

    def do_GET(self) -> None:
        """Answer GET (and HEAD, without a body)."""
        self.server.connections.answering(self.connection, now=True)
        refused = self._refusal()
        if refused is None:
            self._answer(self.path.partition("?")[0])
        else:
            code, why = refused
            self._send(code, f"{why}\n".encode(), "text/plain; charset=utf-8")
        self.server.connections.answering(self.connection, now=False)

    do_HEAD = do_GET  # noqa: N815 -- the name is http.server's

    def log_message(self, *args: object) -> None:
        """Keep quiet: a scrape every few seconds is no news."""

    def end_headers(self) -> None:
        """Add what every answer says to a browser."""
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        """Return why a request is not answered, None if it is."""
        hosts = self.headers.get_all("Host", [])
        if len(hosts) > 1:
            return HTTPStatus.BAD_REQUEST, "more than one Host"
        if hosts and not self._served.knows(hosts[0].strip()):
            why = "no host of this name is here; use its address, or allow the name with --allow-host"
            return HTTPStatus.MISDIRECTED_REQUEST, why
        origins = self.headers.get_all("Origin", [])
        own = {f"{scheme}://{host.strip()}".lower() for host in hosts for scheme in ("http", "https")}
        mode, site = (
            self.headers.get("Sec-Fetch-Mode", "navigate"),
            self.headers.get("Sec-Fetch-Site", "none"),
        )
        foreign = site in {"cross-site", "same-site"} and mode != "navigate"
        if foreign or not {origin.strip().lower() for origin in origins} <= own:
            return HTTPStatus.FORBIDDEN, "pages of other origins may not read this"
        return None

    def _answer(self, path: str) -> None:
        status = self._served.status()
        if path == "/metrics":
            self._send(HTTPStatus.OK, self._served.exposition.current(), CONTENT_TYPE_LATEST)
        elif path == "/":
            document = page.document(*self._served.sections.current()).encode()
            self._send(HTTPStatus.OK, document, "text/html; charset=utf-8", policy=page.POLICY)
        elif path == "/events":
            self._stream()
        elif path == "/status.json":
            self._send(HTTPStatus.OK, json.dumps(status, indent=2).encode(), "application/json")
        elif path == "/livez":
            self._probe(bool(status.get("loop_alive")), "the main loop turns", "the main loop hangs")
        elif path == "/readyz":
            why_not = str(status.get("reason") or "no live generation")
            self._probe(status.get("live") is not None, "a live, attested generation serves", why_not)
        else:
            self._send(HTTPStatus.NOT_FOUND, b"see / /metrics /livez /readyz /status.json\n", "text/plain")

    def _stream(self) -> None:
        """Tell what is new on the page until one side ends it."""
        if self.command != "HEAD" and not self.server.connections.stream(self.connection):
            why = b"too many pages are followed already; load this one again for its news\n"
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, why, "text/plain; charset=utf-8")
            return
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        sent: Sections = {}
        spoke_at = time.monotonic()
        while True:
            title, sections = self._served.sections.current()
            news = {name: made for name, made in sections.items() if sent.get(name) != made}
            silent = time.monotonic() - spoke_at > _STREAM_SILENCE_SECONDS
            if news or silent:
                said = f"data: {json.dumps({'title': title, 'sections': news})}" if news else ":"
                self.wfile.write(f"{said}\n\n".encode())
                sent, spoke_at = sections, time.monotonic()
            if not self.server.waits(self.connection, _STREAM_LOOK_SECONDS):
                return

    def _probe(self, good: bool, yes: str, no: str) -> None:
        code = HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE
        text = f"{yes if good else no}\n".encode("utf-8", "replace")
        self._send(code, text, "text/plain; charset=utf-8")

    def _send(
        self, code: HTTPStatus, body: bytes, content_type: str, policy: str = "default-src 'none'"
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", policy)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
