"""How long a registry keeps jobs that have ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping

from msgspec import Struct

from rbee.errors import StorageError, UnavailableError
from rbee.jobs.records import Held
from rbee.jobs.registry import JobRegistry
from rbee.narration import narrate

LOOK_S = 60.0
DAY_S = 86_400.0


class Limits(Struct, frozen=True, kw_only=True):
    """How much is kept; past any of these, the jobs that ended before all others are forgotten.

    Attributes:
        days: For how long after its end a job is kept, and after its beginning the log of a worker that has gone.
        jobs: How many jobs that have ended.
        size_bytes: How much of the disk all that the registry keeps may use.
    """

    days: float = 30.0
    jobs: int = 1_000_000
    size_bytes: int = 2 * 1024**3

    def reason(self, held: Held, now: float) -> str | None:
        """Say why the job that ended first is to be forgotten at `now`; None when it is kept."""
        if held.ended_at <= now - self.days * DAY_S:
            return "days"
        if held.ended_jobs > self.jobs:
            return "jobs"
        return "bytes" if held.used_bytes > self.size_bytes else None


class Retention:
    """Forgets jobs of a registry that are past its limits.

    Args:
        registry: The registry.
        limits: What it keeps.
        actor: Who tells of it, first word of `<actor>_forget`.
    """

    def __init__(self, registry: JobRegistry, limits: Limits, *, actor: str) -> None:
        self._registry = registry
        self._limits = limits
        self._actor = actor

    async def run(self) -> None:
        """Forget what is due, now and every `LOOK_S` seconds, until cancelled."""
        while True:
            try:
                await self.forget()
            except (StorageError, UnavailableError) as error:
                narrate(f"{self._actor}_forget_later", f"Jobs cannot be forgotten now: {error}", level="warning")
            await asyncio.sleep(LOOK_S)

    async def forget(self) -> Mapping[str, int]:
        """Forget what is due now, leaving other writes as much time as it takes.

        Returns:
            How many jobs were forgotten, by the limit that was passed.

        Raises:
            StorageError: The disk refuses; what was forgotten until then is told and stays forgotten.
        """
        loop = asyncio.get_running_loop()
        forgotten: Counter[str] = Counter()
        try:
            while True:
                began_at = loop.time()
                found = await self._registry.store.forget(self._reason)
                forgotten.update(found.jobs)
                is_more = found.is_more or await self._forget_logs()
                if not is_more:
                    return forgotten
                await asyncio.sleep(loop.time() - began_at)
        finally:
            if forgotten:
                why = dict(forgotten)
                narrate(f"{self._actor}_forget", self._sentence(why), jobs=forgotten.total(), why=why)

    async def _forget_logs(self) -> bool:
        before = self._registry.now() - self._limits.days * DAY_S
        return await self._registry.store.forget_logs(before)

    def _reason(self, held: Held) -> str | None:
        return self._limits.reason(held, self._registry.now())

    def _sentence(self, forgotten: Mapping[str, int]) -> str:
        limits = self._limits
        why = {
            "days": f"ended more than {limits.days:g} days ago",
            "jobs": f"were beyond the {limits.jobs} that are kept",
            "bytes": f"were beyond the {limits.size_bytes / 2**20:.0f} MiB that are kept",
        }
        told = ", ".join(f"{count} that {why[name]}" for name, count in forgotten.items())
        return f"Forgot jobs: {told}."
