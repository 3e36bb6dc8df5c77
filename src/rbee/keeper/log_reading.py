"""Read the log of a worker or hive: the pages that are there, or everything as it comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from rbee.client import JobClient
from rbee.contracts.views import Page
from rbee.errors import GoneError
from rbee.keeper.answering import client_of
from rbee.keeper.exit_codes import EXIT_FINE
from rbee.keeper.render import Screen
from rbee.keeper.running import unless_stopped
from rbee.keeper.settings import KeeperSettings
from rbee.narration.lines import format_bracket


async def show_log(
    settings: KeeperSettings,
    url: str,
    kind: str,
    log_id: str,
    screen: Screen,
    stop: asyncio.Event,
    *,
    is_followed: bool,
) -> int:
    """Write a log on stdout; `kind` is `workers` or `hives`.

    Raises:
        RbeeError: The log cannot be read.
        OutputClosed: Nobody reads stdout any more.
    """
    path = f"/v1/{kind}/{quote(log_id, safe='')}"

    async def copy() -> int:
        async with client_of(settings, url, screen) as client:
            entries = client.follow_log(f"{path}/stream") if is_followed else _pages(client, f"{path}/events")
            async with aclosing(entries) as events:
                async for event in events:
                    screen.log_entry(event, entry_text(event))
        return EXIT_FINE

    return await unless_stopped(stop, copy())


async def _pages(client: JobClient, path: str) -> AsyncGenerator[dict[str, Any], None]:
    """Yield the events a log holds now."""
    after: str | None = "0"
    while after is not None:
        page = await client.get_json(f"{path}?after={after}", Page[dict[str, Any]])
        for event in page.data:
            yield event
        after = page.next


async def last_placement(client: JobClient, job_id: str) -> str | None:
    """Return the sentence that told where a job was placed last, and why; None where none is kept."""
    found = None
    try:
        async with aclosing(_pages(client, f"/v1/jobs/{quote(job_id, safe='')}/events")) as events:
            async for event in events:
                if event.get("action") == "queen_forward":
                    found = str(event.get("message"))
    except GoneError:  # `store: false`, and it has ended
        return None
    return found


def entry_text(event: dict[str, Any]) -> str:
    """Return an entry of such a log as a person reads it."""
    kind = event.get("kind")
    if kind == "narration":
        return format_bracket(event)
    if kind in ("raw", "token"):
        return str(event.get("text", ""))
    if kind == "gap":
        return f"({event.get('lost_lines', 0)} lines, {event.get('lost_bytes', 0)} bytes are missing here)"
    return " ".join(str(event[name]) for name in ("kind", "state", "reason", "message") if event.get(name))
