"""Keeper to queen: HTTP and a stream of events, no hive in sight."""

from __future__ import annotations

import json

from rbee.testing import LocalStack
from tests.e2e.reading import actions, assert_whole, infer, states


async def test_check_is_received_and_completed_in_order() -> None:
    """A job that only the queen sees to is told from its acceptance to its end."""
    async with LocalStack(with_hive=False) as stack:
        events = await stack.run_job({"operation": "queen_check", "lines": 2})
    assert_whole(events)
    assert actions(events) == ["queen_receive", "queen_check", "queen_check", "queen_complete"]
    assert states(events) == ["queued", "running", "completed"]


async def test_keeper_follows_a_job_over_http_and_sse() -> None:
    """The real keeper draws the narration on stderr, and with --json prints every event on stdout."""
    async with LocalStack(with_hive=False) as stack, stack.client() as client:
        job_id = (await client.submit({"operation": "queen_check", "lines": 1})).job_id
        drawn = await stack.keeper("jobs", "follow", job_id)
        as_json = await stack.keeper("jobs", "follow", "--json", job_id)
    assert drawn.exit_code == 0
    lines = drawn.stderr.splitlines()
    assert lines[0] == "[queen     ] queen_receive: Accepted: queen_check."
    assert lines[-1] == "[queen     ] queen_complete: The job is complete."
    assert as_json.exit_code == 0
    events = [json.loads(line) for line in as_json.stdout.splitlines()]
    assert_whole(events)
    assert actions(events) == ["queen_receive", "queen_check", "queen_complete"]


async def test_infer_without_a_hive_fails_with_the_reason_in_bounded_time() -> None:
    """A job no hive can take does not wait for ever, and says why it failed."""
    async with LocalStack(with_hive=False, env={"RBEE_HIVE_TIMEOUT_S": "1.5"}) as stack:
        events = await stack.run_job(infer())
    assert_whole(events)
    assert actions(events) == ["queen_receive", "queen_wait", "queen_failed"]
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "no_capacity")
    assert "no hive has registered" in end["error"]["message"]
    assert end["error"]["retryable"] is True


async def test_queen_started_again_still_knows_all_logs() -> None:
    """Logs outlive the queen: the same events, byte for byte, after a restart."""
    async with LocalStack(with_hive=False) as stack:
        before = await stack.run_job({"operation": "queen_check"})
        job_id = before[0]["job_id"]
        queen = stack.queen
        assert queen is not None
        await queen.process.stop(10)
        await stack.start_queen()
        assert await stack.log(job_id) == before
        async with stack.client() as client:
            view = await client.job(job_id)
    assert view.state == "completed"
    assert view.last_seq == len(before)


async def test_queued_job_is_placed_again_by_a_queen_started_again() -> None:
    """What waited when the queen was killed waits on, and is not lost."""
    async with LocalStack(with_hive=False, env={"RBEE_HIVE_TIMEOUT_S": "2"}) as stack:
        async with stack.client() as client:
            job_id = (await client.submit(infer())).job_id
        assert stack.queen is not None
        stack.queen.signal(9)
        await stack.queen.wait()
        await stack.start_queen()
        events = await stack.log(job_id)
    assert_whole(events)
    assert events[-1]["reason"] == "no_capacity"
