"""What a real model said while nobody listened is told to the last byte, whatever the temperature."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rbee.processes import FileFollower
from rbee.testing import LocalStack
from rbee.testing.oracles import assert_dense, assert_lawful, assert_saw_the_log
from rbee.testing.reader import LogReader
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import log_of
from tests.chaos.crowd import speaker

MODEL = "smollm2:135m"
TOKENS = 100
WITHIN_S = 90.0
_KEPT = ("ts", "job_id", "attempt", "text", "tokens")

Line = dict[str, Any]


async def test_answers_given_while_hive_and_queen_are_dead_are_told_byte_for_byte(
    rbee_models: Path, size: Size, figure: Callable[[str, object], None]
) -> None:
    """Temperature 0.9: what the log says after both have come back is what stands in the worker's own file."""
    rounds, compared = size.of(1, 10), 0
    async with LocalStack(models=rbee_models) as stack:
        for number in range(rounds):
            compared += await _round(stack, jobs=2, seed=number)
    figure("token lines compared with the worker's file", compared)


async def _round(stack: LocalStack, *, jobs: int, seed: int) -> int:
    assert stack.hive is not None and stack.queen is not None
    asked = {
        "operation": "infer",
        "model": MODEL,
        "prompt": "Tell a long story about a river.",
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0.9,
    }
    async with stack.client() as client, asyncio.TaskGroup() as group, asyncio.timeout(WITHIN_S):
        job_ids = [(await client.submit({**asked, "seed": seed * jobs + index})).job_id for index in range(jobs)]
        readers = [LogReader(job_id) for job_id in job_ids]
        for reader in readers:
            group.create_task(reader.follow(stack.url))
        await stack.until(lambda: all(reader.last_token for reader in readers))
        output = stack.home / "workers" / speaker(readers[0]) / "stdout"
        stack.hive.signal(signal.SIGSTOP)  # from here on nothing is read and nothing given back
        await stack.queen.kill()
        await stack.until(lambda: _closed(output) >= set(job_ids))
        written = _lines(output)
        await stack.hive.kill()
        await stack.restart_queen()
        await stack.start_hive()
        while not all(reader.is_ended for reader in readers):  # noqa: ASYNC110  # readers tell nobody
            await asyncio.sleep(0.05)
        logs = {reader.job_id: await log_of(client, reader.job_id) for reader in readers}
    for reader in readers:
        assert_saw_the_log(reader, logs[reader.job_id])
        _assert_whole([msgspec.json.decode(event) for event in logs[reader.job_id]])
    return sum(_assert_told(log, written, job_id) for job_id, log in logs.items())


def _lines(path: Path) -> list[Line]:
    """Read the whole lines of a file whose beginning was given back."""
    follower = FileFollower(path)
    try:
        follower.skip_hole()
        data = b"".join(iter(lambda: follower.read(1 << 20).data, b""))
    finally:
        follower.close()
    return [
        msgspec.json.decode(line) for line in data.splitlines() if line.startswith(b"{") and line.endswith(b"}")
    ]


def _closed(path: Path) -> set[str]:
    return {line["job_id"] for line in _lines(path) if line.get("action") == "worker_inference"}


def _assert_whole(events: list[Line]) -> None:
    """Check that a log is whole: one attempt, every frame, the result made of the pieces."""
    assert_dense(events)
    assert_lawful(events)
    tokens = [event for event in events if event["kind"] == "token"]
    closing = next(event for event in events if event.get("action") == "worker_inference")
    assert len(tokens) == closing["fields"]["frames"]
    assert {token["attempt"] for token in tokens} == {1}
    assert tokens[-1]["tokens"] == TOKENS
    assert events[-1]["state"] == "completed"
    assert events[-1]["result"]["text"] == "".join(token["text"] for token in tokens)


def _assert_told(log: list[bytes], written: list[Line], job_id: str) -> int:
    """Check that the log ends in the very token lines of the file; returns how many there are."""
    own = [line for line in written if line["kind"] == "token" and line["job_id"] == job_id]
    told = [event for event in map(msgspec.json.decode, log) if event["kind"] == "token"][-len(own) :]
    assert [[event[name] for name in _KEPT] for event in told] == [[line[name] for name in _KEPT] for line in own]
    assert len(own) > TOKENS / 4, "hardly anything was said while nobody listened"
    return len(own)
