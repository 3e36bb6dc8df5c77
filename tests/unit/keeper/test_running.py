"""Signals become data: the first asks, the second insists."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from rbee.keeper.running import Interrupted, run_stoppable, unless_stopped


def raise_signal(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_first_signal_is_told_to_the_command(number: int) -> None:
    """Which then ends in its own way."""

    async def main(stop: asyncio.Event) -> int:
        raise_signal(number)
        await stop.wait()
        return 7

    assert run_stoppable(main) == 7


def test_second_signal_ends_a_command_that_does_not_stop() -> None:
    """With 130."""

    async def main(stop: asyncio.Event) -> int:
        raise_signal(signal.SIGINT)
        await stop.wait()
        raise_signal(signal.SIGINT)
        await asyncio.Event().wait()
        return 7

    assert run_stoppable(main) == 130


def test_second_signal_does_not_disturb_a_patient_command() -> None:
    """It is stopping already, in order."""

    async def main(stop: asyncio.Event) -> int:
        raise_signal(signal.SIGTERM)
        await stop.wait()
        loop = asyncio.get_running_loop()
        handled = asyncio.Event()
        raise_signal(signal.SIGTERM)
        loop.call_later(0.05, handled.set)
        await handled.wait()
        return 7

    assert run_stoppable(main, is_patient=True) == 7


def test_handlers_are_given_back() -> None:
    """Ctrl-C outside of a command works as ever."""

    async def main(stop: asyncio.Event) -> int:
        return 0

    before = signal.getsignal(signal.SIGTERM)
    run_stoppable(main)
    assert signal.getsignal(signal.SIGTERM) is before


async def test_work_is_left_when_it_is_to_stop() -> None:
    """And has ended before that is told."""
    stop, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        try:
            stop.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(Interrupted):
        await unless_stopped(stop, work())
    assert ended.is_set()


async def test_work_that_ends_first_gives_its_result() -> None:
    """Errors come through as they are."""
    assert await unless_stopped(asyncio.Event(), asyncio.sleep(0, 5)) == 5
    with pytest.raises(ZeroDivisionError):
        await unless_stopped(asyncio.Event(), _failing())


async def _failing() -> int:
    raise ZeroDivisionError
