"""`rbee down`: stop what runs in this home."""

from __future__ import annotations

import typer


def down(context: typer.Context) -> None:
    """Stop queen, hive and workers of this home, and return when nothing of them is left."""
    import asyncio

    from rbee.contracts.home import Home
    from rbee.keeper.render import Screen
    from rbee.keeper.stopping import stop_home

    settings = context.obj.settings()
    raise typer.Exit(asyncio.run(stop_home(Home.at(settings.home), Screen())))
