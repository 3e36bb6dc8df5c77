"""Answers that outlive their workers and hives, with the queen's real parts and scripted hives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from rbee.contracts.events import new_event
from rbee.contracts.ids import new_id
from rbee.contracts.model_settings import ModelSettings, ModelTable
from rbee.contracts.operations import Embedding, WorkerSpawn
from rbee.contracts.states import JobState, Reason
from rbee.errors import DeadlineExceededError, ModelInvalidError, UnavailableError, WorkerError
from rbee.jobs import JobRegistry
from rbee.jobs.endings import Stop
from rbee.queen import answering, old_requests
from tests.unit.queen.queen_stage import MODEL, closing, token, worker_exit, worker_info
from tests.unit.queen.scripted_hive import WAIT_S, Queen, ScriptedHive, queen_of, until


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)
    monkeypatch.setattr(old_requests, "LOOK_S", 0.01)


async def asked(queen: Queen, hive: ScriptedHive, times: int = 1, **values: Any) -> tuple[str, str]:
    """Have a job on a worker that has accepted it; returns job and worker."""
    worker_id = hive.has_worker()
    job_id = await queen.infer(**values)
    await until(lambda: len(hive.asked) == times)
    return job_id, worker_id


async def test_answer_goes_on_on_another_worker_from_its_text_with_the_seam_told(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive, max_tokens=9)
    said = token(job_id, text="one", tokens=1, prompt_tokens=5) + token(job_id, text=" two", tokens=2)

    await hive.kill(first, said)
    await until(lambda: len(hive.asked) == 2)
    [spawn] = hive.commands
    assert isinstance(spawn, WorkerSpawn)
    second = str(spawn.worker_id)
    body, headers = hive.asked[1]
    line = token(job_id, 2, " three", tokens=1)
    await hive.say(
        f"{second}/stdout",
        line,
        closing(job_id, 2, frames=1, prompt_tokens=7, completion_tokens=1, time_to_first_token_s=0.1),
    )
    end = await whole_queen.end(job_id)

    assert body["messages"][-1] == {"role": "assistant", "content": "one two"}
    assert body["max_tokens"] == 7
    assert headers["x-request-id"] == f"{job_id}.2"
    assert (end["state"], end["result"]["text"]) == ("completed", "one two three")
    assert end["result"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 3}
    assert end["result"]["attempts"] == 2
    log = await whole_queen.log(job_id)
    seam = next(event for event in log if event.get("action") == "queen_continue")
    assert seam["message"] == f"{second} goes on with the answer after 2 tokens. The worker ended."
    assert (seam["attempt"], seam["fields"]) == (
        2,
        {"worker_id": second, "after_tokens": 2, "lost_worker_id": first},
    )
    states = [(event["state"], event["attempt"]) for event in log if event["kind"] == "state"]
    assert states == [("queued", 0), ("running", 1), ("running", 2)]


async def test_job_that_was_not_begun_to_be_answered_is_placed_again_without_a_seam(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive)

    await hive.kill(first)
    await until(lambda: len(hive.asked) == 2)
    await hive.answer(hive.workers[0].worker_id, job_id, "all", attempt=2)
    end = await whole_queen.end(job_id)

    assert end["result"]["text"] == "all"
    assert hive.asked[0][0] == hive.asked[1][0]
    assert "queen_continue" not in await whole_queen.said(job_id)


async def test_answer_that_only_lacked_its_closing_line_is_completed_without_another_worker(
    whole_queen: Queen,
) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive)

    await hive.kill(first, token(job_id, text="all", tokens=4, prompt_tokens=3, finish_reason="stop"))
    end = await whole_queen.end(job_id)

    assert (end["state"], end["result"]["text"], end["result"]["finish_reason"]) == ("completed", "all", "stop")
    assert end["result"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 4}
    assert hive.commands == []


async def test_last_attempts_death_fails_the_job_with_how_it_ended(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive)
    await hive.kill(first)
    await until(lambda: len(hive.asked) == 2)

    await hive.kill(hive.workers[0].worker_id)
    end = await whole_queen.end(job_id)

    assert (end["state"], end["reason"], end["error"]["signal"]) == ("failed", "worker_lost", "SIGKILL")
    assert (await whole_queen.registry.get(job_id)).attempt == 2


async def test_start_that_fails_is_tried_again_and_counts_as_an_attempt(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.failure = WorkerError("The worker was ended by SIGSEGV before it was ready.")

    end = await whole_queen.end(await whole_queen.infer())

    assert (end["reason"], end["message"]) == ("worker_failed", hive.failure.message)
    assert len(hive.commands) == 2


async def test_model_that_cannot_be_loaded_is_not_tried_again(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.failure = ModelInvalidError("The file is damaged.")

    end = await whole_queen.end(await whole_queen.infer())

    assert end["reason"] == "model_invalid"
    assert len(hive.commands) == 1


async def test_crash_loop_ends_every_waiting_job_with_the_last_lines(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.failure = WorkerError("It ended.", details={"last_lines": ["no such library"], "exit_code": 127})

    ends = await asyncio.gather(
        *[whole_queen.end(job_id) for job_id in [await whole_queen.infer(attempts=9) for _ in range(3)]]
    )

    assert {end["reason"] for end in ends} == {"crash_loop"}
    assert ends[0]["error"]["last_lines"] == ["no such library"]
    assert len(hive.commands) == 5
    later = await whole_queen.end(await whole_queen.infer())
    assert later["reason"] == "crash_loop"
    assert len(hive.commands) == 5


async def test_answer_of_a_lost_hive_goes_on_on_another_one_and_its_late_words_are_refused(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.2, hive_lost_s=0.4, hive_timeout_s=30.0) as queen:
        lost, other = await queen.live_hive(), await queen.hive()
        job_id, first = await asked(queen, lost)
        await lost.say(f"{first}/stdout", token(job_id, text="one"))
        beating = asyncio.ensure_future(_beat(other))
        await until(lambda: len(other.commands) == 1)
        second = str(other.commands[0].worker_id)  # type: ignore[attr-defined]
        await until(lambda: len(other.asked) == 1)
        await lost.say(f"{first}/stdout", token(job_id, text=" late"), closing(job_id, frames=2))
        await other.answer(second, job_id, " two", attempt=2)
        end = await queen.end(job_id)
        late = await queen.said(first)
        beating.cancel()

    assert (end["state"], end["result"]["text"]) == ("completed", "one two")
    assert late == ["queen_refuse_line", "queen_refuse_line"]


async def test_embedding_of_a_lost_hive_goes_to_a_worker_that_embeds_though_there_is_no_memory_for_another(
    tmp_path: Path,
) -> None:
    table = ModelTable(models={MODEL: ModelSettings(pinned=True)})
    async with queen_of(tmp_path, models=table, hive_stale_s=0.2, hive_lost_s=0.4, hive_timeout_s=30.0) as queen:
        lost, other = await queen.live_hive(), await queen.hive(free=0)
        lost.workers = [msgspec.structs.replace(worker_info(new_id("worker"), url=lost.url), purpose="embed")]
        lost.beat()
        await queen.submit(Embedding(model=MODEL, request={"model": MODEL, "input": "a"}))
        await until(lambda: len(lost.asked) == 1)
        other.workers = [msgspec.structs.replace(worker_info(new_id("worker"), url=other.url), purpose="embed")]
        beating = asyncio.ensure_future(_beat(other))
        await until(lambda: len(other.asked) == 1)
        beating.cancel()

    assert not other.commands


async def test_lost_hive_that_returns_is_told_to_stop_the_older_attempt(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.2, hive_lost_s=0.4, hive_timeout_s=30.0) as queen:
        lost, other = await queen.live_hive(), await queen.hive()
        job_id, first = await asked(queen, lost)
        await lost.serving.aclose()  # nothing of it can be reached
        beating = asyncio.ensure_future(_beat(other))
        await until(lambda: len(other.asked) == 1)
        assert queen.service.workers.slots_used(first) == 1

        await lost.serve()
        lost.workers.clear()
        lost.has_worker(first)
        await until(lambda: lost.stopped == [f"{job_id}.1"])
        await until(lambda: queen.service.workers.slots_used(first) == 0)
        beating.cancel()


async def test_answer_of_a_lost_hive_waits_for_its_return_where_no_other_can_take_it(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.1, hive_lost_s=0.2, hive_timeout_s=30.0) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await asked(queen, hive)
        await until(lambda: queen.service.book.silent_s(queen.service.book.hive(hive.hive_id)) > 0.4)

        hive.beat()
        await hive.answer(worker_id, job_id, "all")

        assert (await queen.end(job_id))["result"]["attempts"] == 1


async def test_start_on_a_hive_that_is_lost_meanwhile_is_left_for_another_hive(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.2, hive_lost_s=0.4, hive_timeout_s=30.0) as queen:
        lost = await queen.live_hive()
        lost.may_go_on.clear()
        job_id = await queen.infer()
        await until(lambda: len(lost.commands) == 1)

        other = await queen.hive()
        beating = asyncio.ensure_future(_beat(other))
        await until(lambda: len(other.asked) == 1)
        await other.answer(other.workers[0].worker_id, job_id, "all")
        end = await queen.end(job_id)
        beating.cancel()

    assert (end["state"], end["result"]["attempts"]) == ("completed", 1)


async def _beat(hive: ScriptedHive) -> None:
    while True:
        hive.beat()
        await asyncio.sleep(0.05)


async def test_words_that_come_while_the_queen_ends_are_still_the_jobs(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await asked(whole_queen, hive)

    await whole_queen.service.close(0)
    await hive.say(f"{worker_id}/stdout", token(job_id, text="late"))

    assert (await whole_queen.said(job_id))[-1] == "token"


async def test_answer_that_nobody_waits_for_is_stopped_once(whole_queen: Queen) -> None:
    """So ends what an earlier queen had given up while its hive was away, whatever became of the job."""
    hive = await whole_queen.hive()
    job_id, worker_id = await asked(whole_queen, hive)
    await hive.answer(worker_id, job_id, "whole")
    await whole_queen.end(job_id)
    await hive.say(f"{worker_id}/stdout", token(job_id, text="more"))
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await until(lambda: whole_queen.service.workers.slots_used(worker_id) == 0)
    await hive.say(f"{worker_id}/stdout", token(job_id, text="and more"), token("no job", text="forged"))
    assert whole_queen.service.workers.superseded() == []
    assert hive.stopped == [f"{job_id}.1"]


async def test_worker_that_its_live_hive_no_longer_has_is_lost_though_nobody_told_its_end(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_lost_s=0.2, hive_stale_s=0.15) as queen:
        hive = await queen.live_hive()
        job_id, first = await asked(queen, hive, attempts=1)
        hive.workers.clear()
        beating = asyncio.ensure_future(_beat(hive))
        end = await queen.end(job_id)
        beating.cancel()

    assert (end["reason"], end["error"]["worker_id"]) == ("worker_lost", first)


async def test_answer_of_a_worker_that_is_being_stopped_is_given_by_another_one(tmp_path: Path) -> None:
    """Also where nobody tells of its end: after `hive_lost_s` without being taken on, it counts as lost."""
    async with queen_of(tmp_path, hive_lost_s=0.1, hive_stale_s=600.0) as queen:
        hive, other = await queen.live_hive(), await queen.live_hive()
        hive.refusals = [UnavailableError("This worker is being stopped.")] * 1000
        job_id, first = await asked(queen, hive)
        second = other.has_worker()
        hive.drains(first)
        await until(lambda: len(other.asked) == 1)
        await other.answer(second, job_id, "all", attempt=2)
        end = await queen.end(job_id)

    assert (end["state"], end["result"]["text"], end["result"]["attempts"]) == ("completed", "all", 2)


async def test_prompt_is_counted_by_the_attempt_that_began_the_answer(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive)
    await hive.kill(first, token(job_id, text="", tokens=0))
    await until(lambda: len(hive.asked) == 2)

    line = token(job_id, 2, "all", prompt_tokens=5)
    told = {"frames": 1, "prompt_tokens": 5, "completion_tokens": 1, "time_to_first_token_s": 0.5}
    await hive.say(f"{hive.workers[0].worker_id}/stdout", line, closing(job_id, 2, **told))
    end = await whole_queen.end(job_id)

    assert end["result"]["usage"] == {"prompt_tokens": 5, "completion_tokens": 1}
    assert end["result"]["time_to_first_token_s"] == 0.5


async def test_whole_answer_of_a_lost_hive_is_complete(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.1, hive_lost_s=0.2, hive_timeout_s=0.4) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await asked(queen, hive)
        await hive.say(f"{worker_id}/stdout", token(job_id, text="all", finish_reason="stop"))
        end = await queen.end(job_id)

    assert (end["state"], end["result"]["text"]) == ("completed", "all")


async def test_hole_in_a_hives_story_does_not_forbid_to_continue_an_answer(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive)
    gap = {"ts": 1, "reason": "late", "source": f"{hive.hive_id}/boot", "lost_bytes": 9, "lost_lines": 0}
    await whole_queen.registry.append(job_id, [new_event("gap", gap)])

    await hive.kill(first, token(job_id, text="one"))
    await until(lambda: len(hive.asked) == 2)

    assert hive.asked[1][0]["messages"][-1] == {"role": "assistant", "content": "one"}


async def test_deadline_in_the_middle_of_being_placed_again_ends_the_job(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    hive = await whole_queen.live_hive()
    job_id, first = await asked(whole_queen, hive, timeout_s=3600)
    registry = whole_queen.registry
    start = registry.start

    async def started_and_stopped(*args: Any, **values: Any) -> Any:
        await start(*args, **values)
        stop = Stop(JobState.FAILED, Reason.TIMEOUT, "Too late.", DeadlineExceededError("Too late."))
        whole_queen.service.runner._stop(whole_queen.service.runner.running[job_id], stop)
        await asyncio.sleep(WAIT_S)

    monkeypatch.setattr(registry, "start", started_and_stopped)
    await hive.kill(first)
    end = await whole_queen.end(job_id)

    assert (end["state"], end["reason"]) == ("failed", "timeout")
    assert (await registry.get(job_id)).attempt == 2


async def test_worker_whose_end_an_earlier_boot_told_is_not_waited_for(tmp_path: Path) -> None:
    registry = JobRegistry.open(None)
    async with queen_of(tmp_path, registry) as queen:
        hive = await queen.live_hive()
        ghost = hive.has_worker()
        await hive.say(f"{hive.hive_id}/boot", worker_exit(ghost, {}))
    async with queen_of(tmp_path, JobRegistry(registry.store)) as queen:
        hive = await queen.hive()
        hive.has_worker(ghost)  # a heartbeat that was long under way
        job_id = await queen.infer()
        await until(lambda: len(hive.asked) == 1)
        await hive.answer(hive.workers[1].worker_id, job_id, "all", attempt=2)
        end = await queen.end(job_id)
    await registry.close()

    assert (end["state"], end["result"]["attempts"]) == ("completed", 2)
    assert hive.asked[0][1]["x-request-id"] == f"{job_id}.2"
