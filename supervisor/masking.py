"""Masking: takes passwords out of text that is kept, or shown to somebody else than its author meant.

The rule: rather too much than too little. Of a URL the password goes, over HTTP the user as well (there it is
often a token); of ``name=value`` and ``name: value`` the value, where the name speaks of a secret. What is
passed on as it was written (a child's own output) is not touched.

Every repetition in the patterns is bounded: a line of 4 KiB made to be slow takes milliseconds.
"""

from __future__ import annotations

import re

_HTTP_USER = re.compile(r"(?i)(https?://)[^\s\"'<>/@]{1,1024}@")
# Up to the last @ of the word: an unescaped @ or / belongs to the password.
_URL_PASSWORD = re.compile(r"(://[^\s\"'<>:/?#@]{0,256}:)[^\s\"'<>]{1,1024}@")
_NAMED = re.compile(
    r"""(?ix)
    (?P<name>
        (?: pass(?:word|wd|phrase) | pwd | secret | token | api[_-]?key | access[_-]?key | authorization )
        [\w-]{0,32} ["']? \s{0,4} [=:] \s{0,4}
    )
    (?: (?P<quote>["']) (?: \\. | (?!(?P=quote))[^\\] ){1,1024} (?P=quote)?
      | (?: (?:basic|bearer|token) \s )? [^\s"',;&)\]}]{1,1024}
    )
    """
)


def mask(line: str) -> str:
    """Return a line of text in which every password that looks like one is ``***``."""
    line = _HTTP_USER.sub(r"\1***@", line)
    line = _URL_PASSWORD.sub(r"\1***@", line)
    return _NAMED.sub(r"\g<name>***", line)
