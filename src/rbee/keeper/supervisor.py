"""Keep one server of `rbee up` running: whoever kills it gets it back, on the same socket."""

from __future__ import annotations

import asyncio
from collections import deque

from msgspec import Struct

from rbee.contracts.views import ReadyFile
from rbee.errors import StartError
from rbee.keeper.exit_codes import EXIT_FAILED
from rbee.keeper.render import Screen
from rbee.keeper.restart_policy import HISTORY_MAX, Death, GiveUp, decide
from rbee.keeper.server import Server, ServerConfig


class Surrender(Struct, frozen=True):
    """Why a server is not kept running any longer.

    Attributes:
        message: What happened, as the sentence's beginning, without a full stop.
        last_lines: The last that it printed.
        exit_code: What `rbee up` ends with.
    """

    message: str
    last_lines: list[str]
    exit_code: int


class Supervisor:
    """Starts a server, and starts it again when it dies.

    Args:
        config: What every life of the server has in common.
        screen: Where it is said that the server died.
    """

    def __init__(self, config: ServerConfig, screen: Screen) -> None:
        self.config = config
        self.server = Server(config)
        self._screen = screen
        self._deaths: deque[Death] = deque(maxlen=HISTORY_MAX)
        self._began_at = 0.0

    async def start(self) -> None:
        """Begin a life of the server.

        Raises:
            StartError: It cannot be started.
        """
        self.server = Server(self.config)
        self._began_at = _now()
        await self.server.start()

    async def ready(self) -> ReadyFile:
        """Wait until the server can be asked.

        Raises:
            StartError: It ended first, or took too long.
        """
        return await self.server.ready()

    async def keep(self) -> Surrender:
        """Start the server again whenever it ends; return when that is of no use.

        Cancelled at any point, it leaves at most the one server that `stop` stops.
        """
        while True:
            status = await self.server.ended()
            self._deaths.append(Death(at_s=_now(), lived_s=_now() - self._began_at, status=status))
            verdict = decide(self._deaths, _now())
            how = f"{self.config.program} {self.server.how_it_ended()}"
            if isinstance(verdict, GiveUp):
                message = f"{how}: {verdict.why}, so it is not started again"
                return Surrender(message, await self.server.last_words(), verdict.exit_code)
            self._screen.say("keeper_restart", f"{how}; starting it again in {verdict.after_s:g} s.")
            await self.server.stop(0)
            await asyncio.sleep(verdict.after_s)
            try:
                await self.start()
                await self.ready()
            except StartError as error:
                if not self.server.has_ended:  # what has ended is judged as every death
                    last_lines = error.details.get("last_lines", [])
                    return Surrender(error.message.rstrip("."), last_lines, EXIT_FAILED)

    async def stop(self, grace_s: float) -> None:
        """Stop the server; returns when it is gone. End `keep` first, or it comes back."""
        await self.server.stop(grace_s)


def _now() -> float:
    return asyncio.get_running_loop().time()
