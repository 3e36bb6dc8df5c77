"""Attempts that ended without an answer, and how a log is told who goes on with it."""

from __future__ import annotations

from msgspec import Struct

from rbee.contracts.operations import purpose_of
from rbee.errors import HiveLostError, RbeeError, WorkerError, WorkerLostError
from rbee.jobs import RunningJob
from rbee.narration.emit import compose
from rbee.queen.dispatch import Dispatcher, SayPlaced
from rbee.queen.said import Said
from rbee.queen.workers import Placement

# What another worker may do better: this one died or went away, or could not be started.
LOST = (WorkerLostError, HiveLostError)
NOT_STARTED = (WorkerError, HiveLostError)


class Loss(Struct, frozen=True):
    """How an attempt ended without an answer; `worker_id` is who was lost, None when none could be started."""

    error: RbeeError
    worker_id: str | None = None


def raise_if_nowhere_else(job: RunningJob, loss: Loss, dispatcher: Dispatcher) -> None:
    """Raise a lost hive whose job no other hive can take; its return was waited for as long as that may take."""
    is_away = isinstance(loss.error, HiveLostError)
    purpose = purpose_of(job.operation)
    if is_away and not dispatcher.can_move(job.record.model or "", job.record.hive_id or "", purpose):
        raise loss.error


def seam(said: Said, loss: Loss | None) -> SayPlaced:
    """Tell, with the next placement, who goes on with an answer that has begun."""

    def say(placement: Placement) -> list[bytes]:
        if loss is None or not said.text:
            return []
        tokens = said.all_tokens
        return [
            compose(
                "queen_continue",
                f"{placement.worker_id} goes on with the answer after {tokens} tokens. {loss.error.message}",
                worker_id=placement.worker_id,
                attempt=placement.attempt,
                after_tokens=tokens,
                lost_worker_id=loss.worker_id,
            )
        ]

    return say
