"""The routes for jobs, the same at queen and hive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from rbee.contracts.operations import SUBMITTABLE
from rbee.contracts.states import JobState
from rbee.contracts.strict import nearest
from rbee.contracts.views import Accepted, JobView, Page
from rbee.errors import (
    ConflictError,
    GoneError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
    OverloadedError,
    PayloadTooLargeError,
    StorageError,
    UnsupportedMediaTypeError,
)
from rbee.http.routes import Route, json_response, query_int
from rbee.http.sse import requested_position, stream_response
from rbee.jobs import JobFilter, JobRegistry, JobRunner
from rbee.jobs.records import JobRecord

Submit = Callable[[Request], Awaitable[JobRecord]]
_Time = Annotated[datetime, Meta(tz=True)]
_FILTERS = ("state", "operation", "model", "hive_id", "worker_id", "correlation_id")


class JobRoutes:
    """Answers for one registry; `submit` is the program's own way to accept a job."""

    def __init__(self, registry: JobRegistry, runner: JobRunner, submit: Submit) -> None:
        self._registry = registry
        self._runner = runner
        self._submit = submit

    def table(self) -> list[Route]:
        """Return the rows for jobs."""
        return [
            Route(
                method="POST",
                path="/v1/jobs",
                endpoint=self.submit,
                summary="Submit a job; it starts whether or not anybody reads its log.",
                body=_union(SUBMITTABLE),
                result=Accepted,
                status=202,
                errors=(
                    InvalidRequestError,
                    ModelNotFoundError,
                    ConflictError,
                    PayloadTooLargeError,
                    UnsupportedMediaTypeError,
                    OverloadedError,
                    StorageError,
                ),
            ),
            Route(
                method="GET",
                path="/v1/jobs",
                endpoint=self.find,
                summary="List jobs, newest first.",
                result=Page[JobView],
                errors=(InvalidRequestError,),
            ),
            Route(
                method="GET",
                path="/v1/jobs/{job_id}",
                endpoint=self.get,
                summary="One job.",
                result=JobView,
                errors=(NotFoundError, GoneError),
            ),
            Route(
                method="DELETE",
                path="/v1/jobs/{job_id}",
                endpoint=self.cancel,
                summary="Cancel a job: 202 while it is being stopped, 200 once it has ended.",
                result=JobView,
                errors=(NotFoundError, GoneError),
            ),
            Route(
                method="GET",
                path="/v1/jobs/{job_id}/stream",
                endpoint=self.stream,
                summary="The job's log as server-sent events, from Last-Event-ID on, to its end.",
                media="text/event-stream",
                errors=(InvalidRequestError, NotFoundError, GoneError),
            ),
            Route(
                method="GET",
                path="/v1/jobs/{job_id}/events",
                endpoint=self.events,
                summary="The job's log, a page at a time.",
                result=Page[dict[str, Any]],
                errors=(InvalidRequestError, NotFoundError, GoneError),
            ),
        ]

    async def submit(self, request: Request) -> Response:
        """Accept a job."""
        record = await self._submit(request)
        accepted = Accepted(
            job_id=record.job_id,
            state=record.state,
            stream_url=f"/v1/jobs/{record.job_id}/stream",
            correlation_id=record.correlation_id,
        )
        headers = {"x-job-id": record.job_id, "location": f"/v1/jobs/{record.job_id}"}
        return json_response(accepted, 202, headers)

    async def find(self, request: Request) -> Page[JobView]:
        """List jobs by filter."""
        query = read_filter(request)
        jobs = await self._registry.find(query)
        return Page(data=jobs, next=jobs[-1].job_id if len(jobs) == query.limit else None)

    async def get(self, request: Request) -> JobView:
        """Show a job."""
        return await self._registry.view(request.path_params["job_id"])

    async def cancel(self, request: Request) -> Response:
        """Cancel a job."""
        record = await self._runner.cancel(request.path_params["job_id"])
        view = await self._registry.view(record.job_id)
        return json_response(view, 200 if record.is_ended else 202)

    async def stream(self, request: Request) -> Response:
        """Stream a job's log."""
        return await stream_response(request, self._registry, _log_id(request, "job"))

    async def events(self, request: Request) -> Response:
        """Page through a job's log."""
        return await log_page(request, self._registry, _log_id(request, "job"))


def _union(types: tuple[Any, ...]) -> Any:
    union = types[0]
    for kind in types[1:]:
        union = union | kind
    return union


def _log_id(request: Request, kind: str) -> str:
    log_id = str(request.path_params[f"{kind}_id"])
    if not log_id.startswith(kind + "-"):
        raise NotFoundError(f"There is no {kind} {log_id[:64]}.")
    return log_id


def log_stream_endpoint(registry: JobRegistry, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint that streams the log of a worker or hive."""

    async def stream(request: Request) -> Response:
        return await stream_response(request, registry, _log_id(request, kind))

    return stream


def log_events_endpoint(registry: JobRegistry, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint that pages through the log of a worker or hive."""

    async def events(request: Request) -> Response:
        return await log_page(request, registry, _log_id(request, kind))

    return events


async def log_page(request: Request, registry: JobRegistry, log_id: str) -> Response:
    """Answer with one page of a log: `{"data": [events], "next": "<number for after>" | null}`."""
    after = requested_position(request)
    limit = query_int(request, "limit", 500, low=1, high=500)
    page = await registry.read(log_id, after, limit)
    following = b'"%d"' % page.last_seq if page.frames and page.last_seq < page.head.last_seq else b"null"
    body = b'{"data":[%b],"next":%b}' % (b",".join(page.events), following)
    return Response(body, media_type="application/json")


def read_filter(request: Request) -> JobFilter:
    """Read which jobs a list shall hold.

    Raises:
        InvalidRequestError: An unknown filter, state or time.
    """
    known = {*_FILTERS, "since", "until", "cursor", "limit"}
    for name in request.query_params:
        if name not in known:
            raise InvalidRequestError(f"Unknown filter `{name}`{nearest(name, known)}.", param=name)
    values: dict[str, Any] = {name: request.query_params.get(name) for name in _FILTERS}
    if values["state"] is not None:
        try:
            values["state"] = JobState(values["state"])
        except ValueError:
            states = ", ".join(JobState)
            raise InvalidRequestError(f"`state` must be one of {states}.", param="state") from None
    return JobFilter(
        **values,
        since=_time(request, "since"),
        until=_time(request, "until"),
        before=request.query_params.get("cursor"),
        limit=query_int(request, "limit", 50, low=1, high=500),
    )


def _time(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return msgspec.convert(text, _Time).timestamp()
    except msgspec.ValidationError:
        raise InvalidRequestError(f"`{name}` must be a time such as 2026-01-31T12:00:00Z.", param=name) from None
