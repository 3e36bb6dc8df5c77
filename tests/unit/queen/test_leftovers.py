from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbee.contracts.events import captured_event
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.ids import new_id
from rbee.contracts.operations import ChatCompletion
from rbee.contracts.states import JobState
from rbee.jobs import JobRegistry
from tests.unit.queen.queen_stage import closing, narration, token, worker_exit
from tests.unit.queen.scripted_hive import ScriptedHive, queen_of, until


@pytest.fixture
async def registry() -> AsyncIterator[JobRegistry]:
    registry = JobRegistry.open(None)
    yield registry
    await registry.close()


def _same_hive(hive: ScriptedHive, before: ScriptedHive) -> None:
    """Have the hive of an earlier queen's time speak to the next queen."""
    hive.hive_id = before.hive_id
    hive.workers = [
        WorkerInfo(**{name: getattr(info, name) for name in info.__struct_fields__ if name != "url"}, url=hive.url)
        for info in before.workers
    ]
    hive._offsets = before._offsets


async def test_answer_goes_on_where_it_was_and_is_whole(tmp_path: Path, registry: JobRegistry) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer()
        await until(lambda: len(before.asked) == 1)
        await before.say(f"{worker_id}/stdout", token(job_id, text="half "))

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        hive = await queen.hive()
        _same_hive(hive, before)
        await hive.say(f"{worker_id}/stdout", token(job_id, text="and "))
        assert queen.service.workers.slots_used(worker_id) == 1
        hive.beat()
        await until(lambda: len(hive.asked) == 1)
        assert hive.asked[0][1]["x-request-id"] == f"{job_id}.1"
        await hive.say(f"{worker_id}/stdout", token(job_id, text="half"), closing(job_id, frames=3))
        end = await queen.end(job_id)
        actions = [word for word in await queen.said(job_id) if "_" in word]
        assert queen.service.workers.slots_used(worker_id) == 0

    assert (end["state"], end["result"]["text"], end["result"]["attempts"]) == ("completed", "half and half", 1)
    assert actions == ["queen_receive", "queen_forward", "queen_resume", "worker_inference", "queen_complete"]


async def test_answer_that_closed_while_no_queen_acted_is_completed_from_its_log(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer()
        await until(lambda: len(before.asked) == 1)
    told = {"outcome": "completed", "frames": 1}
    closed = narration("worker_inference", job_id=job_id, worker_id=worker_id, attempt=1, fields=told)
    said = [token(job_id, text="all"), closed]
    events = [captured_event(line[:-1], source=f"{worker_id}/stdout", offset=0, observed_ts=1) for line in said]
    await registry.append(job_id, events)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        end = await queen.end(job_id)

    assert (end["state"], end["result"]["text"]) == ("completed", "all")


async def test_answer_whose_worker_ended_while_no_queen_acted_fails_with_how_it_ended(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer(attempts=1)
        await until(lambda: len(before.asked) == 1)
    line = worker_exit(worker_id, {}, exit_code=7)
    await registry.append(job_id, [captured_event(line[:-1], source="x/exit", offset=0, observed_ts=1)])

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        end = await queen.end(job_id)

    assert (end["state"], end["reason"], end["error"]["exit_code"]) == ("failed", "worker_lost", 7)


async def test_answer_of_a_worker_that_its_hive_no_longer_has_fails(tmp_path: Path, registry: JobRegistry) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer(attempts=1)
        await until(lambda: len(before.asked) == 1)

    async with queen_of(tmp_path, JobRegistry(registry.store), hive_lost_s=1.0) as queen:
        hive = await queen.hive()
        hive.hive_id = before.hive_id
        hive.beat()
        end = await queen.end(job_id)
        assert queen.service.workers.slots_used(worker_id) == 0

    assert (end["state"], end["reason"], end["error"]["worker_id"]) == ("failed", "worker_lost", worker_id)


async def test_answer_of_a_hive_that_is_never_heard_again_fails(tmp_path: Path, registry: JobRegistry) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        before.has_worker()
        job_id = await first.infer()
        await until(lambda: len(before.asked) == 1)

    async with queen_of(tmp_path, JobRegistry(registry.store), hive_timeout_s=0.2) as queen:
        assert (await queen.end(job_id))["reason"] == "hive_lost"


async def test_cancel_that_came_before_the_queen_died_is_carried_out_after(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer()
        await until(lambda: len(before.asked) == 1)
    await registry.request_cancel(job_id)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(job_id))["state"] == "cancelled"
        hive = await queen.hive()
        _same_hive(hive, before)
        hive.beat()
        await until(lambda: queen.service.workers.slots_used(worker_id) == 0)
        assert hive.stopped == [f"{job_id}.1"]


async def test_answer_whose_time_was_over_before_the_next_queen_came_is_stopped_and_frees_its_slot(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        worker_id = before.has_worker()
        job_id = await first.infer(timeout_s=50)
        await until(lambda: len(before.asked) == 1)
    late = (await registry.get(job_id)).created_at + 51

    async with queen_of(tmp_path, JobRegistry(registry.store, clock=lambda: late)) as queen:
        assert (await queen.end(job_id))["reason"] == "timeout"
        hive = await queen.hive()
        _same_hive(hive, before)
        hive.beat()
        await until(lambda: hive.stopped == [f"{job_id}.1"])
        await until(lambda: queen.service.workers.slots_used(worker_id) == 0)


async def test_waiting_job_whose_cancel_came_before_the_queen_died_never_gets_its_turn(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        job_id = await first.infer()
        await until(lambda: len(first.service.dispatcher._tickets) == 1)
    await registry.request_cancel(job_id)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(job_id))["state"] == "cancelled"


@pytest.mark.parametrize("has_run", [True, False])
async def test_call_that_is_relayed_and_was_cancelled_before_the_queen_died_is_cancelled(
    tmp_path: Path, registry: JobRegistry, has_run: bool
) -> None:
    record = await registry.create(ChatCompletion(), correlation_id="c", is_kept=False)
    if has_run:
        await registry.start(record.job_id, owner="earlier", hive_id=new_id("hive"), worker_id=new_id("worker"))
    await registry.request_cancel(record.job_id)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        end = await queen.end(record.job_id)
        said = await queen.said(record.job_id)

    assert (end["state"], end["reason"], end.get("error")) == ("cancelled", "user", None)
    assert said[-2:] == ["queen_cancelled", "end"]


async def test_running_call_that_is_relayed_ends_queen_lost(tmp_path: Path, registry: JobRegistry) -> None:
    record = await registry.create(ChatCompletion(), correlation_id="c", is_kept=False)
    await registry.start(record.job_id, owner="earlier", hive_id=new_id("hive"), worker_id=new_id("worker"))

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(record.job_id))["reason"] == "queen_lost"


async def test_waiting_job_is_placed_again_in_its_turn(tmp_path: Path, registry: JobRegistry) -> None:
    async with queen_of(tmp_path, registry) as first:
        jobs = [await first.infer() for _ in range(3)]
        await until(lambda: len(first.service.dispatcher._tickets) == 3)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        hive = await queen.live_hive()
        worker_id = hive.has_worker(slots=1)
        order = []
        for count in range(1, 4):
            await until(lambda count=count: len(hive.asked) == count)  # type: ignore[misc]
            order.append(hive.asked[-1][1]["x-job-id"])
            await hive.answer(worker_id, order[-1], "x")
            await queen.end(order[-1])

    assert order == jobs


async def test_hive_may_go_on_speaking_of_a_job_whose_start_an_earlier_boot_asked_for(
    tmp_path: Path, registry: JobRegistry
) -> None:
    async with queen_of(tmp_path, registry) as first:
        before = await first.live_hive()
        before.may_go_on.clear()
        job_id = await first.infer()
        await until(lambda: len(before.commands) == 1)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        hive = await queen.hive()
        _same_hive(hive, before)
        await hive.say(f"{hive.hive_id}/boot", narration("model_download", job_id=job_id))

        assert "model_download" in await queen.said(job_id)


async def test_waiting_call_that_is_relayed_ends_queen_lost(tmp_path: Path, registry: JobRegistry) -> None:
    record = await registry.create(ChatCompletion(), correlation_id="c", is_kept=False)

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(record.job_id))["reason"] == "queen_lost"


async def test_job_whose_request_was_erased_ends_queen_lost(tmp_path: Path, registry: JobRegistry) -> None:
    async with queen_of(tmp_path, registry) as first:
        job_id = await first.infer()
    await registry.store._writer.write(  # type: ignore[attr-defined]
        lambda tx: tx.execute("DELETE FROM requests WHERE job_id = ?", (job_id,)) and None
    )

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(job_id))["reason"] == "queen_lost"


@pytest.mark.parametrize("has_run", [True, False])
async def test_job_whose_request_this_version_cannot_read_ends_queen_lost_and_the_others_go_on(
    tmp_path: Path, registry: JobRegistry, has_run: bool
) -> None:
    async with queen_of(tmp_path, registry) as first:
        unreadable, other = [await first.infer() for _ in range(2)]
    request = b'{"operation": "of_a_later_version"}'
    await registry.store._writer.write(  # type: ignore[attr-defined]
        lambda tx: tx.execute("UPDATE requests SET body = ? WHERE job_id = ?", (request, unreadable)) and None
    )
    if has_run:
        await registry.start(unreadable, owner="earlier", hive_id=new_id("hive"), worker_id=new_id("worker"))

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        assert (await queen.end(unreadable))["reason"] == "queen_lost"
        await until(lambda: [ticket.job.job_id for ticket in queen.service.dispatcher._tickets] == [other])


async def test_more_jobs_than_a_page_are_all_taken_up(
    tmp_path: Path, registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rbee.jobs.store.PAGE", 2)
    async with queen_of(tmp_path, registry) as first:
        jobs = [await first.infer() for _ in range(5)]

    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        await until(lambda: len(queen.service.dispatcher._tickets) == 5)

    assert [(await registry.get(job_id)).state for job_id in jobs] == [JobState.QUEUED] * 5
