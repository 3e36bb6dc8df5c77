"""Telling the jobs that wait what they wait for, and how many go first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rbee.contracts.states import JobState
from rbee.errors import StorageError, UnavailableError
from rbee.jobs.runner import narration_event
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.queen.decisions import Wait
from rbee.queen.tickets import Ticket

TELL_EVERY_S = 1.0


class Turns:
    """Knows whose turn it is when.

    A job is told when it begins to wait, and then whatever has changed, once a second, together with all others:
    what they are told shares a commit.

    Args:
        tickets: The jobs that wait, and some that no longer do, in their order; whoever changes the list owns it.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    async def run(self) -> None:
        """Tell what has changed until cancelled."""
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            await self._tell_changes()

    async def _tell_changes(self) -> None:
        just_told = asyncio.get_running_loop().time() - TELL_EVERY_S
        positions = self.positions()
        async with asyncio.TaskGroup() as group:
            for ticket in self._tickets:
                position = positions.get(ticket.job.job_id)
                if ticket.told and ticket.told_at <= just_told and _has_news(ticket, position):
                    group.create_task(self._tell(ticket, position))

    async def tell(self, ticket: Ticket) -> None:
        """Tell one job now."""
        await self._tell(ticket, self.positions().get(ticket.job.job_id))

    def positions(self) -> Mapping[str, int]:
        """Return the turn of each job that is queued, 1 for the next; the same as `queue_position` of its view."""
        queued = (
            ticket.job.job_id
            for ticket in self._tickets
            if ticket.is_waiting and ticket.job.record.state is JobState.QUEUED
        )
        return {job_id: position for position, job_id in enumerate(queued, 1)}

    async def _tell(self, ticket: Ticket, position: int | None) -> None:
        wait, before = ticket.wait, ticket.told
        if wait is None or not _has_news(ticket, position):  # it was placed meanwhile
            return
        ticket.told, ticket.told_at = subject(wait, position), asyncio.get_running_loop().time()
        record = ticket.job.record
        fields: dict[str, Any] = {} if position is None else {"queue_position": position}
        try:
            message = sentence(ticket.model, wait, position)
            with scope(job_id=record.job_id, correlation_id=record.correlation_id, model=record.model):
                line = compose("queen_wait", message, **fields)
            await ticket.job.update(message=message, events=[narration_event(line)])
            emit(line)
        except (StorageError, UnavailableError):  # it waits on all the same, and is told at the next look
            ticket.told = before


def _has_news(ticket: Ticket, position: int | None) -> bool:
    """Tell whether a job waits for something else than it was told last."""
    return ticket.is_waiting and ticket.wait is not None and subject(ticket.wait, position) != ticket.told


def sentence(model: str, wait: Wait, position: int | None) -> str:
    """Say what a job waits for, or how many go first."""
    if position is None or wait.needs_hive:
        return f"Waiting for {model}: {wait.why}."
    if position == 1:
        return f"Waiting for {model}: this job is next; {wait.why}."
    if position == 2:
        return f"Waiting for {model}: 1 job goes first."
    return f"Waiting for {model}: {position - 1} jobs go first."


def subject(wait: Wait, position: int | None) -> str:
    """Return what of a wait is worth telling again when it changes.

    How long a hive has been silent, or how much memory is free, is not: it changes all the time.
    """
    return "a hive" if wait.needs_hive else str(position)
