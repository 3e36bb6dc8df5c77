"""Relayed calls: the worker's response is the caller's, byte for byte, and each is a job all the same.

Where the worker is lost in mid-answer, another one goes on with it in the same response (`Splice`). Until then no
frame is looked into: what was passed on is held as it came, and read only when there is a loss.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.contracts.events import encode_json, seq_and_kind
from rbee.errors import (
    InternalError,
    InvalidRequestError,
    NotFoundError,
    RbeeError,
    UnavailableError,
)
from rbee.http.errors import error_response
from rbee.jobs import JobRunner, RunningJob
from rbee.jobs.records import JobRecord
from rbee.queen.answering import Answering, failure_of
from rbee.queen.callers import DONE_FRAME, Call, Caller, chunk_frame
from rbee.queen.continuation import (
    Asked,
    GiveUp,
    Whole,
    after_loss,
    body_after,
    has_all_tokens,
    not_continued,
    why_not,
)
from rbee.queen.dispatch import Dispatcher, StartFailedError
from rbee.queen.losses import LOST, NOT_STARTED, Loss, raise_if_nowhere_else, seam
from rbee.queen.passing import Passing
from rbee.queen.said import Said
from rbee.queen.splice import Splice, story_of
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import Placement, WorkerBook

COMMENT_EVERY_S = 10.0
STOPPING_S = 0.25


class Relay:
    """Runs relayed calls."""

    def __init__(
        self,
        runner: JobRunner,
        workers: WorkerBook,
        dispatcher: Dispatcher,
        worker_api: WorkerApi,
        answering: Answering,
    ) -> None:
        self.runner = runner
        self._workers = workers
        self._dispatcher = dispatcher
        self._worker_api = worker_api
        self._answering = answering
        self._passing = Passing(worker_api, answering)

    def response(
        self,
        record: JobRecord,
        operation: Any,
        path: str,
        body: bytes,
        *,
        made: asyncio.Future[JobRecord] | None = None,
        is_narrated: bool = False,
    ) -> Response:
        """Return the response that runs an accepted call; the caller's leaving cancels it.

        Args:
            made: The call's acceptance, where that is still on its way to the disk.
            is_narrated: Tell the caller in the stream of a chat completion what it waits for.
        """
        call = Call(record=record, operation=operation, path=path, body=body, is_narrated=is_narrated)
        return _RelayedResponse(self, call, made)

    async def answer(self, job: RunningJob, call: Call, caller: Caller) -> dict[str, Any]:
        """Place the call, pass the worker's bytes on, and return what its closing line says.

        A worker that is lost is replaced, as often as the call may be placed; what it said is gone on from.
        """
        failed_starts = 0
        loss: Loss | None = None
        begun: Asked | None = None
        while True:
            outcome = await self._once(job, call, begun, caller, loss)
            if isinstance(outcome, dict):
                return outcome
            loss = outcome
            failed_starts += loss.worker_id is None
            following = self._following(job, call, caller, loss, job.record.attempt + failed_starts)
            if isinstance(following, Whole):
                return await self._complete(job, call, caller, following.finish_reason)
            raise_if_nowhere_else(job, loss, self._dispatcher)
            begun = following

    async def _once(
        self, job: RunningJob, call: Call, begun: Asked | None, caller: Caller, lost: Loss | None
    ) -> dict[str, Any] | Loss:
        """Let one worker answer, or go on with what has `begun`; returns the result, or how it was lost."""
        assert job.record.model is not None
        said = caller.splice.said if caller.splice is not None else Said()
        try:
            placement = await self._dispatcher.acquire(
                job,
                job.record.model,
                seam(said, lost),
                purpose=call.operation.purpose,
                goes_on=bool(said.text),
                is_relayed=True,
            )
        except StartFailedError as failed:
            if not isinstance(failed.cause, NOT_STARTED):
                raise failed.cause from failed
            return Loss(failed.cause)
        self._workers.ask_keep_alive(placement.worker_id, call.operation.keep_alive)
        try:
            self._answering.check_prefill(placement, said, lost.error if lost is not None else None)
            body = call.body
            if begun is not None and caller.splice is not None:
                body = await self._body_after(placement, begun, caller.splice, job.record.correlation_id)
            await self._passing.pass_on(job, placement, call, body, caller)
            return self._made(job, caller, await self._answering.relayed_closing(placement))
        except LOST as error:
            return Loss(error, placement.worker_id)
        except UnavailableError as error:  # it is being stopped, and its hive is about to say so
            await asyncio.sleep(STOPPING_S)
            return Loss(error, placement.worker_id)
        finally:
            try:
                await placement.on_disk()
            finally:
                self._dispatcher.release(placement)

    async def _body_after(self, placement: Placement, asked: Asked, splice: Splice, correlation_id: str) -> bytes:
        """Return what a worker is asked for so that it goes on.

        What was said is counted by its pieces, each a token, and by the worker's tokenizer, for a piece may be
        several: an emoji is.
        """
        if splice.said.text:
            tokens = await self._worker_api.count_tokens(placement, splice.said.text, correlation_id)
            splice.said.recount(tokens)
        splice.is_full |= has_all_tokens(asked, splice.said)
        return encode_json(body_after(asked, splice.said))

    def _following(
        self, job: RunningJob, call: Call, caller: Caller, loss: Loss, used: int
    ) -> Asked | Whole | None:
        """Return what is to be gone on with, None where nothing has begun; raises where nobody is to be asked."""
        if not caller.has_answer:
            if used >= call.operation.attempts:
                raise loss.error
            return None
        asked = Asked(path=call.path, body=msgspec.json.decode(call.body), attempts=call.operation.attempts)
        splice = caller.spliced(job.record.attempt)
        if splice is None:
            raise _not_held(asked, loss.error)
        verdict = after_loss(asked, splice.said, loss.error, used=used)
        if isinstance(verdict, GiveUp):
            raise verdict.error
        is_usage_wanted = call.is_usage_asked and not splice.is_usage_told and not splice.is_done
        is_count_missing = is_usage_wanted and splice.said.prompt_tokens is None
        if isinstance(verdict, Whole) and not is_count_missing:
            return verdict
        if used >= asked.attempts:
            raise not_continued(loss.error, "how many tokens it took is not known")
        splice.is_full = isinstance(verdict, Whole)
        return asked

    async def _complete(self, job: RunningJob, call: Call, caller: Caller, finish_reason: str) -> dict[str, Any]:
        """End an answer that only lacked its last frames."""
        assert caller.splice is not None
        usage = caller.splice.counts(None, None, job.record.attempt)
        if not caller.splice.is_done:
            chunks = caller.splice.rest(finish_reason, usage, is_usage_asked=call.is_usage_asked)
            await caller.send(b"".join(map(chunk_frame, chunks)) + DONE_FRAME)
        await caller.finish()
        return self._result(job, caller, {"finish_reason": finish_reason}, usage)

    def _made(self, job: RunningJob, caller: Caller, fields: dict[str, Any] | None) -> dict[str, Any]:
        """Make the result of what the closing line says."""
        if fields is None:
            return {"usage": None}
        failure = failure_of(fields)
        if failure is not None:
            raise failure
        usage = {name: fields.get(name) for name in ("prompt_tokens", "completion_tokens")}
        if caller.splice is not None:
            usage = caller.splice.counts(usage["prompt_tokens"], usage["completion_tokens"], job.record.attempt)
            fields = {**fields, "finish_reason": caller.splice.said.finish_reason}
        return self._result(job, caller, fields, usage)

    def _result(
        self, job: RunningJob, caller: Caller, fields: dict[str, Any], usage: dict[str, Any]
    ) -> dict[str, Any]:
        job.facts.update(usage, tokens_per_s=fields.get("tokens_per_s"))
        is_one = caller.splice is None or len(caller.splice.said.frames) < 2
        return {
            "finish_reason": fields.get("finish_reason"),
            "usage": usage,
            "time_to_first_token_s": fields.get("time_to_first_token_s") if is_one else _waited_s(job, caller),
            "tokens_per_s": fields.get("tokens_per_s"),
            "attempts": job.record.attempt,
        }


def _not_held(asked: Asked, error: RbeeError) -> RbeeError:
    """Make the error of an answer of which nothing is held: placed once, too long, or not to be gone on with."""
    if asked.attempts < 2:
        return error
    said = Said()
    said.frames[1] = 1
    return not_continued(error, why_not(asked, said) or "it is longer than what is held of an answer")


def _waited_s(job: RunningJob, caller: Caller) -> float | None:
    """Return how long the first piece of an answer of several attempts took, from the first placement."""
    if caller.first_at is None or job.record.started_at is None:
        return None
    return round(max(0.0, caller.first_at - job.record.started_at), 6)


class _RelayedResponse(Response):
    def __init__(self, relay: Relay, call: Call, made: asyncio.Future[JobRecord] | None) -> None:
        super().__init__()
        self._relay = relay
        self._call = call
        self._made = made

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the call as a job; the response ends when its bytes do, the job when its log has them."""
        call, runner = self._call, self._relay.runner
        if runner.is_closing:  # since the call was accepted; the next start ends it
            error = UnavailableError("The queen is stopping.")
            await error_response(error, job_id=call.record.job_id)(scope, receive, send)
            return
        caller = call.caller(send)

        async def handler(job: RunningJob) -> dict[str, Any]:
            return await self._relay.answer(job, call, caller)

        job = runner.launch(call.record, call.operation, handler, self._made)  # type: ignore[arg-type]  # one of its kinds
        assert job.task is not None
        leaving = asyncio.ensure_future(_until_left(receive))
        finished = asyncio.ensure_future(caller.finished.wait())
        telling = asyncio.ensure_future(self._tell_story(caller)) if caller.splice is not None else None
        try:
            await asyncio.wait({job.task, leaving, finished}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not finished.done() and not job.task.done():
                with suppress(NotFoundError):  # its acceptance was refused just now
                    await runner.cancel(call.record.job_id)
                return
        finally:
            others = [leaving, finished, *([telling] if telling is not None else [])]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
        if not caller.finished.is_set():
            await self._tell_failure(job, caller, scope, receive, send)

    async def _tell_story(self, caller: Caller) -> None:
        """Tell the caller what its job's log says, until the answer begins."""
        if self._made is not None:
            await asyncio.wait({self._made})
            if self._made.exception() is not None:
                return
        reader = await self._relay.runner.registry.follow(self._call.record.job_id)
        try:
            while not (caller.has_answer or reader.is_ended or reader.is_closing):
                events = await reader.next(COMMENT_EVERY_S)
                if not events and not reader.is_closing:
                    await caller.comment()
                for event in events:
                    if seq_and_kind(event)[1] == "narration":
                        await caller.tell(story_of(msgspec.json.decode(event)))
        finally:
            reader.close()

    async def _tell_failure(
        self, job: RunningJob, caller: Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        error = caller.in_full(job.error or _why_ended(job))
        job_id = self._call.record.job_id
        if caller.is_started:
            await caller.fail(error)
        elif await job.refusal() is not None:  # there is no such job
            await error_response(error)(scope, receive, send)
        else:
            response = error_response(error, job_id=job_id)
            response.headers["x-job-id"] = job_id
            response.headers["x-request-id"] = job_id
            await response(scope, receive, send)


def _why_ended(job: RunningJob) -> RbeeError:
    if job.stop is not None:
        return InvalidRequestError(job.stop.message, code="cancelled", remedy="Send it again if it is wanted.")
    if job.task is not None and job.task.cancelled():
        return UnavailableError("The queen is stopping.")
    return InternalError("The call ended without an answer.")


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
