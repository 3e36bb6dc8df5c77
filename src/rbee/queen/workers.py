"""The workers this queen asked for: which jobs are on each, what they said last, and how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.events import SourceLine, captured_event
from rbee.errors import WorkerLostError
from rbee.jobs import JobRegistry
from rbee.jobs.records import WorkerRecord
from rbee.queen.claims import Speaker


class Placement:
    """One attempt of one job on one worker, and what is heard of it.

    Attributes:
        closing: The fields of the attempt's `worker_inference`; fails when the worker is lost.
        heard_at: Loop time of the last token line, 0 before the first.
    """

    def __init__(self, job_id: str, worker_id: str, hive_id: str, attempt: int) -> None:
        self.job_id = job_id
        self.worker_id = worker_id
        self.hive_id = hive_id
        self.attempt = attempt
        self.closing: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.heard_at = 0.0

    def fail(self, error: Exception) -> None:
        """Tell whoever waits for the closing line that none will come."""
        if not self.closing.done():
            self.closing.set_exception(error)
            self.closing.exception()  # a relayed job may have ended without asking


class WorkerExit(Struct, frozen=True):
    """How a worker ended, as its hive said."""

    worker_id: str
    message: str
    exit_code: int | None
    signal: str | None
    last_lines: list[str]
    sources: dict[str, int]

    def error(self) -> WorkerLostError:
        """Make the error that ends the jobs on it."""
        return WorkerLostError(
            self.message,
            details={
                "worker_id": self.worker_id,
                "exit_code": self.exit_code,
                "signal": self.signal,
                "last_lines": self.last_lines[-20:],
            },
        )


def read_exit(line: bytes) -> WorkerExit:
    """Read a hive's `worker_exit` line."""
    decoded: dict[str, Any] = msgspec.json.decode(line)
    fields = decoded.get("fields", {})
    return WorkerExit(
        worker_id=str(decoded.get("worker_id")),
        message=str(decoded.get("message")),
        exit_code=fields.get("exit_code"),
        signal=fields.get("signal"),
        last_lines=[str(text) for text in fields.get("last_lines", [])],
        sources={str(name): int(size) for name, size in fields.get("sources", {}).items()},
    )


class WorkerBook:
    """Who may speak of which job. One event loop owns it; what must outlive it is in the store."""

    def __init__(self, registry: JobRegistry, on_gone: Callable[[str], None]) -> None:
        self._registry = registry
        self._on_gone = on_gone
        self._records: dict[str, WorkerRecord] = {}
        self._placements: dict[str, dict[str, Placement]] = {}
        self._start_failures: dict[str, asyncio.Future[WorkerExit]] = {}
        self._settling = asyncio.Lock()

    async def load(self) -> None:
        """Read what an earlier boot knew."""
        self._records = {record.worker_id: record for record in await self._registry.store.workers()}

    async def add(self, worker_id: str, hive_id: str, model: str, job_id: str) -> asyncio.Future[WorkerExit]:
        """Commit a worker before its hive is asked for it; returns a future of its end."""
        record = WorkerRecord(worker_id, hive_id, model, job_id)
        await self._registry.store.put_worker(record)
        self._records[worker_id] = record
        ended: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self._start_failures[worker_id] = ended
        return ended

    def place(self, job_id: str, worker_id: str, hive_id: str, attempt: int) -> Placement:
        """Let a worker speak of a job from now on."""
        placement = Placement(job_id, worker_id, hive_id, attempt)
        self._placements.setdefault(worker_id, {})[job_id] = placement
        return placement

    def remove(self, placement: Placement) -> None:
        """Let the worker speak of the job no longer."""
        placed = self._placements.get(placement.worker_id, {})
        if placed.get(placement.job_id) is placement:
            del placed[placement.job_id]

    def slots_used(self, worker_id: str) -> int:
        """Return how many jobs are on a worker."""
        return len(self._placements.get(worker_id, {}))

    def speaker(self, source: str, hive_id: str) -> Speaker:
        """Return who wrote a file of a hive, and of which jobs it may speak."""
        owner = source.partition("/")[0]
        if owner == hive_id:
            return Speaker(source=source, log_id=hive_id, is_hive=True, placed={})
        record = self._records.get(owner)
        placed = self._placements.get(owner, {})
        return Speaker(
            source=source,
            log_id=owner,
            is_hive=False,
            placed={job_id: placement.attempt for job_id, placement in placed.items()},
            started_for=record.job_id if record and record.hive_id == hive_id else None,
        )

    def heard(self, worker_id: str, line: SourceLine) -> None:
        """Take note of a committed line of a worker."""
        placement = self._placements.get(worker_id, {}).get(line.job_id or "")
        if placement is None:
            return
        if line.kind == "token":
            placement.heard_at = asyncio.get_running_loop().time()
        elif line.action == "worker_inference" and not placement.closing.done():
            placement.closing.set_result(line.fields)

    def ended_record(self, line: bytes) -> WorkerRecord:
        """Return the record that keeps a worker's end until all that it said has come down the road."""
        worker_id = read_exit(line).worker_id
        record = self._records.get(worker_id)
        if record is None:
            record = WorkerRecord(worker_id, str(msgspec.json.decode(line).get("hive_id")), "")
        return msgspec.structs.replace(record, exit_line=line)

    def exited(self, record: WorkerRecord) -> None:
        """Take note of a committed end."""
        self._records[record.worker_id] = record

    async def settle(self, observed_ts: int) -> None:
        """Tell the ends of those workers whose files have been read to their last byte."""
        async with self._settling:
            for record in [record for record in self._records.values() if record.exit_line is not None]:
                assert record.exit_line is not None
                ended = read_exit(record.exit_line)
                cursors = await self._registry.store.cursors(ended.sources)
                if all(cursors.get(name, (0, 0))[0] >= size for name, size in ended.sources.items()):
                    await self._tell_end(record, ended, observed_ts)

    async def _tell_end(self, record: WorkerRecord, ended: WorkerExit, observed_ts: int) -> None:
        assert record.exit_line is not None
        event = captured_event(
            record.exit_line, source=f"{record.hive_id}/exit", offset=0, observed_ts=observed_ts
        )
        placements = list(self._placements.get(record.worker_id, {}).values())
        waiting = self._start_failures.pop(record.worker_id, None)
        logs = [record.worker_id, *(placement.job_id for placement in placements)]
        if waiting is not None and not waiting.done() and record.job_id:
            logs.append(record.job_id)
        for log_id in dict.fromkeys(logs):
            await self._registry.append(log_id, [event])
        await self._registry.store.forget_worker(record.worker_id)
        del self._records[record.worker_id]
        self._on_gone(record.worker_id)
        if waiting is not None and not waiting.done():
            waiting.set_result(ended)
        for placement in placements:
            placement.fail(ended.error())

    def started(self, worker_id: str) -> None:
        """Take note that a worker is ready: its end is no failed start any more."""
        waiting = self._start_failures.pop(worker_id, None)
        if waiting is not None:
            waiting.cancel()
