"""The workers that are being started: for jobs that wait, which share how it ends, or because somebody asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from rbee.contracts.ids import new_id
from rbee.contracts.operations import WorkerSpawn
from rbee.contracts.states import JobState, Phase
from rbee.contracts.strict import nearest
from rbee.errors import CrashLoopError, InvalidRequestError, NoCapacityError, RbeeError
from rbee.jobs import RunningJob
from rbee.jobs.endings import incident
from rbee.jobs.runner import narration_event
from rbee.narration import narrate
from rbee.narration.emit import compose, emit
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.decisions import Refuse, Start, Wanted
from rbee.queen.fleet import Fleet
from rbee.queen.hives import HiveBook
from rbee.queen.inventory import Inventory, Kind, StartSpot
from rbee.queen.making_room import RoomMaker, Stops
from rbee.queen.scheduler import place
from rbee.queen.starts import WorkerStarter
from rbee.queen.tickets import Starting, Ticket

# How long another worker of a model is not tried for again after it could not be started.
REST_S = 60.0
MAKE_ROOM_MAX = 8
# So often a job whose hive had no room for its worker after all is placed anew, once that hive was heard again.
REFUSALS_MAX = 3
NEWS_S = 10.0


class Launches:
    """Starts workers. One event loop owns it.

    Attributes:
        under_way: The starts that jobs wait for, by worker.
        on_change: Called when one has ended: what it kept is there for others.
    """

    def __init__(
        self, book: HiveBook, fleet: Fleet, starter: WorkerStarter, room_maker: RoomMaker, crash_loops: CrashLoops
    ) -> None:
        self._book = book
        self._fleet = fleet
        self._starter = starter
        self._room_maker = room_maker
        self._crash_loops = crash_loops
        self.under_way: dict[str, Starting] = {}
        self.on_change: Callable[[], None] = lambda: None
        self._ending: set[asyncio.Task[None]] = set()
        self._resting: dict[Kind, float] = {}

    async def close(self) -> None:
        """Give up the starts that are under way."""
        tasks = [starting.task for starting in self.under_way.values() if starting.task is not None]
        tasks += self._ending
        for task in tasks:
            if not task.cancelling():  # else it is telling its hive
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._room_maker.close()

    # For jobs that wait

    def open(self, decision: Start, ticket: Ticket) -> bool:
        """Keep what was decided for a ticket, whose own task begins it; false where it is not worth trying now."""
        if decision.is_additional and self._resting.get(ticket.wanted.kind, 0.0) > self._book.now():
            return False
        starting = ticket.starting = Starting(decision, ticket)
        self.under_way[starting.worker_id] = starting
        self._reserve(decision, starting.worker_id, ticket.wanted)
        return True

    def _reserve(self, decision: Start, worker_id: str, wanted: Wanted) -> None:
        spot = StartSpot(
            worker_id=worker_id, kind=wanted.kind, device=decision.room, memory_bytes=decision.memory_bytes
        )
        self._fleet.add_start(decision.hive_id, spot)
        self._room_maker.reserve(decision)

    def join(self, ticket: Ticket) -> None:
        """Let a job share the fate of the first start that it waits for."""
        for starting in self.under_way.values():
            if starting.owner.wanted.kind == ticket.wanted.kind and not starting.decision.is_additional:
                ticket.starting = starting
                starting.tickets.append(ticket)
                return

    async def begin(self, starting: Starting) -> None:
        """Say where the worker is started, or what makes room for it first, then do it."""
        ticket, decision = starting.owner, starting.decision
        if decision.evict:
            lines = self._room_maker.lines(decision, starting.model)
            message = decision.why
        else:
            why = f"{decision.why}; {ticket.made_room}" if ticket.made_room else decision.why
            message = f"Placed on {decision.hive_id}, which starts a worker: {why}."
            lines = [compose("queen_forward", message, hive_id=decision.hive_id)]
        is_placed = ticket.job.record.state is JobState.RUNNING  # elsewhere, until it is placed again
        await ticket.job.update(
            hive_id=None if is_placed or decision.evict else decision.hive_id,
            message=message,
            events=[narration_event(line) for line in lines],
        )
        for line in lines:
            emit(line)
        is_wanted = self.under_way.get(starting.worker_id) is starting
        if is_wanted and ticket.placement is None:  # else a slot became free meanwhile
            stops = self._room_maker.begin(decision, starting.model)
            starting.task = asyncio.get_running_loop().create_task(self._do(starting, stops))
            starting.task.add_done_callback(lambda task: self._done(starting))

    def _done(self, starting: Starting) -> None:
        """End a start that was cancelled before it had taken its first step."""
        if starting.worker_id in self.under_way:
            self.end(starting, None)
            self.on_change()

    async def _do(self, starting: Starting, stops: Stops) -> None:
        decision = starting.decision
        failure: RbeeError | None = None
        try:
            if decision.evict:
                starting.say(Phase.WAITING_FOR_SLOT)
                starting.owner.made_room = self._room_maker.told(decision)
                await self._room_maker.finish(decision, stops)
            else:
                await self._start(starting)
        except Exception as error:  # noqa: BLE001  # raised in the task of each job that waits
            failure = error if isinstance(error, RbeeError) else incident(error, "the start of a worker")
            if await self._is_refused(starting, failure):
                failure = None
            elif not starting.tickets or decision.is_additional:
                narrate("queen_start_failed", f"A worker could not be started: {error}", level="error")
            if (
                failure is not None and decision.is_additional
            ):  # its model has workers, so nobody fails for want of one more
                self._resting[starting.owner.wanted.kind] = self._book.now() + REST_S
                failure = None
        finally:
            self.end(starting, failure)
            self.on_change()

    async def _is_refused(self, starting: Starting, failure: RbeeError) -> bool:
        """Tell whether a hive has no room after all, so that it is decided anew by what it says next.

        What it measures may have changed since its last heartbeat, and what a model takes that was fetched only
        now nobody knew before.
        """
        owner, hive_id = starting.owner, starting.decision.hive_id
        is_full = isinstance(failure, NoCapacityError) and not isinstance(failure, CrashLoopError)
        if not is_full or starting.decision.is_additional or owner.refusals >= REFUSALS_MAX:
            return False
        owner.refusals += 1
        owner.made_room = f"{hive_id} had no room before: {failure.message.rstrip('.')}"
        await self._book.news_of(hive_id, NEWS_S)
        return True

    async def _start(self, starting: Starting) -> None:
        decision, wanted = starting.decision, starting.owner.wanted
        spawn = WorkerSpawn(
            model=wanted.model,
            worker_id=starting.worker_id,
            engine=wanted.kind.engine,
            purpose=wanted.kind.purpose,
            slots=decision.slots,
            context_tokens=decision.context_tokens,
            device=decision.device,
        )
        await self._starter.start(
            decision.hive_id,
            spawn,
            starting.owner.job.job_id,
            say=starting.say,
            waiting=starting.waiting,
        )

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket out of its start, which goes on for the others, and ends when there are none."""
        starting = ticket.starting
        if starting is None:
            return
        ticket.starting = None
        starting.tickets.remove(ticket)
        if starting.task is None and starting.owner is ticket:  # never begun: the others decide anew
            self._room_maker.let_be(starting.decision)
            self.end(starting, None)
        elif not starting.tickets and ticket.placement is None and starting.task is not None:
            starting.task.cancel()

    def abandon(self, starting: Starting) -> None:
        """Give a start up whose jobs go elsewhere."""
        if starting.task is None:
            self._room_maker.let_be(starting.decision)
        else:
            starting.task.cancel()
            self._ending.add(starting.task)
            starting.task.add_done_callback(self._ending.discard)
        self.end(starting, None)

    def end(self, starting: Starting, failure: RbeeError | None) -> None:
        """Let all jobs that wait for a start go on, or fail with it."""
        if self.under_way.get(starting.worker_id) is starting:
            del self.under_way[starting.worker_id]
            self._fleet.remove_start(starting.decision.hive_id, starting.worker_id)
        tickets, starting.tickets = starting.tickets, []
        for ticket in tickets:
            ticket.starting = None
            ticket.error = failure
            ticket.changed.set()

    # Because somebody asked

    async def spawn(self, job: RunningJob, operation: WorkerSpawn) -> dict[str, str]:
        """Start a worker as an operation asks for it, where there is room.

        Returns:
            `worker_id` and `hive_id`.

        Raises:
            NoCapacityError: There is no room, also none that idle workers could make.
            InvalidRequestError: No hive has the engine or the device that it names.
            CrashLoopError: The model fails to start wherever it fits.
            RbeeError: Why it could not be started.
        """
        made_room = ""
        refusals = 0
        for _ in range(MAKE_ROOM_MAX):
            start = self._decided(operation)
            if start.evict:
                made_room = f"; {self._room_maker.told(start)}"
                await self._make_room(job, operation, start)
                continue
            try:
                return await self._spawn(job, operation, start, made_room)
            except NoCapacityError as refusal:  # as for jobs that wait: see `_is_refused`
                refusals += 1
                if isinstance(refusal, CrashLoopError) or refusals > REFUSALS_MAX:
                    raise
            await self._book.news_of(start.hive_id, NEWS_S)
        raise NoCapacityError(f"The room that was made for {operation.model} was taken by others again and again.")

    def _decided(self, operation: WorkerSpawn) -> Start:
        inventory = self._fleet.inventory()
        decision = place(wanted_by(operation), inventory, self._book.now())
        if isinstance(decision, Start):
            return decision
        _check_engine(operation, inventory)
        _check_device(operation, inventory)
        if isinstance(decision, Refuse):
            refusal = self._crash_loops.refusal(decision.hive_id, operation.model)
            if refusal is not None:
                raise refusal.error()
        why = getattr(decision, "why", "its time to be tried again is just over")
        raise NoCapacityError(f"No hive can start a worker with {operation.model}: {why}.")

    async def _make_room(self, job: RunningJob, operation: WorkerSpawn, start: Start) -> None:
        worker_id = new_id("worker")
        self._reserve(start, worker_id, wanted_by(operation))
        stops: Stops | None = None
        try:
            lines = self._room_maker.lines(start, operation.model)
            await job.update(message=start.why, events=[narration_event(line) for line in lines])
            for line in lines:
                emit(line)
            stops = self._room_maker.begin(start, operation.model)
            await self._room_maker.finish(start, stops)
        finally:
            if stops is None:
                self._room_maker.let_be(start)
            self._fleet.remove_start(start.hive_id, worker_id)

    async def _spawn(
        self, job: RunningJob, operation: WorkerSpawn, start: Start, made_room: str
    ) -> dict[str, str]:
        worker_id = operation.worker_id or new_id("worker")
        self._reserve(start, worker_id, wanted_by(operation))
        try:
            message = f"Handed to {start.hive_id}: {start.why}{made_room}."
            line = compose("queen_forward", message, hive_id=start.hive_id)
            await job.start(
                hive_id=start.hive_id,
                phase=Phase.STARTING_WORKER,
                message=message,
                events=[narration_event(line)],
            )
            emit(line)
            asked = msgspec.structs.replace(
                operation, worker_id=worker_id, device=start.device, context_tokens=start.context_tokens
            )
            await self._starter.start(start.hive_id, asked, job.job_id)
        finally:
            self._fleet.remove_start(start.hive_id, worker_id)
            self.on_change()
        return {"worker_id": worker_id, "hive_id": start.hive_id}


def _check_engine(operation: WorkerSpawn, inventory: Inventory) -> None:
    hives = [hive for hive in inventory.hives.values() if operation.hive_id in (None, hive.hive_id)]
    engines = list(dict.fromkeys(engine for hive in hives for engine in hive.engines))
    if engines and operation.engine not in engines:
        raise InvalidRequestError(
            f"There is no engine `{operation.engine}`{nearest(operation.engine, engines)}. "
            f"There are: {', '.join(engines)}.",
            param="engine",
        )


def _check_device(operation: WorkerSpawn, inventory: Inventory) -> None:
    hives = [hive for hive in inventory.hives.values() if operation.hive_id in (None, hive.hive_id)]
    devices = sorted({spot.device for hive in hives for spot in hive.devices})
    if operation.device is not None and devices and operation.device not in devices:
        raise InvalidRequestError(
            f"No hive has a device `{operation.device}`{nearest(operation.device, devices)}. "
            f"There are: {', '.join(devices)}.",
            param="device",
        )


def wanted_by(operation: WorkerSpawn) -> Wanted:
    """Return what an operation asks for: this worker, as it is described, whatever others there are."""
    return Wanted(
        Kind(operation.model, operation.purpose, operation.engine),
        slots=operation.slots,
        slots_min=operation.slots,
        context_tokens=operation.context_tokens,
        device=operation.device,
        hive_id=operation.hive_id,
        is_another=True,
    )
