"""One model behind several control planes: what each adds to the engine itself, and what it takes.

All have the same model file and the same engine with the same parameters: a worker's own. *Direct* is that engine
asked over TCP, in the rounds in which a side was asked. The smallest proxy and LiteLLM pass requests on to it, the
others have one of their own. The flood is of pieces that a program without a model makes, so that no engine is the
limit; rbee's is a real worker's front with that program behind it.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Sequence

import uvloop

from benchmarks.demo_model import models_directory
from benchmarks.peers.install import PeersMissingError
from benchmarks.report import Row, main, median
from benchmarks.services import ServiceMissingError
from benchmarks.serving_client import Flood, SideFailedError, Target
from benchmarks.serving_measure import (
    FULL,
    PEERS,
    SMALL,
    STREAMS,
    Seen,
    Sizes,
    launched_engine,
    measure_answers,
    measure_floods,
)
from benchmarks.serving_peers import LITELLM, RAY_SERVE, XINFERENCE, python_of, versions
from benchmarks.serving_sides import NGINX, RBEE, SMALLEST, Engines, Side, nginx_program, paced_engine
from rbee.contracts.models import DEFAULT_MODEL
from rbee.hive.models import ModelStore

TITLE = f"Serving {DEFAULT_MODEL} through control planes"
PROGRAMS = {LITELLM: "litellm", RAY_SERVE: "ray_serve", XINFERENCE: "xinference"}
PEER_S = 240.0
REASON_CHARS = 300
ENGINE_STARTS = 3
ADDED_MS = 2.0
IDLE_MB = 90
START_S = 1.0
LAUNCH_S = 1.5
FLOOD_CPU_S = 60

Sides = dict[Side, Seen]


class Results:
    """What is known so far."""

    def __init__(self) -> None:
        self.sides: Sides = {}
        self.engine_launches_s: list[float] = []
        self.missing: dict[str, str] = {}


async def _measure(results: Results, is_small: bool) -> None:
    sizes = SMALL if is_small else FULL
    directory = await models_directory()
    found = ModelStore(directory).find(DEFAULT_MODEL)
    assert found is not None
    starts = min(sizes.starts, ENGINE_STARTS)
    async with launched_engine(found.path, starts) as (real, launches_s), paced_engine() as paced:
        results.engine_launches_s = launches_s
        engines = Engines(found.path, directory, real)
        own = _own_sides(results, is_small)
        results.sides.update(own)
        await _measure_group(own, engines, paced, sizes)
        for side, name in {} if is_small else PROGRAMS.items():
            await _measure_peer(results, side, name, engines, paced)


def _own_sides(results: Results, is_small: bool) -> Sides:
    """Return rbee and what it is held against."""
    sides = {SMALLEST: Seen(), RBEE: Seen()}
    if not is_small:
        try:
            nginx_program()
            sides[NGINX] = Seen()
        except ServiceMissingError as error:
            results.missing[NGINX.title] = str(error)
    return sides


async def _measure_group(sides: Sides, engines: Engines, paced: Target, sizes: Sizes) -> None:
    await measure_answers(sides, engines, sizes)
    await measure_floods(sides, engines, paced, sizes)


async def _measure_peer(results: Results, side: Side, name: str, engines: Engines, paced: Target) -> None:
    """Measure a peer as far as it goes."""
    seen = Seen()
    print(f"{side.title} …", file=sys.stderr, flush=True)
    try:
        await asyncio.to_thread(python_of, name)
        results.sides[side] = seen
        async with asyncio.timeout(PEER_S):
            await _measure_group({side: seen}, engines, paced, PEERS)
    except* (PeersMissingError, SideFailedError, TimeoutError, OSError) as group:
        results.missing[side.title] = _first_reason(group)


def _first_reason(error: BaseException) -> str:
    """Say in one line what went wrong, and what the program said last."""
    notes = list(getattr(error, "__notes__", []))
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
        notes += getattr(error, "__notes__", [])
    said = [line for note in notes for line in note.splitlines() if line.strip()]
    return " ".join(f"{type(error).__name__}: {error} {said[-1] if said else ''}".split())[:REASON_CHARS]


def measure(is_small: bool) -> Sequence[Row]:
    """Measure all sides; the peers that can be had, and none in the small size."""
    results = Results()
    uvloop.run(_measure(results, is_small))
    judge = _no_judgement if is_small else _judged
    return [
        *_first_rows(results.sides, judge),
        *_token_rows(results.sides, judge),
        *_memory_rows(results.sides, judge),
        *_start_rows(results.sides, judge),
        *_launch_rows(results, judge),
        *_flood_rows(results.sides, judge),
        *(Row(title, "not measured", wanted=why) for title, why in results.missing.items()),
        *_version_rows(results),
    ]


Judge = Callable[[str, bool], str]


def _judged(wanted: str, is_met: bool) -> str:
    return f"{wanted}: {'met' if is_met else 'MISSED'}"


def _no_judgement(wanted: str, is_met: bool) -> str:
    return ""


def _first_rows(sides: Sides, judge: Judge) -> list[Row]:
    rows = []
    for side, seen in sides.items():
        if not seen.first_ms:
            continue
        assert seen.direct is not None
        added_ms = seen.added_ms()
        met = judge(f"≤ {ADDED_MS:g} ms", median(added_ms) <= ADDED_MS) if side is RBEE else ""
        value = f"{median(added_ms):+.2f} ms ({min(added_ms):.2f} to {max(added_ms):.2f})"
        base = f"direct, {median(seen.direct.first_ms):.1f} ms"
        rows.append(Row(f"first words, 1 stream, added: {side.title}", value, base, wanted=met))
    return rows


def _token_rows(sides: Sides, judge: Judge) -> list[Row]:
    rows = []
    for side, seen in sides.items():
        if not seen.tokens_per_s:
            continue
        assert seen.direct is not None
        met = _tokens_met(seen, sides[SMALLEST], judge) if side is RBEE else ""
        rates = seen.tokens_per_s
        value = f"{median(rates):.0f} tokens/s ({min(rates):.0f} to {max(rates):.0f})"
        base = f"direct, {median(seen.direct.tokens_per_s):.0f} tokens/s"
        rows.append(Row(f"{STREAMS} streams: {side.title}", value, base, median(seen.tokens_ratios()), met))
    return rows


def _tokens_met(seen: Seen, smallest: Seen, judge: Judge) -> str:
    """Hold rbee's rate against the smallest proxy's, less that one's own spread."""
    rates = smallest.tokens_per_s
    least = median(rates) - (max(rates) - min(rates))
    return judge(f"≥ {least:.0f}, the smallest proxy's less its spread", median(seen.tokens_per_s) >= least)


def _memory_rows(sides: Sides, judge: Judge) -> list[Row]:
    rows = []
    for side, seen in sides.items():
        if not seen.memory_mb:
            continue
        memory_mb = median(seen.memory_mb)
        beside = "".join(f", {name} {its_mb:.0f} MB more" for name, its_mb in seen.beside_mb.items())
        met = judge(f"≤ {IDLE_MB} MB", memory_mb <= IDLE_MB) if side is RBEE else ""
        what = f"{side.title}, queen + hive" if side is RBEE else side.title
        rows.append(Row(f"idle memory (PSS): {what}", f"{memory_mb:.0f} MB{beside}", wanted=met))
    return rows


def _start_rows(sides: Sides, judge: Judge) -> list[Row]:
    rows = []
    for side, seen in sides.items():
        if not seen.start_s:
            continue
        start_s = median(seen.start_s)
        met = judge(f"≤ {START_S} s", start_s <= START_S) if side is RBEE else ""
        rows.append(Row(f"start → ready: {side.title}", f"{start_s:.2f} s", wanted=met))
    return rows


def _launch_rows(results: Results, judge: Judge) -> list[Row]:
    name = "launch → first words"
    alone_s = median(results.engine_launches_s)
    rows = [Row(f"{name}: direct", f"{alone_s:.2f} s")]
    for side, seen in results.sides.items():
        if not side.has_launch:
            rows.append(Row(f"{name}: {side.title}", "–"))
        elif seen.launch_s:
            launch_s = median(seen.launch_s)
            met = judge(f"≤ {LAUNCH_S} s", launch_s <= LAUNCH_S) if side is RBEE else ""
            rows.append(
                Row(f"{name}: {side.title}", f"{launch_s:.2f} s", "direct", launch_s / alone_s, wanted=met)
            )
    return rows


def _flood_rows(sides: Sides, judge: Judge) -> list[Row]:
    name = "CPU for a million pieces"
    rows = []
    for side, seen in sides.items():
        if side.flood is None:
            rows.append(Row(f"{name}: {side.title}", "–"))
        elif seen.floods:
            spent_s = median([one.per_million_s for one in seen.floods])
            smallest_s = median([one.per_million_s for one in sides[SMALLEST].floods])
            per_s = median([one.per_s for one in seen.floods])
            met = judge(f"≤ {FLOOD_CPU_S} s", spent_s <= FLOOD_CPU_S) if side is RBEE else ""
            begun = min(one.begun for one in seen.floods)
            value = f"{spent_s:.1f} s, at {per_s:,.0f}/s in {begun} streams"
            rows.append(Row(f"{name}: {side.title}", value, SMALLEST.title, spent_s / smallest_s, met))
            rows += _program_rows(f"{name}: {side.title}", seen.floods)
    return rows


def _program_rows(name: str, floods: list[Flood]) -> list[Row]:
    """Say what each program has of it, where there are several."""
    programs = list(floods[0].spent_s)
    shares = {one: median([each.spent_s[one] * 1e6 / each.chunks for each in floods]) for one in programs}
    return [Row(f"{name}, {one}", f"{share_s:.1f} s") for one, share_s in shares.items() if len(programs) > 1]


def _version_rows(results: Results) -> list[Row]:
    known = {
        RBEE: ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("rbee", "xllamacpp", "uvloop")),
        LITELLM: versions("litellm", "litellm", "uvicorn"),
        RAY_SERVE: versions("ray_serve", "ray", "aiohttp"),
        XINFERENCE: versions("xinference", "xinference", "xllamacpp", "torch"),
    }
    if NGINX in results.sides:
        said = subprocess.run([nginx_program(), "-v"], capture_output=True, check=False, text=True).stderr
        known[NGINX] = said.strip().removeprefix("nginx version: ")
    return [Row(f"version: {side.title}", known[side]) for side in results.sides if side in known]


if __name__ == "__main__":
    main(TITLE, measure)
