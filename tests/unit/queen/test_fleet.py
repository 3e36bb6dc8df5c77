from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from rbee.contracts.heartbeats import DeviceInfo
from rbee.contracts.ids import new_id
from rbee.contracts.model_settings import ModelTable
from rbee.queen import inventory
from rbee.queen.crash_loops import CrashLoops
from rbee.queen.decisions import Start, Wanted
from rbee.queen.fleet import Fleet
from rbee.queen.inventory import Kind
from rbee.queen.scheduler import place
from rbee.queen.settings import QueenSettings
from tests.unit.queen.queen_stage import GIB, MODEL, heartbeat, parts, worker_info


async def test_worker_that_tells_nothing_of_its_memory_makes_room_on_the_gpu_that_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine takes that fetches its models itself is not known; what is used of its GPU is."""
    monkeypatch.setattr(inventory, "GRACE_S", 0.0)
    worker_id = new_id("worker")
    gpu = DeviceInfo(device="cuda:0", name="x", memory_bytes=24 * GIB, memory_free_bytes=2 * GIB)
    filling = msgspec.structs.replace(worker_info(worker_id, model="hf:org/large"), device="cuda:0")
    beat = msgspec.structs.replace(heartbeat(filling, free=0, models={MODEL: 8 * GIB}), devices=[gpu])
    async with parts() as stage:
        fleet = Fleet(QueenSettings(home=tmp_path), ModelTable(), stage.book, stage.workers, CrashLoops())
        stage.book.beat(stage.hive_id, beat)
        found = fleet.inventory()
        start = place(Wanted(Kind(MODEL)), found, stage.book.now())

    assert [worker.memory_bytes for worker in found.hives[stage.hive_id].workers] == [22 * GIB]
    assert isinstance(start, Start)
    assert ([worker.worker_id for worker in start.evict], start.room) == ([worker_id], "cuda:0")
