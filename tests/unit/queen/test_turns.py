from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from rbee.contracts.states import JobState
from rbee.errors import StorageFullError
from rbee.jobs import JobRegistry
from rbee.jobs.records import Committed
from rbee.queen import turns
from rbee.queen.decisions import Wait
from rbee.queen.turns import sentence, subject
from tests.unit.queen.queen_stage import MODEL
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, until


@pytest.fixture(autouse=True)
def tell_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TELL_EVERY_S", 0.05)


async def _waits(queen: Queen, job_id: str) -> list[dict[str, Any]]:
    return [event for event in await queen.log(job_id) if event.get("action") == "queen_wait"]


async def _positions(queen: Queen, job_id: str) -> list[int | None]:
    return [event["fields"].get("queue_position") for event in await _waits(queen, job_id)]


async def _until_told(queen: Queen, job_id: str, position: int) -> None:
    async with asyncio.timeout(10):
        while (await _positions(queen, job_id))[-1:] != [position]:  # noqa: ASYNC110  # a log's page is no event
            await asyncio.sleep(0.002)


async def _full_worker(queen: Queen, waiting: int) -> tuple[ScriptedHive, str, str, list[str]]:
    """Have a worker with one slot, a job in it, and others that wait; all of them are told."""
    hive = await queen.live_hive()
    worker_id = hive.has_worker(slots=1)
    running = await queen.infer()
    await queen.until_running(running)
    jobs = [await queen.infer() for _ in range(waiting)]
    for position, job_id in enumerate(jobs, 1):
        await _until_told(queen, job_id, position)
    return hive, worker_id, running, jobs


async def test_waiting_job_is_told_how_many_go_first_and_its_view_agrees(whole_queen: Queen) -> None:
    _, worker_id, _, jobs = await _full_worker(whole_queen, 4)

    told = [(await _waits(whole_queen, job_id))[-1]["message"] for job_id in jobs]
    views = [(await whole_queen.registry.view(job_id)).queue_position for job_id in jobs]

    assert told == [
        f"Waiting for {MODEL}: this job is next; the one slot of {worker_id} is taken.",
        f"Waiting for {MODEL}: 1 job goes first.",
        f"Waiting for {MODEL}: 2 jobs go first.",
        f"Waiting for {MODEL}: 3 jobs go first.",
    ]
    assert views == [1, 2, 3, 4]


async def test_job_is_told_each_change_once_and_nothing_behind_its_placement(whole_queen: Queen) -> None:
    hive, worker_id, running, jobs = await _full_worker(whole_queen, 3)

    for ending, following in zip([running, *jobs], jobs, strict=False):
        await hive.answer(worker_id, ending, "x")
        await whole_queen.end(ending)
        await whole_queen.until_running(following)
        for position, job_id in enumerate(jobs[jobs.index(following) + 1 :], 1):
            await _until_told(whole_queen, job_id, position)

    assert [await _positions(whole_queen, job_id) for job_id in jobs] == [[1], [2, 1], [3, 2, 1]]
    assert (await whole_queen.said(jobs[-1]))[-3:] == ["queen_wait", "queen_forward", "state"]


async def test_urgent_job_sends_the_others_back(whole_queen: Queen) -> None:
    _, _, _, [first, second] = await _full_worker(whole_queen, 2)

    urgent = await whole_queen.infer(priority=5)

    for job_id, position in ((urgent, 1), (first, 2), (second, 3)):
        await _until_told(whole_queen, job_id, position)
        assert (await whole_queen.registry.view(job_id)).queue_position == position


async def test_position_is_told_at_most_once_in_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "TELL_EVERY_S", 3600.0)
    async with queen_of(tmp_path) as queen:
        _, _, _, [*gone, last] = await _full_worker(queen, 4)
        for job_id in gone:
            await queen.service.runner.cancel(job_id)
            await queen.end(job_id)
        await until(lambda: len(queen.service.dispatcher._tickets) == 1)

        await queen.service.dispatcher.turns._tell_changes()
        assert await _positions(queen, last) == [4]
        monkeypatch.setattr(turns, "TELL_EVERY_S", 0.0)
        await queen.service.dispatcher.turns._tell_changes()
        assert await _positions(queen, last) == [4, 1]


async def test_jobs_that_are_told_at_once_share_their_commits(whole_queen: Queen) -> None:
    _, _, _, [first, *others] = await _full_worker(whole_queen, 60)
    publish, commits = whole_queen.registry.store.on_commit, []

    def count(published: list[Committed]) -> None:
        commits.append(sum(told.frames.count(b'"queen_wait"') for told in published))
        publish(published)

    whole_queen.registry.store._writer._on_commit = count  # type: ignore[attr-defined]
    await whole_queen.service.runner.cancel(first)
    for position, job_id in enumerate(others, 1):
        await _until_told(whole_queen, job_id, position)

    told = [number for number in commits if number]
    assert sum(told) == len(others)
    assert len(told) <= 2  # the writer may have taken up the first one before the others had come


async def test_job_without_a_hive_is_told_so_once_with_its_position(whole_queen: Queen) -> None:
    first, second = [await whole_queen.infer() for _ in range(2)]
    await _until_told(whole_queen, first, 1)
    await _until_told(whole_queen, second, 2)

    assert [(await _waits(whole_queen, job_id))[0]["message"] for job_id in (first, second)] == [
        f"Waiting for {MODEL}: no hive has registered with this queen."
    ] * 2


async def test_job_that_cannot_be_told_for_want_of_space_waits_on_and_is_told_later(whole_queen: Queen) -> None:
    _, _, _, [first, second] = await _full_worker(whole_queen, 2)
    has_failed = asyncio.Event()

    async def full(*values: Any, **more: Any) -> bool:
        has_failed.set()
        raise StorageFullError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole_queen.registry, "update", full)
        await whole_queen.service.runner.cancel(first)
        async with asyncio.timeout(5):
            await has_failed.wait()

    await _until_told(whole_queen, second, 1)
    assert (await whole_queen.registry.get(second)).state is JobState.QUEUED


async def test_job_that_waits_too_long_for_its_slot_fails_and_the_next_one_is_told(whole_queen: Queen) -> None:
    _, _, running, _ = await _full_worker(whole_queen, 0)
    late = await whole_queen.infer(queue_timeout_s=0.3)
    patient = await whole_queen.infer()
    await _until_told(whole_queen, patient, 2)

    end = await whole_queen.end(late)

    assert (end["state"], end["reason"]) == ("failed", "queue_timeout")
    assert end["message"] == "The job still waited for its place after 0.3 s."
    await _until_told(whole_queen, patient, 1)
    assert (await whole_queen.registry.get(running)).state is JobState.RUNNING


async def test_queue_deadline_that_passed_between_two_queens_ends_the_job_at_the_start_of_the_next(
    tmp_path: Path,
) -> None:
    registry = JobRegistry.open(None)
    async with queen_of(tmp_path, registry) as first:
        late = await first.infer(queue_timeout_s=50)
        patient = await first.infer(queue_timeout_s=5000)
        await _until_told(first, patient, 2)
    created_at = (await registry.get(late)).created_at

    async with queen_of(tmp_path, JobRegistry(registry.store, clock=lambda: created_at + 51)) as queen:
        end = await queen.end(late)
        assert (end["state"], end["reason"]) == ("failed", "queue_timeout")
        assert (await queen.registry.get(patient)).state is JobState.QUEUED
    await registry.close()


async def test_full_queue_is_told_to_the_caller_with_how_many_wait(whole_queen: Queen) -> None:
    whole_queen.registry.queued_max = 2
    for _ in range(2):
        await whole_queen.infer()
    url = await whole_queen.url()
    asked = {"operation": "infer", "model": MODEL, "prompt": "hello"}
    call = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}

    async with aiohttp.ClientSession() as session:
        for path, body in (("/v1/jobs", asked), ("/v1/chat/completions", call)):
            async with session.post(url + path, json=body) as refused:
                error = (await refused.json())["error"]
            assert (refused.status, refused.headers["retry-after"]) == (429, "5")
            assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
            assert error["message"] == "2 jobs are waiting already, as many as may (2)."


def _waits_for(why: str, *, needs_hive: bool = False) -> Wait:
    return Wait(why, needs_hive=needs_hive)


@pytest.mark.parametrize(
    ("wait", "position", "told"),
    [
        (_waits_for("all slots are taken"), None, "Waiting for m: all slots are taken."),
        (_waits_for("all slots are taken"), 1, "Waiting for m: this job is next; all slots are taken."),
        (_waits_for("all slots are taken"), 2, "Waiting for m: 1 job goes first."),
        (_waits_for("all slots are taken"), 512, "Waiting for m: 511 jobs go first."),
        (_waits_for("no hive is there", needs_hive=True), 3, "Waiting for m: no hive is there."),
    ],
)
def test_sentence_says_what_is_waited_for_or_how_many_go_first(wait: Wait, position: int, told: str) -> None:
    assert sentence("m", wait, position) == told


def test_what_changes_all_the_time_is_not_worth_telling() -> None:
    silent: Sequence[Wait] = [_waits_for(f"it was silent for {second} s", needs_hive=True) for second in (3, 4)]
    small: Sequence[Wait] = [_waits_for(f"{size} MiB are free") for size in (1000, 1001)]

    assert len({subject(wait, position) for wait in silent for position in (1, 2)}) == 1
    assert len({subject(wait, 1) for wait in small}) == 1
    assert len({subject(wait, position) for wait in small for position in (1, 2, None)}) == 3
