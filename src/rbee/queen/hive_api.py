"""What the queen asks of hives: jobs there, followed to their end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from rbee.client import JobClient
from rbee.contracts.operations import Operation
from rbee.errors import HiveLostError, InternalError, RbeeError, UnavailableError, error_classes
from rbee.queen.hives import Hive, HiveBook

ATTEMPT_S = 5.0
RETRY_S = 0.5


class HiveApi:
    """Gives hives their commands."""

    def __init__(
        self, session: aiohttp.ClientSession, book: HiveBook, *, api_key: str | None, timeout_s: float
    ) -> None:
        self._session = session
        self._book = book
        self._api_key = api_key
        self._timeout_s = timeout_s

    def _client(self, hive: Hive, correlation_id: str) -> JobClient:
        return JobClient(
            hive.heartbeat.url,
            api_key=self._api_key,
            correlation_id=correlation_id,
            session=self._session,
            give_up_s=self._timeout_s,
        )

    async def run(
        self, hive_id: str, operation: Operation, *, correlation_id: str, idempotency_key: str
    ) -> dict[str, Any]:
        """Give a hive a job and wait for its end; returns the result.

        A cancelled wait cancels the hive's job. A hive that does not answer is asked again for as long as
        the settings allow.

        Raises:
            HiveLostError: It could not be reached in that time.
            RbeeError: What the hive's job failed with.
        """
        async with self._reaching(hive_id) as hive:
            client = self._client(hive, correlation_id)
            accepted = await self._submit(client, hive_id, operation, idempotency_key)
            try:
                async for event in client.follow(accepted):
                    if event["kind"] == "end":
                        return result_of(event)
            except asyncio.CancelledError:
                await self._cancel(client, accepted)
                raise
            raise InternalError(f"The log of {accepted} at {hive_id} ended without an end.")

    @asynccontextmanager
    async def _reaching(self, hive_id: str) -> AsyncIterator[Hive]:
        hive = self._book.hive(hive_id)
        try:
            yield hive
        except UnavailableError as error:
            if isinstance(error, HiveLostError):
                raise
            raise HiveLostError(
                f"The hive {hive_id} at {hive.heartbeat.url} could not be reached for {self._timeout_s:g} s: "
                f"{error.message}"
            ) from error

    async def _submit(self, client: JobClient, hive_id: str, operation: Operation, idempotency_key: str) -> str:
        """Submit until the hive answers; the idempotency key makes asking again harmless."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        while True:
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + ATTEMPT_S)):
                    return (await client.submit(operation, idempotency_key=idempotency_key)).job_id
            except (UnavailableError, TimeoutError) as error:
                if loop.time() + RETRY_S >= deadline:
                    said = error.message if isinstance(error, RbeeError) else "it does not answer"
                    raise HiveLostError(
                        f"The hive {hive_id} could not be reached for {self._timeout_s:g} s: {said}"
                    ) from error
            await self._book.changed(RETRY_S)

    async def _cancel(self, client: JobClient, job_id: str) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await client.cancel(job_id)
        except (RbeeError, TimeoutError):
            pass  # a hive that cannot be reached ends the worker by itself, by its keep-alive


def result_of(end: dict[str, Any]) -> dict[str, Any]:
    """Return a hive's job's result, or raise what it failed with."""
    if end["state"] == "completed":
        return end.get("result") or {}
    body = end.get("error") or {"message": end.get("message") or "The hive cancelled its job.", "code": "internal"}
    cls = error_classes().get(str(body.get("code")), RbeeError)
    raise cls(
        str(body["message"]),
        remedy=body.get("remedy"),
        reason=end["reason"] if end["state"] == "failed" else None,
        details={key: body.get(key) for key in ("worker_id", "exit_code", "signal", "last_lines")},
    )
