"""A log as server-sent events: resumable by number, never waiting for a reader.

Source: the event stream format of the HTML standard (section 9.2).
"""

from __future__ import annotations

import asyncio
import random

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.contracts.events import seq_and_kind
from rbee.errors import InvalidRequestError
from rbee.jobs.event_log import LogReader
from rbee.jobs.registry import JobRegistry

COMMENT_EVERY_S = 10.0
SEND_TIMEOUT_S = 5.0
RETRY_MS = 1000
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


def frame(event: bytes) -> bytes:
    """Frame one stored event for the stream."""
    seq, kind = seq_and_kind(event)
    return b"id: %d\nevent: %b\ndata: %b\n\n" % (seq, kind.encode(), event)


def requested_position(request: Request) -> int:
    """Return the number a reader has already: `Last-Event-ID`, else `?after=`, else 0.

    Raises:
        InvalidRequestError: It is no whole number.
    """
    text = request.headers.get("last-event-id") or request.query_params.get("after") or "0"
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise InvalidRequestError(f"`{text[:40]}` is no number of an event.", param="after")
    return int(text)


async def stream_response(request: Request, registry: JobRegistry, log_id: str) -> Response:
    """Answer with a log from where the reader is; 204 when it has all of an ended one."""
    reader = await registry.follow(log_id, requested_position(request))
    if reader.is_ended:
        reader.close()
        return Response(status_code=204)
    return LogResponse(reader)


class LogResponse(Response):
    """Sends what the reader finds until the log ends, the caller leaves or the server closes."""

    def __init__(self, reader: LogReader) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream; ends with the caller's leaving at the latest."""
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            sending.cancel()
            results = await asyncio.gather(sending, leaving, return_exceptions=True)
            self._reader.close()
        failed = results[0]
        if isinstance(failed, Exception) and not isinstance(failed, (TimeoutError, OSError)):
            raise failed

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        retry_ms = RETRY_MS + random.randrange(RETRY_MS)
        await _send_chunk(send, b"retry: %d\n\n" % retry_ms)
        while not self._reader.is_ended:
            events = await self._reader.next(COMMENT_EVERY_S)
            if not events and self._reader.is_closing:
                await _send_chunk(send, b"event: bye\ndata: {}\n\n")
                break
            await _send_chunk(send, b"".join([frame(event) for event in events]) or b": still here\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send_chunk(send: Send, body: bytes) -> None:
    async with asyncio.timeout(SEND_TIMEOUT_S):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
