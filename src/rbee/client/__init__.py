"""The client of a queen: submit a job, follow its log across any interruption, look around."""

from rbee.client.follow import LogFollower
from rbee.client.job_client import JobClient

__all__ = ["JobClient", "LogFollower"]
