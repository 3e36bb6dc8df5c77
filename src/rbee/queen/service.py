"""The queen as a whole: its parts put together, and what it does on its own."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp

from rbee.contracts.ids import new_id
from rbee.contracts.models import parse_model_ref
from rbee.contracts.operations import AnyOperation, Infer, ModelDelete, ModelDownload, WorkerSpawn, WorkerStop
from rbee.contracts.states import JobState, Reason, WorkerState
from rbee.errors import GoneError, QueenLostError
from rbee.jobs import JobFilter, JobRegistry, JobRunner
from rbee.jobs.records import JobRecord
from rbee.jobs.runner import error_body, narration_event
from rbee.narration import narrate, scope
from rbee.narration.emit import compose, emit
from rbee.queen.answering import Answering
from rbee.queen.commands import Commands
from rbee.queen.dispatch import Dispatcher
from rbee.queen.hive_api import HiveApi
from rbee.queen.hives import HiveBook
from rbee.queen.infer import InferHandler
from rbee.queen.ingest import Ingest
from rbee.queen.relay import Relay
from rbee.queen.settings import QueenSettings
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import WorkerBook

LOOK_FOR_IDLE_S = 5.0


class QueenService:
    """All that a queen does, short of HTTP."""

    def __init__(
        self, settings: QueenSettings, registry: JobRegistry, session: aiohttp.ClientSession, boot_id: str
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.boot_id = boot_id
        self.book = HiveBook(stale_s=settings.hive_stale_s, lost_s=settings.hive_lost_s)
        self.workers = WorkerBook(registry, self.book.worker_gone)
        self.ingest = Ingest(registry, self.workers)
        hives = HiveApi(session, self.book, api_key=settings.api_key, timeout_s=settings.hive_timeout_s)
        self.dispatcher = Dispatcher(settings, self.book, self.workers, hives)
        worker_api = WorkerApi(session, self.book)
        answering = Answering(settings, self.book, worker_api)
        infer = InferHandler(registry, self.dispatcher, worker_api, answering)
        commands = Commands(self.book, hives, self.dispatcher)
        handlers: dict[type[Any], Any] = {Infer: infer, **commands.handlers()}
        self.runner = JobRunner(registry, actor="queen", owner=boot_id, handlers=handlers)
        self.relay = Relay(self.runner, self.dispatcher, worker_api, answering)
        self._idle: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Take up what an earlier boot left: what ran is lost, what waited is placed again."""
        await self.workers.load()
        for record in await self._all(JobState.RUNNING):
            await self._end_lost(record, "The queen ended while this job was running.")
        for record in reversed(await self._all(JobState.QUEUED)):
            await self._place_again(record)
        self._idle = asyncio.get_running_loop().create_task(self._stop_idle_workers())

    async def close(self, grace_s: float) -> None:
        """Give answers in progress `grace_s` seconds, then leave what is not done on disk."""
        if self._idle is not None:
            self._idle.cancel()
            await asyncio.gather(self._idle, return_exceptions=True)
        await self.runner.close(grace_s)
        await self.dispatcher.close()
        self.registry.hub.close()

    async def _all(self, state: JobState) -> list[JobRecord]:
        found: list[JobRecord] = []
        before: str | None = None
        while True:
            page = await self.registry.store.find(JobFilter(state=state, before=before, limit=500))
            found.extend(page)
            if len(page) < 500:
                return found
            before = page[-1].job_id

    async def _place_again(self, record: JobRecord) -> None:
        if not record.is_kept:
            await self._end_lost(record, "The queen ended before this call was answered.")
            return
        try:
            operation = await self.registry.operation(record.job_id)
        except GoneError:
            await self._end_lost(record, "The queen ended, and this job's request is no longer kept.")
            return
        self.runner.launch(record, operation)

    async def _end_lost(self, record: JobRecord, message: str) -> None:
        with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
            line = compose("queen_failed", message, level="error")
        await self.registry.end(
            record.job_id,
            JobState.FAILED,
            reason=Reason.QUEEN_LOST,
            message=message,
            error=error_body(QueenLostError(message)),
            events=[narration_event(line)],
        )
        emit(line)

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
            ModelNotFoundError: No source knows the model that it names.
            RbeeError: See `JobRegistry.create`.
        """
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
        known = {found.model for hive in self.book.hives() for found in hive.heartbeat.models}
        return model if model in known else parse_model_ref(model).text

    # On its own

    async def _stop_idle_workers(self) -> None:
        """Stop workers that nobody has needed for `keep_alive_s`."""
        loop = asyncio.get_running_loop()
        busy_at: dict[str, float] = {}
        while self.settings.keep_alive_s >= 0:
            await asyncio.sleep(min(LOOK_FOR_IDLE_S, self.settings.keep_alive_s + 0.1))
            now = loop.time()
            present = {worker.worker_id: worker for worker in self.book.workers()}
            busy_at = {worker_id: busy_at.get(worker_id, now) for worker_id in present}
            for worker_id, worker in present.items():
                if self.workers.slots_used(worker_id) or worker.info.state is not WorkerState.READY:
                    busy_at[worker_id] = now
                elif now - busy_at[worker_id] >= self.settings.keep_alive_s:
                    busy_at[worker_id] = now
                    await self._stop_idle(worker_id)

    async def _stop_idle(self, worker_id: str) -> None:
        with scope(job_id=None, correlation_id=None):
            narrate("queen_stop_idle", f"{worker_id} has been idle for {self.settings.keep_alive_s:g} s.")
        operation = WorkerStop(worker_id=worker_id)
        record = await self.accept(
            operation,
            correlation_id=new_id("job").replace("job-", "idle-"),
            is_correlation_id_replaced=False,
            principal="queen",
        )
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
