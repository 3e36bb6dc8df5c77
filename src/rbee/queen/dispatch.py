"""Giving jobs their place: who waits for what, which workers are being started, whose turn it is."""

from __future__ import annotations

import asyncio
import itertools

from rbee.contracts.ids import new_id
from rbee.contracts.models import parse_model_ref
from rbee.contracts.operations import ModelDownload, WorkerSpawn
from rbee.contracts.states import HiveState, Phase, WorkerState
from rbee.errors import HiveLostError, ModelNotFoundError, NoCapacityError, RbeeError, WorkerError
from rbee.jobs import RunningJob
from rbee.jobs.runner import narration_event
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.queen.hive_api import HiveApi
from rbee.queen.hives import Hive, HiveBook
from rbee.queen.scheduler import HiveSpot, Start, Use, Wait, WorkerSpot, place
from rbee.queen.settings import QueenSettings
from rbee.queen.workers import Placement, WorkerBook, WorkerExit

SETTLE_S = 5.0


class Ticket:
    """One job that waits for its place."""

    def __init__(self, job: RunningJob, model: str, order: int) -> None:
        self.job = job
        self.model = model
        self.key = (-job.record.priority, order)
        self.placement: Placement | None = None
        self.why = ""
        self.error: RbeeError | None = None
        self.wait: Wait | None = None
        self.starts: Start | None = None
        self.changed = asyncio.Event()


class Starting:
    """A worker that is being started, and the jobs that wait for it, the one it is started for first."""

    def __init__(self, hive_id: str, model: str, tickets: list[Ticket]) -> None:
        self.hive_id = hive_id
        self.model = model
        self.tickets = tickets
        self.worker_id: str | None = None
        self.task: asyncio.Task[None] | None = None

    def say(self, phase: Phase) -> None:
        """Take note of how far it is, for the jobs that wait."""
        for ticket in self.tickets:
            ticket.job.wanted_phase = phase
            ticket.changed.set()


class Dispatcher:
    """Decides with the scheduler, acts through the hives. One event loop owns it."""

    def __init__(self, settings: QueenSettings, book: HiveBook, workers: WorkerBook, hives: HiveApi) -> None:
        self._settings = settings
        self._book = book
        self._workers = workers
        self._hives = hives
        self._tickets: list[Ticket] = []
        self._starting: dict[tuple[str, str], Starting] = {}
        self._order = itertools.count()
        book.listen(self.pump)

    async def close(self) -> None:
        """Give up the starts that are under way."""
        tasks = [starting.task for starting in self._starting.values() if starting.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def inventory(self) -> tuple[HiveSpot, ...]:
        """Return what placement decides on: every hive as it is now, with this queen's own placements."""
        return tuple(self._spot(hive) for hive in self._book.hives())

    def _spot(self, hive: Hive) -> HiveSpot:
        beat = hive.heartbeat
        return HiveSpot(
            hive_id=hive.hive_id,
            is_live=self._book.state_of(hive) is HiveState.LIVE,
            silent_s=self._book.silent_s(hive),
            memory_free_bytes=beat.machine.memory_free_bytes,
            model_sizes={model.model: model.size_bytes for model in beat.models},
            starting=frozenset(model for hive_id, model in self._starting if hive_id == hive.hive_id),
            workers=tuple(
                WorkerSpot(
                    worker_id=worker.worker_id,
                    model=worker.info.model,
                    is_ready=worker.info.state is WorkerState.READY,
                    slots=worker.info.slots,
                    slots_used=self._workers.slots_used(worker.worker_id),
                )
                for worker in self._book.workers()
                if worker.hive.hive_id == hive.hive_id
                and worker.info.state in {WorkerState.STARTING, WorkerState.READY}
            ),
        )

    async def acquire(self, job: RunningJob, model: str) -> Placement:
        """Wait for a slot of a worker with `model`, starting one where that is needed, and make the job running.

        Give the slot back with `release`.

        Raises:
            NoCapacityError, HiveLostError: No hive could be reached in `hive_timeout_s`.
            RbeeError: What starting the worker failed with.
        """
        ticket = Ticket(job, model, next(self._order))
        self._tickets.append(ticket)
        self._tickets.sort(key=lambda waiting: waiting.key)
        try:
            forwarded_to = await self._wait_for_place(ticket)
            assert ticket.placement is not None
            await self._start_running(ticket, is_forwarded=forwarded_to == ticket.placement.worker_id)
        except BaseException:
            if ticket.placement is not None:
                self.release(ticket.placement)
            raise
        finally:
            self._leave(ticket)
        return ticket.placement

    def release(self, placement: Placement) -> None:
        """Give a slot back."""
        self._workers.remove(placement)
        self.pump()

    async def _wait_for_place(self, ticket: Ticket) -> str | None:
        """Wait until the ticket has a placement; returns the worker that was started for it."""
        loop = asyncio.get_running_loop()
        hive_deadline = loop.time() + self._settings.hive_timeout_s
        own: Starting | None = None
        said = ""
        self.pump()
        while ticket.placement is None:
            if ticket.error is not None:
                raise ticket.error
            if ticket.starts is not None and own is None:
                own = await self._begin_start(ticket, ticket.starts)
            elif ticket.wait is not None:
                if not ticket.wait.is_for_hive:
                    hive_deadline = loop.time() + self._settings.hive_timeout_s
                elif loop.time() >= hive_deadline:
                    raise self._no_hive(ticket.wait)
                said = await self._say_wait(ticket, ticket.wait, said)
            await self._say_phase(ticket)
            ticket.changed.clear()
            try:
                async with asyncio.timeout(1.0):
                    await ticket.changed.wait()
            except TimeoutError:
                self.pump()
        return own.worker_id if own else None

    async def _say_wait(self, ticket: Ticket, wait: Wait, said: str) -> str:
        reason = wait.why if not wait.is_for_hive else "no hive can be reached"
        if reason != said:
            await ticket.job.narrate("queen_wait", f"Waiting: {wait.why}.")
            if ticket.job.wanted_phase is None:
                ticket.job.wanted_phase = Phase.WAITING_FOR_SLOT
        return reason

    async def _say_phase(self, ticket: Ticket) -> None:
        phase = ticket.job.wanted_phase
        if phase is not None and phase != ticket.job.record.phase:
            await ticket.job.update(phase=phase)

    def _no_hive(self, wait: Wait) -> RbeeError:
        text = f"No hive could be reached for {self._settings.hive_timeout_s:g} s: {wait.why}."
        return HiveLostError(text) if self._book.hives() else NoCapacityError(text)

    async def _start_running(self, ticket: Ticket, *, is_forwarded: bool) -> None:
        """Commit the placement, before the worker is asked."""
        placement = ticket.placement
        assert placement is not None
        events = []
        line = compose(
            "queen_forward",
            f"Placed on {placement.worker_id} at {placement.hive_id}: {ticket.why}.",
            hive_id=placement.hive_id,
            worker_id=placement.worker_id,
            attempt=placement.attempt,
        )
        if not is_forwarded:
            events.append(narration_event(line))
        await ticket.job.start(
            hive_id=placement.hive_id, worker_id=placement.worker_id, phase=Phase.GENERATING, events=events
        )
        if not is_forwarded:
            emit(line)

    def pump(self) -> None:
        """Give every place that is free to the job whose turn it is."""
        for ticket in self._tickets:
            if ticket.placement is None and ticket.error is None:
                self._decide(ticket)

    def _decide(self, ticket: Ticket) -> None:
        decision = place(ticket.model, self.inventory())
        if isinstance(decision, Use):
            attempt = ticket.job.record.attempt + 1
            ticket.placement = self._workers.place(
                ticket.job.job_id, decision.worker_id, decision.hive_id, attempt
            )
            ticket.why = decision.why
            ticket.changed.set()
        elif ticket.starts is None:
            if isinstance(decision, Start):
                ticket.starts = decision
                ticket.wait = None
                self._starting[decision.hive_id, ticket.model] = Starting(decision.hive_id, ticket.model, [ticket])
            else:
                ticket.wait = decision
                self._join(ticket)
            ticket.changed.set()

    def _join(self, ticket: Ticket) -> None:
        """Let a job share the fate of a start that it waits for."""
        for starting in self._starting.values():
            is_begun = starting.task is not None
            if is_begun and starting.model == ticket.model and ticket not in starting.tickets:
                starting.tickets.append(ticket)

    def _leave(self, ticket: Ticket) -> None:
        self._tickets.remove(ticket)
        for starting in list(self._starting.values()):
            if ticket not in starting.tickets:
                continue
            starting.tickets.remove(ticket)
            if starting.task is None:  # it left before anything was begun: whoever is next decides anew
                del self._starting[starting.hive_id, starting.model]
            elif not starting.tickets and ticket.placement is None:
                starting.task.cancel()
        self.pump()

    async def _begin_start(self, ticket: Ticket, decision: Start) -> Starting:
        starting = self._starting[decision.hive_id, ticket.model]
        await ticket.job.narrate(
            "queen_forward",
            f"Placed on {decision.hive_id}, which starts a worker: {decision.why}.",
            hive_id=decision.hive_id,
        )
        starting.task = asyncio.get_running_loop().create_task(self._start(starting, ticket.job.job_id))
        return starting

    async def _start(self, starting: Starting, job_id: str) -> None:
        wanted = WorkerSpawn(
            model=starting.model, slots=self._settings.slots, context_tokens=self._settings.context_tokens
        )
        try:
            await self.start_worker(starting.hive_id, wanted, job_id, starting)
        except RbeeError as error:
            for ticket in starting.tickets:
                ticket.error = error
                ticket.changed.set()
        finally:
            self._starting.pop((starting.hive_id, starting.model), None)
            self.pump()

    async def start_worker(
        self, hive_id: str, wanted: WorkerSpawn, job_id: str, starting: Starting | None = None
    ) -> str:
        """Bring the model to a hive where it is missing, start a worker there and wait until it is ready.

        Args:
            hive_id: Where.
            wanted: With which model, slots and context.
            job_id: The job it is for; the start-up story goes to its log.
            starting: Who else waits for it.

        Raises:
            RbeeError: Why it could not be started.
        """
        with scope(job_id=job_id) as here:
            correlation_id = here.correlation_id or ""
            await self._bring_model(hive_id, wanted.model, job_id, correlation_id, starting)
            if starting is not None:
                starting.say(Phase.STARTING_WORKER)
            worker_id = wanted.worker_id or new_id("worker")
            if starting is not None:
                starting.worker_id = worker_id
            ended = await self._workers.add(worker_id, hive_id, wanted.model, job_id)
            spawn = WorkerSpawn(
                model=wanted.model,
                worker_id=worker_id,
                slots=wanted.slots,
                context_tokens=wanted.context_tokens,
                parent_job_id=job_id,
            )
            try:
                await self._hives.run(
                    hive_id, spawn, correlation_id=correlation_id, idempotency_key=f"{job_id}/{worker_id}/spawn"
                )
                await self._until_ready(worker_id, ended)
            except WorkerError:
                await asyncio.wait({ended}, timeout=SETTLE_S)  # so that the job's log has the worker's end first
                raise
            self._workers.started(worker_id)
            return worker_id

    async def _bring_model(
        self, hive_id: str, model: str, job_id: str, correlation_id: str, starting: Starting | None
    ) -> None:
        held = {found.model for found in self._book.hive(hive_id).heartbeat.models}
        if model in held or parse_model_ref(model).source == "file":
            return
        if self._settings.pull == "never":
            raise ModelNotFoundError(
                f"{hive_id} does not have {model}, and pull is set to never.",
                remedy=f"Pull it first: rbee models pull {model}.",
            )
        if starting is not None:
            starting.say(Phase.DOWNLOADING_MODEL)
        await self._hives.run(
            hive_id,
            ModelDownload(model=model, parent_job_id=job_id),
            correlation_id=correlation_id,
            idempotency_key=f"{job_id}/{new_id('job')}/download",
        )

    async def _until_ready(self, worker_id: str, ended: asyncio.Future[WorkerExit]) -> None:
        """Wait for the heartbeat that tells how to reach a worker its hive called ready."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.hive_timeout_s
        while not self._book.has_ready(worker_id):
            if ended.done():
                raise ended.result().error()
            if loop.time() >= deadline:
                raise HiveLostError(f"The hive of {worker_id} was silent after it had started it.")
            await self._book.changed(0.5)
