"""Objects of the Responses API: which job each is, and what is told of it before its engine has. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rbee.contracts.ids import is_id
from rbee.contracts.states import JobState
from rbee.errors import NotFoundError
from rbee.jobs.records import JobRecord

_PREFIX = "resp_"
_REPEATED = (
    "instructions",
    "max_output_tokens",
    "temperature",
    "top_p",
    "text",
    "reasoning",
    "truncation",
    "user",
)
_STATUS = {
    JobState.QUEUED: "queued",
    JobState.RUNNING: "in_progress",
    JobState.COMPLETED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


def response_id(job_id: str) -> str:
    """Return the id of the response that a job makes."""
    return _PREFIX + job_id.partition("-")[2]


def job_of(response: str) -> str:
    """Return the id of the job that makes a response.

    Raises:
        NotFoundError: It is no response's id of ours.
    """
    job_id = f"job-{response.removeprefix(_PREFIX)}"
    if not response.startswith(_PREFIX) or not is_id("job", job_id):
        raise NotFoundError(f"There is no response {response[:64]}.")
    return job_id


def status_of(record: JobRecord) -> str:
    """Return how far a response is, in the API's word."""
    return _STATUS[record.state]


def response_object(
    record: JobRecord, request: Mapping[str, Any], status: str, told: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Make a response as the API shows it; `told` is what its engine says of it."""
    error = None
    if record.error is not None:
        error = {"code": record.error.code, "message": record.error.message}
    return {
        "id": response_id(record.job_id),
        "object": "response",
        "created_at": int(record.created_at),
        "status": status,
        "background": request.get("background") is True,
        "error": error,
        "incomplete_details": None,
        "metadata": request.get("metadata") or {},
        "model": request.get("model") or record.model,
        "output": [],
        "parallel_tool_calls": request.get("parallel_tool_calls", True),
        "store": True,
        "tool_choice": request.get("tool_choice", "auto"),
        "tools": request.get("tools") or [],
        **{name: request[name] for name in _REPEATED if name in request},
        **(told or {}),
    }
