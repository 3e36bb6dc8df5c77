from __future__ import annotations

import asyncio
from typing import Any

import pytest

from rbee.contracts.ids import new_id
from rbee.errors import WorkerLostError
from rbee.queen.ingest import Ingest
from rbee.queen.workers import HANDED_MAX, WorkerBook
from tests.unit.queen.queen_stage import MODEL, Parts, closing, narration, stretch, token, worker_exit


async def test_end_is_told_only_when_both_files_were_read_to_their_sizes(queen: Parts) -> None:
    job_id = await queen.job()
    worker_id = await queen.worker()
    placement = queen.place(job_id, worker_id)
    said, trace = token(job_id), b"Traceback\n"
    ended = worker_exit(worker_id, {f"{worker_id}/stdout": len(said), f"{worker_id}/stderr": len(trace)})

    await queen.bring(stretch(queen.boot, 0, ended))
    assert await queen.said(job_id) == ["state"]
    await queen.bring(stretch(f"{worker_id}/stdout", 0, said))
    assert not placement.closing.done()
    assert queen.gone == []
    await queen.bring(stretch(f"{worker_id}/stderr", 0, trace))

    assert queen.gone == [worker_id]
    assert await queen.said(job_id) == ["state", "token", "worker_exit"]
    assert await queen.said(worker_id) == ["raw", "worker_exit"]
    with pytest.raises(WorkerLostError, match="The worker ended") as raised:
        placement.closing.result()
    assert raised.value.details["last_lines"] == ["the end"]


async def test_end_and_last_lines_in_one_batch_end_the_job_with_its_closing_line(queen: Parts) -> None:
    job_id, worker_id = await queen.job(), await queen.worker()
    placement = queen.place(job_id, worker_id)
    said = closing(job_id)

    await queen.bring(
        stretch(queen.boot, 0, worker_exit(worker_id, {f"{worker_id}/stdout": len(said)})),
        stretch(f"{worker_id}/stdout", 0, said),
    )

    assert placement.closing.result()["outcome"] == "completed"


async def test_end_is_kept_over_a_restart_and_told_by_the_next_boot(queen: Parts) -> None:
    worker_id = await queen.worker()
    ended = worker_exit(worker_id, {f"{worker_id}/stdout": 4}, exit_code=None, signal="SIGKILL")
    await queen.bring(stretch(queen.boot, 0, ended))

    gone: list[str] = []
    workers = WorkerBook(queen.registry, gone.append)
    await workers.load()
    await workers.settle()
    assert gone == []
    await Ingest(queen.registry, workers).take(queen.hive_id, stretch(f"{worker_id}/stdout", 0, b"end\n"))

    assert gone == [worker_id]
    [_, event] = await queen.log(worker_id)
    assert (event["action"], event["fields"]["signal"]) == ("worker_exit", "SIGKILL")
    assert event["src"] == {"id": queen.boot, "offset": 0}
    assert await queen.registry.store.workers() == []


async def test_end_that_was_committed_but_not_told_is_told_by_the_next_boot_without_a_batch(queen: Parts) -> None:
    worker_id = await queen.worker()
    await queen.bring(stretch(f"{worker_id}/stdout", 0, b"end\n"))
    ended = queen.workers.ended_record(worker_exit(worker_id, {f"{worker_id}/stdout": 4}).strip(), queen.hive_id)
    assert ended is not None
    await queen.registry.store.put_worker(ended)

    workers = WorkerBook(queen.registry, queen.gone.append)
    await workers.load()
    await workers.settle()

    assert await queen.said(worker_id) == ["raw", "worker_exit"]


async def test_end_told_twice_is_written_once(queen: Parts) -> None:
    worker_id = await queen.worker()
    first, second = worker_exit(worker_id, {}), worker_exit(worker_id, {}, exit_code=None, unknown=True)

    await queen.bring(stretch(queen.boot, 0, first))
    await queen.bring(stretch(f"{queen.hive_id}/boot2", 0, second))

    events = await queen.log(worker_id)
    assert [event["fields"]["exit_code"] for event in events] == [1]
    assert await queen.registry.store.workers() == []


@pytest.mark.parametrize("order", [("known", "unknown"), ("unknown", "known")])
async def test_known_end_wins_over_an_unknown_one(queen: Parts, order: tuple[str, str]) -> None:
    worker_id = await queen.worker()
    sizes = {f"{worker_id}/stdout": 4}
    lines = {
        "known": worker_exit(worker_id, sizes, exit_code=7),
        "unknown": worker_exit(worker_id, sizes, exit_code=None, unknown=True),
    }
    await queen.bring(stretch(queen.boot, 0, lines[order[0]]))
    await queen.bring(stretch(f"{queen.hive_id}/boot2", 0, lines[order[1]]))

    await queen.bring(stretch(f"{worker_id}/stdout", 0, b"end\n"))

    assert (await queen.log(worker_id))[-1]["fields"]["exit_code"] == 7


async def test_end_of_a_worker_nobody_asked_for_goes_to_its_log(queen: Parts) -> None:
    worker_id = new_id("worker")

    await queen.bring(stretch(queen.boot, 0, worker_exit(worker_id, {})))

    assert await queen.said(worker_id) == ["worker_exit"]


async def test_end_is_told_to_the_jobs_that_wait_for_the_start(queen: Parts) -> None:
    owner, other = await queen.job(), await queen.job()
    worker_id = new_id("worker")
    ended = await queen.workers.add(worker_id, queen.hive_id, MODEL, owner, lambda: [owner, other])

    await queen.bring(stretch(queen.boot, 0, worker_exit(worker_id, {})))

    assert ended.result().exit_code == 1
    assert await queen.said(owner) == ["state", "worker_exit"]
    assert await queen.said(other) == ["state", "worker_exit"]


async def test_end_after_the_start_is_not_told_to_the_job_that_it_was_started_for(queen: Parts) -> None:
    owner = await queen.job()
    worker_id = await queen.worker(owner)
    queen.workers.started(worker_id)

    await queen.bring(stretch(queen.boot, 0, worker_exit(worker_id, {})))

    assert await queen.said(owner) == ["state"]


async def test_job_that_is_placed_in_the_very_moment_of_the_end_fails_as_well(queen: Parts) -> None:
    job_id, worker_id = await queen.job(), await queen.worker()
    late = []
    workers = WorkerBook(queen.registry, lambda gone: late.append(workers.place(job_id, gone, queen.hive_id, 1)))
    await workers.load()

    await Ingest(queen.registry, workers).take(queen.hive_id, stretch(queen.boot, 0, worker_exit(worker_id, {})))

    [placement] = late
    assert isinstance(placement.closing.exception(), WorkerLostError)
    assert await queen.said(job_id) == ["state", "worker_exit"]


@pytest.mark.parametrize("fields", [{"attempt": 2}, {"attempt": None}])
async def test_closing_line_of_another_attempt_closes_nothing(queen: Parts, fields: dict[str, Any]) -> None:
    job_id = await queen.job()
    worker_id = await queen.worker(job_id)
    placement = queen.place(job_id, worker_id, attempt=1)

    said = narration("worker_inference", job_id=job_id, fields={"outcome": "completed"}, **fields)
    await queen.bring(stretch(f"{worker_id}/stdout", 0, said))

    assert not placement.closing.done()


async def test_token_moves_the_job_and_the_hive(queen: Parts) -> None:
    job_id, worker_id = await queen.job(), await queen.worker()
    placement = queen.place(job_id, worker_id)
    assert (placement.heard_at, queen.workers.moved_at(queen.hive_id)) == (0, 0)

    await queen.bring(stretch(f"{worker_id}/stdout", 0, token(job_id)))

    assert placement.heard_at > 0
    assert queen.workers.moved_at(queen.hive_id) > 0


async def test_forgotten_worker_leaves_nothing(queen: Parts) -> None:
    worker_id = await queen.worker()

    await queen.workers.forget(worker_id)
    await queen.workers.forget(worker_id)

    assert await queen.registry.store.workers() == []


async def test_slot_is_used_from_placing_to_removing(queen: Parts) -> None:
    worker_id = await queen.worker()
    placement = queen.place("job-1", worker_id)
    assert queen.workers.slots_used(worker_id) == 1
    waiting = asyncio.ensure_future(queen.workers.until_free(worker_id, 5))
    await asyncio.sleep(0)

    queen.workers.remove(placement)
    queen.workers.remove(placement)

    assert queen.workers.slots_used(worker_id) == 0
    assert await waiting is True


async def test_worker_that_stays_in_use_is_not_waited_for_beyond_the_time(queen: Parts) -> None:
    queen.place("job-1", "worker-1")

    assert await queen.workers.until_free("worker-1", 0.01) is False


async def test_hive_may_speak_of_the_jobs_it_was_handed_last(queen: Parts) -> None:
    for number in range(HANDED_MAX + 1):
        queen.workers.hand(queen.hive_id, f"job-{number}")
    queen.workers.hand(queen.hive_id, "job-1")

    speaker = queen.workers.speaker(queen.boot, queen.hive_id)

    assert speaker is not None
    assert len(speaker.handed) == HANDED_MAX
    assert "job-0" not in speaker.handed
    assert "job-1" in speaker.handed
