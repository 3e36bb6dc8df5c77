"""Models that are to be loaded before anybody asks: a wish that placement tries to satisfy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from rbee.contracts.model_settings import ModelTable
from rbee.contracts.operations import WorkerSpawn
from rbee.contracts.states import JobState
from rbee.queen.decisions import Start, Wanted
from rbee.queen.hives import HiveBook
from rbee.queen.inventory import Inventory
from rbee.queen.scheduler import place

SETTLE_S = 3.0
LOOK_S = 1.0
BACK_OFF_S = 5.0
BACK_OFF_S_MAX = 300.0

Spawn = Callable[[WorkerSpawn], Awaitable[JobState | None]]
"""Runs a `worker_spawn` as a job of the queen's own; returns how it ended, None where it was not accepted."""


class Preloads:
    """Has a worker started for each model that is configured so, as soon as a hive can take it.

    Nothing is done where a worker is there, or is being started; one that has ended is started again. No busy
    worker is stopped for it. What fails is tried again after 5 s, then after twice as long each time, up to 5 min.
    """

    def __init__(
        self,
        models: ModelTable,
        book: HiveBook,
        wanted: Callable[[str], Wanted],
        inventory: Callable[[], Inventory],
        spawn: Spawn,
    ) -> None:
        self._models = [name for name, settings in models.models.items() if settings.preload]
        self._book = book
        self._wanted = wanted
        self._inventory = inventory
        self._spawn = spawn
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    async def run(self) -> None:
        """Start what is missing until cancelled; hives have a moment to say what they run."""
        await asyncio.sleep(SETTLE_S)
        async with asyncio.TaskGroup() as group:
            for model in self._models:
                group.create_task(self._keep(model))

    async def _keep(self, model: str) -> None:
        """Start what is missing of one model; however long that takes, the others do not wait for it."""
        while True:
            spawn = self.missing(model)
            if spawn is not None:
                self._note(model, await self._spawn(spawn))
            await asyncio.sleep(LOOK_S)  # not at each heartbeat: of a thousand hives there are many

    def missing(self, model: str) -> WorkerSpawn | None:
        """Return what is to be started for a model now; None where it is there, or there is no room for it."""
        now = self._book.now()
        wanted = self._wanted(model)
        decision = place(wanted, self._inventory(), now)
        if now < self._not_before.get(model, 0.0) or not isinstance(decision, Start):
            return None
        return WorkerSpawn(
            model=model,
            engine=wanted.kind.engine,
            purpose=wanted.kind.purpose,
            slots=decision.slots,
            context_tokens=decision.context_tokens,
            device=wanted.device,
        )

    def _note(self, model: str, state: JobState | None) -> None:
        """Take note of how a start ended."""
        if state is JobState.COMPLETED:
            self._failures.pop(model, None)
            return
        failures = self._failures[model] = self._failures.get(model, 0) + 1
        back_off_s = min(BACK_OFF_S_MAX, BACK_OFF_S * 2.0 ** min(failures - 1, 10))
        self._not_before[model] = self._book.now() + back_off_s
