"""Readers of a log: whenever they come and however slow they are, they see exactly the log."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from rbee.contracts.events import events_in, frames_of
from rbee.errors import GoneError, InvalidRequestError
from rbee.jobs import JobRecord, JobRegistry
from rbee.jobs.records import Committed
from tests.unit.jobs.job_stage import (
    SECONDS,
    assert_dense,
    end,
    head_of,
    kinds,
    new_job,
    read_to_end,
    told,
    whole_log,
)

MIB = 2**20


@pytest.fixture(params=["memory", "file"])
async def registry(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[JobRegistry]:
    opened = JobRegistry.open(None if request.param == "memory" else tmp_path / "jobs.db")
    yield opened
    assert opened.hub._readers == {}
    await opened.close()


async def running_job(registry: JobRegistry, *, store: bool = True) -> JobRecord:
    record = await new_job(registry, store=store)
    return await registry.start(record.job_id, owner="b")


async def test_readers_of_any_time_and_position_see_exactly_the_log(registry: JobRegistry) -> None:
    record = await running_job(registry)
    chance = random.Random(7)
    readers: list[tuple[int, asyncio.Task[list[bytes]]]] = []

    async def attach() -> None:
        head = await head_of(registry.store, record.job_id)
        assert head is not None
        after = chance.randint(0, head.last_seq)
        reader = await registry.follow(record.job_id, after)
        readers.append((after, asyncio.create_task(read_to_end(reader))))

    async with asyncio.TaskGroup() as group:
        for batch in range(60):
            count = chance.randint(1, 40)
            await registry.append(record.job_id, [told(f"{batch}.{part}") for part in range(count)])
            if batch % 3 == 0:
                group.create_task(attach())
    await end(registry, record.job_id)
    await attach()
    log = await whole_log(registry, record.job_id)
    assert_dense(log)
    assert kinds(log)[-1] == "end"
    for after, task in readers:
        assert await asyncio.wait_for(task, SECONDS) == log[after:]


async def test_slow_reader_falls_back_to_the_store_and_misses_nothing(registry: JobRegistry) -> None:
    record = await running_job(registry)
    registry.hub.recent_bytes_max = MIB
    slow = await registry.follow(record.job_id)
    seen = await slow.next(SECONDS)  # from the store
    await registry.append(record.job_id, [told("caught up")])
    seen += await slow.next(SECONDS)  # live
    for _ in range(12):
        await registry.append(record.job_id, [told("x" * 10_000)] * 20)
        assert registry.hub._recent_bytes <= MIB
    await end(registry, record.job_id)
    seen += await read_to_end(slow)
    assert seen == await whole_log(registry, record.job_id)


async def test_reader_whose_queue_overflows_while_it_reads_the_store_does_not_fall_asleep(
    registry: JobRegistry,
) -> None:
    registry.hub.recent_bytes_max = MIB
    record = await running_job(registry)
    reader = await registry.follow(record.job_id, 2)
    large = [told("x" * 100_000)] * 12
    reading = asyncio.create_task(reader.next(SECONDS))  # finds nothing in the store, while this is written
    await asyncio.gather(registry.append(record.job_id, large), registry.append(record.job_id, large))
    seen = await reading
    while len(seen) < 24:
        found = await reader.next(SECONDS)
        assert found
        seen += found
    reader.close()
    assert seen == (await whole_log(registry, record.job_id))[2:]


async def test_overflow_between_the_last_page_and_going_live_is_noticed(registry: JobRegistry) -> None:
    registry.hub.recent_bytes_max = MIB
    record = await running_job(registry)
    page = registry.hub.page
    events = [event.numbered(3 + index) for index, event in enumerate([told("x" * 600_000)] * 2)]

    async def page_overtaken(log_id: str, after: int) -> object:
        found = await page(log_id, after)
        registry.hub.page = page  # type: ignore[method-assign]
        await registry.append(record.job_id, [told("x" * 600_000)] * 2)
        return found

    registry.hub.page = page_overtaken  # type: ignore[method-assign, assignment]
    reader = await registry.follow(record.job_id, 1)
    assert kinds(await reader.next(SECONDS)) == ["running"]
    assert await reader.next(SECONDS) == events
    reader.close()


async def test_memory_of_recent_events_is_bounded_over_all_logs(registry: JobRegistry) -> None:
    registry.hub.all_recent_bytes_max = MIB
    records = [await running_job(registry) for _ in range(8)]
    readers = [await registry.follow(record.job_id, 2) for record in records]
    for _ in range(10):
        for record in records:
            await registry.append(record.job_id, [told("x" * 10_000)] * 4)
            assert registry.hub._recent_bytes <= MIB
    await asyncio.gather(*(end(registry, record.job_id) for record in records))
    for record, reader in zip(records, readers, strict=True):
        assert await read_to_end(reader) == (await whole_log(registry, record.job_id))[2:]
    assert registry.hub._recent_bytes == 0


async def test_frames_are_those_of_the_events_wherever_they_come_from(registry: JobRegistry) -> None:
    record = await running_job(registry)
    await registry.append(record.job_id, [told(str(number)) for number in range(5)])
    reader = await registry.follow(record.job_id, 3)
    framed = await reader.next_frames(SECONDS)  # from the store
    await registry.append(record.job_id, [told("live")])
    framed += await reader.next_frames(SECONDS)
    await registry.append(record.job_id, [told("one"), told("two")])
    reader.position += 1  # in the middle of what was committed together
    framed += await reader.next_frames(SECONDS)
    reader.close()
    log = await whole_log(registry, record.job_id)
    assert framed == frames_of(log[3:8], 4) + frames_of(log[9:], 10)


async def test_reader_waits_no_longer_than_it_was_told_to(registry: JobRegistry) -> None:
    record = await running_job(registry)
    reader = await registry.follow(record.job_id, 2)
    assert await reader.next(0.01) == []
    assert not reader.is_ended
    reader.close()


async def test_reader_past_the_end_of_a_live_log_is_refused_and_of_an_ended_one_is_done(
    registry: JobRegistry,
) -> None:
    record = await running_job(registry)
    with pytest.raises(InvalidRequestError, match="ends at 2; 3 is past it"):
        await registry.follow(record.job_id, 3)
    await end(registry, record.job_id)
    for after in (3, 4, 10**17):
        reader = await registry.follow(record.job_id, after)
        assert reader.is_ended
        assert await reader.next(SECONDS) == []
        reader.close()


async def test_live_reader_of_a_job_that_is_not_stored_still_gets_its_end(registry: JobRegistry) -> None:
    record = await running_job(registry, store=False)
    live = await registry.follow(record.job_id)
    seen = await live.next(SECONDS)
    waiting = asyncio.create_task(read_to_end(live))
    await registry.append(record.job_id, [told("answer")])
    await end(registry, record.job_id, result={"text": "secret"})
    seen += await waiting
    assert kinds(seen) == ["queued", "running", "narration", "end"]
    assert_dense(seen)
    assert b'"text":"secret"' in seen[-1]
    with pytest.raises(GoneError):
        await registry.follow(record.job_id)


async def test_reader_that_lags_behind_an_erasure_is_told_that_it_is_gone(registry: JobRegistry) -> None:
    registry.hub.recent_bytes_max = MIB
    record = await running_job(registry, store=False)
    await registry.append(record.job_id, [told("x" * 600_000)] * 3)
    reader = await registry.follow(record.job_id)
    await registry.append(record.job_id, [told("x" * 600_000)] * 3)  # more than its queue holds
    await end(registry, record.job_id)
    with pytest.raises(GoneError):
        await read_to_end(reader)


async def test_closing_the_hub_wakes_every_reader(registry: JobRegistry) -> None:
    record = await running_job(registry)
    readers = [await registry.follow(record.job_id, 2) for _ in range(3)]
    waiting = [asyncio.create_task(reader.next(10 * SECONDS)) for reader in readers]
    await asyncio.sleep(0)
    registry.hub.close()
    async with asyncio.timeout(SECONDS):
        assert await asyncio.gather(*waiting) == [[], [], []]
    late = await registry.follow(record.job_id)
    assert (await late.next(SECONDS), late.is_closing) == ([], True)
    for reader in (*readers, late):
        reader.close()
        reader.close()


async def test_many_readers_of_many_logs_are_told_only_of_their_own(registry: JobRegistry) -> None:
    records = [await running_job(registry) for _ in range(10)]
    readers = [asyncio.create_task(read_to_end(await registry.follow(record.job_id))) for record in records]

    async def speak(record: JobRecord) -> None:
        for index in range(20):
            await registry.append(record.job_id, [told(f"{record.job_id} {index}")])
        await end(registry, record.job_id)

    await asyncio.gather(*(speak(record) for record in records))
    for record, events in zip(records, await asyncio.gather(*readers), strict=True):
        assert events == await whole_log(registry, record.job_id)
        assert all(record.job_id.encode() in event for event in events)


async def test_publication_has_the_order_of_the_numbers(registry: JobRegistry) -> None:
    published: list[Committed] = []
    tell = registry.store.on_commit

    def listen(committed: list[Committed]) -> None:
        published.extend(committed)
        tell(committed)

    registry.store.on_commit = listen
    record = await running_job(registry)
    await asyncio.gather(*(registry.append(record.job_id, [told(str(index))] * 2) for index in range(50)))
    assert [batch.first_seq for batch in published] == [1, 2, *range(3, 103, 2)]
    assert [event for batch in published for event in events_in(batch.frames)] == await whole_log(
        registry, record.job_id
    )


async def test_reader_hears_what_other_processes_write_as_well(tmp_path: Path) -> None:
    """They are told of nothing, so it comes with the next event of this process, or when the wait is over."""
    path = tmp_path / "jobs.db"
    async with JobRegistry.open(path) as registry, JobRegistry.open(path) as other:
        record = await running_job(registry)
        reader = await registry.follow(record.job_id, 2)
        for number, who in enumerate((registry, other, other, registry, other, registry)):
            await who.append(record.job_id, [told(str(number))])
        seen: list[bytes] = []
        while len(seen) < 6:
            found = await reader.next(SECONDS)
            assert found
            seen += found
        await end(other, record.job_id)
        seen += await reader.next(0.01)
        assert reader.is_ended
        assert seen == (await whole_log(registry, record.job_id))[2:]
        reader.close()


async def test_reading_sees_the_file_as_it_is_at_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "jobs.db"
    async with JobRegistry.open(path) as registry, JobRegistry.open(path) as other:
        record = await running_job(registry)
        writing = asyncio.create_task(_speak(other, record.job_id))
        while not writing.done():
            page = await registry.read(record.job_id, 0)
            assert page.last_seq == page.head.last_seq
        await writing


async def _speak(registry: JobRegistry, job_id: str) -> None:
    for number in range(300):
        await registry.append(job_id, [told(str(number))])
