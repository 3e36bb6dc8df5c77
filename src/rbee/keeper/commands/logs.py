"""`rbee logs`: what a worker or hive said of no job, the engine's own chatter included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import asyncio


def logs(
    context: typer.Context,
    worker: Annotated[str | None, typer.Option(metavar="ID", help="The log of this worker.")] = None,
    hive: Annotated[str | None, typer.Option(metavar="ID", help="The log of this hive.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is said from now on.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Each event as one JSON line.")] = False,
) -> None:
    """Show the log of a worker or hive on stdout."""
    from rbee.errors import InvalidRequestError
    from rbee.keeper.local_stack import require_queen
    from rbee.keeper.log_reading import show_log
    from rbee.keeper.render import Screen
    from rbee.keeper.running import run_stoppable

    if (worker is None) == (hive is None):
        raise InvalidRequestError("Name one log: --worker ID or --hive ID.", remedy="See `rbee workers list`.")
    settings = context.obj.settings()
    url = require_queen(settings)
    kind, log_id = ("workers", worker) if worker is not None else ("hives", hive)
    assert log_id is not None

    async def main(stop: asyncio.Event) -> int:
        return await show_log(settings, url, kind, log_id, Screen(as_json=as_json), stop, is_followed=follow)

    raise typer.Exit(run_stoppable(main))
