"""The `infer` operation: a kept answer, narrated by the worker into the job's log."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec

from rbee.contracts.events import encode_json
from rbee.contracts.operations import Infer
from rbee.errors import InternalError, RbeeError
from rbee.jobs import JobRegistry, RunningJob
from rbee.queen.answering import Answering, failure_of
from rbee.queen.dispatch import Dispatcher
from rbee.queen.workers import Placement, WorkerBook

CHAT_PATH = "/v1/chat/completions"
_PASSED_ON = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "response_format")


class InferHandler:
    """Runs `infer` jobs."""

    def __init__(
        self, registry: JobRegistry, workers: WorkerBook, dispatcher: Dispatcher, answering: Answering
    ) -> None:
        self._registry = registry
        self._workers = workers
        self._dispatcher = dispatcher
        self._answering = answering

    async def __call__(self, job: RunningJob) -> dict[str, Any]:
        """Place the job, let the worker answer, and put the result together from the log."""
        assert isinstance(job.operation, Infer) and job.record.model is not None
        placement = await self._dispatcher.acquire(job, job.record.model)
        self._workers.ask_keep_alive(placement.worker_id, job.operation.keep_alive)
        return await self._see_through(job, job.operation, placement)

    async def resume(self, job: RunningJob, placement: Placement) -> dict[str, Any]:
        """Go on with an answer that a worker went on giving while no queen listened.

        The same request asked again starts nothing twice, and starts what never reached the worker.
        """
        assert isinstance(job.operation, Infer)
        return await self._see_through(job, job.operation, placement, is_resumed=True)

    async def _see_through(
        self, job: RunningJob, operation: Infer, placement: Placement, *, is_resumed: bool = False
    ) -> dict[str, Any]:
        try:
            fields = await self._answer(job, operation, placement, is_resumed=is_resumed)
        finally:
            self._dispatcher.release(placement)
        failure = failure_of(fields)
        if failure is not None:
            raise failure
        return await self._result(job, placement, fields)

    async def _answer(
        self, job: RunningJob, operation: Infer, placement: Placement, *, is_resumed: bool
    ) -> dict[str, Any]:
        correlation_id = job.record.correlation_id
        try:
            if is_resumed:
                await self._answering.found_again(placement)
            await self._answering.ask(placement, CHAT_PATH, encode_json(chat_body(operation)), correlation_id)
            return await self._answering.closing(placement)
        except asyncio.CancelledError:
            if job.stop is not None:  # else the queen ends: her next start goes on with it
                await self._answering.stop(placement, correlation_id)
            raise
        except RbeeError:
            await self._answering.stop(placement, correlation_id)
            raise

    async def _result(self, job: RunningJob, placement: Placement, fields: dict[str, Any]) -> dict[str, Any]:
        """Read the answer back from the log, where every piece of it stands.

        Raises:
            InternalError: A piece is missing: an answer with a hole is never called complete.
        """
        text, frames = await self._text(job.job_id, placement.attempt)
        if frames != fields.get("frames"):
            raise InternalError(f"The log holds {frames} of the answer's {fields.get('frames')} pieces.")
        prompt_tokens, completion_tokens = fields.get("prompt_tokens"), fields.get("completion_tokens")
        job.facts.update(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            tokens_per_s=fields.get("tokens_per_s"),
            duration_s=round(time.time() - job.record.created_at, 3),
        )
        return {
            "text": text,
            "finish_reason": fields.get("finish_reason"),
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens},
            "time_to_first_token_s": fields.get("time_to_first_token_s"),
            "tokens_per_s": fields.get("tokens_per_s"),
            "attempts": placement.attempt,
        }

    async def _text(self, job_id: str, attempt: int) -> tuple[str, int]:
        parts: list[str] = []
        frames, after = 0, 0
        while True:
            page = await self._registry.read(job_id, after)
            if not page.events:
                return "".join(parts), frames
            after += len(page.events)
            for event in page.events:
                if event.startswith(b'{"v":1,"kind":"token",'):
                    token = msgspec.json.decode(event)
                    frames += token.get("attempt") == attempt
                    if token.get("channel") == "answer":
                        parts.append(token.get("text") or "")


def chat_body(operation: Infer) -> dict[str, Any]:
    """Make the engine's request: what is absent stays the engine's choice."""
    messages: list[Any] = []
    if operation.system is not None:
        messages.append({"role": "system", "content": operation.system})
    if operation.messages is not None:
        messages.extend(operation.messages)
    else:
        messages.append({"role": "user", "content": operation.prompt})
    body: dict[str, Any] = {"messages": messages, "stream": True}
    for name in _PASSED_ON:
        value = getattr(operation, name)
        if value is not None:
            body[name] = value
    return body
