"""One worker process of a hive: what it was asked to be, and what is known of it."""

from __future__ import annotations

import asyncio

from rbee.contracts.events import decode_source_line
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.states import WorkerState
from rbee.contracts.stretches import split
from rbee.errors import ModelInvalidError, RbeeError, WorkerError
from rbee.hive.last_words import LastWords
from rbee.hive.outbox import Source
from rbee.hive.worker_file import WorkerFile
from rbee.hive.worker_wanted import WorkerWanted
from rbee.processes import CapturedProcess, ExitStatus

EXIT_MODEL_INVALID = 4


class Worker:
    """One worker process of this hive.

    Attributes:
        ready: Done when the worker said that it is ready; fails with why it will not be.
        ended: Set when the process and all it started are gone and its end has been told.
        is_kept: What is known of it is written down.
        ready_position: How far its words were read and do not say that it is ready.
    """

    def __init__(self, file: WorkerFile, process: CapturedProcess, sources: list[Source]) -> None:
        self.file = file
        self.process = process
        self.sources = sources
        self.state = WorkerState.STARTING
        self.status: ExitStatus | None = None
        self.last_words = LastWords()
        self.is_stopping = False
        self.is_kept = True
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.Event()
        self.ready_position = 0

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self.wanted.worker_id

    @property
    def wanted(self) -> WorkerWanted:
        """What it was asked to be."""
        return self.file.wanted

    def info(self) -> WorkerInfo:
        """Tell the queen about it."""
        return WorkerInfo(
            worker_id=self.worker_id,
            model=self.wanted.model.ref,
            state=self.state,
            url=self.file.url,
            token=self.file.token,
            purpose=self.wanted.purpose,
            slots=self.wanted.slots,
            slots_used=0,
            pid=self.process.child.pid,
            engine=self.wanted.engine,
            context_tokens=self.wanted.context_tokens,
            device=self.wanted.device,
            memory_bytes=self.wanted.memory_bytes,
            has_prefill=self.wanted.has_prefill,
        )

    def mark_ready(self) -> None:
        """Take note that it said so."""
        self.state = WorkerState.READY
        self.ready.set_result(None)

    def mark_failed(self, error: RbeeError) -> None:
        """Tell whoever waits for it why it will not be ready."""
        self.ready.set_exception(error)
        self.ready.exception()  # nobody may be waiting

    def error(self) -> RbeeError:
        """Say why it ended, with its last lines."""
        status = self.status or ExitStatus(unknown=True)
        details = {
            "worker_id": self.worker_id,
            "exit_code": status.exit_code,
            "signal": status.signal,
            "last_lines": self.last_words.lines,
        }
        said = self.last_words.failure
        if status.exit_code == EXIT_MODEL_INVALID:
            return ModelInvalidError(said or "The worker could not load the model.", details=details)
        message = f"The worker {status.describe()} before it was ready."
        return WorkerError(f"{message} {said}" if said else message, details=details)


def ready_url(data: bytes) -> str | None:
    """Find the address in the worker's `worker_ready` line."""
    for piece in split(data, offset=0, part=0, final=True).pieces:
        if b'"worker_ready"' in piece.data:
            line = decode_source_line(piece.data)
            if line is not None and line.action == "worker_ready":
                url = line.fields.get("url")
                return url if isinstance(url, str) else None
    return None
