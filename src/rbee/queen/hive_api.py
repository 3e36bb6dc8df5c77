"""What the queen asks of hives: jobs there, followed to their end."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from rbee.client import JobClient
from rbee.client.answers import reason_of
from rbee.contracts.operations import Operation
from rbee.errors import (
    GoneError,
    HiveLostError,
    InternalError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    error_classes,
)
from rbee.queen.hives import Hive, HiveBook
from rbee.queen.patience import Stories
from rbee.queen.workers import WorkerBook

ATTEMPT_S = 5.0
RETRY_S = 0.5


class HiveApi:
    """Gives hives their commands."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        book: HiveBook,
        workers: WorkerBook,
        stories: Stories,
        *,
        api_key: str | None,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._book = book
        self._workers = workers
        self._stories = stories
        self._api_key = api_key
        self._timeout_s = timeout_s

    def _client(self, hive: Hive, correlation_id: str) -> JobClient:
        return JobClient(
            hive.heartbeat.url,
            api_key=self._api_key,
            correlation_id=correlation_id,
            session=self._session,
            give_up_s=self._timeout_s,
            find_url=lambda: self._book.hive(hive.hive_id).heartbeat.url,
        )

    async def run(
        self, hive_id: str, operation: Operation, *, job_id: str, correlation_id: str, idempotency_key: str
    ) -> dict[str, Any]:
        """Give a hive a job and wait for its end; returns the result.

        A cancelled wait cancels the hive's job. A hive that does not answer is asked again for as long as
        the settings allow.

        Args:
            hive_id: Which hive.
            operation: What to do.
            job_id: The job it belongs to, of which the hive may speak from now on.
            correlation_id: That job's.
            idempotency_key: Makes asking again harmless.

        Raises:
            HiveLostError: It could not be reached in that time, or no longer knows the command.
            RbeeError: What the hive's job failed with.
        """
        self._workers.hand(hive_id, job_id)
        hive, accepted = await self._submit(hive_id, operation, correlation_id, idempotency_key)
        client = self._client(hive, correlation_id)
        try:
            end, sources = await _end_of(client, accepted)
            await self._stories.arrived(job_id, hive_id, sources)
            return result_of(end)
        except asyncio.CancelledError:
            await self._cancel(client, accepted)
            raise
        except HiveLostError:
            raise
        except UnavailableError as error:
            raise self._lost(hive_id, error.message) from error
        except _ForgottenError as error:
            raise HiveLostError(f"The hive {hive_id} no longer knows what it was doing.") from error

    async def _submit(
        self, hive_id: str, operation: Operation, correlation_id: str, idempotency_key: str
    ) -> tuple[Hive, str]:
        """Submit until the hive answers, wherever it is by then; returns who took it, and the hive's job."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout_s
        why = "it did not answer in time."
        while True:
            hive = self._book.hive(hive_id)
            client = self._client(hive, correlation_id)
            try:
                async with asyncio.timeout_at(min(deadline, loop.time() + ATTEMPT_S)):
                    return hive, (await client.submit(operation, idempotency_key=idempotency_key)).job_id
            except (UnavailableError, TimeoutError) as error:
                why = why if isinstance(error, TimeoutError) else _why(error)
                if loop.time() + RETRY_S >= deadline:
                    raise self._lost(hive_id, why) from error
            await self._book.news_of(hive_id, RETRY_S)

    def _lost(self, hive_id: str, why: str) -> HiveLostError:
        return HiveLostError(f"The hive {hive_id} could not be reached for {self._timeout_s:g} s: {why}")

    async def _cancel(self, client: JobClient, job_id: str) -> None:
        try:
            async with asyncio.timeout(ATTEMPT_S):
                await client.cancel(job_id)
        except (RbeeError, TimeoutError):
            pass  # a hive that cannot be reached ends the worker by itself, by its keep-alive


def _why(error: UnavailableError) -> str:
    if error.__cause__ is None:
        return error.message
    return f"{reason_of(error.__cause__ or error)}."


class _ForgottenError(Exception):
    """The hive's registry has no such job: it was emptied."""


async def _end_of(client: JobClient, job_id: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Follow a hive's job to its end, also across a restart of the hive.

    Returns:
        The end, and up to which sizes the hive's files tell of the command.
    """
    sources: dict[str, int] = {}
    try:
        async for event in client.follow(job_id):
            if event["kind"] == "end":
                return event, sources
            told = (event.get("fields") or {}).get("sources")
            sources = told if isinstance(told, dict) else sources
    except (NotFoundError, GoneError) as error:
        raise _ForgottenError from error
    raise InternalError(f"The log of {job_id} at {client.base_url} ended without an end.")


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
