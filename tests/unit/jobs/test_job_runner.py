"""One task a job, and one end of it: by result, by error, by a stop, or left as it is when the program goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.errors import NotFoundError, StorageFullError, WorkerLostError
from rbee.jobs import Fence, JobRecord, JobRegistry, JobRunner, RunningJob
from rbee.narration import ListSink, current_scope, narrate
from rbee.narration.testing import captured_narration
from tests.unit.jobs.job_stage import SECONDS, kinds, new_job, whole_log


@pytest.fixture
def said() -> Iterator[ListSink]:
    with captured_narration("queen") as sink:
        yield sink


@pytest.fixture
async def registry(said: ListSink) -> AsyncIterator[JobRegistry]:
    opened = JobRegistry.open(None)
    yield opened
    await opened.close()


@pytest.fixture
async def runner(registry: JobRegistry) -> AsyncIterator[JobRunner]:
    made = JobRunner(registry, actor="queen", owner="boot-1", handlers={})
    yield made
    await made.close()
    assert made.running == {}


class Work:
    """A handler that can be watched, and says when it has begun."""

    def __init__(self, *, cleanup_error: BaseException | None = None) -> None:
        self.has_begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.was_interrupted = False
        self._cleanup_error = cleanup_error

    async def __call__(self, job: RunningJob) -> dict[str, Any] | None:
        await job.start()
        self.has_begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.was_interrupted = True
            if self._cleanup_error is not None:
                raise self._cleanup_error from None
            raise
        return {"n": 1}


def launch(runner: JobRunner, record: JobRecord, handler: Any) -> asyncio.Task[None]:
    task = runner.launch(record, QueenCheck(), handler).task
    assert task is not None
    return task


async def finished(task: asyncio.Task[None]) -> None:
    await asyncio.wait_for(task, SECONDS)


async def last_two(registry: JobRegistry, job_id: str) -> list[Any]:
    return [json.loads(event) for event in (await whole_log(registry, job_id))[-2:]]


async def test_handler_that_returns_completes_the_job(
    registry: JobRegistry, runner: JobRunner, said: ListSink
) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> dict[str, Any]:
        assert current_scope().job_id == job.job_id
        await job.start()
        await job.narrate("queen_work", "Working.", n=1)
        job.facts["completion_tokens"] = 5
        return {"text": "done"}

    await finished(launch(runner, record, handler))
    ended = await registry.get(record.job_id)
    assert (ended.state, ended.reason, ended.owner) == (JobState.COMPLETED, Reason.OK, "boot-1")
    assert kinds(await whole_log(registry, record.job_id)) == [
        "queued",
        "running",
        "narration",
        "narration",
        "end",
    ]
    closing, end = await last_two(registry, record.job_id)
    assert (closing["action"], closing["fields"]) == ("queen_complete", {"completion_tokens": 5})
    assert end["result"] == {"text": "done"}
    assert said.actions == ["queen_work", "queen_complete"]
    assert current_scope().job_id is None


async def test_error_of_the_handler_fails_the_job_with_it(registry: JobRegistry, runner: JobRunner) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> None:
        await job.start()
        job.facts["code"] = "mine"
        raise WorkerLostError("It went.", details={"exit_code": 9, "last_lines": ["oops"], "secret": "x"})

    job = runner.launch(record, QueenCheck(), handler)
    assert job.task is not None
    await finished(job.task)
    assert isinstance(job.error, WorkerLostError)
    closing, end = await last_two(registry, record.job_id)
    assert (closing["action"], closing["level"], closing["fields"]) == (
        "queen_failed",
        "error",
        {"code": "worker_lost"},
    )
    assert (end["state"], end["reason"], end["message"]) == ("failed", "worker_lost", "It went.")
    assert (end["error"]["exit_code"], end["error"]["last_lines"]) == (9, ["oops"])
    assert "secret" not in end["error"]


async def test_crash_of_the_handler_is_an_incident_and_its_text_stays_in_stderr(
    registry: JobRegistry, runner: JobRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> None:
        raise KeyError("canary")

    await finished(launch(runner, record, handler))
    _, end = await last_two(registry, record.job_id)
    assert (end["state"], end["reason"], end["error"]["code"]) == ("failed", "internal", "internal")
    assert "KeyError, incident " in end["message"]
    assert b"canary" not in b"".join(await whole_log(registry, record.job_id))
    number = end["message"].split("incident ")[1].rstrip(").")
    told = capsys.readouterr().err
    assert f"incident {number} in a job:" in told
    assert "KeyError: 'canary'" in told


async def test_result_that_cannot_be_written_down_fails_the_job(
    registry: JobRegistry, runner: JobRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> dict[str, Any]:
        await job.start()
        return {"text": "\ud800"}

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).reason is Reason.INTERNAL
    assert "UnicodeEncodeError" in capsys.readouterr().err


async def test_handler_that_returns_without_having_started_the_job_fails_it(
    registry: JobRegistry, runner: JobRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> None:
        return None

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).reason is Reason.INTERNAL
    assert "it cannot become completed" in capsys.readouterr().err


async def test_handler_whose_own_task_was_cancelled_does_not_leave_the_job_running(
    registry: JobRegistry, runner: JobRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> None:
        await job.start()
        other = asyncio.create_task(asyncio.sleep(SECONDS))
        other.cancel()
        await other

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).reason is Reason.INTERNAL
    assert "CancelledError" in capsys.readouterr().err


async def test_cancel_of_a_running_job_ends_it_once_its_handler_has_cleaned_up(
    registry: JobRegistry, runner: JobRunner
) -> None:
    record, work = await new_job(registry), Work()
    task = launch(runner, record, work)
    await work.has_begun.wait()
    marked = await runner.cancel(record.job_id)
    assert (marked.state, marked.is_cancel_requested) == (JobState.RUNNING, True)
    await finished(task)
    assert work.was_interrupted
    closing, end = await last_two(registry, record.job_id)
    assert (closing["action"], end["state"], end["reason"]) == ("queen_cancelled", "cancelled", "user")
    again = await runner.cancel(record.job_id)
    assert again == await registry.get(record.job_id)


@pytest.mark.parametrize("error", [WorkerLostError(), ValueError("oops")])
async def test_error_in_the_clean_up_after_a_cancel_does_not_change_the_end(
    registry: JobRegistry, runner: JobRunner, error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    record, work = await new_job(registry), Work(cleanup_error=error)
    task = launch(runner, record, work)
    await work.has_begun.wait()
    await runner.cancel(record.job_id)
    await finished(task)
    assert (await registry.get(record.job_id)).state is JobState.CANCELLED


async def test_cancel_of_a_queued_job_ends_it_at_once(registry: JobRegistry, runner: JobRunner) -> None:
    record, waiting = await new_job(registry), asyncio.Event()

    async def handler(job: RunningJob) -> None:
        waiting.set()
        await asyncio.sleep(SECONDS)

    task = launch(runner, record, handler)
    await waiting.wait()
    assert (await runner.cancel(record.job_id)).state is JobState.CANCELLED
    await finished(task)
    assert kinds(await whole_log(registry, record.job_id)) == ["queued", "narration", "end"]


async def test_cancel_before_the_task_has_begun_ends_the_job(registry: JobRegistry, runner: JobRunner) -> None:
    record = await registry.start((await new_job(registry)).job_id, owner="boot-1")
    was_called = False

    async def handler(job: RunningJob) -> None:
        nonlocal was_called
        was_called = True

    cancelling = asyncio.create_task(runner.cancel(record.job_id))
    asked = registry.request_cancel

    async def launched_just_before(job_id: str) -> JobRecord:
        marked = await asked(job_id)
        launch(runner, record, handler)
        return marked

    registry.request_cancel = launched_just_before  # type: ignore[method-assign]
    await cancelling
    task = runner.running[record.job_id].task
    assert task is not None
    await finished(task)
    assert not was_called
    assert (await registry.get(record.job_id)).state is JobState.CANCELLED


async def test_cancel_of_an_ended_or_unknown_job_changes_nothing(registry: JobRegistry, runner: JobRunner) -> None:
    record = await new_job(registry)

    async def handler(job: RunningJob) -> None:
        await job.start()

    await finished(launch(runner, record, handler))
    log = await whole_log(registry, record.job_id)
    assert (await runner.cancel(record.job_id)).state is JobState.COMPLETED
    assert await whole_log(registry, record.job_id) == log
    with pytest.raises(NotFoundError):
        await runner.cancel("job-x")


async def test_cancel_that_comes_while_the_end_is_written_is_too_late(
    registry: JobRegistry, runner: JobRunner, said: ListSink
) -> None:
    record, work = await new_job(registry), Work()
    task = launch(runner, record, work)
    await work.has_begun.wait()
    ending, go_on, end = asyncio.Event(), asyncio.Event(), registry.end

    async def slow_end(*args: Any, **values: Any) -> JobRecord:
        ending.set()
        await go_on.wait()
        return await end(*args, **values)

    registry.end = slow_end  # type: ignore[method-assign]
    work.go_on.set()
    await ending.wait()
    await runner.cancel(record.job_id)
    go_on.set()
    await finished(task)
    assert (await registry.get(record.job_id)).state is JobState.COMPLETED
    assert said.actions == ["queen_complete"]


async def test_deadline_fails_the_job_with_timeout(registry: JobRegistry, runner: JobRunner) -> None:
    record = await registry.create(QueenCheck(timeout_s=0.05), correlation_id="c")
    work = Work()
    await finished(launch(runner, record, work))
    assert work.was_interrupted
    closing, end = await last_two(registry, record.job_id)
    assert closing["action"] == "queen_failed"
    assert (end["state"], end["reason"], end["error"]["code"]) == ("failed", "timeout", "timeout")
    assert end["message"] == "The job did not end within its 0.05 s."


async def test_deadline_that_passed_while_nobody_ran_the_job_fails_it_at_once(said: ListSink) -> None:
    registry = JobRegistry.open(None)
    runner = JobRunner(registry, actor="queen", owner="boot-2", handlers={})
    record = await registry.create(QueenCheck(timeout_s=100), correlation_id="c")
    registry._clock = lambda: record.created_at + 101
    await finished(launch(runner, record, Work()))
    assert (await registry.get(record.job_id)).reason is Reason.TIMEOUT
    await registry.close()


async def test_job_that_is_still_queued_at_its_queue_deadline_fails(
    registry: JobRegistry, runner: JobRunner
) -> None:
    record = await registry.create(QueenCheck(queue_timeout_s=0.05, timeout_s=3600), correlation_id="c")

    async def handler(job: RunningJob) -> None:
        await asyncio.Event().wait()

    await finished(launch(runner, record, handler))
    closing, end = await last_two(registry, record.job_id)
    assert closing["action"] == "queen_failed"
    assert (end["state"], end["reason"], end["error"]["code"]) == ("failed", "queue_timeout", "queue_timeout")
    assert end["message"] == "The job still waited for its place after 0.05 s."
    assert kinds(await whole_log(registry, record.job_id)) == ["queued", "narration", "end"]


async def test_job_that_is_being_started_at_its_queue_deadline_runs_on(
    registry: JobRegistry, runner: JobRunner
) -> None:
    record = await registry.create(QueenCheck(queue_timeout_s=3600), correlation_id="c")
    was_watched, is_watched_in_start, start = [], [], registry.start

    async def start_and_look(*args: Any, **values: Any) -> JobRecord:
        is_watched_in_start.append(not deadline().cancelled())
        return await start(*args, **values)

    def deadline() -> asyncio.TimerHandle:
        watching = runner.running[record.job_id].queue_deadline
        assert watching is not None
        return watching

    registry.start = start_and_look  # type: ignore[method-assign]

    async def handler(job: RunningJob) -> None:
        was_watched.append(not deadline().cancelled())
        await job.start()

    await finished(launch(runner, record, handler))
    assert (was_watched, is_watched_in_start) == ([True], [False])
    assert (await registry.get(record.job_id)).state is JobState.COMPLETED


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (QueenCheck(queue_timeout_s=100), Reason.QUEUE_TIMEOUT),
        (QueenCheck(queue_timeout_s=100, timeout_s=99), Reason.TIMEOUT),
    ],
)
async def test_queue_deadline_that_passed_while_nobody_ran_the_job_fails_it_before_its_handler_begins(
    said: ListSink, operation: QueenCheck, reason: Reason
) -> None:
    registry = JobRegistry.open(None)
    runner = JobRunner(registry, actor="queen", owner="boot-2", handlers={})
    record = await registry.create(operation, correlation_id="c")
    registry._clock = lambda: record.created_at + 101
    work = Work()
    await finished(launch(runner, record, work))
    assert (await registry.get(record.job_id)).reason is reason
    assert not work.has_begun.is_set()
    await registry.close()


async def test_queue_deadline_of_a_job_that_runs_already_is_not_watched(said: ListSink) -> None:
    registry = JobRegistry.open(None)
    runner = JobRunner(registry, actor="queen", owner="boot-2", handlers={})
    record = await registry.create(QueenCheck(queue_timeout_s=100), correlation_id="c")
    record = await registry.start(record.job_id, owner="boot-2")
    registry._clock = lambda: record.created_at + 101

    async def handler(job: RunningJob) -> None:
        await job.take_over()

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).state is JobState.COMPLETED
    await registry.close()


async def test_job_that_ends_before_its_deadline_is_complete(registry: JobRegistry, runner: JobRunner) -> None:
    record = await registry.create(QueenCheck(timeout_s=3600), correlation_id="c")

    async def handler(job: RunningJob) -> None:
        await job.start()

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).state is JobState.COMPLETED


async def test_close_leaves_jobs_on_disk_as_they_are(registry: JobRegistry, runner: JobRunner) -> None:
    records, works = [await new_job(registry) for _ in range(3)], [Work() for _ in range(3)]
    for record, work in zip(records, works, strict=True):
        launch(runner, record, work)
        await work.has_begun.wait()
    works[0].go_on.set()
    before = [await registry.get(record.job_id) for record in records]
    await runner.close(grace_s=0.5)
    after = [await registry.get(record.job_id) for record in records]
    assert after[0].state is JobState.COMPLETED
    assert after[1:] == before[1:]
    assert [work.was_interrupted for work in works] == [False, True, True]
    for record in records[1:]:
        assert kinds(await whole_log(registry, record.job_id)) == ["queued", "running"]


async def test_end_by_another_owner_meanwhile_stands(
    registry: JobRegistry, runner: JobRunner, said: ListSink
) -> None:
    record, work = await new_job(registry), Work()
    task = launch(runner, record, work)
    await work.has_begun.wait()
    taken = await registry.start(record.job_id, owner="boot-2")
    work.go_on.set()
    await finished(task)
    assert await registry.get(record.job_id) == taken
    fence = Fence("boot-2", 2)
    await registry.end(record.job_id, JobState.FAILED, reason=Reason.STALLED, message="m", fence=fence)
    assert said.actions == []


async def test_end_that_finds_the_disk_full_is_written_once_there_is_room(
    registry: JobRegistry, runner: JobRunner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.jobs.endings.AGAIN_S", 0.001)
    record, end, refusals = await new_job(registry), registry.end, iter([StorageFullError(), StorageFullError()])

    async def full_at_first(*args: Any, **values: Any) -> JobRecord:
        for refusal in refusals:
            raise refusal
        return await end(*args, **values)

    registry.end = full_at_first  # type: ignore[method-assign]

    async def handler(job: RunningJob) -> dict[str, Any]:
        await job.start()
        return {"n": 1}

    await finished(launch(runner, record, handler))
    assert (await registry.get(record.job_id)).state is JobState.COMPLETED
    assert capsys.readouterr().err.count("cannot be ended yet") == 1


async def test_launch_of_a_job_that_runs_here_gives_its_task(registry: JobRegistry, runner: JobRunner) -> None:
    record, work = await new_job(registry), Work()
    first = runner.launch(record, QueenCheck(), work)
    assert runner.launch(record, QueenCheck(), work) is first
    await work.has_begun.wait()
    work.go_on.set()
    assert first.task is not None
    await finished(first.task)
    assert runner.running == {}


async def test_launch_of_an_operation_nobody_handles_leaves_nothing_behind(
    registry: JobRegistry, runner: JobRunner
) -> None:
    record = await new_job(registry)
    with pytest.raises(KeyError):
        runner.launch(record, Infer(prompt="x"))
    assert runner.running == {}


async def test_many_jobs_at_once_each_end_once_and_narrate_under_their_own_name(
    registry: JobRegistry, runner: JobRunner, said: ListSink
) -> None:
    async def handler(job: RunningJob) -> dict[str, Any]:
        await job.start()
        narrate("queen_speak", job.job_id)
        return {"id": job.job_id}

    records = [await new_job(registry) for _ in range(100)]
    await asyncio.gather(*(finished(launch(runner, record, handler)) for record in records))
    for record in records:
        assert (await registry.view(record.job_id)).result == {"id": record.job_id}
    assert all(event["job_id"] == event["message"] for event in said.events if event["action"] == "queen_speak")
    assert said.actions.count("queen_complete") == 100


async def test_runner_whose_jobs_nobody_knows_says_their_end_in_no_jobs_name(
    registry: JobRegistry, said: ListSink
) -> None:
    async def work(job: RunningJob) -> None:
        await job.start()

    runner = JobRunner(registry, actor="hive", owner="boot-1", handlers={}, is_known=False)
    record = await new_job(registry)
    job = runner.launch(record, QueenCheck(), work)
    assert job.task is not None
    await job.task

    [closing] = [event for event in said.events if event["action"] == "hive_complete"]
    assert (closing.get("job_id"), closing["fields"]) == (None, {"hive_job_id": record.job_id})
    kept = json.loads((await whole_log(registry, record.job_id))[-2])
    assert (kept["job_id"], kept.get("fields")) == (record.job_id, None)


async def test_cancel_that_is_marked_just_before_the_handler_starts_the_job_cancels_it(
    registry: JobRegistry, runner: JobRunner
) -> None:
    async def work(job: RunningJob) -> None:
        await registry.request_cancel(job.job_id)
        await job.start()

    record = await new_job(registry)
    job = runner.launch(record, QueenCheck(), work)
    assert job.task is not None
    await job.task

    assert (await registry.get(record.job_id)).state is JobState.CANCELLED
