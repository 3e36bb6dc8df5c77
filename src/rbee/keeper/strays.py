"""Find the servers of a home that nobody answers for any more, and stop them."""

from __future__ import annotations

import asyncio
import os

from msgspec import Struct

from rbee.contracts.home import Home
from rbee.errors import InternalError
from rbee.processes import adopt, find_marked, stop_tree

SERVERS = ("queen-rbee", "rbee-hive", "llama-worker-rbee")


class HomeProcess(Struct, frozen=True):
    """A server process of a home.

    Attributes:
        program: Its console script's name; `worker` for a worker's own children.
        pid: Its number.
        start_time: When it started, in the kernel's clock ticks: with the number, its identity.
    """

    program: str
    pid: int
    start_time: int


def servers_of(home: Home) -> list[HomeProcess]:
    """Return the live servers that carry this home in their environment: queens, then hives, then workers.

    Other processes that carry it (an editor started where RBEE_HOME was exported, a keeper) are left out.
    """
    found = []
    for pid, start_time in find_marked("RBEE_HOME", str(home.root)):
        program = _program(pid)
        if program is not None:
            found.append(HomeProcess(program, pid, start_time))
    order = (*SERVERS, "worker")
    return sorted(found, key=lambda process: (order.index(process.program), process.pid))


def _program(pid: int) -> str | None:
    """Return which of rbee's servers a process is, or None."""
    for argument in words_of(pid, "cmdline")[:3]:
        name = os.path.basename(argument)
        if name in SERVERS:
            return name
    return "worker" if any(word.startswith("RBEE_WORKER_ID=") for word in words_of(pid, "environ")) else None


def words_of(pid: int, name: str) -> list[str]:
    """Return the words of a process's `cmdline` or `environ`; none when it is gone or another user's."""
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:
            return [os.fsdecode(word) for word in file.read().split(b"\0")]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


async def stop_servers(processes: list[HomeProcess], *, grace_s: float, kill_s: float = 1.0) -> list[HomeProcess]:
    """Stop processes, all at once; return those that live on (they hang in the kernel)."""
    are_gone = await asyncio.gather(*(_stop(process, grace_s, kill_s) for process in processes))
    return [process for process, is_gone in zip(processes, are_gone, strict=True) if not is_gone]


async def _stop(process: HomeProcess, grace_s: float, kill_s: float) -> bool:
    child = adopt(process.pid, process.start_time)
    if child is None:
        return True
    try:
        await stop_tree(child, marker=None, grace_s=grace_s, kill_s=kill_s)
    except InternalError:
        return False
    finally:
        child.close()
    return True
