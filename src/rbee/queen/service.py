"""The queen as a whole: its parts put together, and what it does on its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

from rbee.contracts.ids import new_correlation_id, new_id
from rbee.contracts.model_settings import ModelTable, SettingsInForce
from rbee.contracts.models import parse_model_ref
from rbee.contracts.operations import (
    API_CALLS,
    AnyOperation,
    ApiCall,
    Infer,
    ModelDelete,
    ModelDownload,
    WorkerSpawn,
    WorkerStop,
    operation_name,
)
from rbee.contracts.states import JobState
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
from rbee.queen.preloads import Preloads
from rbee.queen.relay import Relay
from rbee.queen.settings import QueenSettings
from rbee.queen.starts import WorkerStarter
from rbee.queen.worker_api import WorkerApi
from rbee.queen.workers import WorkerBook

OWN_QUEUED_MAX = 2**31


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
        dispatcher = self.dispatcher = Dispatcher(
            settings, self.models, book, workers, starter, crash_loops, self._evict
        )
        registry.positions = dispatcher.positions
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
        self._idle = IdleWorkers(
            book, workers, models=self.models, keep_alive_s=settings.keep_alive_s, stop=self._stop_idle
        )
        self._preloads = Preloads(self.models, book, dispatcher.wanted, dispatcher.inventory, self._preload)
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
            group.create_task(self._preloads.run())
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
        is_own: bool = False,
        say: Callable[[], list[bytes]] = list,
    ) -> JobRecord:
        """Make a job of a request; on disk when this returns.

        Args:
            operation: What is asked.
            correlation_id: The request's.
            is_correlation_id_replaced: The caller's own could not be taken.
            principal: Who asks.
            idempotency_key: The same one again gives the same job.
            is_kept: The answer is kept in the log, so that the job can go on after this queen's end.
            is_own: The job is one of the queen's own that others wait for, accepted however many wait.
            say: Composes what the job's log is told besides.

        Raises:
            UnavailableError: The queen is stopping.
            ModelNotFoundError: No source knows the model that it names.
            RbeeError: See `JobRegistry.create`.
        """
        record, lines = self._drafted(
            operation, correlation_id, is_correlation_id_replaced, principal, idempotency_key, is_kept, say
        )
        return await self._made(record, operation, lines, OWN_QUEUED_MAX if is_own else None)

    def accept_soon(
        self,
        operation: AnyOperation,
        *,
        correlation_id: str,
        is_correlation_id_replaced: bool,
        principal: str,
        say: Callable[[], list[bytes]] = list,
    ) -> tuple[JobRecord, asyncio.Future[JobRecord]]:
        """Make a job of a call that is relayed; on disk once the future is done.

        Its worker can be asked meanwhile, and reads the prompt: the caller is told nothing before. See `accept`.
        """
        record, lines = self._drafted(
            operation, correlation_id, is_correlation_id_replaced, principal, None, False, say
        )
        return record, asyncio.ensure_future(self._made(record, operation, lines, None))

    def _drafted(
        self,
        operation: AnyOperation,
        correlation_id: str,
        is_correlation_id_replaced: bool,
        principal: str,
        idempotency_key: str | None,
        is_kept: bool,
        say: Callable[[], list[bytes]],
    ) -> tuple[JobRecord, list[bytes]]:
        """Return what the job will be, and the first lines of its log."""
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
            lines += say()
        record = self.registry.draft(
            operation,
            job_id=job_id,
            correlation_id=correlation_id,
            principal=principal,
            model=model,
            hive_id=getattr(operation, "hive_id", None),
            idempotency_key=idempotency_key,
            is_kept=is_kept,
        )
        return record, lines

    async def _made(
        self, record: JobRecord, operation: AnyOperation, lines: list[bytes], queued_max: int | None
    ) -> JobRecord:
        events = [narration_event(line) for line in lines]
        made = await self.registry.put(record, operation, queued_max=queued_max, events=events)
        if made.job_id == record.job_id:
            for line in lines:
                emit(line)
        return made

    def launch(self, record: JobRecord, operation: AnyOperation) -> None:
        """Start an accepted job, unless it has ended or runs already (a repeated submit).

        One that was accepted while the queen began to stop is left on disk for her next start.
        """
        if not record.is_ended and not self.is_closing:
            self.runner.launch(record, operation)

    def _model_of(self, operation: AnyOperation) -> str | None:
        """Return the model a job is about, checked; an `infer` that names none gets the configured one."""
        model: str | None = getattr(operation, "model", None)
        if model is None and hasattr(operation, "model"):
            model = self.settings.model
        if model is None:
            return None
        model = self.models.resolve(model)
        known = self.dispatcher.inventory().holders
        return model if model in known else parse_model_ref(model, {*self.models.aliases, *known}).text

    def settings_in_force(self) -> SettingsInForce:
        """Return what this queen goes by when she places a model."""
        own = self.settings
        return SettingsInForce(
            model=own.model,
            slots=own.slots,
            context_tokens=own.context_tokens,
            keep_alive_s=own.keep_alive_s,
            table=self.models,
        )

    # On its own

    async def _stop_idle(self, worker_id: str, idle_s: float) -> None:
        said = f"{worker_id} has been idle for {idle_s:g} s."
        await self._stop_worker("queen_stop_idle", said, WorkerStop(worker_id=worker_id))

    async def _stop_stuck(self, worker_id: str) -> None:
        said = (
            f"{worker_id} did not stop an answer within {self.settings.stop_grace_s:g} s, so it is stopped itself."
        )
        await self._stop_worker("queen_stop_stuck", said, WorkerStop(worker_id=worker_id, drain_s=0))

    async def _evict(self, worker_id: str, message: str) -> bool:
        """Stop an idle worker to make room, and wait for its end; tells whether it is gone."""
        record = await self._stop_worker(
            "queen_evict", message, WorkerStop(worker_id=worker_id), is_waited_for=True
        )
        return record is not None and (await self.registry.wait(record.job_id)).state is JobState.COMPLETED

    async def _stop_worker(
        self, action: str, message: str, operation: WorkerStop, *, is_waited_for: bool = False
    ) -> JobRecord | None:
        """Stop a worker by a job of the queen's own; from here on nothing more is placed on the worker."""
        self.workers.drain(operation.worker_id)
        with scope(job_id=None, correlation_id=None, model=None):
            if not is_waited_for:  # else the job that waits has been told
                narrate(action, message, worker_id=operation.worker_id)
            record = await self._accept_own(operation, "queen_stop_refused", is_waited_for=is_waited_for)
        if record is None:  # the next look tries again
            self.workers.undrain(operation.worker_id)
        return record

    async def _preload(self, operation: WorkerSpawn) -> JobState | None:
        """Start a worker by a job of the queen's own; returns how it ended, None where it was not accepted."""
        with scope(job_id=None, correlation_id=None, model=None):
            narrate("queen_preload", f"{operation.model} is to be kept loaded, and there is room for it.")
            record = await self._accept_own(operation, "queen_preload_refused")
        return None if record is None else (await self.registry.wait(record.job_id)).state

    async def _accept_own(
        self, operation: WorkerStop | WorkerSpawn, refused: str, *, is_waited_for: bool = False
    ) -> JobRecord | None:
        """Accept and start a job of the queen's own; None, and told, where that cannot be."""
        try:
            record = await self.accept(
                operation,
                correlation_id=new_correlation_id(),
                is_correlation_id_replaced=False,
                principal="queen",
                is_own=is_waited_for,
            )
        except RbeeError as error:
            narrate(refused, f"It could not be asked for: {error.message}", level="warning")
            return None
        self.launch(record, operation)
        return record


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
    if isinstance(operation, ApiCall):
        return f"{operation.path} of {model}"
    return operation_name(operation)
