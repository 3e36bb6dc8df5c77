"""The back-off: grows, is bounded, and spreads callers out."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rbee.client.retry import BASE_S, CAP_S, backoff_s, reconnect_s

jitters = st.floats(min_value=0, max_value=1)


@given(st.integers(min_value=0, max_value=10**9), jitters)
def test_wait_is_within_half_and_whole_of_its_step(attempt: int, jitter: float) -> None:
    """Never zero, never beyond the cap, however often it was tried."""
    step = min(CAP_S, BASE_S * 2.0 ** min(attempt, 30))
    assert step / 2 <= backoff_s(attempt, jitter=jitter) <= step


@given(st.integers(min_value=0, max_value=40), jitters)
def test_wait_never_shrinks_with_the_attempt(attempt: int, jitter: float) -> None:
    """The next wait is at least as long."""
    assert backoff_s(attempt + 1, jitter=jitter) >= backoff_s(attempt, jitter=jitter)


def test_first_reconnect_keeps_to_what_the_server_asked() -> None:
    """`retry:` decides once, within the cap."""
    assert reconnect_s(0, asked_s=1.25, jitter=0.5) == 1.25
    assert reconnect_s(0, asked_s=600, jitter=0.5) == CAP_S


def test_later_reconnects_follow_the_back_off() -> None:
    """A server that stays away is asked less and less often."""
    assert reconnect_s(3, asked_s=0.001, jitter=1) == backoff_s(3, jitter=1)
    assert reconnect_s(0, asked_s=None, jitter=1) == backoff_s(0, jitter=1)
