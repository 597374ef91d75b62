"""Ahead: reads and judges the next page of a backlog while PostgreSQL stores the one before.

The rule: **it changes nothing.** What it has made is used only if it is what the next turn would make: after
the same place, by the same map and the same projects. Otherwise, and if anything goes wrong, it is thrown
away, and the turn does it all, with its own errors.

It works in small steps, in the moments in which the server works
(:meth:`monitor.database.Database.meanwhile`); what is left then is done when the page is asked for. A page
that is not full is not read ahead: there is no backlog then, and what comes next may not have arrived.

Rejected: a thread. It would need a lock for whatever the decision reads, and the two would get the
interpreter in turns of five milliseconds.
"""

from collections.abc import Iterator

from monitor.batch import Batch
from monitor.bridge import Bridge, Page
from monitor.decision import Decider
from monitor.errors import BridgeError
from monitor.identity import Known
from monitor.ledger import Beginning
from monitor.messages import Place

_STEP_MESSAGES = 100


class Ahead:
    """The next page, on its way."""

    def __init__(
        self,
        bridge: Bridge,
        place: Place,
        limit: int,
        *,
        decider: Decider,
        known: Known,
        beginning: Beginning,
    ) -> None:
        self._bridge = bridge
        self._place = place
        self._limit = limit
        self._decider = decider
        self._known = known
        self._beginning = beginning
        self._page: Page | None = None
        self._batch: Batch | None = None
        self._steps = self._work()

    def step(self) -> bool:
        """Do a little; return whether there is more to do."""
        return next(self._steps, False)

    def take(
        self, place: Place, decider: Decider, known: Known, beginning: Beginning
    ) -> tuple[Page, Batch] | None:
        """Return the page and its batch, if they are what is wanted."""
        if (
            place != self._place
            or decider is not self._decider
            or known is not self._known
            or beginning is not self._beginning
        ):
            return None
        while self.step():
            pass
        if self._page is None or self._batch is None or not self._page.rows:
            return None
        return self._page, self._batch

    def _work(self) -> Iterator[bool]:
        reading = self._bridge.reading_after(self._place, self._limit)
        page: Page | None = None
        while page is None:
            try:
                next(reading)
            except StopIteration as end:
                page = end.value
            except BridgeError:
                return  # The turn that wants it meets it again.
            yield True
        batch = Batch()
        for first in range(0, len(page.rows), _STEP_MESSAGES):
            part = page.rows[first : first + _STEP_MESSAGES]
            rows = [row for row in part if not self._beginning.is_after(row)]
            batch.add([self._decider.decide(row, self._known) for row in rows])
            yield True
        self._page, self._batch = page, batch
