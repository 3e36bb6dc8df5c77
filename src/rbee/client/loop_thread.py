"""An event loop in a thread of its own, for programs that have none."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from rbee.errors import InternalError

T = TypeVar("T")

CLOSE_S = 5.0

_CLOSED = "The client was closed."


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

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the loop and return its result; a wait that is interrupted cancels it.

        Raises:
            InternalError: The loop is closed, or was before the end; or this is no thread to wait for it.
        """
        future = self._begun(work)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise InternalError(_CLOSED, remedy="Close a client when nobody uses it any more.") from None
        except BaseException:
            future.cancel()
            raise

    def _begun(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        if self._is_forked:  # the lock may be held for ever there
            why = "A client is of no use in a forked process: its connections are the parent's."
        elif self._is_own_thread:
            why = "A client cannot wait for itself: it was called from one of its own callbacks."
        else:
            with self._lock:
                if not self._is_closed:
                    return asyncio.run_coroutine_threadsafe(work, self._loop)
            why = _CLOSED
        work.close()
        raise InternalError(why, remedy="Make another client there.")

    def finish(self, work: Coroutine[Any, Any, object]) -> None:
        """Run what ends something: waited for, but not for long, and dropped where the loop has ended it already.

        May be called from anywhere, the garbage collector included.
        """
        future = None
        if not self._is_forked:
            with self._lock:
                if not self._is_closed:
                    future = asyncio.run_coroutine_threadsafe(work, self._loop)
        if future is None:
            work.close()
        elif not self._is_own_thread:
            concurrent.futures.wait([future], CLOSE_S)

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
