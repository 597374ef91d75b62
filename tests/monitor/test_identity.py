"""Who a sender is: the decision as a table, and the judge that must not agree with a faulty decision."""

from __future__ import annotations

import inspect

import pytest

from monitor import identity
from monitor.identity import Known, Lid, OwnMessage, Phone, Rules, Unknown, identify, parse_jid
from monitor.judgement import PENDING_NAME, UNKNOWN_NAME, judge

GROUP = "120363000000000001@g.us"
MAP = {
    "100000000000017": "27711234567",  # 15 digits
    "90000000000019": "263712345678",  # 14 digits, a foreign phone of 12
    "3000000000013": "447400123456",  # 13 digits
    "27831234560": "918123456789",  # 11 digits: a LID in the shape of a local phone
}
KNOWN = Known.from_rows(MAP, own=frozenset({"12015550123", "100000000000099"}))
RULES = Rules()


@pytest.mark.parametrize(
    ("sender", "digits"),
    [
        # the map's lid column, whatever the length and the spelling
        ("100000000000017", "27711234567"),
        ("90000000000019", "263712345678"),
        ("3000000000013", "447400123456"),
        ("27831234560", "918123456789"),
        ("100000000000017@lid", "27711234567"),
        ("100000000000017:12@lid", "27711234567"),
        ("100000000000017.0:3@lid", "27711234567"),
        ("100000000000017@hosted.lid", "27711234567"),
        (" 100000000000017@LID ", "27711234567"),
        # the map's phone column: 11, 12 and 12 digits
        ("27711234567", "27711234567"),
        ("263712345678", "263712345678"),
        ("447400123456", "447400123456"),
        # a phone address, known to the map or not
        ("27711234567@s.whatsapp.net", "27711234567"),
        ("258821234567:4@s.whatsapp.net", "258821234567"),
        ("2348021234567@c.us", "2348021234567"),
        # nobody but the numbering plan
        ("27821234567", "27821234567"),
    ],
)
def test_sender_is_this_phone(sender: str, digits: str) -> None:
    decided = identify(sender, GROUP, KNOWN, RULES)
    assert isinstance(decided, Phone)
    assert decided.digits == digits


@pytest.mark.parametrize(
    ("sender", "lid", "confidence"),
    [
        ("100000000000041", "100000000000041", "probable"),
        ("80000000000018", "80000000000018", "probable"),
        ("3000000000021", "3000000000021", "probable"),
        ("100000000000041@lid", "100000000000041", "certain"),
        ("27821234567@lid", "27821234567", "certain"),
    ],
)
def test_sender_without_mapping_stays_a_lid(sender: str, lid: str, confidence: str) -> None:
    decided = identify(sender, GROUP, KNOWN, RULES)
    assert isinstance(decided, Lid)
    assert (decided.lid, decided.confidence) == (lid, confidence)


@pytest.mark.parametrize(
    "sender",
    [
        "",
        "12345",
        "012345678",
        "120363000000000001",
        "120363000000000002@g.us",
        "120363000000000777",
        "27711234567-1500000000",
        "27711234567@newsletter",
        "status@broadcast",
        "27711234567x",
        "\u0662\u0667\u0667\u0661\u0661\u0662\u0663\u0664\u0665\u0666\u0667",
        "100000000000017@s.whatsapp.net",  # a phone address, yet a LID by the map
        "1234567890123456@s.whatsapp.net",  # longer than a phone can be
        "258821234567",  # a valid number of a country that is not ours, and not in the map
        "1000000000000000017",
    ],
)
def test_sender_that_nothing_vouches_for_is_unknown(sender: str) -> None:
    assert isinstance(identify(sender, GROUP, KNOWN, RULES), Unknown)


def test_number_in_both_columns_of_the_map_is_never_guessed() -> None:
    known = Known.from_rows({"100000000000017": "27711234567", "27711234567": "263712345678"})
    assert isinstance(identify("27711234567", GROUP, known, RULES), Unknown)


@pytest.mark.parametrize(
    "phone", ["", "abc", "0711234567", "277112345678901234", "\u00b2" * 11, "90000000000019"]
)
def test_lid_beside_which_no_phone_stands_in_the_map_stays_a_lid(phone: str) -> None:
    known = Known.from_rows({"27831234560": phone, "90000000000019": "27711234567"})
    assert isinstance(identify("27831234560", GROUP, known, RULES), Lid)
    assert isinstance(identify("27831234560@lid", GROUP, known, RULES), Lid)
    assert judge("27831234560", None, lids=known.lids, phones=known.lid_of) == "lid"


def test_what_the_map_has_forgotten_still_tells_lids_from_phones() -> None:
    known = Known().with_history([("27831234560", "918123456789"), ("27831234567", "27821234567")])
    assert isinstance(identify("27831234560", GROUP, known, RULES), Lid)
    assert isinstance(identify("27831234560@s.whatsapp.net", GROUP, known, RULES), Unknown)
    assert identify("918123456789", GROUP, known, RULES) == Phone(
        "918123456789", "certain", "was in the map's phone column"
    )
    both = known.with_history([("27821234567", "27711234567")])
    assert isinstance(identify("27821234567", GROUP, both, RULES), Unknown)


@pytest.mark.parametrize(
    "sender", ["12015550123", "12015550123:7@s.whatsapp.net", "100000000000099", "100000000000099@lid"]
)
def test_own_account_is_recognised_under_both_identities(sender: str) -> None:
    assert isinstance(identify(sender, GROUP, KNOWN, RULES), OwnMessage)


def test_configured_calling_code_makes_a_foreign_number_a_probable_phone() -> None:
    decided = identify("258821234567", GROUP, KNOWN, Rules(frozenset({27, 258})))
    assert decided == Phone("258821234567", "probable", "a valid number of country code 258")


def test_address_is_cut_to_its_user_and_server() -> None:
    assert parse_jid("27711234567.1:5@s.whatsapp.net") == identity.Jid("27711234567", "s.whatsapp.net")
    assert parse_jid("27711234567") == identity.Jid("27711234567", "")
    assert parse_jid(" +27711234567@c.us") == identity.Jid("27711234567", "c.us")


def test_original_bug_fits_into_the_docstring_and_is_one_line() -> None:
    """The tour and the incident test bring the old fault back without changing the file's size."""
    assert len((identity.decide.__doc__ or "").encode()) >= 200
    bug = '    if user.isdigit(): return Phone(user, "certain", "digits")\n'
    source = inspect.getsource(identity.decide)
    head, _, _ = source.partition('    """')
    body = source.rpartition('"""\n')[2]
    namespace = dict(vars(identity))
    exec(compile(head + bug + body, "decide", "exec"), namespace)  # noqa: S102 -- our own source, one line changed
    decided = namespace["decide"]("100000000000017", "", "120363000000000001", KNOWN, RULES)
    assert decided == Phone("100000000000017", "certain", "digits")


LIDS = KNOWN.lids
PHONES = KNOWN.lid_of


@pytest.mark.parametrize(
    ("submitted_by", "user_name", "judgement"),
    [
        ("27711234567", "27711234567", "phone"),
        ("263712345678", "263712345678", "phone"),
        ("27821234567", "27821234567", "phone"),
        ("27711234567@s.whatsapp.net", "27711234567", "phone"),
        ("100000000000017", "100000000000017", "lid"),
        ("27711234567", "100000000000017", "lid"),
        ("100000000000017", "27711234567", "lid"),
        (None, "100000000000017", "lid"),
        ("100000000000041@lid", "x", "lid"),
        ("100000000000017:3@lid", "x", "lid"),
        ("27831234560", "27831234560", "lid"),
        (None, PENDING_NAME, "pending"),
        (None, UNKNOWN_NAME, "unknown"),
        (None, "typed by hand", "unknown"),
        ("80000000000018", "80000000000018", "lid"),  # not in the map, and no country's number
        (None, "80000000000018", "lid"),
        ("2348021234567", "2348021234567", "phone"),
        ("99900000018", "99900000018", "unknown"),
        ("somebody", "somebody", "unknown"),
    ],
)
def test_row_is_judged_by_what_it_holds(submitted_by: str | None, user_name: str, judgement: str) -> None:
    assert judge(submitted_by, user_name, lids=LIDS, phones=PHONES) == judgement


@pytest.mark.parametrize(
    ("sender", "past_phones", "judgement"),
    [
        ("80000000000018", (), "lid"),
        ("80000000000018@lid", (), "lid"),
        ("80000000000018:2@s.whatsapp.net", (), "unknown"),  # a number that no plan knows is no LID for that
        ("100000000000033@s.whatsapp.net", (), "lid"),
        ("80000000000018", ("80000000000018",), "unknown"),
    ],
)
def test_digits_too_long_for_a_number_are_a_lid_unless_something_else_calls_them_a_phone(
    sender: str, past_phones: tuple[str, ...], judgement: str
) -> None:
    row = "80000000000018", "80000000000018"
    assert judge(*row, lids=LIDS, phones=PHONES, past_phones=past_phones, sender=sender) == judgement


def test_judge_does_not_use_the_decision() -> None:
    from monitor import judgement  # noqa: PLC0415 -- its namespace is what is looked at

    assert not {"identity", "decide", "identify"} & set(vars(judgement))
