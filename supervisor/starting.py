"""Starting: from the decision to launch a generation to its process, or to the news that there is none.

The rule: a process is started only when its code can be judged, that is when the prints of every source of
its manifest are known. They are after a build; of a tree from before this supervisor's time a helper makes
them from the blobs first. A process that cannot be started is to the lifecycle one that ended: whatever
happens here, the launch has exactly one answer.

The main loop calls in; nothing here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import selectors
import time
from collections.abc import Callable, Collection

from msgspec import Struct

from supervisor import events
from supervisor.blobs import BlobStore
from supervisor.bytecode import CompileJob
from supervisor.fleet import Fleet
from supervisor.manifest import Manifest
from supervisor.pipeline import Pipeline

log = logging.getLogger("wa-supervisor")

_PASSING_ERRORS = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""Of the machine, not of what was to be started."""

_TRY_AGAIN_SECONDS = 5.0


class _Waiting(Struct, frozen=True):
    """A generation that waits for the prints of its code; an adopted one has its process already."""

    manifest: Manifest
    job: CompileJob
    adopted: bool = False


class Starter:
    """Starts processes of generations.

    Args:
        fleet: where they live.
        pipeline: knows the prints of code.
        blobs: where the sources are kept.
        selector: the main loop's.
        happened: takes an event of the lifecycle.
        later: has the loop call back after so many seconds.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        pipeline: Pipeline,
        blobs: BlobStore,
        selector: selectors.BaseSelector,
        happened: Callable[[events.Event], None],
        later: Callable[[float, Callable[[], None]], None],
    ) -> None:
        self._fleet = fleet
        self._pipeline = pipeline
        self._blobs = blobs
        self._selector = selector
        self._happened = happened
        self._later = later
        self._waiting: dict[int, _Waiting] = {}

    @property
    def jobs(self) -> Collection[CompileJob]:
        """The helpers that run now."""
        return [waiting.job for waiting in self._waiting.values()]

    def start(self, number: int, manifest: Manifest, now: float) -> None:
        """Start a process of a manifest, as soon as its code can be judged.

        Args:
            number: of the generation.
            manifest: what it runs.
            now: monotonic time.
        """
        if self._pipeline.knows_prints_of(manifest):
            self._launch(number, manifest)
        else:
            self._wait(number, manifest, now)

    def judge(self, number: int, manifest: Manifest, now: float) -> None:
        """Have an adopted generation attested, as soon as its code can be judged.

        Args:
            number: of the generation.
            manifest: what it runs.
            now: monotonic time.
        """
        self._wait(number, manifest, now, adopted=True)

    def collect(self, now: float, patience_seconds: float) -> None:
        """Start those whose prints have arrived.

        Args:
            now: monotonic time.
            patience_seconds: what a generation gets to become ready; it waits for us, that is not its time.
        """
        for number, waiting in list(self._waiting.items()):
            if waiting.job.deadline <= now:
                waiting.job.cancel()
                report = None
            else:
                report = waiting.job.read()
                if report is None:
                    if not waiting.adopted:
                        self._happened(events.Beat(number, patience_seconds))
                    continue
            self._forget(number)
            why = report.error if report is not None else "compiling it took too long"
            if report is not None and why is None:
                self._pipeline.take_prints(waiting.manifest, report)
            if waiting.adopted:
                self._judged(number, waiting.manifest, why)
            elif why is None:
                self._launch(number, waiting.manifest)
            else:
                self._happened(events.Exited(number, "no process", why))

    def cancel(self, number: int) -> None:
        """End a generation that still waits; one that has its process is not concerned."""
        if number in self._waiting and not self._waiting[number].adopted:
            self._waiting[number].job.cancel()
            self._forget(number)
            self._happened(events.Exited(number, "no process"))

    def close(self) -> None:
        """Cancel the helpers that run."""
        for job in self.jobs:
            job.cancel()

    def _wait(self, number: int, manifest: Manifest, now: float, *, adopted: bool = False) -> None:
        job = self._pipeline.judge(manifest, now)
        self._waiting[number] = _Waiting(manifest, job, adopted)
        self._selector.register(job, selectors.EVENT_READ, lambda: None)

    def _judged(self, number: int, manifest: Manifest, why_not: str | None) -> None:
        """Have an adopted generation attested, or try again in a while: it serves meanwhile, unproven."""
        if why_not is None:
            self._fleet.judged(number)
        else:
            log.error("the code of generation %d cannot be judged: %s; trying again", number, why_not)
            self._later(_TRY_AGAIN_SECONDS, lambda: self._judge_again(number, manifest))

    def _judge_again(self, number: int, manifest: Manifest) -> None:
        if self._fleet.get(number) is not None:
            self.judge(number, manifest, time.monotonic())

    def _forget(self, number: int) -> None:
        self._selector.unregister(self._waiting.pop(number).job)

    def _launch(self, number: int, manifest: Manifest) -> None:
        if not self._blobs.holds(manifest):
            log.warning("pinned sources were taken away; what is on disk is kept anew")
            self._pipeline.heal(time.monotonic())
        try:
            begun = self._fleet.take_begun(number, manifest, self._blobs.manifest_file(manifest))
            if not begun:
                self._fleet.launch(number, manifest, self._blobs.put_manifest(manifest))
        except OSError as error:
            # To the lifecycle it is a child that ended, with its backoff.
            passing = error.errno in _PASSING_ERRORS
            if passing:
                self._pipeline.try_again(time.monotonic())
            why = f"cannot start a process: {error}"
            self._happened(events.Exited(number, "no process", why, blameless=passing))
            return
        if begun:  # It was told what differs. What it starts itself reads the file, and that takes longer.
            with contextlib.suppress(OSError):  # It is written again when it is asked for its modules.
                self._blobs.put_manifest(manifest)
