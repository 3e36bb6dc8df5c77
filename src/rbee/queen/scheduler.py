"""Where a job goes: pure functions from an immutable inventory to a decision with its reason in a sentence."""

from __future__ import annotations

from msgspec import Struct

# What a model needs besides its file: context, buffers and the program itself.
MEMORY_FACTOR = 1.2
MEMORY_BASE_BYTES = 256 * 1024 * 1024


class WorkerSpot(Struct, frozen=True):
    """A worker as placement sees it."""

    worker_id: str
    model: str
    is_ready: bool
    slots: int
    slots_used: int


class HiveSpot(Struct, frozen=True):
    """A hive as placement sees it; memory in bytes.

    Attributes:
        is_live: Its lease holds.
        model_sizes: The models on its disk, and how large they are.
        starting: Models a worker is being started for.
        refused: Models that failed to start here too often, and are not started now.
    """

    hive_id: str
    is_live: bool
    silent_s: float
    memory_free_bytes: int
    model_sizes: dict[str, int]
    starting: frozenset[str]
    workers: tuple[WorkerSpot, ...]
    refused: frozenset[str] = frozenset()


class Use(Struct, frozen=True):
    """Take a slot of this worker."""

    hive_id: str
    worker_id: str
    why: str


class Start(Struct, frozen=True):
    """Start a worker on this hive."""

    hive_id: str
    why: str


class Wait(Struct, frozen=True):
    """Nothing can be done now; `why` says what for.

    Attributes:
        needs_hive: Nothing that runs can change it: a hive has to come (back), or memory has to become free.
    """

    why: str
    needs_hive: bool = False


class Refuse(Struct, frozen=True):
    """It cannot be started: its workers failed again and again, on every hive that could take it."""

    hive_id: str


Decision = Use | Start | Wait | Refuse


def place(model: str, hives: tuple[HiveSpot, ...], *, hive_id: str | None = None) -> Decision:
    """Decide where a job for `model` goes.

    A ready worker with a free slot is taken, the emptiest first. Else a worker that is being started, or is
    full, is waited for: on a processor a model has one worker. Else a live hive with the memory for it starts
    one, hives that have the file before hives that do not, then by free memory. A model that failed too often on
    each of them is refused.

    Args:
        model: The model's reference.
        hives: All hives this queen knows.
        hive_id: Only this hive will do.
    """
    wanted = [hive for hive in hives if hive_id is None or hive.hive_id == hive_id]
    live = [hive for hive in wanted if hive.is_live]
    if not live:
        return Wait(why_no_hive(wanted), needs_hive=True)
    serving = [(hive, worker) for hive in live for worker in hive.workers if worker.model == model]
    free = [pair for pair in serving if pair[1].is_ready and pair[1].slots_used < pair[1].slots]
    if free:
        hive, worker = min(free, key=lambda pair: (pair[1].slots_used, pair[1].worker_id))
        left = worker.slots - worker.slots_used
        return Use(
            hive.hive_id,
            worker.worker_id,
            f"{worker.worker_id} has {model} loaded and {left} of {worker.slots} slots free",
        )
    if serving:
        worker = serving[0][1]
        if worker.is_ready:
            if worker.slots == 1:
                return Wait(f"the one slot of {worker.worker_id} is taken")
            return Wait(f"all {worker.slots} slots of {worker.worker_id} are taken")
        return Wait(f"{worker.worker_id} is loading {model}")
    if any(model in hive.starting for hive in live):
        return Wait(f"a worker for {model} is being started")
    fitting = [hive for hive in live if _fits(hive, model)]
    if not fitting:
        is_busy = any(hive.workers or hive.starting for hive in live)
        return Wait("; ".join(_why_not(hive, model) for hive in live), needs_hive=not is_busy)
    willing = [hive for hive in fitting if model not in hive.refused]
    if not willing:
        return Refuse(fitting[0].hive_id)
    best = max(willing, key=lambda hive: (model in hive.model_sizes, _free_bytes(hive), hive.hive_id))
    return Start(best.hive_id, f"no worker has {model} loaded, and {best.hive_id} has the memory for it")


def can_take(model: str, hives: tuple[HiveSpot, ...], *, without: str) -> bool:
    """Tell whether a job for `model` has anywhere to go besides one hive."""
    others = tuple(hive for hive in hives if hive.hive_id != without)
    decision = place(model, others)
    return isinstance(decision, (Use, Start)) or (isinstance(decision, Wait) and not decision.needs_hive)


def memory_needed_bytes(file_bytes: int) -> int:
    """Return about how much memory a worker takes for a model file of this size."""
    return int(file_bytes * MEMORY_FACTOR) + MEMORY_BASE_BYTES


def why_no_hive(hives: list[HiveSpot]) -> str:
    """Say, hive by hive, why none can be reached."""
    if not hives:
        return "no hive has registered with this queen"
    return "; ".join(f"{hive.hive_id} has been silent for {hive.silent_s:.0f} s" for hive in hives)


def _fits(hive: HiveSpot, model: str) -> bool:
    size = hive.model_sizes.get(model)
    return size is None or memory_needed_bytes(size) <= _free_bytes(hive)


def _free_bytes(hive: HiveSpot) -> int:
    """Return the memory that is free, less what the workers that are being started will take of it."""
    taken = (memory_needed_bytes(hive.model_sizes.get(model, 0)) for model in hive.starting)
    return max(0, hive.memory_free_bytes - sum(taken))


def _why_not(hive: HiveSpot, model: str) -> str:
    needed = memory_needed_bytes(hive.model_sizes[model])
    return (
        f"{hive.hive_id} has {_free_bytes(hive) // 2**20} MiB of memory free, "
        f"and {model} needs {needed // 2**20} MiB"
    )
