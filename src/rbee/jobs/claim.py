"""Working on jobs of one's own: `async for job in registry.claim(Resize)`, each held by a lease."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from rbee.contracts.events import NewEvent
from rbee.contracts.ids import new_boot_id
from rbee.contracts.operations import Operation, operation_name
from rbee.contracts.states import JobState
from rbee.contracts.views import Progress
from rbee.errors import (
    ConflictError,
    GoneError,
    InvalidRequestError,
    RbeeError,
    StorageError,
    UnavailableError,
    WorkerLostError,
)
from rbee.jobs.endings import (
    USER_STOP,
    Ending,
    Stop,
    closing_line,
    completed,
    error_body,
    failed,
    incident,
    queue_timeout_of,
    stopped,
    timeout_of,
    until_written,
)
from rbee.jobs.lifecycle import ended, released, renewed, started
from rbee.jobs.records import Changed, Fence, JobRecord
from rbee.jobs.store import StoreClosedError
from rbee.narration import scope
from rbee.narration.emit import compose, narration_event

if TYPE_CHECKING:
    from rbee.jobs.registry import JobRegistry

LEASE_S = 30.0
LOOK_S = 1.0
UNWANTED = "Whoever waited for it has gone; another one goes on."
TOGETHER_MAX = 64
RETRY_S = 1.0
RETRY_MAX_S = 60.0


class LeaseLostError(ConflictError):
    """Another owner has the job by now: what this one makes of it no longer counts."""


class ClaimedJob:
    """A job in the hands of one worker loop; its work is done inside `async with job:`.

    Leaving the block ends the job: `completed` with `result`; with an error, `failed` with it, or a further
    attempt where the error says that trying again may help and `attempts` allows it. A cancel, a deadline or a
    lost lease cancels what is awaited inside the block, which then ends without an error. Where the program
    itself is being stopped, or the loop goes on without having entered the block, the job is given back for
    another owner. An end that cannot be written is tried again until it can, or until another owner has the job.

    Attributes:
        record: The job as last seen.
        operation: What it asks for.
        result: What it comes to; JSON.
    """

    operation: Operation

    def __init__(self, claims: Claims, record: JobRecord, request: bytes, *, name: str, lease_s: float) -> None:
        self.record = record
        self._request = request
        self.result: dict[str, Any] | None = None
        self._claims = claims
        self._registry = claims.registry
        self._name = name
        self._lease_s = lease_s
        self._fence = Fence(claims.owner, record.attempt)
        self._stop: Stop | LeaseLostError | None = None
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._looking: asyncio.Task[None] | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        claims.held[record.job_id] = self

    @property
    def job_id(self) -> str:
        """The job's id."""
        return self.record.job_id

    async def say(self, action: str, message: str, **fields: Any) -> None:
        """Say one sentence into the job's log; on disk when it returns.

        Raises:
            LeaseLostError: Another owner has the job.
        """
        with self._scope():
            line = compose(action, message, attempt=self.record.attempt, **fields)
        await self._change(lambda record: Changed(record, [narration_event(line)]))

    async def update(self, *, progress: Progress | None = None, message: str | None = None) -> None:
        """Say how far the job is.

        Raises:
            LeaseLostError: Another owner has the job.
        """
        values = {
            name: value for name, value in (("progress", progress), ("message", message)) if value is not None
        }
        await self._change(lambda record: Changed(msgspec.structs.replace(record, **values), []))

    async def renew(self) -> None:
        """Hold the job for another `lease_s`, and notice a cancel that was asked for elsewhere."""
        now = self._registry.now()
        await self._change(lambda record: renewed(record, self._fence, now + self._lease_s))
        if self.record.is_cancel_requested:
            self.stop(USER_STOP)

    async def _change(self, decide: Any) -> None:
        def fenced(record: JobRecord) -> Changed:
            if record.is_ended or (record.owner, record.attempt) != (self._fence.owner, self._fence.attempt):
                raise LeaseLostError(f"Attempt {self._fence.attempt} no longer holds {self.job_id}.")
            changed: Changed = decide(record)
            return changed

        try:
            self.record = await self._registry.store.change(self.job_id, fenced)
        except GoneError as error:
            raise LeaseLostError(f"The job {self.job_id} was ended and forgotten.") from error

    def stop(self, stop: Stop | LeaseLostError) -> None:
        """Have the block left, for this reason; the first one counts."""
        if self._stop is None:
            self._stop = stop
            if self._task is not None:
                self._task.cancel()

    async def __aenter__(self) -> Self:
        """Begin to hold the job."""
        self._task = asyncio.current_task()
        assert self._task is not None
        self._cancelling = self._task.cancelling()
        if self._stop is not None:  # it came before the block
            self._task.cancel()
        loop = asyncio.get_running_loop()
        self._timers["look"] = loop.call_later(min(LOOK_S, self._lease_s / 3), self._look_soon)
        if self.record.deadline_at is not None:
            left_s = max(0.0, self.record.deadline_at - self._registry.now())
            self._timers["deadline"] = loop.call_later(left_s, self.stop, timeout_of(self.record))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """End the job, give it another attempt, or give it back."""
        self._let_go()
        if error is not None and not isinstance(error, Exception | asyncio.CancelledError):
            return False
        is_leaving = await self._is_leaving(error)
        if is_leaving and self._stop is None:
            await asyncio.shield(self.give_back("The program that worked on it is stopping; another one goes on."))
        else:
            await self._settle(error)
        if is_leaving and not isinstance(error, asyncio.CancelledError):
            raise asyncio.CancelledError
        return not is_leaving

    async def _is_leaving(self, error: BaseException | None) -> bool:
        """Tell whether the program itself is stopping; a stop of the job is felt no further than here."""
        assert self._task is not None
        is_cancelled = isinstance(error, asyncio.CancelledError)
        if self._stop is not None:
            try:
                await asyncio.sleep(0)  # a block that awaited nothing more has not felt it yet
            except asyncio.CancelledError:
                is_cancelled = True
            self._task.uncancel()
        return is_cancelled and self._task.cancelling() > self._cancelling

    async def _settle(self, error: BaseException | None) -> None:
        if isinstance(self._stop, LeaseLostError) or isinstance(error, LeaseLostError):
            return
        try:
            if error is None:
                await self._end(completed(self.result))
            elif self._stop is not None:
                await self._end(stopped(self._stop))
            elif isinstance(error, RbeeError) and error.retryable and self.record.attempt < self.record.attempts:
                await self._again(error)
            else:
                await self._end(failed(error if isinstance(error, RbeeError) else incident(error, self.job_id)))
        except (RecursionError, TypeError, ValueError) as fault:  # what is to be told is no JSON
            await self._end(failed(incident(fault, self.job_id)))

    def _let_go(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        if self._looking is not None:
            self._looking.cancel()
        if self._claims.held.get(self.job_id) is self:
            del self._claims.held[self.job_id]

    def _look_soon(self) -> None:
        self._looking = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        """Renew the lease where it is due; else only see whether the job is still this owner's, and wanted."""
        try:
            record = await self._registry.get(self.job_id)
            if (record.owner, record.attempt) != (self._fence.owner, self._fence.attempt) or record.is_ended:
                raise LeaseLostError(f"Attempt {self._fence.attempt} no longer holds {self.job_id}.")
            if record.is_cancel_requested:
                self.stop(USER_STOP)
            elif (record.lease_until or 0) - self._registry.now() < self._lease_s * 2 / 3:
                await self.renew()
        except (LeaseLostError, GoneError) as error:
            self.stop(LeaseLostError(error.message))
            return
        except RbeeError:
            pass  # the registry cannot be written just now; the lease says how long that may go on
        self._timers["look"] = asyncio.get_running_loop().call_later(
            min(LOOK_S, self._lease_s / 3), self._look_soon
        )

    async def _end(self, ending: Ending) -> None:
        async def end() -> None:
            self.record = await self._registry.end(
                self.job_id,
                ending.state,
                reason=ending.reason,
                message=ending.message,
                result=ending.result,
                error=error_body(ending.error) if ending.error else None,
                fence=self._fence,
                events=[closing(self.record, ending, self._name)],
            )

        await self._insist(end)

    async def _insist(self, write: Callable[[], Awaitable[None]]) -> None:
        """Write until it can be written, or another owner has the job: theirs counts then."""
        with contextlib.suppress(ConflictError, GoneError):
            await until_written(self.job_id, write)

    async def _again(self, error: RbeeError) -> None:
        """Have the job begun again after a while, by whoever is free then."""
        wait_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** (self.record.attempt - 1)) * random.uniform(0.75, 1.0)
        wait_s = error.retry_after_s or wait_s
        message = f"Attempt {self.record.attempt} failed: {error.message} The next one begins in {wait_s:.1f} s."

        async def release() -> None:
            await self._release(f"{self._name}_retry", message, wait_s, is_counted=True, code=error.code)

        await self._insist(release)

    async def give_back(self, message: str, wait_s: float = 0.0) -> None:
        """Let another owner have the job, after a while; this attempt does not count."""
        self._let_go()
        with contextlib.suppress(LeaseLostError, StorageError, UnavailableError):  # else the lease ends
            await self._release(f"{self._name}_give_back", message, wait_s, is_counted=False)

    async def pass_by(self) -> None:
        """Give the job back if its block was never entered; whoever enters it all the same is told so."""
        if self._task is None:
            self._stop = LeaseLostError(f"{self.job_id} was given back.")
            await self.give_back("It was not begun here; another one goes on.", LOOK_S)

    async def read(self) -> bool:
        """Read what the job asks for; false when that cannot be read, which has ended it."""
        try:
            self.operation = self._registry.load(self._request)
        except InvalidRequestError as error:
            self._let_go()
            await self._end(failed(error))
            return False
        return True

    async def _release(self, action: str, message: str, wait_s: float, *, is_counted: bool, **fields: Any) -> None:
        """Let go of the job."""
        with self._scope():
            line = compose(action, message, level="warning", attempt=self.record.attempt, **fields)
        until = min(self._registry.now() + wait_s, self.record.deadline_at or math.inf)

        def decide(record: JobRecord) -> Changed:
            return released(record, self._fence, until, is_counted=is_counted, events=[narration_event(line)])

        await self._change(decide)
        self._claims.look_in(wait_s)

    def _scope(self) -> Any:
        record = self.record
        return scope(
            job_id=record.job_id, correlation_id=record.correlation_id, model=record.model, actor=self._name
        )


class Claims:
    """The worker loops of one registry: whoever is free gets the job whose turn it is.

    Attributes:
        owner: Who holds what is claimed here: this object, for as long as it lives.
        held: The jobs that are being worked on.
    """

    def __init__(self, registry: JobRegistry) -> None:
        self.registry = registry
        self.owner = new_boot_id()
        self.held: dict[str, ClaimedJob] = {}
        self._desks: dict[tuple[frozenset[str], str, float], _Desk] = {}

    def queued(self, operation: str) -> None:
        """Take note of a new job."""
        for desk in self._desks.values():
            if operation in desk.operations:
                desk.wake()

    def look_in(self, wait_s: float) -> None:
        """Look again after a while: a job may be begun again then."""
        loop = asyncio.get_running_loop()
        for desk in self._desks.values():
            loop.call_later(wait_s, desk.wake)

    def stop(self, job_id: str, stop: Stop) -> None:
        """Stop a job that is worked on here."""
        if job_id in self.held:
            self.held[job_id].stop(stop)

    async def jobs(
        self, kinds: tuple[type[Operation], ...], *, name: str, lease_s: float
    ) -> AsyncGenerator[ClaimedJob, None]:
        """Yield one claimed job after the other."""
        operations = frozenset(operation_name(kind) for kind in kinds)
        key = (operations, name, lease_s)
        if key not in self._desks:
            self._desks[key] = _Desk(self, operations, name, lease_s)
        desk = self._desks[key]
        desk.loops += 1
        try:
            while True:
                job = await desk.next()
                if not await job.read():
                    continue
                try:
                    yield job
                finally:
                    await job.pass_by()
        finally:
            desk.loops -= 1
            if not desk.loops:
                del self._desks[key]
                await desk.close()


class _Desk:
    """Claims jobs of some operations for all loops that wait for one, many in one transaction."""

    def __init__(self, claims: Claims, operations: frozenset[str], name: str, lease_s: float) -> None:
        self.operations = operations
        self.loops = 0
        self._claims = claims
        self._name = name
        self._lease_s = lease_s
        self._free: list[asyncio.Future[ClaimedJob]] = []
        self._wanted = asyncio.Event()
        self._is_closed = False
        self._is_refused = False
        self._task = asyncio.ensure_future(self._run())

    def wake(self) -> None:
        """Look for jobs now."""
        self._wanted.set()

    async def next(self) -> ClaimedJob:
        """Wait for a job."""
        future: asyncio.Future[ClaimedJob] = asyncio.get_running_loop().create_future()
        self._free.append(future)
        self.wake()
        try:
            return await future
        except asyncio.CancelledError:
            if not future.cancelled() and future.exception() is None:  # it was given one in the same moment
                await asyncio.shield(future.result().give_back(UNWANTED))
            raise

    async def close(self) -> None:
        """Claim nothing more, and give back what is being claimed just now."""
        self._is_closed = True
        self.wake()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while not self._is_closed:
            timer = loop.call_later(LOOK_S, self.wake)
            await self._wanted.wait()
            timer.cancel()
            self._wanted.clear()
            try:
                while await self._hand_out():
                    pass
                self._is_refused = False
            except (StorageError, UnavailableError) as error:
                if isinstance(error, StoreClosedError):
                    self._fail(error)
                elif not self._is_refused:  # the disk is full, or the file is in use: it is tried again
                    print(f"No jobs can be claimed: {error}", file=sys.stderr)  # noqa: T201
                    self._is_refused = True
            except Exception as error:  # noqa: BLE001  # goes to everybody who waits
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        for future in self._waiting():
            future.set_exception(error)

    def _waiting(self) -> list[asyncio.Future[ClaimedJob]]:
        """Return those who still wait, and have the others forgotten."""
        self._free = [future for future in self._free if not future.done()]
        return self._free

    async def _hand_out(self) -> bool:
        """Claim for those who are free; tells whether there may be more."""
        asked = min(len(self._waiting()), TOGETHER_MAX)
        now = self._claims.registry.now()

        def decide(record: JobRecord) -> Changed:
            return claimed(record, owner=self._claims.owner, now=now, lease_s=self._lease_s, name=self._name)

        turns = await self._claims.registry.store.claim(self.operations, now, asked, decide)
        jobs = [
            ClaimedJob(self._claims, record, request, name=self._name, lease_s=self._lease_s)
            for record, request in turns
        ]
        waiting = self._waiting()  # some may have gone meanwhile
        for future, job in zip(waiting, jobs, strict=False):
            future.set_result(job)
        for job in jobs[len(waiting) :]:
            await job.give_back(UNWANTED)
        return 0 < asked == len(turns)


def claimed(record: JobRecord, *, owner: str, now: float, lease_s: float, name: str) -> Changed:
    """Give a job whose turn it is to an owner; or end it, where its time has passed or it is wanted no more."""
    ending = overdue(record, now)
    if ending is not None:
        error = error_body(ending.error) if ending.error else None
        return ended(
            record,
            ending.state,
            reason=ending.reason,
            message=ending.message,
            now=now,
            error=error,
            events=[closing(record, ending, name)],
        )
    return started(
        record,
        owner=owner,
        now=now,
        hive_id=None,
        worker_id=None,
        phase=None,
        events=[_lost_sight(record, name)] if record.owner is not None else [],
        lease_until=now + lease_s,
    )


def _lost_sight(record: JobRecord, name: str) -> NewEvent:
    """Say why a job is begun again."""
    message = f"Whoever worked on attempt {record.attempt} was not heard of any more, so it is begun again."
    with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model, actor=name):
        return narration_event(
            compose(f"{name}_begin_again", message, level="warning", attempt=record.attempt + 1)
        )


def overdue(record: JobRecord, now: float) -> Ending | None:
    """Say how a job ends that is not to be begun, or begun again; None when it is."""
    if record.is_cancel_requested:
        return stopped(USER_STOP)
    if record.deadline_at is not None and now >= record.deadline_at:
        return stopped(timeout_of(record))
    is_queued = record.state is JobState.QUEUED
    if is_queued and record.queue_deadline_at is not None and now >= record.queue_deadline_at:
        return stopped(queue_timeout_of(record))
    if not is_queued and record.attempt >= record.attempts:
        message = f"Whoever worked on attempt {record.attempt} was not heard of any more."
        return failed(WorkerLostError(message))
    return None


def closing(record: JobRecord, ending: Ending, name: str) -> NewEvent:
    """Say how a job ends, as the last sentence of its log."""
    with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model, actor=name):
        return narration_event(closing_line(ending, name))
