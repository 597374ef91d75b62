"""What a stored row says about its sender, judged from the row alone.

The rule: this module looks at the two sender columns *after* the write and at the bridge's map, and at
nothing else. It shares no code with `identity` on purpose. The incident that this guards against was a
resolver that itself called a LID a phone; a check that asks the resolver again would have agreed with it. A
fault in the one shows up as a disagreement with the other, in
`wa_monitor_drops_stored_total{identity="lid"}` and in the audit.

Most LIDs that a fault stores are in the map. Those that are not yet are told by what they cannot be: thirteen
digits and more that no country has as a number, unless the map or the message's own address once gave them as
a phone. (Fewer prove nothing: number plans grow.)

It only counts. Rejected: refusing to store what is judged a LID, a second guard that hides the first one's
fault.
"""

import re
from collections.abc import Container
from typing import Literal, get_args

Judgement = Literal["phone", "pending", "unknown", "lid"]
JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)

# `user_name` is NOT NULL and other programs show it, so a sender without a phone needs a text that cannot be
# taken for a number, and that this module can tell from a name typed by hand.
PENDING_NAME = "LID pending"
UNKNOWN_NAME = "unknown sender"

_LID_SERVERS = ("lid", "hosted.lid")
_PHONE_SERVERS = ("s.whatsapp.net", "c.us", "hosted")
_TOO_LONG = re.compile(r"[1-9][0-9]{12,19}", re.ASCII)


def judge(
    submitted_by: str | None,
    user_name: str | None,
    *,
    lids: Container[str],
    phones: Container[str],
    past_phones: Container[str] = (),
    sender: str = "",
) -> Judgement:
    """Say what stands in a row, given the map's `lid` column and its `pn` column.

    `past_phones` is what ever was in the `pn` column, `sender` how the bridge spells who sent the message.

    `lid` if either column holds a LID, otherwise by `submitted_by`: `phone` if the map or the numbering plan
    knows it, `pending` or `unknown` if it is empty, `unknown` for anything else.
    """
    if submitted_by and submitted_by == user_name and submitted_by in phones:
        return "phone"  # Nearly always: bare digits, twice, that the map lists as a phone.
    values = [value for value in (submitted_by, user_name) if value]
    if any(_is_lid(value, lids, phones) for value in values):
        return "lid"
    address = user_part(sender) if _server(sender) in _PHONE_SERVERS else None
    for value in values:
        user = user_part(value)
        if user != address and user not in phones and user not in past_phones and _is_no_number(value):
            return "lid"
    if not submitted_by:
        return "pending" if user_name == PENDING_NAME else "unknown"
    user = user_part(submitted_by)
    return "phone" if user in phones or _is_valid_number(user) else "unknown"


def _is_lid(value: str, lids: Container[str], phones: Container[str]) -> bool:
    """Tell whether a column's value is a LID: an address at a LID server, or digits the map lists as one."""
    user = user_part(value)
    return _server(value) in _LID_SERVERS or (user in lids and user not in phones)


def _is_no_number(value: str) -> bool:
    """Tell whether a column's value is bare digits, too many for the number of any country."""
    user = user_part(value)
    return not _server(value) and _TOO_LONG.fullmatch(user) is not None and not _is_valid_number(user)


def _server(value: str) -> str:
    return value.partition("@")[2].strip().lower()


def user_part(value: str) -> str:
    """Return the user part of ` +USER.AGENT:DEVICE@SERVER`, in which each part but USER may be missing."""
    user = value.strip().removeprefix("+").partition("@")[0]
    return user.partition(":")[0].partition(".")[0].strip()


def _is_valid_number(digits: str) -> bool:
    # Imported where it is needed, as in `identity`: the map settles nearly all of them.
    import phonenumbers  # noqa: PLC0415

    try:
        return digits.isascii() and phonenumbers.is_valid_number(phonenumbers.parse(f"+{digits}"))
    except phonenumbers.NumberParseException:
        return False
