"""Ask the engine over its socket. Leaving a stream early closes its connection, which stops the engine."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from rbee.errors import RbeeError, WorkerError, WorkerLostError
from rbee.worker.engine_errors import no_route, translate
from rbee.worker.engines import EngineAddress

# A long prompt is worked through in silence; stalls are the queen's to notice.
ENGINE_SILENCE_S = 3600.0
CONNECT_S = 10.0
# An engine that dies is seen to break off first.
ENGINE_END_S = 1.0
MAX_ANSWER_BYTES = 256 * 1024 * 1024
EVENT_STREAM = "text/event-stream"
_NO_ROUTE = (404, 405)
_MAX_ERROR_BYTES = 64 * 1024
_LONG_BODY_BYTES = 512 * 1024


class _Template(Struct, frozen=True):
    """What the engine found out about the model's chat template."""

    supports_tools: bool | None = None


class _Props(Struct, frozen=True):
    """What of the engine's properties is looked at."""

    build_info: str = ""
    chat_template_caps: _Template = _Template()


class EngineClient:
    """One engine's HTTP API. A connection a request: the engine closes it after a stream anyway."""

    def __init__(self, address: EngineAddress) -> None:
        """Make the client inside a running event loop; `close` it there."""
        self.traits = address.traits
        self._process = address.process
        self._session = aiohttp.ClientSession(
            address.url,
            connector=_connector(address),
            headers={"authorization": f"Bearer {address.key}", "content-type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=ENGINE_SILENCE_S),
            skip_auto_headers=("accept-encoding", "user-agent"),
        )
        self._props: _Props | None = None

    async def close(self) -> None:
        """Close every connection."""
        await self._session.close()

    @asynccontextmanager
    async def stream(self, path: str, body: bytes) -> AsyncIterator[AsyncIterator[bytes]]:
        """Ask for a stream and yield its bytes as they come; nothing is read ahead beyond 128 KiB.

        Raises:
            RbeeError: The engine refused or failed, in the house's words.
        """
        async with self._asked("POST", path, body) as response:
            if response.content_type != EVENT_STREAM:
                raise WorkerError(f"The engine answered {path} with {response.content_type}, not with a stream.")
            yield response.content.iter_any()

    async def ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """Ask for a whole answer and return its body.

        Raises:
            RbeeError: The engine refused or failed, in the house's words.
        """
        async with self._asked(method, path, body) as response:
            return await _read(response, MAX_ANSWER_BYTES)

    async def context_tokens(self) -> int | None:
        """Ask how many tokens one request may use: what was asked for, or less where the model has less.

        None where the engine does not tell.
        """
        if not self.traits.is_built_in:
            return None
        models = msgspec.json.decode(await self.ask("GET", "/v1/models"))
        found: Any = models["data"][0].get("meta", {}).get("n_ctx")
        return found if isinstance(found, int) else None

    async def ignores_tools(self) -> bool:
        """Ask whether the model's chat template has no place for tools, so that they are left out of the prompt.

        An engine that does not tell is taken to heed them.
        """
        return (await self._properties()).chat_template_caps.supports_tools is False

    async def is_llama_cpp(self) -> bool:
        """Ask whether it is a server of llama.cpp, by what only that tells of itself."""
        return bool((await self._properties()).build_info)

    async def _properties(self) -> _Props:
        """Ask the engine about itself, until it has told, or has no such route; else it says nothing."""
        if self._props is None:
            try:
                self._props = msgspec.json.decode(await self.ask("GET", "/props"), type=_Props)
            except RbeeError as error:
                if error.retryable:
                    return _Props()
                self._props = _Props()
            except msgspec.MsgspecError:
                self._props = _Props()
        return self._props

    async def broken_off(self, how: str = "The engine broke off its answer.") -> RbeeError:
        """Make the error of an answer that ended before it was whole; it is the engine's end that counts."""
        if self._process is not None:
            try:
                async with asyncio.timeout(ENGINE_END_S):
                    how = await self._process.ended()
            except TimeoutError:
                return WorkerError(how)
            await asyncio.sleep(0)  # whoever watches over the engine hears of it first, and ends the worker
            return WorkerLostError(how)
        return WorkerError(how)

    @asynccontextmanager
    async def _asked(self, method: str, path: str, body: bytes | None) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            async with self._session.request(method, path, data=_payload(body)) as response:
                try:
                    if response.status >= 400:
                        raise await self._refusal(path, response)
                    yield response
                finally:
                    response.close()
        except aiohttp.ServerTimeoutError as error:
            raise WorkerError("The engine was silent for too long.") from error
        except aiohttp.ClientError as error:
            how = f"The engine broke off: {str(error) or type(error).__name__}."
            raise await self.broken_off(how) from error

    async def _refusal(self, path: str, response: aiohttp.ClientResponse) -> RbeeError:
        if response.status in _NO_ROUTE and not self.traits.is_built_in:
            return no_route(response.status, await _read(response, _MAX_ERROR_BYTES), path, self.traits.name)
        return translate(response.status, await _read(response, _MAX_ERROR_BYTES))


def _connector(address: EngineAddress) -> aiohttp.BaseConnector:
    if address.socket_path:
        return aiohttp.UnixConnector(path=address.socket_path, force_close=True, limit=0)
    return aiohttp.TCPConnector(force_close=True, limit=0)


def _payload(body: bytes | None) -> bytes | io.BytesIO | None:
    """Give a long body to be sent in pieces: in one it would hold up the event loop."""
    return body if body is None or len(body) < _LONG_BODY_BYTES else io.BytesIO(body)


async def _read(response: aiohttp.ClientResponse, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > limit:
            raise WorkerError(f"The engine's answer has more than {limit} bytes.")
        parts.append(part)
    return b"".join(parts)
