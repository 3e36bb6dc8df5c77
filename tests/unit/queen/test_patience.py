from __future__ import annotations

from rbee.contracts.states import HiveState
from rbee.queen.patience import UNMOVED_S, WAIT_S_MAX, Patience


def test_words_are_waited_for_until_nothing_has_moved_for_a_while() -> None:
    patience = Patience(100.0)

    assert not patience.is_over(100.0 + UNMOVED_S - 0.1, HiveState.LIVE, 0.0)
    assert not patience.is_over(103.0, HiveState.LIVE, 102.0)
    assert patience.is_over(102.0 + UNMOVED_S, HiveState.LIVE, 102.0)


def test_stream_that_moves_for_ever_is_not_waited_for_for_ever() -> None:
    patience = Patience(100.0)
    last = 100.0 + WAIT_S_MAX

    assert not patience.is_over(last - 0.1, HiveState.LIVE, last - 0.1)
    assert patience.is_over(last, HiveState.LIVE, last)


def test_time_stands_still_while_the_hive_is_stale_and_is_over_when_it_is_lost() -> None:
    patience = Patience(100.0)

    assert not patience.is_over(200.0, HiveState.STALE, 0.0)
    assert not patience.is_over(200.0 + UNMOVED_S - 0.1, HiveState.LIVE, 0.0)
    assert patience.is_over(200.0 + UNMOVED_S, HiveState.LIVE, 0.0)
    assert patience.is_over(100.0, HiveState.LOST, 100.0)
