"""Relayed calls: the worker's response is the caller's, byte for byte, and each is a job all the same.

Where the worker is lost in mid-answer, another one goes on with it in the same response (`Splice`). Until then no
frame is looked into: what was passed on is held as it came, and read only when there is a loss.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.client.answers import read_bounded
from rbee.contracts.dialects import DIALECTS
from rbee.contracts.events import encode_json, seq_and_kind
from rbee.contracts.frames import FrameSplitter, line_start
from rbee.contracts.operations import ApiCall, ChatCompletion, Completion
from rbee.errors import (
    ConflictError,
    HiveLostError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    RbeeError,
    UnavailableError,
    WorkerLostError,
)
from rbee.http.errors import error_response
from rbee.jobs import JobRunner, RunningJob
from rbee.jobs.records import JobRecord
from rbee.queen.answering import Answering, failure_of, told_in
from rbee.queen.callers import DONE_FRAME, Caller, chunk_frame
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
from rbee.queen.said import Said
from rbee.queen.splice import Splice, names_of, story_of
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import Placement

PASSED_HEADERS = ("content-type", "cache-control", "x-accel-buffering")
EVENT_STREAM = "text/event-stream"
AGAIN_S = 0.25
COMMENT_EVERY_S = 10.0
ANSWER_BYTES_MAX = 64 * 1024 * 1024
_ERROR_LINE = b'data: {"error":'


class _Named(Struct):
    """What of a call's body is looked at before there is a loss: the name that its answer repeats."""

    model: str | None = None


class Call(Struct, frozen=True, kw_only=True):
    """A relayed call.

    Attributes:
        body: What the engine is asked, as JSON.
        is_narrated: Its caller wants to be told what it waits for, in the answer's own stream.
    """

    record: JobRecord
    operation: ApiCall
    path: str
    body: bytes
    is_narrated: bool = False

    @property
    def is_stream(self) -> bool:
        """Tell whether its answer is a stream."""
        return self.operation.parameters.get("stream") is True

    @property
    def is_usage_asked(self) -> bool:
        """Tell whether the stream shall end with how many tokens it took."""
        options = self.operation.parameters.get("stream_options")
        return isinstance(options, dict) and options.get("include_usage") is True

    def caller(self, send: Send) -> Caller:
        """Return the side of the call that its response is sent to."""
        dialect = DIALECTS.get(self.path)
        is_narrated = self.is_narrated and self.is_stream and self.path == ChatCompletion.path
        splice = None
        if is_narrated:
            model = msgspec.json.decode(self.body, type=_Named).model
            splice = Splice(DIALECTS[self.path], names_of(self.record, model))
        can_continue = self.is_stream and self.path in (ChatCompletion.path, Completion.path)
        is_held = can_continue and self.operation.attempts > 1
        return Caller(send, self.record.job_id, dialect, is_held=is_held, splice=splice)


class Relay:
    """Runs relayed calls."""

    def __init__(
        self, runner: JobRunner, dispatcher: Dispatcher, worker_api: WorkerApi, answering: Answering
    ) -> None:
        self.runner = runner
        self._dispatcher = dispatcher
        self._worker_api = worker_api
        self._answering = answering

    def response(
        self, record: JobRecord, operation: Any, path: str, body: bytes, *, is_narrated: bool = False
    ) -> Response:
        """Return the response that runs an accepted call; the caller's leaving cancels it.

        Args:
            is_narrated: Tell the caller in the stream of a chat completion what it waits for.
        """
        call = Call(record=record, operation=operation, path=path, body=body, is_narrated=is_narrated)
        return _RelayedResponse(self, call)

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
                job, job.record.model, seam(said, lost), purpose=call.operation.purpose
            )
        except StartFailedError as failed:
            if not isinstance(failed.cause, NOT_STARTED):
                raise failed.cause from failed
            return Loss(failed.cause)
        try:
            self._answering.check_prefill(placement, said, lost.error if lost is not None else None)
            body = call.body
            if begun is not None and caller.splice is not None:
                body = await self._body_after(placement, begun, caller.splice, job.record.correlation_id)
            await self._pass_on(job, placement, call, body, caller)
            return self._made(job, caller, await self._answering.relayed_closing(placement))
        except LOST as error:
            return Loss(error, placement.worker_id)
        except UnavailableError as error:  # it is being stopped, and its hive is about to say so
            await asyncio.sleep(AGAIN_S)
            return Loss(error, placement.worker_id)
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

    async def _pass_on(
        self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller
    ) -> None:
        try:
            await self._pass_while_alive(job, placement, call, body, caller)
            await caller.finish()
        except WorkerLostError as error:
            raise await self._answering.true_cause(placement, error) from error
        except HiveLostError:
            await self._answering.stop(placement, job.record.correlation_id)  # as soon as its hive is back
            raise
        except asyncio.CancelledError:
            if job.stop is not None:  # else the queen ends
                await self._settle(job, placement)
            raise
        except RbeeError:
            await self._settle(job, placement)
            raise

    async def _settle(self, job: RunningJob, placement: Placement) -> None:
        """Wait for the closing line of a request that was refused, or left; where none comes, have it stopped.

        A worker that does not stop it is stopped itself, so that its slot is free.
        """
        if await self._answering.relayed_closing(placement) is None:
            await self._answering.stop(placement, job.record.correlation_id)

    async def _pass_while_alive(
        self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller
    ) -> None:
        """Pass the bytes on for as long as the worker is known to be there and gives some."""
        passing = asyncio.ensure_future(self._pass(job, placement, call, body, caller))
        watching = asyncio.ensure_future(
            self._answering.relayed_alive(placement, call.operation, lambda: caller.is_waited_for)
        )
        try:
            await asyncio.wait({passing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not passing.done():
                watching.result()  # raises
            passing.result()
        finally:
            for task in (passing, watching):
                task.cancel()
            await asyncio.gather(passing, watching, return_exceptions=True)

    async def _pass(self, job: RunningJob, placement: Placement, call: Call, body: bytes, caller: Caller) -> None:
        async with AsyncExitStack() as stack:
            answer = await self._ask(stack, placement, call.path, body, job.record.correlation_id)
            headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
            if answer.content_type == EVENT_STREAM:
                await self._pass_frames(answer, placement, call, headers, caller)
            else:
                whole = await read_bounded(answer, ANSWER_BYTES_MAX)
                await caller.start(answer.status, headers)
                await caller.send(caller.take(whole, placement.attempt))

    async def _ask(
        self, stack: AsyncExitStack, placement: Placement, path: str, body: bytes, correlation_id: str
    ) -> aiohttp.ClientResponse:
        """Ask until the worker answers: its slots may be full of jobs that were given up, its port not open yet.

        The same request asked again starts nothing twice. That the worker has ended is for its watcher to say.
        """
        began_at = asyncio.get_running_loop().time()
        was_cut = False
        while True:
            asking = self._worker_api.relay(placement, path, body, correlation_id)
            try:
                return await stack.enter_async_context(asking)
            except OverloadedError:
                pass
            except ConflictError as error:
                if not was_cut:
                    raise
                raise WorkerLostError("The worker was cut off before its answer began.") from error
            except (WorkerLostError, UnavailableError) as error:
                was_cut |= isinstance(error, WorkerLostError)
                if not self._answering.is_asked_again(placement, began_at):
                    raise
            await asyncio.sleep(AGAIN_S)

    async def _pass_frames(
        self,
        answer: aiohttp.ClientResponse,
        placement: Placement,
        call: Call,
        headers: dict[str, str],
        caller: Caller,
    ) -> None:
        """Pass a stream on, whole frames at a time.

        Raises:
            WorkerLostError: It ended without its last frame.
            RbeeError: What it told of in its last frame.
        """
        splitter, last = FrameSplitter(), b""
        try:
            async for part in answer.content.iter_any():
                frames = splitter.feed(part)
                if not frames:
                    continue
                placement.heard_at = asyncio.get_running_loop().time()
                failure = line_start(frames, _ERROR_LINE)
                last = frames if failure < 0 else frames[:failure]
                if last and not caller.has_answer:  # until then, a refusal is a status
                    await caller.start(answer.status, headers)
                if last and (taken := caller.take(last, placement.attempt)):
                    await caller.send(taken)
                if failure >= 0:
                    raise told_in(frames[failure:])
        except aiohttp.ClientError:
            if not _has_last_frame(call.path, last):
                raise
        if not _has_last_frame(call.path, last):
            raise WorkerLostError("The worker broke off its answer.")


def _has_last_frame(path: str, frames: bytes) -> bool:
    return any(line_start(frames, line) >= 0 for line in DIALECTS[path].last_lines)


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
    def __init__(self, relay: Relay, call: Call) -> None:
        super().__init__()
        self._relay = relay
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the call as a job; the response ends when its bytes do, the job when its log has them."""
        call, runner = self._call, self._relay.runner
        caller = call.caller(send)

        async def handler(job: RunningJob) -> dict[str, Any]:
            return await self._relay.answer(job, call, caller)

        job = runner.launch(call.record, call.operation, handler)  # type: ignore[arg-type]  # one of its kinds
        assert job.task is not None
        leaving = asyncio.ensure_future(_until_left(receive))
        finished = asyncio.ensure_future(caller.finished.wait())
        telling = asyncio.ensure_future(self._tell_story(caller)) if caller.splice is not None else None
        try:
            await asyncio.wait({job.task, leaving, finished}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not finished.done() and not job.task.done():
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
        reader = await self._relay.runner.registry.follow(self._call.record.job_id)
        try:
            while not caller.has_answer and not reader.is_ended:
                events = await reader.next(COMMENT_EVERY_S)
                if not events:
                    await caller.comment()
                for event in events:
                    if seq_and_kind(event)[1] == "narration":
                        await caller.tell(story_of(msgspec.json.decode(event)))
        finally:
            reader.close()

    async def _tell_failure(
        self, job: RunningJob, caller: Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        error = job.error or _why_ended(job)
        job_id = self._call.record.job_id
        if caller.is_started:
            await caller.fail(error)
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
