"""The closing line: `worker_inference`, said exactly once for each request, whatever ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Literal

from rbee.contracts.events import Level
from rbee.errors import RbeeError, WorkerLostError
from rbee.narration import scope
from rbee.narration.emit import compose, emit
from rbee.worker.calls import Call
from rbee.worker.engine_errors import narrated_message
from rbee.worker.tally import Tally

AGAIN_S = 0.5

Outcome = Literal["completed", "failed", "cancelled"]


class StopCause(StrEnum):
    """Who ended a request early."""

    CALLER = "caller"
    REQUEST = "request"
    SHUTDOWN = "shutdown"


class Closing:
    """Says how one request ended; whatever is said after the first time is dropped.

    Where it cannot be written, for the disk is full, it is said again until it stands.

    Attributes:
        asked: The request's body, of which nothing is repeated; empty until it was read.
    """

    def __init__(self, call: Call, tally: Tally) -> None:
        """Take whose end it is and what was counted for it."""
        self.call = call
        self.tally = tally
        self.asked: Mapping[str, Any] = {}
        self.is_said = False

    def completed(self) -> None:
        """Say that the answer is whole."""
        self._say("completed", _completed_sentence(self.tally))

    def failed(self, error: RbeeError) -> None:
        """Say why there is no whole answer."""
        message = narrated_message(error, self.asked)
        told = {
            "code": error.code,
            "type": error.type,
            "message": message,
            "retryable": error.retryable,
            "remedy": error.remedy,
            "reason": error.reason,
        }
        self._say("failed", f"The request failed: {message}", level="error", error=told)

    def stopped(self, cause: StopCause) -> None:
        """Say that the request was ended early."""
        if cause is StopCause.SHUTDOWN:
            self.failed(stopped_worker())
            return
        who = "its caller left" if cause is StopCause.CALLER else "it was cancelled"
        self._say("cancelled", f"Stopped answering, for {who}.")

    def _say(self, outcome: Outcome, message: str, *, level: Level = "info", **more: Any) -> None:
        if self.is_said:
            return
        self.is_said = True
        call = self.call
        with scope(job_id=call.job_id, correlation_id=call.correlation_id):
            line = compose(
                "worker_inference",
                message,
                level=level,
                attempt=call.attempt,
                request_id=call.request_id,
                outcome=outcome,
                **self.tally.fields(),
                **more,
            )
        _emit_surely(line)


def _emit_surely(line: bytes) -> None:
    if not emit(line):
        asyncio.get_running_loop().call_later(AGAIN_S, _emit_surely, line)


def stopped_worker() -> RbeeError:
    """Make the error of a request whose worker was stopped first; sent again, it goes to another."""
    return WorkerLostError("The worker was stopped while it had this request.")


def _completed_sentence(tally: Tally) -> str:
    tokens, rate = tally.completion_tokens, tally.tokens_per_s
    if tokens is None:
        return "Answered the request."
    made = f"Answered with {tokens} token{'' if tokens == 1 else 's'}"
    return f"{made} at {rate:.1f} tokens/s." if rate else f"{made}."
