"""The simulated installation: one queen, two hives, and the machines they run on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.heartbeats import DeviceInfo, MachineInfo
from rbee.contracts.home import Home
from rbee.contracts.ids import new_boot_id
from rbee.contracts.models import KNOWN_MODELS, parse_model_ref
from rbee.hive import machine as hive_machine
from rbee.hive import outbox as outbox_module
from rbee.hive.app import make_app as make_hive_app
from rbee.hive.catalog import directory_name
from rbee.hive.gguf import facts_of, read_header
from rbee.hive.outbox import Outbox
from rbee.hive.queen_link import QueenLink
from rbee.hive.service import HiveService, open_narration_file, read_hive_id
from rbee.hive.settings import HiveSettings
from rbee.http import routes
from rbee.jobs import JobRegistry
from rbee.narration import narrate
from rbee.narration.scope import Scope
from rbee.processes import ExitStatus
from rbee.queen.app import make_app as make_queen_app
from rbee.queen.service import QueenService
from rbee.queen.settings import QueenSettings
from rbee.testing.inline_store import open_store
from rbee.testing.memory_network import Network
from rbee.testing.memory_session import memory_session
from rbee.testing.tiny_gguf import tiny_gguf
from rbee.testing.virtual_clock import VirtualLoop
from rbee.testing.virtual_process import Machine, Process, current, replaced
from rbee.worker.desk import Desk
from tests.chaos.simulation.checked_store import CheckedStore
from tests.chaos.simulation.computer import Computer, Running
from tests.chaos.simulation.session_road import SessionRoad
from tests.chaos.simulation.watching import WatchedSink
from tests.chaos.simulation.worker import Temper, worker_program

MODELS = ("smollm2:135m", "hf:sim/one:Q4_0", "hf:sim/two:Q4_0")
QUEEN_URL = "http://127.0.0.1:8500"
GIB = 2**30
SLOTS = 2
FLUSH_S = 2.0


def make_models(directory: Path) -> Path:
    """Lay out the models that every hive has."""
    data = tiny_gguf()
    for text in MODELS:
        place = directory / directory_name(parse_model_ref(text))
        place.mkdir(parents=True)
        (place / "model.gguf").write_bytes(data)
        facts = facts_of(read_header(place / "model.gguf"))  # or the first run alone would write them down
        known = KNOWN_MODELS.get(text)
        manifest = {
            "ref": text,
            "sha256": known.sha256 if known else "0" * 64,
            "size_bytes": len(data),
            "source": "known" if known else "hub",
            "origin": "here",
            "pulled_at": "2026-01-01T00:00:00Z",
            "facts": facts,
        }
        (place / "model.json").write_bytes(msgspec.json.encode(manifest))
    return directory


class Pace(Struct, frozen=True):
    """How long things are waited for: as by default, or short, so that more of it happens in a run.

    Attributes:
        source_bytes_max: How much of one file a batch may hold.
    """

    stale_s: float = 3.0
    lost_s: float = 15.0
    timeout_s: float = 45.0
    stall_s: float = 30.0
    grace_s: float = 10.0
    lease_s: float = 30.0
    source_bytes_max: int = outbox_module.SOURCE_BYTES_MAX

    @property
    def rest_s(self) -> float:
        """Within what time everything must be at rest, but for the work that is left."""
        return max(self.lease_s, self.timeout_s) + self.grace_s + 5.0


DEFAULT = Pace()
SHORT = Pace(stale_s=1.6, lost_s=4.0, timeout_s=10.0, stall_s=8.0, grace_s=3.0, lease_s=6.0, source_bytes_max=600)


class Cluster:
    """Starts, stops and starts again.

    Attributes:
        queen: The service of the queen that lives; None while none does.
        hives: The services of the hives that live, by name.
        faults: Programs that ended by themselves.
    """

    def __init__(self, loop: VirtualLoop, seed: object, home: Path, models: Path, blank: Path, pace: Pace) -> None:
        self.pace = pace
        self.loop = loop
        self.seed = seed
        self.home = home
        self.models = models
        self.blank = blank
        self.queen_machine = Machine("queen", "127.0.0.1")
        self.client_machine = Machine("client", "127.0.0.9")
        self.hive_machines = [Machine("hive-a", "127.0.0.2"), Machine("hive-b", "127.0.0.3")]
        machines = [self.queen_machine, self.client_machine, *self.hive_machines]
        self.network = Network(loop, seed, machines)
        self.temper = Temper()
        self.computers = {machine: self._computer(machine) for machine in self.hive_machines}
        self.queen: QueenService | None = None
        self.queen_process: Process | None = None
        self.queen_stores: list[CheckedStore] = []
        self.hives: dict[str, HiveService] = {}
        self.stopping: dict[Process, asyncio.Event] = {}
        self.faults: list[str] = []
        self.desks: dict[Process, Desk] = {}
        self._boots = 0

    def process(self, name: str, machine: Machine, actor: str) -> Process:
        """Make a process; of one name there may be many, one after the other."""
        self._boots += 1
        return Process(self.loop, f"{name}.{self._boots}", machine, self.seed, actor=actor)

    def _computer(self, machine: Machine) -> Computer:
        def make(pid: int) -> Process:
            return Process(self.loop, f"{machine.name}.worker.{pid}", machine, self.seed, actor="worker")

        async def program(running: Running) -> None:
            try:
                await worker_program(running, self.computers[machine], self)
            except Exception as error:  # noqa: BLE001  # a program that ends by itself is a fault
                self.faults.append(f"{running.process.name} ended with {error!r}")
                running.end(ExitStatus(exit_code=1))

        return Computer(machine, make, program)

    def _begin(self, process: Process, main: Any) -> None:
        self.stopping[process] = asyncio.Event()

        async def run() -> None:
            try:
                await main(process, self.stopping[process])
            except Exception as error:  # noqa: BLE001  # a program that ends by itself is a fault
                self.faults.append(f"{process.name} ended with {type(error).__name__}: {error}")
            process.kill()

        process.spawn(run())

    # The queen

    def start_queen(self) -> None:
        """Start a queen on the home."""
        self.queen_process = self.process("queen", self.queen_machine, "queen")
        self._begin(self.queen_process, self._queen)

    async def _queen(self, process: Process, stop: asyncio.Event) -> None:
        pace = self.pace
        settings = QueenSettings(
            home=self.home / "queen",
            slots=SLOTS,
            hive_stale_s=pace.stale_s,
            hive_lost_s=pace.lost_s,
            hive_timeout_s=pace.timeout_s,
            stall_s=pace.stall_s,
            stop_grace_s=pace.grace_s,
        )
        home = Home.at(settings.home)
        store = open_store(process, self._database(home.root / "queen.db"), CheckedStore)
        assert isinstance(store, CheckedStore)
        self.queen_stores.append(store)
        registry = JobRegistry(store, queued_max=settings.queued_max)
        service = QueenService(settings, registry, memory_session(self.network, process), new_boot_id())
        process.on_death.append(lambda: self._forget_queen(service))
        await service.open()
        self.queen = service
        self.network.listen(self.queen_machine.address, 8500, make_queen_app(service, QUEEN_URL), process)
        background = asyncio.ensure_future(service.run())
        await stop.wait()
        await service.close(5.0)
        background.cancel()
        await asyncio.gather(background, return_exceptions=True)
        await registry.close()

    def _forget_queen(self, service: QueenService) -> None:
        if self.queen is service:
            self.queen = None

    # Hives

    def start_hive(self, machine: Machine) -> None:
        """Start a hive on a machine that has none."""
        process = self.computers[machine].hive = self.process(machine.name, machine, "hive")
        self._begin(process, self._hive)

    async def _hive(self, process: Process, stop: asyncio.Event) -> None:
        machine = process.machine
        settings = HiveSettings(
            home=self.home / machine.name,
            queen_url=QUEEN_URL,
            models=self.models,
            stop_grace_s=self.pace.grace_s,
            worker_lease_s=self.pace.lease_s,
        )
        home = Home.at(settings.home)
        hive_id, boot_id = read_hive_id(home), new_boot_id()
        fd = open_narration_file(home, boot_id)
        process.on_death.append(lambda: os.close(fd))
        sink = WatchedSink(fd, home.hive / boot_id, self.computers[machine].files)
        process.speak(sink, Scope(hive_id=hive_id))
        registry = JobRegistry(open_store(process, self._database(home.root / "hive.db")))
        session = memory_session(self.network, process)
        link = QueenLink(session, QUEEN_URL, hive_id, None, make_road=partial(SessionRoad, session))
        outbox = Outbox(link)
        process.on_death.append(outbox.close)
        url = f"http://{machine.address}:9000"
        service = HiveService(settings, home, registry, link, outbox, hive_id=hive_id, boot_id=boot_id, url=url)
        process.on_death.append(lambda: self._forget_hive(machine, service))
        process.on_death.append(lambda: _close_captured(service))
        await service.open()
        self.hives[machine.name] = service
        self.network.listen(machine.address, 9000, make_hive_app(service), process)
        tasks = [asyncio.ensure_future(service.run_heartbeats()), asyncio.ensure_future(outbox.run())]
        narrate("hive_ready", f"Listening on {url}.", url=url)
        told = asyncio.ensure_future(stop.wait())
        endless: list[asyncio.Future[Any]] = [*tasks, service.deliveries.failure]
        await asyncio.wait([told, *endless], return_when=asyncio.FIRST_COMPLETED)
        await service.close()
        await outbox.flush(FLUSH_S)
        for task in endless:
            task.cancel()
        for result in await asyncio.gather(*endless, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        await service.deliveries.close()
        await registry.close()

    def _forget_hive(self, machine: Machine, service: HiveService) -> None:
        if self.hives.get(machine.name) is service:
            del self.hives[machine.name]

    def _database(self, path: Path) -> Path:
        if not path.exists():
            shutil.copyfile(self.blank, path)
            path.chmod(0o600)
        return path

    def end(self) -> None:
        """Kill everything, so that nothing stays open."""
        for computer in self.computers.values():
            for running in computer.living():
                running.end(ExitStatus(signal="SIGKILL"))
            if computer.hive is not None:
                computer.hive.kill()
        if self.queen_process is not None:
            self.queen_process.kill()

    def look_around(self) -> MachineInfo:
        """Say what a machine has: memory for a few workers."""
        process = current()
        assert process is not None
        used = len(self.computers[process.machine].living())
        return MachineInfo(
            hostname=process.machine.name,
            cpus=2,
            memory_bytes=16 * GIB,
            memory_free_bytes=(4 - used) * GIB,
            disk_free_bytes=100 * GIB,
        )


def _close_captured(service: HiveService) -> None:
    for worker in service.workers._workers.values():
        worker.process.stdout.close()
        worker.process.stderr.close()


@contextlib.contextmanager
def machines_of(cluster: Cluster) -> Any:
    """Let hives see the simulated machines' memory and devices."""
    cpu = DeviceInfo(device="cpu", name="simulated", memory_bytes=16 * GIB, memory_free_bytes=8 * GIB)
    with (
        replaced(hive_machine, "machine_info", lambda path: cluster.look_around()),
        replaced(hive_machine, "list_devices", lambda: [cpu]),
        replaced(outbox_module, "SOURCE_BYTES_MAX", cluster.pace.source_bytes_max),
        replaced(outbox_module, "BATCH_BYTES_MAX", 4 * cluster.pace.source_bytes_max),
        replaced(routes, "openapi", lambda table, title: {}),  # takes long to describe, and nobody reads it here
    ):
        yield
