"""One run of the simulation: a seed in, what happened out."""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct

from rbee.contracts.operations import HiveCheck, Infer, Operation, QueenCheck
from rbee.testing.inline_store import inline_stores
from rbee.testing.virtual_clock import Deadlock, VirtualLoop, run_virtual
from rbee.testing.virtual_process import Process, virtual_world
from rbee.worker.desk import Desk
from tests.chaos.simulation.answers import prompt_of
from tests.chaos.simulation.callers import Call, CallPlan, call
from tests.chaos.simulation.cluster import DEFAULT, MODELS, SHORT, Cluster, machines_of, make_models
from tests.chaos.simulation.computer import computers
from tests.chaos.simulation.nemesis import Nemesis
from tests.chaos.simulation.oracles import check
from tests.chaos.simulation.readers import Plan, Transcript, ask_for

STORM_S = (4.0, 25.0)
JOBS = (3, 14)
CALLS = (0, 0, 2, 5)
# What is left to be answered when the faults stop.
WORK_S = 40.0
SETTLE_S = 3.0
TELLING = (
    "queen_continue",
    "queen_resume",
    "hive_adopt",
    "hive_resume",
    "hive_clear_stray",
    "worker_exit",
    "queen_stop_stuck",
    "crash_loop",
    "gap",
    "claimed",
)
LOOK_S = 0.5


class Outcome(Struct, kw_only=True):
    """What a run came to.

    Attributes:
        faults: What did not hold; empty when all is well.
        digest: The same for two runs that did the same.
        rest_s: How long it took to come to rest once the faults had stopped, in virtual seconds.
        made: The faults, by kind.
        said: How often some things were narrated that only faults bring about.
    """

    seed: int
    faults: list[str]
    digest: str
    jobs: int
    states: dict[str, int]
    steps: int
    virtual_s: float
    cpu_s: float
    rest_s: float
    made: dict[str, int]
    said: dict[str, int]


class Simulation:
    """What the parts of a run share."""

    def __init__(self, loop: VirtualLoop, seed: int, home: Path, grounds: Grounds) -> None:
        self.loop = loop
        self.seed = seed
        pace = random.Random(f"{seed} pace").choice((DEFAULT, SHORT, SHORT))
        self.cluster = Cluster(loop, seed, home, grounds.models, grounds.blank, pace)
        self.network = self.cluster.network
        self.accepted: dict[str, Plan] = {}
        self.cancelled: set[str] = set()
        self.transcripts: list[Transcript] = []
        self.calls: list[Call] = []
        self.desks: dict[Process, Desk] = self.cluster.desks
        self.is_stormy = True
        self.faults: list[str] = []
        self.rest_s = 0.0
        self._database = home / "queen" / "queen.db"

    def fault(self, what: str) -> None:
        """Take note of something that does not hold."""
        self.faults.append(f"at {self.loop.time():.3f} s: {what}")

    def committed_state(self, job_id: str) -> str | None:
        """Return a job's state as it is on disk."""
        connection = sqlite3.connect(self._database)
        try:
            row = connection.execute("SELECT state FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        finally:
            connection.close()
        return None if row is None else str(row[0])

    async def play(self) -> Nemesis:
        """Let everything happen."""
        chance = random.Random(f"{self.seed} plan")
        nemesis = Nemesis(self, random.Random(f"{self.seed} nemesis"))
        self.cluster.temper.token_s = chance.choice((0.01, 0.05, 0.15, 0.3))
        self.cluster.start_queen()
        for machine in self.cluster.hive_machines:
            self.cluster.start_hive(machine)
        storm_s = chance.uniform(*STORM_S)
        plans = [plan(chance, number, storm_s) for number in range(chance.randint(*JOBS))]
        asking = [asyncio.ensure_future(self._ask_at(one)) for one in plans]
        calls = [call_plan(chance, number, storm_s) for number in range(chance.choice(CALLS))]
        asking += [asyncio.ensure_future(call(self, one)) for one in calls]
        await nemesis.rage(storm_s)
        self.is_stormy = False
        await self._come_to_rest(asking)
        return nemesis

    async def _ask_at(self, one: Plan) -> None:
        await asyncio.sleep(one.at_s)
        await ask_for(self, one)

    async def _come_to_rest(self, asking: Sequence[asyncio.Future[None]]) -> None:
        began_s = self.loop.time()
        limit_s = self.cluster.pace.rest_s + WORK_S
        until_s = began_s + limit_s
        done, waiting = await asyncio.wait(asking, timeout=limit_s)
        for future in done:
            future.result()
        while (living := self._living()) and self.loop.time() < until_s:  # noqa: ASYNC110  # what is on disk
            await asyncio.sleep(LOOK_S)
        while self._is_stopping_old_requests() and self.loop.time() < until_s:  # noqa: ASYNC110  # once a second
            await asyncio.sleep(LOOK_S)
        self.rest_s = self.loop.time() - began_s
        if waiting or living:
            self.fault(f"after {self.rest_s:.0f} s {living} jobs live, and {len(waiting)} callers or readers wait")
        await asyncio.sleep(SETTLE_S)

    def _is_stopping_old_requests(self) -> bool:
        queen = self.cluster.queen
        return queen is not None and bool(queen.workers.superseded())

    def _living(self) -> int:
        """Count the jobs that have not ended."""
        connection = sqlite3.connect(self._database)
        try:
            found = connection.execute(
                "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running') AND principal <> 'queen'"
            ).fetchone()
        finally:
            connection.close()
        return int(found[0])


def plan(chance: random.Random, number: int, storm_s: float) -> Plan:
    """Choose one job."""
    return Plan(
        number=number,
        at_s=chance.uniform(0, storm_s),
        operation=operation(chance),
        copies=chance.choice((1, 1, 1, 2, 3)),
        cancel_after_s=chance.expovariate(1 / 3) if chance.random() < 0.2 else None,
        readers=tuple(
            chance.uniform(0, 5) if chance.random() < 0.5 else 0.0 for _ in range(chance.choice((0, 1, 2)))
        ),
    )


def operation(chance: random.Random) -> Operation:
    """Choose what a job asks for."""
    timeout_s = chance.choice((2.0, 10.0)) if chance.random() < 0.1 else None
    kind = chance.random()
    if kind < 0.12:
        return QueenCheck(lines=chance.randint(0, 20), timeout_s=timeout_s)
    if kind < 0.18:
        return HiveCheck(lines=chance.randint(0, 5), timeout_s=timeout_s)
    return Infer(
        model=chance.choice(MODELS),
        prompt=prompt_of(chance.randint(1, 500), chance.choice((1, 10, 20, 30))),
        max_tokens=chance.randint(1, 20) if chance.random() < 0.3 else None,
        timeout_s=timeout_s,
        attempts=chance.choice((1, 2, 2, 2, 4)),
        priority=chance.choice((0, 0, 5)),
        store=chance.random() < 0.9,
        keep_alive=chance.choice((None, None, 1.0, 300.0)),
    )


def call_plan(chance: random.Random, number: int, storm_s: float) -> CallPlan:
    """Choose one OpenAI call."""
    return CallPlan(
        number=number,
        at_s=chance.uniform(0, storm_s),
        model=chance.choice(MODELS),
        prompt=prompt_of(chance.randint(1, 500), chance.choice((1, 10, 20, 30))),
        is_streamed=chance.random() < 0.7,
        leaves_after=chance.randint(1, 10) if chance.random() < 0.2 else None,
    )


class Grounds(Struct, frozen=True):
    """What all runs share on disk: the models, and an empty registry to copy."""

    directory: Path
    models: Path
    blank: Path


@contextlib.contextmanager
def grounds() -> Iterator[Grounds]:
    """Lay out what all runs share, in memory where there is such a place."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="rbee-sim-", dir=shm if shm.is_dir() else None) as name:
        directory = Path(name)
        blank = directory / "blank.db"
        _make_blank(blank)
        yield Grounds(directory, make_models(directory / "models"), blank)


def _make_blank(path: Path) -> None:
    from rbee.jobs import JobRegistry

    async def make() -> None:
        await JobRegistry.open(path).close()

    asyncio.run(make())
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.execute("DELETE FROM meta")
    connection.close()


def simulate(seed: int, where: Grounds, look: Callable[[Path], None] = lambda database: None) -> Outcome:
    """Run one seed; `look` is shown the queen's registry at the end."""
    home = where.directory / f"run-{seed}"
    home.mkdir()
    spoken = io.StringIO()
    began_s = time.process_time()
    try:
        with contextlib.redirect_stderr(spoken):
            outcome = _simulate(seed, home, where)
        look(home / "queen" / "queen.db")
        if "incident" in spoken.getvalue():
            outcome.faults.append(f"a fault of ours was reported:\n{spoken.getvalue()[:4000]}")
        outcome.cpu_s = time.process_time() - began_s
        return outcome
    finally:
        shutil.rmtree(home)


def _simulate(seed: int, home: Path, where: Grounds) -> Outcome:
    loop = VirtualLoop()
    simulation = Simulation(loop, seed, home, where)
    cluster = simulation.cluster
    with virtual_world(loop, seed), inline_stores(), computers(cluster.computers), machines_of(cluster):
        return run_virtual(loop, _see_through(simulation, home))


async def _see_through(simulation: Simulation, home: Path) -> Outcome:
    made = simulation.network.counts
    try:
        nemesis = await simulation.play()
        made = nemesis.counts | simulation.network.counts
    except Deadlock as error:
        simulation.fault(str(error))
    faults = [*simulation.faults, *simulation.cluster.faults, *simulation.network.faults, *simulation.loop.errors]
    faults += check(simulation, home / "queen" / "queen.db")
    simulation.cluster.end()
    return _outcome(simulation, faults, made, home)


def _outcome(simulation: Simulation, faults: list[str], made: dict[str, int], home: Path) -> Outcome:
    connection = sqlite3.connect(home / "queen" / "queen.db")
    states = dict(
        connection.execute("SELECT state || ' ' || coalesce(reason, ''), count(*) FROM jobs GROUP BY 1 ORDER BY 1")
    )
    said = dict.fromkeys(TELLING, 0)
    for log_id, last_seq, body in connection.execute("SELECT log_id, last_seq, body FROM log_rows"):
        simulation.network.trace.add(0.0, log_id, last_seq, body)
        for word in TELLING:
            said[word] += bytes(body).count(f'"{word}"'.encode())
    connection.close()
    return Outcome(
        seed=simulation.seed,
        faults=faults,
        digest=simulation.network.trace.digest(),
        jobs=len(simulation.accepted),
        states=states,
        steps=simulation.loop.steps,
        virtual_s=simulation.loop.time(),
        cpu_s=0.0,
        rest_s=simulation.rest_s,
        made=made,
        said=said,
    )
