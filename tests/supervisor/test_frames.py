"""Frames between the supervisor and a child that may be broken."""

from __future__ import annotations

import json
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.child import frames
from supervisor.child.frames import Decoder, Frame, FrameError, encode, receive

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def raw(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


@settings(max_examples=30)
@given(
    st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=5), max_size=3), st.integers(1, 50)
)
def test_frames_come_back_however_they_are_cut(sent: list[Frame], step: int) -> None:
    stream = b"".join(encode(frame) for frame in sent)
    decoder = Decoder()
    received = [
        frame for start in range(0, len(stream), step) for frame in decoder.feed(stream[start : start + step])
    ]
    assert received == sent


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b"[" * 200_000, "not JSON"),
        (b'{"a":' * 200_000, "not JSON"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
    ids=["empty", "half", "bytes", "list", "null", "brackets", "objects", "number"],
)
def test_what_is_no_frame_is_one_error(body: bytes, why: str) -> None:
    with pytest.raises(FrameError, match=why):
        list(Decoder().feed(raw(body)))


def test_length_over_the_limit_is_refused_before_the_body_is_waited_for() -> None:
    with pytest.raises(FrameError, match="over the limit"):
        list(Decoder().feed(struct.pack(">I", frames.LIMIT_BYTES + 1)))


def test_frame_that_the_other_side_would_refuse_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LIMIT_BYTES", 20)
    assert list(Decoder().feed(encode({"a": "x" * 12}))) == [{"a": "x" * 12}]
    with pytest.raises(FrameError, match="21 bytes is over the limit of 20"):
        encode({"a": "x" * 13})


def test_frames_before_a_broken_one_are_taken() -> None:
    received = Decoder().feed(encode({"a": 1}) + raw(b"no"))
    assert next(received) == {"a": 1}
    with pytest.raises(FrameError):
        next(received)


def test_receiver_waits_for_a_whole_frame_and_hears_of_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        decoder = Decoder()
        theirs.sendall(encode({"a": 1}) + encode({"b": 2})[:3])
        assert receive(ours, decoder) == [{"a": 1}]
        theirs.sendall(encode({"b": 2})[3:])
        theirs.shutdown(socket.SHUT_WR)
        assert receive(ours, decoder) == [{"b": 2}]
        assert receive(ours, decoder) == []


def test_text_that_is_no_unicode_survives() -> None:
    frame = {"path": "caf\udce9.py"}
    assert json.loads(encode(frame)[4:]) == frame
