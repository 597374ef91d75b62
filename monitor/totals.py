"""Exact totals of what was stored, committed together with the rows they count.

The rule: a total is kept in the cursor row and never in memory alone. After a SIGKILL at any moment the row
says what is true, and the metrics are read from it.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal["new", "resubmission"]
KINDS: tuple[Kind, ...] = get_args(Kind)

DropSeries = tuple[str, str, str]
"""Project, judgement, kind: the labels of `wa_monitor_drops_stored_total`."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts since the cursor was created."""

    drops: Counter[DropSeries] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    """By project; messages of other chats are not counted."""
    resolved: int = 0
    """Senders that were pending and got their phone from the map."""
    look_alikes: Counter[str] = field(default_factory=Counter)
    """By project: what looks like a drop and is none."""
    textless: Counter[str] = field(default_factory=Counter)
    """By project: messages without a text, most often photos; the bridge does not keep captions."""

    def __add__(self, other: "Totals") -> "Totals":
        """Return the totals after another batch."""
        return Totals(
            self.drops + other.drops,
            self.messages + other.messages,
            self.resolved + other.resolved,
            self.look_alikes + other.look_alikes,
            self.textless + other.textless,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the form that the column `totals` holds."""
        return {
            "drops": [[*series, count] for series, count in sorted(self.drops.items())],
            "messages": dict(sorted(self.messages.items())),
            "resolved": self.resolved,
            "look_alikes": dict(sorted(self.look_alikes.items())),
            "textless": dict(sorted(self.textless.items())),
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "Totals":
        """Read what `to_json` wrote; an empty document is zero."""
        return cls(
            Counter(
                {(project, judgement, kind): n for project, judgement, kind, n in document.get("drops", [])}
            ),
            Counter(document.get("messages", {})),
            document.get("resolved", 0),
            Counter(document.get("look_alikes", {})),
            Counter(document.get("textless", {})),
        )
