"""Run a command's coroutine so that signals are told to it, not thrown into it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from rbee.keeper.exit_codes import EXIT_INTERRUPTED

T = TypeVar("T")
Main = Callable[[asyncio.Event], Coroutine[Any, Any, int]]


class Interrupted(Exception):
    """The person asked to stop, and there is nothing to undo."""


def run_stoppable(main: Main, *, is_patient: bool = False) -> int:
    """Run `main(stop)` and return its exit code.

    The first SIGINT, SIGTERM or SIGHUP sets `stop`; a second one cancels `main`, whatever it is waiting for,
    unless it `is_patient`: then `main` alone decides how long it takes to stop.
    """
    with asyncio.Runner() as runner:
        return runner.run(until_done(main, is_patient=is_patient))


async def until_done(main: Main, *, is_patient: bool = False) -> int:
    """Await `main(stop)` in the running loop, with the signals bound to `stop` for so long."""
    stop = asyncio.Event()
    task = asyncio.ensure_future(main(stop))

    def on_signal() -> None:
        if stop.is_set() and not is_patient:
            task.cancel()
        stop.set()

    with _signals(on_signal):
        try:
            return await task
        except Interrupted:
            return EXIT_INTERRUPTED
        except asyncio.CancelledError:
            if stop.is_set():
                return EXIT_INTERRUPTED
            raise


@contextmanager
def _signals(callback: Callable[[], object]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with suppress(NotImplementedError):  # an event loop without signal handlers: the default ones stay
        for number in numbers:
            loop.add_signal_handler(number, callback)
    try:
        yield
    finally:
        with suppress(NotImplementedError):
            for number in numbers:
                loop.remove_signal_handler(number)


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Await `work`; leave it when `stop` is set first.

    Raises:
        Interrupted: `stop` was set; `work` was cancelled and has ended.
    """
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Interrupted
    finally:
        working.cancel()
        stopping.cancel()
        await asyncio.gather(working, stopping, return_exceptions=True)
