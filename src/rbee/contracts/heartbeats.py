"""What a hive tells its queen every second, and what the queen answers."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from rbee.contracts.states import WorkerState

Count = Annotated[int, Meta(ge=0, le=2**62)]
Purpose = Literal["generate", "embed", "rerank"]

# What of a model's work space is the process itself, and for how many tokens of a batch the rest is.
PROCESS_BYTES = 128 * 1024 * 1024
BATCH_TOKENS = 512


class MachineInfo(Struct, frozen=True, kw_only=True):
    """The machine a hive runs on; memory in bytes."""

    hostname: str
    cpus: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int


class DeviceInfo(Struct, frozen=True, kw_only=True):
    """One device of a machine (`cpu`, `cuda:0`); memory in bytes.

    Attributes:
        is_usable: The hive's engine can run a model on it.
        note: Why it cannot, and what to install so that it can.
    """

    device: str
    name: str
    memory_bytes: int
    memory_free_bytes: int
    is_usable: bool = True
    note: str = ""


class ModelMemory(Struct, frozen=True, kw_only=True):
    """What a loaded model takes of a device, in bytes, as its file's header tells."""

    weights_bytes: int
    cache_bytes_per_token: int
    work_bytes: int

    def needed_bytes(self, context_tokens: int, slots: int, purpose: Purpose = "generate") -> int:
        """Return what a worker takes that answers `slots` requests of `context_tokens` each at the same time.

        An input that is embedded or ranked is one batch, as long as the context, and the numbers of all its tokens
        are kept: measured, that takes twice the work space for each.
        """
        work_bytes = self.work_bytes
        if purpose != "generate":
            batch_bytes = max(0, work_bytes - PROCESS_BYTES)
            work_bytes += batch_bytes * (2 * max(BATCH_TOKENS, context_tokens) - BATCH_TOKENS) // BATCH_TOKENS
        return self.weights_bytes + work_bytes + self.cache_bytes_per_token * context_tokens * slots


class ModelInfo(Struct, frozen=True, kw_only=True):
    """One model file on the hive's disk.

    Attributes:
        architecture: How the model is built, in the engine's word (`llama`); None where the file was not read yet.
        quantization: How most of its weights are written, such as `Q4_K_M`.
        context_tokens: How many tokens it was trained to look at.
        has_chat_template: Its file says how a conversation is written.
        purpose: What it is made for.
        memory: What it takes when it is loaded.
    """

    model: str
    size_bytes: int
    path: str
    sha256: str | None = None
    architecture: str | None = None
    quantization: str | None = None
    context_tokens: int | None = None
    has_chat_template: bool | None = None
    purpose: Purpose | None = None
    memory: ModelMemory | None = None


class DownloadInfo(Struct, frozen=True, kw_only=True):
    """A model that a hive is fetching, and how much of it is here."""

    model: str
    done_bytes: int
    total_bytes: int | None


class UnusableModel(Struct, frozen=True, kw_only=True):
    """What takes room among a hive's models and cannot be loaded.

    Attributes:
        model: Its reference; the name of its directory where that is not known.
        fault: Why not, and what to do.
    """

    model: str
    size_bytes: int
    path: str
    fault: str


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """One worker of a hive.

    Attributes:
        token: The credential its front asks for.
        engine: What runs the model.
        context_tokens: How many tokens one request may use; 0 where it is not known.
        device: Where it runs, as it was asked for; None where its engine chose.
        memory_bytes: What it was estimated to take when it was started; 0 where it is not known.
        has_prefill: It goes on from an assistant's message that stands last, so that it can continue an answer.
    """

    worker_id: str
    model: str
    state: WorkerState
    url: str | None
    token: str
    purpose: Purpose
    slots: int
    slots_used: int
    pid: int | None
    engine: str = "llama_cpp"
    context_tokens: int = 0
    device: str | None = None
    memory_bytes: int = 0
    has_prefill: bool = True


class Heartbeat(Struct, frozen=True, kw_only=True):
    """The whole truth about a hive, so that the first heartbeat is the registration.

    Attributes:
        engines: The engines its workers can run.
        fetching_engines: Those of them that fetch their models themselves, so that nobody need bring a file.
        downloads: What is being fetched just now.
        unusable_models: What is damaged, or was fetched in part.
        workers_max: How many workers it runs at most; None for as many as the memory holds.
    """

    boot_id: str
    store_id: str
    url: str
    version: str
    machine: MachineInfo
    devices: list[DeviceInfo]
    models: list[ModelInfo]
    workers: list[WorkerInfo]
    engines: tuple[str, ...] = ("llama_cpp",)
    fetching_engines: tuple[str, ...] = ()
    downloads: list[DownloadInfo] = []
    unusable_models: list[UnusableModel] = []
    workers_max: int | None = None


class HeartbeatAnswer(Struct, frozen=True, kw_only=True):
    """The queen's answer: how long the hive counts as live, and how far its files were read."""

    lease_s: float
    queen_boot_id: str
    store_id: str
    cursors: dict[str, int]


class SourceHeader(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The line before each stretch of a batch: `bytes` raw bytes of `source`, from `offset` on."""

    source: str
    offset: Count
    bytes: Count = 0
    lost_bytes: Count = 0
    lost_lines: Count = 0


class Cursors(Struct, frozen=True, kw_only=True):
    """How far each source is committed at the queen: the acknowledgement of a batch."""

    cursors: dict[str, int]
