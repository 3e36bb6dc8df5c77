"""Worker loops: a job is held by one at a time, comes to one end, and is begun again when its holder is gone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import signal
import sqlite3
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.states import JobState, Reason
from rbee.contracts.views import Progress
from rbee.errors import GoneError, InvalidRequestError, NotFoundError, RbeeError, UnavailableError
from rbee.jobs import ClaimedJob, JobRecord, JobRegistry, LeaseLostError
from rbee.jobs.retention import Limits, Retention
from tests.unit.jobs.claim_stage import LEASE_S, Clock, Paint, Sweep, opened, work
from tests.unit.jobs.job_stage import SECONDS, assert_dense, end, kinds, read_to_end, whole_log

Do = Callable[[ClaimedJob], Awaitable[Any]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
async def registry(path: Path) -> AsyncIterator[JobRegistry]:
    async with opened(path) as made:
        yield made


@pytest.fixture
async def other(path: Path, registry: JobRegistry) -> AsyncIterator[JobRegistry]:
    """Another registry on the same file, as another program has it."""
    async with opened(path) as made:
        yield made


@contextlib.asynccontextmanager
async def working(registry: JobRegistry, do: Do, *, loops: int = 1, **more: Any) -> AsyncIterator[None]:
    """Have loops work meanwhile; they must still be at it at the end."""
    tasks = [asyncio.create_task(work(registry, do, **more)) for _ in range(loops)]
    try:
        async with asyncio.timeout(SECONDS):
            yield
    finally:
        for task in tasks:
            task.cancel()
        left = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(error) for error in left} == {asyncio.CancelledError}, left


class Block:
    """Work that can be watched: it has begun, and goes on for as long as it is let."""

    def __init__(self) -> None:
        self.job: ClaimedJob | None = None
        self.has_begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.was_cancelled = asyncio.Event()

    async def __call__(self, job: ClaimedJob) -> dict[str, Any]:
        self.job = job
        self.has_begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_cancelled.set()
            raise
        return {"attempt": job.record.attempt}


async def nothing(job: ClaimedJob) -> dict[str, Any]:
    return {"attempt": job.record.attempt}


def failing(error: BaseException) -> Do:
    async def fail(job: ClaimedJob) -> None:
        raise error

    return fail


async def paint(registry: JobRegistry, job_id: str | None = None, **values: Any) -> str:
    return (await registry.create(Paint(**values), correlation_id="c-1", job_id=job_id)).job_id


async def log_of(registry: JobRegistry, job_id: str) -> list[Any]:
    """Return a log after checking that it is dense and has one end, the last."""
    events = await whole_log(registry, job_id)
    assert_dense(events)
    assert kinds(events).index("end") == len(events) - 1
    return [json.loads(event) for event in events]


def shown(record: JobRecord) -> tuple[str, str | None, int]:
    return record.state, record.reason, record.attempt


# How a block is left, and how the job ends


async def test_job_completes_with_its_result_and_tells_its_life(registry: JobRegistry) -> None:
    async def do(job: ClaimedJob) -> dict[str, Any]:
        assert (job.operation, job.record.state) == (Paint(colour="blue"), JobState.RUNNING)
        await job.say("painter_begin", "It becomes blue.", coats=2)
        await job.update(progress=Progress(done=1, total=2, unit="items"), message="half")
        return {"area": 3}

    async with working(registry, do):
        job_id = await paint(registry, colour="blue")
        ended = await registry.wait(job_id)
    assert (*shown(ended), ended.result) == ("completed", "ok", 1, b'{"area":3}')
    assert (ended.lease_until, ended.message) == (None, "The job is complete.")
    assert (await registry.view(job_id)).progress == Progress(done=1, total=2, unit="items")
    log = await log_of(registry, job_id)
    assert [event.get("action", event["kind"]) for event in log] == [
        *("state", "state", "painter_begin", "painter_complete", "end")
    ]
    assert (log[2]["fields"]["coats"], log[2]["job_id"], log[4]["result"]) == (2, job_id, {"area": 3})
    assert (await registry.store.counts())["completed"] == 1


async def test_loop_takes_only_what_it_asks_for(registry: JobRegistry) -> None:
    swept = await registry.create(Sweep())
    async with working(registry, nothing):
        await registry.wait(await paint(registry))
    assert (await registry.get(swept.job_id)).state is JobState.QUEUED


async def test_error_fails_the_job_and_the_loop_goes_on(
    registry: JobRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    errors: list[BaseException] = [ZeroDivisionError(), InvalidRequestError("Too wide.")]

    async def do(job: ClaimedJob) -> dict[str, Any]:
        if errors:
            raise errors.pop(0)
        return {}

    async with working(registry, do):
        ended = [await registry.wait(await paint(registry)) for _ in range(3)]
    assert [record.state for record in ended] == ["failed", "failed", "completed"]
    assert [record.reason for record in ended] == ["internal", "invalid", "ok"]
    assert "ZeroDivisionError, incident" in (ended[0].message or "")
    assert ended[1].error is not None
    assert (ended[1].error.code, ended[1].message) == ("invalid", "Too wide.")
    assert f"in {ended[0].job_id}:" in capsys.readouterr().err


async def test_retryable_error_begins_the_next_attempt_after_its_wait_until_attempts_are_used_up(
    path: Path,
) -> None:
    clock = Clock()
    begun: list[tuple[str, int]] = []

    async def do(job: ClaimedJob) -> None:
        begun.append((job.job_id, job.record.attempt))
        if job.job_id == "job-again":
            raise UnavailableError("Out of paint.", retry_after_s=50)

    async with opened(path, clock) as registry, working(registry, do):
        await paint(registry, "job-again", attempts=3)
        for attempt in (1, 2):
            for by_s in (0, 49):
                clock.now_s += by_s
                await registry.wait(await paint(registry))  # whatever was due was begun before it
            waiting = await registry.get("job-again")
            assert (*shown(waiting), waiting.owner) == ("running", None, attempt, None)
            clock.now_s += 1
        ended = await registry.wait("job-again")
        assert (shown(ended), ended.message) == (("failed", "internal", 3), "Out of paint.")
        assert [attempt for job, attempt in begun if job == "job-again"] == [1, 2, 3]
        log = await log_of(registry, "job-again")
        told = [event for event in log if event.get("action") == "painter_retry"]
        assert [(event["attempt"], event["fields"]["code"], event["level"]) for event in told] == [
            *((1, "unavailable", "warning"), (2, "unavailable", "warning"))
        ]
        assert "The next one begins in 50.0 s." in told[0]["message"]


async def test_job_that_waits_for_its_next_attempt_ends_at_its_deadline(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock) as registry, working(registry, failing(UnavailableError(retry_after_s=500))):
        job_id = await paint(registry, timeout_s=60, attempts=3)
        reader = await registry.follow(job_id)
        while "painter_retry" not in str(await reader.next(SECONDS)):
            pass
        reader.close()
        clock.now_s += 60
        assert shown(await registry.wait(job_id)) == ("failed", "timeout", 1)


async def test_result_that_is_not_json_fails_the_job_and_the_loop_goes_on(registry: JobRegistry) -> None:
    results: list[dict[str, Any]] = [{"what": "\ud800"}, {}]

    async def do(job: ClaimedJob) -> dict[str, Any]:
        return results.pop(0)

    async with working(registry, do):
        ended = [await registry.wait(await paint(registry)) for _ in range(2)]
    assert [shown(record) for record in ended] == [("failed", "internal", 1), ("completed", "ok", 1)]
    assert "UnicodeEncodeError, incident" in (ended[0].message or "")


async def test_cancel_of_a_job_that_waits_for_its_next_attempt_ends_it_now(registry: JobRegistry) -> None:
    async def do(job: ClaimedJob) -> None:
        raise UnavailableError("Not yet.", retry_after_s=3600)

    job_id = await paint(registry, attempts=3)
    async with working(registry, do):
        reader = await registry.follow(job_id)
        async with asyncio.timeout(SECONDS):
            while b'"painter_retry"' not in await reader.next_frames(SECONDS):
                pass
        reader.close()
        assert shown(await registry.cancel(job_id)) == ("cancelled", "user", 1)
        assert shown(await registry.wait(job_id)) == ("cancelled", "user", 1)


async def test_error_with_a_reason_of_its_own_fails_the_job_and_the_loop_goes_on(registry: JobRegistry) -> None:
    class DryError(RbeeError):
        """The paint is dry."""

        code = "dry"
        reason = "dry"

    async def do(job: ClaimedJob) -> None:
        raise DryError

    async with working(registry, do):
        for _ in range(2):
            ended = await registry.wait(await paint(registry))
            assert shown(ended) == ("failed", "internal", 1)
            assert ended.error is not None and ended.error.code == "dry"


async def test_error_that_cannot_be_written_down_fails_the_job_and_the_loop_goes_on(registry: JobRegistry) -> None:
    async def do(job: ClaimedJob) -> None:
        raise InvalidRequestError("There is no file \udcff.")

    async with working(registry, do):
        for _ in range(2):
            assert shown(await registry.wait(await paint(registry))) == ("failed", "internal", 1)


async def test_block_of_a_job_that_was_ended_elsewhere_and_forgotten_is_left(path: Path) -> None:
    left: asyncio.Queue[str] = asyncio.Queue()

    async def do(job: ClaimedJob) -> None:
        try:
            await asyncio.sleep(SECONDS if job.operation == Paint(colour="lost") else 0)
        finally:
            left.put_nowait(job.job_id)

    async with opened(path) as registry, opened(path) as other, working(registry, do):
        job_id = await paint(registry, colour="lost")
        reader = await registry.follow(job_id)
        async with asyncio.timeout(SECONDS):
            while b'"running"' not in await reader.next_frames(SECONDS):
                pass
        reader.close()
        await end(other, job_id, JobState.FAILED)
        await Retention(other, Limits(jobs=0), actor="test").forget()
        assert await asyncio.wait_for(left.get(), SECONDS) == job_id
        assert shown(await registry.wait(await paint(registry))) == ("completed", "ok", 1)


async def test_lease_has_to_last_for_some_time(registry: JobRegistry) -> None:
    for lease_s in (0, -1, float("nan")):
        with pytest.raises(InvalidRequestError, match="lease_s"):
            registry.claim(Paint, lease_s=lease_s)


async def test_request_that_cannot_be_read_fails_the_job_and_the_loop_goes_on(path: Path) -> None:
    async with opened(path) as registry:
        job_id = await paint(registry, colour="blue")
        with contextlib.closing(sqlite3.connect(path)) as stranger, stranger:
            stranger.execute("UPDATE requests SET body = ?", (b'{"operation":"paint","width":1}',))
        async with working(registry, nothing):
            ended = await registry.wait(job_id)
            assert shown(ended) == ("failed", "invalid", 1)
            assert "width" in (ended.message or "")
            assert (await registry.wait(await paint(registry))).state is JobState.COMPLETED


async def test_error_of_a_task_of_the_block_that_was_cancelled_fails_the_job(registry: JobRegistry) -> None:
    """Nobody cancelled the loop, so it is a fault of the work, not the program's end."""

    async def do(job: ClaimedJob) -> None:
        inner = asyncio.create_task(asyncio.Event().wait())
        inner.cancel()
        await inner

    async with working(registry, do):
        ended = await registry.wait(await paint(registry))
    assert shown(ended) == ("failed", "internal", 1)
    assert "CancelledError" in (ended.message or "")


async def test_job_that_is_not_stored_is_worked_on_and_erased(registry: JobRegistry) -> None:
    block = Block()
    async with working(registry, block):
        job_id = await paint(registry, colour="secret", store=False)
        reader = await registry.follow(job_id)
        await block.has_begun.wait()
        begun = await reader.next(SECONDS)
        block.go_on.set()
        assert kinds(begun + await read_to_end(reader)) == ["queued", "running", "narration", "end"]
    with pytest.raises(GoneError):
        await registry.read(job_id, 0)
    with pytest.raises(GoneError):
        await registry.operation(job_id)


# Cancel and deadlines


async def test_cancel_of_a_running_job_leaves_its_block_at_once(registry: JobRegistry) -> None:
    block = Block()
    async with working(registry, block):
        job_id = await paint(registry)
        await block.has_begun.wait()
        await registry.cancel(job_id)
        ended = await registry.wait(job_id)
        assert (shown(ended), ended.error) == (("cancelled", "user", 1), None)
        assert block.was_cancelled.is_set()
        block.go_on.set()
        assert (await registry.wait(await paint(registry))).state is JobState.COMPLETED
    assert (await registry.cancel(job_id)) == ended


async def test_cancel_by_another_program_reaches_the_block(registry: JobRegistry, other: JobRegistry) -> None:
    block = Block()
    async with working(registry, block, lease_s=LEASE_S):
        job_id = await paint(registry)
        await block.has_begun.wait()
        assert (await other.cancel(job_id)).is_cancel_requested
        await block.was_cancelled.wait()
        assert shown(await other.wait(job_id)) == ("cancelled", "user", 1)


async def test_cancel_between_the_claim_and_the_block_is_felt_in_it(registry: JobRegistry) -> None:
    job_id = await paint(registry)
    async with contextlib.aclosing(registry.claim(Paint)) as jobs:
        job = await anext(jobs)
        await registry.cancel(job_id)
        async with asyncio.timeout(SECONDS), job:
            await asyncio.Event().wait()
    assert shown(await registry.get(job_id)) == ("cancelled", "user", 1)


async def test_block_that_cancels_its_own_job_last_is_left_and_the_loop_goes_on(registry: JobRegistry) -> None:
    """The cancellation is not yet felt when the block ends; it must not be felt behind it."""

    async def do(job: ClaimedJob) -> None:
        await registry.cancel(job.job_id)

    async with working(registry, do):
        ended = [await registry.wait(await paint(registry)) for _ in range(3)]
    assert [record.state for record in ended] == ["completed"] * 3


async def test_block_that_overhears_its_stop_does_not_hand_it_on_to_the_next_job(registry: JobRegistry) -> None:
    first, second = Block(), Block()
    blocks = [first, second]

    async def do(job: ClaimedJob) -> dict[str, Any]:
        if not blocks[1:]:
            return await second(job)
        with contextlib.suppress(asyncio.CancelledError):
            await blocks.pop(0)(job)
        return {"deaf": True}

    async with working(registry, do):
        job_id = await paint(registry)
        await first.has_begun.wait()
        await registry.cancel(job_id)
        assert (await registry.wait(job_id)).result == b'{"deaf":true}'
        job_id = await paint(registry)
        await second.has_begun.wait()
        await registry.cancel(job_id)
        assert (await registry.wait(job_id)).state is JobState.CANCELLED


async def test_stop_of_one_job_after_another_ends_each_of_them(registry: JobRegistry) -> None:
    async def do(job: ClaimedJob) -> None:
        try:
            await registry.cancel(job.job_id)
            await asyncio.Event().wait()
        finally:
            if job.operation.labels:
                raise ZeroDivisionError  # while it is cleaning up

    async with working(registry, do):
        ended = [await registry.wait(await paint(registry, labels=labels)) for labels in ({"a": "b"}, {}) * 2]
    assert [shown(record) for record in ended] == [("cancelled", "user", 1)] * 4


async def test_cancel_and_completion_at_once_come_to_one_end(registry: JobRegistry) -> None:
    states: Counter[str] = Counter()

    async def do(job: ClaimedJob) -> dict[str, Any]:
        for _ in range(int(job.operation.labels["turns"])):
            await asyncio.sleep(0)
        return {}

    async def cancel(job_id: str, turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        await registry.cancel(job_id)

    async with working(registry, do, loops=3):
        for number in range(400):
            job_id = await paint(registry, labels={"turns": str(number % 7)})
            _, ended = await asyncio.gather(cancel(job_id, number % 11), registry.wait(job_id))
            states[ended.state] += 1
            assert await registry.get(job_id) == ended
            assert (await log_of(registry, job_id))[-1]["state"] == ended.state
    assert set(states) <= {"completed", "cancelled"}
    assert await registry.store.counts() == dict.fromkeys(JobState, 0) | states


async def test_job_whose_time_is_over_leaves_its_block_and_fails(registry: JobRegistry) -> None:
    block = Block()
    async with working(registry, block):
        ended = await registry.wait(await paint(registry, timeout_s=0.05))
    assert (shown(ended), ended.message) == (
        ("failed", "timeout", 1),
        "The job did not end within its 0.05 s.",
    )
    assert ended.error is not None and ended.error.code == "timeout"
    assert block.was_cancelled.is_set()


@pytest.mark.parametrize(
    ("asked", "reason", "message"),
    [
        ({"timeout_s": 60}, Reason.TIMEOUT, "The job did not end within its 60 s."),
        ({"queue_timeout_s": 60}, Reason.QUEUE_TIMEOUT, "The job still waited for its place after 60 s."),
    ],
)
async def test_job_that_has_waited_too_long_fails_unbegun(
    path: Path, asked: dict[str, Any], reason: Reason, message: str
) -> None:
    clock = Clock()
    async with opened(path, clock) as registry:
        late, in_time = await paint(registry, **asked), await paint(registry)
        clock.now_s += 60
        async with working(registry, nothing):
            ended = await registry.wait(late)
            assert (shown(ended), ended.message) == (("failed", reason, 0), message)
            assert (await registry.wait(in_time)).state is JobState.COMPLETED
        assert kinds(await whole_log(registry, late)) == ["queued", "narration", "end"]


async def test_deadline_of_a_job_passes_also_while_all_loops_are_busy(tmp_path: Path) -> None:
    busy, done = asyncio.Event(), asyncio.Event()

    async def do(job: ClaimedJob) -> dict[str, Any]:
        busy.set()
        await done.wait()
        return {}

    clock = Clock()
    async with opened(tmp_path / "jobs.db", clock) as registry:
        working = asyncio.create_task(work(registry, do, count=1))
        held = (await registry.create(Paint())).job_id
        await busy.wait()
        late = [
            await paint(registry, queue_timeout_s=60),
            await paint(registry, timeout_s=60),
            await paint(registry, queue_timeout_s=90, timeout_s=60),
        ]
        kept = await paint(registry, queue_timeout_s=90, timeout_s=120)
        clock.now_s += 61
        async with asyncio.timeout(SECONDS):
            ended = [await registry.wait(job_id) for job_id in late]
        assert [record.reason for record in ended] == ["queue_timeout", "timeout", "timeout"]
        assert [(await registry.get(job_id)).state for job_id in (held, kept)] == ["running", "queued"]
        done.set()
        await working


# Whose turn it is


async def test_higher_priority_goes_first_then_whoever_came_first(registry: JobRegistry) -> None:
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 5), ("e", 0)):
        await paint(registry, f"job-{name}", priority=priority)
    order: list[str] = []

    async def do(job: ClaimedJob) -> None:
        order.append(job.job_id)

    await asyncio.wait_for(work(registry, do, count=5), SECONDS)
    assert order == ["job-b", "job-d", "job-a", "job-e", "job-c"]


async def test_many_loops_of_two_registries_do_each_job_once(registry: JobRegistry, other: JobRegistry) -> None:
    done: Counter[str] = Counter()

    async def do(job: ClaimedJob) -> None:
        done[job.job_id] += 1

    async with working(registry, do, loops=20), working(other, do, loops=20):
        made = await asyncio.gather(*(paint(registry) for _ in range(300)))
        ended = await asyncio.gather(*(registry.wait(job_id) for job_id in made))
    assert done == dict.fromkeys(made, 1)
    assert {shown(record) for record in ended} == {("completed", "ok", 1)}


# Leases


async def test_job_is_held_for_longer_than_its_lease_while_its_block_runs(path: Path) -> None:
    clock, block = Clock(), Block()
    async with opened(path, clock) as registry, opened(path, clock) as other, working(registry, block):
        job_id = await paint(registry)
        await block.has_begun.wait()
        async with working(other, nothing):
            for _ in range(3):
                clock.now_s += 25
                while (await registry.get(job_id)).lease_until != clock.now_s + 30:
                    await other.wait(await paint(other))  # the other one has its chance to take it
            block.go_on.set()
            assert shown(await registry.wait(job_id)) == ("completed", "ok", 1)


async def test_end_by_a_holder_whose_lease_was_lost_is_refused(path: Path) -> None:
    clock, first, second = Clock(), Block(), Block()
    async with opened(path, clock) as registry, opened(path, clock) as other:
        async with working(registry, first):
            job_id = await paint(registry)
            await first.has_begun.wait()
            clock.now_s += 31
            async with working(other, second):
                await second.has_begun.wait()
                assert first.job is not None
                with pytest.raises(LeaseLostError):
                    await first.job.say("painter_late", "Late.")
                with pytest.raises(LeaseLostError):
                    await first.job.renew()
                first.go_on.set()
                assert (await registry.get(job_id)).state is JobState.RUNNING
                second.go_on.set()
                ended = await other.wait(job_id)
        assert (shown(ended), ended.result) == (("completed", "ok", 2), b'{"attempt":2}')
        assert "painter_late" not in str(await log_of(registry, job_id))
        assert (await registry.get(job_id)) == ended


async def test_holder_whose_lease_was_lost_leaves_its_block_and_goes_on(path: Path) -> None:
    clock, first = Clock(), Block()
    async with opened(path, clock) as registry, opened(path, clock) as other:
        async with working(registry, first):
            job_id = await paint(registry)
            await first.has_begun.wait()
            clock.now_s += 31
            await asyncio.wait_for(work(other, nothing, count=1), SECONDS)
            await first.was_cancelled.wait()
            first.go_on.set()
            assert (await registry.wait(await paint(registry))).state is JobState.COMPLETED
        assert (await registry.get(job_id)).result == b'{"attempt":2}'


async def test_job_whose_holders_all_died_fails_once_its_attempts_are_used_up(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock) as registry:
        job_id = await paint(registry, attempts=1)
        jobs = registry.claim(Paint)
        await anext(jobs)  # held, and never heard of again
        clock.now_s += 31
        async with opened(path, clock) as other, working(other, nothing):
            ended = await other.wait(job_id)
        assert (shown(ended), ended.message) == (
            ("failed", "worker_lost", 1),
            "Whoever worked on attempt 1 was not heard of any more.",
        )
        await jobs.aclose()


async def test_cancelled_job_of_a_holder_that_died_ends_as_cancelled(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock) as registry:
        job_id = await paint(registry)
        jobs = registry.claim(Paint)
        await anext(jobs)
        async with opened(path, clock) as other:
            await other.cancel(job_id)
            clock.now_s += 31
            async with working(other, nothing):
                assert shown(await other.wait(job_id)) == ("cancelled", "user", 1)
        await jobs.aclose()


# Leaving a loop


async def test_loop_that_is_left_early_leaves_nothing_behind(registry: JobRegistry) -> None:
    before = asyncio.all_tasks()
    for name in ("job-a", "job-b"):
        await paint(registry, name)
    await asyncio.wait_for(work(registry, nothing, count=1), SECONDS)
    if left := asyncio.all_tasks() - before:
        await asyncio.wait(left, timeout=SECONDS)
    assert asyncio.all_tasks() == before
    assert (await registry.get("job-a")).state is JobState.COMPLETED
    assert (await registry.get("job-b")).state is JobState.QUEUED


async def test_many_loops_that_are_left_leave_nothing_behind(registry: JobRegistry) -> None:
    before = asyncio.all_tasks()
    async with working(registry, nothing, loops=5):
        await registry.wait(await paint(registry))
    if left := asyncio.all_tasks() - before:
        await asyncio.wait(left, timeout=SECONDS)
    assert asyncio.all_tasks() == before


async def test_job_whose_block_is_never_entered_is_given_back(path: Path) -> None:
    clock = Clock()
    async with opened(path, clock) as registry:
        job_id = await paint(registry, attempts=1)
        async with contextlib.aclosing(registry.claim(Paint)) as jobs:
            job = await anext(jobs)
        record = await registry.get(job_id)
        assert (*shown(record), record.owner) == ("running", None, 1, None)
        async with asyncio.timeout(SECONDS), job:
            await asyncio.Event().wait()  # whoever enters it now is told
        clock.now_s += 2
        await asyncio.wait_for(work(registry, nothing, count=1), SECONDS)
        assert shown(await registry.get(job_id)) == ("completed", "ok", 2)


async def test_job_is_given_back_when_the_program_stops(registry: JobRegistry, other: JobRegistry) -> None:
    block = Block()
    job_id = await paint(registry, attempts=1)
    async with working(registry, block):
        await block.has_begun.wait()
    assert block.was_cancelled.is_set()
    record = await registry.get(job_id)
    assert (*shown(record), record.owner) == ("running", None, 1, None)
    await asyncio.wait_for(work(other, nothing, count=1), SECONDS)
    assert shown(await registry.get(job_id)) == ("completed", "ok", 2)
    told = [event.get("action") for event in await log_of(registry, job_id)]
    assert told == [None, None, "painter_give_back", None, "painter_complete", None]


@pytest.mark.parametrize("turns", range(12))
async def test_job_that_is_claimed_while_its_loop_is_stopped_is_not_lost(path: Path, turns: int) -> None:
    clock = Clock()
    async with opened(path, clock) as registry:
        loop = asyncio.create_task(work(registry, Block()))
        await asyncio.sleep(0)
        job_id = await paint(registry, attempts=1)
        for _ in range(turns):
            await asyncio.sleep(0)
        loop.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loop
        await asyncio.wait_for(work(registry, nothing, count=1), SECONDS)
        assert (await registry.get(job_id)).state is JobState.COMPLETED


async def test_loop_that_stopped_waiting_takes_no_job_from_one_that_waits(registry: JobRegistry) -> None:
    async with working(registry, nothing):
        gone = asyncio.create_task(work(registry, nothing))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        made = [await paint(registry) for _ in range(10)]
        ended = await asyncio.gather(*(registry.wait(job_id) for job_id in made))
    assert {record.attempt for record in ended} == {1}


async def test_loops_of_a_registry_that_is_closed_end_with_that(path: Path) -> None:
    registry = opened(path)
    waiting = asyncio.create_task(work(registry, nothing))
    await registry.wait(await paint(registry))
    await registry.close()
    with pytest.raises(UnavailableError, match="closed"):
        await asyncio.wait_for(waiting, SECONDS)


# A disk that is full


@contextlib.contextmanager
def full() -> Iterator[None]:
    """Let no file grow meanwhile."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_loop_outlives_a_full_disk_and_ends_its_job_once_there_is_room(
    registry: JobRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    block, second = Block(), Block()
    async with working(registry, block, lease_s=60.0), working(registry, second, lease_s=30.0):
        job_id = await paint(registry)
        await asyncio.wait(
            [asyncio.ensure_future(each.has_begun.wait()) for each in (block, second)],
            return_when=asyncio.FIRST_COMPLETED,
        )
        with full():
            block.go_on.set()
            second.go_on.set()
            told = ""
            while "cannot be" not in told:
                await asyncio.sleep(0)
                told += capsys.readouterr().err
        assert shown(await registry.wait(job_id)) == ("completed", "ok", 1)
        assert (await registry.wait(await paint(registry))).state is JobState.COMPLETED


# Processes


async def process(path: Path, *words: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.unit.jobs.claim_stage", str(path), *words),
        stdout=PIPE,
        cwd=Path(__file__).parents[3],
    )


async def first_line(of: Process) -> str:
    assert of.stdout is not None
    return (await asyncio.wait_for(of.stdout.readline(), SECONDS)).decode().strip()


async def test_two_processes_on_one_file_do_each_job_once(registry: JobRegistry, path: Path) -> None:
    mine: list[str] = []

    async def do(job: ClaimedJob) -> None:
        mine.append(f"{job.job_id} {job.record.attempt}")

    others = await process(path)
    made = [await paint(registry)]
    theirs = [await first_line(others)]
    async with working(registry, do, loops=4):
        made += await asyncio.gather(*(paint(registry) for _ in range(200)))
        await asyncio.gather(*(registry.wait(job_id) for job_id in made))
    others.kill()
    assert others.stdout is not None
    theirs += (await others.stdout.read()).decode().splitlines()
    await others.wait()
    assert sorted(mine + theirs) == sorted(f"{job_id} 1" for job_id in made)


async def test_job_of_a_process_that_was_killed_is_begun_again_after_its_lease(
    registry: JobRegistry, path: Path
) -> None:
    job_id = await paint(registry)
    holder = await process(path, "hold")
    assert await first_line(holder) == f"{job_id} 1"
    holder.kill()
    await holder.wait()
    until = (await registry.get(job_id)).lease_until or 0
    async with working(registry, nothing, lease_s=LEASE_S):
        ended = await registry.wait(job_id)
    assert (shown(ended), ended.result) == (("completed", "ok", 2), b'{"attempt":2}')
    log = await log_of(registry, job_id)
    begun = [event["ts"] for event in log if event.get("state") == "running"]
    assert begun[1] >= until * 1e9 - 1000
    (again,) = [event for event in log if event.get("action") == "painter_begin_again"]
    assert again["message"] == "Whoever worked on attempt 1 was not heard of any more, so it is begun again."


async def test_process_that_is_interrupted_gives_its_job_back(registry: JobRegistry, path: Path) -> None:
    job_id = await paint(registry, attempts=1)
    holder = await process(path, "hold")
    assert await first_line(holder) == f"{job_id} 1"
    holder.send_signal(signal.SIGINT)
    await holder.wait()
    record = await registry.get(job_id)
    assert (*shown(record), record.owner) == ("running", None, 1, None)
    await asyncio.wait_for(work(registry, nothing, count=1), SECONDS)
    assert shown(await registry.get(job_id)) == ("completed", "ok", 2)


async def test_unknown_job_cannot_be_cancelled(registry: JobRegistry) -> None:
    with pytest.raises(NotFoundError):
        await registry.cancel("job-x")
