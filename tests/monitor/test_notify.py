"""Notifications: never blocking, never failing the teller, never garbled."""

from __future__ import annotations

import socket
from contextlib import closing
from typing import TYPE_CHECKING

import pytest

from monitor.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("n") / "s"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    return path


@pytest.fixture
def inbox(address: Path) -> Iterator[socket.socket]:
    with closing(_listen(address)) as listening:
        yield listening


def _listen(address: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.bind(str(address))
    listening.settimeout(5)
    return listening


def test_status_is_one_line_of_utf8_and_is_not_repeated(inbox: socket.socket) -> None:
    with closing(Notifier()) as notifier:
        notifier.status("waiting\nfor Zoë\tand \u2603")
        notifier.status("waiting for Zoë and \u2603")
        notifier.stopping()
    assert inbox.recv(4096) == "STATUS=waiting for Zoë and \u2603".encode()
    assert inbox.recv(4096) == b"STOPPING=1"


def test_status_shows_no_number_of_a_person(inbox: socket.socket) -> None:
    with closing(Notifier()) as notifier:
        notifier.status("the group 27711234567-1500000000@g.us is listed twice")
    assert inbox.recv(4096) == b"STATUS=the group 27******567-15*****000@g.us is listed twice"


def test_newline_cannot_smuggle_in_an_assignment(inbox: socket.socket) -> None:
    with closing(Notifier()) as notifier:
        notifier.suspect("why\nREADY=1")
    assert inbox.recv(4096) == b"X_SUSPECT=why READY=1"


def test_turns_of_a_few_milliseconds_share_one_ping(inbox: socket.socket) -> None:
    with closing(Notifier()) as notifier:
        for _ in range(100):
            notifier.alive()
        notifier.stopping()
    assert inbox.recv(4096) == b"WATCHDOG=1"
    assert inbox.recv(4096) == b"STOPPING=1"


def test_receiver_that_does_not_read_blocks_nobody_and_is_counted(inbox: socket.socket) -> None:
    with closing(Notifier()) as notifier:
        for number in range(10_000):
            notifier.status(str(number))
        assert notifier.errors_total > 0
    assert inbox.recv(4096) == b"STATUS=0"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # sdnotify drops its socket
def test_receiver_that_was_created_anew_is_found_again(address: Path) -> None:
    with closing(Notifier()) as notifier:
        with closing(_listen(address)) as first:
            notifier.status("one")
            assert first.recv(4096) == b"STATUS=one"
        address.unlink()
        notifier.status("lost")
        notifier.status("lost too")
        assert notifier.errors_total == 2
        with closing(_listen(address)) as second:
            notifier.status("two")
            assert second.recv(4096) == b"STATUS=two"


def test_without_a_receiver_nothing_is_sent_and_nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    with closing(Notifier()) as notifier:
        notifier.ready()
        notifier.status("x")
    assert notifier.errors_total == 0
