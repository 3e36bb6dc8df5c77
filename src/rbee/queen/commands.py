"""The operations besides answering: workers and models of hives, and the checks."""

from __future__ import annotations

from typing import Any

import msgspec

from rbee.contracts.ids import new_id
from rbee.contracts.operations import (
    HiveCheck,
    ModelDelete,
    ModelDownload,
    Operation,
    QueenCheck,
    WorkerSpawn,
    WorkerStop,
)
from rbee.contracts.states import HiveState, Phase
from rbee.errors import InvalidRequestError, NoCapacityError
from rbee.jobs import RunningJob
from rbee.jobs.runner import Handler
from rbee.queen.dispatch import Dispatcher
from rbee.queen.hive_api import HiveApi
from rbee.queen.hives import Hive, HiveBook
from rbee.queen.reasons import why_no_hive
from rbee.queen.starts import WorkerStarter
from rbee.queen.workers import WorkerBook


class Commands:
    """Runs the operations that a person gives about hives."""

    def __init__(
        self,
        book: HiveBook,
        workers: WorkerBook,
        hives: HiveApi,
        dispatcher: Dispatcher,
        starter: WorkerStarter,
    ) -> None:
        self._book = book
        self._workers = workers
        self._hives = hives
        self._dispatcher = dispatcher
        self._starter = starter

    def handlers(self) -> dict[type[Operation], Handler]:
        """Return the handlers by operation."""
        return {
            QueenCheck: self.queen_check,
            HiveCheck: self.on_hive,
            WorkerSpawn: self.worker_spawn,
            WorkerStop: self.worker_stop,
            ModelDownload: self.on_hive,
            ModelDelete: self.on_hive,
        }

    async def queen_check(self, job: RunningJob) -> None:
        """Say as many sentences as were asked for."""
        assert isinstance(job.operation, QueenCheck)
        await job.start()
        for number in range(1, job.operation.lines + 1):
            await job.narrate("queen_check", f"Sentence {number} of {job.operation.lines}.", number=number)

    async def on_hive(self, job: RunningJob) -> dict[str, Any]:
        """Hand the operation to a hive and wait for its end there."""
        operation = job.operation
        assert isinstance(operation, (HiveCheck, ModelDownload, ModelDelete))
        if isinstance(operation, (ModelDownload, ModelDelete)):  # what an alias stands for
            operation = msgspec.structs.replace(operation, model=job.record.model or operation.model)
        phase = Phase.DOWNLOADING_MODEL if isinstance(operation, ModelDownload) else None
        hive_id = operation.hive_id
        if hive_id is None and isinstance(operation, ModelDelete):
            hive_id = self._holder(operation.model)
        return await self._forward(job, self._choose(hive_id).hive_id, operation, phase)

    def _holder(self, model: str) -> str | None:
        """Return the one hive that has a model, whole or not; None where none has.

        Raises:
            InvalidRequestError: Several have it.
        """
        holders = [hive.hive_id for hive in self._book.hives() if model in _models_of(hive)]
        if len(holders) > 1:
            raise InvalidRequestError(
                f"Several hives have {model}: {', '.join(holders)}.",
                remedy="Name one of them (--hive).",
                param="hive_id",
            )
        return holders[0] if holders else None

    async def worker_stop(self, job: RunningJob) -> dict[str, Any]:
        """Place nothing more on a worker, give its answers `drain_s`, then let its hive stop it.

        It is placed on again only where it could not be stopped: a heartbeat may name it for a moment yet.
        """
        operation = job.operation
        assert isinstance(operation, WorkerStop)
        worker_id = operation.worker_id
        try:
            hive_id = self._book.worker(worker_id).hive.hive_id
            self._workers.drain(worker_id)
            await self._say_forward(job, hive_id)
            await job.start(hive_id=hive_id, worker_id=worker_id, phase=Phase.STOPPING)
            if slots_used := self._workers.slots_used(worker_id):
                answers = "one answer" if slots_used == 1 else f"{slots_used} answers"
                wait = f"Waiting up to {operation.drain_s:g} s for {answers} of {worker_id}."
                await job.narrate("queen_drain", wait, worker_id=worker_id, slots_used=slots_used)
                await self._workers.until_free(worker_id, operation.drain_s)
            return await self._run(job, hive_id, operation)
        except BaseException:
            self._workers.undrain(worker_id)
            raise
        finally:
            self._dispatcher.pump()

    async def worker_spawn(self, job: RunningJob) -> dict[str, Any]:
        """Start a worker where there is room for it: on the hive that was named, or on any.

        A hive that was named and is silent is waited for.
        """
        operation = job.operation
        assert isinstance(operation, WorkerSpawn)
        model = job.record.model or operation.model  # what an alias stands for
        operation = msgspec.structs.replace(operation, model=model)
        hive_id = operation.hive_id
        if hive_id is None or self._book.state_of(self._book.hive(hive_id)) is HiveState.LIVE:
            return dict(await self._dispatcher.launches.spawn(job, operation))
        await self._say_forward(job, hive_id)
        await job.start(hive_id=hive_id, phase=Phase.STARTING_WORKER)
        wanted = msgspec.structs.replace(operation, worker_id=new_id("worker"))
        worker_id = await self._starter.start(hive_id, wanted, job.job_id)
        return {"worker_id": worker_id, "hive_id": hive_id}

    async def _forward(
        self, job: RunningJob, hive_id: str, operation: Operation, phase: Phase | None
    ) -> dict[str, Any]:
        await self._say_forward(job, hive_id)
        await job.start(hive_id=hive_id, phase=phase)
        return await self._run(job, hive_id, operation)

    async def _run(self, job: RunningJob, hive_id: str, operation: Operation) -> dict[str, Any]:
        wanted = msgspec.structs.replace(  # its deadlines are watched here
            operation, parent_job_id=job.job_id, timeout_s=None, queue_timeout_s=None, store=True
        )
        return await self._hives.run(
            hive_id,
            wanted,
            job_id=job.job_id,
            correlation_id=job.record.correlation_id,
            idempotency_key=f"{job.job_id}/{job.record.attempt}/{job.record.operation}",
        )

    async def _say_forward(self, job: RunningJob, hive_id: str) -> None:
        await job.narrate("queen_forward", f"Handed to {hive_id}.", hive_id=hive_id)

    def _choose(self, hive_id: str | None) -> Hive:
        """Return the hive that was named, or the live one with the most free memory.

        Raises:
            NotFoundError: No hive of that name has registered.
            NoCapacityError: None is live.
        """
        if hive_id is not None:
            return self._book.hive(hive_id)
        live = [hive for hive in self._book.hives() if self._book.state_of(hive) is HiveState.LIVE]
        if not live:
            hives = list(self._dispatcher.inventory().hives.values())
            raise NoCapacityError(f"No hive can be reached: {why_no_hive(hives, self._book.now())}.")
        return max(live, key=lambda hive: hive.heartbeat.machine.memory_free_bytes)


def _models_of(hive: Hive) -> set[str]:
    beat = hive.heartbeat
    return {found.model for found in beat.models} | {found.model for found in beat.unusable_models}
