"""What a hive tells its queen every second, and what the queen answers."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from rbee.contracts.states import WorkerState

Count = Annotated[int, Meta(ge=0, le=2**62)]


class MachineInfo(Struct, frozen=True, kw_only=True):
    """The machine a hive runs on; memory in bytes."""

    hostname: str
    cpus: int
    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int


class DeviceInfo(Struct, frozen=True, kw_only=True):
    """One device that can run a model (`cpu`, `cuda:0`); memory in bytes."""

    device: str
    name: str
    memory_bytes: int
    memory_free_bytes: int


class ModelInfo(Struct, frozen=True, kw_only=True):
    """One model file on the hive's disk."""

    model: str
    size_bytes: int
    path: str
    sha256: str | None = None


class WorkerInfo(Struct, frozen=True, kw_only=True):
    """One worker of a hive; `token` is the credential its front asks for."""

    worker_id: str
    model: str
    state: WorkerState
    url: str | None
    token: str
    purpose: Literal["generate", "embed", "rerank"]
    slots: int
    slots_used: int
    pid: int | None


class Heartbeat(Struct, frozen=True, kw_only=True):
    """The whole truth about a hive, so that the first heartbeat is the registration."""

    boot_id: str
    store_id: str
    url: str
    version: str
    machine: MachineInfo
    devices: list[DeviceInfo]
    models: list[ModelInfo]
    workers: list[WorkerInfo]


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
