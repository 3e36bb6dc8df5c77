"""Which workers have to go so that another model fits: the fewest, and of those the least recently used."""

from __future__ import annotations

from collections.abc import Sequence

from rbee.queen.inventory import WorkerSpot


def fewest(
    workers: Sequence[WorkerSpot], device: str, *, missing_bytes: int, missing_places: int
) -> tuple[WorkerSpot, ...] | None:
    """Return the smallest set of workers that sets enough free, preferring those that come first.

    Args:
        workers: Those that may go, of one hive, in the order in which they should.
        device: Where memory is missing.
        missing_bytes: How much of it.
        missing_places: How many workers too many the hive would have.

    Returns:
        The set, in order of preference; None where not even all of them are enough.
    """
    sizes = [worker.memory_bytes if worker.device == device else 0 for worker in workers]
    count = _fewest(sizes, missing_bytes, missing_places)
    if count is None:
        return None
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(_next(sizes, chosen, count, missing_bytes))
    return tuple(workers[index] for index in sorted(chosen))


def _fewest(sizes: Sequence[int], missing_bytes: int, missing_places: int) -> int | None:
    """Return how many have to go at least, the largest first."""
    freed = 0
    for count, size in enumerate((0, *sorted(sizes, reverse=True))):
        freed += size
        if freed >= missing_bytes and count >= missing_places:
            return count
    return None


def _next(sizes: Sequence[int], chosen: Sequence[int], count: int, missing_bytes: int) -> int:
    """Return the first worker with which `count` of them are still enough."""
    freed = sum(sizes[index] for index in chosen)
    left = [index for index in range(len(sizes)) if index not in chosen]
    for index in left:
        others = sorted((sizes[other] for other in left if other != index), reverse=True)
        if freed + sizes[index] + sum(others[: count - len(chosen) - 1]) >= missing_bytes:
            return index
    raise AssertionError("the largest ones are enough")
