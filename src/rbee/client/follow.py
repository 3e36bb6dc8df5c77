"""Follow a log by server-sent events, across reconnects, without losing or repeating an event."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import aiohttp
import msgspec

from rbee.client.answers import error_of, reason_of
from rbee.client.contact import BROKEN, GIVE_UP_S, NOBODY_THERE, Contact, OnContact
from rbee.client.sse import SseParser
from rbee.errors import InternalError, RbeeError, UnavailableError

IDLE_S = 30.0
CONNECT_S = 10.0
SEQ_DIGITS_MAX = 18

_decode = msgspec.json.Decoder(dict[str, Any]).decode


class LogFollower:
    """One reader of one log, which carries its place in the log from connection to connection.

    Args:
        session: Makes the requests.
        url: The address of the stream.
        headers: What every request needs: credential, correlation id.
        after: The number of the last event already seen; 0 reads from the first.
        from_oldest: Take the first event as it comes, for logs that forget their oldest part.
        idle_s: A connection that is silent for so long counts as broken (servers comment every 10 s).
        give_up_s: How long to go on without any sign of life.
        on_contact: Told when the server is away and when it is back.
        find_url: Asked for the stream's address again when nobody listens at the one that is known.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        after: int = 0,
        from_oldest: bool = False,
        idle_s: float = IDLE_S,
        give_up_s: float = GIVE_UP_S,
        on_contact: OnContact | None = None,
        find_url: Callable[[], str] | None = None,
    ) -> None:
        self.last_seq = after
        self._session = session
        self._url = url
        self._headers = dict(headers or {})
        self._any_first = from_oldest and after == 0
        self._timeout = only_idle(idle_s)
        self._contact = Contact(give_up_s=give_up_s, on_contact=on_contact)
        self._find_url = find_url
        self._said_bye = False
        self._begun_at = after
        self._parser = SseParser()

    async def events(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the log's events in order, each once, until its `end` event or a 204.

        Close it (`contextlib.aclosing`) when leaving early, so that the connection ends with it.

        Raises:
            RbeeError: What the server refused with (401, 404, 410 …).
            InternalError: The log has a hole.
            UnavailableError: No sign of life for `give_up_s`.
        """
        self._contact.heard()
        while True:
            why, asked_s = "the stream ended", None
            try:
                async with self._connect() as response:
                    if response.status == 204:
                        self._contact.heard()
                        return
                    await _accept(response)
                    async for chunk in response.content.iter_any():
                        for event in self._events_in(chunk):
                            yield event
                            if event.get("kind") == "end":
                                return
                        if self._said_bye:
                            break
            except BROKEN as error:
                why = reason_of(error)
                self._look_again(error)
            except RbeeError as error:
                if not error.retryable:
                    raise
                why, asked_s = error.message, error.retry_after_s
            await self._wait(why, asked_s)

    def _connect(self) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        self._parser = SseParser()
        self._said_bye = False
        self._begun_at = self.last_seq
        headers = self._headers | {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
        if self.last_seq:
            headers["Last-Event-ID"] = str(self.last_seq)
        return self._session.get(self._url, headers=headers, timeout=self._timeout, allow_redirects=False)

    def _events_in(self, chunk: bytes) -> Iterator[dict[str, Any]]:
        """Yield the new events that a chunk completes, one at a time, so that `last_seq` is never ahead."""
        self._contact.heard(is_progress=False)
        for number, name, data in self._parser.feed(chunk):
            if name == "bye":
                self._said_bye = True
                return
            if number == str(self.last_seq + 1) or self._is_new(number):
                decoded = self._decoded(number, data)
                self._any_first = False
                self.last_seq = int(number)
                yield decoded

    def _is_new(self, number: str) -> bool:
        """Check the number of an event; false when it was seen before."""
        if not number.isascii() or not number.isdecimal() or len(number) > SEQ_DIGITS_MAX:
            raise InternalError(f"The stream {self._url} sent an event without a number.")
        seq = int(number)
        if seq > self.last_seq + 1 and not self._any_first:
            raise InternalError(
                f"The stream {self._url} has a hole: event {seq} came after event {self.last_seq}."
            )
        return seq > self.last_seq

    def _decoded(self, number: str, data: bytes) -> dict[str, Any]:
        try:
            return _decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InternalError(f"Event {number} of {self._url} cannot be read: {error}.") from None

    def _look_again(self, error: BaseException) -> None:
        """Where nobody listens any more, look for where the stream is now."""
        if isinstance(error, NOBODY_THERE) and self._find_url is not None:
            self._url = self._find_url()

    async def _wait(self, why: str, asked_s: float | None) -> None:
        """Wait before the next connection, at least as long as the server asked."""
        if self.last_seq > self._begun_at:
            self._contact.failures = 0
        if self._parser.retry_ms is not None:
            asked_s = self._parser.retry_ms / 1000
        if not await self._contact.wait(why, asked_s=asked_s):
            raise UnavailableError(
                f"Nothing was heard from {self._url} for {self._contact.give_up_s:g} s: {why}.",
                remedy="See whether it runs (rbee status); a job goes on meanwhile (rbee jobs follow).",
            )


def only_idle(idle_s: float) -> aiohttp.ClientTimeout:
    """Return the timeouts of every request: to connect, and of silence; none of the whole."""
    return aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_connect=CONNECT_S, sock_read=idle_s)


async def _accept(response: aiohttp.ClientResponse) -> None:
    """Refuse an answer that is no event stream."""
    if response.status >= 400:
        raise await error_of(response)
    if response.status != 200 or response.content_type != "text/event-stream":
        raise InternalError(f"{response.url} answered {response.status} {response.content_type}, not a stream.")
