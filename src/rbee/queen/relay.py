"""Relayed calls: the worker's response is the caller's, byte for byte, and each is a job all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.client.answers import read_bounded
from rbee.contracts.operations import ApiCall, Generation
from rbee.errors import (
    HiveLostError,
    InternalError,
    InvalidRequestError,
    RbeeError,
    UnavailableError,
    WorkerError,
    WorkerLostError,
)
from rbee.http.errors import error_frame, error_response
from rbee.jobs import JobRunner, RunningJob
from rbee.jobs.records import JobRecord
from rbee.queen.answering import Answering, failure_of
from rbee.queen.dispatch import Dispatcher, StartFailedError
from rbee.queen.infer import LOST, NOT_STARTED
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import Placement

PASSED_HEADERS = ("content-type", "cache-control", "x-accel-buffering")
EVENT_STREAM = "text/event-stream"
AGAIN_S = 0.25
FRAME_BYTES_MAX = 8 * 1024 * 1024
ANSWER_BYTES_MAX = 64 * 1024 * 1024


class Relay:
    """Runs relayed calls."""

    def __init__(
        self, runner: JobRunner, dispatcher: Dispatcher, worker_api: WorkerApi, answering: Answering
    ) -> None:
        self.runner = runner
        self._dispatcher = dispatcher
        self._worker_api = worker_api
        self._answering = answering

    def response(self, record: JobRecord, operation: Any, path: str, body: bytes) -> Response:
        """Return the response that runs an accepted call; the caller's leaving cancels it."""
        return _RelayedResponse(self, record, operation, path, body)

    async def answer(self, job: RunningJob, path: str, body: bytes, caller: _Caller) -> dict[str, Any]:
        """Place the call, pass the worker's bytes on, and return what its closing line says.

        A worker that is lost before its first byte is replaced, as often as the call may be placed.
        """
        operation = job.operation
        assert job.record.model is not None and isinstance(operation, ApiCall)
        failed_starts = 0
        while True:
            try:
                placement = await self._dispatcher.acquire(job, job.record.model, purpose=operation.purpose)
            except StartFailedError as failed:
                failed_starts += 1
                if not isinstance(failed.cause, NOT_STARTED) or not _may_try(job, failed_starts):
                    raise failed.cause from failed
                continue
            try:
                await self._pass_on(job, placement, path, body, caller)
                return self._made(job, await self._answering.relayed_closing(placement))
            except (*LOST, UnavailableError) as error:  # gone, or being stopped
                if caller.is_started or not _may_try(job, failed_starts):
                    raise
                if not isinstance(error, LOST):
                    await asyncio.sleep(AGAIN_S)  # its hive is about to say so
            finally:
                self._dispatcher.release(placement)

    def _made(self, job: RunningJob, fields: dict[str, Any] | None) -> dict[str, Any]:
        """Make the result of what the closing line says."""
        if fields is None:
            return {"usage": None}
        failure = failure_of(fields)
        if failure is not None:
            raise failure
        job.facts.update(
            {name: fields.get(name) for name in ("prompt_tokens", "completion_tokens", "tokens_per_s")}
        )
        return {
            "finish_reason": fields.get("finish_reason"),
            "usage": {name: fields.get(name) for name in ("prompt_tokens", "completion_tokens")},
            "time_to_first_token_s": fields.get("time_to_first_token_s"),
            "tokens_per_s": fields.get("tokens_per_s"),
            "attempts": job.record.attempt,
        }

    async def _pass_on(
        self, job: RunningJob, placement: Placement, path: str, body: bytes, caller: _Caller
    ) -> None:
        try:
            await self._pass_while_alive(job, placement, path, body, caller)
            await caller.finish()
        except WorkerLostError as error:
            raise await self._answering.true_cause(placement, error) from error
        except asyncio.CancelledError:
            if job.stop is not None:  # else the queen ends
                await self._answering.relayed_closing(placement)
            raise
        except HiveLostError:
            raise  # nothing more is heard of it
        except RbeeError:
            # The worker has stopped by now: refused, or left by us. Its closing line comes before the end.
            await self._answering.relayed_closing(placement)
            raise

    async def _pass_while_alive(
        self, job: RunningJob, placement: Placement, path: str, body: bytes, caller: _Caller
    ) -> None:
        """Pass the bytes on for as long as the worker is known to be there and gives some."""
        passing = asyncio.ensure_future(self._pass(job, placement, path, body, caller))
        operation = job.operation
        assert isinstance(operation, Generation)
        watching = asyncio.ensure_future(
            self._answering.relayed_alive(placement, operation, lambda: caller.is_waited_for)
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

    async def _pass(self, job: RunningJob, placement: Placement, path: str, body: bytes, caller: _Caller) -> None:
        async with self._worker_api.relay(placement, path, body, job.record.correlation_id) as answer:
            headers = {name: answer.headers[name] for name in PASSED_HEADERS if name in answer.headers}
            if answer.content_type == EVENT_STREAM:
                async for frames in whole_frames(answer.content.iter_any()):
                    placement.heard_at = asyncio.get_running_loop().time()
                    if not caller.is_started:  # until then, another worker can take over
                        await caller.start(answer.status, headers)
                    await caller.send(frames)
                if not caller.is_started:
                    raise WorkerError("The worker ended its answer before it had begun.")
            else:
                whole = await read_bounded(answer, ANSWER_BYTES_MAX)
                await caller.start(answer.status, headers)
                await caller.send(whole)


async def whole_frames(parts: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the frames of an event stream as they come, none cut in two; one that never ends is held back."""
    held = b""
    async for part in parts:
        held += part
        end = held.rfind(b"\n\n") + 2
        if end > 1:
            yield held[:end]
            held = held[end:]
        if len(held) > FRAME_BYTES_MAX:
            raise WorkerError(f"A frame of the answer has more than {FRAME_BYTES_MAX} bytes.")


class _Caller:
    """The caller's side of a relayed call."""

    def __init__(self, send: Send, job_id: str) -> None:
        self._send = send
        self._job_id = job_id
        self.is_started = False
        self.is_waited_for = False
        self.finished = asyncio.Event()

    async def start(self, status: int, headers: dict[str, str]) -> None:
        self.is_started = True
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        raw += [(b"x-job-id", self._job_id.encode()), (b"x-request-id", self._job_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})

    async def send(self, chunk: bytes) -> None:
        self.is_waited_for = True
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})
        self.is_waited_for = False

    async def finish(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        self.finished.set()

    async def fail(self, error: RbeeError) -> None:
        """Tell a caller whose response has begun: one `error` frame, then the end without `[DONE]`."""
        await self.send(error_frame(error, job_id=self._job_id))
        await self.finish()


class _RelayedResponse(Response):
    def __init__(self, relay: Relay, record: JobRecord, operation: Any, path: str, body: bytes) -> None:
        super().__init__()
        self._relay = relay
        self._record = record
        self._operation = operation
        self._path = path
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the call as a job; the response ends when its bytes do, the job when its log has them."""
        caller = _Caller(send, self._record.job_id)

        async def handler(job: RunningJob) -> dict[str, Any]:
            return await self._relay.answer(job, self._path, self._body, caller)

        job = self._relay.runner.launch(self._record, self._operation, handler)
        assert job.task is not None
        leaving = asyncio.ensure_future(_until_left(receive))
        finished = asyncio.ensure_future(caller.finished.wait())
        try:
            await asyncio.wait({job.task, leaving, finished}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done() and not finished.done() and not job.task.done():
                await self._relay.runner.cancel(self._record.job_id)
                return
        finally:
            leaving.cancel()
            finished.cancel()
            await asyncio.gather(leaving, finished, return_exceptions=True)
        if not caller.finished.is_set():
            await self._tell_failure(job, caller, scope, receive, send)

    async def _tell_failure(
        self, job: RunningJob, caller: _Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        error = job.error or _why_ended(job)
        if caller.is_started:
            await caller.fail(error)
        else:
            response = error_response(error, job_id=self._record.job_id)
            response.headers["x-job-id"] = self._record.job_id
            response.headers["x-request-id"] = self._record.job_id
            await response(scope, receive, send)


def _may_try(job: RunningJob, failed_starts: int) -> bool:
    return job.record.attempt + failed_starts < job.operation.attempts


def _why_ended(job: RunningJob) -> RbeeError:
    if job.stop is not None:
        return InvalidRequestError(job.stop.message, code="cancelled", remedy="Send it again if it is wanted.")
    if job.task is not None and job.task.cancelled():
        return UnavailableError("The queen is stopping.")
    return InternalError("The call ended without an answer.")


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
