"""Requests of older attempts that a lost hive may still be answering: stopped as soon as it is back."""

from __future__ import annotations

from rbee.contracts.states import HiveState
from rbee.errors import RbeeError
from rbee.queen.hives import HiveBook
from rbee.queen.worker_api import Heard, WorkerApi
from rbee.queen.workers import Placement, WorkerBook

LOOK_S = 1.0


class OldRequests:
    """Stops what nobody waits for any more. Until then it takes its slot."""

    def __init__(self, book: HiveBook, workers: WorkerBook, worker_api: WorkerApi) -> None:
        self._book = book
        self._workers = workers
        self._worker_api = worker_api

    async def run(self) -> None:
        """Stop them until cancelled."""
        while True:
            for placement in self._workers.superseded():
                await self._stop(placement)
            await self._book.changed(LOOK_S)

    async def _stop(self, placement: Placement) -> None:
        try:
            if self._book.state_of(self._book.hive(placement.hive_id)) is not HiveState.LIVE:
                return
            self._book.worker(placement.worker_id, placement.hive_id)
        except RbeeError:  # the hive is not known, or is back without the worker
            is_gone = any(hive.hive_id == placement.hive_id for hive in self._book.hives())
        else:
            is_gone = await self._worker_api.stop(placement, "") is not Heard.NOTHING
        if is_gone:
            self._workers.forget_superseded(placement)
