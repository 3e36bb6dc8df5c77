"""One worker process of a hive: what it was asked to be, and what is known of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from msgspec import Struct

from rbee.contracts.events import decode_source_line
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.states import WorkerState
from rbee.contracts.stretches import split
from rbee.errors import ModelInvalidError, RbeeError, WorkerError
from rbee.hive.catalog import LocalModel
from rbee.hive.last_words import last_failure
from rbee.hive.outbox import Source
from rbee.processes import CapturedProcess, ExitStatus

EXIT_MODEL_INVALID = 4


class WorkerWanted(Struct, frozen=True, kw_only=True):
    """What worker to start, and in whose name its start-up story is told."""

    worker_id: str
    model: LocalModel
    slots: int
    context_tokens: int
    job_id: str | None
    correlation_id: str | None
    device: str | None = None


class Worker:
    """One worker process of this hive.

    Attributes:
        ended: Set when the process and all it started are gone and its end has been told.
    """

    def __init__(self, wanted: WorkerWanted, token: str, process: CapturedProcess, sources: list[Source]) -> None:
        self.wanted = wanted
        self.token = token
        self.process = process
        self.sources = sources
        self.state = WorkerState.STARTING
        self.url: str | None = None
        self.status: ExitStatus | None = None
        self.last_lines: list[str] = []
        self.is_stopping = False
        self.ended = asyncio.Event()
        self.ready_position = 0

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self.wanted.worker_id

    def info(self) -> WorkerInfo:
        """Tell the queen about it."""
        return WorkerInfo(
            worker_id=self.worker_id,
            model=self.wanted.model.ref,
            state=self.state,
            url=self.url,
            token=self.token,
            purpose="generate",
            slots=self.wanted.slots,
            slots_used=0,
            pid=self.process.child.pid,
        )

    def error(self) -> RbeeError:
        """Say why it ended, with its last lines."""
        status = self.status or ExitStatus(unknown=True)
        details = {
            "worker_id": self.worker_id,
            "exit_code": status.exit_code,
            "signal": status.signal,
            "last_lines": self.last_lines,
        }
        said = last_failure(self.last_lines)
        if status.exit_code == EXIT_MODEL_INVALID:
            return ModelInvalidError(said or "The worker could not load the model.", details=details)
        message = f"The worker {status.describe()} before it was ready."
        return WorkerError(f"{message} {said}" if said else message, details=details)


def command_of(wanted: WorkerWanted, program: Path) -> list[str]:
    """Return the command line of a worker."""
    return [
        str(program),
        "--model",
        str(wanted.model.path),
        "--alias",
        wanted.model.ref,
        "--port",
        "0",
        "--slots",
        str(wanted.slots),
        "--context-tokens",
        str(wanted.context_tokens),
        *(["--gpu-layers", "0"] if wanted.device == "cpu" else []),
    ]


def device_environment(device: str | None) -> dict[str, str]:
    """Return the environment that shows a worker one GPU alone; nothing for `cpu` and for no wish."""
    kind, _, number = (device or "").partition(":")
    return {"CUDA_VISIBLE_DEVICES": number} if kind == "cuda" else {}


def ready_url(data: bytes) -> str | None:
    """Find the address in the worker's `worker_ready` line."""
    for piece in split(data, offset=0, part=0, final=True).pieces:
        if b'"worker_ready"' in piece.data:
            line = decode_source_line(piece.data)
            if line is not None and line.action == "worker_ready":
                url = line.fields.get("url")
                return url if isinstance(url, str) else None
    return None
