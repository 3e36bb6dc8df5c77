"""Giving jobs their place: who waits for what, and whose turn it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec

from rbee.contracts.engine_settings import BUILT_IN
from rbee.contracts.heartbeats import Purpose
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.states import HiveState, Phase
from rbee.errors import CrashLoopError, HiveLostError, NoCapacityError, RbeeError
from rbee.jobs import RunningJob
from rbee.jobs.runner import narration_event
from rbee.narration.emit import compose, emit
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.decisions import Decision, Refuse, Start, Use, Wait, Wanted
from rbee.queen.fleet import Fleet
from rbee.queen.hives import HiveBook
from rbee.queen.inventory import Inventory, Kind
from rbee.queen.launches import Launches
from rbee.queen.making_room import Evict, RoomMaker
from rbee.queen.round import Round
from rbee.queen.scheduler import can_take
from rbee.queen.settings import QueenSettings
from rbee.queen.starts import WorkerStarter
from rbee.queen.tickets import Starting, Ticket
from rbee.queen.turns import Turns
from rbee.queen.workers import Placement, WorkerBook

LOOK_AGAIN_S = 1.0
# After a look at all who wait that took longer than this, the next one comes after so many times as long. Each
# heartbeat is worth a look, and of a thousand hives there is one every millisecond.
LONG_S = 0.0002
REST_FACTOR = 4.0

SayPlaced = Callable[[Placement], list[bytes]]
"""Composes what a job's log is told besides, in the transaction that commits a placement."""


class StartFailedError(Exception):
    """A worker that a job waited for could not be started; `cause` says why."""

    def __init__(self, cause: RbeeError) -> None:
        self.cause = cause
        super().__init__(cause.message)


class Dispatcher:
    """Decides with the scheduler, acts through the hives. One event loop owns it.

    Args:
        settings: The queen's.
        models: What is configured for single models.
        book: The hives.
        workers: What is placed on their workers.
        starter: Starts workers.
        crash_loops: Which models are not started where.
        evict: Stops a worker to make room.
    """

    def __init__(
        self,
        settings: QueenSettings,
        models: ModelTable,
        book: HiveBook,
        workers: WorkerBook,
        starter: WorkerStarter,
        crash_loops: CrashLoops,
        evict: Evict,
    ) -> None:
        self._settings = settings
        self._models = models
        self._crash_loops = crash_loops
        self._book = book
        self._workers = workers
        self._fleet = Fleet(settings, models, book, workers, crash_loops)
        self.launches = Launches(
            book, self._fleet, starter, RoomMaker(book, workers, self._fleet, evict), crash_loops
        )
        self.launches.on_change = self.pump
        self._tickets: list[Ticket] = []
        self.turns = Turns(self._tickets)
        self._pumped_at = 0.0
        self._rest_until = 0.0
        self._next_pump: asyncio.TimerHandle | None = None
        book.listen(lambda hive_id: self._look())

    async def close(self) -> None:
        """Give up the starts that are under way."""
        self._forget_next_pump()
        await self.launches.close()

    def inventory(self) -> Inventory:
        """Return what placement decides on: every hive as it is now, with this queen's own placements."""
        return self._fleet.inventory()

    def wanted(self, model: str, purpose: Purpose = "generate", hive_id: str | None = None) -> Wanted:
        """Return what a job for a model needs, as it is configured."""
        own = self._models.of(model)
        return Wanted(
            Kind(model, own.purpose or purpose, own.engine or BUILT_IN),
            slots=own.slots or self._settings.slots,
            context_tokens=own.context_tokens or self._settings.context_tokens,
            device=own.device,
            workers_max=own.workers_max,
            hive_id=hive_id,
            is_any_engine=own.engine is None,
        )

    def can_move(self, model: str, hive_id: str, purpose: Purpose = "generate") -> bool:
        """Tell whether a job for `model` has anywhere to go besides the hive that it is on."""
        return can_take(self.wanted(model, purpose), self.inventory(), self._book.now(), without=hive_id)

    def positions(self) -> Mapping[str, int]:
        """Return the turn of each job that is queued, 1 for the next."""
        return self.turns.positions()

    async def acquire(
        self,
        job: RunningJob,
        model: str,
        say: SayPlaced = lambda placement: [],
        *,
        purpose: Purpose = "generate",
        goes_on: bool = False,
        is_relayed: bool = False,
    ) -> Placement:
        """Wait for a slot of a worker with `model`, starting one where that is needed, and make the job running.

        Give the slot back with `release`. With `goes_on`, a worker that can go on with an answer is preferred.
        With `is_relayed`, it is given while the commit is on its way (`Placement.committed`).

        Raises:
            NoCapacityError, HiveLostError: For `hive_timeout_s` no hive could be reached, or none had the memory.
            CrashLoopError: The model fails to start, on every hive that could take it.
            StartFailedError: The worker that it waited for could not be started.
        """
        hive_id = getattr(job.operation, "hive_id", None)
        wanted = msgspec.structs.replace(self.wanted(model, purpose, hive_id), goes_on=goes_on)
        ticket = Ticket(job, wanted, self._book.now())
        self._tickets.append(ticket)
        self._tickets.sort(key=lambda waiting: waiting.key)
        try:
            placement, started_id = await self._wait_for_place(ticket)
            is_forwarded = started_id == placement.worker_id
            starting = self._start_running(ticket, placement, say(placement), is_forwarded=is_forwarded)
            if is_relayed:
                placement.committed = asyncio.ensure_future(starting)
            else:
                await starting
        except BaseException:
            if ticket.placement is not None:
                self._workers.remove(ticket.placement)
            raise
        finally:
            self._leave(ticket)
        return placement

    def release(self, placement: Placement) -> None:
        """Give a slot back."""
        self._workers.remove(placement)
        self._look()

    async def _wait_for_place(self, ticket: Ticket) -> tuple[Placement, str | None]:
        """Wait until the ticket has a placement; returns it, and the worker that was started for it."""
        loop = asyncio.get_running_loop()
        own: Starting | None = None
        needs_hive_since = loop.time()
        self._look()
        while ticket.placement is None:
            ticket.changed.clear()
            if isinstance(ticket.error, CrashLoopError):
                raise ticket.error
            if ticket.error is not None:
                raise StartFailedError(ticket.error)
            starting, wait = ticket.starting, ticket.wait
            if starting is not None and starting.owner is ticket and starting.task is None:
                own = starting
                await self.launches.begin(starting)
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
        message = f"Placed on {placement.worker_id} at {placement.hive_id}: {ticket.why}."
        if not is_forwarded:
            forward = compose(
                "queen_forward",
                message,
                hive_id=placement.hive_id,
                worker_id=placement.worker_id,
                attempt=placement.attempt,
            )
            lines = [forward, *lines]
        await ticket.job.start(
            hive_id=placement.hive_id,
            worker_id=placement.worker_id,
            phase=Phase.GENERATING,
            message=None if is_forwarded else message,
            events=[narration_event(line) for line in lines],
        )
        for line in lines:
            emit(line)

    # Deciding

    def _look(self) -> None:
        """Pump now; in a moment where a look takes so long that one for every change would take all the time."""
        rest_s = self._rest_until - self._book.now()
        if rest_s <= 0:
            self.pump()
        elif self._next_pump is None:
            self._next_pump = asyncio.get_running_loop().call_later(rest_s, self.pump)

    def pump(self) -> None:
        """Give every place that is free to the job whose turn it is."""
        self._forget_next_pump()
        began_at = self._book.now()
        self._pumped_at = asyncio.get_running_loop().time()
        self._leave_lost_starts()
        looking = Round(began_at)
        for ticket in self._tickets:
            if ticket.is_waiting:
                decision = looking.decide(ticket.wanted, began_at - ticket.since, self.inventory())
                self._follow(ticket, decision)
        ended_at = self._book.now()
        if ended_at - began_at > LONG_S:
            self._rest_until = ended_at + REST_FACTOR * (ended_at - began_at)

    def _forget_next_pump(self) -> None:
        if self._next_pump is not None:
            self._next_pump.cancel()
            self._next_pump = None

    def _leave_lost_starts(self) -> None:
        """Give up the starts on hives that are lost, where the jobs that wait have another one to go to."""
        for starting in list(self.launches.under_way.values()):
            hive_id = starting.decision.hive_id
            is_lost = self._book.state_of(self._book.hive(hive_id)) is HiveState.LOST
            if is_lost and self.can_move(starting.model, hive_id, starting.owner.wanted.kind.purpose):
                self.launches.abandon(starting)

    def _follow(self, ticket: Ticket, decision: Decision) -> None:
        """Do what was decided for a ticket."""
        if isinstance(decision, Use):
            attempt = ticket.job.record.attempt + 1
            ticket.placement = self._workers.place(
                ticket.job.job_id,
                decision.worker_id,
                decision.hive_id,
                attempt,
                ticket.model,
                ticket.wanted.kind.purpose,
            )
            ticket.why = f"{decision.why}; {ticket.made_room}" if ticket.made_room else decision.why
            ticket.changed.set()
            return
        if ticket.starting is not None and ticket.starting.owner is ticket:
            return
        if isinstance(decision, Refuse):
            refusal = self._crash_loops.refusal(decision.hive_id, ticket.model)
            if refusal is not None:  # else its time is just over: the next look decides anew
                ticket.error = refusal.error()
                ticket.changed.set()
        elif isinstance(decision, Start):
            # One that shares a start whose hive fell silent stays with it: that hive may be back.
            if ticket.starting is None and self.launches.open(decision, ticket):
                ticket.wait = None
                ticket.changed.set()
        else:
            self._wait(ticket, decision)

    def _wait(self, ticket: Ticket, decision: Wait) -> None:
        if ticket.wait != decision:
            ticket.wait = decision
            ticket.changed.set()
        if ticket.starting is None:
            self.launches.join(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Take a ticket out."""
        self._tickets.remove(ticket)
        self.launches.leave(ticket)
        self._look()
