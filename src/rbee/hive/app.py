"""The hive's HTTP routes."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp

from rbee.contracts.heartbeats import DeviceInfo, ModelInfo
from rbee.contracts.operations import Infer, QueenCheck, parse_operation
from rbee.contracts.views import Page, WorkerView
from rbee.errors import InvalidRequestError, UnavailableError
from rbee.hive.service import HiveService
from rbee.http.auth import Door, is_loopback
from rbee.http.job_routes import JobRoutes
from rbee.http.routes import Route, build_app, read_body
from rbee.jobs.records import JobRecord


class HiveRoutes:
    """Answers for one hive."""

    def __init__(self, service: HiveService) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """Return the hive's own rows."""
        return [
            *(
                Route(method="GET", path=path, endpoint=self.livez, summary=text, result=dict[str, str])
                for path, text in (
                    ("/livez", "The process answers."),
                    ("/health", "The process answers."),
                    ("/readyz", "Commands are accepted."),
                )
            ),
            Route(
                method="GET",
                path="/v1/workers",
                endpoint=self.workers,
                summary="The workers of this hive.",
                result=Page[WorkerView],
            ),
            Route(
                method="GET",
                path="/v1/models",
                endpoint=self.models,
                summary="The models on this machine's disk.",
                result=Page[ModelInfo],
            ),
            Route(
                method="GET",
                path="/v1/devices",
                endpoint=self.devices,
                summary="The devices that can run a model.",
                result=Page[DeviceInfo],
            ),
        ]

    async def livez(self, request: Request) -> dict[str, str]:
        """Say that the process answers."""
        return {"status": "ok"}

    async def workers(self, request: Request) -> Page[WorkerView]:
        """Show the workers; their tokens stay here and with the queen."""
        return Page(
            data=[
                WorkerView(
                    worker_id=info.worker_id,
                    hive_id=self._service.hive_id,
                    model=info.model,
                    state=info.state,
                    purpose=info.purpose,
                    slots=info.slots,
                    slots_used=info.slots_used,
                    pid=info.pid,
                )
                for info in self._service.workers.infos()
            ]
        )

    async def models(self, request: Request) -> Page[ModelInfo]:
        """Show the models."""
        return Page(data=[model.info() for model in self._service.models.list()])

    async def devices(self, request: Request) -> Page[DeviceInfo]:
        """Show the devices."""
        return Page(data=await asyncio.to_thread(self._service.machine.devices))


async def submit(service: HiveService, request: Request) -> JobRecord:
    """Accept a command and start it; one that was given before is answered with the same job."""
    operation: Any = parse_operation(await read_body(request))
    if service.is_closing:
        raise UnavailableError("The hive is stopping.", retry_after_s=1.0)
    if isinstance(operation, (Infer, QueenCheck)):
        raise InvalidRequestError(
            "A hive takes worker_spawn, worker_stop, model_download, model_delete and hive_check; "
            "everything else is the queen's.",
            param="operation",
        )
    record = await service.registry.create(
        operation,
        correlation_id=request.state.correlation_id,
        principal=request.state.principal,
        model=getattr(operation, "model", None),
        hive_id=service.hive_id,
        parent_job_id=operation.parent_job_id,
        idempotency_key=request.headers.get("idempotency-key"),
    )
    if record.is_ended:
        return record
    if (
        service.runner.is_closing
    ):  # it began to while the command was written down: what starts now, nobody would stop
        await service.end_lost(record)
    else:
        service.runner.launch(record, operation)
    return record


def make_app(service: HiveService) -> ASGIApp:
    """Make the hive's application."""
    settings = service.settings
    hosts = {*settings.allowed_hosts, *([] if is_loopback(settings.host) else [settings.host])}
    door = Door(api_key=settings.api_key, hosts=frozenset(hosts), origins=frozenset(settings.allowed_origins))
    jobs = JobRoutes(service.registry, service.runner, lambda request: submit(service, request))
    return build_app([*jobs.table(), *HiveRoutes(service).table()], door, title="rbee hive")
