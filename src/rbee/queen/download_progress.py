"""How far the download is that a job asked for: read off what its hive narrates, shown with the job."""

from __future__ import annotations

import msgspec

from rbee.contracts.events import SourceLine
from rbee.contracts.operations import ModelDownload, operation_name
from rbee.contracts.views import Progress
from rbee.errors import GoneError, NotFoundError, StorageError, UnavailableError
from rbee.jobs import JobRegistry
from rbee.jobs.records import Changed, JobRecord

_DOWNLOAD = operation_name(ModelDownload)


def progress_of(line: SourceLine) -> Progress | None:
    """Return how far a line says that a download is; None where it says nothing of it."""
    done, total = line.fields.get("done_bytes"), line.fields.get("total_bytes")
    if line.job_id is None or line.action != "model_download" or not isinstance(done, int):
        return None
    return Progress(done=done, total=total if isinstance(total, int) else None, unit="bytes")


async def note_progress(registry: JobRegistry, job_id: str, progress: Progress) -> None:
    """Keep with a download's job how far it is; a job of another kind, or that has ended, stays as it is.

    What a disk does not take now is made up for by the next line that tells how far it is.
    """

    def decide(record: JobRecord) -> Changed:
        if record.is_ended or record.operation != _DOWNLOAD:
            return Changed(record, [])
        return Changed(msgspec.structs.replace(record, progress=progress), [])

    try:
        await registry.store.change(job_id, decide)
    except (NotFoundError, GoneError, StorageError, UnavailableError):
        pass  # the line itself is in the log
