"""How much memory a hive takes while a worker floods its output, its queen away for part of the time."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.pipeline_emitter import token_form
from benchmarks.pipeline_stage import Stage, memory_bytes
from benchmarks.report import Row, main

TITLE = "A hive's memory while a worker floods its output"
MIB = 2**20
PIECE_BYTES = 256 * 1024
PATIENCE_S = 240.0


def _pieces(kind: str, total: int, names: tuple[str, str, str]) -> Iterator[bytes]:
    """Return the flood in pieces: events, chatter that is none, or one line without an end."""
    line = {"events": token_form(*names) % (1, 1), "chatter": b"x" * 99 + b"\n", "one line": b"x"}[kind]
    piece = line * (PIECE_BYTES // len(line))
    written = 0
    while written < total:
        yield piece
        written += len(piece)


async def _flood(kind: str, total: int) -> tuple[float, float, list[str]]:
    """Return by how much the hive grew, with the queen there and while she was away, and what went wrong."""
    async with Stage(workers=1, slots=1) as stage:
        stage.carry()
        ((worker_id, jobs),) = (await stage.place(1)).items()
        ((job_id, correlation_id),) = jobs.items()
        path = Path(stage.files[worker_id])
        await asyncio.sleep(0.5)  # what a hive needs anyway is there
        before = memory_bytes(stage.hive.pid)
        peaks = [before, before]
        pieces = list(_pieces(kind, total, (job_id, correlation_id, worker_id)))
        for is_away in (False, True):
            half = pieces[: len(pieces) // 2] if not is_away else pieces[len(pieces) // 2 :]
            if is_away:
                os.kill(stage.queen_pid, signal.SIGSTOP)
            try:
                for piece in half:
                    await asyncio.to_thread(_append, path, piece)
                    peaks[is_away] = max(peaks[is_away], memory_bytes(stage.hive.pid))
            finally:
                os.kill(stage.queen_pid, signal.SIGCONT)
        wrong = await _until_given_back(stage, path, peaks)
        return (peaks[0] - before) / MIB, (peaks[1] - before) / MIB, wrong


async def _until_given_back(stage: Stage, path: Path, peaks: list[int]) -> list[str]:
    """Wait until the queen has all of a file, seen by its blocks: they are given back."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            while path.stat().st_blocks * 512 > MIB:
                peaks[1] = max(peaks[1], memory_bytes(stage.hive.pid))
                await asyncio.sleep(0.1)
    except TimeoutError:
        return [f"{path.stat().st_blocks * 512} bytes were never delivered"]
    return []


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def measure(is_small: bool) -> Sequence[Row]:
    """Measure; ends the program with 1 when something was not delivered."""
    total = 4 * MIB if is_small else 100 * MIB
    rows, wrong = [], []
    for kind in ("events", "chatter", "one line"):
        there, away, problems = asyncio.run(_flood(kind, total))
        wrong += problems
        rows.append(
            Row(
                f"{total // MIB} MiB of {kind}: growth",
                f"{there:+.1f} MiB",
                f"queen away: {away:+.1f} MiB",
                None,
                "<= +16 MiB",
            )
        )
    if wrong:
        sys.exit("; ".join(wrong))
    return rows


if __name__ == "__main__":
    main(TITLE, measure)
