"""One look at all jobs that wait, in their turn, so that whoever has waited for long is not passed for ever."""

from __future__ import annotations

from rbee.queen.decisions import NOTHING_CLOSED, Decision, Wait, Wanted
from rbee.queen.inventory import Inventory
from rbee.queen.scheduler import ADD_AFTER_S, CLAIM_AFTER_S, place


class Round:
    """Decides about one job after the other, the one whose turn is earliest first.

    Within a round there is only less and less to give, so what one job waits for, the next one that wants the same
    waits for as well. A job that has waited `CLAIM_AFTER_S` for memory that others use keeps those behind it away:
    what runs there ends, nothing new is placed there, and then it is its own. One claim for each sort of worker.
    """

    def __init__(self, now: float) -> None:
        self._now = now
        self._waits: dict[tuple[Wanted, bool, bool], Wait] = {}
        self._closed = NOTHING_CLOSED

    def decide(self, wanted: Wanted, waited_s: float, inventory: Inventory) -> Decision:
        """Decide about the next job, by what is left when all before it have been given theirs."""
        key = (wanted, waited_s >= ADD_AFTER_S, waited_s >= CLAIM_AFTER_S)
        known = self._waits.get(key)
        if known is not None:
            return known
        decision = place(wanted, inventory, self._now, waited_s=waited_s, closed=self._closed)
        if isinstance(decision, Wait):
            self._waits[key] = decision
            if decision.claim is not None:
                self._closed = self._closed.and_by(decision.claim)
        return decision
