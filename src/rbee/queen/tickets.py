"""Jobs that wait for their place, and the workers that are being started for them."""

from __future__ import annotations

import asyncio
import math

from rbee.contracts.heartbeats import Purpose
from rbee.contracts.ids import new_id
from rbee.contracts.states import Phase
from rbee.errors import RbeeError
from rbee.jobs import RunningJob
from rbee.queen.scheduler import Start, Wait
from rbee.queen.workers import Placement


class Ticket:
    """One job that waits for its place.

    Attributes:
        key: Its turn: by priority, then those that were placed before, then in order of arrival.
        placement: Its place, once it has one.
        why: Why that one.
        wait: What it waits for.
        starting: The start that it waits for.
        error: What that start failed with.
        told: What its log was told last about its wait.
        told_at: Loop time of that.
    """

    def __init__(self, job: RunningJob, model: str, purpose: Purpose = "generate") -> None:
        self.job = job
        self.model = model
        self.purpose = purpose
        self.key = (-job.record.priority, job.record.attempt == 0, job.job_id)
        self.placement: Placement | None = None
        self.why = ""
        self.wait: Wait | None = None
        self.starting: Starting | None = None
        self.error: RbeeError | None = None
        self.told = ""
        self.told_at = -math.inf
        self.changed = asyncio.Event()

    @property
    def is_waiting(self) -> bool:
        """Tell whether it is still to be decided about."""
        return self.placement is None and self.error is None


class Starting:
    """A worker that is being started for `owner`, and all the jobs that wait for it.

    Attributes:
        worker_id: The worker.
        task: Does it; None until the owner's log says so.
    """

    def __init__(self, decision: Start, owner: Ticket) -> None:
        self.decision = decision
        self.owner = owner
        self.tickets = [owner]
        self.worker_id = new_id("worker")
        self.task: asyncio.Task[None] | None = None

    @property
    def key(self) -> tuple[str, str, Purpose]:
        """Hive, model and purpose."""
        return self.decision.hive_id, self.owner.model, self.owner.purpose

    def say(self, phase: Phase) -> None:
        """Take note of how far it is, for the jobs that wait."""
        for ticket in self.tickets:
            ticket.job.wanted_phase = phase
            ticket.changed.set()

    def waiting(self) -> list[str]:
        """Return the jobs that wait."""
        return [ticket.job.job_id for ticket in self.tickets]
