"""The monitor's own `/metrics`, for when it runs alone; off unless `--listen` is given.

The rule: a scrape never disturbs the relay. The server runs in one thread with a timeout on each connection,
on the address that was asked for and no other. Rejected: `prometheus_client.start_http_server`, which
listens on all interfaces by default, starts a thread for every connection and keeps stalled ones for ever.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import TCPServer
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from monitor.errors import MonitorError
from monitor.logs import log
from monitor.settings import Listen

_TIMEOUT_SECONDS = 5


class EndpointError(MonitorError):
    """The address cannot be listened on, most often because its port is in use; nothing was started."""

    label = "listen"


class _Handler(WSGIRequestHandler):
    """Answers one request, quickly or not at all."""

    timeout = _TIMEOUT_SECONDS

    def log_message(self, *_: object) -> None:
        """Leave scrapes out of the log."""


class _Server(WSGIServer):
    """Binds without asking the name service who we are."""

    def server_bind(self) -> None:
        """Bind, and name the server by its address."""
        TCPServer.server_bind(self)
        self.server_name = str(self.server_address[0])
        self.server_port = int(self.server_address[1])
        self.setup_environ()


@contextmanager
def listening(address: Listen, registry: CollectorRegistry) -> Iterator[int]:
    """Serve the registry while the block runs; yields the port, which matters if 0 was asked for.

    Raises `EndpointError` when the address is not to be had.
    """
    try:
        server = _Server((address.host, address.port), _Handler)
    except OSError as error:
        raise EndpointError(
            f"cannot listen on {address.host}:{address.port} ({error.strerror}); give another --listen"
        ) from error
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    log.info("Metrics on http://%s:%d/metrics", address.host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
