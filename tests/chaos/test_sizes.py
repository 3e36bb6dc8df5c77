"""The scaffold itself: sizes and seeds."""

from __future__ import annotations

from tests.chaos.conftest import Size


def test_full_size_takes_the_second_number() -> None:
    """A test names both of its sizes in one place."""
    assert (Size(is_full=False).of(1, 10), Size(is_full=True).of(1, 10)) == (1, 10)
