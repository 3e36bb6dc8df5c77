"""`rbee status`: the queen at a glance."""

from __future__ import annotations

import typer

from rbee.keeper.commands.infer import AsJson


def status(context: typer.Context, as_json: AsJson = False) -> None:
    """Show the queen and her hives."""
    from rbee.client import JobClient
    from rbee.contracts.views import HiveView, Status
    from rbee.keeper.reading import read
    from rbee.keeper.tables import ago, show_table

    async def both(client: JobClient) -> tuple[Status, list[HiveView]]:
        return await client.status(), await client.hives()

    screen, (queen, hives) = read(context.obj.settings(), both)
    if as_json:
        screen.json({"queen": queen, "hives": hives})
        return
    rows = [
        ("queen", queen.url),
        ("OpenAI base URL", f"{queen.url}/v1"),
        ("version", queen.version),
        ("up for", ago(queen.started_at)),
        ("hives", queen.hives),
        ("workers", queen.workers),
        ("jobs queued", queen.queued),
        ("jobs running", queen.running),
    ]
    show_table(("what", "value"), rows)
    screen.print("")
    show_table(
        ("hive", "state", "workers", "models", "machine"),
        [(hive.hive_id, hive.state, len(hive.workers), len(hive.models), hive.machine.hostname) for hive in hives],
    )
