"""The old monitor's `state.json`: up to where had it dealt with each group?

The rule: overlap, never jump. What is taken over is a time for each group, and reading begins a day before
it, because messages arrive late and the old monitor lost some within one second. Whatever lies before that
time is entered and changes no row. A file that cannot be understood is refused: missing state means neither
"from the beginning" nor "from now".

Three formats exist: `last_check_time` for all groups together; by group the id of the last message, which
is looked up in the bridge because ids have no order; by group the time of the last message as text. A time
without an offset is taken in the business zone: the earlier reading of those that are possible. A year in
which there was no WhatsApp (Go writes 0001 for "never") is no time.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, tzinfo
from pathlib import Path

from monitor.errors import ConfigError
from monitor.messages import Message, Unreadable

OVERLAP = timedelta(days=1)
_GROUP = re.compile(r"[0-9-]{1,250}@g\.us", re.ASCII)
_YEARS = range(2009, 2101)
_ALL_GROUPS = ""

Find = Callable[[Sequence[tuple[str, str]]], Sequence[Message | Unreadable]]
"""Looks messages up in the bridge by chat and id."""


def read_state(path: Path, find: Find, zone: tzinfo) -> Mapping[str, datetime]:
    """Return by chat ("" for all chats) until when the old monitor had dealt with it.

    Raises `ConfigError` for a file that is missing, damaged, of another format, or names an unknown message.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"state file {path}: {error.strerror}; check --adopt") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"state file {path}: not valid JSON; begin with --since instead") from error
    if isinstance(document, dict) and "last_check_time" in document:
        return {_ALL_GROUPS: _time(document["last_check_time"], zone, path)}
    if (
        not isinstance(document, dict)
        or not document
        or not all(_is_entry(*item) for item in document.items())
    ):
        raise ConfigError(f"state file {path}: no state of the old monitor; begin with --since instead")
    times = {chat: _instant(value, zone) for chat, value in document.items()}
    asked = [(chat, document[chat]) for chat, time in times.items() if time is None]
    found = {row.chat_jid: row.sent_at for row in find(asked) if isinstance(row, Message)}
    missing = sorted({chat for chat, _ in asked} - set(found))
    if missing:
        raise ConfigError(
            f"state file {path}: the last message of {', '.join(missing)} is not in the bridge;"
            " write the time of the last message instead of its id, or begin with --since"
        )
    return {chat: time for chat, time in times.items() if time is not None} | found


def _is_entry(chat: str, value: object) -> bool:
    is_text = isinstance(value, str) and value != "" and value.isprintable()
    return is_text and _GROUP.fullmatch(chat) is not None


def _time(value: object, zone: tzinfo, path: Path) -> datetime:
    instant = _instant(value, zone) if isinstance(value, str) else None
    if instant is None:
        raise ConfigError(f"state file {path}: last_check_time is no time; begin with --since instead")
    return instant


def _instant(value: str, zone: tzinfo) -> datetime | None:
    """Read a time; None for what is none, that is a message id."""
    if "-" not in value:  # an id of digits may read like a time without its dashes
        return None
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        return None
    if instant.year not in _YEARS:
        return None
    return instant if instant.tzinfo is not None else instant.replace(tzinfo=zone)
