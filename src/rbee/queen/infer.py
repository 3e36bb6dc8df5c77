"""Kept answers: narrated into the job's log, by as many workers as it takes."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from rbee.contracts.events import encode_json
from rbee.contracts.operations import ApiCall, Generation, Infer, purpose_of
from rbee.errors import InternalError, RbeeError, WorkerLostError
from rbee.jobs import JobRegistry, RunningJob
from rbee.queen.answering import Answering, failure_of
from rbee.queen.continuation import Asked, GiveUp, Whole, after_loss, asked_of, body_after
from rbee.queen.dispatch import Dispatcher, StartFailedError
from rbee.queen.losses import LOST, NOT_STARTED, Loss, raise_if_nowhere_else, seam
from rbee.queen.said import Said, read_said
from rbee.queen.workers import Placement, WorkerBook


class KeptAnswers:
    """Runs the jobs whose answers are kept: `infer`, and the API calls that ask for it."""

    def __init__(
        self, registry: JobRegistry, workers: WorkerBook, dispatcher: Dispatcher, answering: Answering
    ) -> None:
        self._registry = registry
        self._workers = workers
        self._dispatcher = dispatcher
        self._answering = answering

    async def __call__(self, job: RunningJob) -> dict[str, Any]:
        """Place the job, let workers answer until the answer is whole, and make the result of the log."""
        return await self._see_through(job, None)

    async def resume(self, job: RunningJob, placement: Placement) -> dict[str, Any]:
        """Go on with an answer that a worker went on giving while no queen listened.

        The same request asked again starts nothing twice, and starts what never reached the worker.
        """
        return await self._see_through(job, placement)

    async def _see_through(self, job: RunningJob, left: Placement | None) -> dict[str, Any]:
        operation = job.operation
        assert isinstance(operation, Generation)
        asked = asked_of(operation, job.record.model)
        lost: Loss | None = None
        failed_starts = 0
        while True:
            outcome = await self._once(job, asked, left, lost)
            if isinstance(outcome, dict):
                return await self._result(job, outcome)
            left, lost = None, outcome
            failed_starts += lost.worker_id is None
            said = await read_said(self._registry, job.job_id)
            verdict = after_loss(asked, said, lost.error, used=job.record.attempt + failed_starts)
            if isinstance(verdict, GiveUp):
                raise verdict.error
            if isinstance(verdict, Whole):
                return self._made(job, said, {"finish_reason": verdict.finish_reason})
            raise_if_nowhere_else(job, lost, self._dispatcher)

    async def _once(
        self, job: RunningJob, asked: Asked, left: Placement | None, lost: Loss | None
    ) -> dict[str, Any] | Loss:
        """Let one worker answer, placed now unless it was left; returns its closing line's fields, or the loss."""
        try:
            placement = left or await self._place(job, lost)
        except StartFailedError as failed:
            if not isinstance(failed.cause, NOT_STARTED):
                raise failed.cause from failed
            return Loss(failed.cause)
        try:
            return await self._attempt(job, asked, placement, lost, is_resumed=left is not None)
        except LOST as error:
            return Loss(error, placement.worker_id)

    async def _place(self, job: RunningJob, lost: Loss | None) -> Placement:
        """Wait for a place; where the answer has begun, the log is told who goes on with it."""
        said = await read_said(self._registry, job.job_id) if lost is not None else Said()
        assert job.record.model is not None
        purpose = purpose_of(job.operation)
        return await self._dispatcher.acquire(
            job, job.record.model, seam(said, lost), purpose=purpose, goes_on=bool(said.text)
        )

    async def _attempt(
        self, job: RunningJob, asked: Asked, placement: Placement, lost: Loss | None, *, is_resumed: bool
    ) -> dict[str, Any]:
        """Let one worker answer; returns its closing line's fields, and gives its slot back.

        When the queen ends, the worker keeps its place: it goes on, and what comes of it meanwhile is the job's.
        """
        if isinstance(job.operation, Infer | ApiCall):
            self._workers.ask_keep_alive(placement.worker_id, job.operation.keep_alive)
        try:
            if not placement.closing.done() and await self._workers.has_ended(placement.worker_id):
                raise WorkerLostError(
                    f"The worker {placement.worker_id} has ended.", details={"worker_id": placement.worker_id}
                )  # a heartbeat that was long under way had named it
            said = Said()
            if placement.attempt > 1:
                said = await read_said(self._registry, job.job_id, before_attempt=placement.attempt)
            self._answering.check_prefill(placement, said, lost.error if lost is not None else None)
            body = encode_json(body_after(asked, said))
            fields = await self._answer(job, asked.path, body, placement, is_resumed=is_resumed)
        except asyncio.CancelledError:
            if job.stop is not None:  # else the queen ends: her next start goes on with it
                await self._answering.stop(placement, job.record.correlation_id)
                self._dispatcher.release(placement)
            raise
        except BaseException:
            self._dispatcher.release(placement)
            raise
        self._dispatcher.release(placement)
        failure = failure_of(fields)
        if failure is not None:
            raise failure
        return fields

    async def _answer(
        self, job: RunningJob, path: str, body: bytes, placement: Placement, *, is_resumed: bool
    ) -> dict[str, Any]:
        operation, correlation_id = job.operation, job.record.correlation_id
        assert isinstance(operation, Generation)
        try:
            if is_resumed:
                await self._answering.found_again(placement)
            return await self._answering.answer(placement, operation, path, body, correlation_id)
        except RbeeError:
            await self._answering.stop(placement, correlation_id)
            raise

    async def _result(self, job: RunningJob, fields: dict[str, Any]) -> dict[str, Any]:
        """Read the answer back from the log, where every piece of it stands.

        Raises:
            InternalError: A piece is missing: an answer with a hole is never called complete.
        """
        said = await read_said(self._registry, job.job_id)
        frames = said.frames.get(job.record.attempt, 0)
        if frames != fields.get("frames"):
            raise InternalError(f"The log holds {frames} of the answer's {fields.get('frames')} pieces.")
        said.tokens.pop(job.record.attempt, None)  # its closing line knows better
        return self._made(job, said, fields)

    def _made(self, job: RunningJob, said: Said, fields: dict[str, Any]) -> dict[str, Any]:
        """Make the result of a whole answer; `fields` is what the last attempt's closing line says."""
        first = said.begun_in in (0, job.record.attempt)
        prompt_tokens = fields.get("prompt_tokens") if first else None
        if prompt_tokens is None:
            prompt_tokens = said.prompt_tokens
        completion_tokens = sum(said.tokens.values()) + (fields.get("completion_tokens") or 0)
        job.facts.update(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            tokens_per_s=fields.get("tokens_per_s"),
            duration_s=round(time.time() - job.record.created_at, 3),
        )
        return {
            "text": said.text,
            "finish_reason": fields.get("finish_reason"),
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
            "time_to_first_token_s": fields.get("time_to_first_token_s") if first else _waited_s(job, said),
            "tokens_per_s": fields.get("tokens_per_s"),
            "attempts": job.record.attempt,
        }


def _waited_s(job: RunningJob, said: Said) -> float | None:
    """Return how long the first piece of an answer of several attempts took, from the first placement."""
    if not said.first_ns or job.record.started_at is None:
        return None
    return round(max(0.0, said.first_ns / 1e9 - job.record.started_at), 6)
