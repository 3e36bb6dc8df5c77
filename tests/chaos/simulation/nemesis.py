"""What goes wrong: chosen by the seed, in number and in kind."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee.contracts.states import JobState, Reason
from rbee.errors import ConflictError, RbeeError
from rbee.jobs import Fence, JobRegistry
from rbee.testing.memory_network import FINE, Weather
from rbee.testing.virtual_process import Machine, Process

if TYPE_CHECKING:
    from tests.chaos.simulation.run import Simulation

KILL_S = 4.0
TORN = b'{"v":1,"kind":"token","ts":1,"act'


class Nemesis:
    """Makes faults until it is told to stop, then puts everything right again."""

    def __init__(self, simulation: Simulation, chance: random.Random) -> None:
        self._simulation = simulation
        self._cluster = simulation.cluster
        self._chance = chance
        self.counts: dict[str, int] = {}
        self._acts: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "queen killed": self._kill_queen,
            "queen stopped orderly": self._stop_queen,
            "hive killed": self._kill_hive,
            "hive stopped orderly": self._stop_hive,
            "worker killed": self._kill_worker,
            "queen held": self._hold_queen,
            "hive held": self._hold_hive,
            "worker held": self._hold_worker,
            "cable cut": self._cut,
            "clock stepped": self._step_clock,
            "weather": self._change_weather,
            "transition meddled with": self._meddle,
        }

    def count(self, what: str) -> None:
        """Count a fault."""
        self.counts[what] = self.counts.get(what, 0) + 1

    async def rage(self, for_s: float) -> None:
        """Make faults for so long; returns when every one of them is over."""
        loop, chance = self._simulation.loop, self._chance
        names = list(self._acts)
        chosen = chance.sample(names, chance.randint(1, len(names)))  # a run with few kinds goes deeper into each
        mean_s = chance.choice((0.7, 2.0, 5.0))
        until_s = loop.time() + for_s
        async with asyncio.TaskGroup() as group:
            while True:
                await asyncio.sleep(chance.expovariate(1 / mean_s))
                if loop.time() >= until_s:
                    break
                name = chance.choice(chosen)
                group.create_task(self._acts[name]())
        self._simulation.network.weather = FINE
        self._cluster.temper.fails = 0.0

    def _some_s(self) -> float:
        return self._chance.choice((0.01, 0.3, 2.0, 8.0, 25.0)) * self._chance.random()

    async def _kill(self, process: Process) -> None:
        """Kill a process now, or in the middle of what it will be doing some steps from now."""
        if self._chance.random() < 0.3:
            process.kill()
            return
        died = asyncio.Event()
        process.on_death.append(died.set)
        process.kill_after(int(10 ** self._chance.uniform(0, 3.3)))
        await asyncio.wait([asyncio.ensure_future(died.wait())], timeout=KILL_S)
        process.kill()

    # The queen

    async def _kill_queen(self) -> None:
        process = self._cluster.queen_process
        if process is not None and process.is_alive:
            self.count("queen killed")
            await self._kill(process)
            await self._start_queen_later()

    async def _stop_queen(self) -> None:
        process = self._cluster.queen_process
        if process is not None and process.is_alive and not self._cluster.stopping[process].is_set():
            self.count("queen stopped orderly")
            self._cluster.stopping[process].set()
            died = asyncio.Event()
            process.on_death.append(died.set)
            await died.wait()
            if self._cluster.queen_process is process:
                await self._start_queen_later()

    async def _start_queen_later(self) -> None:
        before = self._cluster.queen_process
        await asyncio.sleep(self._some_s())
        if self._cluster.queen_process is before:
            self._cluster.start_queen()

    async def _hold_queen(self) -> None:
        process = self._cluster.queen_process
        if process is not None:
            await self._hold(process, "queen held")

    # Hives

    def _machine(self) -> Machine:
        return self._chance.choice(self._cluster.hive_machines)

    async def _kill_hive(self) -> None:
        machine = self._machine()
        process = self._cluster.computers[machine].hive
        if process is not None and process.is_alive:
            self.count("hive killed")
            await self._kill(process)
            await self._start_hive_later(machine, process)

    async def _stop_hive(self) -> None:
        machine = self._machine()
        process = self._cluster.computers[machine].hive
        if process is not None and process.is_alive and not self._cluster.stopping[process].is_set():
            self.count("hive stopped orderly")
            self._cluster.stopping[process].set()
            died = asyncio.Event()
            process.on_death.append(died.set)
            await died.wait()
            await self._start_hive_later(machine, process)

    async def _start_hive_later(self, machine: Machine, before: Process) -> None:
        await asyncio.sleep(self._some_s())
        if self._cluster.computers[machine].hive is before:
            self._cluster.start_hive(machine)

    async def _hold_hive(self) -> None:
        process = self._cluster.computers[self._machine()].hive
        if process is not None:
            await self._hold(process, "hive held")

    async def _hold(self, process: Process, what: str) -> None:
        if process.is_alive and not process.is_stopped:
            self.count(what)
            process.stop()
            await asyncio.sleep(self._some_s())
            process.go_on()

    # Workers

    async def _kill_worker(self) -> None:
        living = self._cluster.computers[self._machine()].living()
        if living:
            self.count("worker killed")
            running = self._chance.choice(living)
            await self._kill(running.process)
            if self._chance.random() < 0.3:  # in the middle of a line
                _tear(running.spec.stdout)

    async def _hold_worker(self) -> None:
        living = self._cluster.computers[self._machine()].living()
        if living:
            await self._hold(self._chance.choice(living).process, "worker held")

    # All around

    async def _cut(self) -> None:
        cluster = self._cluster
        machines = [cluster.queen_machine, cluster.client_machine, *cluster.hive_machines]
        one, other = self._chance.sample(machines, 2)
        self.count("cable cut")
        self._simulation.network.cut(one, other)
        await asyncio.sleep(self._some_s())
        self._simulation.network.mend(one, other)

    async def _step_clock(self) -> None:
        cluster = self._cluster
        machine = self._chance.choice([cluster.queen_machine, *cluster.hive_machines])
        self.count("clock stepped")
        machine.clock_off_s += self._chance.choice((-3600.0, -5.0, -0.1, 0.1, 5.0, 3600.0))

    async def _change_weather(self) -> None:
        self.count("weather changed")
        chance = self._chance
        self._simulation.network.weather = Weather(
            broken=chance.choice((0.0, 0.05, 0.3)),
            repeated=chance.choice((0.0, 0.05, 0.3)),
            slow=chance.choice((0.0, 0.05, 0.3)),
            slow_s=chance.choice((0.05, 1.0, 4.0)),
        )
        self._cluster.temper.fails = chance.choice((0.0, 0.0, 0.3))

    async def _meddle(self) -> None:
        """Ask the registry, as a process of long ago, for what it must refuse."""
        service = self._cluster.queen
        accepted = list(self._simulation.accepted)
        process = self._cluster.queen_process
        if service is None or process is None or not process.is_alive or not accepted:
            return
        self.count("transition meddled with")
        job_id, attempt = self._chance.choice(accepted), self._chance.randint(0, 3)
        process.spawn(self._claim(service.registry, job_id, attempt))

    async def _claim(self, registry: JobRegistry, job_id: str, attempt: int) -> None:
        before = await registry.get(job_id)
        for to in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED):
            try:
                await registry.end(
                    job_id, to, reason=Reason.OK, message="A zombie.", fence=Fence("a-boot-of-long-ago", attempt)
                )
            except ConflictError:
                continue
            except RbeeError:  # the queen ends
                return
            self._simulation.fault(f"a zombie ended {job_id}, which was {before.state}")
        if before.is_ended:
            try:
                await registry.start(job_id, owner="a-boot-of-long-ago")
            except ConflictError:
                return
            except RbeeError:
                return
            self._simulation.fault(f"{job_id} was started after its end")


def _tear(path: Path) -> None:
    """Leave the beginning of a line behind, as a writer does that is killed in the middle of it."""
    if path.exists():
        with path.open("ab") as file:
            file.write(TORN)


def descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))
