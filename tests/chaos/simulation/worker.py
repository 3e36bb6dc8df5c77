"""A worker in the simulation: the production front and desk over a counting engine."""

from __future__ import annotations

import asyncio
import os
from typing import Any, Protocol

from rbee.narration import FileSink, narrate, scope
from rbee.narration.scope import Scope
from rbee.processes import ExitStatus
from rbee.processes.lease import Lease
from rbee.testing.memory_network import Network
from rbee.testing.virtual_process import Process
from rbee.worker.desk import Desk
from rbee.worker.front import Front, front_app
from tests.chaos.simulation.answers import CountingEngine
from tests.chaos.simulation.computer import Computer, Running
from tests.chaos.simulation.watching import WatchedSink

DRAIN_S = 5.0
LEASE_POLL_S = 1.0


class Temper:
    """How workers are.

    Attributes:
        fails: The share of them that end before they are ready.
        token_s: How long a token takes.
    """

    def __init__(self) -> None:
        self.fails = 0.0
        self.token_s = 0.03


class Site(Protocol):
    """What a worker needs of the installation."""

    network: Network
    temper: Temper
    desks: dict[Process, Desk]


async def worker_program(running: Running, computer: Computer, site: Site) -> None:
    """Live a worker's life."""
    process, env = running.process, running.spec.env
    fd = os.open(running.spec.stdout, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    sink = WatchedSink(fd, running.spec.stdout, computer.files)

    def close() -> None:
        os.close(fd)
        sink.fd = -1

    process.on_death.append(close)
    process.speak(sink, Scope(worker_id=env["RBEE_WORKER_ID"]))
    process.spawn(_watch_lease(running, computer))
    with scope(job_id=env.get("JOB_ID"), correlation_id=env.get("CORRELATION_ID")):
        narrate("worker_startup", "Starting a worker.", pid=running.pid)
        narrate("worker_load_model", "Loading.")
        await asyncio.sleep(process.chance.uniform(0.2, 2.0))
        if running.asked_to_stop.is_set():
            running.end(ExitStatus(signal="SIGTERM"))
            return
        if process.chance.random() < site.temper.fails:
            narrate("worker_failed", "There is no memory.", level="error")
            running.end(ExitStatus(exit_code=3))
            return
        port = 10_000 + running.pid
        url = f"http://{process.machine.address}:{port}"
    await _serve(running, site, sink, url, port)


async def _serve(running: Running, site: Site, sink: FileSink, url: str, port: int) -> None:
    process = running.process
    env, command = running.spec.env, running.spec.command
    slots = int(command[command.index("--slots") + 1])
    model = command[command.index("--alias") + 1]
    engine: Any = CountingEngine(process, site.temper.token_s)
    desk = site.desks[process] = Desk(slots)
    async with asyncio.TaskGroup() as kept:
        front = Front(engine=engine, desk=desk, kept=kept, sink=sink, worker_id=env["RBEE_WORKER_ID"], model=model)
        site.network.listen(process.machine.address, port, front_app(front, env["RBEE_WORKER_TOKEN"]), process)
        with scope(job_id=env.get("JOB_ID"), correlation_id=env.get("CORRELATION_ID")):
            narrate("worker_ready", "Ready.", url=url, slots=slots, pid=running.pid)
        await running.asked_to_stop.wait()
        narrate("worker_stopping", "Stopping.", slots_used=desk.slots_used)
        kept.create_task(desk.drain(DRAIN_S))
    running.end(ExitStatus(exit_code=0))


async def _watch_lease(running: Running, computer: Computer) -> None:
    """End without a hive, as a worker's thread does."""
    lease = Lease(float(running.spec.env["RBEE_WORKER_LEASE_S"]))
    loop = asyncio.get_running_loop()
    while not lease.is_lost(held=computer.is_hive_alive(), now_s=loop.time()):  # noqa: ASYNC110  # as the thread does
        await asyncio.sleep(LEASE_POLL_S)
    running.end(ExitStatus(exit_code=1))
