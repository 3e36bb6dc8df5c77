"""Every store there is, one after the other: the next one is a line more in `STORES`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from rbee.jobs import JobRegistry
from rbee.jobs.sqlite_store import SqliteStore
from rbee.jobs.store import JobStore

QUEUED_MAX = 100
STORES: dict[str, Callable[[Path], JobStore]] = {
    "sqlite on disk": lambda directory: SqliteStore(directory / "jobs.db"),
    "sqlite in memory": lambda directory: SqliteStore(None),
}


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[JobStore]:
    """Return an empty store."""
    opened = STORES[request.param](tmp_path)
    yield opened
    await opened.close()


@pytest.fixture
async def registry(store: JobStore) -> JobRegistry:
    """Return a registry on an empty store: the hand that makes jobs, changes and ends them."""
    return JobRegistry(store, queued_max=QUEUED_MAX)
