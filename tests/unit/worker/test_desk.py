"""A slot is freed and an end is told however early a request is stopped."""

from __future__ import annotations

import asyncio

from rbee.narration.testing import captured_narration
from rbee.worker.calls import Call
from rbee.worker.closing import Closing, StopCause
from rbee.worker.desk import Desk
from rbee.worker.tally import Tally


def closing(request_id: str = "job-a.1") -> Closing:
    """Make the closing line of a request."""
    call = Call(request_id=request_id, job_id="job-a", correlation_id=None, attempt=1, keep="text")
    return Closing(call, Tally())


async def test_request_stopped_before_its_first_step_is_told_and_frees_its_slot() -> None:
    """Its task never runs a line of its own."""
    desk, is_run = Desk(1), False

    async def work() -> None:
        nonlocal is_run
        is_run = True

    with captured_narration("worker") as said:
        async with asyncio.TaskGroup() as group:
            running = desk.admit(closing())
            desk.start(group, running, work())
            desk.cancel("job-a.1")
    assert (is_run, desk.slots_used) == (False, 0)
    assert [event["fields"]["outcome"] for event in said.events] == ["cancelled"]


async def test_first_cause_of_a_stop_stands() -> None:
    """A caller that leaves after a cancel changes nothing."""
    desk = Desk(1)
    with captured_narration("worker"):
        async with asyncio.TaskGroup() as group:
            running = desk.admit(closing())
            desk.start(group, running, asyncio.sleep(60))
            running.stop(StopCause.REQUEST)
            running.stop(StopCause.CALLER)
    assert running.cause is StopCause.REQUEST


def test_closing_line_is_said_once() -> None:
    """Whatever comes after the end is dropped."""
    with captured_narration("worker") as said:
        line = closing()
        line.completed()
        line.stopped(StopCause.CALLER)
        line.completed()
    assert said.actions == ["worker_inference"]
    assert said.events[0]["fields"]["outcome"] == "completed"
