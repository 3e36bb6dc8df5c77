"""The pytest plugin: fixtures `rbee_models` (the demo model, on disk once) and `rbee_stack` (real programs)."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rbee_models() -> Path:
    """Return a directory of model files with the demo model in it, downloaded at most once.

    `RBEE_TEST_MODELS` names the directory; by default it is in the user's cache.
    """
    import platformdirs

    from rbee.contracts.models import DEFAULT_MODEL
    from rbee.hive.models import ModelStore

    named = os.environ.get("RBEE_TEST_MODELS")
    directory = Path(named) if named else platformdirs.user_cache_path("rbee") / "test-models"
    store = ModelStore(directory)
    if store.find(DEFAULT_MODEL) is None:
        asyncio.run(store.pull(DEFAULT_MODEL))
    return directory


@pytest.fixture
async def rbee_stack(rbee_models: Path) -> AsyncIterator[object]:
    """Give a queen and a hive of the installed programs, in a home of their own."""
    from rbee.testing.stack import LocalStack

    async with LocalStack(models=rbee_models) as stack:
        yield stack
