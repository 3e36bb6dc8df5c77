"""Where a worker is started: in free memory, in that of idle workers, or later, in what busy ones leave."""

from __future__ import annotations

from collections.abc import Iterator

from rbee.queen.decisions import Claim, Start
from rbee.queen.eviction import fewest
from rbee.queen.inventory import Room, WorkerSpot
from rbee.queen.look import Look
from rbee.queen.reasons import why_stopped

# So many hives are compared for what would have to be stopped there.
COMPARED_MAX = 16
Ranked = list[tuple[int, str, int]]


class Rooms:
    """Finds room on devices, those that are more than a processor first."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._need = look.need
        self._inventory = look.inventory

    def start(self, *, is_refused: bool = False) -> Start | None:
        """Find where a worker is started; with `is_refused`, also where it failed to start too often."""
        why = f"no worker has {self._look.wanted.model} loaded"
        there = self._inventory
        for free, ranked in ((there.open_gpus, there.gpus), (there.open_cpus, there.cpus)):
            start = self._in_free(free, why, is_refused) or self._by_evicting(ranked, why, is_refused)
            if start is not None:
                return start
        return None

    def another(self, why: str) -> Start | None:
        """Find where there is room for one more worker of a model whose workers are full, as `why` says."""
        for free in (self._inventory.open_gpus, self._inventory.open_cpus):
            start = self._in_free(free, why, is_refused=False, is_additional=True)
            if start is not None:
                return start
        return None

    def could_ever(self) -> bool:
        """Tell whether there would be room if all ended that runs and is not kept."""
        return any(self._could(room) for rooms in self._inventory.rooms.values() for room in rooms)

    def claim(self) -> Claim | None:
        """Choose what is kept for the job: where the fewest answers have to end for it."""
        best: tuple[int, Claim] | None = None
        for room in self._claimable_rooms():
            leaving = self._fewest(room, self._leaving(room))
            if leaving:
                busy = sum(worker.slots_used for worker in leaving)
                if best is None or busy < best[0]:
                    best = busy, Claim(room.hive_id, room.device, tuple(worker.worker_id for worker in leaving))
        return best[1] if best else None

    # In free memory

    def _in_free(self, ranked: Ranked, why: str, is_refused: bool, *, is_additional: bool = False) -> Start | None:
        """Find room for all slots, else for as many as there is most room for."""
        for least_bytes in (self._need.wanted_bytes, self._need.least_bytes):
            room = self._roomiest(ranked, least_bytes, is_refused)
            if room is not None:
                has = "has the memory for it" if self._need.is_known else "has the most memory free"
                on = f" on {room.device}" if room.is_gpu else ""
                told = f"{why}, and {room.hive_id} {has}{on}"
                return self._started(room, room.free_bytes, told, is_additional=is_additional)
        return None

    def _roomiest(self, ranked: Ranked, least_bytes: int, is_refused: bool) -> Room | None:
        """Return the room with the most memory, where the model's file is if it is anywhere."""
        without_file: Room | None = None
        for free_bytes, hive_id, index in reversed(ranked):
            if free_bytes < least_bytes:
                break
            has_file = hive_id in self._look.holders
            if without_file is not None and not has_file:
                continue
            room = self._inventory.rooms[hive_id][index]
            if self._look.admits(room, is_refused=is_refused):
                if has_file:
                    return room
                without_file = room
        return without_file

    def _started(
        self,
        room: Room,
        free_bytes: int,
        why: str,
        *,
        evict: tuple[WorkerSpot, ...] = (),
        is_additional: bool = False,
    ) -> Start:
        slots = self._need.slots_in(free_bytes)
        if slots < self._need.slots:
            why += f", for {slots} of the {self._need.slots} slots that are wanted"
        if self._need.context_tokens < self._look.wanted.context_tokens:
            why += f", with {self._need.context_tokens} tokens of context, as many as it was made for"
        has_gpu = any(other.is_gpu for other in self._inventory.rooms[room.hive_id])
        return Start(
            hive_id=room.hive_id,
            why=why,
            room=room.device,
            device=room.device if has_gpu else self._look.wanted.device,
            slots=slots,
            context_tokens=self._need.context_tokens,
            memory_bytes=self._need.bytes_of(slots),
            evict=evict,
            is_additional=is_additional,
        )

    # In that of idle workers

    def _by_evicting(self, ranked: Ranked, why: str, is_refused: bool) -> Start | None:
        """Find where the fewest workers have to go, and of those the one where they have been idle longest."""
        best: tuple[bool, int] | None = None
        chosen: tuple[Room, tuple[WorkerSpot, ...]] | None = None
        compared = 0
        for without_file, room in self._evictable_rooms(ranked):
            evicted = (
                self._fewest(room, self._idle(room)) if self._look.admits(room, is_refused=is_refused) else None
            )
            if evicted and (best is None or (without_file, len(evicted)) < best):
                best, chosen = (without_file, len(evicted)), (room, evicted)
            compared += bool(evicted)
            if compared == COMPARED_MAX:
                break
        if chosen is None:
            return None
        room, evicted = chosen
        freed = sum(worker.memory_bytes for worker in evicted if worker.device == room.device)
        stopped = why_stopped(evicted, self._look.now)
        told = f"{why}, and {room.hive_id} makes room for it by stopping {stopped}"
        return self._started(room, room.free_bytes + freed, told, evict=evicted)

    def _evictable_rooms(self, ranked: Ranked) -> Iterator[tuple[bool, Room]]:
        """Return the rooms whose idle workers may be enough: those with the file first, then the longest idle."""
        least_bytes, holders, rooms = self._need.least_bytes, self._look.holders, self._inventory.rooms
        found = []
        for free_bytes, hive_id, index in ranked:
            room = rooms[hive_id][index]
            if room.idle_since is not None and free_bytes + room.idle_bytes >= least_bytes:
                found.append((hive_id not in holders, room.idle_since, hive_id, index))
        for without_file, _, hive_id, index in sorted(found):
            yield without_file, rooms[hive_id][index]

    def _idle(self, room: Room) -> list[WorkerSpot]:
        """Return the workers of a room's hive that may go, the least recently used first."""
        closed, now = self._look.closed.worker_ids, self._look.now
        workers = self._inventory.hives[room.hive_id].workers
        idle = [worker for worker in workers if worker.may_go(now) and worker.worker_id not in closed]
        return sorted(idle, key=lambda worker: (worker.idle_since, worker.worker_id))

    def _fewest(self, room: Room, workers: list[WorkerSpot]) -> tuple[WorkerSpot, ...] | None:
        return fewest(
            workers,
            room.device,
            missing_bytes=self._need.least_bytes - room.free_bytes,
            missing_places=1 - self._inventory.hives[room.hive_id].places_left,
        )

    # In what busy workers leave

    def _could(self, room: Room) -> bool:
        hive = self._inventory.hives[room.hive_id]
        if room.free_bytes + room.movable_bytes < self._need.least_bytes and not room.is_uncertain:
            return False
        kept = sum(worker.is_kept for worker in hive.workers)
        has_place = hive.workers_max is None or kept < hive.workers_max
        return has_place and self._look.is_suitable(room)

    def _claimable_rooms(self) -> Iterator[Room]:
        """Return some rooms that would do once their workers have gone, those with the most memory first."""
        found = 0
        for ranked in (self._inventory.gpus, self._inventory.cpus):
            for free_bytes, hive_id, index in reversed(ranked):
                room = self._inventory.rooms[hive_id][index]
                if free_bytes + room.movable_bytes >= self._need.least_bytes and self._look.admits(room):
                    yield room
                    found += 1
                    if found == COMPARED_MAX:
                        return

    def _leaving(self, room: Room) -> list[WorkerSpot]:
        """Return the workers of a room's hive that may go once they are idle, those first that soon are."""
        closed = self._look.closed.worker_ids
        workers = self._inventory.hives[room.hive_id].workers
        leaving = [
            worker
            for worker in workers
            if worker.could_go and worker.has_answered and worker.worker_id not in closed
        ]
        return sorted(leaving, key=lambda worker: (worker.slots_used, worker.idle_since, worker.worker_id))
