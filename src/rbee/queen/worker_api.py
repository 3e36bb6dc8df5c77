"""What the queen asks of a worker: answers, kept or relayed, and their end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import Enum, auto

import aiohttp
import msgspec
from msgspec import Struct

from rbee.client.answers import error_of, read_bounded
from rbee.errors import RbeeError, WorkerLostError
from rbee.queen.hives import HiveBook
from rbee.queen.workers import Placement

CONNECT_S = 5.0
STOPPED_BYTES_MAX = 64 * 1024
COUNTED_BYTES_MAX = 64 * 1024 * 1024
TOKENIZE = "/tokenize"


class Heard(Enum):
    """What a worker heard of a stop: nothing; of a request it has taken on; of one that has not come."""

    NOTHING = auto()
    STOP = auto()
    STOP_BEFORE_START = auto()


class _Stopped(Struct):
    """What is read of a worker's answer to a stop."""

    is_known: bool


class _Counted(Struct):
    """What is read of a tokenizer's answer."""

    tokens: list[int]


class WorkerApi:
    """Talks to the fronts of workers, each by the address and token of its hive's last heartbeat."""

    def __init__(self, session: aiohttp.ClientSession, book: HiveBook) -> None:
        self._session = session
        self._book = book

    def _address(self, placement: Placement, correlation_id: str) -> tuple[str, dict[str, str]]:
        try:
            info = self._book.worker(placement.worker_id, placement.hive_id).info
        except RbeeError as error:
            raise WorkerLostError(f"The worker {placement.worker_id} is gone.") from error
        headers = {
            "authorization": f"Bearer {info.token}",
            "x-job-id": placement.job_id,
            "x-correlation-id": correlation_id,
            "x-request-id": f"{placement.job_id}.{placement.attempt}",
            "content-type": "application/json",
        }
        return info.url or "", headers

    async def keep(
        self, placement: Placement, path: str, body: bytes, correlation_id: str, *, has_chunks: bool = False
    ) -> None:
        """Ask for an answer that the worker narrates; returns once it has accepted.

        Args:
            has_chunks: Each piece shall carry the engine's own JSON.

        Raises:
            WorkerLostError: The worker cannot be reached.
            RbeeError: What it refused with.
        """
        url, headers = self._address(placement, correlation_id)
        headers["x-rbee-keep"] = "chunk" if has_chunks else "1"
        timeout = aiohttp.ClientTimeout(total=30, sock_connect=CONNECT_S)
        try:
            async with self._session.post(url + path, data=body, headers=headers, timeout=timeout) as answer:
                if answer.status != 202:
                    raise await error_of(answer)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise unreachable(placement, error) from error

    async def stop(self, placement: Placement, correlation_id: str) -> Heard:
        """Stop a request within one token, or have it not begun when it comes; tells what the worker said."""
        try:
            url, headers = self._address(placement, correlation_id)
            path = f"/requests/{headers['x-request-id']}"
            timeout = aiohttp.ClientTimeout(total=CONNECT_S)
            async with self._session.delete(url + path, headers=headers, timeout=timeout) as answer:
                if answer.status >= 500:
                    return Heard.NOTHING
                said = msgspec.json.decode(await read_bounded(answer, STOPPED_BYTES_MAX), type=_Stopped)
                return Heard.STOP if said.is_known else Heard.STOP_BEFORE_START
        except (RbeeError, msgspec.MsgspecError, aiohttp.ClientError, TimeoutError, OSError):
            return Heard.NOTHING

    async def count_tokens(self, placement: Placement, text: str, correlation_id: str) -> int:
        """Count the tokens of a text; 0 where the worker's engine cannot tell."""
        body = msgspec.json.encode({"content": text, "add_special": False})
        timeout = aiohttp.ClientTimeout(total=CONNECT_S)
        try:
            url, headers = self._address(placement, correlation_id)
            async with self._session.post(url + TOKENIZE, data=body, headers=headers, timeout=timeout) as answer:
                if answer.status != 200:
                    return 0
                counted = msgspec.json.decode(await read_bounded(answer, COUNTED_BYTES_MAX), type=_Counted)
                return len(counted.tokens)
        except (RbeeError, msgspec.MsgspecError, aiohttp.ClientError, TimeoutError, OSError):
            return 0

    @asynccontextmanager
    async def relay(
        self, placement: Placement, path: str, body: bytes, correlation_id: str
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for an answer as a response; leaving the block early stops the engine.

        Raises:
            WorkerLostError: The worker cannot be reached, or went away.
            RbeeError: What it refused with.
        """
        url, headers = self._address(placement, correlation_id)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
        try:
            async with self._session.post(url + path, data=body, headers=headers, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise await error_of(answer)
                yield answer
        except aiohttp.ClientError as error:
            raise unreachable(placement, error) from error


def unreachable(placement: Placement, error: BaseException) -> WorkerLostError:
    """Say that a worker cannot be reached."""
    return WorkerLostError(
        f"The worker {placement.worker_id} cannot be reached ({type(error).__name__}).",
        details={"worker_id": placement.worker_id},
    )
