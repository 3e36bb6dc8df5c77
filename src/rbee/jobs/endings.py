"""How a job comes to its end, and how a fault of ours is kept under a number."""

from __future__ import annotations

import asyncio
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from msgspec import Struct

from rbee.contracts.events import Level
from rbee.contracts.states import JobState, Reason
from rbee.contracts.views import ErrorBody
from rbee.errors import (
    DeadlineExceededError,
    InternalError,
    QueueTimeoutError,
    RbeeError,
    StorageError,
    UnavailableError,
)
from rbee.jobs.records import JobRecord
from rbee.jobs.store import StoreClosedError
from rbee.narration.emit import compose

AGAIN_S = 1.0


class Stop(Struct, frozen=True):
    """Why a running job is to stop."""

    state: JobState
    reason: Reason
    message: str
    error: RbeeError | None = None


class Ending(Struct, frozen=True):
    """How a job ends; `word` closes its log's last sentence (`queen_complete`)."""

    state: JobState
    reason: Reason
    message: str
    word: str
    level: Level
    result: dict[str, Any] | None = None
    error: RbeeError | None = None


USER_STOP = Stop(JobState.CANCELLED, Reason.USER, "Cancelled by the caller.")


def failing(error: RbeeError) -> Stop:
    """Stop a job that an error, such as a deadline, ends from outside."""
    return Stop(JobState.FAILED, Reason(error.reason), error.message, error)


def timeout_of(record: JobRecord) -> Stop:
    """Stop a job whose time is over."""
    allowed_s = (record.deadline_at or record.created_at) - record.created_at
    return failing(DeadlineExceededError(f"The job did not end within its {allowed_s:g} s."))


def queue_timeout_of(record: JobRecord) -> Stop:
    """Stop a job that has waited for too long."""
    allowed_s = (record.queue_deadline_at or record.created_at) - record.created_at
    return failing(QueueTimeoutError(f"The job still waited for its place after {allowed_s:g} s."))


def completed(result: dict[str, Any] | None) -> Ending:
    """End with a result."""
    return Ending(JobState.COMPLETED, Reason.OK, "The job is complete.", "complete", "info", result=result)


def stopped(stop: Stop) -> Ending:
    """End as a stop says."""
    is_cancel = stop.state is JobState.CANCELLED
    word = "cancelled" if is_cancel else "failed"
    return Ending(
        stop.state, stop.reason, stop.message, word, "warning" if is_cancel else "error", error=stop.error
    )


def failed(error: RbeeError) -> Ending:
    """End with an error; where it is not of this house, its code tells more than the reason does."""
    reason = Reason(error.reason) if error.reason in Reason.__members__.values() else Reason.INTERNAL
    return Ending(JobState.FAILED, reason, error.message, "failed", "error", error=error)


def incident(error: BaseException, where: str = "a job") -> InternalError:
    """Keep a fault of ours on stderr under a number, and return the error that tells the number."""
    number = uuid.uuid4().hex[:12]
    print(f"incident {number} in {where}:", file=sys.stderr)  # noqa: T201  # the program's own fault log
    traceback.print_exception(error)
    return InternalError(
        f"Something went wrong inside rbee ({type(error).__name__}, incident {number}).",
        remedy=f"Report it with the lines behind 'incident {number}' in the server's log.",
    )


def closing_line(ending: Ending, speaker: str, **fields: Any) -> bytes:
    """Compose the last sentence of a job's log, `<speaker>_complete` and the like, in the scope of this moment."""
    if ending.error is not None:
        fields["code"] = ending.error.code
    return compose(f"{speaker}_{ending.word}", ending.message, level=ending.level, **fields)


def error_body(error: RbeeError) -> ErrorBody:
    """Show an error as servers answer it and logs keep it."""
    known = {
        key: error.details[key]
        for key in ("worker_id", "exit_code", "signal", "last_lines")
        if error.details.get(key) is not None
    }
    return ErrorBody(
        message=error.message,
        type=error.type,
        code=error.code,
        param=error.param,
        retryable=error.retryable,
        remedy=error.remedy,
        **known,
    )


async def until_written(job_id: str, write: Callable[[], Awaitable[object]]) -> None:
    """Write how a job ends, again every `AGAIN_S` while the registry cannot take it; told once, on stderr.

    Raises:
        StoreClosedError: The registry is closed.
        RbeeError: What it refuses for another reason.
    """
    is_told = False
    while True:
        try:
            await write()
            return
        except StoreClosedError:
            raise
        except (StorageError, UnavailableError) as error:
            if not is_told:
                print(f"{job_id} cannot be ended yet: {error}", file=sys.stderr)  # noqa: T201
                is_told = True
        await asyncio.sleep(AGAIN_S)
