"""`rbee-hive`: run a hive until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.ids import new_boot_id
from rbee.contracts.settings import load_settings
from rbee.contracts.views import ReadyFile
from rbee.errors import RbeeError, StartError
from rbee.hive.app import make_app
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.hive.service import HiveService, open_narration_file, read_hive_id
from rbee.hive.settings import DEFAULT_PORT, HiveSettings
from rbee.http.auth import require_key_off_loopback
from rbee.http.serve import listening_socket, serving, stop_signal, url_of
from rbee.jobs import JobRegistry
from rbee.narration import FileSink, TeeSink, configure, narrate
from rbee.narration.sinks import server_sink
from rbee.processes.linux import require_linux
from rbee.processes.locks import FileLock

LOCK_WAIT_S = 5.0
FLUSH_S = 2.0


def main(worker_program: Path | None = None) -> None:
    """Run the program; exits with the code that says how it ended.

    Args:
        worker_program: What to start as a worker; the one installed next to Python by default.
    """
    try:
        settings = load_settings(HiveSettings)
        require_key_off_loopback(settings.host, settings.api_key)
        require_linux()
        uvloop.run(run(settings, worker_program))
    except RbeeError as error:
        print(f"rbee-hive: {error.message} {error.remedy}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


async def run(settings: HiveSettings, worker_program: Path | None = None) -> None:
    """Serve until SIGTERM or SIGINT, then stop all workers.

    Raises:
        StartError: The port or the home cannot be had.
    """
    os.umask(0o077)  # what is in the home is nobody else's
    stop = stop_signal()
    home = Home.at(settings.home)
    os.environ["RBEE_HOME"] = str(home.root)
    lock = FileLock(home.hive_lock)
    if not await lock.acquire_blocking(LOCK_WAIT_S):
        raise StartError(
            f"Another hive runs on {home.root}.", remedy="Stop it (rbee down), or use another RBEE_HOME."
        )
    sock = listening_socket(settings.host, settings.port, DEFAULT_PORT, settings.listen_fd)
    hive_id, boot_id = read_hive_id(home), new_boot_id()
    narration_fd = open_narration_file(home, boot_id)
    configure(actor="hive", hive_id=hive_id, sink=TeeSink(FileSink(narration_fd), server_sink()))
    registry = JobRegistry.open(home.root / "hive.db", queued_max=settings.queued_max)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        link = QueenLink(session, settings.queen_url, hive_id, settings.api_key)
        outbox = Outbox(link)
        url = url_of(sock)
        service = HiveService(
            settings,
            home,
            registry,
            link,
            outbox,
            hive_id=hive_id,
            boot_id=boot_id,
            url=url,
            worker_program=worker_program,
        )
        await service.open()
        async with serving(make_app(service), sock, stop_grace_s=2):
            always = (service.run_heartbeats(), outbox.run(), service.retention.run())
            tasks = [asyncio.ensure_future(work) for work in always]
            ready = ReadyFile(url=url, pid=os.getpid(), boot_id=boot_id)
            write_ready_file(home.ready_file("rbee-hive"), ready)
            if settings.ready_file is not None:
                write_ready_file(settings.ready_file, ready)
            narrate("hive_ready", f"Listening on {url}.", url=url, pid=os.getpid(), queen_url=settings.queen_url)
            endless: list[asyncio.Future[Any]] = [*tasks, service.deliveries.failure]
            told = asyncio.ensure_future(stop.wait())
            await asyncio.wait([told, *endless], return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            narrate("hive_stop", "Stopping: workers are stopped, nothing new is accepted.")
            await service.close()
            await outbox.flush(FLUSH_S)
            await _finish(endless)
        await service.deliveries.close()
        outbox.close()
        link.close()
        await registry.close()
    home.ready_file("rbee-hive").unlink(missing_ok=True)
    lock.release()


async def _finish(tasks: Sequence[asyncio.Future[Any]]) -> None:
    """Cancel what runs for ever; raise what one of them failed with."""
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


if __name__ == "__main__":
    main()
