from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from tests.unit.queen.queen_stage import Parts, parts
from tests.unit.queen.scripted_hive import Queen, ScriptedHive, queen_of


@pytest.fixture
async def queen() -> AsyncIterator[Parts]:
    async with parts() as made:
        yield made


@pytest.fixture
async def whole_queen(tmp_path: Path) -> AsyncIterator[Queen]:
    async with queen_of(tmp_path) as made:
        yield made


@pytest.fixture
async def hive(whole_queen: Queen) -> ScriptedHive:
    """Give the queen a hive with one worker."""
    hive = await whole_queen.live_hive()
    hive.has_worker()
    return hive


@pytest.fixture
async def caller() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session
