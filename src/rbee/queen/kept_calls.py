"""Kept API calls: jobs that go on whatever becomes of their callers; each one's response is made of its log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.contracts.events import seq_and_kind
from rbee.contracts.operations import ApiCall, MessagesCall, ResponseCall
from rbee.errors import GoneError, InvalidRequestError, NotFoundError, RbeeError, UnavailableError
from rbee.http.errors import ErrorShape, error_frame, error_response, errors_shaped
from rbee.http.routes import Route, json_response
from rbee.http.sse import requested_position
from rbee.jobs import JobRegistry
from rbee.jobs.event_log import LogReader
from rbee.jobs.records import JobRecord
from rbee.queen.call_ways import is_narrated
from rbee.queen.callers import COMMENT, STREAM_HEADERS
from rbee.queen.responses import response_object
from rbee.queen.retelling import Retelling

COMMENT_EVERY_S = 10.0
SEND_TIMEOUT_S = 5.0


class KeptCalls:
    """Answers the callers of kept calls, also those that come back."""

    def __init__(self, registry: JobRegistry) -> None:
        self._registry = registry

    def table(self) -> list[Route]:
        """Return the row that every kept call has."""
        return [
            Route(
                method="GET",
                path="/v1/jobs/{job_id}/answer",
                endpoint=self._again,
                summary="The response of a kept API call, in that API's form, from Last-Event-ID on.",
                errors=(InvalidRequestError, NotFoundError, GoneError),
            )
        ]

    def response(self, record: JobRecord, operation: ApiCall, *, is_narrated: bool = False) -> Response:
        """Return the response of an accepted call, which was started already.

        Args:
            record: The job.
            operation: What it asks.
            is_narrated: Tell the caller in the stream of a chat completion what it waits for.
        """
        request = operation.request or {}
        is_stream = request.get("stream") is True
        if isinstance(operation, ResponseCall) and request.get("background") is True and not is_stream:
            headers = {"x-job-id": record.job_id, "x-request-id": record.job_id}
            return json_response(response_object(record, request, "queued"), headers=headers)
        return self.retold(record, operation, is_stream=is_stream, is_narrated=is_narrated)

    def retold(
        self,
        record: JobRecord,
        operation: ApiCall,
        *,
        is_stream: bool,
        after: int = 0,
        is_narrated: bool = False,
    ) -> Response:
        """Return a kept call's response as its log has it: behind the event `after`, where it is a stream."""
        retelling = Retelling(record, operation, is_narrated=is_narrated and is_stream)
        if is_stream:
            return _RetoldStream(self._registry, record, retelling, operation, after)
        return _RetoldWhole(self._registry, record, retelling, operation)

    async def found(self, job_id: str) -> tuple[JobRecord, ApiCall]:
        """Return a kept call.

        Raises:
            NotFoundError: There is no such job, or it is no kept API call.
            GoneError: It is no longer kept.
        """
        record = await self._registry.get(job_id)
        operation = await self._registry.operation(job_id)
        if not isinstance(operation, ApiCall) or operation.request is None:
            raise NotFoundError(
                f"{job_id} is no API call whose answer is kept.", remedy="Read the job's log instead."
            )
        return record, operation

    async def _again(self, request: Request) -> Response:
        record, operation = await self.found(request.path_params["job_id"])
        return self.retold(
            record,
            operation,
            is_stream=(operation.request or {}).get("stream") is True,
            after=requested_position(request),
            is_narrated=is_narrated(request.headers),
        )


class _Retold(Response):
    """Follows a job's log for one caller; the caller's leaving changes nothing."""

    head: ClassVar[Mapping[str, str]]

    def __init__(self, registry: JobRegistry, record: JobRecord, retelling: Retelling, operation: ApiCall) -> None:
        super().__init__()
        self._shape: ErrorShape = "anthropic" if isinstance(operation, MessagesCall) else "openai"
        self._registry = registry
        self._job_id = record.job_id
        self._retelling = retelling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; ends with the caller's leaving at the latest."""
        if scope["method"] == "HEAD":
            await Response(headers={**self.head, **self._own_headers()})(scope, receive, send)
            return
        with errors_shaped(self._shape):  # as its API has it, at whichever route it is read
            answering = asyncio.ensure_future(self._answer(scope, receive, send))
        leaving = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()
            results = await asyncio.gather(answering, leaving, return_exceptions=True)
        failed = results[0]
        if isinstance(failed, Exception) and not isinstance(failed, (TimeoutError, OSError)):
            raise failed

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def _refuse(self, error: RbeeError, scope: Scope, receive: Receive, send: Send) -> None:
        response = error_response(error, job_id=self._job_id)
        response.headers.update(self._own_headers())
        await response(scope, receive, send)

    def _own_headers(self) -> dict[str, str]:
        return {"x-job-id": self._job_id, "x-request-id": self._job_id}

    def _stopping(self) -> RbeeError:
        return UnavailableError(
            "The queen is stopping; the answer goes on.",
            remedy=f"Ask for the rest a little later: GET /v1/jobs/{self._job_id}/answer.",
            retry_after_s=1.0,
        )


class _RetoldStream(_Retold):
    head = STREAM_HEADERS

    def __init__(
        self, registry: JobRegistry, record: JobRecord, retelling: Retelling, operation: ApiCall, after: int
    ) -> None:
        super().__init__(registry, record, retelling, operation)
        self._after = after
        self._is_started = False

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._tell_all(send)
        except RbeeError as error:
            if not self._is_started:
                await self._refuse(error, scope, receive, send)
                return
            await self._send(send, error_frame(error, job_id=self._job_id))
        if not self._is_started:  # all of it is had
            await Response(status_code=204, headers=self._own_headers())(scope, receive, send)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _tell_all(self, send: Send) -> None:
        """Send what the log has, to its end.

        Raises:
            RbeeError: The call failed, its log was forgotten, or the queen stops.
        """
        reader = await self._registry.follow(self._job_id)
        try:
            while not self._retelling.is_ended:
                events = await reader.next(COMMENT_EVERY_S)
                if not events and reader.is_closing:
                    raise self._stopping()
                await self._tell(events, send)
        finally:
            reader.close()
        if self._retelling.error is not None:
            raise self._retelling.error

    async def _tell(self, events: list[bytes], send: Send) -> None:
        frames = []
        for event in events:
            seq = seq_and_kind(event)[0]
            told = self._retelling.frames(event, seq)
            if seq > self._after:
                frames.append(told)
        body = b"".join(frames) or (COMMENT if self._is_started and not events else b"")
        if body:
            await self._start(send)
            await self._send(send, body)

    async def _start(self, send: Send) -> None:
        if self._is_started:
            return
        self._is_started = True
        headers = {**self.head, **self._own_headers()}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _send(self, send: Send, body: bytes) -> None:
        """Send some bytes; a caller that takes nothing for too long is cut off, and may come back."""
        async with asyncio.timeout(SEND_TIMEOUT_S):
            await send({"type": "http.response.body", "body": body, "more_body": True})


class _RetoldWhole(_Retold):
    head: ClassVar[Mapping[str, str]] = {"content-type": "application/json"}

    def __init__(self, registry: JobRegistry, record: JobRecord, retelling: Retelling, operation: ApiCall) -> None:
        super().__init__(registry, record, retelling, operation)
        self._request = operation.request or {}

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        reader = await self._registry.follow(self._job_id)
        try:
            whole = await self._whole(reader)
        except RbeeError as error:
            await self._refuse(error, scope, receive, send)
            return
        finally:
            reader.close()
        await json_response(whole, headers=self._own_headers())(scope, receive, send)

    async def _whole(self, reader: LogReader) -> dict[str, Any]:
        """Put the answer together.

        Raises:
            RbeeError: There is none.
        """
        return await put_together(self._retelling, reader, self._request, self._stopping())


async def put_together(
    retelling: Retelling, reader: LogReader, request: dict[str, Any], stopping: RbeeError
) -> dict[str, Any]:
    """Read a log to its end and put the answer together that a call which does not stream gets.

    Raises:
        RbeeError: The call failed, or the queen stops (`stopping`).
    """
    assembler = retelling.dialect.assembler()
    while not retelling.is_ended:
        events = await reader.next(COMMENT_EVERY_S)
        if not events and reader.is_closing:
            raise stopping
        for event in events:
            for chunk in retelling.take(event):
                assembler.add(chunk)
    if retelling.error is not None:
        raise retelling.error
    whole = assembler.result()
    if retelling.usage is not None:
        whole.setdefault("usage", retelling.usage)  # its engine was lost before it could tell
    if whole.get("model", "") is None:
        whole["model"] = request.get("model")
    return whole


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
