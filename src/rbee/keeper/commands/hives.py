"""`rbee hives`: the machines."""

from __future__ import annotations

from typing import Annotated

import typer

from rbee.keeper.commands.infer import AsJson

app = typer.Typer(help="List and show hives.", no_args_is_help=True)


@app.command("list")
def list_hives(context: typer.Context, as_json: AsJson = False) -> None:
    """List the hives the queen knows."""
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table, size

    screen, hives = read(context.obj.settings(), lambda client: client.hives())
    if as_json:
        screen.json(hives)
        return
    show_table(
        ("hive", "state", "heartbeat", "workers", "devices", "memory free", "machine", "url"),
        [
            (
                hive.hive_id,
                hive.state,
                f"{hive.last_heartbeat_s:.0f} s ago",
                len(hive.workers),
                ", ".join(device.device for device in hive.devices),
                size(hive.machine.memory_free_bytes),
                hive.machine.hostname,
                hive.url,
            )
            for hive in hives
        ],
    )


@app.command("show")
def show_hive(
    context: typer.Context,
    hive_id: Annotated[str, typer.Argument(metavar="HIVE", help="The hive's id.")],
    as_json: AsJson = False,
) -> None:
    """Show one hive with its devices and why one of them is not used, its models and workers."""
    from rbee.errors import NotFoundError
    from rbee.keeper.hive_tables import devices_table, hive_fields
    from rbee.keeper.reading import read
    from rbee.keeper.tables import show_table

    screen, hives = read(context.obj.settings(), lambda client: client.hives())
    found = next((hive for hive in hives if hive.hive_id == hive_id), None)
    if found is None:
        raise NotFoundError(f"The queen knows no hive {hive_id}.", remedy="See `rbee hives list`.")
    if as_json:
        screen.json(found)
        return
    show_table(("field", "value"), hive_fields(found))
    print()
    show_table(*devices_table(found))
