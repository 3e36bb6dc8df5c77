"""How long to wait before asking again: exponential back-off with jitter, as pure functions."""

from __future__ import annotations

BASE_S = 0.1
CAP_S = 5.0
_DOUBLINGS_MAX = 30


def backoff_s(attempt: int, *, jitter: float, base_s: float = BASE_S, cap_s: float = CAP_S) -> float:
    """Return the seconds to wait before attempt number `attempt` (0 is the first repetition).

    Args:
        attempt: How many repetitions came before without success.
        jitter: A random number from 0 to 1; it chooses within the upper half of the wait.
        base_s: The longest wait before the first repetition; doubled for each further one.
        cap_s: No wait is longer than this.
    """
    doubled = base_s * 2.0 ** min(max(attempt, 0), _DOUBLINGS_MAX)
    return min(cap_s, doubled) * (0.5 + 0.5 * jitter)


def reconnect_s(attempt: int, *, asked_s: float | None, jitter: float) -> float:
    """Return the seconds to wait before connecting again to a stream that broke off.

    What the server asked for (`retry:`, `Retry-After`) is the least, up to the cap; the back-off makes it longer
    where that was tried before, so that a server that is gone is not asked ever faster than it can start, and one
    that asks to be asked at once is not asked without a pause.
    """
    own_s = backoff_s(attempt, jitter=jitter)
    return own_s if asked_s is None else max(own_s, min(asked_s, CAP_S))
