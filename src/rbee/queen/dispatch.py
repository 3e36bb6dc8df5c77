"""Giving jobs their place: who waits for what, which workers are being started, whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rbee.contracts.heartbeats import Purpose
from rbee.contracts.operations import WorkerSpawn
from rbee.contracts.states import HiveState, JobState, Phase, WorkerState
from rbee.errors import CrashLoopError, HiveLostError, NoCapacityError, RbeeError
from rbee.jobs import RunningJob
from rbee.jobs.endings import incident
from rbee.jobs.runner import narration_event
from rbee.narration import narrate
from rbee.narration.emit import compose, emit
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.hives import Hive, HiveBook
from rbee.queen.scheduler import Decision, HiveSpot, Refuse, Start, Use, Wait, WorkerSpot, can_take, place
from rbee.queen.settings import QueenSettings
from rbee.queen.starts import WorkerStarter
from rbee.queen.tickets import Starting, Ticket
from rbee.queen.turns import Turns
from rbee.queen.workers import Placement, WorkerBook

LOOK_AGAIN_S = 1.0


SayPlaced = Callable[[Placement], list[bytes]]
"""Composes what a job's log is told besides, in the transaction that commits a placement."""


class StartFailedError(Exception):
    """A worker that a job waited for could not be started; `cause` says why."""

    def __init__(self, cause: RbeeError) -> None:
        self.cause = cause
        super().__init__(cause.message)


class Dispatcher:
    """Decides with the scheduler, acts through the hives. One event loop owns it."""

    def __init__(
        self,
        settings: QueenSettings,
        book: HiveBook,
        workers: WorkerBook,
        starter: WorkerStarter,
        crash_loops: CrashLoops,
    ) -> None:
        self._settings = settings
        self._crash_loops = crash_loops
        self._book = book
        self._workers = workers
        self._starter = starter
        self._tickets: list[Ticket] = []
        self.turns = Turns(self._tickets)
        self._starting: dict[tuple[str, str, Purpose], Starting] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._pumped_at = 0.0
        book.listen(self.pump)

    async def close(self) -> None:
        """Give up the starts that are under way."""
        tasks = [starting.task for starting in self._starting.values() if starting.task is not None]
        tasks += self._ending
        for task in tasks:
            if not task.cancelling():  # else it is telling its hive
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def inventory(self, purpose: Purpose = "generate") -> tuple[HiveSpot, ...]:
        """Return what placement decides on: every hive as it is now, with its workers for one purpose."""
        return tuple(self._spot(hive, purpose) for hive in self._book.hives())

    def _spot(self, hive: Hive, purpose: Purpose) -> HiveSpot:
        beat = hive.heartbeat
        return HiveSpot(
            hive_id=hive.hive_id,
            is_live=self._book.state_of(hive) is HiveState.LIVE,
            silent_s=self._book.silent_s(hive),
            memory_free_bytes=beat.machine.memory_free_bytes,
            model_sizes={model.model: model.size_bytes for model in beat.models},
            starting=frozenset(
                model for hive_id, model, wanted in self._starting if (hive_id, wanted) == (hive.hive_id, purpose)
            ),
            refused=frozenset(self._crash_loops.refused(hive.hive_id)),
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
                and worker.info.purpose == purpose
                and worker.info.state in {WorkerState.STARTING, WorkerState.READY}
                and not self._workers.is_draining(worker.worker_id)
            ),
        )

    def can_move(self, model: str, hive_id: str) -> bool:
        """Tell whether a job for `model` has anywhere to go besides the hive that it is on."""
        return can_take(model, self.inventory(), without=hive_id)

    async def acquire(
        self,
        job: RunningJob,
        model: str,
        say: SayPlaced = lambda placement: [],
        *,
        purpose: Purpose = "generate",
    ) -> Placement:
        """Wait for a slot of a worker with `model`, starting one where that is needed, and make the job running.

        Give the slot back with `release`.

        Raises:
            NoCapacityError, HiveLostError: For `hive_timeout_s` no hive could be reached, or none had the memory.
            CrashLoopError: The model fails to start, on every hive that could take it.
            StartFailedError: The worker that it waited for could not be started.
        """
        ticket = Ticket(job, model, purpose)
        self._tickets.append(ticket)
        self._tickets.sort(key=lambda waiting: waiting.key)
        try:
            placement, started_id = await self._wait_for_place(ticket)
            is_forwarded = started_id == placement.worker_id
            await self._start_running(ticket, placement, say(placement), is_forwarded=is_forwarded)
        except BaseException:
            if ticket.placement is not None:
                self._workers.remove(ticket.placement)
            raise
        finally:
            self._leave(ticket)
        self._workers.ask_keep_alive(placement.worker_id, getattr(job.operation, "keep_alive", None))
        return placement

    def release(self, placement: Placement) -> None:
        """Give a slot back."""
        self._workers.remove(placement)
        self.pump()

    async def _wait_for_place(self, ticket: Ticket) -> tuple[Placement, str | None]:
        """Wait until the ticket has a placement; returns it, and the worker that was started for it."""
        loop = asyncio.get_running_loop()
        own: Starting | None = None
        needs_hive_since = loop.time()
        self.pump()
        while ticket.placement is None:
            ticket.changed.clear()
            if isinstance(ticket.error, CrashLoopError):
                raise ticket.error
            if ticket.error is not None:
                raise StartFailedError(ticket.error)
            starting, wait = ticket.starting, ticket.wait
            if starting is not None and starting.owner is ticket and starting.task is None:
                own = starting
                await self._begin(starting)
            if wait is None or not wait.needs_hive:
                needs_hive_since = loop.time()
            elif loop.time() - needs_hive_since >= self._settings.hive_timeout_s:
                raise self._no_hive(ticket.model, wait)
            if wait is not None:
                if ticket.job.wanted_phase is None:
                    ticket.job.wanted_phase = Phase.WAITING_FOR_SLOT
                if not ticket.told:
                    await self.turns.tell(ticket)
            await self._say_phase(ticket)
            try:
                async with asyncio.timeout(LOOK_AGAIN_S):
                    await ticket.changed.wait()
            except TimeoutError:
                if loop.time() - self._pumped_at >= LOOK_AGAIN_S:  # else somebody else has just looked
                    self.pump()
        return ticket.placement, own.worker_id if own else None

    async def _say_phase(self, ticket: Ticket) -> None:
        phase = ticket.job.wanted_phase
        if phase is not None and phase != ticket.job.record.phase:
            await ticket.job.update(phase=phase)

    def _no_hive(self, model: str, wait: Wait) -> RbeeError:
        text = f"No hive could take {model} for {self._settings.hive_timeout_s:g} s: {wait.why}."
        hives = self._book.hives()
        is_any_live = any(self._book.state_of(hive) is HiveState.LIVE for hive in hives)
        return HiveLostError(text) if hives and not is_any_live else NoCapacityError(text)

    async def _start_running(
        self, ticket: Ticket, placement: Placement, lines: list[bytes], *, is_forwarded: bool
    ) -> None:
        """Commit the placement, before the worker is asked."""
        if not is_forwarded:
            forward = compose(
                "queen_forward",
                f"Placed on {placement.worker_id} at {placement.hive_id}: {ticket.why}.",
                hive_id=placement.hive_id,
                worker_id=placement.worker_id,
                attempt=placement.attempt,
            )
            lines = [forward, *lines]
        await ticket.job.start(
            hive_id=placement.hive_id,
            worker_id=placement.worker_id,
            phase=Phase.GENERATING,
            events=[narration_event(line) for line in lines],
        )
        for line in lines:
            emit(line)

    # Deciding

    def pump(self) -> None:
        """Give every place that is free to the job whose turn it is."""
        self._pumped_at = asyncio.get_running_loop().time()
        self._leave_lost_starts()
        waits: dict[
            tuple[str, Purpose], Wait
        ] = {}  # what one job waits for, the next one of the same model waits for as well
        for ticket in self._tickets:
            if not ticket.is_waiting:
                continue
            asked = ticket.model, ticket.purpose
            decision = waits.get(asked) or place(ticket.model, self.inventory(ticket.purpose))
            if isinstance(decision, Wait):
                waits[asked] = decision
            if self._follow(ticket, decision):
                waits.clear()

    def _leave_lost_starts(self) -> None:
        """Give up the starts on hives that are lost, where the jobs that wait have another one to go to."""
        for starting in list(self._starting.values()):
            hive_id, model, _ = starting.key
            hive = next((hive for hive in self._book.hives() if hive.hive_id == hive_id), None)
            is_lost = hive is not None and self._book.state_of(hive) is HiveState.LOST
            if is_lost and self.can_move(model, hive_id):
                if starting.task is not None:
                    starting.task.cancel()
                    self._ending.add(starting.task)
                    starting.task.add_done_callback(self._ending.discard)
                self._end_start(starting, None)

    def _follow(self, ticket: Ticket, decision: Decision) -> bool:
        """Do what was decided for a ticket; tells whether that took a slot or began a start."""
        if isinstance(decision, Use):
            attempt = ticket.job.record.attempt + 1
            ticket.placement = self._workers.place(
                ticket.job.job_id, decision.worker_id, decision.hive_id, attempt, ticket.model
            )
            ticket.why = decision.why
            ticket.changed.set()
            return True
        if ticket.starting is not None and ticket.starting.owner is ticket:
            return False
        if isinstance(decision, Refuse):
            refusal = self._crash_loops.refusal(decision.hive_id, ticket.model)
            if refusal is not None:  # else its time is just over: the next look decides anew
                ticket.error = refusal.error()
                ticket.changed.set()
            return False
        if isinstance(decision, Start):
            if ticket.starting is not None:  # shared with another job; its hive fell silent, and here is one
                return False
            starting = ticket.starting = Starting(decision, ticket)
            self._starting[starting.key] = starting
            ticket.wait = None
            ticket.changed.set()
            return True
        if ticket.wait != decision:
            ticket.wait = decision
            ticket.changed.set()
        self._join(ticket)
        return False

    def _join(self, ticket: Ticket) -> None:
        """Let a job share the fate of the start that it waits for."""
        if ticket.starting is None:
            for starting in self._starting.values():
                if (starting.owner.model, starting.owner.purpose) == (ticket.model, ticket.purpose):
                    ticket.starting = starting
                    starting.tickets.append(ticket)
                    return

    def _leave(self, ticket: Ticket) -> None:
        """Take a ticket out; a start that it shared goes on for the others, and ends when there are none."""
        self._tickets.remove(ticket)
        starting = ticket.starting
        if starting is not None:
            ticket.starting = None
            starting.tickets.remove(ticket)
            if starting.task is None and starting.owner is ticket:  # never begun: the others decide anew
                self._end_start(starting, None)
            elif not starting.tickets and ticket.placement is None and starting.task is not None:
                starting.task.cancel()
        self.pump()

    # Starting

    async def _begin(self, starting: Starting) -> None:
        """Say where the worker is started, then start it."""
        job, decision = starting.owner.job, starting.decision
        line = compose(
            "queen_forward",
            f"Placed on {decision.hive_id}, which starts a worker: {decision.why}.",
            hive_id=decision.hive_id,
        )
        is_placed = job.record.state is JobState.RUNNING  # elsewhere, until it is placed again
        await job.update(hive_id=None if is_placed else decision.hive_id, events=[narration_event(line)])
        emit(line)
        is_wanted = self._starting.get(starting.key) is starting
        if is_wanted and starting.owner.placement is None:  # else a slot became free meanwhile
            starting.task = asyncio.get_running_loop().create_task(self._start(starting))

    async def _start(self, starting: Starting) -> None:
        wanted = WorkerSpawn(
            model=starting.owner.model,
            worker_id=starting.worker_id,
            purpose=starting.owner.purpose,
            slots=self._settings.slots,
            context_tokens=self._settings.context_tokens,
        )
        failure: RbeeError | None = None
        try:
            await self._starter.start(
                starting.decision.hive_id,
                wanted,
                starting.owner.job.job_id,
                say=starting.say,
                waiting=starting.waiting,
            )
        except Exception as error:  # noqa: BLE001  # raised in the task of each job that waits
            failure = error if isinstance(error, RbeeError) else incident(error, "the start of a worker")
            if not starting.tickets:
                narrate("queen_start_failed", f"A worker could not be started: {error}", level="error")
        finally:
            self._end_start(starting, failure)
            self.pump()

    def _end_start(self, starting: Starting, failure: RbeeError | None) -> None:
        if self._starting.get(starting.key) is starting:
            del self._starting[starting.key]
        tickets, starting.tickets = starting.tickets, []
        for ticket in tickets:
            ticket.starting = None
            ticket.error = failure
            ticket.changed.set()
