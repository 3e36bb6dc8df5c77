"""Ask a queen one thing: a request and its whole answer, repeated where the connection broke."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import aiohttp
from msgspec import Struct

from rbee.client.answers import error_of, read_bounded, reason_of
from rbee.client.contact import LOST, NOBODY_THERE, Contact
from rbee.client.place import Place
from rbee.errors import UnavailableError

MAX_ANSWER_BYTES = 64 * 1024 * 1024


class Call(Struct, frozen=True):
    """What is sent, wherever the queen is when it is sent."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes | None = None


async def send(session: aiohttp.ClientSession, place: Place, call: Call, timeout: aiohttp.ClientTimeout) -> bytes:
    """Send a call and return the body of its answer; where nobody listens, look once where the queen is now.

    Raises:
        RbeeError: What the queen refused it with.
        aiohttp.ClientError, TimeoutError, OSError: There is no whole answer.
    """
    try:
        return await _send_to(session, place.url, call, timeout)
    except NOBODY_THERE:
        if not place.look_again():
            raise
    return await _send_to(session, place.url, call, timeout)


async def _send_to(
    session: aiohttp.ClientSession, base_url: str, call: Call, timeout: aiohttp.ClientTimeout
) -> bytes:
    async with session.request(
        call.method,
        base_url + call.path,
        data=call.body,
        headers=call.headers,
        timeout=timeout,
        allow_redirects=False,
    ) as response:
        if response.status >= 300:
            raise await error_of(response)
        return await read_bounded(response, MAX_ANSWER_BYTES)


async def insist(ask: Callable[[], Awaitable[bytes]], contact: Contact) -> bytes:
    """Ask again whenever the connection breaks, for as long as `contact` bears with it.

    Only for what may be asked twice. A queen that could not be connected to in the first place, and one that
    refuses, are not asked again.

    Raises:
        RbeeError: What the queen refused it with.
        aiohttp.ClientError, TimeoutError, OSError: There is no whole answer.
    """
    while True:
        try:
            answer = await ask()
        except LOST as error:
            is_first = contact.failures == 0
            if is_first and isinstance(error, aiohttp.ClientConnectorError):
                raise
            if not await contact.wait(reason_of(error)):
                raise
        except UnavailableError as error:  # she is there again, and not ready yet
            if contact.failures == 0 or not await contact.wait(error.message):
                raise
        else:
            contact.heard()
            return answer
