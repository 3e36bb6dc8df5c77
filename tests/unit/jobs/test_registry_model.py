"""The registry against a dictionary: whatever is asked of both, in any order, they agree."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from rbee.contracts.events import encode_json
from rbee.contracts.operations import Operation, QueenCheck
from rbee.contracts.states import TERMINAL_STATES, JobState, Reason
from rbee.errors import ConflictError, GoneError
from rbee.jobs import Fence, JobRecord, JobRegistry
from rbee.jobs.claim import claimed
from rbee.jobs.lifecycle import released, renewed
from rbee.jobs.records import Changed
from rbee.jobs.sqlite_store import SqliteStore
from tests.unit.jobs.job_stage import end, told, whole_log

T = TypeVar("T")

BEGAN_S = 1_000_000_000.0
OWNERS = st.sampled_from(["this-boot", "that-boot"])
STEPS_S = st.sampled_from([-86_400.0, -3_600.0, -1.0, 0.25, 10.0, 31.0, 3_600.0, 86_400.0])
LEASES_S = st.sampled_from([0.5, 30.0, 7_200.0])
ATTEMPTS = st.integers(-1, 1)
"""By how much a caller is wrong about the attempt; late signals are those of an earlier one."""


class Model:
    """What a job must look like."""

    def __init__(self, operation: Operation, created_at: float) -> None:
        self.state = JobState.QUEUED
        self.reason: Reason | None = None
        self.attempt = 0
        self.attempts = operation.attempts
        self.priority = operation.priority
        self.owner: str | None = None
        self.is_cancelling = False
        self.store = operation.store
        self.events = 1
        self.created_at = created_at
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.deadline_at = operation.timeout_s and created_at + operation.timeout_s
        self.queue_deadline_at = operation.queue_timeout_s and created_at + operation.queue_timeout_s
        self.lease_until: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.state in TERMINAL_STATES

    def holds(self, fence: Fence | None) -> bool:
        return fence is None or (fence.owner, fence.attempt) == (self.owner, self.attempt)

    def run(self, owner: str, now_s: float, lease_until: float | None = None) -> None:
        self.state, self.attempt, self.events = JobState.RUNNING, self.attempt + 1, self.events + 1
        self.owner, self.started_at, self.lease_until = owner, self.started_at or now_s, lease_until

    def end(self, to: JobState, reason: Reason, now_s: float) -> None:
        self.state, self.reason, self.events = to, reason, self.events + 2
        self.ended_at, self.lease_until = now_s, None

    def overdue(self, now_s: float) -> tuple[JobState, Reason] | None:
        """Say how it ends instead of being begun."""
        is_queued = self.state is JobState.QUEUED
        if self.is_cancelling:
            return JobState.CANCELLED, Reason.USER
        if self.deadline_at and self.deadline_at <= now_s:
            return JobState.FAILED, Reason.TIMEOUT
        if is_queued and self.queue_deadline_at and self.queue_deadline_at <= now_s:
            return JobState.FAILED, Reason.QUEUE_TIMEOUT
        if not is_queued and self.attempt >= self.attempts:
            return JobState.FAILED, Reason.WORKER_LOST
        return None


class RegistryMachine(RuleBasedStateMachine):
    """Two programs on one file; `registry` is the one that is asked next."""

    jobs: Bundle[str] = Bundle("jobs")
    steps_made: ClassVar[int] = 0

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

    async def opened(self) -> tuple[JobRegistry, JobRegistry]:
        one, other = (JobRegistry(SqliteStore(self.path), clock=lambda: self.now_s) for _ in range(2))
        return one, other

    async def closed(self) -> None:
        await self.registry.close()
        await self.other.close()

    @initialize()
    def begin(self) -> None:
        self.registry, self.other = self.wait(self.opened())

    @rule(
        target=jobs,
        operation=st.builds(
            QueenCheck,
            store=st.booleans(),
            lines=st.integers(1, 2),
            priority=st.integers(-1, 1),
            attempts=st.integers(1, 3),
            timeout_s=st.none() | st.just(60.0),
            queue_timeout_s=st.none() | st.just(20.0),
        ),
        key=st.none() | st.sampled_from("ab"),
    )
    def create(self, operation: QueenCheck, key: str | None) -> str:
        call = self.registry.create(
            operation, correlation_id="c-1", idempotency_key=key and f"{key}{encode_json(operation).decode()}"
        )
        record = self.wait(call)
        before = self.keys.get(record.idempotency_key or "")
        assert record.job_id == (before or record.job_id), "one key made two jobs"
        if before is None:
            self.keys[record.idempotency_key or record.job_id] = record.job_id
            self.models[record.job_id] = Model(operation, self.now_s)
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
        model.run(owner, self.now_s)
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

    @rule(owner=OWNERS, limit=st.integers(1, 4), lease_s=LEASES_S)
    def claim(self, owner: str, limit: int, lease_s: float) -> None:
        now_s = self.now_s

        def decide(record: JobRecord) -> Changed:
            return claimed(record, owner=owner, now=now_s, lease_s=lease_s, name="worker")

        turns = self.wait(self.registry.store.claim(["queen_check"], now_s, limit, decide))
        assert [record.job_id for record, _ in turns] == self.begun_by_turn(owner, limit, lease_s)
        for record, request in turns:
            assert self.registry.load(request) == self.wait(self.registry.operation(record.job_id))

    def begun_by_turn(self, owner: str, limit: int, lease_s: float) -> list[str]:
        """Have the model's jobs begun, or ended, as it is their turn; returns those that are begun."""
        models = self.models.items()
        leased = [(model.lease_until, job) for job, model in models if model.lease_until is not None]
        queued = [(-model.priority, job) for job, model in models if model.state is JobState.QUEUED]
        in_turn = [job for until, job in sorted(leased) if until <= self.now_s] + [
            job for _, job in sorted(queued)
        ]
        begun: list[str] = []
        for job in in_turn:
            model = self.models[job]
            if len(begun) == limit:
                break
            if ending := model.overdue(self.now_s):
                model.end(*ending, self.now_s)
            else:
                model.run(owner, self.now_s, self.now_s + lease_s)
                begun.append(job)
        return begun

    @rule(job=jobs, owner=OWNERS, off=ATTEMPTS, lease_s=LEASES_S)
    def renew(self, job: str, owner: str, off: int, lease_s: float) -> None:
        model = self.models[job]
        fence, until = Fence(owner, model.attempt + off), self.now_s + lease_s
        call = self.registry.store.change(job, lambda record: renewed(record, fence, until))
        if model.state is not JobState.RUNNING or not model.holds(fence):
            self.refused(call)
            return
        self.wait(call)
        model.lease_until = until

    @rule(job=jobs, owner=OWNERS, off=ATTEMPTS, wait_s=st.sampled_from([0.0, 50.0]))
    def release(self, job: str, owner: str, off: int, wait_s: float) -> None:
        """Give it back (at once), or have it begun again after a while."""
        model = self.models[job]
        fence, until = Fence(owner, model.attempt + off), self.now_s + wait_s

        def decide(record: JobRecord) -> Changed:
            return released(record, fence, until, is_counted=wait_s > 0, events=[told("released")])

        call = self.registry.store.change(job, decide)
        if model.state is not JobState.RUNNING or not model.holds(fence):
            self.refused(call)
            return
        self.wait(call)
        model.owner, model.lease_until, model.events = None, until, model.events + 1
        model.attempts += wait_s == 0

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
        model.end(to, Reason.OK, self.now_s)
        assert self.wait(call).state is to

    @rule(job=jobs)
    def cancel(self, job: str) -> None:
        model = self.models[job]
        if model.state is JobState.QUEUED:
            model.end(JobState.CANCELLED, Reason.USER, self.now_s)
        elif model.state is JobState.RUNNING:
            model.is_cancelling = True
        assert self.wait(self.registry.cancel(job)).state is model.state

    @rule(job=jobs)
    def request_cancel(self, job: str) -> None:
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

    @rule(job=jobs, after=st.integers(0, 12), limit=st.integers(1, 5))
    def read_from_anywhere(self, job: str, after: int, limit: int) -> None:
        model = self.models[job]
        if model.is_ended and not model.store:
            return
        page = self.wait(self.registry.read(job, after, limit))
        assert page.events == self.wait(whole_log(self.registry, job))[after : after + limit]
        assert (page.head.first_seq, page.head.last_seq) == (1, model.events)

    @rule(by_s=STEPS_S)
    def step_the_clock(self, by_s: float) -> None:
        self.now_s += by_s

    @rule()
    def let_the_other_program_go_on(self) -> None:
        self.registry, self.other = self.other, self.registry

    @rule()
    def open_again(self) -> None:
        self.wait(self.closed())
        self.registry, self.other = self.wait(self.opened())

    @rule(job=jobs, count=st.integers(1, 6), heard=st.integers(0, 6), ends=st.booleans())
    def crash_in_the_middle_of_writes(self, job: str, count: int, heard: int, ends: bool) -> None:
        """What was acknowledged is there afterwards; of the rest a beginning, each write whole or not at all."""
        model = self.models[job]
        if model.is_ended:
            return
        acknowledged = self.wait(self.written_until_the_crash(job, count, min(heard, count + ends), ends))
        self.registry, self.other = self.wait(self.opened())
        view = self.wait(self.registry.view(job))
        is_over = view.state is JobState.FAILED
        there = count if is_over else (view.last_seq - model.events) // 2
        assert (view.last_seq - model.events) == there * 2 + is_over * 2
        assert acknowledged <= there + is_over <= count + ends
        if is_over:
            model.end(JobState.FAILED, Reason.OK, self.now_s)
        model.events = view.last_seq

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
        await self.closed()
        return heard

    def refused(self, call: Awaitable[Any]) -> None:
        try:
            self.wait(call)
        except ConflictError:
            return
        raise AssertionError("it was not refused")

    @invariant()
    def agrees(self) -> None:
        type(self).steps_made += 1
        states = Counter(model.state for model in self.models.values())
        assert self.wait(self.registry.store.counts()) == dict.fromkeys(JobState, 0) | states
        for job, model in self.models.items():
            view = self.wait(self.registry.view(job))
            assert (view.state, view.reason, view.attempt) == (model.state, model.reason, model.attempt)
            assert (view.last_seq, view.queue_position) == (model.events, self.position(job))
            record = self.wait(self.registry.get(job))
            assert (record.owner, record.lease_until) == (model.owner, model.lease_until)
            assert (record.attempts, record.is_cancel_requested) == (model.attempts, model.is_cancelling)
            times = [time and time.timestamp() for time in (view.created_at, view.started_at, view.ended_at)]
            assert times == [model.created_at, model.started_at, model.ended_at]
            if model.is_ended and not model.store:
                self.gone(job)
                continue
            events = [json.loads(event) for event in self.wait(whole_log(self.registry, job))]
            assert [event["seq"] for event in events] == list(range(1, model.events + 1))
            assert [event["kind"] for event in events].count("end") == model.is_ended
            assert (events[-1]["kind"] == "end") == model.is_ended

    def position(self, job: str) -> int | None:
        """Return how many queued jobs go before this queued one, plus 1."""
        models = self.models.items()
        queued = sorted((-each.priority, name) for name, each in models if each.state is JobState.QUEUED)
        names = [name for _, name in queued]
        return names.index(job) + 1 if job in names else None

    def gone(self, job: str) -> None:
        try:
            self.wait(self.registry.read(job, 0))
        except GoneError:
            return
        raise AssertionError("it was not erased")

    def teardown(self) -> None:
        if hasattr(self, "registry"):
            self.wait(self.closed())
        self.runner.close()
        self.directory.cleanup()


TestRegistryMachine = RegistryMachine.TestCase
TestRegistryMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
