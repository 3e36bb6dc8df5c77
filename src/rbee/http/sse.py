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
from rbee.errors import InvalidRequestError, RbeeError
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
    if not reader.is_ended and request.method != "HEAD":
        return LogResponse(reader)
    reader.close()
    return Response(status_code=204) if reader.is_ended else Response(headers=HEADERS)


class LogResponse(Response):
    """Sends what the reader finds until the log ends, the caller leaves or the server closes.

    A caller that takes nothing for `send_timeout_s` is cut off; so is one whose next events were forgotten
    meanwhile. Both may come back with the last number they have.
    """

    def __init__(
        self,
        reader: LogReader,
        *,
        comment_every_s: float = COMMENT_EVERY_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._reader = reader
        self._comment_every_s = comment_every_s
        self._send_timeout_s = send_timeout_s

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
        if isinstance(failed, Exception) and not isinstance(failed, (TimeoutError, OSError, RbeeError)):
            raise failed

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        retry_ms = RETRY_MS + random.randrange(RETRY_MS)
        await self._send_chunk(send, b"retry: %d\n\n" % retry_ms)
        while not self._reader.is_ended:
            events = await self._reader.next(self._comment_every_s)
            if not events and self._reader.is_closing:
                await self._send_chunk(send, b"event: bye\ndata: {}\n\n")
                break
            await self._send_chunk(send, b"".join([frame(event) for event in events]) or b": still here\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunk(self, send: Send, body: bytes) -> None:
        async with asyncio.timeout(self._send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
