"""Codeprint: a digest of what a code object does, the same for the same source in every process.

The rule: two code objects have the same print if and only if compiling gave them the same fields, constants
included, recursively. Taken from the fields and not from ``marshal``, whose bytes depend on reference counts.
Left out: the file name and the line tables (where the code was, not what it does), and the flag that
``types.coroutine`` sets on a copy (CO_ITERABLE_COROUTINE). ``co_code`` hides the interpreter's adaptive
specialisation by itself.

A print is compared within one version of Python and one level of optimisation only; both ends compile with
the same.

Source: https://docs.python.org/3/reference/datamodel.html#code-objects, measured on 3.11 to 3.13.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from inspect import CO_ITERABLE_COROUTINE
from types import CodeType
from typing import Any

_BYTES = 12
"""Of a print: by accident two differ; somebody who forges one owns the process anyway."""


def codeprint(code: CodeType) -> str:
    """Return the print of a code object with all that it contains, in hexadecimal."""
    return _digest(code).hex()


def every(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object and all code objects among its constants, at any depth."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from every(constant)


def _digest(code: CodeType) -> bytes:
    summary = hashlib.blake2b(digest_size=_BYTES)
    for field in (
        code.co_name,
        code.co_qualname,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags & ~CO_ITERABLE_COROUTINE,
        code.co_code,
        code.co_exceptiontable,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_consts,
    ):
        summary.update(_plain(field))
    return summary.digest()


def _plain(value: Any) -> bytes:  # noqa: ANN401, PLR0911 -- a constant may be any of these types
    """Return bytes that tell a constant from every other one, by type as well: 1, 1.0 and True are three."""
    if isinstance(value, CodeType):
        return _framed(b"C", _digest(value))
    if isinstance(value, str):
        return _framed(b"S", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, bytes):
        return _framed(b"B", value)
    if isinstance(value, tuple):
        return _framed(b"T", b"".join(_plain(item) for item in value))
    if isinstance(value, frozenset):
        return _framed(b"F", b"".join(sorted(_plain(item) for item in value)))
    if isinstance(value, float):
        return _framed(b"D", struct.pack("<d", value))
    if isinstance(value, complex):
        return _framed(b"Z", struct.pack("<dd", value.real, value.imag))
    if isinstance(value, slice):  # A constant since Python 3.14.
        return _framed(b"L", _plain((value.start, value.stop, value.step)))
    return _framed(type(value).__name__.encode(), repr(value).encode())  # int, bool, None, Ellipsis


def _framed(tag: bytes, body: bytes) -> bytes:
    return b"%s%d:%s" % (tag, len(body), body)
