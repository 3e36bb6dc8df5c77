"""How much of the disk models may use, and which of them make room for another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence

from rbee.contracts.models import ModelRef
from rbee.errors import DownloadFailedError
from rbee.hive.catalog import Catalog, LocalModel
from rbee.narration import narrate
from rbee.processes.locks import is_held


def models_to_evict(models: Sequence[LocalModel], spared: Collection[str], excess_bytes: int) -> list[LocalModel]:
    """Choose the models that go so that at least `excess_bytes` become free, the least recently used first. Pure.

    Args:
        models: What is on the disk.
        spared: References of models that stay.
        excess_bytes: How much has to go; nothing is chosen for 0 or less.

    Returns:
        The models to remove; empty where even all of them would not be enough.
    """
    chosen: list[LocalModel] = []
    freed = 0
    for model in sorted(models, key=lambda model: (model.used_at, model.ref)):
        if freed >= excess_bytes:
            break
        if model.ref not in spared:
            chosen.append(model)
            freed += model.size_bytes
    return chosen if freed >= excess_bytes else []


class Quota:
    """Sees that all models of a directory together use no more than they may.

    Args:
        catalog: The directory.
        max_bytes: What they may use; None for all there is.
        spared: Returns the models that are never removed.
        discard: Removes what a download left, unless it is under way.
        remove: Removes a model.
    """

    def __init__(
        self,
        catalog: Catalog,
        max_bytes: int | None,
        *,
        spared: Callable[[], Collection[str]],
        discard: Callable[[str], Awaitable[bool]],
        remove: Callable[[str], Awaitable[int]],
    ) -> None:
        self._catalog = catalog
        self._max_bytes = max_bytes
        self._spared = spared
        self._discard = discard
        self._remove = remove
        self._announced: dict[str, int] = {}
        self._turn = asyncio.Lock()

    def forget(self, ref: ModelRef) -> None:
        """Take note that a download has ended; what it brought is seen on the disk."""
        self._announced.pop(ref.text, None)

    async def make_room(self, ref: ModelRef, size_bytes: int) -> None:
        """Remove what was used least lately, so that a model of this size fits; parts of downloads go first.

        Raises:
            DownloadFailedError: It does not fit; the message names the numbers.
        """
        if self._max_bytes is None:
            return
        async with self._turn:
            self._announced[ref.text] = size_bytes
            models = self._catalog.models()
            spared = {*self._spared(), *self._announced, *(model.ref for model in models if self._is_held(model))}
            evictable = sum(model.size_bytes for model in models if model.ref not in spared)
            if self._excess_bytes(models, with_parts=False) - evictable > 0:
                self.forget(ref)
                raise self._refusal(ref, size_bytes, [model.ref for model in models if model.ref in spared])
            for kept in self._catalog.kept():
                if self._excess_bytes(models) > 0 and kept.ref not in self._announced:
                    await self._discard(kept.name)
            for model in models_to_evict(models, spared, self._excess_bytes(models)):
                await self._evict(model, ref)

    def _is_held(self, model: LocalModel) -> bool:
        """Tell whether somebody is just removing a model, or bringing another version of it."""
        return is_held(self._catalog.lock_directory() / model.path.parent.name)

    def _excess_bytes(self, models: Sequence[LocalModel], *, with_parts: bool = True) -> int:
        """Return by how much all would use more than they may: what is announced, here, and kept in part."""
        here = sum(model.size_bytes for model in models if model.ref not in self._announced)
        parts = [kept.size_bytes for kept in self._catalog.kept() if kept.ref not in self._announced]
        return sum(self._announced.values()) + here + (sum(parts) if with_parts else 0) - (self._max_bytes or 0)

    async def _evict(self, model: LocalModel, ref: ModelRef) -> None:
        size = f"{model.size_bytes / 1e6:.0f} MB"
        narrate(
            "hive_evict_model",
            f"Removing {model.ref} ({size}), of those not in use the longest unused, to make room for {ref.text}.",
            evicted=model.ref,
            freed_bytes=model.size_bytes,
        )
        await self._remove(model.ref)

    def _refusal(self, ref: ModelRef, size_bytes: int, staying: list[str]) -> DownloadFailedError:
        return DownloadFailedError(
            f"{ref.text} ({size_bytes / 1e6:.0f} MB) does not fit into the {(self._max_bytes or 0) / 1e6:.0f} MB "
            f"that models may use (models_max_bytes). These stay, in use, pinned or being downloaded: "
            f"{', '.join(sorted(staying)) or 'none'}.",
            remedy="Stop a worker (rbee workers stop), or raise models_max_bytes of the hive.",
        )
