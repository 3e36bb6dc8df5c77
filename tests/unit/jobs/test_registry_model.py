"""The registry against a dictionary: whatever is asked of both, in any order, they agree."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from rbee.contracts.states import TERMINAL_STATES, JobState
from rbee.errors import ConflictError, GoneError
from rbee.jobs import Fence, JobRegistry
from tests.unit.jobs.job_stage import end, new_job, told, whole_log

T = TypeVar("T")


class Model:
    """What a job must look like."""

    def __init__(self, store: bool) -> None:
        self.state = JobState.QUEUED
        self.attempt = 0
        self.is_cancelling = False
        self.store = store
        self.events = 1

    @property
    def is_ended(self) -> bool:
        return self.state in TERMINAL_STATES


class RegistryMachine(RuleBasedStateMachine):
    jobs: Bundle[str] = Bundle("jobs")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = tempfile.TemporaryDirectory()
        self.models: dict[str, Model] = {}

    def wait(self, call: Awaitable[T]) -> T:
        async def waiting() -> T:
            return await call

        return self.runner.run(waiting())

    async def opened(self) -> JobRegistry:
        return JobRegistry.open(Path(self.directory.name) / "jobs.db")

    @initialize()
    def begin(self) -> None:
        self.registry = self.wait(self.opened())

    @rule(target=jobs, store=st.booleans())
    def create(self, store: bool) -> str:
        record = self.wait(new_job(self.registry, store=store))
        self.models[record.job_id] = Model(store)
        return record.job_id

    @rule(job=jobs)
    def start(self, job: str) -> None:
        model = self.models[job]
        if model.is_ended or model.is_cancelling:
            self.refused(self.registry.start(job, owner="boot"))
            return
        model.state, model.attempt, model.events = JobState.RUNNING, model.attempt + 1, model.events + 1
        assert self.wait(self.registry.start(job, owner="boot")).attempt == model.attempt

    @rule(job=jobs, to=st.sampled_from(sorted(TERMINAL_STATES)), behind=st.integers(0, 1), fenced=st.booleans())
    def end(self, job: str, to: JobState, behind: int, fenced: bool) -> None:
        model = self.models[job]
        fence = Fence("boot", model.attempt - behind) if fenced and model.attempt else None
        call = end(self.registry, job, to, fence=fence, events=[told("closing")])
        is_early = model.state is JobState.QUEUED and to is JobState.COMPLETED
        if model.is_ended or is_early or (fence is not None and behind):
            self.refused(call)
            return
        model.state, model.events = to, model.events + 2
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

    @rule()
    def open_again(self) -> None:
        self.wait(self.registry.close())
        self.registry = self.wait(self.opened())

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
