"""Queen to hive: commands there, narration back."""

from __future__ import annotations

import signal

from rbee.testing import LocalStack
from tests.e2e.reading import actions, assert_whole, first, infer


async def test_check_is_forwarded_and_received_in_order() -> None:
    """What the hive says about a command stands in the job's log, behind the queen's forwarding."""
    async with LocalStack() as stack:
        events = await stack.run_job({"operation": "hive_check", "lines": 2})
    assert_whole(events)
    assert actions(events) == [
        "queen_receive",
        "queen_forward",
        "hive_receive",
        "hive_check",
        "hive_check",
        "queen_complete",
    ]
    received = first(events, "hive_receive")
    assert received["hive_id"] == received["src"]["id"].partition("/")[0]
    assert received["fields"]["hive_job_id"] != received["job_id"]


async def test_hive_that_cannot_be_reached_fails_the_job_with_a_true_reason() -> None:
    """A hive that is killed: the job that needs it ends in bounded time, and names the hive."""
    async with LocalStack(env={"RBEE_HIVE_TIMEOUT_S": "4"}) as stack:
        assert stack.hive is not None
        stack.hive.signal(signal.SIGKILL)
        await stack.hive.wait()
        events = await stack.run_job(infer())
        check = await stack.run_job({"operation": "queen_check"})
    assert_whole(events)
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "hive_lost")
    assert "hive-" in end["error"]["message"]
    assert check[-1]["state"] == "completed"


async def test_hive_that_comes_late_takes_the_job_that_waited(rbee_models: object) -> None:
    """A job may come before any hive: it waits, says so, and is taken when one registers."""
    async with LocalStack(with_hive=False) as stack:
        async with stack.client() as client:
            job_id = (await client.submit({"operation": "infer", "prompt": "Hi", "max_tokens": 2})).job_id
        await stack.start_hive()
        events = await stack.log(job_id)
    assert_whole(events)
    assert actions(events)[:3] == ["queen_receive", "queen_wait", "queen_forward"]
    assert events[-1]["state"] == "completed"
