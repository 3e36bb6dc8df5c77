"""What a hive does when it starts after a death: stop strays, deliver what they and its earlier boots said.

As a program: `python -m tests.chaos.hive_life HOME QUEEN_URL HIVE_ID`; it ends when all is delivered and removed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import aiohttp

from rbee.contracts.engine_settings import EngineTable
from rbee.contracts.home import Home
from rbee.contracts.ids import new_boot_id
from rbee.hive.deliveries import Deliveries
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.hive.returning import Returning
from rbee.hive.service import open_narration_file
from rbee.hive.settings import HiveSettings
from rbee.hive.workers import Workers
from rbee.narration import FileSink, configure, narrate

LIMIT_S = 40.0


async def main(root: Path, queen_url: str, hive_id: str) -> None:
    """Deliver what is left."""
    home, boot_id = Home.at(root), new_boot_id()
    configure(actor="hive", hive_id=hive_id, sink=FileSink(open_narration_file(home, boot_id)))
    async with aiohttp.ClientSession() as session, asyncio.timeout(LIMIT_S):
        outbox = Outbox(QueenLink(session, queen_url, hive_id, None))
        outbox.add(f"{hive_id}/{boot_id}", home.hive / boot_id, goes_first=True)
        deliveries, settings = Deliveries(outbox), HiveSettings()
        workers = Workers(home, settings, outbox, deliveries, lambda: None, engines=EngineTable())
        carrying = asyncio.ensure_future(outbox.run())
        for path in sorted(home.hive.iterdir()):
            if path.name != boot_id:
                deliveries.deliver_rest(path, [(f"{hive_id}/{path.name}", path)], goes_first=True)
        Returning(home, workers, deliveries, stop_grace_s=settings.stop_grace_s).find_again()
        narrate("hive_ready", "Cleared up.")
        await asyncio.gather(*deliveries._tasks)
        assert await outbox.flush(LIMIT_S)
        carrying.cancel()
        await asyncio.gather(carrying, return_exceptions=True)
        await deliveries.close()
        outbox.close()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
