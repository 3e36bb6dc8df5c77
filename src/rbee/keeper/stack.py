"""Queen and hive of one home, started, watched and stopped together: what `rbee up` does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Mapping
from pathlib import Path

from rbee.client import JobClient
from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.states import HiveState
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError, UnavailableError
from rbee.http.auth import require_key_off_loopback
from rbee.http.serve import bind, url_of
from rbee.keeper.exit_codes import EXIT_FAILED, EXIT_FINE, EXIT_INTERRUPTED
from rbee.keeper.local_stack import HIVE, QUEEN, STACK, up_lock
from rbee.keeper.render import Screen
from rbee.keeper.running import Interrupted, unless_stopped
from rbee.keeper.server import Server
from rbee.keeper.settings import HIVE_PORT, QUEEN_PORT, KeeperSettings
from rbee.keeper.strays import servers_of, stop_servers
from rbee.processes import FileLock

REGISTER_S = 30.0
STOP_S = 7.0

_LOCK_S = 1.0
_POLL_S = 0.05


async def run_stack(
    settings: KeeperSettings, screen: Screen, stop: asyncio.Event, *, ready_file: Path | None, is_drawn: bool
) -> int:
    """Run queen and hive until `stop` is set or one of them ends; return the exit code.

    Args:
        ready_file: Also written, besides the home's own, once the hive has registered.
        is_drawn: Draw what the servers say, instead of appending it to their logs.

    Raises:
        StartError: Something stood in the way before they were ready.
    """
    require_key_off_loopback(settings.host, settings.api_key)
    home = Home.at(settings.home)
    lock = FileLock(up_lock(home))
    if not await lock.acquire_blocking(_LOCK_S):
        raise StartError(
            f"`rbee up` runs already for {home.root}.", remedy="See `rbee status`; `rbee down` ends it."
        )
    stack = Stack(settings, home, screen if is_drawn else None)
    announced = [home.ready_file(STACK), *([ready_file] if ready_file else [])]
    try:
        home.ready_file(STACK).unlink(missing_ok=True)  # what one that was killed left behind
        stack.bind(screen)
        ready = await unless_stopped(stop, stack.start())
        for path in announced:
            write_ready_file(path, ready)
        screen.print(f"{ready.url}/v1")
        screen.say("keeper_ready", f"Queen and hive are ready; OpenAI clients find them at {ready.url}/v1.")
        died = await stack.first_death(stop)
        if died is None:
            screen.say("keeper_stop", "Stopping queen and hive.")
            return EXIT_FINE
        screen.problem(
            f"{died.program} {died.how_it_ended()}; stopping the rest.",
            last_lines=await died.last_words(),
            remedy="Start again with `rbee up`: kept jobs go on where they were.",
        )
        return EXIT_FAILED
    except Interrupted:
        return EXIT_INTERRUPTED
    finally:
        await stack.stop()
        for path in announced:
            path.unlink(missing_ok=True)
        lock.release()


class Stack:
    """The two sockets and the two servers on them."""

    def __init__(self, settings: KeeperSettings, home: Home, screen: Screen | None) -> None:
        self._settings = settings
        self._home = home
        self._sockets: list[socket.socket] = []
        self.queen = Server(QUEEN, home, screen)
        self.hive = Server(HIVE, home, screen)

    def bind(self, screen: Screen) -> None:
        """Take both ports; a default one that is taken gives way to a free one, and that is said.

        Raises:
            StartError: A port that was asked for is taken.
        """
        settings = self._settings
        for name, asked, default in (
            ("queen", settings.queen_port, QUEEN_PORT),
            ("hive", settings.hive_port, HIVE_PORT),
        ):
            sock = bind(settings.host, default if asked is None else asked, is_port_asked_for=asked is not None)
            self._sockets.append(sock)
            port = sock.getsockname()[1]
            if asked is None and port != default:
                screen.say("keeper_port", f"Port {default} is taken; the {name} listens on port {port} instead.")

    async def start(self) -> ReadyFile:
        """Start both servers and wait until the queen lists the hive as live.

        Raises:
            StartError: One of them ended or did not get ready in time.
        """
        queen_socket, hive_socket = self._sockets
        url = url_of(queen_socket)
        environment = self._environment()
        await self.queen.start(queen_socket, self._settings.host, environment)
        await self.hive.start(hive_socket, self._settings.host, {**environment, "RBEE_QUEEN_URL": url})
        await self.queen.ready()
        hive = await self.hive.ready()
        await self._registered(url)
        return ReadyFile(url=url, hive_url=hive.url, pid=os.getpid())

    def _environment(self) -> Mapping[str, str]:
        environment = {**os.environ, "RBEE_HOME": str(self._home.root), "PYTHONUNBUFFERED": "1"}
        for name in ("RBEE_QUEEN_URL", "RBEE_READY_FILE", "RBEE_LISTEN_FD", "RBEE_HOST", "RBEE_PORT"):
            environment.pop(name, None)
        if self._settings.api_key:
            environment["RBEE_API_KEY"] = self._settings.api_key
        return environment

    async def _registered(self, url: str) -> None:
        """Wait until the queen lists a live hive; the death of either server ends the wait."""
        deadline = asyncio.get_running_loop().time() + REGISTER_S
        async with JobClient(url, api_key=self._settings.api_key) as client:
            while not await _has_live_hive(client):
                for server in (self.queen, self.hive):
                    if server.has_ended:
                        raise await server.failure()
                if asyncio.get_running_loop().time() > deadline:
                    raise await self.hive.failure(f"was not registered with the queen within {REGISTER_S:g} s")
                await asyncio.sleep(_POLL_S)

    async def first_death(self, stop: asyncio.Event) -> Server | None:
        """Wait until a server ends, and return which; None when `stop` was set first."""
        servers = (self.queen, self.hive)
        tasks = [asyncio.ensure_future(_silent(wait)) for wait in (stop.wait(), *(one.ended() for one in servers))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return None if stop.is_set() else next(one for one in servers if one.has_ended)

    async def stop(self) -> None:
        """Stop the queen, then the hive, which stops its workers, then whatever is left. At most 15 s."""
        for sock in self._sockets:
            sock.close()
        await self.queen.stop(STOP_S)
        await self.hive.stop(STOP_S)
        await stop_servers(servers_of(self._home), grace_s=0.5, kill_s=0.5)


async def _has_live_hive(client: JobClient) -> bool:
    try:
        return any(hive.state is HiveState.LIVE for hive in await client.hives())
    except UnavailableError:  # it is dying; its end is looked at next
        return False


async def _silent(wait: Awaitable[object]) -> None:
    await wait
