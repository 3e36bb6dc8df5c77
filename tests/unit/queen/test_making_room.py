"""Workers that are stopped so that another model fits, with the queen's real parts and scripted hives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.model_settings import ModelSettings, ModelTable
from rbee.contracts.operations import WorkerSpawn, WorkerStop
from rbee.contracts.states import JobState
from rbee.errors import WorkerError
from rbee.jobs.records import JobFilter
from rbee.queen import inventory, preloads
from rbee.queen.hives import HiveBook
from tests.unit.queen.fleet_stage import NOW, fleet, hive, wanted
from tests.unit.queen.queen_stage import GIB, MODEL
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, until

OTHER = "hf:some/other"
MODELS = {MODEL: GIB, OTHER: GIB}


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "GRACE_S", 0.0)


async def full_hive(queen: Queen, **values: Any) -> tuple[ScriptedHive, str]:
    """Have a hive that may run one worker, and runs one of another model."""
    hive = await queen.live_hive(models=MODELS, workers_max=1, **values)
    return hive, hive.has_worker(model=OTHER)


def messages(events: list[dict[str, Any]], action: str) -> list[str]:
    return [event["message"] for event in events if event.get("action") == action]


async def test_idle_worker_is_stopped_for_a_job_whose_log_says_so(whole_queen: Queen) -> None:
    """The stop is a job of the queen's own; the job waits for it and is then placed, with that as its reason."""
    hive, idle = await full_hive(whole_queen)

    job_id = await whole_queen.infer()
    worker_id = await whole_queen.until_running(job_id)

    log = await whole_queen.log(job_id)
    assert [type(command) for command in hive.commands] == [WorkerStop, WorkerSpawn]
    assert messages(log, "queen_evict") == [
        f"{hive.hive_id} stops {idle} (model {OTHER}, idle for 0 s) to make room for {MODEL}."
    ]
    [forward] = messages(log, "queen_forward")
    assert forward == (
        f"Placed on {hive.hive_id}, which starts a worker: no worker has {MODEL} loaded, and {hive.hive_id} has "
        f"the memory for it; room was made by stopping {idle} (model {OTHER}, idle for 0 s)."
    )
    assert [info.worker_id for info in hive.workers] == [worker_id]
    assert (await whole_queen.registry.view(job_id)).message == forward
    [stop] = [
        job
        for job in await whole_queen.registry.find(JobFilter(operation="worker_stop"))
        if job.principal == "queen"
    ]
    assert stop.state is JobState.COMPLETED


async def test_busy_worker_is_waited_for_and_stopped_when_it_has_answered(whole_queen: Queen) -> None:
    hive, busy = await full_hive(whole_queen)
    first = await whole_queen.infer(model=OTHER)
    await until(lambda: len(hive.asked) == 1)

    second = await whole_queen.infer()
    await until(lambda: "queen_wait" in whole_queen.sink.actions)
    assert not hive.commands
    told = messages(await whole_queen.log(second), "queen_wait")
    await hive.answer(busy, first, "x")
    await whole_queen.until_running(second)

    assert told == [
        f"Waiting for {MODEL}: this job is next; {hive.hive_id} runs 1 worker, as many as it may "
        "(workers there: 1 answering)."
    ]
    assert [type(command) for command in hive.commands] == [WorkerStop, WorkerSpawn]


async def test_nothing_is_placed_on_a_worker_that_is_about_to_go(whole_queen: Queen) -> None:
    hive, idle = await full_hive(whole_queen)
    hive.may_go_on.clear()
    first = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)

    second = await whole_queen.infer(model=OTHER)
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 2)
    await until(lambda: "queen_wait" in whole_queen.sink.actions)
    assert whole_queen.service.workers.slots_used(idle) == 0
    hive.may_go_on.set()
    placed = await whole_queen.until_running(first)
    await hive.answer(placed, first, "x")
    await whole_queen.end(first)
    await whole_queen.until_running(second)

    kinds = [type(command) for command in hive.commands]
    assert kinds == [WorkerStop, WorkerSpawn, WorkerStop, WorkerSpawn]


async def test_two_jobs_for_two_models_that_do_not_fit_together_both_end(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive(models=MODELS, workers_max=1)
    jobs = [await whole_queen.infer(), await whole_queen.infer(model=OTHER)]

    for number, job_id in enumerate(jobs, 1):
        await until(lambda number=number: len(hive.asked) == number)  # type: ignore[misc]
        assert hive.asked[-1][1]["x-job-id"] == job_id
        await hive.answer(hive.workers[0].worker_id, job_id, "x")

    assert [(await whole_queen.end(job_id))["state"] for job_id in jobs] == ["completed"] * 2
    assert sum(isinstance(command, WorkerSpawn) for command in hive.commands) == 2


async def test_worker_that_was_started_for_a_job_answers_it_before_it_is_stopped(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a job for another model is more urgent."""
    monkeypatch.setattr(inventory, "GRACE_S", 30.0)
    hive = await whole_queen.live_hive(models=MODELS, workers_max=1)
    hive.may_go_on.clear()
    first = await whole_queen.infer()
    await until(lambda: len(hive.commands) == 1)
    urgent = await whole_queen.infer(model=OTHER, priority=10)
    await until(lambda: len(whole_queen.service.dispatcher._tickets) == 2)
    hive.may_go_on.set()

    worker_id = await whole_queen.until_running(first)
    assert len(hive.commands) == 1
    await hive.answer(worker_id, first, "x")
    await whole_queen.until_running(urgent)


async def test_stop_that_has_begun_goes_on_when_the_job_that_it_is_for_is_cancelled(whole_queen: Queen) -> None:
    hive, idle = await full_hive(whole_queen)
    service = whole_queen.service
    job_id = await whole_queen.infer()
    await until(lambda: bool(service.dispatcher.launches.under_way))

    await service.runner.cancel(job_id)
    await whole_queen.end(job_id)

    assert await whole_queen.until_running(await whole_queen.infer(model=OTHER)) != idle
    assert [type(command) for command in hive.commands] == [WorkerStop, WorkerSpawn]
    await until(lambda: not service.dispatcher.launches.under_way)


async def test_worker_that_cannot_be_stopped_is_left_alone_and_the_job_waits(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "GRACE_S", 30.0)
    hive = await whole_queen.live_hive(models=MODELS, workers_max=1)
    stuck = hive.has_worker(model=OTHER)
    await whole_queen.until_running(first := await whole_queen.infer(model=OTHER))
    await until(lambda: len(hive.asked) == 1)
    await hive.answer(stuck, first, "x")
    await whole_queen.end(first)
    hive.failure = WorkerError("It does not end.")
    monkeypatch.setattr("rbee.queen.making_room.HEARD_S", 0.0)

    second = await whole_queen.infer()
    await until(lambda: "queen_wait" in whole_queen.sink.actions)

    assert messages(await whole_queen.log(second), "queen_wait")[0].endswith("(workers there: 1 just started).")
    assert len(hive.commands) == 1
    assert await whole_queen.until_running(await whole_queen.infer(model=OTHER)) == stuck


async def test_full_queue_does_not_keep_room_from_being_made(whole_queen: Queen) -> None:
    await full_hive(whole_queen)
    whole_queen.registry.queued_max = 1

    await whole_queen.until_running(await whole_queen.infer())


async def test_spawn_makes_room_too_and_says_so(whole_queen: Queen) -> None:
    hive, idle = await full_hive(whole_queen)

    job_id = await whole_queen.submit(WorkerSpawn(model=MODEL))
    end = await whole_queen.end(job_id)

    log = await whole_queen.log(job_id)
    assert end["result"]["hive_id"] == hive.hive_id
    assert messages(log, "queen_evict")[0].startswith(f"{hive.hive_id} stops {idle}")
    assert messages(log, "queen_forward")[0].endswith(
        f"room was made by stopping {idle} (model {OTHER}, idle for 0 s)."
    )


async def test_spawn_that_fits_nowhere_fails_with_each_hives_reason(whole_queen: Queen) -> None:
    hive, _ = await full_hive(whole_queen)
    await whole_queen.infer(model=OTHER)
    await until(lambda: len(hive.asked) == 1)

    end = await whole_queen.end(await whole_queen.submit(WorkerSpawn(model=MODEL)))

    assert (end["state"], end["reason"]) == ("failed", "no_capacity")
    assert end["message"] == (
        f"No hive can start a worker with {MODEL}: {hive.hive_id} runs 1 worker, as many as it may "
        "(workers there: 1 answering)."
    )


async def test_second_worker_that_cannot_be_started_fails_nobody(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rbee.queen.scheduler.ADD_AFTER_S", 0.0)
    full, other = await whole_queen.live_hive(), await whole_queen.live_hive()
    worker_id = full.has_worker(slots=1)
    other.failure = WorkerError("It does not load.")
    first = await whole_queen.infer()
    await whole_queen.until_running(first)
    second = await whole_queen.infer()
    await until(lambda: "queen_start_failed" in whole_queen.sink.actions)
    await full.answer(worker_id, first, "x")

    assert await whole_queen.until_running(second) == worker_id
    assert len(other.commands) == 1


async def test_second_worker_is_started_on_another_hive_when_all_slots_stay_taken(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.queen.scheduler.ADD_AFTER_S", 0.0)
    full, other = await whole_queen.live_hive(), await whole_queen.live_hive()
    full.has_worker(slots=1)
    await whole_queen.until_running(await whole_queen.infer())

    second = await whole_queen.infer()

    worker_id = await whole_queen.until_running(second)
    assert [info.worker_id for info in other.workers] == [worker_id]


# What is configured for a model


async def test_pinned_models_are_neither_stopped_for_others_nor_for_being_idle(tmp_path: Path) -> None:
    table = ModelTable(models={OTHER: ModelSettings(pinned=True)})
    async with queen_of(tmp_path, models=table, keep_alive_s=0.05, hive_timeout_s=0.3) as queen:
        hive, pinned = await full_hive(queen)
        end = await queen.end(await queen.infer())
        assert end["message"] == (
            f"No hive could take {MODEL} for 0.3 s: {hive.hive_id} runs 1 worker, as many as it may "
            "(workers there: 1 kept)."
        )
        assert [info.worker_id for info in hive.workers] == [pinned]


async def test_settings_of_a_model_are_those_of_its_workers(tmp_path: Path) -> None:
    own = ModelSettings(slots=7, context_tokens=100, engine="llama_cpp", purpose="embed")
    async with queen_of(tmp_path, models=ModelTable(models={MODEL: own})) as queen:
        hive = await queen.live_hive()
        hive.may_go_on.clear()
        await queen.infer()
        await until(lambda: len(hive.commands) == 1)
        [spawn] = hive.commands

    assert isinstance(spawn, WorkerSpawn)
    assert (spawn.slots, spawn.context_tokens, spawn.purpose) == (7, 100, "embed")


async def test_preloaded_model_is_started_as_soon_as_a_hive_can_take_it_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloads, "SETTLE_S", 0.0)
    table = ModelTable(models={MODEL: ModelSettings(preload=True, slots=3)})
    async with queen_of(tmp_path, models=table, keep_alive_s=0.05) as queen:
        hive = await queen.live_hive(models=MODELS, workers_max=2)
        other = hive.has_worker(model=OTHER)
        await until(lambda: [info.worker_id for info in hive.workers] != [other] and len(hive.workers) == 1)
        [spawn] = [command for command in hive.commands if isinstance(command, WorkerSpawn)]

    assert (spawn.model, spawn.slots) == (MODEL, 3)
    assert hive.workers[0].model == MODEL


async def test_preload_that_takes_long_keeps_no_other_one_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloads, "SETTLE_S", 0.0)
    table = ModelTable(models={model: ModelSettings(preload=True) for model in MODELS})
    asked: list[str] = []
    both = asyncio.Event()

    async def spawn(operation: WorkerSpawn) -> None:
        asked.append(operation.model)
        if len(asked) == len(MODELS):
            both.set()
        await asyncio.Event().wait()

    book = HiveBook(stale_s=3, lost_s=15, clock=lambda: NOW)
    loading = preloads.Preloads(table, book, wanted, lambda: fleet(hive()), spawn)
    running = asyncio.ensure_future(loading.run())
    async with asyncio.timeout(10):
        await both.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)

    assert set(asked) == set(MODELS)


async def test_preload_that_fails_is_tried_again_later_and_not_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloads, "SETTLE_S", 0.0)
    monkeypatch.setattr(preloads, "LOOK_S", 0.01)
    table = ModelTable(models={MODEL: ModelSettings(preload=True)})
    async with queen_of(tmp_path, models=table) as queen:
        hive = await queen.live_hive()
        hive.failure = WorkerError("It does not load.")
        await until(lambda: len(hive.commands) == 1 and not hive.runner.running)
        looked = asyncio.Event()
        missing = queen.service._preloads.missing
        results = []

        def watched(model: str) -> WorkerSpawn | None:
            results.append(missing(model))
            if len(results) == 5:
                looked.set()
            return results[-1]

        monkeypatch.setattr(queen.service._preloads, "missing", watched)
        async with asyncio.timeout(10):
            await looked.wait()
        assert results == [None] * 5
        monkeypatch.setattr(preloads, "BACK_OFF_S", 0.0)
        hive.failure = None
        queen.service._preloads._not_before.clear()
        await until(lambda: bool(hive.workers))


async def test_worker_is_unloaded_as_soon_as_its_job_has_ended_where_the_model_says_so(tmp_path: Path) -> None:
    table = ModelTable(models={MODEL: ModelSettings(keep_alive_s=0)})
    async with queen_of(tmp_path, models=table) as queen:
        hive = await queen.live_hive()
        worker_id = await queen.until_running(job_id := await queen.infer())
        await until(lambda: len(hive.asked) == 1)
        await hive.answer(worker_id, job_id, "x")
        await queen.end(job_id)
        await until(lambda: not hive.workers)
