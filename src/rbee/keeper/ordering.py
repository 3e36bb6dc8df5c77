"""Submit operations that are no question to a model, and draw their logs: pull, rm, spawn, stop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from rbee.client import JobClient
from rbee.contracts.operations import Operation
from rbee.errors import RbeeError
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
    """Run an operation to its end and return the exit code (see `order_all`)."""
    return order_all(settings, name, [fields], starts_stack=starts_stack, quiet=quiet, as_json=as_json)


def order_all(
    settings: KeeperSettings,
    name: str,
    wishes: Sequence[Mapping[str, Any]],
    *,
    starts_stack: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Run operations of one name beside each other to their ends, and return the worst exit code.

    One that is refused or fails does not hold up the others.

    Args:
        wishes: The fields of each operation.
        starts_stack: Start queen and hive where none runs.

    Raises:
        RbeeError: A value that the operation does not take, or the queen cannot be had.
    """
    operations = [operation(name, **fields) for fields in wishes]
    screen = Screen(quiet=quiet, as_json=as_json)

    async def main(stop: asyncio.Event) -> int:
        if starts_stack:
            url = await unless_stopped(stop, ensure_queen(settings, screen))
        else:
            url = require_queen(settings)
        async with client_of(settings, url, screen) as client:
            return max(await asyncio.gather(*(_ask_one(client, each, screen, stop) for each in operations)))

    return run_stoppable(main)


async def _ask_one(client: JobClient, wanted: Operation, screen: Screen, stop: asyncio.Event) -> int:
    try:
        return await ask(client, wanted, screen, stop)
    except RbeeError as error:
        screen.error(error)
        return error.exit_code
