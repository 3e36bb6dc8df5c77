"""Reading ahead: bounded, in order, the end told last."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from rbee.client.ahead import AHEAD_MAX, ReadAhead


class Source:
    """A stream of so many events, which may end badly."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.given = 0
        self.is_closed = False
        self.has_stalled = asyncio.Event()
        self._count = count
        self._error = error

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the events."""
        try:
            while self.given < self._count:
                self.given += 1
                if self.given == AHEAD_MAX:
                    self.has_stalled.set()
                yield {"seq": self.given}
            if self._error is not None:
                raise self._error
        finally:
            self.is_closed = True


async def taken(reading: ReadAhead) -> list[int]:
    """Take everything."""
    seen: list[int] = []
    while batch := await reading.take():
        seen += [event["seq"] for event in batch]
    return seen


@pytest.mark.parametrize("count", [0, 1, AHEAD_MAX - 1, AHEAD_MAX, AHEAD_MAX + 1, 10 * AHEAD_MAX + 3])
async def test_everything_comes_once_and_in_order(count: int) -> None:
    """Around the bound as well."""
    source = Source(count)
    reading = ReadAhead(source.events())
    assert await taken(reading) == list(range(1, count + 1))
    assert await reading.take() == []
    await reading.close()
    assert source.is_closed


async def test_no_more_is_read_ahead_than_the_bound() -> None:
    """Whoever does not take stops the reading."""
    source = Source(10 * AHEAD_MAX)
    reading = ReadAhead(source.events())
    await source.has_stalled.wait()
    assert source.given == AHEAD_MAX
    assert len(await reading.take()) == AHEAD_MAX
    await reading.close()
    assert source.is_closed


async def test_error_comes_behind_what_came_before_it() -> None:
    """Nothing that was read is lost to it."""
    reading = ReadAhead(Source(3, ValueError("no")).events())
    seen: list[int] = []
    with pytest.raises(ValueError, match="no"):
        while batch := await reading.take():
            seen += [event["seq"] for event in batch]
    assert seen == [1, 2, 3]
    await reading.close()
