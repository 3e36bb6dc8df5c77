"""Jobs that wait for their place, and the workers that are being started for them."""

from __future__ import annotations

import asyncio
import math

from rbee.contracts.ids import new_id
from rbee.contracts.states import Phase
from rbee.errors import RbeeError
from rbee.jobs import RunningJob
from rbee.jobs.records import JobRecord
from rbee.queen.decisions import Start, Wait, Wanted
from rbee.queen.workers import Placement

PRIORITY_STEP_S = 60.0
"""A step of priority goes before what came up to so many seconds earlier: so nobody is passed for more than the
20 minutes between the lowest and the highest."""


def turn_of(record: JobRecord) -> tuple[float, str]:
    """Return what jobs are ordered by: their arrival, each step of priority a minute earlier."""
    return record.created_at - PRIORITY_STEP_S * record.priority, record.job_id


class Ticket:
    """One job that waits for its place.

    Attributes:
        wanted: What it needs.
        since: When it began to wait.
        key: Its turn.
        placement: Its place, once it has one.
        why: Why that one.
        wait: What it waits for.
        starting: The start that it waits for.
        made_room: What was stopped for it, or which hive had no room after all.
        refusals: How often one had none.
        error: What that start failed with.
        told: What its log was told last about its wait.
        told_at: Loop time of that.
    """

    def __init__(self, job: RunningJob, wanted: Wanted, since: float) -> None:
        self.job = job
        self.wanted = wanted
        self.since = since
        self.key = turn_of(job.record)
        self.placement: Placement | None = None
        self.why = ""
        self.wait: Wait | None = None
        self.starting: Starting | None = None
        self.made_room = ""
        self.refusals = 0
        self.error: RbeeError | None = None
        self.told = ""
        self.told_at = -math.inf
        self.changed = asyncio.Event()

    @property
    def model(self) -> str:
        """The model's reference."""
        return self.wanted.model

    @property
    def is_waiting(self) -> bool:
        """Tell whether it is still to be decided about."""
        return self.placement is None and self.error is None


class Starting:
    """A worker that is being started for `owner`, and all the jobs that wait for it.

    Where other workers have to go first, all it does is to make room: then it is decided anew.

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
    def model(self) -> str:
        """The model's reference."""
        return self.owner.model

    def say(self, phase: Phase) -> None:
        """Take note of how far it is, for the jobs that wait."""
        for ticket in self.tickets:
            ticket.job.wanted_phase = phase
            ticket.changed.set()

    def waiting(self) -> list[str]:
        """Return the jobs that wait."""
        return [ticket.job.job_id for ticket in self.tickets]
