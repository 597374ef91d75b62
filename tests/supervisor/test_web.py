"""The HTTP endpoint under clients that stall: a scrape always gets through."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from supervisor import web
from supervisor.errors import AddressError
from supervisor.page import POLICY
from supervisor.web import WebServer
from tests.supervisor.harness import until

DEADLINE_SECONDS = 10.0
GOOD: dict[str, Any] = {"loop_alive": True, "live": {"generation": 1}, "reason": None}


@pytest.fixture
def status() -> dict[str, Any]:
    """What the main loop has published; a test may change it."""
    return dict(GOOD)


@pytest.fixture
def collectors() -> CollectorRegistry:
    created = CollectorRegistry()
    Counter("drops", "Drops.", registry=created).inc(3)
    return created


def serve(
    collectors: CollectorRegistry,
    status: Callable[[], dict[str, Any]],
    address: tuple[str, int] = ("127.0.0.1", 0),
    sections: Callable[[], tuple[str, dict[str, str]]] = lambda: ("title", {"headline": "<p>said</p>"}),
    **more: Any,
) -> WebServer:
    return WebServer(address, lambda: generate_latest(collectors), status, sections, **more)


@pytest.fixture
def server(collectors: CollectorRegistry, status: dict[str, Any]) -> Iterator[WebServer]:
    made = serve(collectors, lambda: status)
    made.start()
    yield made
    made.close()


def place(server: WebServer) -> tuple[str, int]:
    host, _, port = server.address.rpartition(":")
    return host.strip("[]"), int(port)


def get(server: WebServer, path: str, method: str = "GET") -> tuple[int, str]:
    connection = http.client.HTTPConnection(*place(server), timeout=DEADLINE_SECONDS)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def connect(server: WebServer) -> socket.socket:
    return socket.create_connection(place(server), timeout=DEADLINE_SECONDS)


def is_ended(connection: socket.socket) -> bool:
    """Whether the server ends a connection without a word (one that was never accepted is reset)."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


# --- what is answered -------------------------------------------------------------------------------------


def test_metrics_are_in_the_format_of_prometheus(server: WebServer) -> None:
    code, body = get(server, "/metrics?name=x")
    assert (code, "drops_total 3.0" in body) == (200, True)


def test_status_is_the_published_document(server: WebServer) -> None:
    code, body = get(server, "/status.json")
    assert (code, json.loads(body)) == (200, GOOD)


@pytest.mark.parametrize(
    ("path", "published", "answer"),
    [
        ("/livez", {}, (200, "the main loop turns\n")),
        ("/livez", {"loop_alive": False}, (503, "the main loop hangs\n")),
        ("/readyz", {}, (200, "a live, attested generation serves\n")),
        ("/readyz", {"live": None, "reason": "a.py, line 1"}, (503, "a.py, line 1\n")),
        ("/readyz", {"live": None}, (503, "no live generation\n")),
        ("/readyz", {"live": None, "reason": "caf\udce9.py"}, (503, "caf?.py\n")),
        ("/secret", {}, (404, "see / /metrics /livez /readyz /status.json\n")),
    ],
)
def test_probes_say_how_it_is_and_why(
    server: WebServer, status: dict[str, Any], path: str, published: dict[str, Any], answer: tuple[int, str]
) -> None:
    status |= published
    assert get(server, path) == answer


@pytest.mark.parametrize(("path", "code"), [("/livez", 503), ("/readyz", 503), ("/status.json", 200)])
def test_before_anything_was_published_there_is_an_answer_all_the_same(
    server: WebServer, status: dict[str, Any], path: str, code: int
) -> None:
    status.clear()
    assert get(server, path)[0] == code


def test_head_has_no_body_and_other_methods_are_refused(server: WebServer) -> None:
    assert get(server, "/metrics", "HEAD") == (200, "")
    assert get(server, "/metrics", "POST")[0] == 501


@pytest.mark.parametrize("header", ["Content-Length: 44", "Transfer-Encoding: chunked", "Content-Length: -1"])
def test_what_is_sent_with_a_request_is_not_taken_for_another_one(server: WebServer, header: str) -> None:
    hidden = "GET /status.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(server) as connection:
        connection.sendall(f"GET /livez HTTP/1.1\r\nHost: localhost\r\n{header}\r\n\r\n{hidden}".encode())
        with connection.makefile("rb") as file, contextlib.suppress(ConnectionResetError):
            answer = file.read()
            assert answer.count(b"HTTP/1.1 ") == 1
            assert answer.startswith(b"HTTP/1.1 400 ")


def test_one_connection_may_ask_more_than_once(server: WebServer) -> None:
    connection = http.client.HTTPConnection(*place(server), timeout=DEADLINE_SECONDS)
    for _ in range(3):
        connection.request("GET", "/livez")
        assert connection.getresponse().read() == b"the main loop turns\n"
    connection.close()


def test_ipv6_address_stands_in_brackets(collectors: CollectorRegistry) -> None:
    try:
        server = serve(collectors, lambda: GOOD, ("::1", 0))
        server.start()
    except AddressError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert server.address.startswith("[::1]:")
    assert get(server, "/livez")[0] == 200
    server.close()


# --- clients of every kind --------------------------------------------------------------------------------


def test_two_hundred_stalled_clients_do_not_stop_a_scrape(server: WebServer) -> None:
    before = threading.active_count()
    stalled = [connect(server) for _ in range(200)]
    for connection in stalled[::2]:
        connection.send(b"GET /metrics HT")
    for _ in range(3):
        assert get(server, "/metrics")[0] == 200
    assert threading.active_count() - before <= web._MAX_CONNECTIONS + len(stalled)
    assert all(is_ended(connection) for connection in stalled[:100]), "the oldest have made room"
    for connection in stalled:
        connection.close()


def test_client_whose_answer_is_under_way_is_not_the_first_to_go(
    collectors: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_MAX_CONNECTIONS", 4)
    asked, go_on = threading.Event(), threading.Event()

    def slow_status() -> dict[str, Any]:
        if not asked.is_set():
            asked.set()
            assert go_on.wait(DEADLINE_SECONDS)
        return GOOD

    server = serve(collectors, slow_status)
    server.start()
    with connect(server) as answered:
        answered.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert asked.wait(DEADLINE_SECONDS)
        crowd = [connect(server) for _ in range(10)]
        assert get(server, "/livez")[0] == 200
        go_on.set()
        with answered.makefile("rb") as file:
            assert file.read().endswith(b"the main loop turns\n")
    for connection in crowd:
        connection.close()
    server.close()


def test_clients_that_do_not_read_their_answers_make_room_at_last(
    collectors: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_MAX_CONNECTIONS", 3)
    huge = {**GOOD, "filling": "x" * 20_000_000}
    server = serve(collectors, lambda: huge)
    server.start()
    crowd = [connect(server) for _ in range(3)]
    for connection in crowd:
        connection.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
        assert connection.recv(1) == b"H"
    assert get(server, "/livez")[0] == 200
    for connection in crowd:
        connection.close()
    server.close()


def test_client_that_says_nothing_loses_its_connection(
    collectors: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web._Handler, "timeout", 0.01)
    server = serve(collectors, lambda: GOOD)
    server.start()
    with connect(server) as connection:
        assert is_ended(connection)
    server.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
    ids=["empty", "short", "tls", "long", "headers", "version"],
)
def test_what_is_no_request_harms_nobody(
    server: WebServer, sent: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        # It may be closed before it has read all of it.
        with connection.makefile("rb") as file, contextlib.suppress(ConnectionResetError):
            file.read()
    assert get(server, "/livez")[0] == 200
    assert capfd.readouterr().err == ""


def test_client_that_goes_away_while_it_is_answered_leaves_no_traceback(
    collectors: CollectorRegistry, capfd: pytest.CaptureFixture[str]
) -> None:
    huge = {**GOOD, "filling": "x" * 20_000_000}
    server = serve(collectors, lambda: huge)
    server.start()
    with connect(server) as connection:
        connection.sendall(b"GET /status.json HTTP/1.1\r\n\r\n")
        assert connection.recv(1) == b"H"
    assert get(server, "/livez")[0] == 200
    server.close()
    assert capfd.readouterr().err == ""


class Gated(Collector):
    """A collector that counts, and that waits at its first collection until it may go on."""

    def __init__(self) -> None:
        self.collected_total = 0
        self.entered, self.go_on = threading.Event(), threading.Event()

    def collect(self) -> Iterator[Metric]:
        self.collected_total += 1
        number = self.collected_total
        if number == 1:
            self.entered.set()
            assert self.go_on.wait(DEADLINE_SECONDS)
        yield CounterMetricFamily("collected", "Collected.", value=number)


def test_scrapes_that_arrive_together_share_one_exposition() -> None:
    gated = Gated()
    created = CollectorRegistry()
    created.register(gated)
    exposition = web._Shared(lambda: generate_latest(created))
    bodies: list[bytes] = []

    def scrape() -> None:
        bodies.append(exposition.current())

    first = threading.Thread(target=scrape)
    first.start()
    assert gated.entered.wait(DEADLINE_SECONDS)
    others = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in others:
        thread.start()
    while exposition._asked < 9:
        threading.Event().wait(0.001)
    gated.go_on.set()
    for thread in (first, *others):
        thread.join(DEADLINE_SECONDS)
    assert gated.collected_total == 2, "one that was under way, one for all who came since"
    assert sum(b"collected_total 2.0" in body for body in bodies) == 8
    assert b"collected_total 3.0" in exposition.current(), "and a later one is never an old one"


# --- the address ------------------------------------------------------------------------------------------


def test_address_in_use_is_one_sentence_with_what_to_do(
    server: WebServer, collectors: CollectorRegistry
) -> None:
    with pytest.raises(AddressError) as caught:
        serve(collectors, lambda: GOOD, place(server))
    assert str(caught.value) == (
        f"cannot listen on {server.address}: Address already in use; free it or choose another --listen"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a..b", "é" * 100, "fe80::zz"])
def test_address_that_is_not_ours_is_one_sentence(collectors: CollectorRegistry, host: str) -> None:
    with pytest.raises(AddressError, match=r"^cannot listen on .*; free it or choose another --listen$"):
        serve(collectors, lambda: GOOD, (host, 0))


def test_address_is_free_again_after_the_end(collectors: CollectorRegistry) -> None:
    first = serve(collectors, lambda: GOOD)
    first.start()
    address = place(first)
    with connect(first) as idle:
        first.close()
        assert is_ended(idle)
        second = serve(collectors, lambda: GOOD, address)
        second.start()
        assert get(second, "/livez")[0] == 200
        second.close()


def test_nothing_of_a_server_is_left_after_its_end(server: WebServer, collectors: CollectorRegistry) -> None:
    get(server, "/livez")
    before = set(threading.enumerate())
    other = serve(collectors, lambda: GOOD)
    other.start()
    stalled = [connect(other) for _ in range(5)]
    get(other, "/livez")
    other.close()
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(DEADLINE_SECONDS)
    assert not any(thread.is_alive() for thread in left)
    for connection in stalled:
        connection.close()


def no_more_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_when_there_can_be_no_more_threads_the_server_lives_on(
    server: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    start: Callable[[threading.Thread], None] = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", no_more_threads)
    with connect(server) as refused:
        assert is_ended(refused)
    monkeypatch.setattr(threading.Thread, "start", start)
    assert get(server, "/livez")[0] == 200


# --- who may ask ------------------------------------------------------------------------------------------


def ask(server: WebServer, path: str = "/status.json", **headers: str) -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection(*place(server), timeout=DEADLINE_SECONDS)
    connection.putrequest("GET", path, skip_host=True)
    for name, value in headers.items():
        for one in value.split("|"):
            connection.putheader(name.replace("_", "-"), one)
    connection.endheaders()
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body, dict(response.getheaders())


@pytest.mark.parametrize(
    "host",
    "127.0.0.1 127.0.0.1:1 [::1]:9464 192.0.2.7:80 localhost LocalHost:9464 a.localhost. monitor.example "
    f"Monitor.Example.:9464 {socket.gethostname()}".split(),
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json"])
def test_who_names_an_address_this_machine_or_an_allowed_name_is_answered(
    collectors: CollectorRegistry, host: str, path: str
) -> None:
    server = serve(collectors, lambda: GOOD, allowed_hosts=lambda: ("monitor.example",))
    server.start()
    assert ask(server, path, Host=host)[0] == 200
    server.close()


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "127.0.0.1.evil.example:9464",
        "localhost.evil.example",
        "evil.example:127",
        "127.0.0.1@evil.example",
        "[::1].evil.example",
        "evil.example:localhost",
        "monitor.example.evil.example",
        "[localhost]",
        "127.0.0.1/",
        ":",
        "[]",
    ],
)
@pytest.mark.parametrize("path", ["/", "/metrics", "/status.json", "/events", "/livez"])
def test_page_that_made_its_own_name_mean_this_address_reads_nothing(
    server: WebServer, host: str, path: str
) -> None:
    code, body, headers = ask(server, path, Host=host)
    assert (code, headers["Content-Type"]) == (421, "text/plain; charset=utf-8")
    assert body == "no host of this name is here; use its address, or allow the name with --allow-host\n"


def test_request_with_two_hosts_is_none(server: WebServer) -> None:
    assert ask(server, Host="127.0.0.1|evil.example")[0] == 400


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://127.0.0.1:9464"}, 200),
        ({"Origin": "HTTPS://127.0.0.1:9464"}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:80"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://127.0.0.1:9464|http://evil.example"}, 403),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/status.json", "/events"])
def test_page_of_another_origin_reads_nothing(
    server: WebServer, headers: dict[str, str], code: int, path: str
) -> None:
    if (code, path) == (200, "/events"):
        assert follow(server, **headers).readline().startswith(b"data: ")
        return
    assert ask(server, path, Host="127.0.0.1:9464", **headers)[0] == code


def test_every_answer_tells_a_browser_to_keep_it_to_itself(server: WebServer) -> None:
    for path in ("/", "/metrics", "/status.json", "/none", "/events?x"):
        _, _, headers = (
            ask(server, path, Host="evil.example") if "?" in path else ask(server, path, Host="::1")
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'")
        assert not [name for name in headers if name.startswith("Access-Control")]


# --- the page and its news --------------------------------------------------------------------------------


def follow(server: WebServer, **headers: str) -> Any:
    """Ask for the news; the answer's lines, after its head."""
    connection = connect(server)
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    connection.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:9464\r\n{head}\r\n".encode())
    file = connection.makefile("rb")
    connection.close()
    while file.readline() not in {b"\r\n", b""}:
        pass
    return file


def news(file: Any) -> dict[str, Any]:
    line = file.readline()
    assert line.startswith(b"data: ")
    assert file.readline() == b"\n"
    said: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
    return said


def test_page_is_one_document_with_its_policy(server: WebServer) -> None:
    code, body, headers = ask(server, "/", Host="127.0.0.1")
    assert (code, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "<p>said</p>" in body
    assert headers["Content-Security-Policy"] == POLICY


def test_follower_is_told_all_and_then_what_has_changed(
    collectors: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_STREAM_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(web, "_STREAM_SILENCE_SECONDS", 0.05)
    shown = {"headline": "in sync", "watcher": "ev\nents"}
    server = serve(collectors, lambda: GOOD, sections=lambda: ("title", dict(shown)))
    server.start()
    with follow(server) as file:
        assert news(file) == {"title": "title", "sections": {"headline": "in sync", "watcher": "ev\nents"}}
        assert file.readline() == b":\n", "so that either side notices that the other is gone"
        assert file.readline() == b"\n"
        shown["headline"] = "not in sync"
        while (line := file.readline()) in {b":\n", b"\n"}:
            pass
        assert json.loads(line.removeprefix(b"data: "))["sections"] == {"headline": "not in sync"}
    server.close()


def test_followers_are_few_and_one_that_leaves_makes_room(server: WebServer) -> None:
    files = [follow(server) for _ in range(web._MAX_STREAMS)]
    for file in files:
        news(file)
    code, body, _ = ask(server, "/events", Host="127.0.0.1")
    assert (code, body) == (503, "too many pages are followed already; load this one again for its news\n")
    files.pop().close()
    until(lambda: len(server._server.connections._streams) < web._MAX_STREAMS)
    with follow(server) as file:
        news(file)
    for file in files:
        file.close()


def test_followers_and_stalled_clients_do_not_stop_a_scrape(server: WebServer) -> None:
    files = [follow(server) for _ in range(web._MAX_STREAMS)]
    for file in files:
        news(file)
    stalled = [connect(server) for _ in range(200)]
    for _ in range(3):
        assert get(server, "/metrics")[0] == 200
    assert len(server._server.connections._streams) == web._MAX_STREAMS, "the silent ones have made room"
    for connection in (*stalled, *files):
        connection.close()


def test_follower_that_reads_nothing_loses_its_place(
    collectors: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_STREAM_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(web._Handler, "timeout", 0.1)
    number = iter(range(1_000_000))
    server = serve(
        collectors, lambda: GOOD, sections=lambda: ("", {"headline": f"{next(number)}" + "x" * 1_000_000})
    )
    server.start()
    file = follow(server)
    until(lambda: bool(server._server.connections._streams))
    until(lambda: not server._server.connections._streams)
    file.close()
    server.close()


def test_end_of_the_server_does_not_wait_for_followers(collectors: CollectorRegistry) -> None:
    server = serve(collectors, lambda: GOOD)
    server.start()
    with follow(server) as file:
        news(file)
        server._server.connections.wait_for_answers()
        assert server._server.connections._all_answered(), (
            "one that follows is not one that is owed an answer"
        )
        server.close()
        assert file.read() == b""
