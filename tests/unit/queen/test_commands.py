from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from rbee.contracts.operations import HiveCheck, ModelDownload, QueenCheck, WorkerSpawn, WorkerStop
from rbee.contracts.states import WorkerState
from rbee.errors import NoCapacityError
from rbee.queen.hives import worker_view
from tests.unit.queen.queen_stage import GIB, MODEL
from tests.unit.queen.scripted_hive import Queen, queen_of, until


async def test_stop_of_an_idle_worker_is_forwarded_at_once(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()

    job_id = await whole_queen.submit(WorkerStop(worker_id=worker_id))

    assert (await whole_queen.end(job_id))["state"] == "completed"
    [stop] = hive.commands
    assert isinstance(stop, WorkerStop)
    assert (stop.worker_id, stop.parent_job_id) == (worker_id, job_id)
    assert "queen_drain" not in await whole_queen.said(job_id)


async def test_stopped_worker_is_not_placed_on_though_a_heartbeat_still_names_it(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()
    listed = list(hive.workers)
    await whole_queen.end(await whole_queen.submit(WorkerStop(worker_id=worker_id)))

    hive.workers = listed
    hive.beat()

    assert await whole_queen.until_running(await whole_queen.infer()) != worker_id


async def test_stop_waits_for_the_answers_and_places_nothing_more(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()
    answered = await whole_queen.infer()
    await until(lambda: len(hive.asked) == 1)

    stopping = await whole_queen.submit(WorkerStop(worker_id=worker_id))
    await until(lambda: "queen_drain" in whole_queen.sink.actions)
    view = worker_view(whole_queen.service.book.worker(worker_id), whole_queen.service.workers)
    later = await whole_queen.infer()
    other = await whole_queen.until_running(later)
    assert not any(isinstance(command, WorkerStop) for command in hive.commands)
    await hive.answer(worker_id, answered, "x")

    assert (view.state, view.slots_used) == (WorkerState.DRAINING, 1)
    assert other != worker_id
    assert (await whole_queen.end(answered))["state"] == "completed"
    assert (await whole_queen.end(stopping))["state"] == "completed"
    assert isinstance(hive.commands[-1], WorkerStop)


async def test_stop_does_not_wait_beyond_its_time(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()
    await whole_queen.infer()
    await until(lambda: len(hive.asked) == 1)

    job_id = await whole_queen.submit(WorkerStop(worker_id=worker_id, drain_s=0.01))

    assert (await whole_queen.end(job_id))["state"] == "completed"


async def test_cancelled_stop_lets_the_worker_be_used_again(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    worker_id = hive.has_worker()
    await whole_queen.infer()
    await until(lambda: len(hive.asked) == 1)
    stopping = await whole_queen.submit(WorkerStop(worker_id=worker_id))
    await until(lambda: "queen_drain" in whole_queen.sink.actions)

    await whole_queen.service.runner.cancel(stopping)
    await whole_queen.end(stopping)

    assert await whole_queen.until_running(await whole_queen.infer()) == worker_id


async def test_stop_of_a_worker_nobody_has_fails(whole_queen: Queen) -> None:
    end = await whole_queen.end(await whole_queen.submit(WorkerStop(worker_id="worker-x")))

    assert (end["state"], end["error"]["code"]) == ("failed", "not_found")


async def test_idle_worker_is_stopped_by_a_job_of_the_queens_own(tmp_path: Path) -> None:
    async with queen_of(tmp_path, keep_alive_s=0.1) as queen:
        hive = await queen.live_hive()
        hive.has_worker()
        await until(lambda: len(hive.commands) == 1)
        await until(lambda: not hive.workers)

    assert "queen_stop_idle" in queen.sink.actions


async def test_idle_worker_is_tried_again_when_its_stop_was_refused(tmp_path: Path) -> None:
    async with queen_of(tmp_path, keep_alive_s=0.05, queued_max=1) as queen:
        queen.registry.queued_max = 0
        hive = await queen.live_hive()
        hive.has_worker()
        await until(lambda: queen.sink.actions.count("queen_stop_refused") >= 2)
        queen.registry.queued_max = 1
        await until(lambda: not hive.workers)


async def test_queen_that_stops_accepts_nothing(whole_queen: Queen) -> None:
    await whole_queen.service.close(0)

    with pytest.raises(Exception, match="stopping"):
        await whole_queen.submit(QueenCheck())


async def test_spawn_goes_to_the_live_hive_with_the_most_memory(whole_queen: Queen) -> None:
    await whole_queen.live_hive(free=2**30)
    large = await whole_queen.live_hive(free=2**35)

    end = await whole_queen.end(await whole_queen.submit(WorkerSpawn(model="smollm2:135m", slots=3)))

    assert end["result"]["hive_id"] == large.hive_id
    [spawn] = large.commands
    assert isinstance(spawn, WorkerSpawn)
    assert spawn.slots == 3


async def test_spawn_whose_hive_has_no_room_after_all_goes_to_the_next_one(whole_queen: Queen) -> None:
    hive, other = await whole_queen.live_hive(free=8 * GIB), await whole_queen.live_hive(free=4 * GIB)
    hive.failure = NoCapacityError("There are 10 MiB of memory free.")

    ending = asyncio.ensure_future(whole_queen.end(await whole_queen.submit(WorkerSpawn(model=MODEL))))
    await until(lambda: len(hive.commands) == 1)
    hive.free = 10 * 2**20
    while not ending.done():  # until it is decided anew, by whatever it told last
        hive.beat()
        await asyncio.sleep(0.01)

    assert ending.result()["result"]["hive_id"] == other.hive_id
    assert len(hive.commands) == 1


async def test_spawn_on_a_device_that_no_hive_has_is_invalid_and_names_those_there_are(whole_queen: Queen) -> None:
    await whole_queen.live_hive()

    end = await whole_queen.end(await whole_queen.submit(WorkerSpawn(model="smollm2:135m", device="cpuu")))

    assert (end["state"], end["reason"]) == ("failed", "invalid")
    assert end["message"] == "No hive has a device `cpuu` (did you mean `cpu`?). There are: cpu."


async def test_command_for_any_hive_without_one_fails_with_no_capacity(whole_queen: Queen) -> None:
    end = await whole_queen.end(await whole_queen.submit(HiveCheck()))

    assert (end["state"], end["reason"]) == ("failed", "no_capacity")


async def test_command_for_an_unknown_hive_fails_as_not_found(whole_queen: Queen) -> None:
    job = ModelDownload(model="smollm2:135m", hive_id="hive-x")

    assert (await whole_queen.end(await whole_queen.submit(job)))["error"]["code"] == "not_found"


async def test_check_says_as_many_sentences_as_were_asked_for(whole_queen: Queen) -> None:
    job_id = await whole_queen.submit(QueenCheck(lines=2))

    assert (await whole_queen.end(job_id))["state"] == "completed"
    assert (await whole_queen.said(job_id)).count("queen_check") == 2
