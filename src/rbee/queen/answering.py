"""Waiting for the end of one answer: its closing line, its worker's death, a standstill, a lost hive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from rbee.contracts.frames import frames_data
from rbee.contracts.heartbeats import Purpose
from rbee.contracts.operations import ApiCall, Generation
from rbee.contracts.states import HiveState
from rbee.errors import (
    FirstTokenTimeoutError,
    HiveLostError,
    OverloadedError,
    RbeeError,
    StalledError,
    UnavailableError,
    WorkerError,
    WorkerLostError,
    error_classes,
)
from rbee.queen.continuation import not_continued
from rbee.queen.hives import HiveBook
from rbee.queen.patience import Patience
from rbee.queen.said import Said
from rbee.queen.settings import QueenSettings
from rbee.queen.worker_api import Heard, WorkerApi
from rbee.queen.workers import Placement, WorkerBook

LOOK_EVERY_S = 1.0
ASK_AGAIN_S = 0.25


class Answering:
    """Watches over placed jobs.

    Args:
        settings: The queen's.
        book: Which hives are live.
        workers: What is heard of the workers.
        worker_api: Asks them.
        on_stuck: Called with a worker that did not stop an answer within `stop_grace_s`; gets rid of it.
        can_move: Tells whether a job for a model has anywhere to go besides a hive.
    """

    def __init__(
        self,
        settings: QueenSettings,
        book: HiveBook,
        workers: WorkerBook,
        worker_api: WorkerApi,
        on_stuck: Callable[[str], Awaitable[None]],
        can_move: Callable[[str, str, Purpose], bool],
    ) -> None:
        self._settings = settings
        self._book = book
        self._workers = workers
        self._worker_api = worker_api
        self._on_stuck = on_stuck
        self._can_move = can_move

    async def answer(
        self, placement: Placement, operation: Generation, path: str, body: bytes, correlation_id: str
    ) -> dict[str, Any]:
        """Ask for a kept answer, and wait for the fields of its closing line.

        Timers stand still while the hive is not live: a hive that is stopped does not make an answer stalled.

        Raises:
            RbeeError: What the worker refused with.
            WorkerLostError: The worker ended; or it could not be reached for `hive_lost_s`, and nobody told of its
                end.
            HiveLostError: Its hive was silent for `hive_timeout_s`; where the job can go to another one, for
                `hive_lost_s`.
            FirstTokenTimeoutError: No token came in time.
            StalledError: After the first, none came for too long.
        """
        has_chunks = isinstance(operation, ApiCall)  # whose own response is made of them
        asking = asyncio.ensure_future(self._ask(placement, path, body, correlation_id, has_chunks=has_chunks))
        waited_for: set[asyncio.Future[Any]] = {placement.closing, asking}
        listed_at = asyncio.get_running_loop().time()
        try:
            while not placement.closing.done():
                look_s = self._check_alive(placement, operation)
                if asking.done():
                    asking.result()  # raises what it was refused with
                    waited_for.discard(asking)
                    listed_at = self._check_listed(placement, listed_at)
                await asyncio.wait(waited_for, timeout=look_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        return placement.closing.result()

    async def _ask(
        self, placement: Placement, path: str, body: bytes, correlation_id: str, *, has_chunks: bool
    ) -> None:
        """Ask for a kept answer until the worker has accepted.

        Asking again is harmless: a worker starts the same request once.
        """
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        while True:
            try:
                await self._worker_api.keep(placement, path, body, correlation_id, has_chunks=has_chunks)
                return
            except OverloadedError:  # it is just freeing a slot, or answers for a job that was given up
                pass
            except (WorkerLostError, UnavailableError) as error:  # gone; stopping
                if loop.time() - began_at >= self._settings.hive_lost_s:
                    raise _lost(placement, error) from error
            await asyncio.sleep(ASK_AGAIN_S)

    async def found_again(self, placement: Placement) -> None:
        """After a queen's start: wait until the worker of an earlier placement can be asked, or its end is known.

        Raises:
            HiveLostError: Its hive was not heard of for `hive_timeout_s`; where the job can go to another one, for
                `hive_lost_s`.
            WorkerLostError: Its hive is there without it, and nobody told of its end in `hive_lost_s`.
        """
        loop = asyncio.get_running_loop()
        began_at = loop.time()
        worker_deadline: float | None = None
        while not placement.closing.done():
            placement.moved_at = now = loop.time()
            if self._book.has_ready(placement.worker_id, placement.hive_id):
                return
            if self._hive_state(placement) is HiveState.LIVE:
                worker_deadline = worker_deadline or now + self._settings.hive_lost_s
                if now >= worker_deadline:
                    raise WorkerLostError(
                        f"The worker {placement.worker_id} is no longer there.",
                        details={"worker_id": placement.worker_id},
                    )
            elif self._is_lost_for_good(placement, now - began_at):
                raise HiveLostError(f"The hive {placement.hive_id} was not heard of for {now - began_at:.0f} s.")
            await self._book.changed(ASK_AGAIN_S)

    def _check_alive(self, placement: Placement, operation: Generation, shown_every_s: float = 0.0) -> float:
        """Return the seconds until the next look; raises when the hive is lost, or nothing moved for too long.

        Of tokens that are shown every `shown_every_s` only, the last one may be as old when it is seen.
        """
        now = asyncio.get_running_loop().time()
        hive = self._book.hive(placement.hive_id)
        if self._book.state_of(hive) is not HiveState.LIVE:
            silent_s = self._book.silent_s(hive)
            if self._is_lost_for_good(placement, silent_s):
                raise HiveLostError(f"The hive {hive.hive_id} has been silent for {silent_s:.0f} s.")
            placement.moved_at = now
            return LOOK_EVERY_S
        placement.moved_at = max(placement.moved_at, placement.heard_at)
        if placement.heard_at:
            limit_s = operation.idle_timeout_s or self._settings.stall_s
        else:
            limit_s = operation.first_token_timeout_s or self._settings.first_token_s
        left_s = placement.moved_at + limit_s - now + (shown_every_s if placement.heard_at else 0.0)
        if left_s > 0:
            return min(left_s, LOOK_EVERY_S)
        if placement.heard_at:
            raise StalledError(f"The worker said no further token for {limit_s:g} s.")
        raise FirstTokenTimeoutError(f"The worker said no first token within {limit_s:g} s.")

    def _check_listed(self, placement: Placement, listed_at: float) -> float:
        """Return when the worker's hive, where it is live, listed it last; raises when that is too long ago.

        A worker that ends is told by its hive. This is for one whose end was lost with what its hive knew.
        """
        now = asyncio.get_running_loop().time()
        is_live = self._hive_state(placement) is HiveState.LIVE
        if not is_live or self._book.lists(placement.worker_id, placement.hive_id):
            return now
        if now - listed_at > self._settings.hive_lost_s:
            raise WorkerLostError(
                f"The worker {placement.worker_id} is no longer there.", details={"worker_id": placement.worker_id}
            )
        return listed_at

    def _is_lost_for_good(self, placement: Placement, silent_s: float) -> bool:
        """Tell whether a hive's return is no longer waited for: sooner where there is another one."""
        if silent_s >= self._settings.hive_timeout_s:
            return True
        is_lost = silent_s >= self._settings.hive_lost_s
        return is_lost and self._can_move(placement.model, placement.hive_id, placement.purpose)

    async def stop(self, placement: Placement, correlation_id: str) -> None:
        """Stop a kept answer that is not closed yet, and wait for its closing line, within `stop_grace_s`.

        The worker is told until it has heard. One of a live hive that has not freed the slot by then is stopped
        itself; for a hive that falls silent nobody waits, nor for the closing line of what was never begun.
        """
        if placement.closing.done() and not isinstance(placement.closing.exception(), OverloadedError):
            return
        loop = asyncio.get_running_loop()
        grace_until = loop.time() + self._settings.stop_grace_s
        telling = asyncio.ensure_future(self._tell_to_stop(placement, correlation_id))
        try:
            while True:
                waited_for = {future for future in (placement.closing, telling) if not future.done()}
                await asyncio.wait(waited_for, timeout=ASK_AGAIN_S, return_when=asyncio.FIRST_COMPLETED)
                if placement.closing.done() or (telling.done() and telling.result() is Heard.STOP_BEFORE_START):
                    return
                if self._hive_state(placement) is not HiveState.LIVE:
                    if not telling.done():
                        self._workers.supersede(placement)  # stopped when its hive is back
                    return
                if loop.time() >= grace_until:
                    await self._on_stuck(placement.worker_id)
                    return
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _tell_to_stop(self, placement: Placement, correlation_id: str) -> Heard:
        """Tell the worker until it has heard."""
        while True:
            heard = await self._worker_api.stop(placement, correlation_id)
            if heard is not Heard.NOTHING:
                return heard
            await asyncio.sleep(ASK_AGAIN_S)

    def _hive_state(self, placement: Placement) -> HiveState:
        try:
            return self._book.state_of(self._book.hive(placement.hive_id))
        except RbeeError:  # of an earlier boot, and not heard of since
            return HiveState.LOST

    async def relayed_alive(
        self,
        placement: Placement,
        operation: Generation,
        is_callers_turn: Callable[[], bool],
        *,
        shown_every_s: float = 0.0,
    ) -> None:
        """Watch over a relayed answer whose bytes are being passed on, until cancelled.

        Args:
            placement: Where it comes from; `heard_at` is when bytes came last.
            operation: How long it may take to begin, and to go on.
            is_callers_turn: The caller is being waited for, who takes its time.
            shown_every_s: How often it is shown that tokens come, where they do not come themselves.

        Raises:
            RbeeError: The worker ended, or its hive is lost, or no bytes came for too long.
        """
        while True:
            look_s = self._check_alive(placement, operation, shown_every_s)
            if placement.closing.done():
                placement.closing.result()
                await asyncio.sleep(look_s)  # it is closed in order: the last bytes are under way
            else:
                await asyncio.wait({placement.closing}, timeout=look_s)
            if is_callers_turn():
                placement.moved_at = asyncio.get_running_loop().time()

    def check_prefill(self, placement: Placement, said: Said, lost: RbeeError | None) -> None:
        """Refuse to have a worker go on with an answer whose engine would begin anew.

        Raises:
            WorkerLostError: It would; the first worker's end is named.
        """
        if lost is None or not said.text:
            return
        if not self._book.has_prefill(placement.worker_id):
            raise not_continued(lost, f"the engine of {placement.worker_id} does not go on from a beginning")

    def is_asked_again(self, placement: Placement, began_at: float) -> bool:
        """Tell whether a worker that could not be asked, from a loop time on, may still be about to answer."""
        waited_s = asyncio.get_running_loop().time() - began_at
        is_there = self._book.has_ready(placement.worker_id, placement.hive_id)
        is_kept = is_there and not self._workers.is_draining(placement.worker_id)
        return is_kept and waited_s < self._settings.hive_lost_s

    async def relayed_closing(self, placement: Placement) -> dict[str, Any] | None:
        """Wait for the closing line of a relayed answer whose bytes have all come; None when it stays out.

        While the hive is live, it is waited for until its stream has not moved for 4 s (30 s in all); while it is
        stale, until it is lost.
        """
        loop = asyncio.get_running_loop()
        patience = Patience(loop.time())
        while True:
            done, _ = await asyncio.wait({placement.closing}, timeout=ASK_AGAIN_S)
            if done:
                return placement.closing.result() if placement.closing.exception() is None else None
            moved_at = self._workers.moved_at(placement.hive_id)
            if patience.is_over(loop.time(), self._hive_state(placement), moved_at):
                return None

    async def true_cause(self, placement: Placement, error: WorkerLostError) -> RbeeError:
        """Replace `cannot be reached` by how the worker really ended, when its hive tells in time."""
        done, _ = await asyncio.wait({placement.closing}, timeout=self._settings.hive_lost_s)
        if not done:
            return error
        ended = placement.closing.exception()
        if ended is None and placement.closing.result().get("outcome") == "cancelled":
            return error  # it lives, and takes us for a caller that left: it was cut off
        told = ended or failure_of(placement.closing.result())
        return told if isinstance(told, RbeeError) else error


def _lost(placement: Placement, error: RbeeError) -> RbeeError:
    """Take a worker that would take on nothing for so long as lost: another one may answer."""
    if isinstance(error, (WorkerLostError, HiveLostError)):
        return error
    said = f"The worker {placement.worker_id} took on no answer: {error.message}"
    return WorkerLostError(said, details={"worker_id": placement.worker_id})


def told_in(frame: bytes) -> RbeeError:
    """Make the error that a stream's last frame tells of."""
    told: Any = next(map(msgspec.json.decode, frames_data(frame)), None)
    error = told.get("error") if isinstance(told, dict) else None
    failure = failure_of({"outcome": "failed", "error": error})
    return failure or WorkerError()


def failure_of(fields: dict[str, Any]) -> RbeeError | None:
    """Make the error of a closing line whose outcome is not `completed`; None for a whole answer."""
    outcome = fields.get("outcome")
    if outcome == "completed":
        return None
    if outcome != "failed":
        return WorkerError(f"The worker ended the answer early ({str(outcome)[:40]}).")
    body = fields.get("error")
    told = body if isinstance(body, dict) else {}
    cls = error_classes().get(str(told.get("code")), WorkerError)
    return cls(str(told.get("message") or "The worker could not answer."), remedy=told.get("remedy"))
