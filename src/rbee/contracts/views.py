"""What everybody sees: jobs, workers, hives, pages and errors, as the servers answer them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import Meta, Struct

from rbee.contracts.heartbeats import (
    DeviceInfo,
    DownloadInfo,
    MachineInfo,
    ModelInfo,
    ModelMemory,
    Purpose,
    UnusableModel,
)
from rbee.contracts.states import HiveState, JobState, Phase, Reason, WorkerState

T = TypeVar("T")


class Progress(Struct, frozen=True, kw_only=True):
    """How far something is, in `unit`s; `total` is unknown when it is null."""

    done: int
    total: int | None
    unit: str


class ErrorBody(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why something failed, whether to try again, and what to do."""

    message: str
    type: str
    code: str
    param: str | None
    retryable: bool
    remedy: str
    worker_id: str | None = None
    exit_code: int | None = None
    signal: str | None = None
    last_lines: list[str] = []


class ErrorAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of every answer with a status of 400 or more."""

    error: ErrorBody
    job_id: str | None = None
    correlation_id: str | None = None


class AnthropicErrorAnswer(Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type", tag="error"):
    """The same where Anthropic's clients ask: `error.type` is a word of theirs."""

    error: ErrorBody
    job_id: str | None = None
    correlation_id: str | None = None
    request_id: str | None = None


class JobView(Struct, frozen=True, kw_only=True):
    """A job as everybody may see it: never its prompt."""

    job_id: str
    operation: str
    state: JobState
    reason: Reason | None
    message: str | None
    phase: Phase | None
    queue_position: int | None
    progress: Progress | None
    attempt: int
    model: str | None
    hive_id: str | None
    worker_id: str | None
    principal: str
    parent_job_id: str | None
    correlation_id: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    last_seq: int
    result: dict[str, Any] | None
    error: ErrorBody | None
    labels: dict[str, str]
    stream_url: str


class Accepted(Struct, frozen=True, kw_only=True):
    """The answer to a submitted job."""

    job_id: str
    state: JobState
    stream_url: str
    correlation_id: str


class Page(Struct, Generic[T], frozen=True, kw_only=True):
    """One page of a list; `next` is the cursor of the page after it, null on the last."""

    data: list[T]
    next: str | None = None


ModelState = Literal["loaded", "available", "downloading", "remote"]


class ModelView(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A model that can be asked for, as the clients of OpenAI and of Anthropic read it, and with its state.

    Attributes:
        created: 0, and `created_at` the same: when a model was made is not known.
        state: A worker has it `loaded`; it is `available` on a disk; `downloading`; or `remote`, to be fetched
            when it is asked for.
        alias_of: The model that this name stands for.
        progress: How much of a download is here.
        context_tokens: How many tokens it was trained to look at.
    """

    id: str
    object: str
    created: int
    owned_by: str
    type: str
    display_name: str
    created_at: str
    state: ModelState
    alias_of: str | None = None
    progress: Progress | None = None
    size_bytes: int | None = None
    quantization: str | None = None
    context_tokens: int | None = None
    architecture: str | None = None
    purpose: Purpose | None = None
    memory: ModelMemory | None = None


class ModelList(Struct, frozen=True, kw_only=True):
    """All models; `has_more`, `first_id` and `last_id` are what Anthropic's clients page by."""

    object: str
    data: list[ModelView]
    has_more: bool
    first_id: str | None
    last_id: str | None


class WorkerView(Struct, frozen=True, kw_only=True):
    """A worker as its queen sees it; its token stays with queen and hive."""

    worker_id: str
    hive_id: str
    model: str
    state: WorkerState
    purpose: str
    slots: int
    slots_used: int
    pid: int | None


class HiveView(Struct, frozen=True, kw_only=True):
    """A hive as its queen sees it."""

    hive_id: str
    state: HiveState
    url: str
    version: str
    machine: MachineInfo
    devices: list[DeviceInfo]
    models: list[ModelInfo]
    workers: list[WorkerView]
    last_heartbeat_s: float
    engines: tuple[str, ...] = ("llama_cpp",)
    downloads: list[DownloadInfo] = []
    unusable_models: list[UnusableModel] = []
    workers_max: int | None = None


class Status(Struct, frozen=True, kw_only=True):
    """The queen at a glance."""

    version: str
    boot_id: str
    url: str
    started_at: datetime
    hives: int
    workers: int
    queued: int
    running: int


class ReadyFile(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a server writes, whole, once it can be asked (`--ready-file`, `RBEE_HOME/run/<program>.json`)."""

    url: str
    pid: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    boot_id: str | None = None
    hive_url: str | None = None
