"""Measuring sides that serve the same model: each in turn, beside the engine asked directly."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from benchmarks.report import median
from benchmarks.serving_client import Flood, Target, ask, flood, tokens_per_s
from benchmarks.serving_engine import SLOTS
from benchmarks.serving_sides import FLOOD_STREAMS, Engines, Plane, Side, engine

STREAMS = 8
FEW_TOKENS = 2

_Item = TypeVar("_Item")


class Sizes(Struct, frozen=True):
    """How much is measured.

    Attributes:
        rounds: Of answers, all sides in turn in each.
        starts: How often a side is started at most.
        asks: Short answers to each side in a round, one after the other.
        answers: Long answers to each of the `STREAMS` askers in a round.
        tokens: Of a long answer.
        floods: How often pieces are counted.
        flood_streams: At once.
        flood_s: For how long.
        settle_s: How long a side is left in peace before its memory is read.
    """

    rounds: int = 5
    starts: int = 5
    asks: int = 40
    answers: int = 2
    tokens: int = 64
    floods: int = 3
    flood_streams: int = FLOOD_STREAMS
    flood_s: float = 4.0
    settle_s: float = 1.0


FULL = Sizes()
PEERS = Sizes(rounds=3, floods=2)
SMALL = Sizes(
    rounds=1, starts=1, asks=3, answers=1, tokens=4, floods=1, flood_streams=16, flood_s=1.0, settle_s=0.0
)


class Seen(Struct):
    """What a side came to; a list has a number for each start, round or flood.

    Attributes:
        start_s: Seconds to ready.
        memory_mb: Of the control plane, idle, without a model.
        beside_mb: The same of processes that are not counted.
        launch_s: Seconds from asking for the model, or its first answer, to the first words.
        first_ms: Milliseconds to the first words of a short answer, the median of a round.
        tokens_per_s: Of all askers together.
        floods: Pieces that were passed on.
        direct: What the engine came to in the same rounds.
    """

    start_s: list[float] = msgspec.field(default_factory=list)
    memory_mb: list[float] = msgspec.field(default_factory=list)
    beside_mb: dict[str, float] = msgspec.field(default_factory=dict)
    launch_s: list[float] = msgspec.field(default_factory=list)
    first_ms: list[float] = msgspec.field(default_factory=list)
    tokens_per_s: list[float] = msgspec.field(default_factory=list)
    floods: list[Flood] = msgspec.field(default_factory=list)
    direct: Seen | None = None

    def added_ms(self) -> list[float]:
        """Return the milliseconds over the engine asked directly, of each whole round."""
        assert self.direct is not None
        return [its - base for its, base in zip(self.first_ms, self.direct.first_ms, strict=False)]

    def tokens_ratios(self) -> list[float]:
        """Return the tokens a second by those of the engine asked directly, of each whole round."""
        assert self.direct is not None
        pairs = zip(self.tokens_per_s, self.direct.tokens_per_s, strict=False)
        return [its / base for its, base in pairs]


@asynccontextmanager
async def launched_engine(model: Path, launches: int) -> AsyncIterator[tuple[Target, list[float]]]:
    """Start the engine alone so many times; yields the last, and the seconds from each start to first words."""
    taken_s: list[float] = []
    for _ in range(launches - 1):
        async with engine(model) as plane:
            taken_s.append(await _launch_s(plane))
    async with engine(model) as plane:
        taken_s.append(await _launch_s(plane))
        yield plane.target, taken_s


async def _launch_s(plane: Plane) -> float:
    return plane.start_s + (await ask(plane.target, FEW_TOKENS)).first_s


async def measure_answers(seen: Mapping[Side, Seen], engines: Engines, sizes: Sizes) -> None:
    """Start sides, each as often as it wants, and have them answer in turn, the engine among them."""
    direct = Seen()
    for side, its in seen.items():
        its.direct = direct
        for _ in range(min(side.starts, sizes.starts) - 1):
            async with side.start(engines, engines.real) as plane:
                await _note_start(side, plane, its, sizes)
    async with AsyncExitStack() as stack:
        asked = [(engines.real, direct)]
        for side, its in seen.items():
            plane = await stack.enter_async_context(side.start(engines, engines.real))
            await _note_start(side, plane, its, sizes)
            if side.has_answers:
                asked.append((plane.target, its))
        if len(asked) > 1:
            await _take_turns(asked, sizes)


async def _note_start(side: Side, plane: Plane, its: Seen, sizes: Sizes) -> None:
    await asyncio.sleep(sizes.settle_s)
    its.start_s.append(plane.start_s)
    its.memory_mb.append(plane.memory_mb())
    its.beside_mb = plane.beside_mb()
    if not side.has_launch:
        return
    began_s = time.perf_counter()
    if plane.launch is not None:
        await plane.launch()
    asked_s = time.perf_counter() - began_s
    its.launch_s.append(asked_s + (await ask(plane.target, FEW_TOKENS)).first_s)


async def _take_turns(asked: Sequence[tuple[Target, Seen]], sizes: Sizes) -> None:
    for target, _ in asked:  # every slot has read the prompt, and every road was taken once
        await tokens_per_s(target, 2 * SLOTS, 1, FEW_TOKENS)
    for number in range(sizes.rounds):
        for (_, its), taken_ms in zip(asked, await _first_words_ms(asked, sizes.asks), strict=True):
            its.first_ms.append(median(taken_ms))
        for target, its in _there_and_back(asked, number):
            its.tokens_per_s.append(await tokens_per_s(target, STREAMS, sizes.answers, sizes.tokens))


async def _first_words_ms(asked: Sequence[tuple[Target, Seen]], asks: int) -> list[list[float]]:
    """Ask one after the other, there and back, so that nobody always comes after the same one."""
    taken_ms: list[list[float]] = [[] for _ in asked]
    numbered = [(target, taken) for (target, _), taken in zip(asked, taken_ms, strict=True)]
    for number in range(asks):
        for target, taken in _there_and_back(numbered, number):
            taken.append((await ask(target, FEW_TOKENS)).first_s * 1e3)
    return taken_ms


def _there_and_back(items: Sequence[_Item], number: int) -> Sequence[_Item]:
    return items if number % 2 == 0 else items[::-1]


async def measure_floods(seen: Mapping[Side, Seen], engines: Engines, paced: Target, sizes: Sizes) -> None:
    """Let sides pass on many streams that have no pause, in turn."""
    async with AsyncExitStack() as stack:
        planes = [
            (await stack.enter_async_context(side.flood(engines, paced)), its)
            for side, its in seen.items()
            if side.flood is not None
        ]
        for number in range(sizes.floods):
            for plane, its in _there_and_back(planes, number):
                its.floods.append(await flood(plane.target, sizes.flood_streams, sizes.flood_s, plane.cpu_s))
