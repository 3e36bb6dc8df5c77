"""What every store of jobs promises; see `rbee.jobs.store.JobStore`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from rbee.contracts.events import NewEvent
from rbee.contracts.ids import new_id
from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import JobState, Phase
from rbee.contracts.views import Progress
from rbee.errors import ConflictError, GoneError, NotFoundError, OverloadedError, WorkerLostError
from rbee.jobs import JobFilter, JobRecord, JobRegistry
from rbee.jobs.endings import error_body
from rbee.jobs.records import Changed, Committed, LogHead, WorkerRecord
from rbee.jobs.store import PAGE, JobStore, StoreClosedError, all_jobs
from tests.unit.jobs.job_stage import assert_dense, captured, end, head_of, kinds, new_job, told, whole_log

# Jobs


async def test_create_under_an_id_that_is_taken_is_refused_and_changes_nothing(registry: JobRegistry) -> None:
    record = await new_job(registry, store=False)
    ended = await end(registry, record.job_id, JobState.CANCELLED)
    with pytest.raises(ConflictError, match="There is a job job-"):
        await new_job(registry, job_id=record.job_id)
    assert await registry.get(record.job_id) == ended


async def test_every_field_of_a_job_comes_back(registry: JobRegistry) -> None:
    record = await new_job(registry)
    await registry.start(record.job_id, owner="b", hive_id="hive-1", worker_id="worker-1", phase=Phase.GENERATING)
    progress = Progress(done=1, total=None, unit="bytes")
    updated = await registry.update(record.job_id, message="m", progress=progress, events=[told("u")])
    assert updated == await registry.get(record.job_id)
    assert (updated.progress, updated.message, updated.phase) == (progress, "m", Phase.GENERATING)
    error = error_body(WorkerLostError("m", details={"exit_code": 0}))
    ended = await end(registry, record.job_id, JobState.FAILED, error=error, result={"text": "é"})
    assert ended == await registry.get(record.job_id)
    assert (await registry.view(record.job_id)).result == {"text": "é"}
    assert kinds(await whole_log(registry, record.job_id)) == ["queued", "running", "narration", "end"]


async def test_queue_takes_as_many_as_may_wait_and_no_more(registry: JobRegistry) -> None:
    made = await asyncio.gather(*(new_job(registry) for _ in range(130)), return_exceptions=True)
    refused = [error for error in made if isinstance(error, OverloadedError)]
    assert len(refused) == 30
    assert {(error.status, error.retryable, error.retry_after_s) for error in refused} == {(429, True, 5)}
    assert (await registry.store.counts())["queued"] == 100
    (waiting, *_) = await registry.store.find(JobFilter(limit=1))
    await end(registry, waiting.job_id, JobState.CANCELLED)
    await new_job(registry)


async def test_same_key_and_body_fifty_times_at_once_is_one_job(registry: JobRegistry) -> None:
    made = await asyncio.gather(*(new_job(registry, idempotency_key="k", events=[told("x")]) for _ in range(50)))
    assert len({record.job_id for record in made}) == 1
    assert (await registry.store.counts())["queued"] == 1
    assert kinds(await whole_log(registry, made[0].job_id)) == ["queued", "narration"]


async def test_key_of_a_job_that_ended_in_the_same_moment_gives_it_as_it_is(registry: JobRegistry) -> None:
    job_id = new_id("job")
    made, ended, again = await asyncio.gather(
        new_job(registry, idempotency_key="k", job_id=job_id),
        end(registry, job_id, JobState.CANCELLED),
        new_job(registry, idempotency_key="k"),
    )
    assert (made.state, again) == ("queued", ended)


async def test_key_used_with_another_body_is_refused(registry: JobRegistry) -> None:
    await registry.create(QueenCheck(lines=1), correlation_id="c", idempotency_key="k")
    with pytest.raises(ConflictError, match="Idempotency-Key"):
        await registry.create(QueenCheck(lines=2), correlation_id="c", idempotency_key="k")


async def test_key_of_another_caller_is_another_key(registry: JobRegistry) -> None:
    made = [await new_job(registry, idempotency_key="k", principal=name) for name in ("a", "b")]
    assert made[0].job_id != made[1].job_id


async def test_key_still_means_its_job_after_the_end_and_past_a_full_queue(registry: JobRegistry) -> None:
    record = await new_job(registry, idempotency_key="k")
    ended = await end(registry, record.job_id, JobState.CANCELLED)
    await asyncio.gather(*(new_job(registry) for _ in range(100)))
    assert await new_job(registry, idempotency_key="k") == ended


async def test_list_filters_and_pages_newest_first(registry: JobRegistry) -> None:
    ids = sorted(new_id("job") for _ in range(10))
    made = [await new_job(registry, model=f"m{number % 2}", job_id=job_id) for number, job_id in enumerate(ids)]
    await end(registry, ids[3], JobState.CANCELLED)
    seen: list[str] = []
    before = None
    while page := await registry.find(JobFilter(before=before, limit=3)):
        seen += [view.job_id for view in page]
        before = seen[-1]
    assert seen == [record.job_id for record in reversed(made)]
    odd = await registry.find(JobFilter(model="m1", state=JobState.QUEUED))
    assert [view.job_id for view in odd] == [ids[9], ids[7], ids[5], ids[1]]
    assert await registry.find(JobFilter(since=made[-1].created_at + 1)) == []
    assert len(await registry.find(JobFilter(until=made[-1].created_at + 1, correlation_id="c-1"))) == 10
    assert await registry.find(JobFilter(operation="infer")) == []


async def test_queue_position_counts_priority_before_age(registry: JobRegistry) -> None:
    for name, priority in (("job-1", 0), ("job-2", 5), ("job-3", 0), ("job-4", -1)):
        await new_job(registry, job_id=name, priority=priority)
    views = await registry.find(JobFilter())
    assert {view.job_id: view.queue_position for view in views} == {"job-2": 1, "job-1": 2, "job-3": 3, "job-4": 4}
    await registry.start("job-1", owner="b")
    assert (await registry.view("job-1")).queue_position is None
    assert (await registry.view("job-3")).queue_position == 2


async def test_concurrent_appends_leave_a_dense_log_in_the_order_of_their_writer(registry: JobRegistry) -> None:
    record = await new_job(registry)

    async def speak(number: int) -> None:
        for index in range(25):
            await registry.append(record.job_id, [told(f"{number} {index}.{part}") for part in range(2)])

    await asyncio.gather(*(speak(number) for number in range(8)))
    events = await whole_log(registry, record.job_id)
    assert_dense(events)
    assert len(events) == 1 + 8 * 25 * 2
    said = [json.loads(event)["message"] for event in events[1:]]
    for number in range(8):
        mine = [message.split()[1] for message in said if message.startswith(f"{number} ")]
        assert mine == [f"{index}.{part}" for index in range(25) for part in range(2)]


async def test_append_of_nothing_writes_nothing(registry: JobRegistry) -> None:
    record = await new_job(registry)
    assert await registry.append(record.job_id, []) is True
    assert await registry.append(record.job_id, []) is True
    assert (await registry.read(record.job_id, 0)).head.last_seq == 1


async def test_long_log_is_paged_from_any_number(registry: JobRegistry) -> None:
    record = await new_job(registry)
    for block in range(10):
        await registry.append(record.job_id, [told(f"{block}.{index}") for index in range(1000)])
    events = await whole_log(registry, record.job_id)
    assert len(events) == 10_001
    assert_dense(events)
    for after in (0, 1, 499, 500, 1000, 1001, 9_990, 10_000):
        page = await registry.read(record.job_id, after, 500)
        assert page.events == events[after : after + 500]
        assert (page.head.first_seq, page.head.last_seq) == (1, 10_001)
    assert (await registry.read(record.job_id, 10_001)).events == []
    assert (await registry.read(record.job_id, 99_999)).events == []


async def test_page_of_large_events_is_bounded_by_bytes(registry: JobRegistry) -> None:
    record = await new_job(registry)
    for _ in range(12):
        await registry.append(record.job_id, [told("x" * 250_000)])
    page = await registry.read(record.job_id, 0)
    assert len(page.events) == 6  # the first event, and what makes the mebibyte full
    assert_dense(await whole_log(registry, record.job_id))


async def test_job_that_is_not_stored_is_erased_when_it_ends(registry: JobRegistry) -> None:
    record = await new_job(registry, store=False)
    await registry.start(record.job_id, owner="b")
    await end(registry, record.job_id, result={"text": "secret", "n": 1})
    view = await registry.view(record.job_id)
    assert (view.state, view.result, view.last_seq) == ("completed", {"n": 1}, 3)
    for call in (registry.read(record.job_id, 0), registry.read(record.job_id, 2), registry.follow(record.job_id)):
        with pytest.raises(GoneError) as caught:
            await call
        assert caught.value.status == 410
    with pytest.raises(GoneError):
        await registry.operation(record.job_id)
    assert (await registry.follow(record.job_id, 3)).is_ended


async def test_log_of_a_worker_forgets_its_oldest_part(registry: JobRegistry) -> None:
    block = [told("x" * 60_000)] * 16
    for _ in range(80):
        await registry.append("worker-1", block)
    head = (await head_of(registry.store, "worker-1")) or pytest.fail("no log")
    assert head.last_seq == 80 * 16
    assert 1 < head.first_seq < head.last_seq
    assert 32 * 1024 * 1024 < head.size_bytes <= 64 * 1024 * 1024
    with pytest.raises(GoneError, match=f"before {head.first_seq} are no longer kept"):
        await registry.read("worker-1", head.first_seq - 2)
    kept = await registry.read("worker-1", head.first_seq - 1)
    assert_dense(kept.events, head.first_seq)


async def test_create_keeps_the_request_word_for_word(registry: JobRegistry) -> None:
    operation = Infer(prompt="Why?\x00 é", labels={"null": "null", "1": "true"}, timeout_s=3)
    record = await registry.create(operation, correlation_id="null", principal="1", model="null")
    assert await registry.operation(record.job_id) == operation
    kept = await registry.get(record.job_id)
    assert kept == record
    assert (kept.labels, kept.model, kept.principal) == ({"null": "null", "1": "true"}, "null", "1")
    assert kept.deadline_at == pytest.approx(kept.created_at + 3)


async def test_change_is_made_of_the_job_as_it_is_and_told_in_the_same_moment(
    registry: JobRegistry, store: JobStore
) -> None:
    record = await new_job(registry)

    def count_up(before: JobRecord) -> Changed:
        return Changed(msgspec.structs.replace(before, attempts=before.attempts + 1), [told(str(before.attempts))])

    after = await asyncio.gather(*(store.change(record.job_id, count_up) for _ in range(100)))
    assert [each.attempts for each in after] == list(range(3, 103))
    said = [json.loads(event)["message"] for event in (await whole_log(registry, record.job_id))[1:]]
    assert said == [str(number) for number in range(2, 102)]


async def test_what_a_decider_raises_changes_nothing_and_goes_to_who_asked(
    registry: JobRegistry, store: JobStore
) -> None:
    record = await new_job(registry)

    def refuse(before: JobRecord) -> Changed:
        raise ConflictError("No.")

    changes = (store.change(record.job_id, refuse), store.append(record.job_id, [told("x")]))
    refused, appended = await asyncio.gather(*changes, return_exceptions=True)
    assert (str(refused), appended) == ("No.", True)
    with pytest.raises(ConflictError, match="No"):
        await store.claim(["queen_check"], 1.0, 1, refuse)
    assert await store.get(record.job_id) == record
    with pytest.raises(NotFoundError, match="job-x"):
        await store.change("job-x", refuse)


async def test_counts_follow_every_change(registry: JobRegistry, store: JobStore) -> None:
    made = [(await new_job(registry)).job_id for _ in range(9)]
    for job_id in made[1:]:
        await registry.start(job_id, owner="b")
    for to, ended in (
        (JobState.COMPLETED, made[2:4]),
        (JobState.FAILED, made[4:7]),
        (JobState.CANCELLED, made[7:]),
    ):
        for job_id in ended:
            await end(registry, job_id, to)
    with pytest.raises(ConflictError):
        await end(registry, made[8])
    counts = {"queued": 1, "running": 1, "completed": 2, "failed": 3, "cancelled": 2}
    assert await store.counts() == counts
    for state, number in counts.items():
        assert len(await store.find(JobFilter(state=JobState(state), limit=100))) == number


async def test_all_jobs_are_found_over_many_pages(registry: JobRegistry, store: JobStore) -> None:
    made = []
    for _ in range(0, PAGE + 50, 50):
        batch = await asyncio.gather(*(new_job(registry) for _ in range(50)))
        await asyncio.gather(*(registry.start(record.job_id, owner="b") for record in batch))
        made += [record.job_id for record in batch]
    queued = (await new_job(registry)).job_id
    found = [record.job_id for record in await all_jobs(store, JobState.QUEUED, JobState.RUNNING)]
    assert found == [queued, *sorted(made, reverse=True)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("model", "m"), ("hive_id", "hive-1"), ("worker_id", "worker-1"), ("correlation_id", "c-2")],
)
async def test_list_is_filtered_by_each_field(
    registry: JobRegistry, store: JobStore, name: str, value: str
) -> None:
    job_id = (await registry.create(QueenCheck(), correlation_id="c-2", model="m")).job_id
    await registry.start(job_id, owner="b", hive_id="hive-1", worker_id="worker-1")
    await new_job(registry)
    query = msgspec.convert({name: value}, JobFilter)
    assert [record.job_id for record in await store.find(query)] == [job_id]
    assert await store.find(msgspec.structs.replace(query, limit=0)) == []


# Claims


def claim_for(owner: str, lease_until: float = 100.0) -> Any:
    def decide(record: JobRecord) -> Changed:
        if record.labels.get("end"):
            ended = msgspec.structs.replace(record, state=JobState.CANCELLED, ended_at=1.0, lease_until=None)
            return Changed(ended, [told("over")])
        running = msgspec.structs.replace(
            record, state=JobState.RUNNING, owner=owner, attempt=record.attempt + 1, lease_until=lease_until
        )
        return Changed(running, [told(owner)])

    return decide


async def test_claim_takes_those_whose_lease_is_over_then_priority_then_who_came_first(
    registry: JobRegistry, store: JobStore
) -> None:
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 5), ("e", 0), ("f", 10), ("g", 10)):
        await new_job(registry, job_id=f"job-{name}", priority=priority)
    taken = [await store.claim(["queen_check"], 1.0, 1, claim_for("a", until)) for until in (30.0, 20.0)]
    assert [turn[0][0].job_id for turn in taken] == ["job-f", "job-g"]
    found = await store.claim(["queen_check"], 30.0, 6, claim_for("b"))
    assert [(record.job_id, record.owner, record.attempt) for record, _ in found] == [
        *(("job-g", "b", 2), ("job-f", "b", 2)),
        *(("job-b", "b", 1), ("job-d", "b", 1), ("job-a", "b", 1), ("job-e", "b", 1)),
    ]
    assert [await store.get(record.job_id) for record, _ in found] == [record for record, _ in found]
    assert {await store.request(record.job_id) for record, _ in found} == {request for _, request in found}
    assert [record.job_id for record, _ in await store.claim(["queen_check"], 99.0, 6, claim_for("c"))] == [
        "job-c"
    ]
    assert await store.claim(["queen_check"], 99.0, 6, claim_for("c")) == []


async def test_claim_takes_the_operations_that_are_asked_for(registry: JobRegistry, store: JobStore) -> None:
    check = await new_job(registry, job_id="job-a")
    infer = await registry.create(Infer(prompt="?"), job_id="job-b")
    assert await store.claim(["hive_check"], 1.0, 9, claim_for("a")) == []
    both = await store.claim(["infer", "queen_check", "hive_check"], 1.0, 9, claim_for("a"))
    assert [record.job_id for record, _ in both] == [check.job_id, infer.job_id]
    assert await store.claim(["infer"], 100.0, 9, claim_for("b")) != []
    assert (await registry.get(check.job_id)).owner == "a"


async def test_claim_does_not_count_those_that_it_ends(registry: JobRegistry, store: JobStore) -> None:
    for number in range(6):
        operation = QueenCheck(labels={"end": "yes"} if number in (0, 1, 3) else {})
        await registry.create(operation, job_id=f"job-{number}")
    found = await store.claim(["queen_check"], 1.0, 2, claim_for("a"))
    assert [record.job_id for record, _ in found] == ["job-2", "job-4"]
    assert await store.counts() == {"queued": 1, "running": 2, "cancelled": 3, "completed": 0, "failed": 0}
    events = await whole_log(registry, "job-0")
    assert_dense(events)
    head = await head_of(store, "job-0")
    assert head is not None and head.is_ended


async def test_many_claims_at_once_give_each_job_to_one(registry: JobRegistry, store: JobStore) -> None:
    made = {(await new_job(registry)).job_id for _ in range(60)}
    claims = (store.claim(["queen_check"], 1.0, 4, claim_for(str(number))) for number in range(20))
    found = [turn for turns in await asyncio.gather(*claims) for turn in turns]
    assert sorted(record.job_id for record, _ in found) == sorted(made)
    assert {record.attempt for record, _ in found} == {1}


# What is told of a commit


async def test_commits_are_told_in_their_order_before_the_answer(registry: JobRegistry, store: JobStore) -> None:
    committed: list[Committed] = []
    store.on_commit = committed.extend
    record = await new_job(registry)

    async def speak(number: int) -> None:
        assert await store.append(record.job_id, [told(str(number)), told("and")])
        assert str(number).encode() in b"".join(batch.frames for batch in committed)

    await asyncio.gather(*(speak(number) for number in range(50)))
    await registry.start(record.job_id, owner="b")
    ended = await end(registry, record.job_id, events=[told("closing")])
    assert [batch.first_seq for batch in committed[1:]] == [batch.last_seq + 1 for batch in committed[:-1]]
    assert [batch.is_end for batch in committed] == [False] * (len(committed) - 1) + [True]
    assert (committed[-1].ended, committed[-1].last_seq) == (ended, 1 + 100 + 1 + 2)
    page = await store.read_log(record.job_id, 0, 1000)
    assert page is not None and page.frames == b"".join(batch.frames for batch in committed)


async def test_write_that_is_refused_is_not_told(registry: JobRegistry, store: JobStore) -> None:
    record = await new_job(registry)
    await end(registry, record.job_id, JobState.CANCELLED)
    committed: list[Committed] = []
    store.on_commit = committed.extend
    assert await store.append(record.job_id, [told("late")]) is False
    with pytest.raises(ConflictError):
        await new_job(registry, job_id=record.job_id)
    assert committed == []


# Logs and workers


async def test_log_that_nobody_wrote_to_is_not_there(store: JobStore) -> None:
    assert (await head_of(store, "hive-1"), await store.read_log("hive-1", 0, 10)) == (None, None)
    assert (await store.get("job-x"), await store.request("job-x")) == (None, None)


async def test_worker_is_known_until_it_is_forgotten_and_its_log_stays(store: JobStore) -> None:
    worker = WorkerRecord("worker-1", "hive-1", "m", "job-1")
    await store.put_worker(worker)
    assert (await store.workers(), await head_of(store, "worker-1")) == ([worker], LogHead(1, 0, 0, False))
    ended = msgspec.structs.replace(worker, exit_line=b"{}")
    events: list[NewEvent] = [told("x")]
    await store.append("worker-1", events)
    await store.put_worker(ended)
    assert await store.workers() == [ended]
    await store.forget_worker("worker-1")
    await store.forget_worker("worker-1")
    assert await store.workers() == []
    head = await head_of(store, "worker-1")
    assert head is not None and head.last_seq == 1


async def test_closed_store_refuses_every_call_with_an_error_of_its_own(
    registry: JobRegistry, store: JobStore
) -> None:
    record = await new_job(registry)
    await store.close()
    for call in (
        new_job(registry),
        registry.start(record.job_id, owner="b"),
        store.claim(["queen_check"], 1.0, 1, claim_for("a")),
        store.append(record.job_id, [told("x")]),
        store.ingest([captured(0, 1)]),
        store.cursors(["worker-1/stdout"]),
        store.get(record.job_id),
        store.find(JobFilter()),
        store.counts(),
        store.read_log(record.job_id, 0, 1),
        store.put_worker(WorkerRecord("worker-1", "hive-1", "m")),
        store.workers(),
    ):
        with pytest.raises(StoreClosedError, match="The registry is closed"):
            await call
    assert StoreClosedError.retryable is False
    await store.close()
