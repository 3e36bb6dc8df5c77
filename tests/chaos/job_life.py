"""Whole lives of jobs on a registry's file, step by step; each step is acknowledged on stdout when it returned.

As a program: `python -m tests.chaos.job_life FILE {record,live,endure} [REFERENCE]`. `record` prints what the
registry holds after each step, `live` only the acknowledgements. `endure` repeats a step that was refused, and
says what the refusal was and whether anything had changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from rbee.contracts.events import NewEvent, new_event
from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.errors import RbeeError, UnavailableError
from rbee.jobs import ClaimedJob, Fence, JobFilter, JobRegistry
from rbee.jobs.records import Entry, SourceBatch, WorkerRecord

CANARY = "the-canary-that-must-not-stay"
KEPT, ERASED, CANCELLED, CLAIMED = (f"job-01j0000000000000000000000{letter}" for letter in "abcd")
WORKER = "worker-01j0000000000000000000000w"
SOURCES = (f"{WORKER}/stdout", f"{WORKER}/stderr")
LINE_BYTES = 700
TRIES_MAX = 40

Step = Callable[[JobRegistry], Awaitable[Any]]


def _told(text: str) -> NewEvent:
    return new_event("narration", {"ts": 1, "actor": "test", "action": "test_say", "message": text})


def _create(job_id: str, **more: Any) -> Step:
    prompt = CANARY if job_id == ERASED else "hello"
    operation = Infer(model="m", prompt=prompt, store=job_id != ERASED)
    return lambda registry: registry.create(operation, correlation_id="c-1", job_id=job_id, **more)


def _start(job_id: str) -> Step:
    return lambda registry: registry.start(job_id, owner="boot", worker_id=WORKER, events=[_told("placed")])


def _end(job_id: str, to: JobState = JobState.COMPLETED) -> Step:
    return lambda registry: registry.end(
        job_id,
        to,
        reason=Reason.OK if to is JobState.COMPLETED else Reason.USER,
        message="Over.",
        result={"text": CANARY if job_id == ERASED else "an answer", "finish_reason": "stop"},
        fence=Fence(owner="boot", attempt=1),
        events=[_told("closing")],
    )


def _ingest(job_id: str, first: int, count: int, *, ends: bool = False) -> Step:
    """Commit lines `first`, `first` + 1, … of both files, half of them for the job."""

    def step(registry: JobRegistry) -> Awaitable[Any]:
        batches = []
        for source in SOURCES:
            offsets = range(first * LINE_BYTES, (first + count) * LINE_BYTES, LINE_BYTES)
            entries = [
                Entry((job_id, WORKER)[number % 2], _line(source, offset, secret=job_id == ERASED))
                for number, offset in enumerate(offsets)
            ]
            ended = [_worker(b'{"exit":1}')] if ends and source == SOURCES[0] else []
            batches.append(
                SourceBatch(source, offsets.start, offsets.stop, len(entries) % 3, entries, ended_workers=ended)
            )
        return registry.store.ingest(batches)

    return step


def _line(source: str, offset: int, *, secret: bool) -> NewEvent:
    text = (CANARY if secret else "piece").ljust(LINE_BYTES, ".")
    return new_event("token", {"ts": 1, "text": text, "src": {"id": source, "offset": offset}})


def _worker(exit_line: bytes | None = None) -> WorkerRecord:
    return WorkerRecord(WORKER, "hive-1", "m", KEPT, exit_line)


class _Loop:
    """A worker loop, taken one step at a time."""

    def __init__(self) -> None:
        self._jobs: AsyncGenerator[ClaimedJob, None] | None = None
        self._block = contextlib.AsyncExitStack()
        self._job: ClaimedJob | None = None

    @property
    def job(self) -> ClaimedJob:
        assert self._job is not None
        return self._job

    async def claim(self, registry: JobRegistry) -> None:
        self._jobs = self._jobs or registry.claim(QueenCheck, name="checker")
        self._job = await anext(self._jobs)
        await self._block.enter_async_context(self._job)

    async def fail_for_now(self, registry: JobRegistry) -> None:
        async with self._block:
            raise UnavailableError("Not just now.", retry_after_s=0.01)

    async def complete(self, registry: JobRegistry) -> None:
        self.job.result = {"lines": 2}
        await self._block.aclose()

    async def close(self) -> None:
        if self._jobs is not None:
            await self._jobs.aclose()


_LOOP = _Loop()


STEPS: list[Step] = [
    _create(KEPT, events=[_told("received")], idempotency_key="key"),
    lambda registry: registry.store.put_worker(_worker()),
    _start(KEPT),
    _ingest(KEPT, 0, 6),
    lambda registry: registry.append(KEPT, [_told("one"), _told("two")]),
    lambda registry: registry.update(KEPT, message="half", events=[_told("half")]),
    _create(CANCELLED),
    _ingest(KEPT, 6, 6),
    lambda registry: registry.take_over(KEPT, owner="boot", events=[_told("resumed")]),
    _end(KEPT),
    _create(ERASED),
    _start(ERASED),
    lambda registry: registry.append(ERASED, [_told(CANARY)]),
    _start(CANCELLED),
    lambda registry: registry.request_cancel(CANCELLED),
    _end(CANCELLED, JobState.CANCELLED),
    _end(ERASED),
    _ingest(WORKER, 12, 4, ends=True),
    lambda registry: registry.store.forget_worker(WORKER),
    lambda registry: registry.create(QueenCheck(attempts=3), correlation_id="c-1", job_id=CLAIMED),
    _LOOP.claim,
    lambda registry: _LOOP.job.say("checker_begin", "It is being done.", part=1),
    _LOOP.fail_for_now,
    _LOOP.claim,
    lambda registry: _LOOP.job.renew(),
    lambda registry: _LOOP.job.update(message="half"),
    _LOOP.complete,
]


async def snapshot(registry: JobRegistry) -> dict[str, Any]:
    """Return all that the registry holds, but for times."""
    store = registry.store
    jobs = {}
    for record in await store.find(JobFilter(limit=100)):
        shown = msgspec.to_builtins(record, builtin_types=(bytes,))
        jobs[record.job_id] = {
            **{name: str(value) for name, value in shown.items() if not name.endswith(("_at", "_until", "owner"))},
            "is_owned": record.owner is not None,
            "is_leased": record.lease_until is not None,
            "has_request": await store.request(record.job_id) is not None,
        }
    return {
        "jobs": dict(sorted(jobs.items())),
        "logs": {log_id: await _log(registry, log_id) for log_id in (KEPT, ERASED, CANCELLED, CLAIMED, WORKER)},
        "cursors": {name: list(value) for name, value in sorted((await store.cursors(SOURCES)).items())},
        "workers": [str(worker) for worker in await store.workers()],
    }


async def _log(registry: JobRegistry, log_id: str) -> dict[str, Any] | None:
    page = await registry.store.read_log(log_id, 0, 1000)
    if page is None:
        return None
    said = [json.loads(event) for event in page.events]
    assert [event["seq"] for event in said] == list(range(page.head.first_seq, page.head.last_seq + 1))
    for event in said:
        event.pop("ts")
    return {"head": [*msgspec.structs.astuple(page.head)][:2], "is_ended": page.head.is_ended, "said": said}


def say(**what: Any) -> None:
    """Print one line, whole."""
    os.write(1, json.dumps(what).encode() + b"\n")


async def _endure(registry: JobRegistry, number: int, before: Any) -> None:
    """Repeat a step until it is taken; after a refusal nothing may have changed."""
    for _ in range(TRIES_MAX):
        try:
            await STEPS[number](registry)
            return
        except RbeeError as error:
            is_unchanged = await _is_same(registry, before)
            say(refused=number, status=error.status, message=error.message, is_unchanged=is_unchanged)
    raise AssertionError(f"step {number} was refused {TRIES_MAX} times")


async def _is_same(registry: JobRegistry, before: Any) -> bool | None:
    """Tell whether the registry holds what it held before; None when it could not be read either."""
    try:
        return bool(json.loads(json.dumps(await snapshot(registry))) == before)
    except RbeeError as error:
        assert error.status in (503, 507), error
        return None


async def _opened(path: Path, tries: int) -> JobRegistry:
    """Open the registry, again when it is refused."""
    for _ in range(tries - 1):
        try:
            return JobRegistry.open(path)
        except RbeeError as error:
            say(refused="open", status=error.status, message=error.message, is_unchanged=None)
    return JobRegistry.open(path)


async def main(path: Path, mode: str, reference: str | None = None) -> None:
    """Live the jobs' lives."""
    held = json.loads(Path(reference).read_text()) if reference else []
    registry = await _opened(path, TRIES_MAX if mode == "endure" else 1)
    if mode == "record":
        say(snapshot=await snapshot(registry))
    for number, step in enumerate(STEPS):
        if mode == "endure":
            await _endure(registry, number, held[number])
        else:
            await step(registry)
        say(acknowledged=number)
        if mode == "record":
            say(snapshot=await snapshot(registry))
    if mode == "endure":
        said = [is_same for _ in range(TRIES_MAX) if (is_same := await _is_same(registry, held[-1])) is not None]
        say(is_as_ever=said[0])
    await _LOOP.close()
    await registry.close()
    say(closed=True)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
