"""What placement decides on: every hive as it is at one moment, and what is looked up often, found quickly."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from msgspec import Struct

from rbee.contracts.heartbeats import ModelInfo, Purpose

CPU = "cpu"
ANY_ENGINE = ""
# A worker that has answered nothing yet is not thrown out before so many idle seconds are over.
GRACE_S = 30.0


class Kind(NamedTuple):
    """What has to be the same for a worker to answer a job; `ANY_ENGINE` where the engine need not be."""

    model: str
    purpose: Purpose = "generate"
    engine: str = "llama_cpp"


class WorkerSpot(Struct, frozen=True, kw_only=True):
    """A worker as placement sees it.

    Attributes:
        device: Where it is.
        is_draining: Nothing more is placed on it.
        memory_bytes: What it takes; 0 where it is not known.
        idle_since: Since when it has had nothing to do, while it has nothing to do.
        has_answered: It has answered a job since it was started.
        is_kept: It is never stopped for another model.
        has_prefill: It goes on with an answer that another one has begun.
    """

    worker_id: str
    kind: Kind
    is_ready: bool
    slots: int
    slots_used: int
    device: str = CPU
    is_draining: bool = False
    memory_bytes: int = 0
    idle_since: float = 0.0
    has_answered: bool = True
    is_kept: bool = False
    has_prefill: bool = True

    def may_go(self, now: float) -> bool:
        """Tell whether it may be stopped now to make room: it is idle, and has been of use or idle for long."""
        return self.could_go and not self.slots_used and (self.has_answered or now - self.idle_since >= GRACE_S)

    @property
    def could_go(self) -> bool:
        """Whether it may be stopped to make room once it is idle."""
        return self.is_ready and not self.is_draining and not self.is_kept


class StartSpot(Struct, frozen=True, kw_only=True):
    """A worker that a queen is having started, and which its hive does not list yet."""

    worker_id: str
    kind: Kind
    device: str
    memory_bytes: int


class DeviceSpot(Struct, frozen=True, kw_only=True):
    """A device, with what its hive says of its memory; `note` says why it cannot be used."""

    device: str
    memory_bytes: int
    memory_free_bytes: int
    is_usable: bool = True
    note: str = ""


class HiveSpot(Struct, frozen=True, kw_only=True):
    """A hive as placement sees it; times are seconds of one clock.

    Attributes:
        live_until: When its lease ends unless it is heard again.
        models: The models on its disk.
        workers: Its workers, also those that are being stopped: they take memory until they are gone.
        refused: Models that failed to start here too often, and until when they are not started.
    """

    hive_id: str
    heard_at: float
    live_until: float
    devices: tuple[DeviceSpot, ...]
    models: Mapping[str, ModelInfo]
    workers: tuple[WorkerSpot, ...] = ()
    starts: tuple[StartSpot, ...] = ()
    engines: tuple[str, ...] = ("llama_cpp",)
    workers_max: int | None = None
    refused: Mapping[str, float] = {}

    @property
    def places_left(self) -> int:
        """How many more workers it takes by its own limit."""
        count = len(self.workers) + len(self.starts)
        return 2**31 if self.workers_max is None else self.workers_max - count


class Room(Struct, frozen=True, kw_only=True):
    """What is left of a device.

    Attributes:
        free_bytes: What nothing takes or is about to take; below 0 where more is about to be taken than there is.
        idle_bytes: What its idle workers take that may be stopped, or nearly may.
        movable_bytes: What all workers take that are not kept, and starts.
        is_uncertain: What one of them takes is not known.
        idle_since: Since when that worker of its hive has been idle which has been so longest and is not kept.
    """

    hive_id: str
    device: str
    free_bytes: int
    idle_bytes: int
    movable_bytes: int
    is_uncertain: bool
    idle_since: float | None

    @property
    def is_gpu(self) -> bool:
        """Whether it is more than a processor."""
        return self.device != CPU


class Serving(Struct, frozen=True):
    """The workers of one kind, each with its hive: with a free slot (the least busy first), full, and loading."""

    free: tuple[tuple[int, str, str], ...] = ()
    full: tuple[tuple[str, str], ...] = ()
    loading: tuple[tuple[str, str], ...] = ()


class Inventory:
    """All hives at one moment. It never changes: `with_hives` returns another one.

    Attributes:
        hives: By id.
        rooms: The devices that can be used, by hive.
        gpus: (free bytes, hive, index of the room) of all that are more than a processor, those with least first.
        cpus: The same of processors.
        open_gpus: Those of `gpus` whose hive takes another worker.
        open_cpus: The same of processors.
        serving: The workers that may be placed on, by kind, and by kind with `ANY_ENGINE`.
        starts: The workers that are being started, each with its hive.
        holders: Which hives have a model on disk, and what they know of it.
    """

    __slots__ = ("cpus", "gpus", "hives", "holders", "open_cpus", "open_gpus", "rooms", "serving", "starts")

    def __init__(self) -> None:
        self.hives: dict[str, HiveSpot] = {}
        self.rooms: dict[str, tuple[Room, ...]] = {}
        self.gpus: list[tuple[int, str, int]] = []
        self.cpus: list[tuple[int, str, int]] = []
        self.open_gpus: list[tuple[int, str, int]] = []
        self.open_cpus: list[tuple[int, str, int]] = []
        self.serving: dict[Kind, Serving] = {}
        self.starts: tuple[tuple[str, StartSpot], ...] = ()
        self.holders: dict[str, dict[str, ModelInfo]] = {}

    @classmethod
    def of(cls, hives: Iterable[HiveSpot]) -> Inventory:
        """Make the inventory of these hives."""
        return cls().with_hives(hives)

    def with_hives(self, hives: Iterable[HiveSpot]) -> Inventory:
        """Return the inventory in which these hives are as given, and all others as before."""
        after = Inventory()
        after.hives, after.rooms = dict(self.hives), dict(self.rooms)
        after.gpus, after.cpus = list(self.gpus), list(self.cpus)
        after.open_gpus, after.open_cpus = list(self.open_gpus), list(self.open_cpus)
        after.serving, after.holders = dict(self.serving), dict(self.holders)
        after.starts = self.starts
        for hive in hives:
            after._replace(after.hives.get(hive.hive_id), hive)
        return after

    def facts(self, model: str) -> ModelInfo | None:
        """Return what is known of a model's file, from whichever hive has it; the one that read its header."""
        held = self.holders.get(model)
        if not held:
            return None
        return next((info for info in held.values() if info.memory is not None), next(iter(held.values())))

    def worker(self, hive_id: str, worker_id: str) -> WorkerSpot:
        """Return a worker."""
        return next(worker for worker in self.hives[hive_id].workers if worker.worker_id == worker_id)

    def _replace(self, before: HiveSpot | None, after: HiveSpot) -> None:
        hive_id = after.hive_id
        self.hives[hive_id] = after
        for index, room in enumerate(self.rooms.get(hive_id, ())):
            for ranked in self._ranked(room, before):
                del ranked[bisect_left(ranked, (room.free_bytes, hive_id, index))]
        rooms = self.rooms[hive_id] = rooms_of(after)
        for index, room in enumerate(rooms):
            for ranked in self._ranked(room, after):
                insort(ranked, (room.free_bytes, hive_id, index))
        self._replace_workers(before.workers if before else (), after)
        if after.starts or (before is not None and before.starts):
            others = [(other, start) for other, start in self.starts if other != hive_id]
            self.starts = (*others, *((hive_id, start) for start in after.starts))
        if before is None or before.models != after.models:
            self._replace_models(before.models if before else {}, after)

    def _ranked(self, room: Room, hive: HiveSpot | None) -> tuple[list[tuple[int, str, int]], ...]:
        """Return the lists that a room of a hive stands in."""
        every, of_open = (self.gpus, self.open_gpus) if room.is_gpu else (self.cpus, self.open_cpus)
        return (every, of_open) if hive is not None and hive.places_left > 0 else (every,)

    def _replace_workers(self, before: tuple[WorkerSpot, ...], after: HiveSpot) -> None:
        gone, come = set(before) - set(after.workers), set(after.workers) - set(before)
        for kind in {kind for worker in gone | come for kind in _served(worker)}:
            left = [worker for worker in gone if kind in _served(worker) and not worker.is_draining]
            new = [worker for worker in come if kind in _served(worker) and not worker.is_draining]
            self.serving[kind] = _changed(self.serving.get(kind, Serving()), after.hive_id, left, new)
            if self.serving[kind] == Serving():
                del self.serving[kind]

    def _replace_models(self, before: Mapping[str, ModelInfo], after: HiveSpot) -> None:
        for model in before.keys() - after.models.keys():
            self.holders[model] = {
                hive_id: info for hive_id, info in self.holders[model].items() if hive_id != after.hive_id
            }
            if not self.holders[model]:
                del self.holders[model]
        for model, info in after.models.items():
            if before.get(model) != info:
                self.holders[model] = {**self.holders.get(model, {}), after.hive_id: info}


def _served(worker: WorkerSpot) -> tuple[Kind, Kind]:
    return worker.kind, worker.kind._replace(engine=ANY_ENGINE)


def _changed(serving: Serving, hive_id: str, gone: Iterable[WorkerSpot], come: Iterable[WorkerSpot]) -> Serving:
    free, full, loading = list(serving.free), list(serving.full), list(serving.loading)
    for worker in gone:
        ranked: list[Any] = _list_of(worker, free, full, loading)
        del ranked[bisect_left(ranked, _entry(worker, hive_id))]
    for worker in come:
        insort(_list_of(worker, free, full, loading), _entry(worker, hive_id))
    return Serving(tuple(free), tuple(full), tuple(loading))


def _list_of(worker: WorkerSpot, free: list[Any], full: list[Any], loading: list[Any]) -> list[Any]:
    if not worker.is_ready:
        return loading
    return free if worker.slots_used < worker.slots else full


def _entry(worker: WorkerSpot, hive_id: str) -> tuple[Any, ...]:
    is_free = worker.is_ready and worker.slots_used < worker.slots
    return (worker.slots_used, worker.worker_id, hive_id) if is_free else (worker.worker_id, hive_id)


def rooms_of(hive: HiveSpot) -> tuple[Room, ...]:
    """Return what is left of each device of a hive that can be used."""
    return tuple(_room(hive, device) for device in hive.devices if device.is_usable)


def _room(hive: HiveSpot, device: DeviceSpot) -> Room:
    """Reckon what is left: what the hive measured, less what is loading; and never more than the rest of it all.

    What a worker has mapped from its file is counted by the kernel as free, though it is needed: so what all
    workers were estimated to take is taken off the whole as well.
    """
    here = [worker for worker in hive.workers if worker.device == device.device]
    starts = [start.memory_bytes for start in hive.starts if start.device == device.device]
    loading = sum(worker.memory_bytes for worker in here if not worker.is_ready) + sum(starts)
    taken = sum(worker.memory_bytes for worker in here) + sum(starts)
    movable = [worker for worker in here if not worker.is_kept]
    return Room(
        hive_id=hive.hive_id,
        device=device.device,
        free_bytes=min(device.memory_free_bytes - loading, device.memory_bytes - taken),
        idle_bytes=sum(one.memory_bytes for one in here if one.could_go and not one.slots_used),
        movable_bytes=sum(worker.memory_bytes for worker in movable) + sum(starts),
        is_uncertain=any(not worker.memory_bytes for worker in movable),
        idle_since=min(
            (one.idle_since for one in hive.workers if one.could_go and not one.slots_used), default=None
        ),
    )
