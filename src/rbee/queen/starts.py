"""Starting workers: the model is brought, the hive is asked, and its heartbeat says when the worker is ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from rbee.contracts.ids import new_id
from rbee.contracts.models import parse_model_ref
from rbee.contracts.operations import ModelDownload, WorkerSpawn
from rbee.contracts.states import Phase
from rbee.errors import HiveLostError, ModelInvalidError, ModelNotFoundError, RbeeError, WorkerError
from rbee.narration import scope
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.hive_api import HiveApi
from rbee.queen.hives import HiveBook
from rbee.queen.settings import QueenSettings
from rbee.queen.worker_exits import WorkerExit
from rbee.queen.workers import WorkerBook

SETTLE_S = 5.0

Say = Callable[[Phase], None]
Waiting = Callable[[], list[str]]


class WorkerStarter:
    """Starts workers on hives, one call a worker."""

    def __init__(
        self,
        settings: QueenSettings,
        book: HiveBook,
        workers: WorkerBook,
        hives: HiveApi,
        crash_loops: CrashLoops,
    ) -> None:
        self._settings = settings
        self._crash_loops = crash_loops
        self._book = book
        self._workers = workers
        self._hives = hives

    async def start(
        self,
        hive_id: str,
        wanted: WorkerSpawn,
        job_id: str,
        *,
        say: Say = lambda phase: None,
        waiting: Waiting = list,
    ) -> str:
        """Bring the model to a hive where it is missing, start a worker there and wait until it is ready.

        Cancelled, it cancels what the hive does about it.

        Args:
            hive_id: Where.
            wanted: With which model, slots and context.
            job_id: The job it is for; the start-up story goes to its log.
            say: Told how far it is.
            waiting: Tells which other jobs wait for it, so that they hear of its end.

        Raises:
            CrashLoopError: The model failed to start there too often.
            RbeeError: Why it could not be started.
        """
        if refusal := self._crash_loops.refusal(hive_id, wanted.model):
            raise refusal.error()
        with scope(job_id=job_id) as here:
            correlation_id = here.correlation_id or ""
            if wanted.engine not in self._book.hive(hive_id).heartbeat.fetching_engines:
                await self._bring_model(hive_id, wanted.model, job_id, correlation_id, say)
            say(Phase.STARTING_WORKER)
            worker_id = wanted.worker_id or new_id("worker")
            ended = await self._workers.add(worker_id, hive_id, wanted.model, job_id, waiting)
            spawn = msgspec.structs.replace(
                wanted, worker_id=worker_id, hive_id=None, parent_job_id=job_id, timeout_s=None, store=True
            )
            try:
                await self._hives.run(
                    hive_id,
                    spawn,
                    job_id=job_id,
                    correlation_id=correlation_id,
                    idempotency_key=f"{job_id}/{worker_id}/spawn",
                )
                await self._until_ready(worker_id, hive_id, ended)
            except RbeeError as error:
                if _is_crash(error):
                    last_lines = error.details.get("last_lines") or []
                    self._crash_loops.failed(hive_id, wanted.model, last_lines)
                await self._give_up(worker_id, ended, error)
                raise
            except asyncio.CancelledError:
                self._workers.started(worker_id)
                raise
            self._crash_loops.started(hive_id, wanted.model)
            self._workers.started(worker_id)
            self._workers.ask_keep_alive(worker_id, wanted.keep_alive)
            return worker_id

    async def _give_up(self, worker_id: str, ended: asyncio.Future[WorkerExit], error: RbeeError) -> None:
        """Wait for the end of a worker that came to be, so that the job's log tells it first; forget another."""
        if error.details.get("worker_id") == worker_id:
            await asyncio.wait({ended}, timeout=SETTLE_S)
            self._workers.started(worker_id)
        elif isinstance(error, HiveLostError):
            self._workers.started(worker_id)  # it may be there all the same; its end is told when it comes
        else:
            await self._workers.forget(worker_id)

    async def _bring_model(self, hive_id: str, model: str, job_id: str, correlation_id: str, say: Say) -> None:
        held = {found.model for found in self._book.hive(hive_id).heartbeat.models}
        if model in held or parse_model_ref(model).source == "file":
            return
        if self._settings.pull == "never":
            raise ModelNotFoundError(
                f"{hive_id} does not have {model}, and pull is set to never.",
                remedy=f"Pull it first: rbee models pull {model}.",
            )
        say(Phase.DOWNLOADING_MODEL)
        await self._hives.run(
            hive_id,
            ModelDownload(model=model, parent_job_id=job_id),
            job_id=job_id,
            correlation_id=correlation_id,
            idempotency_key=f"{job_id}/{new_id('job')}/download",
        )

    async def _until_ready(self, worker_id: str, hive_id: str, ended: asyncio.Future[WorkerExit]) -> None:
        """Wait for the heartbeat that tells how to reach a worker its hive called ready."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.hive_timeout_s
        while not self._book.has_ready(worker_id, hive_id):
            if ended.done():
                raise ended.result().error()
            if loop.time() >= deadline:
                raise HiveLostError(f"The hive of {worker_id} was silent after it had started it.")
            await self._book.news_of(hive_id, 0.5)


def _is_crash(error: RbeeError) -> bool:
    """Tell whether a worker failed by itself: not stopped, and not gone while its hive was away."""
    if isinstance(error, ModelInvalidError):
        return True
    exit_code, signal = error.details.get("exit_code"), error.details.get("signal")
    return isinstance(error, WorkerError) and (bool(exit_code) or signal not in (None, "SIGTERM"))
