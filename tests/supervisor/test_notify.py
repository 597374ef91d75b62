"""sd_notify against real sockets: nothing blocks, nothing is forged, what matters is not lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from supervisor.errors import UsageError
from supervisor.notify import Datagram, Notifier, NotifySocket

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux names the sender of a datagram")


@contextmanager
def service_manager(address: str) -> Iterator[socket.socket]:
    """A receiver that takes what is sent to it, or leaves it lying."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.setblocking(False)
        yield receiver


def everything(receiver: socket.socket) -> list[str]:
    messages = []
    while True:
        try:
            messages.append(receiver.recv(65536).decode())
        except BlockingIOError:
            return messages


@pytest.fixture
def address(tmp_path: Path) -> str:
    return str(tmp_path / "manager.sock")


@pytest.fixture
def notifier(address: str) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": address})
    yield made
    made.close()


# --- upwards ----------------------------------------------------------------------------------------------


def test_states_are_told_in_the_words_of_the_protocol(notifier: Notifier, address: str) -> None:
    with service_manager(address) as manager:
        notifier.ready()
        notifier.reloading()
        notifier.alive()
        notifier.stopping()
        ready, reloading, alive, stopping = everything(manager)
    assert (ready, alive, stopping) == ("READY=1", "WATCHDOG=1", "STOPPING=1")
    first, second = reloading.split("\n")
    assert (first, second.partition("=")[0]) == ("RELOADING=1", "MONOTONIC_USEC")


def test_without_a_service_manager_nothing_is_sent_and_nothing_is_an_error() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "1000000"})
    notifier.ready()
    notifier.alive()
    assert (notifier.errors_total, notifier.watchdog_seconds) == (0, 0.0)


def test_abstract_name_is_understood() -> None:
    name = f"wa-monitor-test-{os.getpid()}"
    with service_manager(f"\0{name}") as manager:
        notifier = Notifier({"NOTIFY_SOCKET": f"@{name}"})
        notifier.ready()
        notifier.close()
        assert everything(manager) == ["READY=1"]


def test_environment_that_is_passed_decides_and_not_that_of_the_process(
    monkeypatch: pytest.MonkeyPatch, notifier: Notifier, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    with service_manager(address) as manager:
        notifier.ready()
        assert everything(manager) == ["READY=1"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nREADY=1", "STATUS=two READY=1"),
        ("a\r\x0b\x0c\x1c\x85\u2028READY=1", "STATUS=a READY=1"),
        ("zero\0byte and \x1b[31mcolour", "STATUS=zero byte and [31mcolour"),
        ("Zürich → Москва 東京", "STATUS=Zürich → Москва 東京"),
        ("caf\udce9.py", "STATUS=caf .py"),
    ],
    ids=["newline", "breaks", "control", "unicode", "surrogate"],
)
def test_status_is_one_line_whatever_is_in_it(notifier: Notifier, address: str, text: str, line: str) -> None:
    with service_manager(address) as manager:
        notifier.status(text)
        assert everything(manager) == [line]


def test_status_is_cut_to_what_a_datagram_takes_between_characters(notifier: Notifier, address: str) -> None:
    with service_manager(address) as manager:
        notifier.status("é" * 100_000)
        (message,) = everything(manager)
    assert set(message.removeprefix("STATUS=")) == {"é"}
    assert (len(message.encode()) <= 2048 + len("STATUS="), notifier.errors_total) == (True, 0)


def test_same_status_is_not_sent_twice(notifier: Notifier, address: str) -> None:
    with service_manager(address) as manager:
        notifier.status("serving")
        notifier.status("serving")
        assert everything(manager) == ["STATUS=serving"]


def test_receiver_that_comes_back_hears_the_next_message(notifier: Notifier, address: str) -> None:
    with service_manager(address):
        notifier.ready()
    Path(address).unlink()
    notifier.alive()
    assert notifier.errors_total == 1
    with service_manager(address) as manager:
        notifier.alive()
        assert everything(manager) == ["WATCHDOG=1"]
    assert notifier.errors_total == 1


def test_state_that_was_not_taken_goes_before_the_next_message(notifier: Notifier, address: str) -> None:
    notifier.reloading()
    notifier.ready()
    notifier.alive()
    assert notifier.errors_total == 3
    with service_manager(address) as manager:
        notifier.alive()
        words = [message.partition("=")[0] for message in everything(manager)]
    assert words == ["RELOADING", "READY", "WATCHDOG"]


def test_status_that_was_not_taken_is_sent_when_it_can_be(notifier: Notifier, address: str) -> None:
    notifier.status("serving")
    with service_manager(address) as manager:
        notifier.status("serving")
        assert everything(manager) == ["STATUS=serving"]


def test_receiver_that_stalls_stops_nobody_and_misses_no_state(notifier: Notifier, address: str) -> None:
    """The kernel's queue for it is full after a few messages; a blocking sender would hang here."""
    with service_manager(address) as manager:
        while not notifier.errors_total:
            notifier.alive()
        assert notifier._socket is not None
        assert notifier._socket.gettimeout() == 0, "it does not wait, however short"
        notifier.ready()
        assert notifier.errors_total == 2
        assert set(everything(manager)) == {"WATCHDOG=1"}
        notifier.alive()
        assert everything(manager) == ["READY=1", "WATCHDOG=1"]


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({"WATCHDOG_USEC": "1500000"}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": str(os.getpid())}, 1.5),
        ({"WATCHDOG_USEC": "1500000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "soon"}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({}, 0.0),
    ],
)
def test_watchdog_of_the_service_manager_is_read(environment: dict[str, str], seconds: float) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x", **environment}).watchdog_seconds == seconds


# --- downwards --------------------------------------------------------------------------------------------


@pytest.fixture
def children(tmp_path: Path) -> Iterator[NotifySocket]:
    made = NotifySocket(tmp_path / "notify.sock")
    yield made
    made.close()


def tell(children: NotifySocket, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(message, str(children.path))


def fields(children: NotifySocket) -> list[dict[str, str]]:
    return [dict(message.fields) for message in children.receive()]


def test_assignments_are_read(children: NotifySocket) -> None:
    tell(children, b"READY=1\nSTATUS=all = well\nnonsense\n")
    tell(children, b"WATCHDOG=1")
    assert fields(children) == [{"READY": "1", "STATUS": "all = well"}, {"WATCHDOG": "1"}]
    assert fields(children) == []


@pytest.mark.parametrize("break_", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_only_a_newline_begins_an_assignment(children: NotifySocket, break_: str) -> None:
    tell(children, f"STATUS=said by a user{break_}READY=1".encode())
    assert fields(children) == [{"STATUS": f"said by a user{break_}READY=1"}]


def test_datagram_that_was_cut_off_says_nothing(children: NotifySocket) -> None:
    tell(children, b"READY=1\nSTATUS=" + b"x" * 5000)
    tell(children, b"\xff=\xfe")
    assert fields(children) == [{"\ufffd": "\ufffd"}]


@linux_only
def test_sender_is_who_the_kernel_says(children: NotifySocket) -> None:
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\n"
        "s.sendto(b'READY=1\\nMAINPID=1\\nPID=1', sys.argv[1])\n"
        "print(os.getpid())"
    )
    other = subprocess.run(
        [sys.executable, "-c", script, str(children.path)], capture_output=True, text=True, check=True
    )
    tell(children, b"READY=1")
    theirs, ours = children.receive()
    assert (theirs.pid, ours) == (int(other.stdout), Datagram(os.getpid(), {"READY": "1"}))


def test_file_descriptors_that_a_child_sends_are_not_kept(children: NotifySocket) -> None:
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(str(children.path))
        socket.send_fds(sender, [b"FDSTORE=1"], [writer])
    os.close(writer)
    assert fields(children) == [{"FDSTORE": "1"}]
    assert os.read(reader, 1) == b"", "somebody still holds the other end"
    os.close(reader)


def test_child_that_sends_without_end_gets_a_bounded_share(
    children: NotifySocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.notify._MAX_AT_ONCE", 3)
    for _ in range(5):
        tell(children, b"WATCHDOG=1")
    assert [len(children.receive()), len(children.receive())] == [3, 2]


def test_socket_left_by_a_dead_supervisor_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "notify.sock"
    with service_manager(str(path)):
        pass
    following = NotifySocket(path)
    tell(following, b"READY=1")
    assert fields(following) == [{"READY": "1"}]
    following.close()
    assert not path.exists()


def test_path_that_no_socket_can_have_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"too long for a socket .* choose a shorter --runtime-dir"):
        NotifySocket(tmp_path / ("x" * 108))
    (tmp_path / "notify.sock").mkdir()
    with pytest.raises(UsageError, match=r"cannot make the socket .*; name another --runtime-dir"):
        NotifySocket(tmp_path / "notify.sock")
