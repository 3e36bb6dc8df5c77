"""A queen's parts over a registry in memory, and words for the lines that hives bring."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from rbee.contracts.heartbeats import Heartbeat, MachineInfo, ModelInfo, WorkerInfo
from rbee.contracts.ids import new_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import WorkerState
from rbee.jobs import JobRegistry
from rbee.queen.hives import HiveBook
from rbee.queen.ingest import Ingest
from rbee.queen.workers import Placement, WorkerBook

GIB = 2**30
MODEL = "smollm2:135m"


def narration(action: str = "worker_say", message: str = "Something", **fields: Any) -> bytes:
    """Return a narrated line."""
    said = {"v": 1, "kind": "narration", "ts": 5, "actor": "worker", "action": action, "message": message}
    return msgspec.json.encode({**said, **fields}) + b"\n"


def token(job_id: str, attempt: int = 1, text: str = "x", **fields: Any) -> bytes:
    """Return a line with a piece of an answer."""
    said = {"v": 1, "kind": "token", "ts": 5, "actor": "worker", "text": text, "tokens": 1, "channel": "answer"}
    return msgspec.json.encode({**said, "job_id": job_id, "attempt": attempt, **fields}) + b"\n"


def closing(job_id: str, attempt: int = 1, **fields: Any) -> bytes:
    """Return the line that closes an answer."""
    told = {"outcome": "completed", "finish_reason": "stop", "frames": 0, **fields}
    return narration("worker_inference", job_id=job_id, attempt=attempt, fields=told)


def worker_exit(worker_id: str, sources: dict[str, int], **fields: Any) -> bytes:
    """Return the line by which a hive tells how a worker ended."""
    told = {"exit_code": 1, "last_lines": ["the end"], **fields, "sources": sources}
    return narration("worker_exit", "The worker ended.", actor="hive", worker_id=worker_id, fields=told)


def stretch(source: str, offset: int, data: bytes) -> bytes:
    """Return one source's part of a batch."""
    header = {"source": source, "offset": offset, "bytes": len(data)}
    return msgspec.json.encode(header) + b"\n" + data


def heartbeat(
    *workers: WorkerInfo,
    url: str = "http://127.0.0.1:9",
    boot_id: str = "boot1",
    free: int = 8 * GIB,
    models: dict[str, int] | None = None,
    workers_max: int | None = None,
) -> Heartbeat:
    """Return a hive's heartbeat."""
    sizes = {MODEL: GIB} if models is None else models
    return Heartbeat(
        boot_id=boot_id,
        store_id="store",
        url=url,
        version="0",
        machine=MachineInfo(
            hostname="host",
            cpus=2,
            memory_bytes=16 * GIB,
            memory_free_bytes=free,
            disk_free_bytes=GIB,
        ),
        devices=[],
        models=[ModelInfo(model=model, size_bytes=size, path=f"/{model}") for model, size in sizes.items()],
        workers=list(workers),
        workers_max=workers_max,
    )


def worker_info(
    worker_id: str,
    *,
    model: str = MODEL,
    state: WorkerState = WorkerState.READY,
    url: str | None = "http://127.0.0.1:9",
    slots: int = 2,
) -> WorkerInfo:
    """Return what a hive says of a worker."""
    return WorkerInfo(
        worker_id=worker_id,
        model=model,
        state=state,
        url=url,
        token="secret",
        purpose="generate",
        slots=slots,
        slots_used=0,
        pid=1,
    )


class Parts:
    """A registry, and what the queen knows of workers; `gone` are the workers that were said to be gone."""

    def __init__(self, registry: JobRegistry) -> None:
        self.registry = registry
        self.gone: list[str] = []
        self.workers = WorkerBook(registry, self.gone.append)
        self.ingest = Ingest(registry, self.workers)
        self.book = HiveBook(stale_s=3, lost_s=15)
        self.hive_id = new_id("hive")
        self.boot = f"{self.hive_id}/boot1"

    async def job(self) -> str:
        """Accept a job."""
        return (await self.registry.create(QueenCheck(), correlation_id="c")).job_id

    async def worker(self, job_id: str | None = None, *, hive_id: str | None = None) -> str:
        """Commit a worker, started for a job."""
        worker_id = new_id("worker")
        started_for = job_id or await self.job()
        await self.workers.add(worker_id, hive_id or self.hive_id, MODEL, started_for, list)
        return worker_id

    def place(self, job_id: str, worker_id: str, attempt: int = 1) -> Placement:
        """Place a job on a worker of the hive."""
        return self.workers.place(job_id, worker_id, self.hive_id, attempt)

    async def bring(self, *stretches: bytes) -> dict[str, int]:
        """Bring a batch, as the hive."""
        return await self.ingest.take(self.hive_id, b"".join(stretches))

    async def log(self, log_id: str) -> list[dict[str, Any]]:
        """Return a whole log; nothing when there is none."""
        found: list[dict[str, Any]] = []
        while page := await self.registry.store.read_log(log_id, len(found), 500):
            if not page.events:
                break
            found += [msgspec.json.decode(event) for event in page.events]
        assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
        return found

    async def said(self, log_id: str) -> list[str]:
        """Return the actions, or else the kinds, of a log's events."""
        return [event.get("action", event["kind"]) for event in await self.log(log_id)]


@asynccontextmanager
async def parts() -> AsyncIterator[Parts]:
    """Give the parts over an empty registry in memory."""
    registry = JobRegistry.open(None)
    try:
        yield Parts(registry)
    finally:
        await registry.close()
