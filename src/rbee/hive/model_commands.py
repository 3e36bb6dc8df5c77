"""What a hive does about models: fetch them, telling how far that is, and remove them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from rbee.contracts.heartbeats import DownloadInfo
from rbee.contracts.operations import ModelDelete, ModelDownload
from rbee.hive.models import ModelStore
from rbee.jobs import RunningJob
from rbee.narration import narrate, scope

PROGRESS_EVERY_S = 0.25


class ModelCommands:
    """Runs the commands about models. One event loop owns it.

    Args:
        models: The models of this hive.
        on_change: Called when a heartbeat has something new to tell.
    """

    def __init__(self, models: ModelStore, on_change: Callable[[], None]) -> None:
        self._models = models
        self._on_change = on_change
        self._under_way: dict[str, DownloadInfo] = {}

    def downloads(self) -> list[DownloadInfo]:
        """Return what is being fetched just now, one for each model."""
        return list({info.model: info for info in self._under_way.values()}.values())

    async def model_download(self, job: RunningJob) -> dict[str, Any]:
        """Bring a model to this machine, telling how far it is."""
        assert isinstance(job.operation, ModelDownload)
        ref = job.operation.model
        with scope(model=ref):
            is_new = self._models.find(ref) is None
            if is_new:
                narrate("model_download", f"Downloading {ref}.", hive_job_id=job.job_id, done_bytes=0)
                self._under_way[job.job_id] = DownloadInfo(model=ref, done_bytes=0, total_bytes=None)
                self._on_change()
            telling = asyncio.ensure_future(self._tell(job, ref))
            try:
                model = await self._models.pull(ref, lambda *done: self._note(job.job_id, ref, *done))
            finally:
                self._under_way.pop(job.job_id, None)
                self._on_change()
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)
            size_mb = model.size_bytes / 1e6
            is_checked = ", its digest checked" if model.sha256 is not None else ""
            outcome = "is here" if is_new else "was here already"
            narrate(
                "model_download",
                f"{ref} {outcome} ({size_mb:.0f} MB){is_checked}.",
                hive_job_id=job.job_id,
                done_bytes=model.size_bytes,
                total_bytes=model.size_bytes,
                is_done=True,
            )
        return {"model": ref, "bytes": model.size_bytes, "sha256": model.sha256}

    def _note(self, job_id: str, ref: str, done_bytes: int, total_bytes: int | None) -> None:
        self._under_way[job_id] = DownloadInfo(model=ref, done_bytes=done_bytes, total_bytes=total_bytes)

    async def _tell(self, job: RunningJob, ref: str) -> None:
        """Say how far a download is whenever it has moved, at most four times a second, until cancelled."""
        told = self._under_way.get(job.job_id)
        while True:
            await asyncio.sleep(PROGRESS_EVERY_S)
            info = self._under_way.get(job.job_id)
            if info is None or info == told:
                continue
            told, done, total = info, info.done_bytes, info.total_bytes
            share = f" of {total / 1e6:.0f}" if total else ""
            narrate(
                "model_download",
                f"{done / 1e6:.0f}{share} MB of {ref}.",
                hive_job_id=job.job_id,
                done_bytes=done,
                total_bytes=total,
            )

    async def model_delete(self, job: RunningJob) -> dict[str, Any]:
        """Remove a model's file from this machine."""
        assert isinstance(job.operation, ModelDelete)
        ref = job.operation.model
        freed_bytes = 0
        if self._models.has_any_of(ref) or not job.is_resumed:
            freed_bytes = await self._models.remove(ref)
        with scope(model=ref):
            narrate("hive_model_removed", f"Removed {ref} ({freed_bytes / 1e6:.0f} MB).", freed_bytes=freed_bytes)
        self._on_change()
        return {"model": ref, "bytes": freed_bytes}
