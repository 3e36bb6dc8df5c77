"""One look at an inventory for one job: which hives and devices come into question at all."""

from __future__ import annotations

from collections.abc import Iterator

from rbee.queen.decisions import Closed, Wanted
from rbee.queen.fit import Need, need_of
from rbee.queen.inventory import CPU, HiveSpot, Inventory, Room


class Look:
    """What is wanted, what there is, and when.

    Args:
        wanted: What a job needs.
        inventory: All hives.
        now: The time, by the clock of the inventory's times.
        closed: What is kept for jobs whose turn is earlier.
        without: A hive that will not do.
    """

    def __init__(
        self, wanted: Wanted, inventory: Inventory, now: float, closed: Closed, without: str | None
    ) -> None:
        self.wanted = wanted
        self.inventory = inventory
        self.now = now
        self.closed = closed
        self._without = without
        self.holders = inventory.holders.get(wanted.model, {})
        self.need: Need = need_of(
            wanted.model,
            inventory.facts(wanted.model),
            slots=wanted.slots,
            context_tokens=wanted.context_tokens,
            slots_min=wanted.slots_min,
            purpose=wanted.kind.purpose,
        )

    def hives(self) -> Iterator[HiveSpot]:
        """Return the hives that would do, live or not."""
        named = self.wanted.hive_id
        if named is not None:
            found = self.inventory.hives.get(named)
            hives: Iterator[HiveSpot] = iter(() if found is None else (found,))
        else:
            hives = iter(self.inventory.hives.values())
        return hives if self._without is None else (hive for hive in hives if hive.hive_id != self._without)

    def is_live(self, hive: HiveSpot) -> bool:
        """Tell whether a hive's lease holds."""
        return self.now < hive.live_until

    def is_meant(self, hive_id: str) -> bool:
        """Tell whether a hive would do, and is live."""
        named = self.wanted.hive_id
        would_do = hive_id != self._without and (named is None or hive_id == named)
        return would_do and self.is_live(self.inventory.hives[hive_id])

    def is_open(self, worker_id: str, hive_id: str) -> bool:
        """Tell whether a worker may be placed on."""
        return worker_id not in self.closed.worker_ids and self.is_meant(hive_id)

    def is_suitable(self, room: Room, *, is_refused: bool = False) -> bool:
        """Tell whether a worker could run on a device, if there were memory.

        Args:
            room: What is left of the device.
            is_refused: Also where the model failed to start too often.
        """
        hive, wanted = self.inventory.hives[room.hive_id], self.wanted
        return (
            self.is_meant(room.hive_id)
            and wanted.device in (None, room.device)
            and wanted.kind.engine in hive.engines
            and (is_refused or hive.refused.get(wanted.model, 0.0) <= self.now)
        )

    def admits(self, room: Room, *, is_refused: bool = False) -> bool:
        """Tell whether a worker may be started on a device now, if there is memory."""
        return (
            self.is_suitable(room, is_refused=is_refused)
            and (room.hive_id, room.device) not in self.closed.rooms
            and (room.is_gpu or not self.is_second(self.inventory.hives[room.hive_id]))
        )

    def is_second(self, hive: HiveSpot) -> bool:
        """Tell whether a worker on a hive's processor would be a second one that nobody asked for."""
        if self.wanted.workers_max is not None or self.wanted.is_another:
            return False
        kind = self.wanted.kind
        return any(one.kind == kind and one.device == CPU and not one.is_draining for one in hive.workers)
