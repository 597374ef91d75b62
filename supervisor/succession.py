"""Succession: which image of the supervisor runs, whether it is the one on disk, and how the next one comes.

The loop's side of :mod:`supervisor.reexec`. It decides when: a wish is prepared while everything goes on, and
carried out in a quiet moment, or refused with a sentence, to all who asked.
"""

from __future__ import annotations

import datetime as dt
import logging
import selectors
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from supervisor import reexec
from supervisor.commands import refuse
from supervisor.control import Client
from supervisor.own import OwnCode, began_ns
from supervisor.reexec import Estate, RefusedError, Replacement

log = logging.getLogger("wa-supervisor")

PATIENCE_SECONDS = 30.0
"""Longest time from the wish to the next image."""


class Desk(Protocol):
    """What a succession needs of the supervisor's one loop."""

    def busy_with(self) -> str | None:
        """Return what must not be interrupted, None if there is nothing."""

    def check_settings(self) -> None:
        """Raise SupervisorError if the settings as they are now cannot be taken over."""

    def describe(self) -> Estate:
        """Return the estate as it is now, before anything is let go."""

    def stop_writing(self) -> None:
        """Bring to rest what could stall, while there is a way back; raises RefusedError if it does."""


class Succession:
    """This image and the next.

    Args:
        desk: the loop.
        estate: what the image before this one has left; None if this is the first.
        scratch: directory for short-lived files.
        environment: our own.
        selector: the main loop's.

    Attributes:
        due: everything is at rest, and this image is to make room for the next.
    """

    def __init__(
        self,
        desk: Desk,
        estate: Estate | None,
        *,
        scratch: Path,
        environment: Mapping[str, str],
        selector: selectors.BaseSelector,
    ) -> None:
        self.due = False
        self._desk = desk
        self._scratch = scratch
        self._environment = environment
        self._selector = selector
        began = estate.began_ns if estate is not None else began_ns()
        self._own = OwnCode(began)
        self._told: str | None = None
        self._image = estate.image if estate is not None else 1
        self._since = dt.datetime.fromtimestamp(began / 1e9, dt.UTC)
        self._wish: Replacement | None = None
        self._clients: list[Client] = []
        self._uid: int | None = None
        self._refused_at = 0.0

    @property
    def as_json(self) -> dict[str, Any]:
        """What ``status --json`` shows as ``self``."""
        return {
            "outdated": self._own.problem is not None,
            "reason": self._own.problem,
            "tree": self._own.digest,
            "image": self._image,
            "since": self._since.isoformat("T", "milliseconds"),
        }

    @property
    def deadline(self) -> float | None:
        """When :meth:`advance` has something to do at the latest."""
        return self._refused_at if self._wish is not None else None

    @property
    def pids(self) -> Sequence[int]:
        """Of the children that it waits for."""
        return self._wish.pids if self._wish is not None else ()

    @property
    def next_image(self) -> int:
        """Number of the image that comes."""
        return self._image + 1

    @property
    def uid(self) -> int | None:
        """User who asked for the next image, None if nobody is known."""
        return self._uid

    @property
    def asked(self) -> tuple[int, ...]:
        """Descriptors of the connections that wait for the next image."""
        return tuple(client.connection.fileno() for client in self._clients if client.open)

    def look(self) -> None:
        """Look whether the package on disk is the one that runs; say once what has changed."""
        self._own.look()
        if self._own.problem == self._told:
            return
        self._told = self._own.problem
        if self._told is None:
            log.info("the supervisor's own package is again what it was loaded from")
        else:
            log.warning("outdated: %s; `wa-supervisor reexec` takes over what is there", self._told)

    def ask(self, client: Client | None = None) -> None:
        """Have this image replaced; a client is answered by the next one, or hears why there is none.

        Raises:
            SupervisorError: it cannot be.
        """
        impossible = reexec.impossible()
        if impossible is not None:
            raise RefusedError(impossible)
        self._desk.check_settings()
        if self._wish is None:
            self._refused_at = time.monotonic() + PATIENCE_SECONDS
            self._uid = client.uid if client is not None else None
            try:
                self._wish = Replacement(
                    self._own.tree,
                    scratch=self._scratch,
                    environment=self._environment,
                    selector=self._selector,
                    estate=self._desk.describe,
                )
            except OSError as error:
                why = f"cannot write to {self._scratch}: {error.strerror or error}"
                raise RefusedError(why) from error
        if client is not None:
            self._clients.append(client)

    def advance(self, now: float) -> None:
        """Take the next step of a replacement that somebody asked for."""
        wish = self._wish
        if wish is None:
            return
        busy = self._desk.busy_with()
        if now >= self._refused_at:
            self.refuse(f"it took longer than {PATIENCE_SECONDS:g} s{f': {busy}' if busy else ''}")
            return
        try:
            if not (wish.prepared and busy) and wish.advance(now) and not busy:
                self._desk.stop_writing()
                self.due = True
        except RefusedError as error:
            self.refuse(str(error))

    def refuse(self, why: str) -> None:
        """Give up what was asked for, if anything was, and tell everybody."""
        if self._wish is None:
            return
        log.warning("the supervisor was not replaced: %s", why)
        self._wish.close()
        self._wish = None
        clients, self._clients = self._clients, []
        for client in clients:
            refuse(client, why)

    def succeeded(self, estate: Estate, clients: Sequence[Client]) -> bool:
        """Tell those who asked for this image that it is there, or why it is not; return whether it is."""
        if estate.refused is not None:  # By exec itself: this is the image that has asked for it.
            self._image -= 1
            log.error("the supervisor was not replaced: %s", estate.refused)
            for client in clients:
                refuse(client, estate.refused)
            return False
        live = estate.state.live.number if estate.state.live is not None else None
        runs_on = f"generation {live} runs on" if live is not None else "no generation is live"
        log.info("the supervisor was replaced in place (image %d); %s", self._image, runs_on)
        for client in clients:
            client.answer({"ok": True, "self": self.as_json, "live": live})
        return True
