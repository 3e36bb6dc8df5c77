"""Submit an operation that is no question to a model, and draw its log: pull, rm, spawn, stop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from rbee.keeper.answering import ask, client_of
from rbee.keeper.asking import operation
from rbee.keeper.local_stack import ensure_queen, require_queen
from rbee.keeper.render import Screen
from rbee.keeper.running import run_stoppable, unless_stopped
from rbee.keeper.settings import KeeperSettings


def order(
    settings: KeeperSettings,
    name: str,
    fields: Mapping[str, Any],
    *,
    starts_stack: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run an operation to its end and return the exit code.

    Args:
        starts_stack: Start queen and hive where none runs.

    Raises:
        RbeeError: It was refused, or the queen cannot be had.
    """
    wanted = operation(name, **fields)
    screen = Screen(quiet=quiet, as_json=as_json)

    async def main(stop: asyncio.Event) -> int:
        if starts_stack:
            url = await unless_stopped(stop, ensure_queen(settings, screen))
        else:
            url = require_queen(settings)
        async with client_of(settings, url, screen) as client:
            return await ask(client, wanted, screen, stop)

    return run_stoppable(main)
