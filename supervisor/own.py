"""Own: is the program that this supervisor runs still the one on disk?

What we hold against every child holds for us, too: a supervisor that was updated on disk goes on as it was
loaded, until somebody replaces it. So it looks at the ``*.py`` of its own package as it looks at a tree, by
content, and says when they differ from what it was loaded from.

What was loaded is what stood there at the start, unless

- a source was changed after the process had begun: it may have been loaded in either state;
- the importer took its code from a ``.pyc`` that is older than the source's last change, or that it never
  compares with the source, and the code in it is not that source's. This is the stale bytecode that the
  whole project is about.

Both count as outdated: a replacement settles them.

Not covered: what our dependencies consist of, and the interpreter; both are replaced by a restart.

Rejected: comparing the code of our own functions with their sources, as for a child: half a second of
compiling at each start, for what the times of a file tell as well.
"""

from __future__ import annotations

import hashlib
import marshal
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from supervisor import manifest, processes, pyc
from supervisor.bytecode import shorten
from supervisor.errors import SourceError
from supervisor.manifest import Manifest, Snapshot, Tree

_PACKAGE = Path(__file__).parent
_SECOND_NS = 1_000_000_000


class OwnCode:
    """The package as it was loaded, and as it is now.

    Args:
        began_ns: wall clock time at which this program was started, in nanoseconds.

    Attributes:
        tree: where it lies.
        problem: one sentence about why what runs is not what is on disk; None if it is.
    """

    def __init__(self, began_ns: int) -> None:
        self.tree = Tree((str(_PACKAGE),))
        self.problem: str | None = None
        self._doubtful: tuple[str, ...] = ()
        self._loaded: Manifest | None = None
        self._snapshot: Snapshot | None = None
        try:
            self._snapshot = manifest.scan(self.tree, None, _sha256)
        except SourceError as error:
            self.problem = str(error)
            return
        self._loaded = self._snapshot.manifest
        younger = _younger_than(began_ns, self._loaded)
        self._doubtful = tuple(sorted({*younger, *_loaded_from_stale_bytecode()}))
        self.problem = self._difference(self._loaded)

    @property
    def digest(self) -> str | None:
        """Of the tree that was loaded; None if it could not be read then."""
        return self._loaded.digest if self._loaded is not None else None

    def look(self) -> None:
        """Look at the package on disk, and bring :attr:`problem` up to date; takes a quarter millisecond."""
        try:
            self._snapshot = manifest.scan(self.tree, self._snapshot, _sha256)
        except SourceError as error:
            self.problem = str(error)
        else:
            self.problem = self._difference(self._snapshot.manifest)

    def _difference(self, now: Manifest) -> str | None:
        if self._loaded is None:
            return "its own package could not be read when it was started"
        changed = self._loaded.changes(now)
        if changed:
            return f"its own package has changed on disk since it was started: {shorten(changed)}"
        if self._doubtful:
            return f"it may have loaded other code than its own package holds: {shorten(self._doubtful)}"
        return None


def began_ns() -> int:
    """Return the wall clock time at which this process was started, rounded up by what the clock tells.

    A process needs longer than that to come to its first import.
    """
    ours = processes.read(os.getpid())
    if ours is None or not hasattr(time, "CLOCK_BOOTTIME"):
        return time.time_ns()
    per_second = os.sysconf("SC_CLK_TCK")
    age_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - (ours.start_ticks + 1) * _SECOND_NS // per_second
    return time.time_ns() - age_ns


def _younger_than(began_ns: int, loaded: Manifest) -> Iterator[str]:
    """Yield the relative paths of sources that were changed after the program had begun."""
    for relative in loaded.sources:
        if (_changed_ns(loaded.absolute(relative)) or 0) > began_ns:
            yield relative


def _loaded_from_stale_bytecode() -> Iterator[str]:
    """Yield the relative paths of our sources in whose place the importer has run other code."""
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if name.partition(".")[0] != __package__ or spec is None or not (spec.origin and spec.cached):
            continue
        if _ran_other_code(spec.origin, spec.cached):
            yield os.path.relpath(spec.origin, _PACKAGE)


def _ran_other_code(source: str, cached: str) -> bool:
    """Whether a file of bytecode that the importer trusts does not hold the code of its source."""
    content, text = pyc.read(cached), pyc.read(source)
    if content is None or text is None or not pyc.is_trusted(content[: pyc.HEADER_BYTES], source, text):
        return False
    if pyc.is_compared(content) or (_changed_ns(source) or 0) < (_changed_ns(cached) or 0):
        return False
    try:
        # Nothing is run that has not been run already: the importer has loaded this very file.
        ran = marshal.loads(content[pyc.HEADER_BYTES :])  # noqa: S302
        return bool(ran != compile(text, source, "exec", dont_inherit=True))
    except (ValueError, EOFError, TypeError, SyntaxError):
        return True


def _changed_ns(path: str) -> int | None:
    try:
        return Path(path).stat().st_ctime_ns
    except OSError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
