"""When a dead server is started again: the delays, the cap, the exit codes that are final."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.keeper.restart_policy import (
    DELAY_S_MAX,
    FAILURES_MAX,
    FINAL,
    FIRST_DELAY_S,
    HISTORY_MAX,
    STEADY_S,
    WINDOW_S,
    Death,
    GiveUp,
    Restart,
    decide,
)

mendable = st.integers(-64, 255).filter(lambda status: status not in FINAL)
lives = st.floats(0, 200)


@st.composite
def histories(draw: st.DrawFn) -> list[Death]:
    """Make deaths that follow from lives, one after the other."""
    now, deaths = draw(st.floats(0, 1e6)), []
    for lived_s in draw(st.lists(lives, min_size=1, max_size=40)):
        now += lived_s
        deaths.append(Death(at_s=now, lived_s=lived_s, status=draw(mendable)))
    return deaths


def deaths_every(lived_s: float, count: int, status: int = -9) -> list[Death]:
    """Make so many deaths after lives of the same length."""
    return [Death(at_s=lived_s * number, lived_s=lived_s, status=status) for number in range(1, count + 1)]


def test_delay_doubles_with_each_short_life() -> None:
    """From 0.1 s to 5 s, where the lives are just long enough for the cap to leave them alone."""
    delays = []
    for count in range(1, 10):
        deaths = deaths_every(15.0, count)
        verdict = decide(deaths, deaths[-1].at_s)
        assert isinstance(verdict, Restart)
        delays.append(verdict.after_s)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]


def test_sixth_death_within_a_minute_is_one_too_many() -> None:
    """Five are borne."""
    assert decide(deaths_every(1.0, 5), 5.0) == Restart(1.6)
    assert decide(deaths_every(1.0, 6), 6.0) == GiveUp("that is more than 5 failures within 60 s", 1)


@pytest.mark.parametrize("status", [2, 3])
@given(before=histories())
def test_final_exit_code_is_never_started_again(status: int, before: list[Death]) -> None:
    """Whatever came before."""
    last = Death(at_s=before[-1].at_s + 1e6, lived_s=1e6, status=status)
    verdict = decide([*before, last], last.at_s)
    assert isinstance(verdict, GiveUp)
    assert verdict.exit_code == status


@given(deaths=histories())
def test_delay_is_within_its_bounds(deaths: list[Death]) -> None:
    """Never sooner than the first delay, never later than the longest."""
    verdict = decide(deaths, deaths[-1].at_s)
    if isinstance(verdict, Restart):
        assert FIRST_DELAY_S <= verdict.after_s <= DELAY_S_MAX


@given(deaths=histories(), lived_s=st.floats(STEADY_S, 1e6))
def test_long_life_begins_the_delays_anew(deaths: list[Death], lived_s: float) -> None:
    """However bad it was before, while the cap is not reached."""
    steady = Death(at_s=deaths[-1].at_s + lived_s, lived_s=lived_s, status=1)
    earlier = [death for death in deaths if steady.at_s - death.at_s >= WINDOW_S]
    assert decide([*earlier, steady], steady.at_s) == Restart(FIRST_DELAY_S)


@given(deaths=histories())
def test_it_gives_up_exactly_at_the_cap(deaths: list[Death]) -> None:
    """Counted here in another way."""
    now = deaths[-1].at_s
    recent = [death for death in deaths if death.at_s > now - WINDOW_S]
    assert isinstance(decide(deaths, now), GiveUp) == (len(recent) > FAILURES_MAX)


@given(deaths=histories())
def test_bounded_history_decides_as_the_whole_one(deaths: list[Death]) -> None:
    """What is forgotten changes nothing."""
    now = deaths[-1].at_s
    assert decide(deaths[-HISTORY_MAX:], now) == decide(deaths, now)


@given(deaths=histories())
def test_one_more_short_life_is_never_followed_by_a_shorter_delay(deaths: list[Death]) -> None:
    """Restarts of a sick server grow rarer."""
    now = deaths[-1].at_s
    sicker = Death(at_s=now + STEADY_S / 2, lived_s=STEADY_S / 2, status=1)
    before, after = decide(deaths, now), decide([*deaths, sicker], sicker.at_s)
    if isinstance(before, Restart) and isinstance(after, Restart):
        assert after.after_s >= before.after_s
