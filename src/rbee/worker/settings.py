"""What a worker can be told, and which of it a hive tells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
from msgspec import Meta

from rbee.contracts.engine_settings import BUILT_IN
from rbee.contracts.heartbeats import Purpose
from rbee.contracts.ids import is_correlation_id, new_id
from rbee.contracts.settings import Settings
from rbee.errors import ConfigurationError

Port = Annotated[int, Meta(ge=0, le=65535)]
Slots = Annotated[int, Meta(ge=1, le=256)]
Tokens = Annotated[int, Meta(ge=64, le=16 * 1024 * 1024)]
Layers = Annotated[int, Meta(ge=-1, le=100_000)]
Threads = Annotated[int, Meta(ge=0, le=4096)]
LeaseSeconds = Annotated[float, Meta(gt=0, le=24 * 3600)]


class WorkerSettings(Settings, kw_only=True, frozen=True):
    """One loaded model behind one port of this machine.

    Attributes:
        model: Path of the file to load, or the name by which the engine fetches the model.
        alias: Name the model is shown under; the file's name without one.
        engine: What runs it: llama_cpp, or an engine of rbee.toml ([engines.NAME]).
        device: The device an engine of rbee.toml is told of, such as cuda:0.
        port: Port on 127.0.0.1; 0 takes any free one.
        slots: How many requests are answered at the same time.
        context_tokens: Tokens that one request may use, prompt and answer together.
        gpu_layers: Layers that go to the GPU; -1 as many as fit.
        threads: Threads that compute; 0 leaves the number to the engine.
        embedding: Load the model for embeddings.
        reranking: Load the model for reranking.
        worker_lease_s: Seconds the worker goes on without a live hive, when a hive started it.
        hive_id: The hive that started this worker (RBEE_HIVE_ID); none when started by hand.
        worker_id: This worker's id (RBEE_WORKER_ID); a new one when started by hand.
        job_id: The job the worker is started for (JOB_ID).
        correlation_id: The correlation id of that job (CORRELATION_ID).
    """

    program: ClassVar[str] = "llama-worker-rbee"
    table: ClassVar[str] = "worker"
    env: ClassVar[dict[str, str]] = {"job_id": "JOB_ID", "correlation_id": "CORRELATION_ID"}
    secrets: ClassVar[frozenset[str]] = frozenset({"worker_token"})
    flags_only: ClassVar[frozenset[str]] = frozenset(
        {"home", "model", "alias", "engine", "device", "port", "hive_id", "worker_id", "job_id", "correlation_id"}
    )

    model: Path = Path()
    alias: Annotated[str, Meta(max_length=1024)] = ""
    engine: str = BUILT_IN
    device: str | None = None
    port: Port = 0
    slots: Slots = 4
    context_tokens: Tokens = 4096
    gpu_layers: Layers = -1
    threads: Threads = 0
    embedding: bool = False
    reranking: bool = False
    worker_lease_s: LeaseSeconds = 30.0
    hive_id: str | None = None
    worker_id: Annotated[str, Meta(pattern=r"^worker-[0-9a-z]{26}$")] = msgspec.field(
        default_factory=lambda: new_id("worker")
    )
    job_id: str | None = None
    correlation_id: str | None = None
    worker_token: str = ""

    def check(self) -> None:
        """Refuse what no single value shows to be wrong.

        Raises:
            ConfigurationError: No model, no token, or two purposes at once.
        """
        if self.model == Path():
            raise ConfigurationError(
                "No model is named.", remedy="Say which file to load: --model PATH of a .gguf file."
            )
        if not self.worker_token:
            raise ConfigurationError(
                "RBEE_WORKER_TOKEN is not set, so nobody could be let in.",
                remedy="Workers are started by a hive (rbee up). By hand: set RBEE_WORKER_TOKEN to a random word.",
            )
        if self.embedding and self.reranking:
            raise ConfigurationError("A worker is for embeddings or for reranking, not both.")
        if self.correlation_id is not None and not is_correlation_id(self.correlation_id):
            raise ConfigurationError("CORRELATION_ID is no correlation id.")

    @property
    def purpose(self) -> Purpose:
        """What the model is loaded for."""
        return "embed" if self.embedding else "rerank" if self.reranking else "generate"

    @property
    def shown_model(self) -> str:
        """The name the model is shown under."""
        return self.alias or self.model.name.removesuffix(".gguf")
