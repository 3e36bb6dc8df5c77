"""The registry against a dictionary: whatever is asked of both, in any order, they agree."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import TERMINAL_STATES, JobState
from rbee.errors import ConflictError, GoneError
from rbee.jobs import Fence, JobRegistry
from rbee.jobs.sqlite_store import SqliteStore
from tests.unit.jobs.job_stage import end, told, whole_log

T = TypeVar("T")

BEGAN_S = 1_000_000_000.0
OWNERS = st.sampled_from(["this-boot", "that-boot"])
STEPS = st.sampled_from([-86_400.0, -1.0, 0.25, 86_400.0])


class Model:
    """What a job must look like."""

    def __init__(self, store: bool, created_at: float) -> None:
        self.state = JobState.QUEUED
        self.attempt = 0
        self.owner: str | None = None
        self.is_cancelling = False
        self.store = store
        self.events = 1
        self.created_at = created_at
        self.started_at: float | None = None
        self.ended_at: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.state in TERMINAL_STATES

    def holds(self, fence: Fence | None) -> bool:
        return fence is None or (fence.owner, fence.attempt) == (self.owner, self.attempt)


class RegistryMachine(RuleBasedStateMachine):
    jobs: Bundle[str] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.models: dict[str, Model] = {}
        self.keys: dict[str, str] = {}
        self.now_s = BEGAN_S
        self.homes = (Path(self.directory.name) / f"{number}.db" for number in itertools.count())
        self.path = next(self.homes)

    def wait(self, call: Awaitable[T]) -> T:
        async def waiting() -> T:
            return await call

        return self.runner.run(waiting())

    async def opened(self) -> JobRegistry:
        return JobRegistry(SqliteStore(self.path), clock=lambda: self.now_s)

    @initialize()
    def begin(self) -> None:
        self.registry = self.wait(self.opened())

    @rule(target=jobs, store=st.booleans(), key=st.none() | st.sampled_from("ab"), lines=st.integers(1, 2))
    def create(self, store: bool, key: str | None, lines: int) -> str:
        call = self.registry.create(
            QueenCheck(store=store, lines=lines),
            correlation_id="c-1",
            idempotency_key=key and f"{key}{store}{lines}",
        )
        record = self.wait(call)
        before = self.keys.get(record.idempotency_key or "")
        assert record.job_id == (before or record.job_id), "one key made two jobs"
        if before is None:
            self.keys[record.idempotency_key or record.job_id] = record.job_id
            self.models[record.job_id] = Model(store, self.now_s)
        return record.job_id

    @rule(job=jobs)
    def create_another_with_its_key(self, job: str) -> None:
        for key in [key for key, made in self.keys.items() if made == job and key != job]:
            self.refused(self.registry.create(QueenCheck(lines=99), correlation_id="c-1", idempotency_key=key))

    @rule(job=jobs, owner=OWNERS)
    def start(self, job: str, owner: str) -> None:
        model = self.models[job]
        if model.is_ended or model.is_cancelling:
            self.refused(self.registry.start(job, owner=owner))
            return
        model.state, model.attempt, model.events = JobState.RUNNING, model.attempt + 1, model.events + 1
        model.owner, model.started_at = owner, model.started_at or self.now_s
        assert self.wait(self.registry.start(job, owner=owner)).attempt == model.attempt

    @rule(job=jobs, owner=OWNERS)
    def take_over(self, job: str, owner: str) -> None:
        model = self.models[job]
        call = self.registry.take_over(job, owner=owner, events=[told("mine")])
        if model.state is not JobState.RUNNING:
            self.refused(call)
            return
        model.owner, model.events = owner, model.events + 1
        assert self.wait(call).attempt == model.attempt

    @rule(
        job=jobs,
        to=st.sampled_from(sorted(TERMINAL_STATES)),
        claim=st.none() | st.tuples(OWNERS, st.integers(-1, 1)),
    )
    def end(self, job: str, to: JobState, claim: tuple[str, int] | None) -> None:
        model = self.models[job]
        fence = None if claim is None else Fence(claim[0], model.attempt + claim[1])
        call = end(self.registry, job, to, fence=fence, events=[told("closing")])
        is_early = model.state is JobState.QUEUED and to is JobState.COMPLETED
        if model.is_ended or is_early or not model.holds(fence):
            self.refused(call)
            return
        model.state, model.events, model.ended_at = to, model.events + 2, self.now_s
        assert self.wait(call).state is to

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        model = self.models[job]
        model.is_cancelling = model.is_cancelling or not model.is_ended
        assert self.wait(self.registry.request_cancel(job)).is_cancel_requested == model.is_cancelling

    @rule(job=jobs, count=st.integers(0, 3))
    def append(self, job: str, count: int) -> None:
        model = self.models[job]
        assert self.wait(self.registry.append(job, [told("x")] * count)) is not model.is_ended
        model.events += 0 if model.is_ended else count

    @rule(job=consumes(jobs))
    def update(self, job: str) -> None:
        model = self.models[job]
        self.wait(self.registry.update(job, message="m", events=[told("x")]))
        model.events += not model.is_ended

    @rule(by_s=STEPS)
    def step_the_clock(self, by_s: float) -> None:
        self.now_s += by_s

    @rule()
    def open_again(self) -> None:
        self.wait(self.registry.close())
        self.registry = self.wait(self.opened())

    @rule(job=jobs, count=st.integers(1, 6), heard=st.integers(0, 6), ends=st.booleans())
    def crash_in_the_middle_of_writes(self, job: str, count: int, heard: int, ends: bool) -> None:
        """What was acknowledged is there afterwards; of the rest a beginning, each write whole or not at all."""
        model = self.models[job]
        if model.is_ended:
            return
        acknowledged = self.wait(self.written_until_the_crash(job, count, min(heard, count + ends), ends))
        self.registry = self.wait(self.opened())
        view = self.wait(self.registry.view(job))
        is_over = view.state is JobState.FAILED
        there = count if is_over else (view.last_seq - model.events) // 2
        assert (view.last_seq - model.events) == there * 2 + is_over * 2
        assert acknowledged <= there + is_over <= count + ends
        model.events = view.last_seq
        if is_over:
            model.state, model.ended_at = JobState.FAILED, self.now_s

    async def written_until_the_crash(self, job: str, count: int, heard: int, ends: bool) -> int:
        """Ask for writes all at once; when some are acknowledged, go on with a copy of the files as they are."""
        registry = self.registry
        calls: list[Awaitable[Any]] = [registry.append(job, [told("x"), told("y")]) for _ in range(count)]
        if ends:
            calls.append(end(registry, job, JobState.FAILED, events=[told("closing")]))
        tasks = [asyncio.ensure_future(call) for call in calls]
        for task in tasks[:heard]:
            await task
        before, self.path = self.path, next(self.homes)
        with contextlib.closing(sqlite3.connect(before)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM meta").fetchall()  # so that nobody empties the one file meanwhile
            for suffix in ("", "-wal"):
                if (file := before.with_name(before.name + suffix)).exists():
                    shutil.copyfile(file, self.path.with_name(self.path.name + suffix))
        await asyncio.gather(*tasks)
        await registry.close()
        return heard

    def refused(self, call: Awaitable[Any]) -> None:
        try:
            self.wait(call)
        except ConflictError:
            return
        raise AssertionError("it was not refused")

    @invariant()
    def agrees(self) -> None:
        for job, model in self.models.items():
            view = self.wait(self.registry.view(job))
            assert (view.state, view.attempt, view.last_seq) == (model.state, model.attempt, model.events)
            assert self.wait(self.registry.get(job)).owner == model.owner
            times = [time and time.timestamp() for time in (view.created_at, view.started_at, view.ended_at)]
            assert times == [model.created_at, model.started_at, model.ended_at]
            if model.is_ended and not model.store:
                self.gone(job)
                continue
            events = [json.loads(event) for event in self.wait(whole_log(self.registry, job))]
            assert [event["seq"] for event in events] == list(range(1, model.events + 1))
            assert [event["kind"] for event in events].count("end") == model.is_ended
            assert (events[-1]["kind"] == "end") == model.is_ended

    def gone(self, job: str) -> None:
        try:
            self.wait(self.registry.read(job, 0))
        except GoneError:
            return
        raise AssertionError("it was not erased")

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.wait(self.registry.close())
        self.runner.close()
        self.directory.cleanup()


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
