"""Ask the queen one thing and have the answer: for commands that only read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from rbee.client import JobClient
from rbee.keeper.answering import client_of
from rbee.keeper.local_stack import require_queen
from rbee.keeper.render import Screen
from rbee.keeper.settings import KeeperSettings

T = TypeVar("T")


def read(settings: KeeperSettings, question: Callable[[JobClient], Awaitable[T]]) -> tuple[Screen, T]:
    """Ask the queen that runs; return a screen to draw on, and her answer. Starts nothing.

    Raises:
        UnavailableError: None runs, or she cannot be reached.
        RbeeError: What she refused with.
    """
    url = require_queen(settings)
    screen = Screen()

    async def main() -> T:
        async with client_of(settings, url, screen) as client:
            return await question(client)

    return screen, asyncio.run(main())
