"""Where a job goes: pure functions from an immutable inventory to a decision with its reason in a sentence.

In this order:

1. **Reuse**: a ready worker of the model and purpose (and engine, where the model's settings name one) with a free
   slot, the least busy first.
2. **Wait** for a worker of it that is loading.
3. **Another worker** where all of them are full: once a job has waited `ADD_AFTER_S` for a slot, on a GPU or on
   another hive, where there is room without stopping anything. On one processor a model has one worker, unless its
   settings give `workers_max`, which then is the most it has anywhere.
4. **Start** one: on a GPU before a processor, on a hive that has the file before one that does not, then where
   most memory is free. Where all slots that are wanted do not fit, with as many as do.
5. **Evict**: idle workers are stopped for it, the fewest that are enough, the least recently used first. None is
   stopped while there is room on a device of the same sort, and none for a second worker of a model.
6. **Wait**, with the reason of each hive. What a job that has waited for long needs is kept for it (`Claim`).
"""

from __future__ import annotations

from typing import Any

from rbee.queen.decisions import NOTHING_CLOSED, Closed, Decision, Refuse, Start, Use, Wait, Wanted
from rbee.queen.inventory import Inventory, Serving
from rbee.queen.look import Look
from rbee.queen.reasons import why_full, why_no_hive, why_no_room
from rbee.queen.rooms import Rooms

ADD_AFTER_S = 5.0
CLAIM_AFTER_S = 10.0


def place(
    wanted: Wanted,
    inventory: Inventory,
    now: float,
    *,
    waited_s: float = 0.0,
    closed: Closed = NOTHING_CLOSED,
    without: str | None = None,
) -> Decision:
    """Decide where a job goes.

    Args:
        wanted: What it needs.
        inventory: All hives this queen knows.
        now: The time, by the clock of the inventory's times.
        waited_s: How long it has waited for its place.
        closed: What is kept for jobs whose turn is earlier.
        without: A hive that will not do.
    """
    look = Look(wanted, inventory, now, closed, without)
    if not any(look.is_live(hive) for hive in look.hives()):
        return Wait(why_no_hive(list(look.hives()), now), needs_hive=True)
    return (None if wanted.is_another else _among(look, waited_s)) or _anew(look, waited_s)


def can_take(wanted: Wanted, inventory: Inventory, now: float, *, without: str) -> bool:
    """Tell whether a job has anywhere to go besides one hive."""
    decision = place(wanted, inventory, now, without=without)
    return isinstance(decision, (Use, Start)) or (isinstance(decision, Wait) and not decision.needs_hive)


def _among(look: Look, waited_s: float) -> Decision | None:
    """Decide by the workers of the kind that there are; None where there are none."""
    serving = look.inventory.serving.get(look.wanted.served_by, Serving())
    if look.wanted.goes_on:
        serving = _going_on(look, serving)
    model = look.wanted.model
    for slots_used, worker_id, hive_id in serving.free:
        if look.is_open(worker_id, hive_id):
            slots = look.inventory.worker(hive_id, worker_id).slots
            left = f"{slots - slots_used} of {slots} slots free"
            return Use(hive_id, worker_id, f"{worker_id} has {model} loaded and {left}")
    for worker_id, hive_id in serving.loading:
        if look.is_meant(hive_id):
            return Wait(f"{worker_id} is loading {model}")
    for hive_id, start in look.inventory.starts:
        if start.kind == look.wanted.kind and look.is_meant(hive_id):
            return Wait(f"a worker for {model} is being started")
    full = [entry for entry in serving.full if look.is_open(*entry)]
    if not full:
        return None
    worker_id, hive_id = full[0]
    why = why_full(look.inventory.worker(hive_id, worker_id), len(full))
    start_another = waited_s >= ADD_AFTER_S and len(full) < (look.wanted.workers_max or 2**31)
    return (Rooms(look).another(why) if start_another else None) or Wait(why)


def _going_on(look: Look, serving: Serving) -> Serving:
    """Leave out the workers that would begin an answer anew, where there are others."""

    def goes_on(entry: tuple[Any, ...]) -> bool:
        worker_id, hive_id = entry[-2:]
        return look.is_meant(hive_id) and look.inventory.worker(hive_id, worker_id).has_prefill

    free, full = tuple(filter(goes_on, serving.free)), tuple(filter(goes_on, serving.full))
    kept = Serving(free, full, tuple(filter(goes_on, serving.loading)))
    return serving if kept == Serving() else kept


def _anew(look: Look, waited_s: float) -> Decision:
    """Decide where a worker is started."""
    rooms = Rooms(look)
    start = rooms.start()
    if start is not None:
        return start
    could_ever = rooms.could_ever()
    if not could_ever:
        refused = rooms.start(is_refused=True)
        if refused is not None:
            return Refuse(refused.hive_id)
    claim = rooms.claim() if could_ever and waited_s >= CLAIM_AFTER_S else None
    return Wait(why_no_room(look), needs_hive=not could_ever, claim=claim)
