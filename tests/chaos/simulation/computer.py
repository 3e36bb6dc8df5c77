"""A simulated computer that runs workers: what the kernel is to a hive, process by process."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from rbee.processes import Child, ExitStatus, ProcessSpec
from rbee.processes.procfs import Marker
from rbee.processes.tree import StopReport
from rbee.testing.virtual_process import Machine, Process, current, replaced

FIRST_PID = 1000
_PLACES = {
    "rbee.processes.capture": ("spawn", "stop_tree"),
    "rbee.hive.workers": ("stop_tree",),
    "rbee.hive.worker_file": ("adopt", "find_marked", "read_process", "machine_boot_id"),
}


class Running:
    """One process of the computer, as its kernel knows it."""

    def __init__(self, pid: int, process: Process, spec: ProcessSpec) -> None:
        self.pid = pid
        self.process = process
        self.spec = spec
        self.asked_to_stop = asyncio.Event()
        self.status: ExitStatus | None = None
        self.children: list[SimulatedChild] = []
        process.on_death.append(self._has_ended)

    def end(self, status: ExitStatus) -> None:
        """Have it end, once."""
        if self.status is None:
            self.status = status
            self.process.kill()

    def _has_ended(self) -> None:
        self.status = self.status or ExitStatus(signal="SIGKILL")
        for child in list(self.children):
            child.tell()


class SimulatedChild(Child):
    """A hive's hold on one process; an adopted one's exit code nobody is told."""

    def __init__(self, running: Running, *, is_adopted: bool) -> None:
        super().__init__(running.pid, running.pid, -1)
        self.running = running
        self._is_adopted = is_adopted
        running.children.append(self)

    @property
    def status(self) -> ExitStatus | None:
        """How it ended."""
        return self.poll()

    def poll(self) -> ExitStatus | None:
        """Return how it ended."""
        if self.running.status is not None and self._is_adopted:
            return ExitStatus(unknown=True)
        return self.running.status

    def exit_future(self) -> asyncio.Future[ExitStatus]:
        """Return a future of its end."""
        future: asyncio.Future[ExitStatus] = asyncio.get_running_loop().create_future()
        self._futures.append(future)
        self.tell()
        return future

    def tell(self) -> None:
        """Tell whoever waits for the end, if it has come."""
        status = self.poll()
        if status is not None:
            futures, self._futures = self._futures, []
            for future in futures:
                if not future.done():
                    future.set_result(status)

    def close(self) -> None:
        """Let go."""
        if self in self.running.children:
            self.running.children.remove(self)


Program = Callable[[Running], Coroutine[Any, Any, None]]


class Computer:
    """One machine with its processes; `program` is what every command on it runs."""

    def __init__(self, machine: Machine, make: Callable[[int], Process], program: Program) -> None:
        self.machine = machine
        self.hive: Process | None = None
        self.processes: dict[int, Running] = {}
        self._make = make
        self._program = program
        self._pids = itertools.count(FIRST_PID)

    def is_hive_alive(self) -> bool:
        """Tell whether the hive's lock is held."""
        return self.hive is not None and self.hive.is_alive

    def living(self) -> list[Running]:
        """Return the processes that live, oldest first."""
        return [running for running in self.processes.values() if running.status is None]

    def spawn(self, spec: ProcessSpec) -> Child:
        """Start a process."""
        for path in (spec.stdout, spec.stderr):
            path.touch(mode=0o600)
        pid = next(self._pids)
        running = self.processes[pid] = Running(pid, self._make(pid), spec)
        running.process.spawn(self._program(running))
        return SimulatedChild(running, is_adopted=False)

    def find(self, marker: Marker | None) -> Running | None:
        """Return the living process that carries a marker."""
        name, value = marker or ("", "")
        return next((running for running in self.living() if running.spec.env.get(name) == value), None)

    async def stop_tree(self, root: Child | int | None, marker: Marker | None, grace_s: float) -> StopReport:
        """Ask a process to end, and kill it after `grace_s`."""
        running = root.running if isinstance(root, SimulatedChild) else self.find(marker)
        if running is None or running.status is not None:
            return StopReport(0, 0, running.status if running else None)
        running.process.go_on()
        running.asked_to_stop.set()
        child = SimulatedChild(running, is_adopted=False)
        killed = 0
        try:
            done, _ = await asyncio.wait({child.exit_future()}, timeout=grace_s)
            if not done:
                killed = 1
        finally:
            running.end(ExitStatus(signal="SIGKILL"))
            child.close()
        return StopReport(1, killed, running.status)

    def adopt(self, pid: int) -> Child | None:
        """Hold on to a process that lives."""
        running = self.processes.get(pid)
        return None if running is None or running.status is not None else SimulatedChild(running, is_adopted=True)


class _Entry:
    def __init__(self, pid: int) -> None:
        self.session = pid


@contextlib.contextmanager
def computers(by_machine: dict[Machine, Computer]) -> Iterator[None]:
    """Let the hives' code see simulated processes: each those of the machine that it runs on."""

    def here() -> Computer:
        process = current()
        assert process is not None
        return by_machine[process.machine]

    async def stop_tree(
        root: Child | int | None, *, marker: Marker | None, grace_s: float, kill_s: float = 10.0
    ) -> StopReport:
        return await here().stop_tree(root, marker, grace_s)

    def find_marked(name: str, value: str) -> list[tuple[int, int]]:
        found = here().find((name, value))
        return [] if found is None else [(found.pid, found.pid)]

    stands_in: dict[str, Any] = {
        "spawn": lambda spec: here().spawn(spec),
        "stop_tree": stop_tree,
        "adopt": lambda pid, start_time, boot_id=None: here().adopt(pid),
        "find_marked": find_marked,
        "read_process": _Entry,
        "machine_boot_id": lambda: "boot",
    }
    with contextlib.ExitStack() as stack:
        for module, names in _PLACES.items():
            for owner in _imported(module):
                for name in names:
                    if hasattr(owner, name):
                        stack.enter_context(replaced(owner, name, stands_in[name]))
        yield


def _imported(name: str) -> list[Any]:
    import importlib

    try:
        return [importlib.import_module(name)]
    except ModuleNotFoundError:
        return []
