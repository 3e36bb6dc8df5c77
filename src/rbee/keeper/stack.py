"""Queen and hive of one home, started, kept running and stopped together: what `rbee up` does."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from pathlib import Path

from rbee.client import JobClient
from rbee.contracts.home import Home, write_ready_file
from rbee.contracts.states import HiveState
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError, UnavailableError
from rbee.http.auth import require_key_off_loopback
from rbee.http.serve import bind, url_of
from rbee.keeper.exit_codes import EXIT_FINE, EXIT_INTERRUPTED
from rbee.keeper.local_stack import HIVE, QUEEN, STACK, up_lock
from rbee.keeper.render import Screen
from rbee.keeper.running import Interrupted, unless_stopped
from rbee.keeper.server import ServerConfig
from rbee.keeper.settings import HIVE_PORT, QUEEN_PORT, KeeperSettings
from rbee.keeper.strays import servers_of, stop_servers
from rbee.keeper.supervisor import Supervisor, Surrender
from rbee.processes import FileLock

REGISTER_S = 30.0
STOP_S = 7.0

_ASK_S = 2.0
_LOCK_S = 1.0
_POLL_S = 0.05


async def run_stack(
    settings: KeeperSettings, screen: Screen, stop: asyncio.Event, *, ready_file: Path | None, is_drawn: bool
) -> int:
    """Run queen and hive until `stop` is set or one of them cannot be kept running; return the exit code.

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
    stack = Stack(settings, home, screen, is_drawn=is_drawn)
    announced = [home.ready_file(STACK), *([ready_file] if ready_file else [])]
    try:
        home.ready_file(STACK).unlink(missing_ok=True)  # what one that was killed left behind
        stack.bind()
        ready = await unless_stopped(stop, stack.start())
        for path in announced:
            write_ready_file(path, ready)
        screen.print(f"{ready.url}/v1")
        screen.say("keeper_ready", f"Queen and hive are ready; OpenAI clients find them at {ready.url}/v1.")
        return await _kept_running(stack, screen, stop)
    except Interrupted:
        return EXIT_INTERRUPTED
    finally:
        await stack.stop()
        for path in announced:
            path.unlink(missing_ok=True)
        lock.release()


async def _kept_running(stack: Stack, screen: Screen, stop: asyncio.Event) -> int:
    """Keep a stack running until `stop` is set, or until that is of no use; return the exit code."""
    try:
        surrender = await unless_stopped(stop, stack.keep())
    except Interrupted:
        screen.say("keeper_stop", "Stopping queen and hive.")
        return EXIT_FINE
    screen.problem(
        f"{surrender.message}; stopping the rest.",
        last_lines=surrender.last_lines,
        remedy="Its log has the whole story. Start again with `rbee up`: kept jobs go on where they were.",
    )
    return surrender.exit_code


class Stack:
    """The two sockets, and the two servers that are kept running on them."""

    def __init__(self, settings: KeeperSettings, home: Home, screen: Screen, *, is_drawn: bool) -> None:
        self._settings = settings
        self._home = home
        self._screen = screen
        self._is_drawn = is_drawn
        self._sockets: list[socket.socket] = []
        self._supervisors: list[Supervisor] = []

    def bind(self) -> None:
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
                said = f"Port {default} is taken; the {name} listens on port {port} instead."
                self._screen.say("keeper_port", said)

    async def start(self) -> ReadyFile:
        """Start both servers and wait until the queen lists the hive as live.

        Raises:
            StartError: One of them ended or did not get ready in time; the first start is not repeated.
        """
        queen_socket, hive_socket = self._sockets
        url = url_of(queen_socket)
        queen = self._supervisor(QUEEN, queen_socket, {})
        hive = self._supervisor(HIVE, hive_socket, {"RBEE_QUEEN_URL": url})
        self._supervisors = [queen, hive]
        await queen.start()
        await hive.start()
        await queen.ready()
        hive_url = (await hive.ready()).url
        await self._registered(url)
        return ReadyFile(url=url, hive_url=hive_url, pid=os.getpid())

    def _supervisor(self, program: str, sock: socket.socket, more: Mapping[str, str]) -> Supervisor:
        config = ServerConfig(
            program=program,
            home=self._home,
            sock=sock,
            host=self._settings.host,
            environment={**self._environment(), **more},
            screen=self._screen if self._is_drawn else None,
        )
        return Supervisor(config, self._screen)

    def _environment(self) -> Mapping[str, str]:
        environment = {**os.environ, "RBEE_HOME": str(self._home.root), "PYTHONUNBUFFERED": "1"}
        for name in ("RBEE_QUEEN_URL", "RBEE_READY_FILE", "RBEE_LISTEN_FD", "RBEE_HOST", "RBEE_PORT"):
            environment.pop(name, None)
        if self._settings.api_key:
            environment["RBEE_API_KEY"] = self._settings.api_key
        return environment

    async def _registered(self, url: str) -> None:
        """Wait until the queen lists a live hive; the death of either server ends the wait."""
        _, hive = self._supervisors
        deadline = asyncio.get_running_loop().time() + REGISTER_S
        async with JobClient(url, api_key=self._settings.api_key, idle_s=_ASK_S) as client:
            while not await _has_live_hive(client):
                for supervisor in self._supervisors:
                    if supervisor.server.has_ended:
                        raise await supervisor.server.failure()
                if asyncio.get_running_loop().time() > deadline:
                    raise await hive.server.failure(f"was not registered with the queen within {REGISTER_S:g} s")
                await asyncio.sleep(_POLL_S)

    async def keep(self) -> Surrender:
        """Keep both servers running; return why one of them cannot be."""
        keeping = [asyncio.ensure_future(supervisor.keep()) for supervisor in self._supervisors]
        try:
            done, _ = await asyncio.wait(keeping, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in keeping:
                task.cancel()
            await asyncio.gather(*keeping, return_exceptions=True)

    async def stop(self) -> None:
        """Stop the queen, then the hive, which stops its workers, then whatever is left. At most 15 s."""
        for sock in self._sockets:
            sock.close()
        for supervisor in self._supervisors:
            await supervisor.stop(STOP_S)
        await stop_servers(servers_of(self._home), grace_s=0.5, kill_s=0.5)


async def _has_live_hive(client: JobClient) -> bool:
    try:
        return any(hive.state is HiveState.LIVE for hive in await client.hives())
    except UnavailableError:  # she is dying, or slow; which it is, is looked at next
        return False
