"""One life of a server that `rbee up` holds: started on an inherited socket, watched, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from rbee.contracts.home import Home, read_ready_file
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError
from rbee.keeper.local_stack import console_script, last_lines
from rbee.keeper.render import Screen
from rbee.keeper.server_output import DrawnOutput, readable
from rbee.processes.parent_death import dies_with_parent

_READY_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True)
class ServerConfig:
    """What every life of a server has in common.

    Attributes:
        program: The console script's name.
        home: Where its ready file and, not drawn, its log are.
        sock: The socket it listens on, which outlives it.
        host: The address that socket is bound to.
        environment: The whole environment of the process.
        screen: Where its output is drawn; None appends it to `logs/<program>.log`.
    """

    program: str
    home: Home
    sock: socket.socket
    host: str
    environment: Mapping[str, str] = field(repr=False)  # the key is in it
    screen: Screen | None = None

    @property
    def log(self) -> Path:
        """Where output that is not drawn goes."""
        return self.home.logs / f"{self.program}.log"

    @property
    def ready_file(self) -> Path:
        """Where the program says that it can be asked."""
        return self.home.ready_file(self.program)

    def command(self) -> tuple[str, ...]:
        """Return what is started.

        Raises:
            StartError: The program is not installed.
        """
        fd = str(self.sock.fileno())
        return (console_script(self.program), "--listen-fd", fd, "--host", self.host)


class Server:
    """A queen or hive from its start to its end, a child of this process."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.program = config.program
        self._log_begins_at = config.log.stat().st_size if config.log.exists() else 0
        self._process: asyncio.subprocess.Process | None = None
        self._drawing: DrawnOutput | None = None

    async def start(self) -> None:
        """Start the program; call it from the main thread, whose death would be the program's.

        Raises:
            StartError: It cannot be started.
        """
        config, command = self.config, self.config.command()
        output = os.open(config.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(config.environment),
                pass_fds=(config.sock.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if config.screen else output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=dies_with_parent(),
            )
        except OSError as error:
            raise StartError(f"{command[0]} cannot be started: {error.strerror or error}.") from error
        finally:
            os.close(output)
        if config.screen is not None and self._process.stdout is not None:
            self._drawing = DrawnOutput(self.program, self._process.stdout, config.screen)

    async def ready(self) -> ReadyFile:
        """Wait until the program says where it listens.

        Raises:
            StartError: It ended first, or took too long; its last lines are with it.
        """
        deadline = asyncio.get_running_loop().time() + _READY_S
        while True:
            ready = read_ready_file(self.config.ready_file)
            if ready is not None and ready.pid == self.pid:
                return ready
            if self.has_ended:
                raise await self.failure()
            if asyncio.get_running_loop().time() > deadline:
                raise await self.failure(f"was not ready within {_READY_S:g} s")
            await asyncio.sleep(_POLL_S)

    async def failure(self, how: str | None = None) -> StartError:
        """Make the error that says how the start went wrong, with the program's last lines."""
        return StartError(
            f"{self.program} {how or self.how_it_ended() + ' before it was ready'}.",
            details={"last_lines": await self.last_words()},
        )

    @property
    def pid(self) -> int:
        """The process's number, 0 before the start."""
        return self._process.pid if self._process else 0

    @property
    def has_ended(self) -> bool:
        """Tell whether the program was started and has ended."""
        return self._process is not None and self._process.returncode is not None

    async def ended(self) -> int:
        """Wait for the program to end; returns its exit code, or minus the signal that ended it."""
        assert self._process is not None
        return await self._process.wait()

    def how_it_ended(self) -> str:
        """Say how the program ended, as the end of a sentence that begins with its name."""
        code = self._process.returncode if self._process else None
        if code is None:
            return "still runs"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    async def last_words(self) -> list[str]:
        """Return the last lines that the program wrote in this life."""
        if self._drawing is None:
            return [readable(line) for line in last_lines(self.config.log, self._log_begins_at)]
        if self.has_ended:
            await self._drawing.settle()
        return [readable(line) for line in self._drawing.last_lines]

    async def stop(self, grace_s: float) -> None:
        """Ask the program to stop, kill it after `grace_s`, and return when it and its traces are gone."""
        if self._process is None:
            return
        if self._process.returncode is None:
            for number in (signal.SIGTERM, signal.SIGCONT):  # a stopped process hears nothing but the second
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(number)
            try:
                await asyncio.wait_for(self._process.wait(), grace_s)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
        if self._drawing is not None:
            await self._drawing.close()
        self._forget_ready_file()

    def _forget_ready_file(self) -> None:
        """Remove what a killed server could not remove; another one's file stays."""
        path = self.config.ready_file
        try:
            ready = msgspec.json.decode(path.read_bytes(), type=ReadyFile)
        except (OSError, msgspec.MsgspecError):
            return
        if ready.pid == self.pid:
            path.unlink(missing_ok=True)
