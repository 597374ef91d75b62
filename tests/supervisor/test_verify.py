"""Match, mismatch, outdated, no answer: and never one for another."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.manifest import Manifest, Tree
from supervisor.verify import Attestation, AttestationError, Executed, compare, parse

TREE = Tree(("/tree",))


def manifest_of(**sources: str) -> Manifest:
    return Manifest.of(TREE, {f"{name}.py": digest for name, digest in sources.items()})


def attestation(*modules: Executed) -> Attestation:
    return Attestation("nonce", modules, {}, (), importing=False)


def frame(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "nonce": "n",
        "modules": [{"name": "a", "path": "a.py", "sha256": "1"}],
        "unpinned": [{"name": "b", "path": "b.py"}],
        "functions": {"a.py": {"p": "f"}},
        "replaced": ["a:g"],
        "importing": False,
    }
    return good | changes


@pytest.mark.parametrize(
    ("executed", "started_from", "on_disk", "state"),
    [
        ("1", "1", "1", "match"),
        ("1", "1", "2", "outdated"),
        ("1", "2", "2", "mismatch"),
        ("1", "2", "1", "mismatch"),
        (None, "1", "1", "unpinned"),
    ],
)
def test_module_is_judged_by_three_digests(
    executed: str | None, started_from: str, on_disk: str, state: str
) -> None:
    verdict = compare(
        manifest_of(a=started_from), manifest_of(a=on_disk), attestation(Executed("a", "a.py", executed)), {}
    )
    assert [module.state for module in verdict.modules] == [state]
    assert verdict.attested == (state in {"match", "outdated"})
    assert verdict.on_disk == (state == "match")
    assert (verdict.problem is None) == verdict.attested


def test_module_whose_file_is_gone_is_outdated_and_no_mismatch() -> None:
    verdict = compare(manifest_of(a="1"), manifest_of(), attestation(Executed("a", "a.py", "1")), {})
    assert [(row.state, row.disk_sha256) for row in verdict.modules] == [("outdated", None)]


def test_module_that_the_generation_was_not_started_from_is_a_mismatch() -> None:
    verdict = compare(manifest_of(), manifest_of(a="1"), attestation(Executed("a", "a.py", "1")), {})
    assert verdict.problem == "module a (a.py) runs other bytes than its generation was started from"


def test_one_wrong_module_among_good_ones_is_named() -> None:
    good, wrong = Executed("a", "a.py", "1"), Executed("pack.b", "b.py", None)
    verdict = compare(manifest_of(a="1"), manifest_of(a="1"), attestation(good, wrong), {})
    assert (verdict.attested, verdict.problem) == (
        False,
        "module pack.b (b.py) was loaded around the pinned imports",
    )


def test_rows_are_sorted_by_path() -> None:
    modules = [Executed("z", "a.py", "1"), Executed("a", "b.py", "1"), Executed("a", "a.py", "1")]
    verdict = compare(manifest_of(), manifest_of(), attestation(*modules), {})
    assert [(row.path, row.name) for row in verdict.modules] == [("a.py", "a"), ("a.py", "z"), ("b.py", "a")]


def test_answer_of_a_child_is_read() -> None:
    assert parse(frame()) == Attestation(
        "n",
        (Executed("a", "a.py", "1"), Executed("b", "b.py", None)),
        {"a.py": {"p": "f"}},
        ("a:g",),
        importing=False,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": None},
        {"modules": None},
        {"modules": {}},
        {"modules": "abc"},
        {"modules": [None]},
        {"modules": [{"name": "a", "path": "a.py"}]},
        {"modules": [{"name": "a", "path": "a.py", "sha256": None}]},
        {"modules": [{"name": ["a"], "path": "a.py", "sha256": "1"}]},
        {"modules": [{"name": "a", "path": 1, "sha256": "1"}]},
        {"unpinned": [{}]},
        {"functions": []},
        {"functions": {"a.py": ["p"]}},
        {"functions": {"a.py": {"p": 1}}},
        {"replaced": "a:g"},
        {"replaced": [1]},
        {"importing": "no"},
    ],
)
def test_answer_of_another_form_is_an_error_and_no_verdict(changes: dict[str, Any]) -> None:
    with pytest.raises(AttestationError, match="the child's attestation"):
        parse(frame(**changes))


@pytest.mark.parametrize("key", ["nonce", "modules", "unpinned", "functions", "replaced", "importing"])
def test_answer_that_lacks_something_is_an_error(key: str) -> None:
    incomplete = frame()
    del incomplete[key]
    with pytest.raises(AttestationError):
        parse(incomplete)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(frame(), anything)))
def test_whatever_a_child_answers_it_is_a_verdict_or_one_error(answer: dict[str, Any]) -> None:
    try:
        attested = parse(json.loads(json.dumps(frame() | answer)))
    except AttestationError:
        return
    compare(manifest_of(a="1"), manifest_of(a="1"), attested, {"1": {}})


def test_function_whose_print_its_source_does_not_have_is_foreign() -> None:
    answer = parse(frame(functions={"a.py": {"p": "f", "q": "C.g"}, "b.py": {"r": "h"}}, unpinned=[]))
    verdict = compare(manifest_of(a="1", b="2"), manifest_of(a="1", b="2"), answer, {"1": {"p": "f"}})
    assert verdict.foreign == ("a:C.g", "a:g")
    assert verdict.functions_checked == 2, "nobody knows the prints of b.py"
    assert verdict.problem == "function a:C.g does not run the code of its source"
