from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rbee.contracts.operations import WorkerSpawn
from rbee.contracts.states import JobState, Phase
from rbee.errors import DownloadFailedError, ModelInvalidError, NoCapacityError
from rbee.jobs import JobRegistry
from rbee.queen import launches
from tests.unit.queen.queen_stage import GIB, MODEL, worker_exit
from tests.unit.queen.scripted_hive import Queen, queen_of, until


async def test_ready_worker_gets_the_job_and_its_answer_becomes_the_result(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()

    job_id = await whole_queen.infer(max_tokens=3)
    await until(lambda: len(hive.asked) == 1)
    await hive.answer(worker_id, job_id, "two ", "words")
    end = await whole_queen.end(job_id)

    body, headers = hive.asked[0]
    assert body == {"messages": [{"role": "user", "content": "hello"}], "stream": True, "max_tokens": 3}
    assert headers["x-request-id"] == f"{job_id}.1"
    assert headers["authorization"] == "Bearer secret"
    assert (end["state"], end["result"]["text"]) == ("completed", "two words")
    said = [action for action in await whole_queen.said(job_id) if action not in ("state", "token")]
    assert said == ["queen_receive", "queen_forward", "worker_inference", "queen_complete", "end"]
    assert whole_queen.service.workers.slots_used(worker_id) == 0


async def test_cold_job_starts_one_worker_and_says_forward_once(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()

    job_id = await whole_queen.infer()
    worker_id = await whole_queen.until_running(job_id)

    [spawn] = hive.commands
    assert isinstance(spawn, WorkerSpawn)
    assert (spawn.worker_id, spawn.parent_job_id, spawn.model) == (worker_id, job_id, MODEL)
    assert (await whole_queen.said(job_id)).count("queen_forward") == 1


async def test_phases_of_a_cold_job_are_told(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive(models={})
    hive.may_go_on.clear()
    job_id = await whole_queen.infer()

    async def phase() -> Phase | None:
        return (await whole_queen.registry.get(job_id)).phase

    await until(lambda: len(hive.commands) == 1)
    assert await phase() is Phase.DOWNLOADING_MODEL
    hive.may_go_on.set()
    await whole_queen.until_running(job_id)
    assert await phase() is Phase.GENERATING
    assert [type(command).__name__ for command in hive.commands] == ["ModelDownload", "WorkerSpawn"]


async def test_job_that_waits_for_anothers_start_is_placed_by_it(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    first = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    second = await whole_queen.infer()
    await until(lambda: second in _waiting(whole_queen))
    hive.may_go_on.set()

    places = {await whole_queen.until_running(first), await whole_queen.until_running(second)}

    assert len(hive.commands) == 1
    assert len(places) == 1
    said = [action for action in await whole_queen.said(second) if action != "state"]
    assert said == ["queen_receive", "queen_wait", "queen_forward"]


def _waiting(queen: Queen) -> list[str]:
    """Return the jobs that share a start that has begun."""
    return [
        job_id
        for starting in queen.service.dispatcher.launches.under_way.values()
        if starting.task is not None
        for job_id in starting.waiting()
    ]


async def test_start_goes_on_for_the_others_when_its_owner_is_cancelled(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    owner = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    other = await whole_queen.infer()
    await until(lambda: other in _waiting(whole_queen))

    await whole_queen.service.runner.cancel(owner)
    assert (await whole_queen.end(owner))["state"] == "cancelled"
    hive.may_go_on.set()
    await whole_queen.until_running(other)

    assert len(hive.commands) == 1
    assert whole_queen.service.workers.slots_used(hive.workers[0].worker_id) == 1


async def test_start_that_nobody_waits_for_any_more_is_cancelled_at_the_hive(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    [spawned] = hive.runner.running

    await whole_queen.service.runner.cancel(job_id)
    await until(lambda: not hive.runner.running)

    assert (await hive.registry.get(spawned)).state is JobState.CANCELLED
    await until(lambda: not whole_queen.service.dispatcher.launches.under_way)


async def test_job_that_comes_while_a_start_is_being_cancelled_gets_one_of_its_own(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    first = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)

    await whole_queen.service.runner.cancel(first)
    second = await whole_queen.infer()
    hive.may_go_on.set()

    await whole_queen.until_running(second)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (DownloadFailedError("It cannot be had."), "download_failed"),
        (ModelInvalidError("It is no model."), "model_invalid"),
        (RuntimeError("a fault of the hive's"), "internal"),
    ],
)
async def test_failed_start_fails_every_job_that_waits_for_it(
    whole_queen: Queen, failure: Exception, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    first = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    second = await whole_queen.infer()
    await until(lambda: second in _waiting(whole_queen))
    hive.failure = failure
    hive.may_go_on.set()

    ends = [await whole_queen.end(job_id) for job_id in (first, second)]

    assert [(end["state"], end["reason"]) for end in ends] == [("failed", reason)] * 2
    assert len(hive.commands) == 1
    assert await whole_queen.registry.store.workers() == []


async def test_fault_of_the_queens_own_in_a_start_fails_the_job_instead_of_leaving_it(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    await whole_queen.live_hive()

    async def broken(*values: object) -> None:
        raise KeyError("a fault")

    monkeypatch.setattr(whole_queen.service.workers, "add", broken)
    end = await whole_queen.end(await whole_queen.infer())

    assert (end["state"], end["reason"]) == ("failed", "internal")


async def test_worker_that_ends_before_it_is_ready_is_told_in_the_jobs_log_before_its_end(
    whole_queen: Queen,
) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    [spawn] = hive.commands
    assert isinstance(spawn, WorkerSpawn)
    assert spawn.worker_id is not None
    hive.failure = ModelInvalidError("It is no model.", details={"worker_id": spawn.worker_id, "exit_code": 4})
    hive.may_go_on.set()
    await until(lambda: not hive.runner.running and not any(_is_following(task) for task in asyncio.all_tasks()))
    for _ in range(20):  # the queen has heard of it, and acts on it
        await asyncio.sleep(0)
    await hive.say(f"{hive.hive_id}/boot", worker_exit(spawn.worker_id, {}, exit_code=4))

    end = await whole_queen.end(job_id)

    assert (await whole_queen.said(job_id))[-3:] == ["worker_exit", "queen_failed", "end"]
    assert end["error"]["exit_code"] == 4


def _is_following(task: asyncio.Task[object]) -> bool:
    return str(getattr(task.get_coro(), "__qualname__", "")) == "_end_of"


async def test_slots_are_never_exceeded_and_order_is_priority_then_arrival(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker(slots=1)
    blocking = await whole_queen.infer()
    await whole_queen.until_running(blocking)
    waiting = {}
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        job_id = await whole_queen.infer(priority=priority)
        waiting[job_id] = name
        await until(lambda: len(whole_queen.service.dispatcher._tickets) == len(waiting))

    order: list[str] = []
    while len(order) <= len(waiting):
        assert whole_queen.service.workers.slots_used(worker_id) == 1
        await until(lambda: len(hive.asked) > len(order))
        current = hive.asked[-1][1]["x-job-id"]
        order.append(waiting.get(current, "blocking"))
        await hive.answer(worker_id, current, "x")
        await whole_queen.end(current)

    assert order == ["blocking", "high", "first", "second", "low"]


async def test_many_jobs_never_hold_more_than_the_slots(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker(slots=3)
    jobs = [await whole_queen.infer() for _ in range(12)]
    answered: set[str] = set()
    while len(answered) < len(jobs):
        await until(lambda: len(hive.asked) > len(answered))
        assert whole_queen.service.workers.slots_used(worker_id) <= 3
        for _, headers in hive.asked[len(answered) :]:
            answered.add(headers["x-job-id"])
            await hive.answer(worker_id, headers["x-job-id"], "x")

    assert {(await whole_queen.end(job_id))["state"] for job_id in jobs} == {"completed"}


async def test_without_a_hive_a_job_fails_with_no_capacity_after_the_time(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_timeout_s=0.1) as queen:
        end = await queen.end(await queen.infer())

    assert (end["state"], end["reason"]) == ("failed", "no_capacity")
    assert "no hive has registered" in end["message"]


async def test_with_a_silent_hive_a_job_fails_with_hive_lost_after_the_time(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_timeout_s=0.1, hive_stale_s=0.0001) as queen:
        await queen.live_hive()
        end = await queen.end(await queen.infer())

    assert (end["state"], end["reason"]) == ("failed", "hive_lost")


async def test_model_that_fits_nowhere_fails_with_the_reason_of_each_hive(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_timeout_s=0.1) as queen:
        hive = await queen.live_hive(free=GIB)
        end = await queen.end(await queen.infer())

    assert (end["state"], end["reason"]) == ("failed", "no_capacity")
    assert f"{hive.hive_id} has 1024 MiB of memory free" in end["message"]


async def test_job_whose_hive_has_no_room_after_all_goes_to_the_next_one(whole_queen: Queen) -> None:
    """The hive measured less than it had told; by what it tells next, another one has more."""
    hive, other = await whole_queen.live_hive(free=8 * GIB), await whole_queen.live_hive(free=4 * GIB)
    hive.failure = NoCapacityError("There are 10 MiB of memory free.")

    job_id = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    hive.free = 10 * 2**20
    while not other.workers:  # until it is decided anew, by whatever it told last
        hive.beat()
        await asyncio.sleep(0.01)
    await whole_queen.until_running(job_id)

    said = [event["message"] for event in await whole_queen.log(job_id) if event.get("action") == "queen_forward"]
    assert len(hive.commands) == 1
    assert said[1] == (
        f"Placed on {other.hive_id}, which starts a worker: no worker has {MODEL} loaded, and {other.hive_id} has "
        f"the memory for it; {hive.hive_id} had no room before: There are 10 MiB of memory free."
    )


async def test_hive_that_has_no_room_again_and_again_fails_the_job_with_its_own_words(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.failure = NoCapacityError("There are 10 MiB of memory free.")

    job_id = await whole_queen.infer()
    ending = asyncio.ensure_future(whole_queen.end(job_id))
    while not ending.done():  # it says so once for each of them
        hive.beat()
        await asyncio.sleep(0.01)

    end = ending.result()
    assert (end["reason"], end["message"]) == ("no_capacity", hive.failure.message)
    assert len(hive.commands) == launches.REFUSALS_MAX + 1


async def test_hive_that_comes_late_is_used(whole_queen: Queen) -> None:
    job_id = await whole_queen.infer()
    await until(lambda: "queen_wait" in whole_queen.sink.actions)

    await whole_queen.live_hive()

    await whole_queen.until_running(job_id)


async def test_job_takes_a_slot_that_becomes_free_before_its_own_worker_is_ready(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)

    other = await whole_queen.live_hive()
    worker_id = other.has_worker()
    assert await whole_queen.until_running(job_id) == worker_id
    hive.may_go_on.set()
    await until(lambda: len(hive.workers) == 1)

    assert [event["message"] for event in await whole_queen.log(job_id) if event.get("action") == "queen_forward"][
        -1
    ].startswith(f"Placed on {worker_id}")


async def test_job_whose_worker_was_taken_and_died_starts_another(tmp_path: Path) -> None:
    async with queen_of(tmp_path, slots=1) as queen:
        hive = await queen.live_hive()
        hive.may_go_on.clear()
        owner = await queen.infer()
        await until(lambda: len(hive.commands) == 1)
        urgent = await queen.infer(priority=5, attempts=1)
        await until(lambda: urgent in _waiting(queen))
        hive.may_go_on.set()
        dying = await queen.until_running(urgent)
        await until(lambda: not queen.service.dispatcher.launches.under_way)

        hive.workers.clear()
        hive.beat()
        await hive.say(f"{hive.hive_id}/boot", worker_exit(dying, {}))

        assert (await queen.end(urgent))["reason"] == "worker_lost"
        assert await queen.until_running(owner) != dying
        assert len(hive.commands) == 2


async def test_draining_worker_gets_nothing_more(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    draining = hive.has_worker()
    whole_queen.service.workers.drain(draining)

    job_id = await whole_queen.infer()

    assert await whole_queen.until_running(job_id) != draining


async def test_job_that_is_cancelled_while_it_waits_leaves_nothing(whole_queen: Queen) -> None:
    job_id = await whole_queen.infer()
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 1)

    await whole_queen.service.runner.cancel(job_id)
    await until(lambda: not whole_queen.service.runner.running)

    assert whole_queen.service.dispatcher._tickets == []


async def test_queen_that_stops_gives_up_its_starts_and_leaves_the_job_queued(tmp_path: Path) -> None:
    registry = JobRegistry.open(None)
    async with queen_of(tmp_path, registry) as queen:
        hive = await queen.live_hive()
        hive.may_go_on.clear()
        job_id = await queen.infer()
        await until(lambda: len(hive.commands) == 1)
        await queen.service.close(0)
        await until(lambda: not hive.runner.running)

    assert (await registry.get(job_id)).state is JobState.QUEUED
    await registry.close()


async def test_start_that_is_cancelled_before_its_first_step_keeps_nothing(whole_queen: Queen) -> None:
    await whole_queen.live_hive()
    job_id = await whole_queen.infer()
    launches = whole_queen.service.dispatcher.launches
    await until(lambda: any(starting.task is not None for starting in launches.under_way.values()))
    [starting] = launches.under_way.values()
    assert starting.task is not None

    again = asyncio.get_running_loop().create_task(launches._do(starting, []))
    again.add_done_callback(lambda task: launches._done(starting))
    again.cancel()
    await until(again.done)

    await whole_queen.service.runner.cancel(job_id)
    await until(lambda: not launches.under_way)


async def test_higher_priority_is_worth_a_minute_of_waiting_for_each_step(whole_queen: Queen) -> None:
    """Also its view says so: whoever has waited longer than that goes first."""
    began_at = whole_queen.registry.now()
    jobs = []
    for after_s, priority in ((0, 0), (119, 2), (121, 2)):
        whole_queen.registry._clock = lambda after_s=after_s: began_at + after_s  # type: ignore[misc]
        jobs.append(await whole_queen.infer(priority=priority))
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 3)

    assert [ticket.job.job_id for ticket in whole_queen.service.dispatcher._tickets] == [jobs[1], jobs[0], jobs[2]]
    assert [(await whole_queen.registry.view(job_id)).queue_position for job_id in jobs] == [2, 1, 3]


async def test_looks_that_take_long_are_made_in_a_moment_for_all_changes_together(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    hive = await whole_queen.live_hive()
    dispatcher = whole_queen.service.dispatcher
    looks: list[int] = []
    pump = dispatcher.pump

    def counted() -> None:
        looks.append(1)
        pump()

    monkeypatch.setattr(dispatcher, "pump", counted)
    dispatcher._rest_until = dispatcher._book.now() + 0.2

    for _ in range(100):
        hive.beat()
    job_id = await whole_queen.infer()
    assert not looks
    await whole_queen.until_running(job_id)


async def test_nothing_is_remembered_of_a_worker_that_died_with_answers_on_it(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive(models={})
    worker_id = hive.has_worker()
    jobs = [await whole_queen.infer(attempts=1) for _ in range(2)]
    await until(lambda: len(hive.asked) == 2)

    await hive.kill(worker_id)
    for job_id in jobs:
        await whole_queen.end(job_id)
    await until(lambda: not whole_queen.service.runner.running)

    fleet = whole_queen.service.dispatcher._fleet
    assert [fleet._hive_of, fleet._slots_used, fleet._idle_since, fleet._answered] == [{}, {}, {}, set()]
    assert fleet.inventory().serving == {}
