"""One server that `rbee up` holds: started on an inherited socket, watched, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from rbee.contracts.home import Home, read_ready_file
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError
from rbee.keeper.local_stack import TAIL_LINES, console_script, last_lines
from rbee.keeper.render import Screen
from rbee.narration.lines import format_bracket

_READY_S = 60.0
_POLL_S = 0.02
_LINE_BYTES_MAX = 64 * 1024
_PR_SET_PDEATHSIG = 1


class Server:
    """A queen or hive that this process is the parent of.

    Args:
        program: The console script's name.
        home: Where its ready file and, not drawn, its log are.
        screen: Where its output is drawn; None appends it to `logs/<program>.log`.
    """

    def __init__(self, program: str, home: Home, screen: Screen | None) -> None:
        self.program = program
        self.log = home.logs / f"{program}.log"
        self._ready_file = home.ready_file(program)
        self._screen = screen
        self._since = self.log.stat().st_size if self.log.exists() else 0
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process: asyncio.subprocess.Process | None = None
        self._drawing: asyncio.Task[None] | None = None

    async def start(self, sock: socket.socket, host: str, environment: Mapping[str, str]) -> None:
        """Start the program on `sock`; call it from the main thread, whose death would be its own.

        Raises:
            StartError: It cannot be started.
        """
        fd = sock.fileno()
        command = (console_script(self.program), "--listen-fd", str(fd), "--host", host)
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=dict(environment),
                pass_fds=(fd,),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if self._screen else output,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),
            )
        except OSError as error:
            raise StartError(f"{command[0]} cannot be started: {error.strerror or error}.") from error
        finally:
            os.close(output)
        if self._screen is not None:
            self._drawing = asyncio.create_task(self._draw(self._screen))

    async def ready(self) -> ReadyFile:
        """Wait until the program says where it listens.

        Raises:
            StartError: It ended first, or took too long; its last lines are with it.
        """
        deadline = asyncio.get_running_loop().time() + _READY_S
        while True:
            ready = read_ready_file(self._ready_file)
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

    async def ended(self) -> None:
        """Wait for the program to end."""
        if self._process is not None:
            await self._process.wait()

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
        """Return the last lines the program wrote."""
        if self._drawing is None:
            return [_readable(line) for line in last_lines(self.log, self._since)]
        if self._process is not None and self._process.returncode is not None:
            await asyncio.wait({self._drawing}, timeout=1)
        return [_readable(line) for line in self._tail]

    async def stop(self, grace_s: float) -> None:
        """Ask the program to stop, kill it after `grace_s`, and return when it is gone."""
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
        await self._end_drawing()
        self._forget_ready_file()

    async def _end_drawing(self) -> None:
        """Let the last output be drawn; somebody who inherited the pipe may hold it open for ever."""
        if self._drawing is not None:
            await asyncio.wait({self._drawing}, timeout=1)
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)

    def _forget_ready_file(self) -> None:
        """Remove what a killed server could not remove; another one's file stays."""
        try:
            ready = msgspec.json.decode(self._ready_file.read_bytes(), type=ReadyFile)
        except (OSError, msgspec.MsgspecError):
            return
        if ready.pid == self.pid:
            self._ready_file.unlink(missing_ok=True)

    async def _draw(self, screen: Screen) -> None:
        """Draw every line of the program, events in the bracket form, as it comes."""
        assert self._process is not None and self._process.stdout is not None
        rest = b""
        while data := await self._process.stdout.read(_LINE_BYTES_MAX):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_BYTES_MAX:
                lines, rest = [*lines, rest], b""
            for line in lines:
                self._draw_line(screen, line)
        if rest:
            self._draw_line(screen, rest)

    def _draw_line(self, screen: Screen, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        self._tail.append(text)
        event = _event(line)
        screen.narrate(event or {"actor": self.program, "action": "output", "message": text})


def _readable(line: str) -> str:
    """Return a line as a person reads it: an event in its bracket form, anything else as it is."""
    event = _event(line.encode())
    return line if event is None else format_bracket(event)


def _event(line: bytes) -> dict[str, object] | None:
    """Read a line as a narrated event; None when it is anything else."""
    try:
        event = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None
    return event if isinstance(event, dict) and "action" in event and "message" in event else None


def _dies_with(parent: int) -> Callable[[], None] | None:
    """Return what a child does before its program starts: ask for SIGTERM when its parent dies."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # found before the fork, where nothing may be loaded

    def before_exec() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:  # it died before it could be noticed
            os._exit(1)

    return before_exec
