"""Plain OpenAI calls: their callers read a response, or leave in the middle of it."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import aiohttp
from msgspec import Struct

from rbee.testing.memory_session import memory_session
from rbee.testing.virtual_process import Process
from tests.chaos.simulation.answers import answer_to
from tests.chaos.simulation.cluster import QUEEN_URL

if TYPE_CHECKING:
    from tests.chaos.simulation.run import Simulation

PATIENCE_S = 60.0


class CallPlan(Struct, frozen=True):
    """One call.

    Attributes:
        leaves_after: After so many pieces of the answer its caller goes away; None reads all.
    """

    number: int
    at_s: float
    model: str
    prompt: str
    is_streamed: bool
    leaves_after: int | None


class Call:
    """What became of a call, as its caller saw it."""

    def __init__(self, plan: CallPlan) -> None:
        self.plan = plan
        self.job_id: str | None = None
        self.text = ""
        self.is_whole = False
        self.has_left = False
        self.error_code: str | None = None


async def call(simulation: Simulation, plan: CallPlan) -> None:
    """Make one call; nobody repeats it."""
    made = Call(plan)
    simulation.calls.append(made)
    await asyncio.sleep(plan.at_s)
    cluster = simulation.cluster
    process = cluster.process(f"caller.{plan.number}", cluster.client_machine, "client")
    await process.spawn(_ask(simulation, process, made))


async def _ask(simulation: Simulation, process: Process, made: Call) -> None:
    plan = made.plan
    asked = {
        "model": plan.model,
        "messages": [{"role": "user", "content": plan.prompt}],
        "stream": plan.is_streamed,
    }
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    headers = {"content-type": "application/json"}
    session = memory_session(simulation.network, process)
    url = f"{QUEEN_URL}/v1/chat/completions"
    try:
        async with session.post(url, data=json.dumps(asked).encode(), headers=headers, timeout=timeout) as answer:
            made.job_id = answer.headers.get("x-job-id")
            await _read(answer, made)
    except (aiohttp.ClientError, TimeoutError):
        made.has_left = True


async def _read(answer: aiohttp.ClientResponse, made: Call) -> None:
    held, pieces = b"", 0
    async for part in answer.content.iter_any():
        held += part
        while made.plan.is_streamed and answer.status == 200 and b"\n\n" in held:
            frame, _, held = held.partition(b"\n\n")
            _take(frame.removeprefix(b"data: "), made)
            pieces += 1
            if pieces == made.plan.leaves_after:
                made.has_left = True
                return
    if held:
        _take_whole(json.loads(held), made)


def _take(data: bytes, made: Call) -> None:
    if data == b"[DONE]":
        made.is_whole = True
        return
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        made.error_code = chunk["error"]["code"]
    elif chunk["choices"]:
        made.text += chunk["choices"][0]["delta"].get("content") or ""


def _take_whole(body: dict[str, Any], made: Call) -> None:
    if "error" in body:
        made.error_code = body["error"]["code"]
    else:
        made.text, made.is_whole = body["choices"][0]["message"]["content"], True


def faults_of(made: Call) -> list[str]:
    """Return what does not hold about a call."""
    right = answer_to(made.plan.prompt)
    found = []
    if made.is_whole and made.text != right:
        found.append(f"its answer is {made.text[-60:]!r}, not {right[-60:]!r}")
    if not right.startswith(made.text):
        found.append(f"it was told {made.text[-60:]!r}, which is no beginning of the answer")
    if made.error_code == "internal":
        found.append("it was told of a fault of ours")
    if not (made.is_whole or made.error_code or made.has_left):
        found.append("its response ended without an end")
    return [f"call {made.plan.number} ({made.job_id}): {what}" for what in found]
