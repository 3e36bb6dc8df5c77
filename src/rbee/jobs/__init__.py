"""The job registry: durable jobs with guarded transitions, and a numbered log for each."""

from rbee.contracts.operations import Operation
from rbee.jobs.claim import ClaimedJob, LeaseLostError
from rbee.jobs.records import Fence, JobFilter, JobRecord
from rbee.jobs.registry import JobRegistry
from rbee.jobs.runner import JobRunner, RunningJob

__all__ = [
    "ClaimedJob",
    "Fence",
    "JobFilter",
    "JobRecord",
    "JobRegistry",
    "JobRunner",
    "LeaseLostError",
    "Operation",
    "RunningJob",
]
