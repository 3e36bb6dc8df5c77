"""A log as server-sent events: resumable by number, never waiting for a reader.

Source: the event stream format of the HTML standard (section 9.2).
"""

from __future__ import annotations

import asyncio
import random

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rbee.errors import InvalidRequestError, RbeeError
from rbee.jobs.event_log import LogReader
from rbee.jobs.registry import JobRegistry

COMMENT_EVERY_S = 10.0
SEND_TIMEOUT_S = 5.0
RETRY_MS = 1000
AGE_MAX_S = 600.0
COMMENT = b": still here\n\n"
BYE = b"event: bye\ndata: {}\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


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
    """Sends what the reader finds until the log ends, the caller leaves, the server closes or its time is up.

    A caller that takes nothing for `send_timeout_s` is cut off; so is one whose next events were forgotten
    meanwhile. All may come back with the last number they have; after `age_max_s` (somewhat less, so that many do
    not come back at once) they are asked to.
    """

    def __init__(
        self,
        reader: LogReader,
        *,
        comment_every_s: float = COMMENT_EVERY_S,
        send_timeout_s: float = SEND_TIMEOUT_S,
        age_max_s: float = AGE_MAX_S,
    ) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._reader = reader
        self._comment_every_s = comment_every_s
        self._send_timeout_s = send_timeout_s
        self._has_said_bye = False
        self._age_s = age_max_s * random.uniform(0.8, 1.0)

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
        loop = asyncio.get_running_loop()
        until = loop.time() + self._age_s
        patience = _Patience(self._send_timeout_s)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        body = b"retry: %d\n\n%b" % (RETRY_MS + random.randrange(RETRY_MS), self._reader.at_hand())
        try:
            while body:
                patience.begin()
                await send({"type": "http.response.body", "body": body, "more_body": True})
                patience.end()
                body = await self._following(loop.time() >= until)
        finally:
            patience.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _following(self, is_time_up: bool) -> bytes:
        """Return what is to be sent next; nothing at the end."""
        reader = self._reader
        if reader.is_ended or self._has_said_bye:
            return b""
        frames = b"" if is_time_up else await reader.next_frames(self._comment_every_s)
        if frames or reader.is_ended:
            return frames
        self._has_said_bye = is_time_up or reader.is_closing
        return BYE if self._has_said_bye else COMMENT


class _Patience:
    """Cancels the task it was made in when one wait takes longer than `limit_s`; one timer serves many waits."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._since: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """A wait begins now."""
        self._since = self._loop.time()
        if self._timer is None:
            self._arm(self._limit_s)

    def end(self) -> None:
        """It has ended."""
        self._since = None

    def close(self) -> None:
        """Wait for nothing more, and hold on to nothing."""
        if self._timer is not None:
            self._timer.cancel()
        self._task = None

    def _arm(self, delay_s: float) -> None:
        self._timer = self._loop.call_later(delay_s, self._look)

    def _look(self) -> None:
        self._timer = None
        if self._since is None:
            return
        left_s = self._since + self._limit_s - self._loop.time()
        if left_s > 0:
            self._arm(left_s)
        elif self._task is not None:
            self._task.cancel()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
