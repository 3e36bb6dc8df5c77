"""What a model needs of a device, and what a device has: pure arithmetic, in bytes."""

from __future__ import annotations

from msgspec import Struct

from rbee.contracts.heartbeats import ModelInfo, ModelMemory, Purpose
from rbee.contracts.models import KNOWN_MODELS

# What a model whose header nobody has read yet is taken to need besides its file.
MEMORY_FACTOR = 1.2
MEMORY_BASE_BYTES = 256 * 1024 * 1024
MIB = 1024 * 1024


class Need(Struct, frozen=True):
    """What a worker of a model takes.

    Attributes:
        base_bytes: What it takes however little it is asked.
        slot_bytes: What each slot takes besides; 0 where that is not known.
        slots: How many slots are wanted.
        slots_min: With how many it is worth starting.
        context_tokens: Tokens of one request.
        is_known: Somebody knows how large the model is.
    """

    base_bytes: int
    slot_bytes: int
    slots: int
    slots_min: int
    context_tokens: int
    is_known: bool = True

    @property
    def wanted_bytes(self) -> int:
        """What it takes with all slots that are wanted."""
        return self.bytes_of(self.slots)

    @property
    def least_bytes(self) -> int:
        """What it takes with as few slots as may be."""
        return self.bytes_of(self.slots_min)

    def bytes_of(self, slots: int) -> int:
        """Return what it takes with so many slots."""
        return self.base_bytes + self.slot_bytes * slots

    def slots_in(self, free_bytes: int) -> int:
        """Return how many slots fit, at most those that are wanted; 0 where not even the fewest do."""
        if free_bytes >= self.wanted_bytes:
            return self.slots
        if free_bytes < self.least_bytes or not self.slot_bytes:
            return 0
        return (free_bytes - self.base_bytes) // self.slot_bytes


def need_of(
    model: str,
    info: ModelInfo | None,
    *,
    slots: int,
    context_tokens: int,
    slots_min: int = 1,
    purpose: Purpose = "generate",
) -> Need:
    """Return what a worker needs, by the file's header, else by the file's size.

    Args:
        model: The model's reference.
        info: What any hive knows of its file; without it, a model with a short name is as large as its release.
        slots: How many slots are wanted.
        context_tokens: Tokens of one request; no more than the model was trained for are ever given.
        slots_min: With how many slots it is worth starting.
        purpose: What the worker is for.
    """
    context_tokens = min(context_tokens, (info.context_tokens if info else None) or context_tokens)
    if info is not None and info.memory is not None:
        memory = info.memory
        base_bytes = memory.needed_bytes(context_tokens, 0, purpose)
        slot_bytes = memory.needed_bytes(context_tokens, 1, purpose) - base_bytes
        return Need(base_bytes, slot_bytes, slots, slots_min, context_tokens)
    known = KNOWN_MODELS.get(model)
    size_bytes = info.size_bytes if info is not None else known.size_bytes if known is not None else None
    is_known = size_bytes is not None
    return Need(by_size(size_bytes or 0), 0, slots, slots_min, context_tokens, is_known)


def by_size(file_bytes: int) -> int:
    """Return about how much memory a worker takes for a model file of this size."""
    return int(file_bytes * MEMORY_FACTOR) + MEMORY_BASE_BYTES


def taken_bytes(
    memory: ModelMemory | None,
    size_bytes: int | None,
    *,
    slots: int,
    context_tokens: int,
    purpose: Purpose = "generate",
) -> int:
    """Return about what a worker takes whose hive does not say it; 0 where nothing is known."""
    if memory is not None:
        return memory.needed_bytes(context_tokens, slots, purpose)
    return 0 if size_bytes is None else by_size(size_bytes)
