"""How far a download is, kept with its job."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from rbee.contracts.operations import ModelDownload
from rbee.contracts.views import Progress
from rbee.errors import StorageError
from rbee.jobs import JobRegistry
from rbee.queen.download_progress import note_progress


async def test_disk_that_fails_costs_a_download_nothing_but_how_far_it_is(tmp_path: Path) -> None:
    """The line is in the log already: whoever brought it is not told of a failure, and the next one is kept."""
    registry = JobRegistry.open(tmp_path / "jobs.db")
    job_id = (await registry.create(ModelDownload(model="m"))).job_id
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, limits[1]))
    try:
        with pytest.raises(StorageError):
            await registry.update(job_id, message="x")
        await note_progress(registry, job_id, Progress(done=1, total=2, unit="bytes"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (await registry.view(job_id)).progress is None
    await note_progress(registry, job_id, Progress(done=2, total=2, unit="bytes"))
    assert (await registry.view(job_id)).progress == Progress(done=2, total=2, unit="bytes")
    await registry.close()
