"""Why placement could not: the true reason of each hive, in words."""

from __future__ import annotations

from collections.abc import Sequence

from rbee.queen.fit import MIB
from rbee.queen.inventory import HiveSpot, Room, WorkerSpot
from rbee.queen.look import Look

TOLD_MAX = 8


def why_no_hive(hives: Sequence[HiveSpot], now: float) -> str:
    """Say, hive by hive, why none can be reached (of very many, not each)."""
    if not hives:
        return "no hive has registered with this queen"
    silent = [f"{hive.hive_id} has been silent for {now - hive.heard_at:.0f} s" for hive in hives[:TOLD_MAX]]
    return _listed(silent, len(hives))


def why_full(worker: WorkerSpot, count: int) -> str:
    """Say that all workers of a model are full, of which one is given."""
    if count > 1:
        return f"all slots of the {count} workers of {worker.kind.model} are taken"
    if worker.slots == 1:
        return f"the one slot of {worker.worker_id} is taken"
    return f"all {worker.slots} slots of {worker.worker_id} are taken"


def why_stopped(workers: Sequence[WorkerSpot], now: float) -> str:
    """Name workers that are stopped, and what they were."""
    return " and ".join(f"{worker.worker_id} ({what_it_was(worker, now)})" for worker in workers)


def what_it_was(worker: WorkerSpot, now: float) -> str:
    """Say of an idle worker what it has loaded, and for how long it has been idle."""
    return f"model {worker.kind.model}, idle for {now - worker.idle_since:.0f} s"


def why_no_room(look: Look) -> str:
    """Say, hive by hive, why no worker can be started there now."""
    hives = list(look.hives())
    return _listed([_why_not(look, hive) for hive in hives[:TOLD_MAX]], len(hives))


def _why_not(look: Look, hive: HiveSpot) -> str:
    wanted, name = look.wanted, hive.hive_id
    rooms = [room for room in look.inventory.rooms[name] if wanted.device in (None, room.device)]
    if not look.is_live(hive):
        return f"{name} has been silent for {look.now - hive.heard_at:.0f} s"
    if wanted.kind.engine not in hive.engines:
        return f"{name} does not have the engine {wanted.kind.engine}"
    if not rooms:
        return _why_no_device(hive, wanted.device)
    refused_until = hive.refused.get(wanted.model, 0.0)
    if refused_until > look.now:
        left_s = refused_until - look.now
        return f"{wanted.model} failed to start on {name} too often, and is tried again in {left_s:.0f} s"
    if hive.places_left <= 0:
        return f"{name} runs {_counted(hive)}, as many as it may{_why_they_stay(look, hive)}"
    if all((name, room.device) in look.closed.rooms for room in rooms):
        return f"what becomes free on {name} is for a job that has waited longer"
    most = max(rooms, key=lambda room: room.free_bytes)
    if most.free_bytes >= look.need.least_bytes:
        return f"{name} has a worker of {wanted.model} already"
    return _why_no_memory(look, hive, most)


def _why_no_memory(look: Look, hive: HiveSpot, most: Room) -> str:
    on = f" on {most.device}" if most.is_gpu else ""
    slots = "" if look.need.slots_min == look.need.slots or not look.need.slot_bytes else " even for one slot"
    return (
        f"{hive.hive_id} has {max(0, most.free_bytes) // MIB} MiB of memory free{on}, "
        f"and {look.wanted.model} needs {look.need.least_bytes // MIB} MiB{slots}{_why_they_stay(look, hive)}"
    )


def _why_no_device(hive: HiveSpot, device: str | None) -> str:
    unusable = [spot for spot in hive.devices if not spot.is_usable and device in (None, spot.device)]
    if unusable:
        note = f": {unusable[0].note.rstrip('.')}" if unusable[0].note else ""
        return f"{hive.hive_id} cannot use {unusable[0].device}{note}"
    return f"{hive.hive_id} has no device {device}" if device else f"{hive.hive_id} has no device to run models on"


def _counted(hive: HiveSpot) -> str:
    count = len(hive.workers) + len(hive.starts)
    return "1 worker" if count == 1 else f"{count} workers"


def _why_they_stay(look: Look, hive: HiveSpot) -> str:
    """Say why a hive's workers are not stopped to make room; nothing where there are none."""
    counts = {
        "answering": sum(bool(worker.slots_used) and not worker.is_draining for worker in hive.workers),
        "starting": sum(not worker.is_ready and not worker.is_draining for worker in hive.workers)
        + len(hive.starts),
        "being stopped": sum(worker.is_draining for worker in hive.workers),
        "kept": sum(worker.is_kept and not worker.slots_used for worker in hive.workers),
        "just started": sum(_is_fresh(look, worker) for worker in hive.workers),
    }
    told = [f"{count} {word}" for word, count in counts.items() if count]
    return f" (workers there: {', '.join(told)})" if told else ""


def _is_fresh(look: Look, worker: WorkerSpot) -> bool:
    return worker.could_go and not worker.slots_used and not worker.may_go(look.now)


def _listed(reasons: list[str], count: int) -> str:
    """Put the reasons of hives together; of very many, only how many more there are."""
    told = "; ".join(reasons[:TOLD_MAX])
    return told if count <= TOLD_MAX else f"{told}; and {count - TOLD_MAX} more hives cannot either"
