"""Passwords in text that is kept."""

from __future__ import annotations

import pytest

from supervisor.masking import mask


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        ("connecting to postgresql://app:s3cret@db:5432/x", "connecting to postgresql://app:***@db:5432/x"),
        ("url='postgresql://app:s3cret@s/3@db/x', n=1", "url='postgresql://app:***@db/x', n=1"),
        ("redis://:s3cret@cache", "redis://:***@cache"),
        ("fatal: https://s3cret@example.org/x.git", "fatal: https://***@example.org/x.git"),
        ("https://user:s3cret@example.org", "https://***@example.org"),
        ("host=db password=s3cret user=app", "host=db password=*** user=app"),
        ("host=db password='s3 cret' user=app", "host=db password=*** user=app"),
        ("PGPASSWORD=s3cret psql", "PGPASSWORD=*** psql"),
        ("?token=s3cret&page=2", "?token=***&page=2"),
        ("{'api_key': 's3cret', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ('{"client_secret_id": "s3\\"cret"}', '{"client_secret_id": ***}'),
        ("Authorization: Bearer s3cret", "Authorization: ***"),
        ("password: s3cret", "password: ***"),
    ],
)
def test_password_is_masked(line: str, masked: str) -> None:
    assert mask(line) == masked


@pytest.mark.parametrize(
    "line",
    [
        '  File "/srv/app/main.py", line 12, in <module>',
        "listening at http://127.0.0.1:9464/status.json",
        "mail to admin@example.org about http://example.org:80/x",
        "SyntaxError: invalid token",
        "the password was wrong",
        "ssh://git@example.org/x.git",
    ],
)
def test_other_text_stays(line: str) -> None:
    assert mask(line) == line
