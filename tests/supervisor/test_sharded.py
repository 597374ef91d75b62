"""A mapping in shards is what a dictionary is, and says what differs without looking at what is shared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.sharded import Sharded

PATHS = st.text(alphabet="ab/é\udc80", max_size=4)
FACTS = st.dictionaries(PATHS, st.sampled_from(["1", "2", "3"]), max_size=12)


@given(FACTS)
def test_it_is_the_mapping_that_was_given(plain: dict[str, str]) -> None:
    sharded = Sharded(plain)
    assert sharded == plain
    assert sharded.plain() == plain
    assert len(sharded) == len(plain)
    assert sorted(sharded) == sorted(plain)
    assert sharded.keys() == plain.keys()
    assert sorted(sharded.values()) == sorted(plain.values())
    assert dict(sharded.items()) == plain
    for path in ("a", "b", "é", "nowhere"):
        assert (path in sharded) == (path in plain)
        assert sharded.get(path) == plain.get(path)
        assert sharded.get(path, "0") == plain.get(path, "0")
    with pytest.raises(KeyError):
        sharded["nowhere"]


@given(FACTS, FACTS, st.sets(PATHS, max_size=4))
def test_a_changed_copy_is_what_a_changed_dictionary_is_and_leaves_the_old_one_alone(
    plain: dict[str, str], altered: dict[str, str], gone: set[str]
) -> None:
    sharded = Sharded(plain)
    before = sharded.digest()
    changed = sharded.changed(altered, gone)
    expected = {path: value for path, value in {**plain, **altered}.items() if path not in gone}
    assert changed == expected
    assert changed == Sharded(expected)
    assert changed.digest() == Sharded(expected).digest()
    assert sharded == plain
    assert sharded.digest() == before == Sharded(plain).digest()


@given(FACTS, FACTS)
def test_the_difference_makes_one_the_other(old: dict[str, str], new: dict[str, str]) -> None:
    altered, gone = Sharded(old).difference(Sharded(new))
    assert altered == {path: value for path, value in new.items() if old.get(path) != value}
    assert sorted(gone) == sorted(old.keys() - new.keys())
    assert Sharded(old).changed(altered, gone) == new


@given(FACTS, FACTS)
def test_equal_are_those_of_equal_content(one: dict[str, str], two: dict[str, str]) -> None:
    assert (Sharded(one) == Sharded(two)) == (one == two)
    assert (Sharded(one).digest() == Sharded(two).digest()) == (one == two)
    assert (Sharded(one).keys() == Sharded(two).keys()) == (one.keys() == two.keys())


def test_a_change_of_one_among_thousands_replaces_one_shard() -> None:
    before = Sharded({f"module_{number}.py": "1" for number in range(5000)})
    before.digest()
    after = before.changed({"module_7.py": "2"})
    others = [two for one, two in zip(before.shards, after.shards, strict=True) if one is not two]
    assert len(others) == 1
    assert [hasattr(shard, "digest") for shard in after.shards].count(False) == 1, "digested once more"
