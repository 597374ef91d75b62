"""Frames: JSON messages over the stream socket between the supervisor and one child, used by both ends.

A frame is four bytes of length (big endian) and that many bytes of JSON, one object. A stream and not
``SOCK_SEQPACKET``, because an attestation of thousands of modules is larger than a socket buffer, which
bounds a packet.

The rule: a length over :data:`LIMIT_BYTES` or a body that is not a JSON object is a :class:`FrameError`; the
peer that sent it is not listened to again, so :func:`encode` refuses to make one. The supervisor's end never
blocks; the child's end blocks in a thread of its own.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

PROTOCOL = 1
"""Raised whenever a supervisor and a child of two versions of this package would misunderstand each other:
a supervisor that is replaced in place goes on with children of its predecessor."""

LIMIT_BYTES = 16 * 1024 * 1024
"""Largest body of a frame: 100,000 series of metrics fit, a runaway child does not."""

_LENGTH = struct.Struct(">I")

Frame = dict[str, Any]


class FrameError(Exception):
    """What arrived is not a frame; the connection is of no more use."""


def encode(frame: Frame) -> bytes:
    """Return the bytes of one frame.

    Raises:
        FrameError: it would be over the limit; send less.
    """
    body = json.dumps(frame, separators=(",", ":")).encode()
    if len(body) > LIMIT_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the limit of {LIMIT_BYTES}")
    return _LENGTH.pack(len(body)) + body


class Decoder:
    """Turns received bytes into frames, keeping what is incomplete.

    Args:
        rest: what another decoder of the same stream had kept.
    """

    def __init__(self, rest: bytes = b"") -> None:
        self._buffer = bytearray(rest)

    @property
    def rest(self) -> bytes:
        """What is incomplete so far."""
        return bytes(self._buffer)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Yield the frames that ``data`` completes.

        Raises:
            FrameError: the bytes are no frames.
        """
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > LIMIT_BYTES:
                raise FrameError(f"a frame of {length} bytes is over the limit of {LIMIT_BYTES}")
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                frame = json.loads(body)
            except (ValueError, RecursionError) as error:  # The second: brackets without end.
                raise FrameError(f"the body of a frame is not JSON: {error}") from error
            if not isinstance(frame, dict):
                raise FrameError("the body of a frame is not a JSON object")
            yield frame


def receive(connection: socket.socket, decoder: Decoder) -> list[Frame]:
    """Block for at least one frame and return those that are complete.

    An empty list means that the peer is gone.

    Raises:
        FrameError: the peer sent something else.
        OSError: the socket failed; ``TimeoutError`` when its timeout passed.
    """
    while True:
        data = connection.recv(65536)
        if not data:
            return []
        frames = list(decoder.feed(data))
        if frames:
            return frames
