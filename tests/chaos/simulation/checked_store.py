"""The production store, with an eye on every transition that goes through it."""

from __future__ import annotations

from pathlib import Path

from rbee.contracts.states import TRANSITIONS
from rbee.errors import ConflictError
from rbee.jobs.records import Changed, JobRecord
from rbee.jobs.sqlite_store import SqliteStore
from rbee.jobs.store import Decide


class CheckedStore(SqliteStore):
    """Refuses to commit what the life of a job does not have, and tells of it.

    Attributes:
        faults: What was wrong.
        refused: How many transitions the deciders refused.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(path)
        self.faults: list[str] = []
        self.refused = 0

    async def change(self, job_id: str, decide: Decide) -> JobRecord:
        """See `SqliteStore.change`."""

        def watched(before: JobRecord) -> Changed:
            try:
                changed = decide(before)
            except ConflictError:
                self.refused += 1
                raise
            self._look(before, changed)
            return changed

        return await super().change(job_id, watched)

    def _look(self, before: JobRecord, changed: Changed) -> None:
        after = changed.record
        if before.is_ended and (after != before or changed.events):
            self.faults.append(f"{before.job_id} was changed after its end")
        if after.state is not before.state and after.state not in TRANSITIONS[before.state]:
            self.faults.append(f"{before.job_id} went from {before.state} to {after.state}")
        if after.attempt < before.attempt:
            self.faults.append(f"{before.job_id} went back from attempt {before.attempt} to {after.attempt}")
