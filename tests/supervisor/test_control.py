"""The control socket under clients that are slow, broken, gone or many."""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor import control
from supervisor.control import Client, ControlServer, request
from supervisor.errors import AlreadyRunningError, NoSupervisorError, UsageError

DEADLINE_SECONDS = 10.0


class Loop:
    """A main loop in a thread, with a server in it that answers when it is told to."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.selector = selectors.DefaultSelector()
        self.waiting: list[Client] = []
        self._wake_reader, self._wake_writer = socket.socketpair()
        self.selector.register(self._wake_reader, selectors.EVENT_READ, self._woken)
        self.server = ControlServer(directory, self.selector, self._handle)
        self._calls: list[Callable[[], None]] = []
        self._turned = threading.Condition()
        self._running = True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self.call(self._stop)
        self._thread.join(DEADLINE_SECONDS)
        assert not self._thread.is_alive(), "something holds the loop up"
        self.selector.close()
        self._wake_reader.close()
        self._wake_writer.close()

    def call(self, what: Callable[[], None]) -> None:
        """Run something in the loop and wait until it is done."""
        done = threading.Event()

        def do() -> None:
            what()
            done.set()

        self._calls.append(do)
        self._wake_writer.send(b"\0")
        assert done.wait(DEADLINE_SECONDS), "something holds the loop up"

    def until(self, true: Callable[[], bool]) -> None:
        """Wait until something has come true between two turns of the loop."""
        with self._turned:
            assert self._turned.wait_for(true, DEADLINE_SECONDS)

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(DEADLINE_SECONDS)
        connection.connect(str(self.directory / "control.sock"))
        return connection

    def _handle(self, client: Client, asked: dict[str, Any]) -> None:
        match asked["command"]:
            case "echo":
                client.answer({"ok": True, "asked": asked})
            case "large":
                client.answer({"ok": True, "filling": "x" * 5_000_000})
            case "wait":
                self.waiting.append(client)

    def _run(self) -> None:
        while self._running:
            for key, _ in self.selector.select():
                key.data()
            with self._turned:
                self._turned.notify_all()

    def _woken(self) -> None:
        self._wake_reader.recv(1)
        self._calls.pop(0)()

    def _stop(self) -> None:
        self.server.close()
        self._running = False


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Loop]:
    made = Loop(tmp_path / "run")
    yield made
    made.close()


def line(command: str) -> bytes:
    return json.dumps({"v": 1, "command": command}).encode() + b"\n"


def answer(connection: socket.socket) -> dict[str, Any]:
    with connection, connection.makefile("rb") as file:
        body: dict[str, Any] = json.loads(file.read())
        return body


def ask(loop: Loop) -> bool:
    """Whether a well-behaved client is served."""
    body = request(loop.directory, "echo", timeout_seconds=DEADLINE_SECONDS, colour="blue")
    return bool(body["asked"] == {"v": 1, "command": "echo", "colour": "blue"})


# --- clients of every kind --------------------------------------------------------------------------------


def test_request_gets_its_answer(loop: Loop) -> None:
    assert ask(loop)


def test_client_that_says_nothing_or_half_a_line_holds_up_nobody(loop: Loop) -> None:
    with loop.connect() as silent, loop.connect() as half:
        half.sendall(line("echo")[:10])
        assert ask(loop)
        half.sendall(line("echo")[10:])
        assert answer(half)["ok"]
        assert silent.fileno() >= 0


def test_client_that_sends_byte_by_byte_is_served(loop: Loop) -> None:
    connection = loop.connect()
    for byte in line("echo"):
        connection.send(bytes([byte]))
    assert answer(connection)["ok"]


def test_client_that_closed_its_sending_side_still_gets_its_answer(loop: Loop) -> None:
    connection = loop.connect()
    connection.sendall(line("wait"))
    connection.shutdown(socket.SHUT_WR)
    loop.until(lambda: bool(loop.waiting))
    assert ask(loop)
    loop.call(lambda: loop.waiting[0].answer({"ok": True}))
    assert answer(connection) == {"v": 1, "ok": True}


def test_client_that_ends_in_the_middle_of_a_line_loses_its_connection(loop: Loop) -> None:
    with loop.connect() as connection:
        connection.sendall(line("echo")[:10])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    assert ask(loop)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        (b"status\n", "not a request: Expecting value"),
        (b"\xff\xfe\n", "not a request: "),
        (b"[]\n", "this supervisor speaks version 1"),
        (b"null\n", "this supervisor speaks version 1"),
        (b'{"command": "echo"}\n', "this supervisor speaks version 1"),
        (b'{"v": 2, "command": "echo"}\n', "this supervisor speaks version 1"),
        (b"[" * 60_000 + b"\n", "not a request: "),
        (b"9" * 5_000 + b"\n", "not a request: "),
    ],
)
def test_line_that_is_no_request_is_answered_with_why(loop: Loop, sent: bytes, error: str) -> None:
    connection = loop.connect()
    connection.sendall(sent)
    body = answer(connection)
    assert (body["ok"], error in body["error"]) == (False, True)
    assert ask(loop)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_line_over_the_limit_costs_its_sender_the_connection(loop: Loop, end: bytes) -> None:
    with loop.connect() as connection:
        try:
            connection.sendall(b'{"v": 1, "command": "' + b"x" * 200_000 + end)
            assert connection.recv(1) == b""
        except (BrokenPipeError, ConnectionResetError):
            pass  # It was closed while there was more to send.
    assert ask(loop)


def test_client_that_does_not_read_a_long_answer_holds_up_nobody(loop: Loop) -> None:
    stalled = loop.connect()
    stalled.sendall(line("large"))
    assert ask(loop)
    assert len(answer(stalled)["filling"]) == 5_000_000, "it gets the whole of it when it does read"


def test_client_that_vanishes_while_its_answer_is_written_harms_nobody(loop: Loop) -> None:
    with loop.connect() as connection:
        connection.sendall(line("large"))
        assert connection.recv(1) == b"{"
    assert ask(loop)


def test_client_that_vanishes_while_its_answer_is_pending_is_let_go(loop: Loop) -> None:
    with loop.connect() as connection:
        connection.sendall(line("wait"))
        loop.until(lambda: bool(loop.waiting))
    loop.until(lambda: not loop.waiting[0].open)
    loop.call(lambda: loop.waiting[0].answer({"ok": True}))
    assert ask(loop)


def test_more_words_of_a_waiting_client_are_not_heard(loop: Loop) -> None:
    connection = loop.connect()
    connection.sendall(line("wait"))
    loop.until(lambda: bool(loop.waiting))
    connection.sendall(line("wait") * 3)
    assert ask(loop)
    loop.call(lambda: loop.waiting[0].answer({"ok": True}))
    assert connection.recv(100) == b'{"v": 1, "ok": true}\n'
    connection.close()
    assert len(loop.waiting) == 1


def test_crowd_of_silent_clients_makes_room_oldest_first(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_MAX_CLIENTS", 4)
    with loop.connect() as waits:
        waits.sendall(line("wait"))
        loop.until(lambda: bool(loop.waiting))
        crowd = [loop.connect() for _ in range(10)]
        assert ask(loop)
        assert [connection.recv(1) for connection in crowd[:7]] == [b""] * 7
        crowd[-1].sendall(line("echo"))
        assert answer(crowd[-1])["ok"]
        for connection in crowd:
            connection.close()
        loop.call(lambda: loop.waiting[0].answer({"ok": True}))
        assert answer(waits)["ok"], "who waits for the supervisor keeps its place"


def test_when_everybody_waits_for_the_supervisor_there_is_no_room(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "_MAX_CLIENTS", 2)
    waiting = [loop.connect() for _ in range(2)]
    for connection in waiting:
        connection.sendall(line("wait"))
    loop.until(lambda: len(loop.waiting) == 2)
    with pytest.raises(NoSupervisorError):
        request(loop.directory, "echo", timeout_seconds=DEADLINE_SECONDS)
    for connection in waiting:
        connection.close()
    loop.until(lambda: not any(client.open for client in loop.waiting))
    assert ask(loop)


# --- one supervisor per directory -------------------------------------------------------------------------


def test_second_supervisor_is_refused_with_the_pid_of_the_first(loop: Loop) -> None:
    with selectors.DefaultSelector() as selector:
        with pytest.raises(AlreadyRunningError, match=f"a supervisor with pid {os.getpid()} already owns"):
            ControlServer(loop.directory, selector, lambda *_: None)
        assert not selector.get_map()
    assert ask(loop)


def test_socket_of_a_supervisor_that_was_killed_is_replaced(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    script = """
import selectors, sys, time
from pathlib import Path
from supervisor.control import ControlServer
server = ControlServer(Path(sys.argv[1]), selectors.DefaultSelector(), lambda *_: None)
print("up", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "up\n"
        first.send_signal(signal.SIGKILL)
    assert (directory / "control.sock").exists()
    with pytest.raises(NoSupervisorError, match="Connection refused"):
        request(directory, "echo")
    following = Loop(directory)
    assert ask(following)
    following.close()
    assert not (directory / "control.sock").exists()


def test_directory_can_be_owned_again_after_it_was_released(tmp_path: Path) -> None:
    for _ in range(2):
        loop = Loop(tmp_path / "run")
        assert ask(loop)
        loop.close()


def test_socket_is_for_its_owner_only(loop: Loop) -> None:
    assert (loop.directory / "control.sock").stat().st_mode & 0o777 == 0o600
    assert loop.directory.stat().st_mode & 0o777 == 0o700


def everybody_may_write(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


def is_a_file(directory: Path) -> None:
    directory.touch()


def socket_is_a_folder(directory: Path) -> None:
    (directory / "control.sock").mkdir(parents=True)


@pytest.mark.parametrize("make", [everybody_may_write, is_a_file, socket_is_a_folder])
def test_directory_that_cannot_be_used_is_refused_with_what_to_do(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    directory = tmp_path / "run"
    make(directory)
    with selectors.DefaultSelector() as selector, pytest.raises(UsageError, match="name another") as caught:
        ControlServer(directory, selector, lambda *_: None)
    assert str(directory) in str(caught.value)


def test_path_that_is_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with selectors.DefaultSelector() as selector, pytest.raises(UsageError, match="shorter --runtime-dir"):
        ControlServer(tmp_path / ("x" * 100), selector, lambda *_: None)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a folder that belongs to somebody else")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    os.chown(directory, 65534, 65534)
    with selectors.DefaultSelector() as selector, pytest.raises(UsageError, match="belongs to another user"):
        ControlServer(directory, selector, lambda *_: None)


# --- the client's end -------------------------------------------------------------------------------------


@pytest.fixture
def fake_supervisor(tmp_path: Path) -> Iterator[Callable[[bytes], Path]]:
    """Something that listens where a supervisor would, and answers what the test says."""
    threads: list[threading.Thread] = []
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "control.sock"))
    listener.listen()

    def answering(answer: bytes) -> Path:
        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(answer)

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return tmp_path

    yield answering
    for thread in threads:
        thread.join()
    listener.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (b"", "ended before it had answered"),
        (b'{"v": 1, "ok": tr', "ended before it had answered"),
        (b"hello\n", "does not speak version 1"),
        (b"[1]\n", "does not speak version 1"),
        (b'{"v": 2, "ok": true}\n', "does not speak version 1"),
        (b'{"v": 1}\n', "does not speak version 1"),
    ],
)
def test_answer_that_is_none_is_one_sentence(
    fake_supervisor: Callable[[bytes], Path], answer: bytes, why: str
) -> None:
    with pytest.raises(NoSupervisorError, match=why) as caught:
        request(fake_supervisor(answer), "status")
    assert caught.value.exit_code == 4


def test_nobody_there_is_one_sentence_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NoSupervisorError, match=r"No such file or directory\); start one, or name its"):
        request(tmp_path / "none", "status")


def test_answer_that_takes_too_long_is_given_up(loop: Loop) -> None:
    with pytest.raises(NoSupervisorError, match="the answer took too long"):
        request(loop.directory, "wait", timeout_seconds=0.01)
