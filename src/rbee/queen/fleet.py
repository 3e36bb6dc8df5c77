"""The inventory that placement decides on, kept up to date one hive at a time."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from rbee.contracts.heartbeats import DeviceInfo, ModelInfo, WorkerInfo
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.states import WorkerState
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.fit import taken_bytes
from rbee.queen.hives import Hive, HiveBook
from rbee.queen.inventory import CPU, DeviceSpot, HiveSpot, Inventory, Kind, StartSpot, WorkerSpot
from rbee.queen.settings import QueenSettings
from rbee.queen.workers import WorkerBook

THERE = frozenset({WorkerState.STARTING, WorkerState.READY, WorkerState.DRAINING})


class Fleet:
    """Puts together what the hives say, what this queen has placed, and what she is having started.

    One event loop owns it. A heartbeat is taken in when it comes, a change of slots when the inventory is wanted.
    """

    def __init__(
        self,
        settings: QueenSettings,
        models: ModelTable,
        book: HiveBook,
        workers: WorkerBook,
        crash_loops: CrashLoops,
    ) -> None:
        self._settings = settings
        self._models = models
        self._book = book
        self._workers = workers
        self._crash_loops = crash_loops
        self._inventory = Inventory()
        self._changed: dict[str, None] = {}
        self._starts: dict[str, dict[str, StartSpot]] = {}
        self._hive_of: dict[str, str] = {}
        self._slots_used: dict[str, int] = {}
        self._idle_since: dict[str, float] = {}
        self._answered: set[str] = set()
        book.listen(self._heard)
        workers.listen(self._placed)

    def inventory(self) -> Inventory:
        """Return every hive as it is now, with this queen's own placements and starts."""
        if self._changed:
            changed, self._changed = self._changed, {}
            self._inventory = self._inventory.with_hives(self._spot(self._book.hive(one)) for one in changed)
        return self._inventory

    def add_start(self, hive_id: str, start: StartSpot) -> None:
        """Take note of a worker that is being started."""
        self._starts.setdefault(hive_id, {})[start.worker_id] = start
        self._changed[hive_id] = None

    def remove_start(self, hive_id: str, worker_id: str) -> None:
        """Take note that a start has ended, well or not."""
        self._starts.get(hive_id, {}).pop(worker_id, None)
        self._changed[hive_id] = None

    def spare(self, worker_id: str) -> None:
        """Have a worker that could not be stopped left alone for a while, as if it had just been started."""
        if worker_id in self._hive_of:
            self._answered.discard(worker_id)
            self._idle_since[worker_id] = self._book.now()
            self._note(worker_id)

    def _heard(self, hive_id: str) -> None:
        self._changed[hive_id] = None
        self.inventory()

    def _note(self, worker_id: str) -> None:
        hive_id = self._hive_of.get(worker_id)
        if hive_id is not None:
            self._changed[hive_id] = None

    def _placed(self, worker_id: str) -> None:
        if worker_id not in self._hive_of:
            return  # it is gone, or was not heard of yet
        slots_used = self._workers.slots_used(worker_id)
        before = self._slots_used.get(worker_id, 0)
        if slots_used < before:
            self._answered.add(worker_id)
        if slots_used != before:
            self._slots_used[worker_id] = slots_used
            self._idle_since[worker_id] = self._book.now()
        self._note(worker_id)

    def _spot(self, hive: Hive) -> HiveSpot:
        beat = hive.heartbeat
        models = {info.model: info for info in beat.models}
        default = next((one.device for one in beat.devices if one.is_usable and one.device != CPU), CPU)
        there = [one.info for one in self._book.workers_of(hive) if one.info.state in THERE]
        self._forget_others(hive.hive_id, there)
        listed = {info.worker_id for info in there}
        now = self._book.now()
        devices = _devices(hive)
        workers = tuple(self._worker(hive.hive_id, info, models, default, now) for info in there)
        return HiveSpot(
            hive_id=hive.hive_id,
            heard_at=hive.heard_at,
            live_until=self._book.live_until(hive),
            devices=devices,
            models=models,
            workers=_with_shares(workers, devices),
            starts=tuple(
                start for start in self._starts.get(hive.hive_id, {}).values() if start.worker_id not in listed
            ),
            engines=beat.engines,
            workers_max=beat.workers_max,
            refused={
                model: now + refusal.left_s for model, refusal in self._crash_loops.refused(hive.hive_id).items()
            },
        )

    def _worker(
        self, hive_id: str, info: WorkerInfo, models: Mapping[str, ModelInfo], default: str, now: float
    ) -> WorkerSpot:
        worker_id = info.worker_id
        is_ready = info.state is WorkerState.READY
        self._hive_of[worker_id] = hive_id
        self._slots_used.setdefault(worker_id, self._workers.slots_used(worker_id))
        if not is_ready or worker_id not in self._idle_since:
            self._idle_since[worker_id] = now
        settings = self._models.of(info.model)
        return WorkerSpot(
            worker_id=worker_id,
            kind=Kind(info.model, info.purpose, info.engine),
            is_ready=is_ready,
            slots=info.slots,
            slots_used=self._workers.slots_used(worker_id),
            device=info.device or default,
            is_draining=info.state is WorkerState.DRAINING or self._workers.is_draining(worker_id),
            memory_bytes=info.memory_bytes or self._estimate(info, models),
            idle_since=self._idle_since[worker_id],
            has_answered=worker_id in self._answered,
            is_kept=settings.pinned or settings.preload,
            has_prefill=info.has_prefill,
        )

    def _estimate(self, info: WorkerInfo, models: Mapping[str, ModelInfo]) -> int:
        """Return about what a worker takes whose hive does not say it."""
        found = models.get(info.model) or self._inventory.facts(info.model)
        if found is None:
            return 0
        context_tokens = info.context_tokens or self._settings.context_tokens
        return taken_bytes(
            found.memory,
            found.size_bytes,
            slots=info.slots,
            context_tokens=context_tokens,
            purpose=info.purpose,
        )

    def _forget_others(self, hive_id: str, there: list[WorkerInfo]) -> None:
        """Forget the workers that were on a hive and no longer are."""
        before = self._inventory.hives.get(hive_id)
        kept = {info.worker_id for info in there}
        for worker in before.workers if before else ():
            if worker.worker_id not in kept:
                for known in (self._hive_of, self._slots_used, self._idle_since):
                    known.pop(worker.worker_id, None)
                self._answered.discard(worker.worker_id)


def _devices(hive: Hive) -> tuple[DeviceSpot, ...]:
    """Return a hive's devices; the memory of its processor is the machine's."""
    beat = hive.heartbeat
    found = {device.device: _device(device) for device in beat.devices}
    cpu = found.get(CPU)
    found[CPU] = DeviceSpot(
        device=CPU,
        memory_bytes=beat.machine.memory_bytes,
        memory_free_bytes=beat.machine.memory_free_bytes,
        is_usable=cpu is None or cpu.is_usable,
        note=cpu.note if cpu is not None else "",
    )
    return tuple(found.values())


def _with_shares(workers: tuple[WorkerSpot, ...], devices: tuple[DeviceSpot, ...]) -> tuple[WorkerSpot, ...]:
    """Take what of a GPU is used, and by nobody known, as taken by those of its workers that told nothing.

    Else they could not be stopped to make room: nobody would know that there is any.
    """
    shares: dict[str, int] = {}
    for spot in devices:
        here = [worker for worker in workers if worker.device == spot.device and worker.is_ready]
        unknown = sum(not worker.memory_bytes for worker in here)
        if unknown and spot.device != CPU:
            known_bytes = sum(worker.memory_bytes for worker in here)
            shares[spot.device] = max(0, spot.memory_bytes - spot.memory_free_bytes - known_bytes) // unknown
    return tuple(
        msgspec.structs.replace(worker, memory_bytes=shares.get(worker.device, 0))
        if worker.is_ready and not worker.memory_bytes
        else worker
        for worker in workers
    )


def _device(info: DeviceInfo) -> DeviceSpot:
    return DeviceSpot(
        device=info.device,
        memory_bytes=info.memory_bytes,
        memory_free_bytes=info.memory_free_bytes,
        is_usable=info.is_usable,
        note=info.note,
    )
