"""An event loop in a thread of its own, for programs that have none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, ParamSpec, TypeVar

from rbee.errors import InternalError

T = TypeVar("T")
P = ParamSpec("P")

CLOSE_S = 5.0

_CLOSED = "The client was closed."
_ANOTHER = "Make another client there."


class _WorkThere(Generic[T]):
    """Work that one thread asks for and the loop of another does.

    Attributes:
        outcome: What came of it; cancelling it cancels the work.
    """

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self.outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
        self._make = make

    def begin(self) -> None:
        """Begin, in the loop's thread, unless it was cancelled already."""
        if self.outcome.cancelled():
            return
        try:
            work = self._make()
        except Exception as error:  # noqa: BLE001  # whoever waits hears of it
            self.outcome.set_exception(error)
            return
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        task.add_done_callback(self._take_over)
        self.outcome.add_done_callback(lambda outcome: self._stop(outcome.cancelled(), loop, task))

    @staticmethod
    def _stop(is_cancelled: bool, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        if is_cancelled:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and all its work with it
                loop.call_soon_threadsafe(task.cancel)

    def _take_over(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.outcome.cancel()
        if not self.outcome.set_running_or_notify_cancel():
            return
        error = task.exception()
        if error is not None:
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())


class LoopThread:
    """Runs coroutines for any thread that asks, beside a resource that is open for so long.

    The thread never keeps the interpreter from ending; whoever made it closes it.

    Args:
        resource: Entered in the loop before anything else runs there, left when all of that has ended.
    """

    def __init__(self, resource: AbstractAsyncContextManager[Any]) -> None:
        self._resource = resource
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._is_open: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._lock = threading.RLock()  # garbage collection may come back here while it is held
        self._is_closed = False
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="rbee-client", daemon=True)
        self._thread.start()
        self._is_open.result()

    def run(self, work: Callable[P, Coroutine[Any, Any, T]], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a coroutine function in the loop and return its result; a wait that is interrupted cancels it.

        The coroutine is made in the loop, so that an interrupt at any moment leaves none that nobody awaits.

        Raises:
            InternalError: The loop is closed, or was before the end; or this is no thread to wait for it.
        """
        if self._is_forked:  # the lock may be held for ever there
            why = "A client is of no use in a forked process: its connections are the parent's."
            raise InternalError(why, remedy=_ANOTHER)
        if self._is_own_thread:
            why = "A client cannot wait for itself: it was called from one of its own callbacks."
            raise InternalError(why, remedy=_ANOTHER)
        work_there = _WorkThere(lambda: work(*args, **kwargs))
        try:
            if not self._begin(work_there):
                raise InternalError(_CLOSED, remedy=_ANOTHER)
            return work_there.outcome.result()
        except concurrent.futures.CancelledError:
            raise InternalError(_CLOSED, remedy="Close a client when nobody uses it any more.") from None
        except BaseException:
            work_there.outcome.cancel()
            raise

    def _begin(self, work_there: _WorkThere[Any]) -> bool:
        """Hand work to the loop; false when it is closed."""
        with self._lock:
            if not self._is_closed:
                self._loop.call_soon_threadsafe(work_there.begin)
            return not self._is_closed

    def finish(self, work: Callable[[], Coroutine[Any, Any, object]]) -> None:
        """Run what ends something: waited for, but not for long, and dropped where the loop has ended it already.

        May be called from anywhere, the garbage collector included.
        """
        if self._is_forked:
            return
        work_there = _WorkThere(work)
        if self._begin(work_there) and not self._is_own_thread:
            concurrent.futures.wait([work_there.outcome], CLOSE_S)

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    @property
    def _is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Cancel what runs, leave the resource and end the thread; returns then, or after `CLOSE_S`."""
        if self._is_forked:
            return
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._loop.call_soon_threadsafe(self._stop.set)
        if not self._is_own_thread:
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    async def _main(self) -> None:
        try:
            async with self._resource:
                self._is_open.set_result(None)
                await self._stop.wait()
                await _cancel_all()
        except BaseException as error:
            if self._is_open.done():
                raise
            self._is_open.set_exception(error)


async def _cancel_all() -> None:
    """Cancel every other task, and wait for its end."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
