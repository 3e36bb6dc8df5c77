"""The clients of a queen: submit a job, follow its log across any interruption, look around.

`JobClient` is for programs with an event loop, `SyncJobClient` for all others; both have the same methods.
"""

from rbee.client.follow import LogFollower
from rbee.client.job_client import JobClient
from rbee.client.sync_client import SyncJobClient

__all__ = ["JobClient", "LogFollower", "SyncJobClient"]
