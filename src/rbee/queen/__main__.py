"""`queen-rbee`: run a queen until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys

import aiohttp
import uvloop

from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.ids import new_boot_id
from rbee.contracts.model_settings import load_model_table
from rbee.contracts.settings import load_settings
from rbee.contracts.views import ReadyFile
from rbee.errors import RbeeError, StartError
from rbee.http.auth import require_key_off_loopback
from rbee.http.serve import listening_socket, serving, stop_signal, url_of
from rbee.jobs import JobRegistry
from rbee.narration import configure, narrate
from rbee.narration.sinks import server_sink
from rbee.processes.locks import FileLock
from rbee.queen.app import make_app
from rbee.queen.service import QueenService
from rbee.queen.settings import DEFAULT_PORT, QueenSettings

STOP_GRACE_S = 5.0
LOCK_WAIT_S = 5.0


def main() -> None:
    """Run the program; exits with the code that says how it ended."""
    try:
        settings = load_settings(QueenSettings)
        require_key_off_loopback(settings.host, settings.api_key)
        uvloop.run(run(settings))
    except RbeeError as error:
        print(f"queen-rbee: {error.message} {error.remedy}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)


async def run(settings: QueenSettings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        StartError: The port, the home or the registry cannot be had.
    """
    os.umask(0o077)  # what is in the home is nobody else's
    stop = stop_signal()
    configure(actor="queen", sink=server_sink())
    home = Home.at(settings.home)
    os.environ["RBEE_HOME"] = str(home.root)
    models = load_model_table(home.config)
    lock = FileLock(home.queen_lock)
    if not await lock.acquire_blocking(LOCK_WAIT_S):
        raise StartError(
            f"Another queen runs on {home.root}.", remedy="Stop it (rbee down), or use another RBEE_HOME."
        )
    sock = listening_socket(settings.host, settings.port, DEFAULT_PORT, settings.listen_fd)
    registry = JobRegistry.open(home.root / "queen.db", queued_max=settings.queued_max)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar()) as session:
        service = QueenService(settings, registry, session, new_boot_id(), models)
        url = url_of(sock)
        await service.open()
        async with serving(make_app(service, url), sock, stop_grace_s=2):
            ready = ReadyFile(url=url, pid=os.getpid(), boot_id=service.boot_id)
            write_ready_file(home.ready_file("queen-rbee"), ready)
            if settings.ready_file is not None:
                write_ready_file(settings.ready_file, ready)
            narrate("queen_ready", f"Listening on {url}.", url=url, pid=os.getpid(), openai_url=f"{url}/v1")
            background = asyncio.ensure_future(service.run())
            told = asyncio.ensure_future(stop.wait())
            await asyncio.wait([told, background], return_when=asyncio.FIRST_COMPLETED)
            told.cancel()
            narrate("queen_stop", "Stopping: nothing new is accepted, answers in progress get a moment.")
            await service.close(STOP_GRACE_S)
            await _finish(background)
        await registry.close()
    home.ready_file("queen-rbee").unlink(missing_ok=True)
    lock.release()


async def _finish(background: asyncio.Task[None]) -> None:
    """Cancel what runs for ever; raise what it failed with."""
    background.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await background


if __name__ == "__main__":
    main()
