from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rbee.contracts.operations import WorkerStop
from rbee.errors import OverloadedError, RbeeError, UnavailableError, WorkerError
from rbee.queen import answering
from rbee.queen.answering import failure_of
from tests.unit.queen.queen_stage import closing, narration, token, worker_exit
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of, until


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(answering, "ASK_AGAIN_S", 0.01)


async def _asked(queen: Queen, hive: ScriptedHive, **values: Any) -> tuple[str, str]:
    """Have a job on a worker that has accepted it; returns job and worker."""
    worker_id = hive.has_worker()
    job_id = await queen.infer(**values)
    await until(lambda: len(hive.asked) == 1)
    return job_id, worker_id


@pytest.mark.parametrize(
    ("settings", "values"),
    [({"first_token_s": 0.05}, {}), ({"first_token_s": 60}, {"first_token_timeout_s": 0.05})],
)
async def test_answer_that_does_not_begin_in_its_own_or_the_queens_time_is_stopped(
    tmp_path: Path, settings: dict[str, Any], values: dict[str, Any]
) -> None:
    async with queen_of(tmp_path, **settings) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await _asked(queen, hive, **values)
        await until(lambda: hive.stopped == [f"{job_id}.1"])
        await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="cancelled"))
        end = await queen.end(job_id)

    assert (end["state"], end["reason"], end["error"]["code"]) == ("failed", *["first_token_timeout"] * 2)
    assert end["message"] == "The worker said no first token within 0.05 s."


@pytest.mark.parametrize(
    ("settings", "values"), [({"stall_s": 0.05}, {}), ({"stall_s": 60}, {"idle_timeout_s": 0.05})]
)
async def test_answer_that_stands_still_for_its_own_or_the_queens_time_is_stalled(
    tmp_path: Path, settings: dict[str, Any], values: dict[str, Any]
) -> None:
    async with queen_of(tmp_path, stop_grace_s=0.05, first_token_s=60, **settings) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await _asked(queen, hive, **values)
        await hive.say(f"{worker_id}/stdout", token(job_id))
        end = await queen.end(job_id)

    assert (end["state"], end["reason"], end["error"]["code"]) == ("failed", "stalled", "stalled")
    assert end["message"] == "The worker said no further token for 0.05 s."


async def test_deadline_of_an_answer_is_kept_to_the_moment_and_not_to_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answering, "LOOK_EVERY_S", 3600)
    async with queen_of(tmp_path, stop_grace_s=0.05) as queen:
        hive = await queen.live_hive()
        job_id, _ = await _asked(queen, hive, first_token_timeout_s=0.05)

        assert (await queen.end(job_id))["reason"] == "first_token_timeout"


async def test_answer_that_never_gets_its_slot_does_not_begin_in_time(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.refusals = [OverloadedError("All slots are in use.") for _ in range(1000)]
    worker_id = hive.has_worker()
    job_id = await whole_queen.infer(first_token_timeout_s=0.05)

    assert (await whole_queen.end(job_id))["reason"] == "first_token_timeout"
    assert hive.stopped == [f"{job_id}.1"]
    assert whole_queen.service.workers.slots_used(worker_id) == 0


async def test_answer_of_a_silent_hive_is_not_stalled_but_lost(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.15, hive_timeout_s=0.4, first_token_s=0.3) as queen:
        hive = await queen.live_hive()
        job_id, _ = await _asked(queen, hive)
        end = await queen.end(job_id)

    assert (end["state"], end["reason"]) == ("failed", "hive_lost")


async def test_time_in_which_the_hive_was_silent_does_not_count_as_a_standstill(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.1, first_token_s=1.0) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await _asked(queen, hive)
        heard = queen.service.book.hive
        await until(lambda: queen.service.book.silent_s(heard(hive.hive_id)) > 1.1)
        hive.beat()
        await until(lambda: queen.service.book.silent_s(heard(hive.hive_id)) > 0.05)  # it was looked at meanwhile
        await hive.answer(worker_id, job_id, "late")

        assert (await queen.end(job_id))["state"] == "completed"


async def test_dead_worker_fails_its_job_with_how_it_ended(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive, attempts=1)
    said = token(job_id, text="half an ")
    ended = worker_exit(worker_id, {f"{worker_id}/stdout": len(said)}, exit_code=None, signal="SIGKILL")

    await hive.say(f"{hive.hive_id}/boot", ended)
    await hive.say(f"{worker_id}/stdout", said)
    end = await whole_queen.end(job_id)

    assert (end["state"], end["reason"]) == ("failed", "worker_lost")
    assert end["error"]["signal"] == "SIGKILL"
    assert end["error"]["last_lines"] == ["the end"]
    assert (await whole_queen.said(job_id))[-4:] == ["token", "worker_exit", "queen_failed", "end"]


async def test_worker_that_cannot_be_reached_fails_the_job_with_how_it_ended(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.url, dead = "http://127.0.0.1:1", hive.url
    worker_id = hive.has_worker()
    hive.beat(url=dead)
    job_id = await whole_queen.infer(attempts=1)
    await whole_queen.until_running(job_id)

    await hive.say(f"{hive.hive_id}/boot", worker_exit(worker_id, {}))

    assert (await whole_queen.end(job_id))["message"] == "The worker ended."


async def test_worker_of_which_nothing_is_heard_is_lost_after_the_time(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_lost_s=0.1, hive_stale_s=0.05, stop_grace_s=0.05) as queen:
        hive = await queen.hive()
        hive.url = "http://127.0.0.1:1"
        hive.has_worker()
        end = await queen.end(await queen.infer(attempts=1))

    assert (end["reason"], end["error"]["code"]) == ("worker_lost", "worker_lost")


@pytest.mark.parametrize("refusal", [OverloadedError("All slots are in use."), UnavailableError("Being stopped.")])
async def test_worker_that_is_just_freeing_its_slot_is_asked_again(whole_queen: Queen, refusal: RbeeError) -> None:
    hive = await whole_queen.live_hive()
    hive.refusals = [refusal]
    worker_id = hive.has_worker()
    job_id = await whole_queen.infer()
    await until(lambda: len(hive.asked) == 2)

    await hive.answer(worker_id, job_id, "x")

    assert (await whole_queen.end(job_id))["state"] == "completed"


async def test_answer_that_comes_although_nobody_heard_it_accepted_is_taken(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.refusals = [UnavailableError("The proxy lost it.")] * 1000
    worker_id = hive.has_worker()
    job_id = await whole_queen.infer()
    await until(lambda: len(hive.asked) >= 1)

    await hive.answer(worker_id, job_id, "x")

    assert (await whole_queen.end(job_id))["result"]["text"] == "x"


async def test_refused_answer_fails_with_the_workers_words(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    refusal = RbeeError("The prompt is too long.", reason="invalid", code="context_length_exceeded")
    hive.refusals = [refusal]
    worker_id = hive.has_worker()
    job_id = await whole_queen.infer()
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="failed"))

    end = await whole_queen.end(job_id)

    assert (end["reason"], end["message"]) == ("invalid", "The prompt is too long.")


async def test_cancelled_job_ends_behind_its_closing_line(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive)

    await whole_queen.service.runner.cancel(job_id)
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    assert whole_queen.service.workers.slots_used(worker_id) == 1
    await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="cancelled"))
    end = await whole_queen.end(job_id)

    assert end["state"] == "cancelled"
    assert (await whole_queen.said(job_id))[-3:] == ["worker_inference", "queen_cancelled", "end"]
    assert whole_queen.service.workers.slots_used(worker_id) == 0


async def test_worker_that_did_not_hear_of_a_stop_is_told_again(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.unheard = 3
    job_id, worker_id = await _asked(whole_queen, hive)

    await whole_queen.service.runner.cancel(job_id)
    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="cancelled"))

    assert (await whole_queen.end(job_id))["state"] == "cancelled"
    assert hive.stopped == [f"{job_id}.1"]


async def test_cancel_of_an_answer_that_its_worker_has_not_taken_on_waits_for_no_closing_line(
    tmp_path: Path,
) -> None:
    async with queen_of(tmp_path, stop_grace_s=600) as queen:
        hive = await queen.live_hive()
        hive.refusals = [OverloadedError("All slots are in use.") for _ in range(10_000)]
        job_id, worker_id = await _asked(queen, hive)

        await queen.service.runner.cancel(job_id)

        assert (await queen.end(job_id))["state"] == "cancelled"
        assert hive.stopped == [f"{job_id}.1"]
        assert queen.service.workers.slots_used(worker_id) == 0
        assert hive.commands == []


async def test_stop_does_not_wait_for_a_hive_that_falls_silent(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_stale_s=0.3, stop_grace_s=60) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await _asked(queen, hive)
        await queen.service.runner.cancel(job_id)

        assert (await queen.end(job_id))["state"] == "cancelled"
        assert hive.stopped == [f"{job_id}.1"]
        assert not queen.service.workers.is_draining(worker_id)


async def test_worker_that_does_not_stop_is_stopped_itself(tmp_path: Path) -> None:
    async with queen_of(tmp_path, stop_grace_s=0.05) as queen:
        hive = await queen.live_hive()
        job_id, worker_id = await _asked(queen, hive)

        await queen.service.runner.cancel(job_id)
        end = await queen.end(job_id)
        await until(lambda: len(hive.commands) == 1)

    assert end["state"] == "cancelled"
    [stop] = hive.commands
    assert isinstance(stop, WorkerStop)
    assert (stop.worker_id, stop.drain_s) == (worker_id, 0)
    assert "queen_stop_stuck" in queen.sink.actions


async def test_answer_with_a_hole_is_never_completed(
    whole_queen: Queen, capsys: pytest.CaptureFixture[str]
) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive)

    await hive.say(f"{worker_id}/stdout", token(job_id), closing(job_id, frames=2))
    end = await whole_queen.end(job_id)

    assert (end["state"], end["reason"]) == ("failed", "internal")
    assert "1 of the answer's 2 pieces" in end["message"]


async def test_answer_that_somebody_else_ended_early_is_not_completed(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive)

    await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="cancelled"))

    assert (await whole_queen.end(job_id))["reason"] == "worker_failed"


async def test_deadline_ends_the_job_as_timeout_behind_its_closing_line(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive, timeout_s=0.5)

    await until(lambda: hive.stopped == [f"{job_id}.1"])
    await hive.say(f"{worker_id}/stdout", closing(job_id, outcome="cancelled"))

    assert (await whole_queen.end(job_id))["reason"] == "timeout"


async def test_other_attempts_line_does_not_close_the_answer(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    job_id, worker_id = await _asked(whole_queen, hive)

    await hive.say(f"{worker_id}/stdout", closing(job_id, attempt=7), narration(job_id=job_id))
    await hive.answer(worker_id, job_id, "right")

    assert (await whole_queen.end(job_id))["result"]["text"] == "right"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"outcome": "completed"}, None),
        ({"outcome": "failed", "error": {"code": "worker_lost", "message": "Gone."}}, "Gone."),
        ({"outcome": "failed"}, "The worker could not answer."),
        ({"outcome": "failed", "error": "no object"}, "The worker could not answer."),
        ({}, "The worker ended the answer early (None)."),
    ],
)
def test_closing_line_is_a_failure_unless_it_is_completed(fields: dict[str, Any], message: str | None) -> None:
    failure = failure_of(fields)

    assert (failure.message if failure else None) == message
    assert failure is None or isinstance(failure, WorkerError)
