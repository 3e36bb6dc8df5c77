"""The queen as a whole: its parts put together, and what it does on its own."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from rbee.contracts.ids import new_correlation_id, new_id
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.models import parse_model_ref
from rbee.contracts.operations import (
    API_CALLS,
    AnyOperation,
    Infer,
    ModelDelete,
    ModelDownload,
    WorkerSpawn,
    WorkerStop,
)
from rbee.errors import RbeeError, UnavailableError
from rbee.jobs import JobRegistry, JobRunner
from rbee.jobs.records import JobRecord
from rbee.jobs.retention import Limits, Retention
from rbee.jobs.runner import narration_event
from rbee.narration import narrate, scope
from rbee.narration.emit import compose, emit
from rbee.queen.answering import Answering
from rbee.queen.commands import Commands
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.dispatch import Dispatcher
from rbee.queen.hive_api import HiveApi
from rbee.queen.hives import HiveBook
from rbee.queen.idle import IdleWorkers
from rbee.queen.infer import KeptAnswers
from rbee.queen.ingest import Ingest
from rbee.queen.kept_calls import KeptCalls
from rbee.queen.leftovers import Leftovers
from rbee.queen.old_requests import OldRequests
from rbee.queen.patience import Stories
from rbee.queen.relay import Relay
from rbee.queen.settings import QueenSettings
from rbee.queen.starts import WorkerStarter
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import WorkerBook


class QueenService:
    """All that a queen does, short of HTTP."""

    def __init__(
        self,
        settings: QueenSettings,
        registry: JobRegistry,
        session: aiohttp.ClientSession,
        boot_id: str,
        models: ModelTable | None = None,
    ) -> None:
        self.settings = settings
        self.models = models or ModelTable()
        self.registry = registry
        self.boot_id = boot_id
        self.is_closing = False
        book = self.book = HiveBook(stale_s=settings.hive_stale_s, lost_s=settings.hive_lost_s)
        workers = self.workers = WorkerBook(registry, book.worker_gone)
        self.ingest = Ingest(registry, workers)
        stories = Stories(registry, book, workers)
        hives = HiveApi(
            session, book, workers, stories, api_key=settings.api_key, timeout_s=settings.hive_timeout_s
        )
        crash_loops = CrashLoops()
        starter = WorkerStarter(settings, book, workers, hives, crash_loops)
        dispatcher = self.dispatcher = Dispatcher(settings, book, workers, starter, crash_loops)
        worker_api = WorkerApi(session, book)
        answering = Answering(settings, book, workers, worker_api, self._stop_stuck, dispatcher.can_move)
        kept = KeptAnswers(registry, workers, dispatcher, answering)
        commands = Commands(book, workers, hives, dispatcher, starter)
        handlers: dict[type[Any], Any] = {
            Infer: kept,
            **dict.fromkeys(API_CALLS, kept),
            **commands.handlers(),
        }
        self.runner = JobRunner(registry, actor="queen", owner=boot_id, handlers=handlers)
        self.kept_calls = KeptCalls(registry)
        self.relay = Relay(self.runner, workers, dispatcher, worker_api, answering)
        self._idle = IdleWorkers(book, workers, keep_alive_s=settings.keep_alive_s, stop=self._stop_idle)
        self._old_requests = OldRequests(book, workers, worker_api)
        limits = Limits(
            days=settings.retention_days, jobs=settings.retention_jobs, size_bytes=settings.retention_bytes
        )
        self._retention = Retention(registry, limits, actor="queen")
        self._leftovers = Leftovers(registry, self.runner, workers, kept)

    async def open(self) -> None:
        """Take up what an earlier boot left: kept answers go on, what waited is placed again."""
        await self._leftovers.take_up()

    async def run(self) -> None:
        """Do what a queen does on her own, until cancelled; what goes wrong in it is raised."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._idle.run())
            group.create_task(self._old_requests.run())
            group.create_task(self._retention.run())
            group.create_task(self.dispatcher.turns.run())
            await asyncio.Event().wait()

    async def close(self, grace_s: float) -> None:
        """Accept nothing new, give answers in progress `grace_s` seconds, then leave the rest on disk."""
        self.is_closing = True
        await self.runner.close(grace_s)
        await self.dispatcher.close()
        self.registry.hub.close()

    # Accepting

    async def accept(
        self,
        operation: AnyOperation,
        *,
        correlation_id: str,
        is_correlation_id_replaced: bool,
        principal: str,
        idempotency_key: str | None = None,
        is_kept: bool = True,
    ) -> JobRecord:
        """Make a job of a request; on disk when this returns.

        Raises:
            UnavailableError: The queen is stopping.
            ModelNotFoundError: No source knows the model that it names.
            RbeeError: See `JobRegistry.create`.
        """
        if self.is_closing:
            raise UnavailableError("The queen is stopping.", retry_after_s=1.0)
        model = self._model_of(operation)
        job_id = new_id("job")
        with scope(job_id=job_id, correlation_id=correlation_id, model=model):
            lines = [compose("queen_receive", f"Accepted: {_describe(operation, model)}.")]
            if is_correlation_id_replaced:
                lines.append(
                    compose(
                        "queen_replace_correlation_id",
                        "The caller's correlation id was not of the accepted form, so a new one was made.",
                        level="warning",
                    )
                )
        record = await self.registry.create(
            operation,
            job_id=job_id,
            correlation_id=correlation_id,
            principal=principal,
            model=model,
            hive_id=getattr(operation, "hive_id", None),
            idempotency_key=idempotency_key,
            is_kept=is_kept,
            events=[narration_event(line) for line in lines],
        )
        if record.job_id == job_id:
            for line in lines:
                emit(line)
        return record

    def launch(self, record: JobRecord, operation: AnyOperation) -> None:
        """Start an accepted job, unless it has ended or runs already (a repeated submit)."""
        if not record.is_ended:
            self.runner.launch(record, operation)

    def _model_of(self, operation: AnyOperation) -> str | None:
        """Return the model a job is about, checked; an `infer` that names none gets the configured one."""
        model: str | None = getattr(operation, "model", None)
        if model is None and hasattr(operation, "model"):
            model = self.settings.model
        if model is None:
            return None
        model = self.models.resolve(model)
        known = {found.model for hive in self.book.hives() for found in hive.heartbeat.models}
        return model if model in known else parse_model_ref(model).text

    # On its own

    async def _stop_idle(self, worker_id: str) -> None:
        idle_s = self.workers.keep_alive_s(worker_id, self.settings.keep_alive_s)
        said = f"{worker_id} has been idle for {idle_s:g} s."
        await self._stop_worker("queen_stop_idle", said, WorkerStop(worker_id=worker_id))

    async def _stop_stuck(self, worker_id: str) -> None:
        said = (
            f"{worker_id} did not stop an answer within {self.settings.stop_grace_s:g} s, so it is stopped itself."
        )
        await self._stop_worker("queen_stop_stuck", said, WorkerStop(worker_id=worker_id, drain_s=0))

    async def _stop_worker(self, action: str, message: str, operation: WorkerStop) -> None:
        """Stop a worker by a job of the queen's own; from here on nothing more is placed on the worker."""
        self.workers.drain(operation.worker_id)
        with scope(job_id=None, correlation_id=None, model=None):
            narrate(action, message, worker_id=operation.worker_id)
            try:
                record = await self.accept(
                    operation,
                    correlation_id=new_correlation_id(),
                    is_correlation_id_replaced=False,
                    principal="queen",
                )
            except RbeeError as error:  # too many jobs, a full disk, the queen's end: the next look tries again
                self.workers.undrain(operation.worker_id)
                narrate("queen_stop_refused", f"It could not be asked for: {error.message}", level="warning")
            else:
                self.launch(record, operation)


def _describe(operation: AnyOperation, model: str | None) -> str:
    if isinstance(operation, Infer):
        return f"an answer from {model}"
    if isinstance(operation, WorkerSpawn):
        return f"a worker with {model}"
    if isinstance(operation, WorkerStop):
        return f"stop {operation.worker_id}"
    if isinstance(operation, ModelDownload):
        return f"download {model}"
    if isinstance(operation, ModelDelete):
        return f"delete {model}"
    return str(type(operation).__struct_config__.tag)
