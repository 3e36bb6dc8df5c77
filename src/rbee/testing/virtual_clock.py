"""An event loop on virtual time: nothing waits, and the same program runs the same way every time.

Where nothing is ready, time jumps to the next timer. What programs give to threads is done in the loop. Every
handle belongs to the simulated process whose context it was made in, and runs only while that process does: a
killed process is never taken one step further, and a stopped one goes on where it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import heapq
import io
import sys
from collections.abc import Callable, Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

STEPS_MAX = 5_000_000
_CLOSE_AGAIN_MAX = 50


class Runnable(Protocol):
    """What a handle may belong to."""

    @property
    def is_stopped(self) -> bool:
        """Tell whether it stands still, so that nothing is to be read for it."""

    def may_run(self, handle: asyncio.Handle) -> bool:
        """Tell whether the handle runs now; one that does not is kept, or dropped, by whoever says so."""


OWNER: contextvars.ContextVar[Runnable | None] = contextvars.ContextVar("rbee_simulated_process", default=None)


class Deadlock(AssertionError):
    """Everybody waits, and nothing will ever happen."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module.

    Attributes:
        errors: What was reported to the loop: exceptions nobody took, mostly.
        steps: How many handles ran.
    """

    def __init__(self) -> None:
        """Begin at 0 s."""
        self._now_s = 0.0
        super().__init__()
        self.steps = 0
        self.errors: list[str] = []
        self._read_by: dict[Runnable, set[Any]] = {}
        self.set_exception_handler(self._note_error)

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    def _note_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.errors.append(f"{context.get('message')}: {type(error).__name__ if error else ''} {error or ''}")

    def run_in_executor(  # type: ignore[override]  # an executor is never used
        self, executor: Any, function: Callable[..., T], *args: Any
    ) -> asyncio.Future[T]:
        """Do a thread's work in the loop, a moment later."""
        future: asyncio.Future[T] = self.create_future()
        self.call_soon(_fulfil, future, function, args)
        return future

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:  # type: ignore[override]
        """Watch a file for the process that asks."""
        owner = OWNER.get()
        if owner is not None:
            self._read_by.setdefault(owner, set()).add(fd)
        super().add_reader(fd, callback, *args)

    def drop_readers(self, owner: Runnable) -> None:
        """Watch no file for a process any more."""
        for fd in self._read_by.pop(owner, ()):
            self.remove_reader(fd)

    def _process_events(self, event_list: list[Any]) -> None:
        """Leave what came for a stopped process where it is."""
        for key, mask in event_list:
            handle = key.data[0] or key.data[1]
            owner = handle._context.get(OWNER)
            if owner is None or not owner.is_stopped:
                super()._process_events([(key, mask)])  # type: ignore[misc]

    def _run_once(self) -> None:
        """Run what is ready; where nothing is, look at the files, then go on to the next timer."""
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        self._drop_cancelled(scheduled)
        if not ready:
            self._process_events(self._selector.select(0))  # type: ignore[attr-defined]
            if not ready and not self._stopping:  # type: ignore[attr-defined]
                if not scheduled:
                    raise Deadlock("Nothing is ready, and nothing is to come.")
                self._now_s = max(self._now_s, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            self._run_handle(ready.popleft())

    def _drop_cancelled(self, scheduled: list[asyncio.TimerHandle]) -> None:
        if self._timer_cancelled_count > 100 and self._timer_cancelled_count * 2 > len(scheduled):  # type: ignore[has-type]
            kept = [handle for handle in scheduled if not handle.cancelled()]
            for handle in scheduled:
                if handle.cancelled():
                    handle._scheduled = False  # type: ignore[attr-defined]
            scheduled[:] = kept
            heapq.heapify(scheduled)
            self._timer_cancelled_count = 0
        while scheduled and scheduled[0].cancelled():
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]

    def _run_handle(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:
            return
        owner = handle._context.get(OWNER)  # type: ignore[attr-defined]
        if owner is not None and not owner.may_run(handle):
            return
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise Deadlock(f"More than {STEPS_MAX} steps: something runs in circles.")
        handle._run()


def _fulfil(future: asyncio.Future[T], function: Callable[..., T], args: tuple[Any, ...]) -> None:
    if future.done():
        return
    try:
        future.set_result(function(*args))
    except Exception as error:  # noqa: BLE001  # goes to whoever waits for the thread
        future.set_exception(error)


def run_virtual(loop: VirtualLoop, main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a loop made for it, and leave nothing of it behind."""
    was_collecting = gc.isenabled()
    gc.disable()  # else a task of a killed process could be taken apart in the middle of the run
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(main)
    finally:
        asyncio.set_event_loop(None)
        _take_apart(loop)
        if was_collecting:
            gc.enable()


def _take_apart(loop: VirtualLoop) -> None:
    """Close what never ended: the tasks of killed processes, whose last words nobody hears."""
    before = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            _close_all(loop)
    finally:
        sys.unraisablehook = before


def _close_all(loop: VirtualLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    loop._ready.clear()  # type: ignore[attr-defined]
    loop._scheduled.clear()  # type: ignore[attr-defined]
    loop.close()
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        _close(task.get_coro())


def _close(coro: Any) -> None:
    for _ in range(_CLOSE_AGAIN_MAX):
        try:
            coro.close()
        except BaseException:  # noqa: BLE001  # it waits in a `finally`: once more
            continue
        return
