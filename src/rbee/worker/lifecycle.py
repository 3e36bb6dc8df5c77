"""A worker's life: load, say ready, answer until told to stop, drain, leave."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvloop

from rbee.contracts.engine_settings import BUILT_IN
from rbee.contracts.home import Home
from rbee.errors import StartError
from rbee.http.serve import serving, url_of
from rbee.narration import FileSink, narrate, scope
from rbee.processes.lease import LeaseThread
from rbee.worker.desk import Desk
from rbee.worker.engine_client import EngineClient
from rbee.worker.engines import Engine, EngineAddress, EngineProcess
from rbee.worker.front import Front, front_app
from rbee.worker.load_guard import Guarded, guarding, say_lease_lost
from rbee.worker.settings import WorkerSettings

DRAIN_S = 5.0
# Uvicorn waits for open responses; the desk stops theirs before.
_CLOSE_S = 8
# With the drain before it, less than a hive gives a worker to stop.
ENGINE_STOP_GRACE_S = 3.0
_LEASE_LOST_EXIT = 1
_ENGINE_LOST_EXIT = 1


def run_worker(settings: WorkerSettings, engine: Engine, sink: FileSink) -> None:
    """Load the model and answer until SIGTERM.

    Raises:
        ModelInvalidError: The model cannot be loaded.
        StartError: Something else failed before the worker was ready.
    """
    with _story(settings):
        narrate(
            "worker_startup",
            f"Starting a worker for {settings.shown_model}{_on(settings)}: {_slots(settings.slots)}, "
            f"{settings.context_tokens} tokens of context for each request.",
            engine=engine.name,
            engine_version=engine.version,
            slots=settings.slots,
            context_tokens=settings.context_tokens,
            pid=os.getpid(),
        )
        sock = _bind(settings.port)
        _start_lease(settings, engine, sink)
        started_s = time.monotonic()
        address = _load(settings, engine, sink)
        load_s = round(time.monotonic() - started_s, 3)
    uvloop.run(_serve(settings, address, sock, sink, load_s))


def _load(settings: WorkerSettings, engine: Engine, sink: FileSink) -> EngineAddress:
    size = settings.model.stat().st_size if settings.model.is_file() else None
    narrate("worker_load_model", f"Loading {settings.shown_model}.", size_bytes=size)
    if settings.hive_id is None or not engine.holds_threads:
        return engine.load()
    guarded = Guarded(
        pid=os.getpid(),
        lock=Home(settings.home.absolute()).hive_lock,
        lease_s=settings.worker_lease_s,
        hive_id=settings.hive_id,
        worker_id=settings.worker_id,
    )
    with guarding(guarded, sink.fd):
        return engine.load()


async def _serve(
    settings: WorkerSettings, address: EngineAddress, sock: socket.socket, sink: FileSink, load_s: float
) -> None:
    stop = _stop_signal(by_hand=settings.hive_id is None)
    client, desk = EngineClient(address), Desk(settings.slots)
    try:
        async with _ending_with(address.process), asyncio.TaskGroup() as kept:
            front = Front(
                engine=client,
                desk=desk,
                kept=kept,
                sink=sink,
                worker_id=settings.worker_id,
                model=settings.shown_model,
                purpose=settings.purpose,
            )
            told = await client.context_tokens() or settings.context_tokens
            context_tokens = min(told, settings.context_tokens)  # one that embeds tells the room of all its slots
            async with serving(front_app(front, settings.worker_token), sock, stop_grace_s=_CLOSE_S):
                with _story(settings):
                    _say_ready(settings, url_of(sock), context_tokens, load_s)
                try:
                    await stop.wait()
                finally:
                    desk.is_draining = True  # a fault of ours ends the worker too: nothing more is taken on
                _say_stopping(desk.slots_used)
                kept.create_task(desk.drain(DRAIN_S))
    finally:
        await client.close()
        if address.process is not None:
            await address.process.stop(ENGINE_STOP_GRACE_S)


@asynccontextmanager
async def _ending_with(process: EngineProcess | None) -> AsyncIterator[None]:
    """End the worker when its engine ends: what the engine had to do goes to another worker."""
    watching = asyncio.ensure_future(_end_with(process)) if process is not None else None
    try:
        yield
    finally:
        if watching is not None:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)


async def _end_with(process: EngineProcess) -> None:
    """End at once: whatever else is said of a request would end it here, and it is to go on elsewhere."""
    how = await process.ended()
    narrate("worker_failed", f"{how} Without it, this worker ends.", level="error")
    try:
        process.kill()  # what it left behind; without awaiting, so that nobody says anything meanwhile
    finally:
        os._exit(_ENGINE_LOST_EXIT)


def _say_ready(settings: WorkerSettings, url: str, context_tokens: int, load_s: float) -> None:
    narrate(
        "worker_ready",
        f"Ready: {settings.shown_model} was loaded in {load_s:.1f} s.",
        url=url,
        load_s=load_s,
        slots=settings.slots,
        context_tokens=context_tokens,
        pid=os.getpid(),
    )


def _say_stopping(slots_used: int) -> None:
    answers = "one answer" if slots_used == 1 else f"{slots_used} answers"
    sentence = f"Stopping; {answers} in progress may end within {DRAIN_S:g} s." if slots_used else "Stopping."
    narrate("worker_stopping", sentence, slots_used=slots_used)


@contextmanager
def _story(settings: WorkerSettings) -> Iterator[None]:
    """Tell what is inside to the job the worker is started for."""
    with scope(job_id=settings.job_id, correlation_id=settings.correlation_id):
        yield


def _bind(port: int) -> socket.socket:
    """Take the port, early so that one in use is told at once; nobody listens before the model is loaded."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(("127.0.0.1", port))
    except OSError as error:
        sock.close()
        raise StartError(
            f"The port {port} cannot be had: {error.strerror or error}.",
            remedy="Choose another port, or 0 for any free one.",
        ) from error
    return sock


def _start_lease(settings: WorkerSettings, engine: Engine, sink: FileSink) -> None:
    """Live no longer than the hive, and a lease; a worker started by hand has no hive."""
    if settings.hive_id is None:
        return

    def leave() -> None:
        say_lease_lost(settings.worker_lease_s)
        # Nothing else is said: the engine's end is ours now, and what it was asked is to go on elsewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sink.fd)
        try:
            engine.kill()
        finally:
            os._exit(_LEASE_LOST_EXIT)

    LeaseThread(Home(settings.home.absolute()).hive_lock, settings.worker_lease_s, leave).start()


def _stop_signal(*, by_hand: bool) -> asyncio.Event:
    """Return an event that SIGTERM sets; SIGINT too, unless a hive decides."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, event.set)
    if by_hand:
        loop.add_signal_handler(signal.SIGINT, event.set)
    return event


def _on(settings: WorkerSettings) -> str:
    return "" if settings.engine == BUILT_IN else f" on {settings.engine}"


def _slots(count: int) -> str:
    return "one slot" if count == 1 else f"{count} slots"
