from __future__ import annotations

from pathlib import Path

import pytest

from rbee.contracts.ids import new_boot_id
from rbee.contracts.operations import HiveCheck
from rbee.contracts.states import JobState
from rbee.errors import DownloadFailedError, ModelNotFoundError
from rbee.queen import hive_api, patience
from rbee.queen.hive_api import result_of
from tests.unit.queen.queen_stage import narration
from tests.unit.queen.scripted_hive import Queen, queen_of, until


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hive_api, "RETRY_S", 0.02)


async def test_command_is_given_once_though_its_acceptance_was_not_heard(
    whole_queen: Queen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hive_api, "ATTEMPT_S", 0.1)
    hive = await whole_queen.live_hive()
    hive.answer_late_s = 0.3

    job_id = await whole_queen.submit(HiveCheck())

    assert (await whole_queen.end(job_id))["state"] == "completed"
    assert len(hive.commands) == 1


async def test_hive_that_is_not_there_yet_is_asked_where_it_is_by_then(whole_queen: Queen) -> None:
    hive = await whole_queen.hive()
    hive.beat(url="http://127.0.0.1:1")
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: "queen_forward" in whole_queen.sink.actions)

    hive.beat()

    assert (await whole_queen.end(job_id))["state"] == "completed"


async def test_hive_that_stays_away_fails_the_command_with_where_it_was_looked_for(tmp_path: Path) -> None:
    async with queen_of(tmp_path, hive_timeout_s=0.2) as queen:
        hive = await queen.hive()
        hive.beat(url="http://127.0.0.1:1")
        end = await queen.end(await queen.submit(HiveCheck()))

    assert end["reason"] == "hive_lost"
    assert end["message"] == f"The hive {hive.hive_id} could not be reached for 0.2 s: Connection refused."


async def test_command_goes_on_across_a_restart_of_its_hive_at_another_address(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: len(hive.commands) == 1)

    await hive.move()
    hive.boot_id = new_boot_id()
    hive.beat()
    hive.may_go_on.set()

    assert (await whole_queen.end(job_id))["state"] == "completed"
    assert len(hive.commands) == 1


async def test_hive_that_forgot_its_commands_fails_them(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: len(hive.commands) == 1)

    await hive.forget()

    end = await whole_queen.end(job_id)
    assert (end["reason"], end["message"]) == (
        "hive_lost",
        f"The hive {hive.hive_id} no longer knows what it was doing.",
    )


async def test_cancelled_command_is_cancelled_at_the_hive(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: len(hive.commands) == 1)
    [at_hive] = hive.runner.running

    await whole_queen.service.runner.cancel(job_id)
    assert (await whole_queen.end(job_id))["state"] == "cancelled"
    await until(lambda: not hive.runner.running)

    assert (await hive.registry.get(at_hive)).state is JobState.CANCELLED


async def test_hives_words_about_a_command_go_to_its_job(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.may_go_on.clear()
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: len(hive.commands) == 1)
    assert hive.commands[0].parent_job_id == job_id

    await hive.say(f"{hive.hive_id}/boot", narration("hive_receive", job_id=job_id))

    assert "hive_receive" in await whole_queen.said(job_id)


async def test_job_ends_behind_the_story_that_its_hive_tells_of_it(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    source, line = f"{hive.hive_id}/boot", narration("hive_check")
    hive.facts = {"sources": {source: len(line) + len(narration("hive_check", job_id="job-" + 26 * "0"))}}
    job_id = await whole_queen.submit(HiveCheck())
    await until(lambda: len(hive.commands) == 1 and not hive.runner.running)
    await hive.say(source, line)
    assert "end" not in await whole_queen.said(job_id)

    await hive.say(source, narration("hive_check", job_id=job_id))
    await whole_queen.end(job_id)

    assert (await whole_queen.said(job_id))[-3:] == ["hive_check", "queen_complete", "end"]


async def test_story_that_stays_out_is_told_as_a_gap(whole_queen: Queen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "UNMOVED_S", 0.05)
    monkeypatch.setattr(patience, "LOOK_S", 0.01)
    hive = await whole_queen.live_hive()
    hive.facts = {"sources": {f"{hive.hive_id}/boot": 100}}

    job_id = await whole_queen.submit(HiveCheck())
    end = await whole_queen.end(job_id)

    [gap] = [event for event in await whole_queen.log(job_id) if event["kind"] == "gap"]
    assert end["state"] == "completed"
    assert (gap["reason"], gap["source"], gap["lost_bytes"]) == ("late", f"{hive.hive_id}/boot", 100)


async def test_failure_of_the_hive_is_the_jobs_failure(whole_queen: Queen) -> None:
    hive = await whole_queen.live_hive()
    hive.failure = DownloadFailedError("The hub does not answer.", remedy="Wait.")

    end = await whole_queen.end(await whole_queen.submit(HiveCheck()))

    assert (end["reason"], end["message"]) == ("download_failed", "The hub does not answer.")
    assert end["error"]["remedy"] == "Wait."


def test_result_of_a_failed_end_is_raised_as_what_it_was() -> None:
    body = {"code": "model_not_found", "message": "None.", "remedy": "Another.", "worker_id": "w", "exit_code": 3}

    with pytest.raises(ModelNotFoundError) as raised:
        result_of({"state": "failed", "reason": "model_not_found", "error": body})

    assert (raised.value.message, raised.value.remedy, raised.value.details["exit_code"]) == (
        "None.",
        "Another.",
        3,
    )


def test_result_of_an_end_that_the_hive_cancelled_is_an_error() -> None:
    with pytest.raises(Exception, match="Cancelled by the caller"):
        result_of({"state": "cancelled", "reason": "user", "message": "Cancelled by the caller."})
