"""Who sent a message: a phone, a LID, the bridge's own account, or nobody we can name.

WhatsApp gives every account a second, all-digit identity, the LID. It looks like a phone number and is none,
and the bridge stores whichever of the two the group happens to use. The rule of this module: **evidence
decides, never the shape**. `decide` is the only place of the monitor where digits become a phone, and both
paths (new drop and resubmission) store what it returns; the store takes no bare `str` as a sender.

Evidence, strongest first: the server part of a full JID, the bridge's own LID map (both columns: a LID is
resolved by its row, and a number in the phone column is proven to be one), what the map said before (it
forgets, and a LID stays a LID; whose it was is not taken from there), and last the numbering plan: a valid
number of a configured country is *probably* a phone. Validity alone is no proof: about one in fifty random
14-digit strings is a valid number somewhere, which is why other countries need the map's word.

Rejected: `user.isdigit()` and `len(user) > 11`. The first calls every LID a phone, the second calls every
foreign phone a LID. Also rejected: a silent "unknown" when the map cannot be read; that is an error of the
bridge (`MapUnavailableError`), and nothing is judged until it is gone.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Confidence = Literal["certain", "probable"]

_LID_SERVERS = frozenset({"lid", "hosted.lid"})
_PHONE_SERVERS = frozenset({"s.whatsapp.net", "c.us", "hosted"})
_PERSON = re.compile(r"[1-9][0-9]{5,19}", re.ASCII)
_E164 = re.compile(r"[1-9][0-9]{5,14}", re.ASCII)
_GROUP_PREFIX = "120363"
_GROUP_MIN_DIGITS = 17
_E164_MAX_DIGITS = 15
_LID_MIN_DIGITS = 13


@dataclass(frozen=True, slots=True)
class Phone:
    """A person whose phone number is known. The only identity that may stand in a sender column."""

    digits: str
    """International form without `+`."""
    confidence: Confidence
    reason: str
    lid: str | None = None
    """The LID the message came with, when the map turned it into this phone."""


@dataclass(frozen=True, slots=True)
class Lid:
    """A person known by LID only, so far: the drop is stored and its sender waits for the map."""

    lid: str
    confidence: Confidence
    reason: str


@dataclass(frozen=True, slots=True)
class Unknown:
    """Neither proven phone nor LID: a group id, garbage, a contradiction, or a number nothing vouches for."""

    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class OwnMessage:
    """The bridge's own account. What it says is an echo of ours or of its owner; it submits no drops."""

    reason: str


Sender = Phone | Lid | Unknown
"""Who may stand behind a drop."""
Identity = Sender | OwnMessage


@dataclass(frozen=True, slots=True)
class Known:
    """What the bridge knows about identities: one consistent reading of its map and of its own account."""

    phone_of: Mapping[str, str] = field(default_factory=dict)
    """LID -> phone digits: the rows of the map whose `pn` can be a phone and is no LID itself."""
    lid_of: Mapping[str, str] = field(default_factory=dict)
    """Phone digits -> LID: the map read the other way."""
    own: frozenset[str] = frozenset()
    """User parts (phone and LID) of the account that the bridge is logged in with."""
    lids: frozenset[str] = frozenset()
    """What is or was in the `lid` column, also beside what can be no phone."""
    phones: frozenset[str] = frozenset()
    """What is or was in the `pn` column."""

    @classmethod
    def from_rows(cls, rows: Mapping[str, str], own: frozenset[str] = frozenset()) -> "Known":
        """Build both directions from the map's rows, `lid -> pn`."""
        lid_of = {phone: lid for lid, phone in rows.items() if _E164.fullmatch(phone)}
        phone_of = {lid: phone for lid, phone in rows.items() if phone in lid_of and phone not in rows}
        return cls(phone_of, lid_of, own, frozenset(rows), frozenset(lid_of))

    def with_history(self, seen: Collection[tuple[str, str]]) -> "Known":
        """Add what was ever in the map, as pairs of LID and phone."""
        return replace(
            self,
            lids=self.lids.union(lid for lid, _ in seen),
            phones=self.phones.union(phone for _, phone in seen),
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """What the operator configured about identities."""

    calling_codes: frozenset[int] = frozenset({27})
    """Countries whose valid numbers count as phones without the map's word (27 is South Africa)."""


@dataclass(frozen=True, slots=True)
class Jid:
    """A WhatsApp address in parts; the server is empty for a bare user part."""

    user: str
    server: str


def parse_jid(text: str) -> Jid:
    """Split `user[.agent][:device]@server`; agent and device name a handset and are dropped, as is a `+`."""
    user, _, server = text.strip().partition("@")
    user = user.removeprefix("+").partition(":")[0].partition(".")[0]
    return Jid(user, server.lower())


def identify(sender: str, chat_jid: str, known: Known, rules: Rules) -> Identity:
    """Say who `sender` is, in whatever spelling the bridge stored it for a message in `chat_jid`."""
    jid = parse_jid(sender)
    return decide(jid.user, jid.server, parse_jid(chat_jid).user, known, rules)


def decide(user: str, server: str, chat_user: str, known: Known, rules: Rules) -> Identity:
    """Decide what the normalised user part `user` is; the first evidence that speaks wins.

    `server` is the JID's server part or empty, `chat_user` the user part of the chat. The order: what cannot
    be a person, the bridge's own account, the server part and the map, what the map was, the plan. A
    contradiction (say, a phone address whose user part the map lists as a LID) is `Unknown`: nothing is
    guessed.
    """
    return (
        _no_person(user, server, chat_user)
        or _own_account(user, known)
        or _by_evidence(user, server, known)
        or _by_history(user, known)
        or _by_numbering_plan(user, rules)
    )


def _no_person(user: str, server: str, chat_user: str) -> Unknown | None:
    """Return why `user` cannot be a person: another kind of address, the group itself, or garbage."""
    if server and server not in _LID_SERVERS | _PHONE_SERVERS:
        return Unknown(user, f"an address at {server} is no person")
    if user == chat_user or (user.startswith(_GROUP_PREFIX) and len(user) >= _GROUP_MIN_DIGITS):
        return Unknown(user, "the id of a group")
    if _PERSON.fullmatch(user) is None:
        return Unknown(user, "not 6 to 20 digits")
    return None


def _own_account(user: str, known: Known) -> OwnMessage | None:
    """Return `OwnMessage` for the account that the bridge itself uses, under either of its identities."""
    return OwnMessage("the bridge's own account") if user in known.own else None


def _by_evidence(user: str, server: str, known: Known) -> Sender | None:
    """Weigh the server part and the map's two columns; None when neither says anything."""
    mapped_lid, mapped_phone = user in known.phone_of, user in known.lid_of
    if server in _LID_SERVERS or (not server and mapped_lid and not mapped_phone):
        return _resolve(user, known, "a LID address" if server else "in the map's lid column")
    if server in _PHONE_SERVERS and user in known.lids and not mapped_phone:
        return Unknown(user, "a phone address, yet the map lists it as a LID, or did")
    if not server and mapped_lid and mapped_phone:
        return Unknown(user, "in both columns of the map")
    if server in _PHONE_SERVERS and len(user) > _E164_MAX_DIGITS:
        return Unknown(user, "a phone address with more than 15 digits")
    if server in _PHONE_SERVERS or mapped_phone:
        return Phone(user, "certain", "a phone address" if server else "in the map's phone column")
    return None


def _resolve(lid: str, known: Known, reason: str) -> Phone | Lid:
    """Turn a certain LID into the phone that the map gives for it, if it does."""
    phone = known.phone_of.get(lid)
    if phone is None:
        return Lid(lid, "certain", reason)
    return Phone(phone, "certain", f"{reason}, resolved by the map", lid=lid)


def _by_history(user: str, known: Known) -> Sender | None:
    """Judge by what the map said before, or says beside what is no phone; None if that is nothing."""
    was_lid, was_phone = user in known.lids, user in known.phones
    if was_lid and was_phone:
        return Unknown(user, "was in both columns of the map")
    if was_lid:
        return Lid(user, "certain", "in the map's lid column, without a phone")
    return Phone(user, "certain", "was in the map's phone column") if was_phone else None


def _by_numbering_plan(user: str, rules: Rules) -> Sender:
    """Judge digits that neither an address nor the map vouches for."""
    valid, calling_code = _number(user)
    if valid and calling_code in rules.calling_codes:
        return Phone(user, "probable", f"a valid number of country code {calling_code}")
    if not valid and _LID_MIN_DIGITS <= len(user) <= _E164_MAX_DIGITS:
        return Lid(user, "probable", "too long and not valid as a phone number")
    return Unknown(user, "nothing vouches for it")


def _number(digits: str) -> tuple[bool, int]:
    """Return whether `digits` is a valid international number, and its calling code (0 without one)."""
    # Imported here: most senders are settled by the map, and a new generation should not wait for the tables.
    import phonenumbers  # noqa: PLC0415

    try:
        number = phonenumbers.parse(f"+{digits}")
    except phonenumbers.NumberParseException:
        return False, 0
    return phonenumbers.is_valid_number(number), number.country_code or 0
