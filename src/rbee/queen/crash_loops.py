"""Models whose workers fail to start again and again on a hive: they are refused there for a while."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from msgspec import Struct

from rbee.errors import CrashLoopError

FAILURES_MAX = 5
WINDOW_S = 60.0
REFUSED_S = 30.0
REFUSED_S_MAX = 600.0


class Refusal(Struct, frozen=True):
    """Why a model is not started on a hive now.

    Attributes:
        left_s: For how long.
        last_lines: What its last worker said before it failed.
    """

    hive_id: str
    model: str
    left_s: float
    last_lines: list[str]

    def error(self) -> CrashLoopError:
        """Make the error of a job that wants it all the same."""
        return CrashLoopError(
            f"{self.model} failed to start {FAILURES_MAX} times within {WINDOW_S:g} s on {self.hive_id}, "
            f"which starts it again in {self.left_s:.0f} s at the earliest.",
            retry_after_s=max(1.0, self.left_s),
            details={"last_lines": self.last_lines},
        )


class _History:
    def __init__(self) -> None:
        self.failed_at: deque[float] = deque(maxlen=FAILURES_MAX)
        self.refused_s = 0.0
        self.until = 0.0
        self.last_lines: list[str] = []

    @property
    def kept_until(self) -> float:
        """When it is forgotten, and the next failure is the first."""
        return max(self.until, self.failed_at[-1]) + REFUSED_S_MAX


class CrashLoops:
    """Counts failed starts by hive and model.

    `FAILURES_MAX` within `WINDOW_S`: the pair is refused for `REFUSED_S`. Then one more start is let through; each
    that fails doubles the time, up to `REFUSED_S_MAX`, one that does not ends it. Whatever was not tried for
    `REFUSED_S_MAX` behind that is forgotten.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._histories: dict[tuple[str, str], _History] = {}

    def failed(self, hive_id: str, model: str, last_lines: list[str]) -> None:
        """Take note of a worker that ended before it was ready."""
        now = self._clock()
        self._histories = {pair: known for pair, known in self._histories.items() if now < known.kept_until}
        history = self._histories.setdefault((hive_id, model), _History())
        history.failed_at.append(now)
        history.last_lines = last_lines
        is_full = len(history.failed_at) == FAILURES_MAX
        if history.refused_s or (is_full and now - history.failed_at[0] <= WINDOW_S):
            history.refused_s = min(REFUSED_S_MAX, history.refused_s * 2 or REFUSED_S)
            history.until = now + history.refused_s

    def started(self, hive_id: str, model: str) -> None:
        """Take note of a worker that got ready."""
        self._histories.pop((hive_id, model), None)

    def refusal(self, hive_id: str, model: str) -> Refusal | None:
        """Return why a model is not to be started on a hive now; None when it may be."""
        history = self._histories.get((hive_id, model))
        left_s = history.until - self._clock() if history is not None else 0.0
        return Refusal(hive_id, model, left_s, history.last_lines) if history is not None and left_s > 0 else None

    def refused(self, hive_id: str) -> dict[str, Refusal]:
        """Return the models that are not to be started on a hive now."""
        found = (self.refusal(hive_id, model) for known, model in self._histories if known == hive_id)
        return {refusal.model: refusal for refusal in found if refusal is not None}
