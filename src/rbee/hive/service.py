"""The hive as a whole: what it does with the commands of its queen, and what it tells of itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rbee import __version__
from rbee.contracts.engine_settings import EngineSettings, load_engine_table
from rbee.contracts.heartbeats import DeviceInfo, Heartbeat, MachineInfo, UnusableModel
from rbee.contracts.home import Home
from rbee.contracts.ids import new_id
from rbee.contracts.model_settings import load_model_table
from rbee.contracts.operations import (
    HiveCheck,
    ModelDelete,
    ModelDownload,
    WorkerSpawn,
    WorkerStop,
    operation_name,
)
from rbee.contracts.states import JobState, Reason
from rbee.contracts.strict import nearest
from rbee.errors import (
    ConflictError,
    HiveLostError,
    InvalidRequestError,
    ModelInvalidError,
    ModelNotFoundError,
    NoCapacityError,
    RbeeError,
)
from rbee.hive.catalog import LocalModel
from rbee.hive.deliveries import Deliveries
from rbee.hive.machine import Machine
from rbee.hive.model_commands import ModelCommands
from rbee.hive.models import ModelStore
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.hive.returning import Returning
from rbee.hive.settings import HiveSettings
from rbee.hive.worker_wanted import WorkerWanted
from rbee.hive.workers import Workers
from rbee.jobs import JobRegistry, JobRunner, RunningJob
from rbee.jobs.records import JobRecord
from rbee.jobs.retention import Limits, Retention
from rbee.jobs.runner import Handler, error_body
from rbee.jobs.store import all_jobs
from rbee.narration import narrate, scope


class HiveService:
    """All that a hive does, short of HTTP."""

    def __init__(
        self,
        settings: HiveSettings,
        home: Home,
        registry: JobRegistry,
        link: QueenLink,
        outbox: Outbox,
        *,
        hive_id: str,
        boot_id: str,
        url: str,
        worker_program: Path | None = None,
    ) -> None:
        self.settings = settings
        self.home = home
        self.registry = registry
        self.hive_id = hive_id
        self.boot_id = boot_id
        self.url = settings.public_url or url
        table = load_model_table(home.config)
        self._pinned = {model for model, own in table.models.items() if own.pinned or own.preload}
        directory = settings.models or home.root / "models"
        self.models = ModelStore(directory, max_bytes=settings.models_max_bytes, spared=self._spared_models)
        self.outbox = outbox
        self.engines = load_engine_table(home.config)
        self._own_files = [outbox.add(f"{hive_id}/{boot_id}", home.hive / boot_id, goes_first=True)]
        self._link = link
        self._loading: list[str] = []
        self._changed = asyncio.Event()
        self._commands = ModelCommands(self.models, self._changed.set)
        self.machine = Machine(home.root)
        self._is_reading = False
        self.deliveries = Deliveries(outbox)
        carriers = (outbox, self.deliveries, self._changed.set)
        self.workers = Workers(home, settings, *carriers, engines=self.engines, program=worker_program)
        self._returning = Returning(home, self.workers, self.deliveries, stop_grace_s=settings.stop_grace_s)
        self.runner = JobRunner(registry, actor="hive", owner=boot_id, handlers=self._handlers(), is_known=False)
        limits = Limits(
            days=settings.retention_days, jobs=settings.retention_jobs, size_bytes=settings.retention_bytes
        )
        self.retention = Retention(registry, limits, actor="hive")
        self._is_away = False
        self.is_closing = False

    def _handlers(self) -> dict[type[Any], Handler]:
        return {
            WorkerSpawn: self._told(self.worker_spawn),
            WorkerStop: self._told(self.worker_stop),
            ModelDownload: self._told(self._commands.model_download),
            ModelDelete: self._told(self._commands.model_delete),
            HiveCheck: self._told(self.hive_check),
        }

    def _told(self, handler: Handler) -> Handler:
        """Have what is narrated about a command go to the queen's job it belongs to."""

        async def run(job: RunningJob) -> dict[str, Any] | None:
            with scope(job_id=job.record.parent_job_id or job.job_id, hive_id=self.hive_id):
                name = operation_name(job.operation)
                if job.record.state is JobState.RUNNING:
                    await job.take_over()
                    narrate("hive_resume", f"The hive is back; {name} goes on.", hive_job_id=job.job_id)
                else:
                    await job.start(hive_id=self.hive_id)
                    narrate("hive_receive", f"Received {name}.", operation=name, hive_job_id=job.job_id)
                try:
                    return await handler(job)
                finally:  # how far our own files tell of it: the queen waits for that before she ends her job
                    job.facts["sources"] = self._told_sizes()

        return run

    async def open(self) -> None:
        """Adopt the workers that an earlier boot left running, and go on with its commands."""
        for path in sorted(self.home.hive.iterdir()):
            if path.name != self.boot_id:
                name = f"{self.hive_id}/{path.name}"
                self._own_files += self.deliveries.deliver_rest(path, [(name, path)], goes_first=True)
        await self.models.clean()
        self.deliveries.own(self._ask_engine())
        self._returning.find_again()
        for record in await self._unended():
            await self._go_on(record)

    async def _go_on(self, record: JobRecord) -> None:
        operation = await self.registry.operation(record.job_id)
        self.runner.launch(record, operation)
        if record.is_cancel_requested:
            await self.runner.cancel(record.job_id)
            if isinstance(operation, WorkerSpawn):
                self.deliveries.own(self.workers.stop_if_there(operation.worker_id or ""))

    def _spared_models(self) -> set[str]:
        """Return the models that are never removed to make room: in use, pinned or preloaded."""
        return self._pinned | {worker.model for worker in self.workers.infos()} | set(self._loading)

    def _told_sizes(self) -> dict[str, int]:
        """Return up to which sizes our files that are not delivered yet tell what was said so far."""
        self._own_files = [source for source in self._own_files if not source.delivered.is_set()]
        return {source.name: source.follower.size for source in self._own_files}

    async def _unended(self) -> list[JobRecord]:
        """Return the commands that have not ended, oldest first."""
        found = await all_jobs(self.registry.store, JobState.QUEUED, JobState.RUNNING)
        return sorted(found, key=lambda record: record.created_at)

    async def end_lost(self, record: JobRecord) -> None:
        """End a command that a hive that stops will not carry out."""
        error = HiveLostError("The hive was stopped before this command had ended.")
        await self.registry.end(
            record.job_id,
            JobState.FAILED,
            reason=Reason.HIVE_LOST,
            message=error.message,
            error=error_body(error),
        )

    async def close(self) -> None:
        """Take no command any more, end those that run, and stop all workers."""
        self.is_closing = True
        try:
            await self.runner.close()
            for record in await self._unended():
                with contextlib.suppress(ConflictError):  # its own end was just being written
                    await self.end_lost(record)
        finally:
            await self.workers.stop_all()
            self.registry.hub.close()

    # Heartbeats

    async def run_heartbeats(self) -> None:
        """Tell the queen the whole truth every `heartbeat_s` seconds and at each change, until cancelled."""
        while True:
            self._changed.clear()
            try:
                await self._link.heartbeat(await self.heartbeat())
            except RbeeError as error:
                self._say_away(error)
            else:
                self._say_back()
            try:
                async with asyncio.timeout(self.settings.heartbeat_s):
                    await self._changed.wait()
            except TimeoutError:
                pass

    async def heartbeat(self) -> Heartbeat:
        """Return the whole truth about this hive as it is now."""
        machine, devices, models, unusable = await asyncio.to_thread(self._look_around)
        if not self._is_reading and any(model.facts is None for model in models):
            self._is_reading = True
            self.deliveries.own(self._read_headers())
        return Heartbeat(
            boot_id=self.boot_id,
            store_id=self.registry.store.store_id,
            url=self.url,
            version=__version__,
            machine=machine,
            devices=devices,
            models=[model.info() for model in models],
            workers=self.workers.infos(),
            downloads=self._commands.downloads(),
            unusable_models=list(unusable),
            workers_max=self.settings.workers_max,
            engines=self.engines.names(),
            fetching_engines=self.engines.fetching(),
        )

    def _look_around(
        self,
    ) -> tuple[MachineInfo, list[DeviceInfo], Sequence[LocalModel], Sequence[UnusableModel]]:
        return self.machine.info(), self.machine.devices(), *self.models.survey()

    async def _ask_engine(self) -> None:
        await self.machine.ask_engine()
        self._changed.set()

    async def _read_headers(self) -> None:
        """Read the headers that were not read yet, one after another; heartbeats go on meanwhile."""
        try:
            for model in await asyncio.to_thread(self.models.unread):
                with contextlib.suppress(ModelInvalidError):  # it is told of as unusable
                    await self.models.facts(model)
        finally:
            self._is_reading = False
            self._changed.set()

    def _say_away(self, error: RbeeError) -> None:
        if not self._is_away:
            self._is_away = True
            narrate("hive_queen_silent", f"{error.message} {error.remedy}", level="warning")

    def _say_back(self) -> None:
        if self._is_away:
            self._is_away = False
            narrate("hive_queen_heard", "The queen answers heartbeats again.")

    # Commands

    async def worker_spawn(self, job: RunningJob) -> dict[str, Any]:
        """Start a worker and wait until it is ready; from the first look at its model's file on, that stays."""
        operation = job.operation
        assert isinstance(operation, WorkerSpawn)
        self._loading.append(operation.model)
        try:
            return await self._spawn(job, operation)
        finally:
            self._loading.remove(operation.model)

    async def _spawn(self, job: RunningJob, operation: WorkerSpawn) -> dict[str, Any]:
        worker_id = operation.worker_id or job.record.worker_id or new_id("worker")
        if job.record.worker_id is not None:  # an earlier boot had begun to start it
            await self.workers.until_ready(worker_id)
            return {"worker_id": worker_id, "hive_id": self.hive_id}
        await self._check_device(operation.device, operation.engine)
        engine = self._check_engine(operation)
        model = self._model_for(operation.model, engine)
        needed_bytes = 0
        if model.size_bytes:
            model = await self.models.facts(model)
            self.models.note_use(model)
            needed_bytes = await self._check_memory(operation, model)
        wanted = WorkerWanted(
            worker_id=worker_id,
            model=model,
            slots=operation.slots,
            context_tokens=operation.context_tokens,
            job_id=job.record.parent_job_id or job.job_id,
            correlation_id=job.record.correlation_id,
            device=operation.device,
            engine=operation.engine,
            purpose=operation.purpose,
            memory_bytes=needed_bytes,
            has_prefill=engine is None or engine.prefill,
            ready_timeout_s=engine.ready_timeout_s if engine is not None else 0.0,
        )
        self.workers.check_new(worker_id)
        await job.update(worker_id=worker_id)
        await self.workers.start(wanted, self.hive_id)
        return {"worker_id": worker_id, "hive_id": self.hive_id}

    def _check_engine(self, operation: WorkerSpawn) -> EngineSettings | None:
        """Return the settings of the engine that is asked for, None for the built-in one."""
        engine = self.engines.find(operation.engine)
        if engine is not None and operation.purpose not in engine.purposes:
            raise InvalidRequestError(
                f"The engine {operation.engine} of {self.hive_id} is for {', '.join(engine.purposes)}, "
                f"not for {operation.purpose}.",
                param="purpose",
            )
        return engine

    def _model_for(self, ref: str, engine: EngineSettings | None) -> LocalModel:
        """Return the model's file; for an engine that fetches its models, the name it knows the model by."""
        if engine is not None and not engine.needs_file:
            return LocalModel(ref=ref, path=Path(ref.removeprefix("hf:")), size_bytes=0, sha256=None)
        model = self.models.find(ref)
        if model is None:
            raise ModelNotFoundError(
                f"{ref} is not on the disk of {self.hive_id}, or is no model file.",
                remedy=f"Pull it first: rbee models pull {ref}.",
            )
        return model

    async def _check_device(self, device: str | None, engine: str) -> None:
        if device is None:
            return
        devices = await asyncio.to_thread(self.machine.devices)
        names = [found.device for found in devices]
        if device not in names:
            raise InvalidRequestError(
                f"{self.hive_id} has no device `{device}`{nearest(device, names)}. It has: {', '.join(names)}.",
                param="device",
            )
        found = devices[names.index(device)]
        if engine == "llama_cpp" and not found.is_usable:
            raise InvalidRequestError(f"{device} of {self.hive_id} cannot be used: {found.note}", param="device")

    async def _check_memory(self, operation: WorkerSpawn, model: LocalModel) -> int:
        """Return about how many bytes the worker will take; refuse one that there is no room for on its device."""
        assert model.facts is not None
        memory, slots, context_tokens = model.facts.memory, operation.slots, operation.context_tokens
        needed = memory.needed_bytes(context_tokens, slots, operation.purpose)
        device = operation.device or "cpu"
        free = await self._memory_free(device)
        if free is not None and needed > free:
            on = "" if device == "cpu" else f" on {device}"
            raise NoCapacityError(
                f"{operation.model} with {slots} slots of {context_tokens} tokens needs {needed // 2**20} MiB; "
                f"{self.hive_id} has {free // 2**20} MiB of memory free{on}.",
                remedy="Ask for fewer slots or a shorter context, or stop another worker.",
            )
        return needed

    async def _memory_free(self, device: str) -> int | None:
        """Return how many bytes a device has free; None for one whose driver does not tell."""
        if device == "cpu":
            return self.machine.info().memory_free_bytes
        devices = await asyncio.to_thread(self.machine.devices)
        return next((one.memory_free_bytes for one in devices if one.device == device and one.memory_bytes), None)

    async def worker_stop(self, job: RunningJob) -> None:
        """Stop a worker; complete when nothing of it is left."""
        assert isinstance(job.operation, WorkerStop)
        worker_id = job.operation.worker_id
        with scope(worker_id=worker_id):
            narrate("hive_stop_worker", f"Stopping {worker_id}.")
            if job.is_resumed:
                await self.workers.stop_if_there(worker_id)
            else:
                await self.workers.stop(worker_id)
            narrate("hive_worker_stopped", f"{worker_id} and everything it started are gone.")

    async def hive_check(self, job: RunningJob) -> None:
        """Say as many sentences as were asked for."""
        assert isinstance(job.operation, HiveCheck)
        for number in range(1, job.operation.lines + 1):
            narrate("hive_check", f"Sentence {number} of {job.operation.lines}.", number=number)


def read_hive_id(home: Home) -> str:
    """Return this home's hive id, made at the first start."""
    path = home.root / "hive.id"
    try:
        return path.read_text("ascii").strip()
    except FileNotFoundError:
        from rbee.contracts.home import write_whole

        hive_id = new_id("hive")
        write_whole(path, hive_id.encode() + b"\n")
        return hive_id


def open_narration_file(home: Home, boot_id: str) -> int:
    """Open the file that this boot's narration is written to; the queen reads it like a worker's."""
    return os.open(home.hive / boot_id, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
