from __future__ import annotations

import pytest

from rbee.queen.crash_loops import FAILURES_MAX, REFUSED_S, REFUSED_S_MAX, WINDOW_S, CrashLoops

PAIR = ("hive", "m")


class Clock:
    """A clock that is set by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def loops(clock: Clock) -> CrashLoops:
    return CrashLoops(clock)


def fail(loops: CrashLoops, times: int = 1) -> None:
    for _ in range(times):
        loops.failed(*PAIR, ["why"])


def test_fifth_failure_within_a_minute_refuses_the_pair_alone(loops: CrashLoops) -> None:
    fail(loops, FAILURES_MAX - 1)
    assert loops.refusal(*PAIR) is None

    fail(loops)

    refusal = loops.refusal(*PAIR)
    assert refusal is not None
    assert (refusal.left_s, refusal.last_lines) == (REFUSED_S, ["why"])
    assert list(loops.refused("hive")) == ["m"]
    assert loops.refused("other") == {}
    assert loops.refusal("hive", "n") is None


def test_failures_that_lie_further_apart_refuse_nothing(loops: CrashLoops, clock: Clock) -> None:
    for _ in range(3 * FAILURES_MAX):
        fail(loops)
        clock.now += WINDOW_S / (FAILURES_MAX - 1) + 0.1

    assert loops.refusal(*PAIR) is None


def test_each_failure_after_a_refusal_doubles_it_up_to_the_most(loops: CrashLoops, clock: Clock) -> None:
    fail(loops, FAILURES_MAX)
    waits = []
    for _ in range(7):
        refusal = loops.refusal(*PAIR)
        assert refusal is not None
        waits.append(refusal.left_s)
        clock.now += refusal.left_s
        assert loops.refusal(*PAIR) is None
        fail(loops)

    assert waits == [30, 60, 120, 240, 480, REFUSED_S_MAX, REFUSED_S_MAX]


def test_worker_that_gets_ready_ends_the_history(loops: CrashLoops, clock: Clock) -> None:
    fail(loops, FAILURES_MAX)
    clock.now += REFUSED_S
    loops.started(*PAIR)

    fail(loops, FAILURES_MAX - 1)

    assert loops.refusal(*PAIR) is None


def test_error_says_how_long_and_shows_the_last_lines(loops: CrashLoops) -> None:
    fail(loops, FAILURES_MAX)
    refusal = loops.refusal(*PAIR)
    assert refusal is not None

    error = refusal.error()

    assert (error.reason, error.code, error.retry_after_s, error.retryable) == (
        "crash_loop",
        "crash_loop",
        REFUSED_S,
        True,
    )
    assert error.details["last_lines"] == ["why"]
    assert error.message == (
        "m failed to start 5 times within 60 s on hive, which starts it again in 30 s at the earliest."
    )


def test_pair_that_was_not_tried_for_long_is_forgotten(loops: CrashLoops, clock: Clock) -> None:
    """A single failure months later refuses nothing."""
    fail(loops, FAILURES_MAX)
    clock.now += REFUSED_S + REFUSED_S_MAX + 1

    fail(loops)

    assert loops.refusal(*PAIR) is None
    loops.failed("other", "m", [])
    clock.now += REFUSED_S_MAX + 1
    loops.failed("third", "m", [])
    assert len(loops._histories) == 1
