from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.queen.queen_stage import Parts, parts
from tests.unit.queen.scripted_hive import Queen, queen_of


@pytest.fixture
async def queen() -> AsyncIterator[Parts]:
    async with parts() as made:
        yield made


@pytest.fixture
async def whole_queen(tmp_path: Path) -> AsyncIterator[Queen]:
    async with queen_of(tmp_path) as made:
        yield made
