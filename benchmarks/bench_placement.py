"""Placement in a large fleet: how long one decision takes, and what is decided, while jobs come and go."""

from __future__ import annotations

import random
import sys
import time
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import msgspec
from msgspec import Struct

from benchmarks.report import Row, main, percentile
from rbee.contracts.heartbeats import ModelInfo, ModelMemory
from rbee.queen.decisions import Decision, Start, Use, Wanted
from rbee.queen.inventory import DeviceSpot, HiveSpot, Inventory, Kind, StartSpot, WorkerSpot
from rbee.queen.round import Round

TITLE = "Placement over a fleet: CPU time of one decision, by the inventory of all hives"

GIB = 2**30
MODELS = 200
# As many as may wait in a queen, by default.
WAITING = 512
# How many of them are loaded at first.
LOADED = 100
ZIPF = 1.1
SLOTS = 4
# How often the models that are asked for most are other ones, in all.
SHIFTS = 20
WANTED_US = 1000.0
# The share of workers that are unloaded when they have nothing to do.
UNLOADED = 0.05
# The share of all slots that is taken.
LOAD = 0.5


class Size(Struct, frozen=True):
    """How large the fleet is, and how many jobs come."""

    hives: int
    workers_each: int
    jobs: int


SMALL = Size(hives=20, workers_each=5, jobs=400)
LARGE = Size(hives=1_000, workers_each=10, jobs=30_000)


class Fleet:
    """Hives of a CPU or a GPU, each with so many workers, of the more popular models.

    What was decided is done: slots are taken, workers stopped and started; some that are idle are unloaded. Every
    change makes the next inventory, as in a queen. Which models are asked for most changes all the time.
    """

    def __init__(self, size: Size, chance: random.Random) -> None:
        self.now = 1000.0
        self.size = size
        self.chance = chance
        self.weights = list(accumulate(1 / rank**ZIPF for rank in range(1, MODELS + 1)))
        self.infos = {f"model-{number}": _info(f"model-{number}", chance) for number in range(MODELS)}
        self.running: list[tuple[str, str]] = []
        self.changes = 0
        self.shift = 0
        self.asked = LOADED
        self._started = 0
        self.inventory = Inventory.of(self._hive(number) for number in range(size.hives))

    def model(self) -> str:
        """Draw a model by its popularity."""
        rank = bisect(self.weights, self.chance.random() * self.weights[self.asked - 1])
        return f"model-{(rank + self.shift) % MODELS}"

    def _hive(self, number: int) -> HiveSpot:
        hive_id = f"hive-{number:04}"
        device = "cuda:0" if number % 2 else "cpu"
        total = 128 * GIB
        names = [f"worker-{number:04}-{index}" for index in range(self.size.workers_each)]
        workers = [self._worker(name, self.model(), device) for name in names]
        taken = sum(worker.memory_bytes for worker in workers)
        models = {worker.kind.model: self.infos[worker.kind.model] for worker in workers}
        return HiveSpot(
            hive_id=hive_id,
            heard_at=self.now,
            live_until=self.now + 1e9,
            devices=(DeviceSpot(device=device, memory_bytes=total, memory_free_bytes=total - taken),),
            models=models,
            workers=tuple(workers),
            workers_max=self.size.workers_each,
        )

    def _worker(self, worker_id: str, model: str, device: str) -> WorkerSpot:
        memory = self.infos[model].memory
        assert memory is not None
        return WorkerSpot(
            worker_id=worker_id,
            kind=Kind(model),
            is_ready=True,
            slots=SLOTS,
            slots_used=0,
            device=device,
            memory_bytes=memory.needed_bytes(4096, SLOTS),
            idle_since=self.now - self.chance.uniform(0, 600),
        )

    def follow(self, wanted: Wanted, decision: Decision) -> None:
        """Do what was decided; a worker that is started is ready at once, and the job is on it."""
        if isinstance(decision, Use):
            self._take(decision.hive_id, decision.worker_id)
        elif isinstance(decision, Start):
            gone = {worker.worker_id for worker in decision.evict}
            spot = self.inventory.hives[decision.hive_id]
            self._started += 1
            worker = self._worker(f"worker-new-{self._started}", wanted.model, decision.room)
            worker = msgspec.structs.replace(worker, memory_bytes=decision.memory_bytes, slots=decision.slots)
            left = tuple(one for one in spot.workers if one.worker_id not in gone)
            freed = sum(one.memory_bytes for one in spot.workers if one.worker_id in gone) - worker.memory_bytes
            [device] = spot.devices
            devices = (msgspec.structs.replace(device, memory_free_bytes=device.memory_free_bytes + freed),)
            models = {**spot.models, wanted.model: self.infos[wanted.model]}
            start = StartSpot(worker_id=worker.worker_id, kind=worker.kind, device=device.device, memory_bytes=0)
            self._change(msgspec.structs.replace(spot, workers=left, starts=(start,), models=models))
            self._change(msgspec.structs.replace(spot, workers=(*left, worker), devices=devices, models=models))
            self._take(decision.hive_id, worker.worker_id)

    def leave(self) -> None:
        """End some job."""
        index = self.chance.randrange(len(self.running))
        self.running[index], self.running[-1] = self.running[-1], self.running[index]
        hive_id, worker_id = self.running.pop()
        self._add(hive_id, worker_id, -1)
        worker = self.inventory.worker(hive_id, worker_id)
        if not worker.slots_used and self.chance.random() < UNLOADED:
            spot = self.inventory.hives[hive_id]
            [device] = spot.devices
            free_bytes = device.memory_free_bytes + worker.memory_bytes
            devices = (msgspec.structs.replace(device, memory_free_bytes=free_bytes),)
            left = tuple(one for one in spot.workers if one is not worker)
            self._change(msgspec.structs.replace(spot, workers=left, devices=devices))

    def _take(self, hive_id: str, worker_id: str) -> None:
        self._add(hive_id, worker_id, 1)
        self.running.append((hive_id, worker_id))

    def _add(self, hive_id: str, worker_id: str, count: int) -> None:
        spot = self.inventory.hives[hive_id]
        workers = tuple(
            msgspec.structs.replace(one, slots_used=one.slots_used + count, idle_since=self.now)
            if one.worker_id == worker_id
            else one
            for one in spot.workers
        )
        self._change(msgspec.structs.replace(spot, workers=workers))

    def _change(self, spot: HiveSpot) -> None:
        self.inventory = self.inventory.with_hives([spot])
        self.changes += 1


def _info(model: str, chance: random.Random) -> ModelInfo:
    weights = chance.choice((1, 2, 4, 8, 14)) * GIB
    memory = ModelMemory(weights_bytes=weights, cache_bytes_per_token=32 * 1024, work_bytes=GIB // 4)
    return ModelInfo(model=model, size_bytes=weights, path=f"/{model}", memory=memory)


def measure(is_small: bool) -> Sequence[Row]:
    """Let jobs come and go; ends the program with 1 when a worker was given more jobs than it has slots."""
    size = SMALL if is_small else LARGE
    fleet = Fleet(size, random.Random(1))
    running_max = int(size.hives * size.workers_each * SLOTS * LOAD)
    took: dict[str, list[float]] = {"reused": [], "started": [], "evicted": [], "waited": []}
    changed_s = 0.0
    while len(fleet.running) < running_max:  # until there is as much to do as there will be
        wanted = Wanted(Kind(fleet.model()))
        fleet.follow(wanted, Round(fleet.now).decide(wanted, 60.0, fleet.inventory))
        fleet.now += 0.001
    fleet.changes, fleet.asked = 0, MODELS
    for number in range(size.jobs):
        fleet.now += 0.01
        fleet.shift = number * SHIFTS // size.jobs
        wanted = Wanted(Kind(fleet.model()))
        began = time.process_time()
        decision = Round(fleet.now).decide(wanted, fleet.chance.choice((0.0, 6.0, 60.0)), fleet.inventory)
        decided = time.process_time()
        took[_sort(decision)].append((decided - began) * 1e6)
        fleet.follow(wanted, decision)
        while len(fleet.running) > running_max:
            fleet.leave()
        changed_s += time.process_time() - decided
    _check(fleet)
    return [
        *_rows(took, is_small),
        Row("a change of the inventory", f"{changed_s / fleet.changes * 1e6:,.0f} µs"),
        Row(f"a look at {WAITING} jobs that wait, the fleet full", f"{_look_ms(fleet):,.1f} ms"),
    ]


def _look_ms(fleet: Fleet) -> float:
    """Return how long one look at a full queue takes where every worker is busy."""
    full = [
        msgspec.structs.replace(
            spot, workers=tuple(msgspec.structs.replace(one, slots_used=one.slots) for one in spot.workers)
        )
        for spot in fleet.inventory.hives.values()
    ]
    inventory = fleet.inventory.with_hives(full)
    queue = [Wanted(Kind(fleet.model())) for _ in range(WAITING)]
    began = time.process_time()
    looking = Round(fleet.now)
    for wanted in queue:
        looking.decide(wanted, 60.0, inventory)
    return (time.process_time() - began) * 1e3


def _sort(decision: Decision) -> str:
    if isinstance(decision, Use):
        return "reused"
    if isinstance(decision, Start):
        return "evicted" if decision.evict else "started"
    return "waited"


def _rows(took: dict[str, list[float]], is_small: bool) -> list[Row]:
    every = [us for times in took.values() for us in times]
    wanted = "" if is_small else f"p99 < {WANTED_US:,.0f} µs"
    rows = [
        Row("decisions", f"{len(every) / (sum(every) / 1e6):,.0f}/s"),
        Row("one decision: p50 / p99 / max", _three(every), wanted=wanted),
    ]
    for sort, times in took.items():
        share = f"{100 * len(times) / len(every):.1f} %"
        rows.append(Row(f"{sort}: share, p50 / p99 / max", f"{share}, {_three(times)}" if times else share))
    return rows


def _three(times: Sequence[float]) -> str:
    return f"{percentile(times, 50):,.0f} / {percentile(times, 99):,.0f} / {max(times):,.0f} µs"


def _check(fleet: Fleet) -> None:
    wrong = Counter(
        spot.hive_id
        for spot in fleet.inventory.hives.values()
        for worker in spot.workers
        if not 0 <= worker.slots_used <= worker.slots
    )
    crowded = [spot.hive_id for spot in fleet.inventory.hives.values() if spot.places_left < 0]
    if wrong or crowded:
        sys.exit(f"More jobs than slots on {dict(wrong)}, or more workers than may be on {crowded}.")


if __name__ == "__main__":
    main(TITLE, measure)
