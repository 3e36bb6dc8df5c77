"""Whose name a sentence carries, in tasks, threads, executors and generators."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from rbee.narration import ListSink, configure, current_scope, narrate, run_in_scope, scope
from rbee.narration.testing import captured_narration


@pytest.fixture
def said() -> Iterator[ListSink]:
    with captured_narration("tester") as sink:
        yield sink


def jobs_of(said: ListSink) -> dict[str, str | None]:
    return {event["action"]: event.get("job_id") for event in said.events}


def test_narrate_without_scope_carries_actor_and_time_alone(said: ListSink) -> None:
    before = time.time_ns()
    narrate("say", "Hello", n=1)
    event = said.events[0]
    assert before <= event.pop("ts") <= time.time_ns()
    assert event == {
        "v": 1, "kind": "narration", "actor": "tester", "action": "say", "message": "Hello", "fields": {"n": 1}
    }  # fmt: skip


def test_narrate_in_nested_scopes_overrides_and_restores(said: ListSink) -> None:
    with scope(job_id="job-a", correlation_id="c-1"):
        narrate("outer", "")
        with scope(job_id="job-b", actor="cook"):
            narrate("inner", "")
        narrate("again", "")
    narrate("after", "")
    assert jobs_of(said) == {"outer": "job-a", "inner": "job-b", "again": "job-a", "after": None}
    assert [event["actor"] for event in said.events] == ["tester", "cook", "tester", "tester"]
    assert [event.get("correlation_id") for event in said.events] == ["c-1", "c-1", "c-1", None]


def test_narrate_scope_is_restored_after_an_error(said: ListSink) -> None:
    with pytest.raises(RuntimeError), scope(job_id="job-a"):
        raise RuntimeError
    assert current_scope().job_id is None


def test_narrate_fields_may_have_the_names_of_the_words(said: ListSink) -> None:
    narrate("say", "Hello", action="field", message="field", ts=1, kind="x")
    assert said.events[0]["fields"] == {"action": "field", "message": "field", "ts": 1, "kind": "x"}
    assert said.events[0]["kind"] == "narration"


def test_configure_names_stand_in_every_event_and_a_scope_goes_before_them(said: ListSink) -> None:
    configure(actor="worker", sink=said, hive_id="hive-1", worker_id="worker-1")
    narrate("a", "")
    with scope(worker_id="worker-2"):
        narrate("b", "")
    assert [(event["hive_id"], event["worker_id"]) for event in said.events] == [
        ("hive-1", "worker-1"),
        ("hive-1", "worker-2"),
    ]


async def test_narrate_in_concurrent_tasks_never_mixes_jobs(said: ListSink) -> None:
    meeting = asyncio.Barrier(20)

    async def work(number: int) -> None:
        with scope(job_id=f"job-{number}"):
            for step in range(5):
                await meeting.wait()
                narrate(f"{number}.{step}", "")

    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(work(number))
    assert jobs_of(said) == {f"{n}.{step}": f"job-{n}" for n in range(20) for step in range(5)}


async def test_narrate_in_a_task_made_inside_a_scope_keeps_it_and_leaves_the_parents_alone(said: ListSink) -> None:
    async def child() -> None:
        narrate("child", "")
        with scope(job_id="job-child"):
            await asyncio.sleep(0)
            narrate("child_inner", "")

    with scope(job_id="job-a"):
        async with asyncio.TaskGroup() as group:
            group.create_task(child())
            await asyncio.sleep(0)
            narrate("parent", "")
    assert jobs_of(said) == {"child": "job-a", "parent": "job-a", "child_inner": "job-child"}


async def test_narrate_in_threads_has_a_scope_only_where_it_was_handed_on(said: ListSink) -> None:
    loop = asyncio.get_running_loop()
    with scope(job_id="job-a"), ThreadPoolExecutor(1) as executor:
        await asyncio.to_thread(narrate, "to_thread", "")
        await loop.run_in_executor(executor, narrate, "bare_executor", "")
        await loop.run_in_executor(executor, run_in_scope(narrate), "bound_executor", "")
        await loop.run_in_executor(executor, narrate, "bare_again", "")
        thread = threading.Thread(target=run_in_scope(narrate), args=("bound_thread", ""))
        thread.start()
        thread.join()
    assert jobs_of(said) == {
        "to_thread": "job-a",
        "bare_executor": None,
        "bound_executor": "job-a",
        "bare_again": None,
        "bound_thread": "job-a",
    }


def test_narrate_bound_function_keeps_the_scope_of_binding_and_hands_through_result_and_error() -> None:
    def look(fail: bool) -> str | None:
        if fail:
            raise ValueError
        return current_scope().job_id

    with scope(job_id="job-a"):
        bound = run_in_scope(look)
    with scope(job_id="job-b"):
        assert bound(False) == "job-a"
        with pytest.raises(ValueError):
            bound(True)
        assert current_scope().job_id == "job-b"


def test_narrate_in_a_generator_restores_the_scope_when_it_is_closed(said: ListSink) -> None:
    def steps() -> Generator[int, None, None]:
        with scope(job_id="job-a"):
            narrate("inside", "")
            yield 1

    generator = steps()
    next(generator)
    generator.close()
    narrate("after", "")
    assert jobs_of(said) == {"inside": "job-a", "after": None}


async def test_narrate_in_an_async_generator_closed_by_another_task_does_not_raise(said: ListSink) -> None:
    async def steps() -> AsyncGenerator[int, None]:
        with scope(job_id="job-a"):
            yield 1

    generator = steps()
    await anext(generator)

    async def close() -> None:
        await generator.aclose()
        narrate("closed", "")

    with scope(job_id=None):
        await asyncio.create_task(close())
    assert jobs_of(said) == {"closed": None}


def test_captured_narration_restores_who_spoke_before(said: ListSink) -> None:
    with captured_narration("inner") as inner:
        narrate("a", "")
    narrate("b", "")
    assert (inner.actions, said.actions) == (["a"], ["b"])
