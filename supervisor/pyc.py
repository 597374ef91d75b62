"""Pyc: one file of cached bytecode: what it must hold, who would run it, and how it is put in place.

The rule: what is written is right for ever. The header names the very bytes that the code was compiled from
(CHECKED_HASH), so the importer compares them with the source itself and no edit makes the file stale. It is
put together here and not by ``py_compile``, which would read and compile the source a second time.

A file belongs to whom its folder belongs to: root's supervisor leaves nothing behind in somebody else's tree
that they could not replace or remove. It is readable by those who may list the folder *and* read the source;
its code holds every constant of the source. Nothing is ever open to more people on the way there, and no link
is followed.

Source: PEP 552, https://docs.python.org/3/reference/import.html#cached-bytecode-invalidation.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash

HEADER_BYTES = 16

_TIMESTAMP, _UNCHECKED_HASH, _CHECKED_HASH = 0b00, 0b01, 0b11
_32_BITS = 0xFFFFFFFF
_LEVELS = ("", 1, 2)


def whole(source: bytes, body: bytes) -> bytes:
    """Return the file for a source and its marshalled code."""
    return MAGIC_NUMBER + _CHECKED_HASH.to_bytes(4, "little") + source_hash(source) + body


def level(pyc: str, source: str) -> int | None:
    """Return the level of optimisation that a file's name is of, None if it is none of this interpreter's."""
    names = [os.path.basename(cache_from_source(source, optimization=level)) for level in _LEVELS]
    name = os.path.basename(pyc)
    return names.index(name) if name in names else None


def is_trusted(header: bytes, path: str, source: bytes) -> bool:
    """Whether the importer runs what follows this header, and does not compile the source.

    Args:
        header: of a file of this interpreter, or of another one; whether the hash of another one's is right
            is not known here, and it is taken as wrong.
        path: of the source.
        source: its bytes.

    Raises:
        OSError: the source is gone.
    """
    if len(header) < HEADER_BYTES:
        return False
    flags = int.from_bytes(header[4:8], "little")
    if flags == _TIMESTAMP:
        facts = os.stat(path)
        fields = (int(facts.st_mtime) & _32_BITS, facts.st_size & _32_BITS)
        return header[8:16] == b"".join(field.to_bytes(4, "little") for field in fields)
    return flags == _UNCHECKED_HASH or (flags == _CHECKED_HASH and header[8:16] == source_hash(source))


def is_compared(header: bytes) -> bool:
    """Whether the importer compares what follows this header with the source itself, each time."""
    return int.from_bytes(header[4:8], "little") == _CHECKED_HASH


def read(path: str) -> bytes | None:
    """Return the bytes of a regular file; None for anything else, without ever waiting."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read() if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else None
    except OSError:
        return None


def write(pyc: str, source: str, content: bytes) -> None:
    """Put a file in place, whole or not at all.

    Args:
        pyc: its path.
        source: path of the source, which says with its folder who may do what with the file.
        content: what :func:`whole` returned.

    Raises:
        FileNotFoundError: the source is gone.
        OSError: the file cannot be written.
    """
    folder = os.path.dirname(source)
    readable = os.stat(source).st_mode | stat.S_IWUSR
    like = os.stat(folder)
    _make_directory(os.path.dirname(pyc), folder)
    temporary = f"{pyc}.{os.urandom(4).hex()}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            _give(descriptor, like, like.st_mode & readable & 0o666)
        os.replace(temporary, pyc)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _make_directory(directory: str, folder: str) -> None:
    """Make the directory for the bytecode of a folder like the folder itself.

    Below ``pycache_prefix`` each directory on the way there stands for one on the way to the folder.
    """
    if os.path.isdir(directory):
        return
    if sys.pycache_prefix is not None:
        _make_directory(os.path.dirname(directory) or os.curdir, os.path.dirname(folder))
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        return  # Somebody else was faster; it is theirs.
    like = os.stat(folder)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _give(descriptor, like, stat.S_IMODE(like.st_mode))
    finally:
        os.close(descriptor)


def _give(descriptor: int, like: os.stat_result, mode: int) -> None:
    """Give an open file to the owner of another one, or to its group, as far as we may."""
    for owner in (like.st_uid, -1):
        try:
            os.fchown(descriptor, owner, like.st_gid)
        except OSError:
            continue  # Only root gives away; only a member gives to a group; some file systems know neither.
        break
    with contextlib.suppress(OSError):
        os.fchmod(descriptor, mode)
