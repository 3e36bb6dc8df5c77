"""The desk: which requests are being answered, at most one a slot, and how each of them is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any

from rbee.errors import ConflictError, OverloadedError, UnavailableError
from rbee.worker.closing import Closing, StopCause
from rbee.worker.request_ids import Memory, RequestIds

RETRY_AFTER_S = 1.0
STOP_S = 2.0


class Running:
    """A request that was taken on, until its task has ended.

    Attributes:
        cause: Who ended it early; None while nobody did.
    """

    def __init__(self, closing: Closing, cause: StopCause | None = None) -> None:
        """Take the request's closing line."""
        self.closing = closing
        self.cause = cause
        self.task: asyncio.Task[None] | None = None

    def stop(self, cause: StopCause) -> None:
        """End the request early; the first cause stands."""
        if self.cause is None:
            self.cause = cause
        if self.task is not None:
            self.task.cancel()


class Desk:
    """Owns the slots and the requests in them."""

    def __init__(self, slots: int) -> None:
        """Begin with every slot free."""
        self.slots = slots
        self.is_draining = False
        self._ids = RequestIds()
        self._running: dict[str, Running] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def slots_used(self) -> int:
        """How many requests are being answered."""
        return len(self._running)

    def is_known(self, request_id: str) -> bool:
        """Tell whether the request was taken on before."""
        return request_id in self._running or self._ids.recall(request_id) is Memory.STARTED

    def admit(self, closing: Closing) -> Running:
        """Give a request a slot; one that was cancelled before it came needs none.

        Raises:
            ConflictError: The same request was taken on before.
            UnavailableError: The worker is being stopped.
            OverloadedError: Every slot is in use.
        """
        request_id = closing.call.request_id
        if self.is_known(request_id):
            raise ConflictError(f"The request {request_id} was taken on before.")
        if self._ids.recall(request_id) is Memory.CANCELLED_BEFORE:
            self._ids.start(request_id)
            return Running(closing, StopCause.REQUEST)
        if self.is_draining:
            raise UnavailableError("This worker is being stopped.", retry_after_s=RETRY_AFTER_S)
        if self.slots_used >= self.slots:
            raise OverloadedError(
                f"All {self.slots} slots of this worker are in use.", retry_after_s=RETRY_AFTER_S
            )
        self._ids.start(request_id)
        running = self._running[request_id] = Running(closing)
        self._idle.clear()
        return running

    def start(
        self, group: asyncio.TaskGroup, running: Running, work: Coroutine[Any, Any, None]
    ) -> asyncio.Task[None]:
        """Run an admitted request's work; its slot is free and its closing line said when the task ends."""
        task = group.create_task(work)
        running.task = task
        # A callback, for a task that is cancelled before its first step never runs its own clean-up.
        task.add_done_callback(lambda _: self._end(running))
        return task

    def _end(self, running: Running) -> None:
        running.closing.stopped(running.cause or StopCause.SHUTDOWN)
        self._running.pop(running.closing.call.request_id, None)
        if not self._running:
            self._idle.set()

    def cancel(self, request_id: str) -> bool:
        """Stop a request, or remember that it is unwanted when it comes; an ended one stays as it is.

        Returns:
            Whether it was taken on: its closing line comes, or was said already.
        """
        running = self._running.get(request_id)
        if running is not None:
            running.stop(StopCause.REQUEST)
        else:
            self._ids.cancel(request_id)
        return self.is_known(request_id)

    async def drain(self, grace_s: float) -> None:
        """Take on nothing more, give what runs `grace_s` to end, then stop it."""
        self.is_draining = True
        try:
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        except TimeoutError:
            for running in list(self._running.values()):
                running.stop(StopCause.SHUTDOWN)
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._idle.wait()
