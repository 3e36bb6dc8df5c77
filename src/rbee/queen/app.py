"""The queen's HTTP routes."""

from __future__ import annotations

from datetime import UTC, datetime

from starlette.requests import Request
from starlette.types import ASGIApp

from rbee import __version__
from rbee.contracts.heartbeats import Cursors, Heartbeat, HeartbeatAnswer
from rbee.contracts.ids import is_id
from rbee.contracts.model_settings import SettingsInForce
from rbee.contracts.operations import AnyOperation, Infer, parse_operation
from rbee.contracts.strict import decode_strict
from rbee.contracts.views import HiveView, Page, Status, WorkerView
from rbee.errors import GoneError, InvalidRequestError, NotFoundError
from rbee.http.auth import Door, is_loopback
from rbee.http.job_routes import JobRoutes, log_events_endpoint, log_stream_endpoint
from rbee.http.routes import Route, build_app, read_body, read_bytes
from rbee.jobs.records import JobRecord
from rbee.queen.api_routes import ApiRoutes, said_of
from rbee.queen.hives import hive_view, worker_view
from rbee.queen.ingest import BATCH_BYTES_MAX
from rbee.queen.parameters import Change, settle_infer
from rbee.queen.responses_routes import ResponsesRoutes
from rbee.queen.service import QueenService


class QueenRoutes:
    """Answers for one queen."""

    def __init__(self, service: QueenService, url: str) -> None:
        self._service = service
        self._url = url
        self._started_at = datetime.now(UTC)

    def table(self) -> list[Route]:
        """Return the queen's own rows."""
        return [*self._reading(), *self._from_hives()]

    def _reading(self) -> list[Route]:
        registry = self._service.registry
        rows = [
            Route(
                method="GET", path=path, endpoint=self.livez, summary="The process answers.", result=dict[str, str]
            )
            for path in ("/livez", "/health")
        ]
        rows += [
            Route(
                method="GET",
                path="/readyz",
                endpoint=self.livez,
                summary="Jobs are accepted.",
                result=dict[str, str],
            ),
            Route(
                method="GET",
                path="/v1/status",
                endpoint=self.status,
                summary="The queen at a glance.",
                result=Status,
            ),
            Route(
                method="GET", path="/v1/hives", endpoint=self.hives, summary="All hives.", result=Page[HiveView]
            ),
            Route(
                method="GET",
                path="/v1/hives/{hive_id}",
                endpoint=self.hive,
                summary="One hive.",
                result=HiveView,
                errors=(NotFoundError,),
            ),
            Route(
                method="GET",
                path="/v1/model-settings",
                endpoint=self.model_settings,
                summary="Aliases, the settings of single models, and the defaults of the others.",
                result=SettingsInForce,
            ),
            Route(
                method="GET",
                path="/v1/workers",
                endpoint=self.workers,
                summary="All workers.",
                result=Page[WorkerView],
            ),
            Route(
                method="GET",
                path="/v1/workers/{worker_id}",
                endpoint=self.worker,
                summary="One worker.",
                result=WorkerView,
                errors=(NotFoundError,),
            ),
        ]
        for kind, plural in (("worker", "workers"), ("hive", "hives")):
            rows += [
                Route(
                    method="GET",
                    path=f"/v1/{plural}/{{{kind}_id}}/stream",
                    endpoint=log_stream_endpoint(registry, kind),
                    summary=f"The {kind}'s own log as server-sent events.",
                    media="text/event-stream",
                    errors=(InvalidRequestError, NotFoundError, GoneError),
                ),
                Route(
                    method="GET",
                    path=f"/v1/{plural}/{{{kind}_id}}/events",
                    endpoint=log_events_endpoint(registry, kind),
                    summary=f"The {kind}'s own log, a page at a time.",
                    errors=(InvalidRequestError, NotFoundError, GoneError),
                ),
            ]
        return rows

    def _from_hives(self) -> list[Route]:
        return [
            Route(
                method="POST",
                path="/v1/hives/{hive_id}/heartbeat",
                endpoint=self.heartbeat,
                summary="A hive tells the whole truth about itself.",
                body=Heartbeat,
                result=HeartbeatAnswer,
                errors=(InvalidRequestError,),
            ),
            Route(
                method="POST",
                path="/v1/hives/{hive_id}/events",
                endpoint=self.events,
                summary="A hive brings what its files say.",
                result=Cursors,
                errors=(InvalidRequestError,),
            ),
        ]

    async def livez(self, request: Request) -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    async def status(self, request: Request) -> Status:
        """Show the queen at a glance."""
        counts = await self._service.registry.store.counts()
        return Status(
            version=__version__,
            boot_id=self._service.boot_id,
            url=self._url,
            started_at=self._started_at,
            hives=len(self._service.book.hives()),
            workers=sum(1 for _ in self._service.book.workers()),
            queued=counts["queued"],
            running=counts["running"],
        )

    async def hives(self, request: Request) -> Page[HiveView]:
        """Show all hives."""
        book, workers = self._service.book, self._service.workers
        return Page(data=[hive_view(book, hive, workers) for hive in book.hives()])

    async def hive(self, request: Request) -> HiveView:
        """Show one hive."""
        book = self._service.book
        return hive_view(book, book.hive(request.path_params["hive_id"]), self._service.workers)

    async def model_settings(self, request: Request) -> SettingsInForce:
        """Show what models are loaded and asked with."""
        return self._service.settings_in_force()

    async def workers(self, request: Request) -> Page[WorkerView]:
        """Show all workers."""
        return Page(data=[worker_view(found, self._service.workers) for found in self._service.book.workers()])

    async def worker(self, request: Request) -> WorkerView:
        """Show one worker."""
        return worker_view(self._service.book.worker(request.path_params["worker_id"]), self._service.workers)

    async def heartbeat(self, request: Request) -> HeartbeatAnswer:
        """Take a heartbeat; answer how far the hive's files are committed."""
        hive_id = _hive_id(request)
        beat = decode_strict(await read_body(request), (Heartbeat,))
        self._service.book.beat(hive_id, beat)
        names = [f"{worker.worker_id}/{stream}" for worker in beat.workers for stream in ("stdout", "stderr")]
        cursors = await self._service.registry.store.cursors([*names, f"{hive_id}/{beat.boot_id}"])
        return HeartbeatAnswer(
            lease_s=self._service.settings.hive_stale_s,
            queen_boot_id=self._service.boot_id,
            store_id=self._service.registry.store.store_id,
            cursors={source: cursor for source, (cursor, _) in cursors.items()},
        )

    async def events(self, request: Request) -> Cursors:
        """Commit what a hive brings; the answer is the acknowledgement."""
        hive_id = _hive_id(request)
        body = await read_bytes(request, BATCH_BYTES_MAX)
        return Cursors(cursors=await self._service.ingest.take(hive_id, body))


def _hive_id(request: Request) -> str:
    hive_id = str(request.path_params["hive_id"])
    if not is_id("hive", hive_id):
        raise InvalidRequestError(f"`{hive_id[:64]}` is no hive's id.", param="hive_id")
    return hive_id


async def submit(service: QueenService, request: Request) -> JobRecord:
    """Accept the job that a request asks for, and start it."""
    operation: AnyOperation = parse_operation(await read_body(request))
    change, model = Change(), ""
    if isinstance(operation, Infer):
        model = service.models.resolve(operation.model or service.settings.model)
        operation, change = settle_infer(service.models.of(model), operation)
    record = await service.accept(
        operation,
        correlation_id=request.state.correlation_id,
        is_correlation_id_replaced=request.state.is_correlation_id_replaced,
        principal=request.state.principal,
        idempotency_key=request.headers.get("idempotency-key"),
        say=lambda: said_of(change, model),
    )
    service.launch(record, operation)
    return record


def make_app(service: QueenService, url: str) -> ASGIApp:
    """Make the queen's application."""
    settings = service.settings
    hosts = {*settings.allowed_hosts, *([] if is_loopback(settings.host) else [settings.host])}
    door = Door(api_key=settings.api_key, hosts=frozenset(hosts), origins=frozenset(settings.allowed_origins))
    jobs = JobRoutes(service.registry, service.runner, lambda request: submit(service, request))
    responses = ResponsesRoutes(service.registry, service.runner, service.kept_calls)
    table = [*jobs.table(), *QueenRoutes(service, url).table(), *ApiRoutes(service).table()]
    table += [*service.kept_calls.table(), *responses.table()]
    return build_app(table, door, title="rbee queen")
