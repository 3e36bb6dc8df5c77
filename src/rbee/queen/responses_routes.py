"""The routes for stored responses of OpenAI's Responses API: read, followed, cancelled, deleted."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from rbee.contracts.operations import ApiCall, ResponseCall
from rbee.contracts.states import JobState
from rbee.errors import GoneError, InvalidRequestError, NotFoundError, UnavailableError
from rbee.http.routes import Route, json_response, query_int
from rbee.http.sse import requested_position
from rbee.jobs import JobRegistry, JobRunner
from rbee.jobs.records import JobRecord
from rbee.queen.kept_calls import KeptCalls, put_together
from rbee.queen.responses import job_of, response_id, response_object, status_of
from rbee.queen.retelling import Retelling

NUMBER_MAX = 10**12 - 1
CANCELLED_WITHIN_S = 10.0


class ResponsesRoutes:
    """Answers what is asked of a stored response."""

    def __init__(self, registry: JobRegistry, runner: JobRunner, kept_calls: KeptCalls) -> None:
        self._registry = registry
        self._runner = runner
        self._kept_calls = kept_calls

    def table(self) -> list[Route]:
        """Return the rows."""
        errors = (InvalidRequestError, NotFoundError, GoneError)
        one, result = "/v1/responses/{response_id}", dict[str, Any]
        return [
            Route(
                method="GET",
                path=one,
                endpoint=self.get,
                summary="A stored response; with `stream=true` its events behind `starting_after`.",
                result=result,
                errors=errors,
            ),
            Route(
                method="DELETE",
                path=one,
                endpoint=self.delete,
                summary="Erase a stored response: its request, its log and its text.",
                result=result,
                errors=errors,
            ),
            Route(
                method="POST",
                path=f"{one}/cancel",
                endpoint=self.cancel,
                summary="Cancel a response that is not complete yet.",
                result=result,
                errors=errors,
            ),
        ]

    async def get(self, request: Request) -> Response:
        """Show a response as it stands, or stream its events."""
        record, operation = await self._found(request)
        if request.query_params.get("stream") in ("true", "1"):
            after = query_int(request, "starting_after", requested_position(request), low=0, high=NUMBER_MAX)
            return self._kept_calls.retold(record, operation, is_stream=True, after=after)
        return await self._shown(record, operation)

    async def cancel(self, request: Request) -> Response:
        """Cancel a response; one that has ended stays as it is."""
        record, operation = await self._found(request)
        return await self._shown(await self._cancelled(record), operation)

    async def delete(self, request: Request) -> Response:
        """Erase a response; one that is being made is cancelled first."""
        record, _ = await self._found(request)
        if not (await self._cancelled(record)).is_ended:
            raise UnavailableError("The response is still being stopped.", retry_after_s=1.0)
        await self._registry.erase(record.job_id)
        deleted = {"id": response_id(record.job_id), "object": "response", "deleted": True}
        return json_response(deleted, headers={"x-job-id": record.job_id})

    async def _found(self, request: Request) -> tuple[JobRecord, ResponseCall]:
        record, operation = await self._kept_calls.found(job_of(request.path_params["response_id"]))
        if not isinstance(operation, ResponseCall):
            raise NotFoundError(f"{record.job_id} makes no response of the Responses API.")
        return record, operation

    async def _cancelled(self, record: JobRecord) -> JobRecord:
        """Cancel a job, and give it some time to end."""
        if record.is_ended:
            return record
        await self._runner.cancel(record.job_id)
        try:
            async with asyncio.timeout(CANCELLED_WITHIN_S):
                return await self._registry.wait(record.job_id)
        except TimeoutError:
            return await self._registry.get(record.job_id)

    async def _shown(self, record: JobRecord, operation: ApiCall) -> Response:
        request = operation.request or {}
        told = await self._told(record, operation) if record.state is JobState.COMPLETED else None
        shown = told or response_object(record, request, status_of(record))
        return json_response(shown, headers={"x-job-id": record.job_id})

    async def _told(self, record: JobRecord, operation: ApiCall) -> dict[str, Any]:
        """Read what its engine said of a whole response."""
        reader = await self._registry.follow(record.job_id)
        try:
            retelling = Retelling(record, operation)
            return await put_together(retelling, reader, operation.request or {}, UnavailableError())
        finally:
            reader.close()
