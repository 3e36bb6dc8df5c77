"""A hive for measuring: the real outbox and link to a real queen, and workers that need no model.

It beats like a hive, its workers' fronts accept every kept answer, and what they say is written into their files
by `pipeline_emitter`. It prints one line when it is ready and carries files once its stdin says so.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from pathlib import Path

import aiohttp
import msgspec
import uvloop
from aiohttp import web

from rbee.contracts.heartbeats import Heartbeat, MachineInfo, ModelInfo, WorkerInfo
from rbee.contracts.ids import new_boot_id, new_id
from rbee.contracts.states import WorkerState
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.narration import configure

MODEL = "smollm2:135m"
GIB = 2**30
BEAT_EVERY_S = 1.0


async def _front() -> tuple[web.AppRunner, str]:
    """Serve what the queen asks of workers: keep this, stop that; both are always granted."""

    async def grant(request: web.Request) -> web.Response:
        await request.read()
        return web.json_response({}, status=202)

    app = web.Application()
    app.router.add_post("/v1/{rest:.*}", grant)
    app.router.add_delete("/requests/{rest:.*}", grant)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    return runner, f"http://{host}:{port}"


def _heartbeat(boot_id: str, url: str, workers: list[str], slots: int) -> Heartbeat:
    return Heartbeat(
        boot_id=boot_id,
        store_id="benchmark",
        url=url,
        version="0",
        machine=MachineInfo(
            hostname="benchmark", cpus=2, memory_bytes=GIB, memory_free_bytes=GIB, disk_free_bytes=GIB
        ),
        devices=[],
        models=[ModelInfo(model=MODEL, size_bytes=1, path="/none")],
        workers=[
            WorkerInfo(
                worker_id=worker_id,
                model=MODEL,
                state=WorkerState.READY,
                url=url,
                token="benchmark",
                purpose="generate",
                slots=slots,
                slots_used=0,
                pid=None,
            )
            for worker_id in workers
        ],
    )


async def _run(arguments: argparse.Namespace) -> None:
    directory: Path = arguments.directory
    configure(actor="hive")
    hive_id, boot_id = new_id("hive"), new_boot_id()
    files = {new_id("worker"): directory / str(number) for number in range(arguments.workers)}
    runner, url = await _front()
    async with aiohttp.ClientSession() as session:
        link = QueenLink(session, arguments.queen, hive_id, None)
        outbox = Outbox(link)
        for worker_id, path in files.items():
            path.touch()
            outbox.add(f"{worker_id}/stdout", path)
        beat = _heartbeat(boot_id, url, list(files), arguments.slots)
        await link.heartbeat(beat)
        ready = {"workers": {worker_id: str(path) for worker_id, path in files.items()}}
        sys.stderr.write(msgspec.json.encode(ready).decode() + "\n")
        sys.stderr.flush()
        async with asyncio.TaskGroup() as group:
            beating = group.create_task(_beat(link, beat))
            await asyncio.to_thread(sys.stdin.readline)
            carrying = group.create_task(outbox.run())
            await asyncio.to_thread(sys.stdin.read)  # its end is ours
            beating.cancel()
            carrying.cancel()
        outbox.close()
        link.close()
    await runner.cleanup()


async def _beat(link: QueenLink, beat: Heartbeat) -> None:
    while True:
        with contextlib.suppress(Exception):  # a busy queen answers the next one
            await link.heartbeat(beat)
        await asyncio.sleep(BEAT_EVERY_S)


def main() -> None:
    """Run until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("queen")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--slots", type=int, default=1)
    uvloop.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
