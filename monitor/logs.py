"""The log: one line an event on stdout, in which no number can be read unless the operator asked for it.

The rule: masking happens in the one formatter through which every line goes, not where lines are written, so
that a new log call, or an error text that quotes a value, cannot forget it. Nine or more digits in a row are
a number, and so are eight that stand alone: drop numbers begin with letters, the id of a repair goes on with
one.

With `LOG_FILE` every line goes to that file as well. It survives rotation: a file that was renamed, removed
or replaced is opened anew at the next line, as logrotate's default mode wants it; and a disk that is full
loses lines and nothing else.

Rejected: structured JSON logs. The operators of this system grep for event names (`Found drop`, `Resolved
LID`), and journald keeps the fields that JSON would add.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Sequence
from logging.handlers import WatchedFileHandler
from pathlib import Path

from monitor.errors import ConfigError

# Digits of any script: a person's number in full-width digits is still one.
_NUMBER = re.compile(r"(?<![0-9A-Za-z])(?:\d{9,}|\d{8}(?![0-9A-Za-z]))")
_SHOWN_FIRST = 2
_SHOWN_LAST = 3

_HAS_LINES = "has_lines"
"""Attribute of a record whose line breaks are between lines and not within one."""

log = logging.getLogger("wa-monitor")


def mask_numbers(text: str) -> str:
    """Return `text` with the middle of every phone, LID and group id replaced by stars."""
    return _NUMBER.sub(_masked, text)


def info_lines(lines: Sequence[str]) -> None:
    """Log several lines as one record: a batch has hundreds, and each record takes longer than its line."""
    if lines:
        log.info("%s", "\n".join(map(_in_one_line, lines)), extra={_HAS_LINES: True})


def set_up(level: str, *, full_numbers: bool, file: Path | None = None) -> None:
    """Send the monitor's log to stdout and to `file`; called once by a program's start, never at import.

    Raises `ConfigError` for a file that cannot be written.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stdout)]
    if file is not None:
        try:
            handlers.append(_File(file, encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"log file {file}: {error.strerror}; set LOG_FILE to a file that can be written"
            ) from error
    for handler in handlers:
        handler.setFormatter(_OneLine(full_numbers=full_numbers))
    log.handlers[:] = handlers
    log.setLevel(level)
    # No line names caller, thread or process; to find these out takes as long as all the rest of it.
    logging._srcfile = None  # noqa: SLF001 -- the way that the library's documentation gives
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    log.propagate = False


class _OneLine(logging.Formatter):
    """Formats a record as one line: time with offset, level, text."""

    def __init__(self, *, full_numbers: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S%z")
        self._full_numbers = full_numbers
        self._second: tuple[int, str] = 0, ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        """Return the time stamp, made once a second."""
        second = int(record.created)
        if self._second[0] != second:
            self._second = second, super().formatTime(record, datefmt)
        return self._second[1]

    def format(self, record: logging.LogRecord) -> str:
        """Mask the message, not the time stamp in front of it."""
        text = record.getMessage()
        if not hasattr(record, _HAS_LINES):
            text = _in_one_line(text)
        if not self._full_numbers:
            text = mask_numbers(text)
        record.message = ""
        record.asctime = self.formatTime(record, self.datefmt)
        begin = self.formatMessage(record)
        return begin + text.replace("\n", f"\n{begin}")


def _in_one_line(text: str) -> str:
    return text if text.isprintable() else " ".join(text.splitlines())


class _File(WatchedFileHandler):
    """A log file that never stops the monitor: what cannot be written there still goes to stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, in the file that has the name now, if that is possible."""
        with contextlib.suppress(OSError):
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 -- the library's name
        """Leave the record to the other handler."""


def _masked(match: re.Match[str]) -> str:
    digits = match.group()
    return f"{digits[:_SHOWN_FIRST]}{'*' * (len(digits) - _SHOWN_FIRST - _SHOWN_LAST)}{digits[-_SHOWN_LAST:]}"
