"""Where the demo model lies for the benchmarks: once on disk, shared with the tests."""

from __future__ import annotations

import os
from pathlib import Path

from rbee.contracts.models import DEFAULT_MODEL
from rbee.hive.models import ModelStore


async def models_directory() -> Path:
    """Return a directory of model files with the demo model in it, downloaded at most once.

    `RBEE_TEST_MODELS` names the directory; by default it is `.cache/models` of the checkout.
    """
    named = os.environ.get("RBEE_TEST_MODELS")
    directory = Path(named) if named else Path(__file__).parent.parent / ".cache" / "models"
    store = ModelStore(directory)
    if store.find(DEFAULT_MODEL) is None:
        await store.pull(DEFAULT_MODEL)
    return directory
