"""Stop everything that runs in a home: what `rbee down` does."""

from __future__ import annotations

import asyncio
import os
import signal

from rbee.contracts.home import Home, read_ready_file
from rbee.errors import InternalError
from rbee.keeper.exit_codes import EXIT_FINE
from rbee.keeper.local_stack import HIVE, QUEEN, STACK, up_lock
from rbee.keeper.render import Screen
from rbee.keeper.strays import HomeProcess, servers_of, stop_servers, words_of
from rbee.processes import Child, adopt, find_marked, is_held
from rbee.processes.procfs import read_process

DOWN_S = 15.0
ALONE_S = 5.0

_POLL_S = 0.05


async def stop_home(home: Home, screen: Screen) -> int:
    """Stop `rbee up` of a home and whatever else serves it; return 0 when nothing is left, or nothing ran.

    Raises:
        InternalError: Something cannot be stopped; it says what.
    """
    before = servers_of(home)
    stack = _stack_of(home)
    if stack is None and not before:
        _forget_all(home)
        screen.say("keeper_down", f"Nothing runs in {home.root}.")
        return EXIT_FINE
    if stack is not None:
        await _stop_stack(stack)
    for program in (QUEEN, HIVE):  # started without `rbee up`, or left by one that was killed
        await stop_servers([left for left in servers_of(home) if left.program == program], grace_s=ALONE_S)
    alive = await stop_servers(servers_of(home), grace_s=ALONE_S)
    if alive:
        raise InternalError(
            f"Still there after SIGKILL: {_named(alive)}.", remedy="They hang in the kernel; see what with ps."
        )
    _forget_all(home)
    stopped = [HomeProcess("rbee up", stack.pid, stack.start_time)] if stack is not None else []
    screen.say("keeper_down", f"Stopped {_named([*stopped, *before])}.")
    return EXIT_FINE


def _stack_of(home: Home) -> Child | None:
    """Hold on to the live `rbee up` of a home, which may still be starting.

    A stranger that has its number now is left alone: the command line must fit, and for a number read off the
    run file the home's lock must be held.
    """
    ready = read_ready_file(home.ready_file(STACK)) if is_held(up_lock(home)) else None
    marked = [pid for pid, _ in find_marked("RBEE_HOME", str(home.root))]
    for pid in [ready.pid, *marked] if ready else marked:
        entry = read_process(pid)
        if entry is not None and pid != os.getpid() and is_up(words_of(pid, "cmdline")):
            return adopt(pid, entry.start_time)
    return None


def is_up(words: list[str]) -> bool:
    """Tell whether a command line is `rbee up`, with whatever options."""
    names = [os.path.basename(word) for word in words]
    start = next((at for at, name in enumerate(names) if name in ("rbee", "rbee-keeper")), len(names))
    rest = words[start + 1 :]
    while rest and rest[0].startswith("--"):
        rest = rest[1:] if "=" in rest[0] else rest[2:]
    return rest[:1] == ["up"]


async def _stop_stack(stack: Child) -> None:
    """Ask `rbee up` to stop; kill it when it takes too long. What it held is stopped afterwards."""
    stack.send_signal(signal.SIGTERM)
    stack.send_signal(signal.SIGCONT)
    try:
        await asyncio.wait_for(stack.wait(), DOWN_S)
    except TimeoutError:
        stack.send_signal(signal.SIGKILL)
        await stack.wait()


def _forget_all(home: Home) -> None:
    """Remove the run files of what is gone; a killed server cannot do it itself."""
    if not is_held(up_lock(home)):
        home.ready_file(STACK).unlink(missing_ok=True)
    for program in (QUEEN, HIVE):
        if read_ready_file(home.ready_file(program)) is None:
            home.ready_file(program).unlink(missing_ok=True)


def _named(processes: list[HomeProcess]) -> str:
    return ", ".join(f"{process.program} (pid {process.pid})" for process in processes)
