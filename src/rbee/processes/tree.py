"""Find every process that belongs to one we started, also those that tried to leave it, and stop them all."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterable

from msgspec import Struct

from rbee.errors import InternalError
from rbee.processes.child import Child, ExitStatus
from rbee.processes.linux import require_linux
from rbee.processes.members import Root, tree_members
from rbee.processes.procfs import (
    Identity,
    Marker,
    ProcessEntry,
    all_processes,
    carries,
    read_process,
    self_and_ancestors,
)

_RESCAN_S = 0.1
_KILL_LOOK_S = 0.01
_RESCAN_SHARE = 10  # looking takes at most one part in so many of the time, however many processes there are
_LOOKS_MAX = 20
_PIDFD_SIGNAL_PROCESS_GROUP = 4  # Linux 6.9; older kernels refuse it, and the single signals have to do


class StopReport(Struct, frozen=True):
    """What stopping took.

    Attributes:
        found: How many processes there were.
        killed: How many of them needed SIGKILL.
        status: How the main process ended; None when it was no `Child`.
    """

    found: int
    killed: int
    status: ExitStatus | None


def find_marked(name: str, value: str) -> list[Identity]:
    """Return number and start time of every live process started with `name=value` in its environment.

    This process and its ancestors are left out, and so are processes of other users, which cannot be read.
    """
    require_linux()
    entries = all_processes()
    spared = self_and_ancestors(entries)
    return [
        entry.identity
        for pid, entry in sorted(entries.items())
        if pid not in spared and not entry.is_gone and carries(pid, (name, value))
    ]


async def stop_tree(
    root: Child | int | None, *, marker: Marker | None, grace_s: float, kill_s: float = 10.0
) -> StopReport:
    """Stop a process with everything that belongs to it, and return once nothing of it is left.

    The process and its group get SIGTERM and SIGCONT; what left the group gets them when the process is gone.
    After `grace_s` everything gets SIGKILL, again and again until nothing is found. A signal goes only to a
    process whose start time was compared. Zombies count as gone. Cancelled, it sends SIGKILL at once.

    Args:
        root: The main process, or its number; None to stop only what carries the marker.
        marker: Name and value of an environment variable that only this tree has.
        grace_s: How long SIGTERM may take.
        kill_s: How long SIGKILL may take.

    Raises:
        InternalError: Something lived on after `kill_s`; it says which processes.
        ValueError: The root is this process or one of its ancestors.
    """
    require_linux()
    tree = _Tree(root, marker)
    try:
        await tree.ask(grace_s)
        await tree.end(kill_s)
    except asyncio.CancelledError:
        tree.kill(tree.look())
        raise
    finally:
        tree.close()
    return StopReport(len(tree.known), len(tree.killed), root.poll() if isinstance(root, Child) else None)


def kill_tree(root: Child, *, marker: Marker | None, kill_s: float = 2.0) -> None:
    """Kill a process with everything that belongs to it, from any thread, with no event loop; see `stop_tree`.

    Blocks until nothing of it is left, or for `kill_s`.
    """
    require_linux()
    tree = _Tree(root, marker)
    deadline_s = time.monotonic() + kill_s
    try:
        tree.kill(tree.look())
        while (alive := tree.look_until_still()) and time.monotonic() < deadline_s:
            tree.kill(alive)
            time.sleep(_KILL_LOOK_S)
    finally:
        tree.close()


def _root_of(root: Child | int | None) -> Root | None:
    if root is None:
        return None
    if isinstance(root, Child):
        return Root(root.pid, root.start_time, root.ended_ticks)
    entry = read_process(root)
    return Root(root, entry.start_time) if entry else None


class _Tree:
    """The members of one tree and a pidfd for each that was signalled; owned by one `stop_tree`."""

    def __init__(self, root: Child | int | None, marker: Marker | None) -> None:
        self.child = root if isinstance(root, Child) else None
        self.root = _root_of(root)
        if self.root is not None and self.root.pid in self_and_ancestors(all_processes()):
            raise ValueError(f"Process {self.root.pid} is this process or one of its ancestors.")
        self.marker = marker
        self.known: set[Identity] = set()
        self.asked: set[Identity] = set()
        self.killed: set[Identity] = set()
        self.pidfds: dict[Identity, int] = {}
        self.seen: frozenset[Identity] = frozenset()
        self.look_s = 0.0
        self._hold_root()

    def _hold_root(self) -> None:
        """Keep a pidfd of the root to the end: its group may outlive it."""
        pidfd = self.child.held() if self.child is not None else None
        if pidfd is not None and self.root is not None:
            self.pidfds[self.root.identity] = pidfd
            return
        entry = read_process(self.root.pid) if self.root is not None else None
        if entry is not None and self.root is not None and entry.identity == self.root.identity:
            self._open(entry)

    async def ask(self, grace_s: float) -> None:
        """Ask everybody to end, and wait until all did or the time is over."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + grace_s
        while alive := self.look_until_still():
            left_s = deadline - loop.time()
            if left_s <= 0:
                return
            self._terminate(alive)
            await self._any_exit(min(max(_RESCAN_S, _RESCAN_SHARE * self.look_s), left_s))

    async def end(self, kill_s: float) -> None:
        """Kill everybody until nobody is found."""
        self.kill(self.look())  # also who forks faster than we look, and was found by none
        loop = asyncio.get_running_loop()
        deadline = loop.time() + kill_s
        while alive := self.look_until_still():
            if loop.time() > deadline:
                raise _survived(alive, kill_s)
            self.kill(alive)
            await self._any_exit(max(_RESCAN_S, _RESCAN_SHARE * self.look_s))

    def look_until_still(self) -> list[ProcessEntry]:
        """Return the live members; an empty answer is given only when nobody new came while we looked.

        One that starts another and ends, again and again, may be in none of many looks: but then each of them
        meets somebody who was not there before.
        """
        before: frozenset[Identity] | None = None
        for _ in range(_LOOKS_MAX):
            if found := self.look():
                return found
            if before is not None and self.seen <= before:
                break
            before = self.seen
        return []

    def look(self) -> list[ProcessEntry]:
        """Return the live members, and open a pidfd for each new one."""
        began_s = time.monotonic()
        entries = all_processes()
        self.seen = frozenset(entry.identity for entry in entries.values())
        if self.child is not None:  # its end may have been seen by somebody else meanwhile
            self.root = _root_of(self.child)
        marked = [pid for pid in entries if carries(pid, self.marker)] if self.marker else []
        members = tree_members(
            entries, self.root, marked=marked, known=self.known, spared=self_and_ancestors(entries)
        )
        alive = [entries[pid] for pid in members if not entries[pid].is_gone]
        self._close_but(alive)
        found = [entry for entry in alive if self._open(entry)]
        self.known.update(entry.identity for entry in found)
        self.look_s = time.monotonic() - began_s
        return found

    def _open(self, entry: ProcessEntry) -> bool:
        if entry.identity in self.pidfds:
            return True
        try:
            pidfd = os.pidfd_open(entry.pid)
        except ProcessLookupError:
            return False
        now = read_process(entry.pid)
        if now is None or now.start_time != entry.start_time:
            os.close(pidfd)
            return False
        self.pidfds[entry.identity] = pidfd
        return True

    def _terminate(self, alive: Iterable[ProcessEntry]) -> None:
        """Send SIGTERM once to everybody whose turn it is: the root and its group, then, without it, the rest."""
        alive = list(alive)
        root = self.root
        root_lives = root is not None and any(entry.identity == root.identity for entry in alive)
        for entry in alive:
            first = root is not None and (entry.identity == root.identity or entry.group == root.pid)
            if entry.identity not in self.asked and (first or not root_lives):
                self.asked.add(entry.identity)
                self._send(entry.identity, signal.SIGTERM)
                self._send(entry.identity, signal.SIGCONT)  # a stopped process hears nothing else

    def kill(self, alive: Iterable[ProcessEntry]) -> None:
        """Send SIGKILL to everybody, and in one stroke to the whole group, which no fork can dodge."""
        self._kill_group()
        for entry in alive:
            self.killed.add(entry.identity)
            self._send(entry.identity, signal.SIGKILL)

    def _kill_group(self) -> None:
        if self.root is None or os.getpgrp() == self.root.pid:
            return
        pidfd = self.pidfds.get(self.root.identity)
        if pidfd is not None:
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL, None, _PIDFD_SIGNAL_PROCESS_GROUP)
            except OSError:
                pass  # no such group any more, or an older kernel: each is killed by itself below

    def _send(self, identity: Identity, number: int) -> None:
        try:
            signal.pidfd_send_signal(self.pidfds[identity], number)
        except ProcessLookupError:
            pass  # ended meanwhile
        except PermissionError:
            pass  # another user's: when it stays, `end` says so

    async def _any_exit(self, timeout_s: float) -> None:
        """Wait until a member ends, or until it is time to look for new ones."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        watched = [pidfd for identity, pidfd in self.pidfds.items() if self._may_live(identity)]

        def resolve() -> None:
            if not ended.done():
                ended.set_result(None)

        try:
            for pidfd in watched:
                loop.add_reader(pidfd, resolve)
            await asyncio.wait([ended], timeout=timeout_s)
        finally:
            for pidfd in watched:
                loop.remove_reader(pidfd)

    def _may_live(self, identity: Identity) -> bool:
        entry = read_process(identity[0])
        return entry is not None and entry.start_time == identity[1] and not entry.is_gone

    def _close_but(self, alive: Iterable[ProcessEntry]) -> None:
        """Close the pidfds of who is gone; the root's stays, for its group may outlive it."""
        keep = {entry.identity for entry in alive}
        if self.root is not None:
            keep.add(self.root.identity)
        for identity in [identity for identity in self.pidfds if identity not in keep]:
            os.close(self.pidfds.pop(identity))

    def close(self) -> None:
        """Close every pidfd."""
        for pidfd in self.pidfds.values():
            os.close(pidfd)
        self.pidfds.clear()


def _survived(alive: Iterable[ProcessEntry], kill_s: float) -> InternalError:
    pids = sorted(entry.pid for entry in alive)
    return InternalError(
        f"Processes {', '.join(map(str, pids))} are still there {kill_s:g} s after SIGKILL.",
        remedy="They hang in the kernel (a driver, a network disk) or belong to another user: look with ps.",
        details={"pids": pids},
    )
