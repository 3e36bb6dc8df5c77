"""What `rbee hives show` lays out."""

from __future__ import annotations

from rbee.contracts.heartbeats import MachineInfo
from rbee.contracts.states import HiveState, WorkerState
from rbee.contracts.views import HiveView, WorkerView
from rbee.keeper.hive_tables import hive_fields

MACHINE = MachineInfo(hostname="h", cpus=2, memory_bytes=4, memory_free_bytes=2, disk_free_bytes=1)


def _worker(worker_id: str, purpose: str) -> WorkerView:
    return WorkerView(
        worker_id=worker_id,
        hive_id="hive",
        model="m",
        state=WorkerState.READY,
        purpose=purpose,
        slots=4,
        slots_used=0,
        pid=1,
    )


def test_two_workers_of_a_model_are_told_apart_by_what_they_are_for() -> None:
    """One that embeds looks like one that answers, but for that."""
    hive = HiveView(
        hive_id="hive",
        state=HiveState.LIVE,
        url="http://127.0.0.1:1",
        version="1",
        machine=MACHINE,
        devices=[],
        models=[],
        workers=[_worker("a", "generate"), _worker("b", "embed")],
        last_heartbeat_s=0.5,
    )
    told = [value for name, value in hive_fields(hive) if name == "worker"]
    assert told == ["a: m to generate, ready", "b: m to embed, ready"]
