"""Find the queen that runs in this home, or start queen and hive in the background."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

from rbee.contracts.home import Home, read_ready_file
from rbee.contracts.views import ReadyFile
from rbee.errors import StartError, UnavailableError
from rbee.keeper.render import Screen
from rbee.keeper.settings import KeeperSettings
from rbee.processes import Child, FileLock, ProcessSpec, is_held, spawn

QUEEN = "queen-rbee"
HIVE = "rbee-hive"
STACK = "rbee"
START_S = 90.0
TAIL_LINES = 20

_POLL_S = 0.02
_TAIL_BYTES = 64 * 1024


def up_lock(home: Home) -> Path:
    """Return the file that a live `rbee up` holds a lock on."""
    return home.run / "rbee.lock"


def console_script(name: str) -> str:
    """Return the path of a program of this very installation.

    Raises:
        StartError: It is neither beside this Python nor on the PATH.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which(name)
    if found is None:
        raise StartError(
            f"The program {name} is not installed beside {sys.executable}.",
            remedy="Install rbee again, into the environment that this Python belongs to.",
        )
    return found


def find_queen(settings: KeeperSettings) -> str | None:
    """Return where the queen is: as the settings name it, else as the home's run files do.

    While `rbee up` starts a queen again, its own file names the address, where connections wait for her.
    """
    if settings.queen_url:
        return settings.queen_url
    home = Home(settings.home.expanduser().absolute())
    ready = read_ready_file(home.ready_file(QUEEN)) or _live_stack(home)
    return ready.url if ready else None


def require_queen(settings: KeeperSettings) -> str:
    """Return where the queen is; start nothing.

    Raises:
        UnavailableError: None runs in this home.
    """
    url = find_queen(settings)
    if url is None:
        raise UnavailableError(
            f"No queen runs in {settings.home}.",
            remedy="Start one with `rbee up`, or name one with --queen or RBEE_QUEEN_URL.",
        )
    return url


async def ensure_queen(settings: KeeperSettings, screen: Screen) -> str:
    """Return where the queen is; start queen and hive in the background where none runs.

    Raises:
        StartError: They did not become ready; the last lines of their log are with it.
    """
    if settings.queen_url:
        return settings.queen_url
    home = Home.at(settings.home)
    ready = _usable(home)
    return ready.url if ready else (await start_in_background(home, screen)).url


async def start_in_background(home: Home, screen: Screen, arguments: tuple[str, ...] = ()) -> ReadyFile:
    """Start `rbee up` detached, one per home however many keepers ask, and wait until it is ready.

    Raises:
        StartError: It did not become ready.
    """
    lock = FileLock(home.stack_lock)
    if not lock.acquire():
        screen.say("keeper_wait", "Somebody else is starting queen and hive; waiting for that.")
        if not await lock.acquire_blocking(START_S):
            raise StartError(f"Whoever is starting queen and hive holds {home.stack_lock} for too long.")
    try:
        ready = _usable(home)
        if ready is not None:
            return ready
        log = home.logs / "up.log"
        since = log.stat().st_size if log.exists() else 0
        if is_held(up_lock(home)):
            screen.say("keeper_wait", "Queen and hive are starting already; waiting for them.")
            return await _until_ready(home, None, log, since)
        screen.say(
            "keeper_start", "No queen runs here: starting queen and hive in the background (stop them: rbee down)."
        )
        child = _spawn_up(home, log, arguments)
        try:
            return await _until_ready(home, child, log, since)
        except asyncio.CancelledError:
            screen.say("keeper_leave", "Queen and hive go on starting in the background; `rbee down` stops them.")
            raise
        finally:
            child.close()
    finally:
        lock.release()


def _usable(home: Home) -> ReadyFile | None:
    """Return a stack, or a queen without one, that can be asked; None also while a stack is starting."""
    stack = _live_stack(home)
    if stack is not None:
        return stack
    return None if is_held(up_lock(home)) else read_ready_file(home.ready_file(QUEEN))


def _live_stack(home: Home) -> ReadyFile | None:
    """Return what a live `rbee up` that was ready once says."""
    stack = read_ready_file(home.ready_file(STACK))
    return stack if stack is not None and is_held(up_lock(home)) else None


def _spawn_up(home: Home, log: Path, arguments: tuple[str, ...]) -> Child:
    return spawn(
        ProcessSpec(
            command=(console_script("rbee"), "up", *arguments),
            env={**os.environ, "RBEE_HOME": str(home.root), "PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=log,
        )
    )


async def _until_ready(home: Home, child: Child | None, log: Path, since: int) -> ReadyFile:
    """Wait for the stack's ready file, and for the death of the process that should write it."""
    deadline = asyncio.get_running_loop().time() + START_S
    while True:
        ready = read_ready_file(home.ready_file(STACK))
        if ready is not None and (child is None or ready.pid == child.pid):
            return ready
        status = child.poll() if child else None
        if status is not None and is_held(up_lock(home)):
            child = status = None  # another `rbee up` was quicker: that one is waited for
        if status is not None:
            raise _failed(f"`rbee up` {status.describe()} before it was ready.", log, since)
        if child is None and not is_held(up_lock(home)):
            raise _failed("The `rbee up` that was starting ended before it was ready.", log, since)
        if asyncio.get_running_loop().time() > deadline:
            raise _failed(f"Queen and hive were not ready within {START_S:g} s.", log, since)
        await asyncio.sleep(_POLL_S)


def _failed(message: str, log: Path, since: int) -> StartError:
    return StartError(
        message,
        remedy=f"The whole story is in {log}; `rbee up` in the foreground shows it as it happens.",
        details={"last_lines": last_lines(log, since)},
    )


def last_lines(path: Path, since: int = 0) -> list[str]:
    """Return the last lines of a file, of what was written behind byte `since`."""
    try:
        with path.open("rb") as file:
            file.seek(max(since, path.stat().st_size - _TAIL_BYTES))
            return file.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
    except OSError:
        return []
