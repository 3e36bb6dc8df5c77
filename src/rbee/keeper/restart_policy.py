"""Decide when a server that died is started again, and when that is of no use; pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from msgspec import Struct

from rbee.keeper.exit_codes import EXIT_FAILED

FIRST_DELAY_S = 0.1
DELAY_S_MAX = 5.0
STEADY_S = 30.0
FAILURES_MAX = 5
WINDOW_S = 60.0
HISTORY_MAX = 16
"""So many deaths decide as much as all of them: enough to reach the longest delay, and the cap."""

FINAL = {2: "its settings cannot be used as they are", 3: "it cannot get ready as things are"}
"""The exit codes that starting again would only repeat, each with what it means."""


class Death(Struct, frozen=True):
    """One end of a server that nobody asked for.

    Attributes:
        at_s: When, on any clock that never goes back.
        lived_s: How long it had run.
        status: Its exit code, or the signal that ended it as a negative number.
    """

    at_s: float
    lived_s: float
    status: int


class Restart(Struct, frozen=True):
    """Start it again after so many seconds."""

    after_s: float


class GiveUp(Struct, frozen=True):
    """Leave it dead.

    Attributes:
        why: The reason, as a clause.
        exit_code: What whoever kept it running ends with.
    """

    why: str
    exit_code: int


def decide(deaths: Sequence[Death], now_s: float) -> Restart | GiveUp:
    """Return what to do after the last of `deaths`, which are in the order they happened.

    The delay doubles with each short life, and begins anew after a life of `STEADY_S`. More than
    `FAILURES_MAX` deaths within `WINDOW_S` are too many, and so is one with an exit code of `FINAL`.
    """
    last = deaths[-1]
    if last.status in FINAL:
        return GiveUp(FINAL[last.status], last.status)
    recent = sum(now_s - death.at_s < WINDOW_S for death in deaths)
    if recent > FAILURES_MAX:
        return GiveUp(f"that is more than {FAILURES_MAX} failures within {WINDOW_S:g} s", EXIT_FAILED)
    short_lives = sum(1 for _ in takewhile(lambda death: death.lived_s < STEADY_S, reversed(deaths)))
    doublings = min(max(short_lives - 1, 0), HISTORY_MAX)
    return Restart(min(FIRST_DELAY_S * 2.0**doublings, DELAY_S_MAX))
