"""`rbee up`: run queen and hive on this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import asyncio


def up(
    context: typer.Context,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Run in the background.")] = False,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; anything but loopback needs RBEE_API_KEY.")
    ] = None,
    queen_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of the queen (8500 if it is free); 0 takes any.")
    ] = None,
    hive_port: Annotated[
        int | None, typer.Option(metavar="PORT", help="Port of the hive (9000 if it is free); 0 takes any.")
    ] = None,
    ready_file: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write {url, hive_url, pid} there once both are ready.")
    ] = None,
) -> None:
    """Run queen and hive until Ctrl-C or `rbee down`; the base URL for OpenAI clients goes to stdout."""
    from rbee.contracts.home import Home, write_ready_file
    from rbee.http.auth import require_key_off_loopback
    from rbee.keeper.local_stack import start_in_background
    from rbee.keeper.render import Screen
    from rbee.keeper.running import run_stoppable, unless_stopped
    from rbee.keeper.stack import run_stack

    settings = context.obj.settings(host=host, queen_port=queen_port, hive_port=hive_port)
    require_key_off_loopback(settings.host, settings.api_key)
    screen = Screen()

    async def in_foreground(stop: asyncio.Event) -> int:
        is_drawn = sys.stderr.isatty()
        return await run_stack(settings, screen, stop, ready_file=ready_file, is_drawn=is_drawn)

    async def in_background(stop: asyncio.Event) -> int:
        flags = {"--host": host, "--queen-port": queen_port, "--hive-port": hive_port}
        arguments = tuple(f"{flag}={value}" for flag, value in flags.items() if value is not None)
        ready = await unless_stopped(stop, start_in_background(Home.at(settings.home), screen, arguments))
        if ready_file is not None:
            write_ready_file(ready_file, ready)
        screen.print(f"{ready.url}/v1")
        return 0

    raise typer.Exit(run_stoppable(in_background) if detach else run_stoppable(in_foreground, is_patient=True))
