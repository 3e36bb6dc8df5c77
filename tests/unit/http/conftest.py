from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.http.http_stage import Stage, http_stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    async with http_stage() as made:
        yield made
