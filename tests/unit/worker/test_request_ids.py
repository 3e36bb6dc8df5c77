"""Ids are remembered for the worker's life, within a bound."""

from __future__ import annotations

from rbee.worker.request_ids import Memory, RequestIds


def test_started_id_is_remembered() -> None:
    """Asked for again, it is known."""
    ids = RequestIds()
    assert ids.recall("job-1.1") is Memory.NEW
    ids.start("job-1.1")
    assert ids.recall("job-1.1") is Memory.STARTED


def test_cancel_before_the_start_is_remembered() -> None:
    """A cancel may overtake its request."""
    ids = RequestIds()
    ids.cancel("job-1.1")
    assert ids.recall("job-1.1") is Memory.CANCELLED_BEFORE


def test_cancel_after_the_start_changes_nothing() -> None:
    """What was started stays started."""
    ids = RequestIds()
    ids.start("job-1.1")
    ids.cancel("job-1.1")
    assert ids.recall("job-1.1") is Memory.STARTED


def test_oldest_id_is_forgotten_beyond_the_bound() -> None:
    """The memory does not grow for ever."""
    ids = RequestIds(limit=2)
    for number in (1, 2, 3):
        ids.start(f"job-{number}.1")
    assert [ids.recall(f"job-{number}.1") for number in (1, 2, 3)] == [Memory.NEW, Memory.STARTED, Memory.STARTED]
