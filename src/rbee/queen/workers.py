"""The workers this queen asked for: which jobs are on each, what they said last, and how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from rbee.contracts.events import SourceLine
from rbee.contracts.heartbeats import Purpose
from rbee.contracts.ids import is_id
from rbee.errors import OverloadedError
from rbee.jobs import JobRegistry
from rbee.jobs.records import Entry, SourceBatch, WorkerRecord
from rbee.queen.claims import Speaker, is_file_of_hive
from rbee.queen.worker_exits import WorkerExit, exit_event, read_exit

# A hive may still speak of so many jobs that it was given commands for; of older ones the ends are long told.
HANDED_MAX = 4096
SUPERSEDED_MAX = 4096


class Placement:
    """One attempt of one job on one worker, and what is heard of it.

    Attributes:
        model: What the worker has loaded.
        purpose: What it was started for.
        closing: The fields of the attempt's `worker_inference`; fails when the worker is lost.
        heard_at: Loop time of the last token line, 0 before the first.
        moved_at: Loop time since which it stands still, from placement on; not while its hive is away.
        committed: Done when it is on disk, where the worker is asked meanwhile.
    """

    def __init__(
        self,
        job_id: str,
        worker_id: str,
        hive_id: str,
        attempt: int,
        model: str = "",
        purpose: Purpose = "generate",
    ) -> None:
        self.job_id = job_id
        self.model = model
        self.purpose = purpose
        self.worker_id = worker_id
        self.hive_id = hive_id
        self.attempt = attempt
        loop = asyncio.get_running_loop()
        self.closing: asyncio.Future[dict[str, Any]] = loop.create_future()
        self.heard_at = 0.0
        self.moved_at = loop.time()
        self.committed: asyncio.Future[None] | None = None

    async def on_disk(self) -> None:
        """Wait until it is on disk; raises why it will not be. Waiting less leaves the write alone."""
        if self.committed is not None:
            await asyncio.wait({self.committed})
            self.committed.result()

    @property
    def is_refused(self) -> bool:
        """Tell whether it could not be written down."""
        committed = self.committed
        return committed is not None and committed.done() and committed.exception() is not None

    def fail(self, error: Exception) -> None:
        """Tell whoever waits for the closing line that none will come."""
        if not self.closing.done():
            self.closing.set_exception(error)
            self.closing.exception()  # a relayed job may have ended without asking


class _Start:
    """A worker that is not ready yet: the future of its end, and who waits for it."""

    def __init__(self, waiting: Callable[[], list[str]]) -> None:
        self.ended: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()
        self.waiting = waiting


class WorkerBook:
    """Who may speak of which job. One event loop owns it; what must outlive it is in the store."""

    def __init__(self, registry: JobRegistry, on_gone: Callable[[str], None]) -> None:
        self._registry = registry
        self._on_gone = on_gone
        self._records: dict[str, WorkerRecord] = {}
        self._placements: dict[str, dict[str, Placement]] = {}
        self._superseded: list[Placement] = []
        self._strays: dict[tuple[str, str, int], None] = {}
        self._handed: dict[str, dict[str, None]] = {}
        self._starts: dict[str, _Start] = {}
        self._draining: set[str] = set()
        self._keep_alive_s: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._freed = asyncio.Event()
        self._moved = asyncio.Event()
        self._settling = asyncio.Lock()

    async def load(self) -> None:
        """Read what an earlier boot knew."""
        self._records = {record.worker_id: record for record in await self._registry.store.workers()}

    # Starting

    async def add(
        self, worker_id: str, hive_id: str, model: str, job_id: str, waiting: Callable[[], list[str]]
    ) -> asyncio.Future[WorkerExit]:
        """Commit a worker before its hive is asked for it; returns a future of its end.

        Args:
            worker_id: The worker.
            hive_id: Where it is to run.
            model: What it is to load.
            job_id: The job it is started for, of which it may speak.
            waiting: Tells the jobs that wait for it; they are told its end as well.
        """
        record = WorkerRecord(worker_id, hive_id, model, job_id)
        await self._registry.store.put_worker(record)
        self._records[worker_id] = record
        start = self._starts[worker_id] = _Start(waiting)
        return start.ended

    def started(self, worker_id: str) -> None:
        """Take note that nobody waits for the worker's start any more."""
        start = self._starts.pop(worker_id, None)
        if start is not None:
            start.ended.cancel()

    async def forget(self, worker_id: str) -> None:
        """Forget a worker that never came to be."""
        self.started(worker_id)
        if self._records.pop(worker_id, None) is not None:
            await self._registry.store.forget_worker(worker_id)

    def is_starting(self, worker_id: str) -> bool:
        """Tell whether somebody waits for the worker's start."""
        return worker_id in self._starts

    # Slots

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have a function called with the worker when the jobs on it change, or whether it is placed on."""
        self._listeners.append(listener)

    def _tell(self, worker_id: str) -> None:
        for listener in self._listeners:
            listener(worker_id)

    def place(
        self,
        job_id: str,
        worker_id: str,
        hive_id: str,
        attempt: int,
        model: str = "",
        purpose: Purpose = "generate",
    ) -> Placement:
        """Let a worker speak of a job from now on."""
        placement = Placement(job_id, worker_id, hive_id, attempt, model, purpose)
        self._placements.setdefault(worker_id, {})[job_id] = placement
        self._tell(worker_id)
        return placement

    def remove(self, placement: Placement) -> None:
        """Let the worker speak of the job no longer."""
        placed = self._placements.get(placement.worker_id, {})
        if placed.get(placement.job_id) is placement:
            del placed[placement.job_id]
            if not placed:
                del self._placements[placement.worker_id]
            self._tell_freed(placement.worker_id)

    def _tell_freed(self, worker_id: str) -> None:
        freed, self._freed = self._freed, asyncio.Event()
        freed.set()
        self._tell(worker_id)

    async def freed(self, timeout_s: float) -> None:
        """Wait until a slot becomes free, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._freed.wait()
        except TimeoutError:
            pass

    def slots_used(self, worker_id: str) -> int:
        """Return how many jobs are on a worker, those counted that it may still be answering for nobody."""
        old = sum(placement.worker_id == worker_id for placement in self._superseded)
        return len(self._placements.get(worker_id, {})) + old

    def supersede(self, placement: Placement) -> None:
        """Take note of an attempt that was given up while its worker may still be at it."""
        self._superseded.append(placement)
        del self._superseded[:-SUPERSEDED_MAX]
        self._tell(placement.worker_id)

    def stray(self, worker_id: str, hive_id: str, line: SourceLine) -> None:
        """Take note of an answer that nobody waits for, by the first refused line of it.

        So a queen who was started again stops what she no longer knows of, too.
        """
        job_id, attempt = line.job_id or "", line.attempt or 0
        stray = (worker_id, job_id, attempt)
        if stray not in self._strays:
            self._strays[stray] = None
            if len(self._strays) > SUPERSEDED_MAX:
                del self._strays[next(iter(self._strays))]
            self.supersede(Placement(job_id, worker_id, hive_id, attempt))

    def superseded(self) -> list[Placement]:
        """Return the attempts whose requests are still to be stopped."""
        return list(self._superseded)

    def forget_superseded(self, placement: Placement) -> None:
        """Take note that a request was stopped, or went with its worker."""
        if placement in self._superseded:
            self._superseded.remove(placement)
            self._tell_freed(placement.worker_id)

    def keep_alive_s(self, worker_id: str, default_s: float) -> float:
        """Return how long a worker may be idle: as its start or the last job on it asked, else the default."""
        return self._keep_alive_s.get(worker_id, default_s)

    def ask_keep_alive(self, worker_id: str, keep_alive_s: float | None) -> None:
        """Take note of how long a start or a job wants the worker kept; None asks for nothing."""
        if keep_alive_s is not None:
            self._keep_alive_s[worker_id] = keep_alive_s

    def drain(self, worker_id: str) -> None:
        """Have nothing more placed on a worker."""
        self._draining.add(worker_id)
        self._tell(worker_id)

    def undrain(self, worker_id: str) -> None:
        """Let a worker be placed on again, if it still lives."""
        self._draining.discard(worker_id)
        self._tell(worker_id)

    def is_draining(self, worker_id: str) -> bool:
        """Tell whether nothing more is placed on a worker."""
        return worker_id in self._draining

    async def until_free(self, worker_id: str, timeout_s: float) -> bool:
        """Wait until no job is on a worker; false after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.slots_used(worker_id):
                    await self._freed.wait()
        except TimeoutError:
            return False
        return True

    # Hearing

    def hand(self, hive_id: str, job_id: str) -> None:
        """Let a hive speak of a job that it is given a command for."""
        handed = self._handed.setdefault(hive_id, {})
        handed.pop(job_id, None)
        handed[job_id] = None
        if len(handed) > HANDED_MAX:
            del handed[next(iter(handed))]

    def speaker(self, source: str, hive_id: str) -> Speaker | None:
        """Return who wrote a file of a hive, and of which jobs it may speak; None when it is not the hive's."""
        owner, _, name = source.partition("/")
        if owner == hive_id:
            handed = self._handed.get(hive_id, {})
            return Speaker(source, hive_id, is_hive=True, handed=handed) if is_file_of_hive(name) else None
        record = self._records.get(owner)
        if not is_id("worker", owner) or name not in ("stdout", "stderr"):
            return None
        if record is not None and record.hive_id != hive_id:
            return None
        placed = {
            job_id: placement.attempt
            for job_id, placement in self._placements.get(owner, {}).items()
            if placement.hive_id == hive_id
        }
        return Speaker(source, owner, is_hive=False, placed=placed, started_for=record.job_id if record else None)

    def heard(self, worker_id: str, line: SourceLine) -> None:
        """Take note of a committed line of a worker."""
        placement = self._placements.get(worker_id, {}).get(line.job_id or "")
        if placement is None or line.attempt != placement.attempt:
            return
        if line.kind == "token":
            placement.heard_at = asyncio.get_running_loop().time()
        elif line.action == "worker_inference" and not placement.closing.done():
            placement.closing.set_result(line.fields)

    def overflowed(self, job_id: str) -> None:
        """Take note that a job's log is full: its answer fails."""
        for placed in self._placements.values():
            if job_id in placed:
                placed[job_id].fail(
                    OverloadedError(f"The log of {job_id} is full.", remedy="Ask for less at once.")
                )

    def moved(self, hive_id: str) -> None:
        """Take note that a hive's stream moved."""
        self._moved_at[hive_id] = asyncio.get_running_loop().time()
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def movement(self, timeout_s: float) -> None:
        """Wait until the stream of a hive moves, at most `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._moved.wait()
        except TimeoutError:
            pass

    def moved_at(self, hive_id: str) -> float:
        """Return the loop time at which a hive's stream moved last, 0 before the first time."""
        return self._moved_at.get(hive_id, 0.0)

    # Ends

    def ended_record(self, kept: bytes, hive_id: str) -> WorkerRecord | None:
        """Return the record that keeps a worker's end until all that it said has come down the road.

        None when the line tells no end, not that of a worker of this hive, or nothing new.
        """
        ended = read_exit(kept)
        if ended is None:
            return None
        record = self._records.get(ended.worker_id) or WorkerRecord(ended.worker_id, hive_id, "")
        before = read_exit(record.exit_line) if record.exit_line is not None else None
        if record.hive_id != hive_id or (before is not None and (ended.is_unknown or not before.is_unknown)):
            return None
        return msgspec.structs.replace(record, exit_line=kept)

    def exited(self, record: WorkerRecord) -> None:
        """Take note of a committed end."""
        self._records[record.worker_id] = record

    async def has_ended(self, worker_id: str) -> bool:
        """Tell whether a worker's end was told, also by an earlier boot; then nothing more is placed on it."""
        source = _exit_source(worker_id)
        if source not in await self._registry.store.cursors([source]):
            return False
        self._on_gone(worker_id)
        return True

    async def settle(self) -> None:
        """Tell the ends of those workers whose files have been read to their last byte."""
        async with self._settling:
            for record in [record for record in self._records.values() if record.exit_line is not None]:
                ended = read_exit(record.exit_line or b"")
                assert ended is not None, "only lines that can be read are kept"
                cursors = await self._registry.store.cursors(ended.sources)
                if all(cursors.get(name, (0, 0))[0] >= size for name, size in ended.sources.items()):
                    await self._tell_end(record, ended)

    async def _tell_end(self, record: WorkerRecord, ended: WorkerExit) -> None:
        """Write the end into every log concerned, once however often it is told, then let go of the worker."""
        worker_id = record.worker_id
        self._on_gone(worker_id)  # nothing is placed on it from here on
        placements = list(self._placements.get(worker_id, {}).values())
        start = self._starts.get(worker_id)
        logs = [worker_id, *(placement.job_id for placement in placements)]
        if start is not None:
            logs += [record.job_id] if record.job_id else []
            logs += start.waiting()
        event = exit_event(record.exit_line or b"")
        entries = [Entry(log_id, event) for log_id in dict.fromkeys(logs)]
        await self._registry.store.ingest([SourceBatch(_exit_source(worker_id), 0, 1, 0, entries)])
        await self._registry.store.forget_worker(worker_id)
        self._records.pop(worker_id, None)
        self._starts.pop(worker_id, None)
        self._keep_alive_s.pop(worker_id, None)
        self._draining.discard(worker_id)
        self._superseded = [old for old in self._superseded if old.worker_id != worker_id]
        if start is not None and not start.ended.done():
            start.ended.set_result(ended)
        for placement in placements:
            placement.fail(ended.error())


def _exit_source(worker_id: str) -> str:
    """Return the name under which it is kept that a worker's end was told."""
    return f"{worker_id}/exit"
