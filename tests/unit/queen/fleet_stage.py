"""Words for inventories: hives, workers and what models take, as tests of placement write them."""

from __future__ import annotations

from typing import Any

from rbee.contracts.heartbeats import ModelInfo, ModelMemory
from rbee.queen.decisions import Wanted
from rbee.queen.inventory import DeviceSpot, HiveSpot, Inventory, Kind, StartSpot, WorkerSpot

GIB = 2**30
MIB = 2**20
MODEL = "m"
NOW = 1000.0


def kind(model: str = MODEL, **values: Any) -> Kind:
    """Return a kind of worker."""
    return Kind(model, **values)


def wanted(model: str = MODEL, **values: Any) -> Wanted:
    """Return what a job needs."""
    return Wanted(Kind(model), **values)


def worker(
    worker_id: str = "w",
    *,
    model: str = MODEL,
    engine: str = "llama_cpp",
    ready: bool = True,
    slots: int = 2,
    used: int = 0,
    taken: int = GIB,
    idle_s: float = 60.0,
    **values: Any,
) -> WorkerSpot:
    """Return a worker; it has been idle for `idle_s`, unless `used` slots are not."""
    return WorkerSpot(
        worker_id=worker_id,
        kind=Kind(model, engine=engine),
        is_ready=ready,
        slots=slots,
        slots_used=used,
        memory_bytes=taken,
        idle_since=NOW - idle_s,
        **values,
    )


def start(worker_id: str = "s", *, model: str = MODEL, taken: int = GIB, device: str = "cpu") -> StartSpot:
    """Return a worker that is being started."""
    return StartSpot(worker_id=worker_id, kind=Kind(model), device=device, memory_bytes=taken)


def model_info(
    model: str = MODEL, size: int = GIB, *, slot: int | None = None, context_tokens: int | None = None
) -> ModelInfo:
    """Return what a hive knows of a file: only its size, or by its header, with `slot` bytes for 4096 tokens."""
    memory = None
    if slot is not None:
        memory = ModelMemory(weights_bytes=size, cache_bytes_per_token=slot // 4096, work_bytes=0)
    return ModelInfo(model=model, size_bytes=size, path=f"/{model}", memory=memory, context_tokens=context_tokens)


def gpu(device: str = "cuda:0", free: int = 8 * GIB, total: int = 24 * GIB, **values: Any) -> DeviceSpot:
    """Return a GPU."""
    return DeviceSpot(device=device, memory_bytes=total, memory_free_bytes=free, **values)


def hive(
    hive_id: str = "h",
    *workers: WorkerSpot,
    live: bool = True,
    silent_s: float = 0.0,
    free: int = 8 * GIB,
    total: int = 64 * GIB,
    models: tuple[ModelInfo, ...] | None = None,
    gpus: tuple[DeviceSpot, ...] = (),
    **values: Any,
) -> HiveSpot:
    """Return a hive that has the model of 1 GiB, and a processor with `free` bytes."""
    known = (model_info(),) if models is None else models
    cpu = DeviceSpot(device="cpu", memory_bytes=total, memory_free_bytes=free)
    return HiveSpot(
        hive_id=hive_id,
        heard_at=NOW - silent_s,
        live_until=NOW + 1.0 if live else NOW - 0.1,
        devices=(cpu, *gpus),
        models={info.model: info for info in known},
        workers=workers,
        **values,
    )


def fleet(*hives: HiveSpot) -> Inventory:
    """Return an inventory."""
    return Inventory.of(hives)
