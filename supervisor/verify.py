"""Verify: is the code that runs the code on disk? Three facts compared, one verdict.

For each module the child executed: the sha256 it *executed*, the sha256 in the manifest it was *started
from*, and the sha256 of the file *now on disk*. Executed and started-from differing is a **mismatch**: the
child runs something it should not. Executed and disk differing is **outdated**: a reload is due or was
rejected. A module of the tree that came in by any other way than the pinned loader is **unpinned**, which is
a mismatch, too: nothing is known about its bytes.

The rule: an answer is *match*, *mismatch* or *no answer*, and no answer never becomes either of the others.
Comparing is pure: the bytes were hashed by those who read them.

Sources are one half; the code in memory is the other. The prints of the code that the child's functions run
are compared with those that the supervisor took when it compiled the same sources itself, and what held a
function of the tree when the generation was ready is looked at again for code from elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct
from msgspec.structs import replace

from supervisor.manifest import Manifest

ModuleState = Literal["match", "outdated", "mismatch", "unpinned"]


class Executed(Struct, frozen=True):
    """A module as its process reports it.

    Attributes:
        name: in ``sys.modules``.
        path: relative to the manifest's base.
        sha256: of the bytes that were compiled and executed; None if it was loaded around the pins.
    """

    name: str
    path: str
    sha256: str | None


class Attestation(Struct, frozen=True):
    """What one child said about itself.

    Attributes:
        nonce: of the request it answers.
        modules: every module of the tree that it holds.
        functions: relative path to the prints of the code that its functions run, with their qualified names.
        replaced: ``module:qualified name`` of what held code of the tree and holds other code now.
        importing: its main thread was inside an import at that moment.
    """

    nonce: str
    modules: tuple[Executed, ...]
    functions: Mapping[str, Mapping[str, str]]
    replaced: tuple[str, ...]
    importing: bool


class ModuleVerdict(Struct, frozen=True):
    """One row of ``verify``: a module and its two digests.

    None stands for a file that is not there, and for a proof that was not given.
    """

    name: str
    path: str
    disk_sha256: str | None
    running_sha256: str | None
    state: ModuleState


class Verdict(Struct, frozen=True):
    """What the comparison says.

    Attributes:
        modules: a row for each module, sorted by path.
        functions_checked: how many pieces of code in memory were compared with their sources.
        foreign: names of functions that are not of their source, sorted.
    """

    modules: tuple[ModuleVerdict, ...]
    functions_checked: int = 0
    foreign: tuple[str, ...] = ()

    @property
    def attested(self) -> bool:
        """Whether the child runs what it was started from, and nothing else of the tree."""
        return self.problem is None

    @property
    def on_disk(self) -> bool:
        """Whether, in addition, every executed source is what stands on disk."""
        return all(module.state == "match" for module in self.modules)

    def against(self, disk: Manifest) -> Verdict:
        """Return the same proof compared with another state of the disk."""

        def row(module: ModuleVerdict) -> ModuleVerdict:
            on_disk, state = disk.sources.get(module.path), module.state
            if state in {"match", "outdated"}:
                state = "match" if module.running_sha256 == on_disk else "outdated"
            return replace(module, disk_sha256=on_disk, state=state)

        return replace(self, modules=tuple(row(module) for module in self.modules))

    @property
    def problem(self) -> str | None:
        """One sentence about the first module that is not as it should be."""
        for module in self.modules:
            subject = f"module {module.name} ({module.path})"
            if module.state == "mismatch":
                return f"{subject} runs other bytes than its generation was started from"
            if module.state == "unpinned":
                return f"{subject} was loaded around the pinned imports"
        if self.foreign:
            return f"function {self.foreign[0]} does not run the code of its source"
        return None


class AttestationError(Exception):
    """The child's answer does not have the agreed form."""


def parse(frame: Mapping[str, Any]) -> Attestation:
    """Return what a child's frame says.

    Raises:
        AttestationError: it has not the agreed form.
    """
    executed = [
        Executed(_text(row, "name"), _text(row, "path"), _text(row, "sha256"))
        for row in _rows(frame, "modules")
    ]
    unpinned = [Executed(_text(row, "name"), _text(row, "path"), None) for row in _rows(frame, "unpinned")]
    importing = frame.get("importing")
    if not isinstance(importing, bool):
        raise AttestationError("the child's attestation does not say whether it is importing")
    return Attestation(
        _text(frame, "nonce"), (*executed, *unpinned), _functions(frame), _replaced(frame), importing
    )


def _functions(frame: Mapping[str, Any]) -> Mapping[str, Mapping[str, str]]:
    functions = frame.get("functions")
    if isinstance(functions, Mapping) and all(
        isinstance(prints, Mapping) and all(isinstance(text, str) for text in (*prints, *prints.values()))
        for prints in functions.values()
    ):
        return functions
    raise AttestationError("the child's attestation does not say which functions it has")


def _replaced(frame: Mapping[str, Any]) -> tuple[str, ...]:
    replaced = frame.get("replaced")
    if isinstance(replaced, list) and all(isinstance(name, str) for name in replaced):
        return tuple(replaced)
    raise AttestationError("the child's attestation does not say which functions were replaced")


def _rows(frame: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    rows = frame.get(key)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise AttestationError(f"the child's attestation lacks the list {key!r}")
    return rows


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise AttestationError(f"the child's attestation lacks the text {key!r}")
    return value


def compare(
    started_from: Manifest,
    disk: Manifest,
    attestation: Attestation,
    prints: Mapping[str, Mapping[str, str]],
) -> Verdict:
    """Compare what a child executed with what it was started from and with what stands on disk.

    Args:
        started_from: the manifest of its generation.
        disk: the manifest of the files now.
        attestation: what it said.
        prints: sha256 of a source to the prints of its code. A source without them is not compared.
    """
    rows = [
        ModuleVerdict(
            module.name,
            module.path,
            disk.sources.get(module.path),
            module.sha256,
            _judge(module, started_from.sources.get(module.path), disk.sources.get(module.path)),
        )
        for module in attestation.modules
    ]
    names = {module.path: module.name for module in attestation.modules}
    checked, foreign = 0, set(attestation.replaced)
    for path, running in attestation.functions.items():
        expected = prints.get(started_from.sources.get(path, ""))
        if expected is not None:
            checked += len(running)
            foreign |= {
                f"{names.get(path, path)}:{name}" for key, name in running.items() if key not in expected
            }
    return Verdict(tuple(sorted(rows, key=lambda row: (row.path, row.name))), checked, tuple(sorted(foreign)))


def _judge(module: Executed, pinned: str | None, on_disk: str | None) -> ModuleState:
    if module.sha256 is None:
        return "unpinned"
    if module.sha256 != pinned:
        return "mismatch"
    return "match" if module.sha256 == on_disk else "outdated"
