"""Those who ask for jobs and read their logs, across everything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from rbee.client import JobClient
from rbee.client.follow import LogFollower
from rbee.contracts.operations import Infer, Operation
from rbee.errors import ConflictError, GoneError, NotFoundError, OverloadedError, RbeeError, UnavailableError
from rbee.testing.memory_session import memory_session
from rbee.testing.virtual_process import Process
from tests.chaos.simulation.cluster import QUEEN_URL

if TYPE_CHECKING:
    from tests.chaos.simulation.run import Simulation

ASK_AGAIN_S = 1.0


class Plan(Struct, frozen=True):
    """One job that is to be asked for.

    Attributes:
        copies: How often it is asked for with its key, at once.
        cancel_after_s: When it is cancelled, seconds after it was accepted.
        readers: When each reader of its log begins, seconds after it was accepted.
    """

    number: int
    at_s: float
    operation: Operation
    copies: int
    cancel_after_s: float | None
    readers: tuple[float, ...]


class Transcript:
    """What one reader saw, over all its connections and lives."""

    def __init__(self, job_id: str, after: int) -> None:
        self.job_id = job_id
        self.after = after
        self.lines: list[bytes] = []
        self.has_seen_end = False
        self.is_gone = False

    @property
    def last_seq(self) -> int:
        """The number of the last event seen."""
        return self.after + len(self.lines)


class _Follower(LogFollower):
    """Keeps the bytes of what it hands on."""

    transcript: Transcript

    def _decoded(self, number: str, data: bytes) -> dict[str, Any]:
        decoded = super()._decoded(number, data)
        self.transcript.lines.append(bytes(data))
        return decoded


async def ask_for(simulation: Simulation, plan: Plan) -> None:
    """Ask for a job until it is accepted, then see to its cancelling and its readers. Survives its own process."""
    ids = await asyncio.gather(*(_submit(simulation, plan, copy) for copy in range(plan.copies)))
    if len(set(ids)) != 1:
        simulation.fault(f"one key made {len(set(ids))} jobs: {ids}")
    job_id = ids[0]
    simulation.accepted[job_id] = plan
    async with asyncio.TaskGroup() as group:
        for place, delay_s in enumerate(plan.readers):
            group.create_task(read(simulation, plan, job_id, place, delay_s))
        if plan.cancel_after_s is not None:
            group.create_task(_cancel(simulation, plan, job_id, plan.cancel_after_s))
        if plan.copies > 1:
            group.create_task(_other_body(simulation, plan))


def _client(simulation: Simulation, process: Process) -> JobClient:
    return JobClient(QUEEN_URL, session=memory_session(simulation.network, process), correlation_id=process.name)


async def _submit(simulation: Simulation, plan: Plan, copy: int) -> str:
    process = simulation.cluster.process(
        f"client.{plan.number}.{copy}", simulation.cluster.client_machine, "client"
    )

    async def ask() -> str:
        async with _client(simulation, process) as client:
            while True:
                try:
                    return (await client.submit(plan.operation, idempotency_key=f"key-{plan.number}")).job_id
                except (UnavailableError, OverloadedError):
                    await asyncio.sleep(ASK_AGAIN_S * process.chance.random())

    job_id: str = await process.spawn(ask())
    return job_id


async def _other_body(simulation: Simulation, plan: Plan) -> None:
    process = simulation.cluster.process(f"other.{plan.number}", simulation.cluster.client_machine, "client")

    async def ask() -> None:
        async with _client(simulation, process) as client:
            try:
                await client.submit(Infer(prompt="Count 1 1"), idempotency_key=f"key-{plan.number}")
            except ConflictError:
                return
            except RbeeError:  # away: nothing was said about it
                return
        simulation.fault(f"key-{plan.number} was taken for another body")

    await process.spawn(ask())


async def _cancel(simulation: Simulation, plan: Plan, job_id: str, after_s: float) -> None:
    process = simulation.cluster.process(f"cancel.{plan.number}", simulation.cluster.client_machine, "client")

    async def ask() -> None:
        await asyncio.sleep(after_s)
        async with _client(simulation, process) as client:
            while True:
                try:
                    simulation.cancelled.add(job_id)
                    await client.cancel(job_id)
                    return
                except UnavailableError:
                    await asyncio.sleep(ASK_AGAIN_S * process.chance.random())

    await process.spawn(ask())


async def read(simulation: Simulation, plan: Plan, job_id: str, place: int, delay_s: float) -> None:
    """Follow a log to its end with a reader that is killed now and then, and goes on from the number it has."""
    transcript = Transcript(job_id, 0)
    simulation.transcripts.append(transcript)
    await asyncio.sleep(delay_s)
    life = 0
    while not transcript.has_seen_end and not transcript.is_gone:
        life += 1
        name = f"reader.{plan.number}.{place}.{life}"
        process = Process(
            simulation.loop, name, simulation.cluster.client_machine, simulation.seed, actor="client"
        )
        ended = asyncio.Event()
        process.on_death.append(ended.set)
        life_s = process.chance.expovariate(1 / 6) if simulation.is_stormy else 1e9
        simulation.loop.call_later(life_s, process.kill, context=simulation.network.context)
        process.spawn(_follow(simulation, process, transcript))
        await ended.wait()


async def _follow(simulation: Simulation, process: Process, transcript: Transcript) -> None:
    follower = _Follower(
        memory_session(simulation.network, process),
        f"{QUEEN_URL}/v1/jobs/{transcript.job_id}/stream",
        after=transcript.last_seq,
    )
    follower.transcript = transcript
    try:
        async for event in follower.events():
            if event["kind"] == "end":
                transcript.has_seen_end = True
                await_terminal = simulation.committed_state(transcript.job_id)
                if await_terminal != event["state"]:
                    simulation.fault(f"a reader saw the end of {transcript.job_id} while it was {await_terminal}")
        if not transcript.has_seen_end:
            simulation.fault(f"the log of {transcript.job_id} ended without an end at {transcript.last_seq}")
    except GoneError:
        transcript.is_gone = True
    except NotFoundError as error:
        simulation.fault(f"an accepted job is not there: {error.message}")
        transcript.is_gone = True
    except UnavailableError:
        pass
    except RbeeError as error:
        simulation.fault(f"a reader of {transcript.job_id} failed: {type(error).__name__}: {error.message}")
        transcript.is_gone = True
    process.kill()
