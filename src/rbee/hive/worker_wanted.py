"""What worker a hive is asked for, and the command line and environment that make it so."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from rbee.contracts.engine_settings import BUILT_IN
from rbee.contracts.heartbeats import Purpose
from rbee.hive.catalog import LocalModel


class WorkerWanted(Struct, frozen=True, kw_only=True):
    """What worker to start, and in whose name its start-up story is told.

    Attributes:
        has_prefill: Its engine goes on from an assistant's message that stands last.
        ready_timeout_s: Seconds its engine may take, where its configuration says.
    """

    worker_id: str
    model: LocalModel
    slots: int
    context_tokens: int
    job_id: str | None
    correlation_id: str | None
    device: str | None = None
    engine: str = "llama_cpp"
    purpose: Purpose = "generate"
    memory_bytes: int = 0
    has_prefill: bool = True
    ready_timeout_s: float = 0.0


def command_of(wanted: WorkerWanted, program: Path) -> list[str]:
    """Return the command line of a worker."""
    return [
        str(program),
        "--model",
        str(wanted.model.path),
        "--alias",
        wanted.model.ref,
        *(["--engine", wanted.engine] if wanted.engine != BUILT_IN else []),
        *(["--device", wanted.device] if wanted.device and wanted.engine != BUILT_IN else []),
        "--port",
        "0",
        "--slots",
        str(wanted.slots),
        "--context-tokens",
        str(wanted.context_tokens),
        *(["--gpu-layers", "0"] if wanted.device == "cpu" else []),
        *(["--embedding"] if wanted.purpose == "embed" else []),
        *(["--reranking"] if wanted.purpose == "rerank" else []),
    ]


def device_environment(device: str | None) -> dict[str, str]:
    """Return the environment that shows a worker one GPU alone; nothing for `cpu` and for no wish."""
    kind, _, number = (device or "").partition(":")
    return {"CUDA_VISIBLE_DEVICES": number} if kind == "cuda" else {}
