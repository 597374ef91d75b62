"""Configuration: the settings and the environment that hold now, and which generation was started with which.

The rule: both are taken over as a whole or not at all. A file that cannot be read, is not valid or asks for
what a running supervisor cannot change leaves everything as it was, and says why.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from supervisor import environment, launch
from supervisor.lifecycle import Policy
from supervisor.settings import Settings, changeable


class ConfigurationEstate(Struct, frozen=True):
    """What the live generation was started with, as it is left to the next image of the supervisor.

    Attributes:
        settings: as plain values; empty if there is no such generation.
        environment_digest: see :class:`environment.Environment`.
    """

    settings: Mapping[str, Any]
    environment_digest: str | None


class Configuration:
    """What a supervisor was asked for, as of now.

    Args:
        settings: as they were at its start.
        reread: returns the settings as they are now; raises UsageError.
        inherited: the environment to pass on to children.
        notify_socket: where children report to.

    Attributes:
        settings: those that hold.
        policy: what of them the lifecycle decides by.

    Raises:
        UsageError: the environment file is not valid.
    """

    def __init__(
        self,
        settings: Settings,
        reread: Callable[[], Settings],
        inherited: Mapping[str, str],
        notify_socket: Path,
    ) -> None:
        self.settings = settings
        self.policy = _policy(settings)
        self._reread = reread
        self._inherited = inherited
        self._notify_socket = notify_socket
        self._environment = environment.read(inherited, settings.env_file)
        self._started_with: dict[int, tuple[Settings, str]] = {}
        """Number of each generation to its settings and the digest of its environment."""

    def read_again(self) -> bool:
        """Take over settings and environment as they are now; return whether anything has changed.

        Raises:
            UsageError: they are not valid, or cannot be changed while we run; nothing was changed.
        """
        settings = changeable(self.settings, self._reread())
        found = environment.read(self._inherited, settings.env_file)
        changed = settings != self.settings or found.digest != self._environment.digest
        self.settings, self.policy, self._environment = settings, _policy(settings), found
        return changed

    def check(self) -> None:
        """Find out whether the settings as they are now could be taken over; changes nothing.

        Raises:
            UsageError: they are not valid, or ask for what a running supervisor cannot change.
        """
        changeable(self.settings, self._reread())

    def read_environment_again(self) -> bool:
        """Take over the environment file as it is now; return whether it has changed.

        Raises:
            UsageError: it is not valid; nothing was changed.
        """
        if self.settings.env_file is None:
            return False
        found = environment.read(self._inherited, self.settings.env_file)
        changed = found.digest != self._environment.digest
        self._environment = found
        return changed

    def started(self, number: int) -> None:
        """Note that a generation is started with what holds now."""
        self._started_with[number] = self.settings, self._environment.digest

    def ended(self, number: int) -> None:
        """Forget a generation."""
        self._started_with.pop(number, None)

    def estate(self, number: int | None) -> ConfigurationEstate:
        """Return what a generation was started with, for the next image of the supervisor."""
        settings, environment_digest = self._started_with.get(number or 0, (None, None))
        return ConfigurationEstate(_plain(settings), environment_digest)

    def adopt(self, number: int, estate: ConfigurationEstate) -> None:
        """Take over what a generation was started with.

        A setting that this version knows and the earlier one did not is no change of its own.
        """
        then, now = estate.settings, _plain(self.settings)
        same = all(now[name] == value for name, value in then.items() if name in now)
        if then and same and estate.environment_digest == self._environment.digest:
            self.started(number)

    def is_outdated(self, number: int) -> bool:
        """Whether a generation was started with something else than what holds now."""
        return self._started_with.get(number) != (self.settings, self._environment.digest)

    def environment_of(self, number: int, tree: str) -> Mapping[str, str]:
        """Return the environment of a generation that is to be started."""
        return launch.child_environment(
            self._environment.variables,
            notify_socket=self._notify_socket,
            watchdog_seconds=self.settings.watchdog_seconds,
            generation=number,
            tree=tree,
        )


def _plain(settings: Settings | None) -> dict[str, Any]:
    """Return settings as values that do not change when they are written down and read again."""
    plain = msgspec.to_builtins(settings, enc_hook=str) if settings is not None else {}
    again: dict[str, Any] = json.loads(json.dumps(plain))
    return again


def _policy(settings: Settings) -> Policy:
    return Policy(
        overlap=settings.handover == "overlap",
        notify=settings.type == "notify",
        ready_timeout_seconds=settings.ready_timeout_seconds,
        stop_timeout_seconds=settings.stop_timeout_seconds,
        watchdog_seconds=settings.watchdog_seconds,
        probation_seconds=settings.probation_seconds,
        max_age_seconds=settings.max_age_seconds,
        jitter=lambda: random.uniform(0.8, 1.2),  # noqa: S311 -- spreads restarts, keeps no secret
    )
