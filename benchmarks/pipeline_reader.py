"""Readers for measuring: each follows one job with the real client, decodes every event and checks its number.

Arguments: the queen's URL, how many lines of the worker each job gets, the jobs. Prints one line when all are
connected, and at the end when the last line came, how late the lines were, and what was lost or came twice.
"""

from __future__ import annotations

import asyncio
import sys
import time
from array import array

import msgspec
import uvloop

from rbee.client import JobClient

LATE_MAX = 1_000_000


class _Heard:
    """What all readers of this process heard together."""

    def __init__(self) -> None:
        self.lateness_ns = array("q")
        self.wrong: list[str] = []
        self.connected = 0
        self.last_ns = 0


async def _read(client: JobClient, job_id: str, count: int, heard: _Heard) -> None:
    """Follow a job until the worker's last line."""
    expected, offset, is_connected = 1, -1, False
    late, now_ns = heard.lateness_ns, time.time_ns
    async for event in client.follow(job_id):
        if not is_connected:
            is_connected = True
            heard.connected += 1
        source = event.get("src")
        if source is None or event["actor"] != "worker":
            if event["kind"] == "end":
                heard.wrong.append(f"{job_id} ended after {expected - 1} of {count} lines: {event.get('message')}")
                return
            continue
        number = event["tokens"] if event["kind"] == "token" else event["fields"]["step"]
        if number != expected or source["offset"] <= offset:
            heard.wrong.append(f"{job_id}: line {number} came where {expected} was due")
            return
        offset = source["offset"]
        now = now_ns()
        late.append(now - event["ts"])
        heard.last_ns = now
        if expected == count:
            return
        expected += 1


async def _run(url: str, count: int, jobs: list[str]) -> None:
    heard = _Heard()
    async with JobClient(url) as client, asyncio.TaskGroup() as group:
        for job_id in jobs:
            group.create_task(_read(client, job_id, count, heard))
        while heard.connected < len(jobs):  # noqa: ASYNC110  # nobody tells
            await asyncio.sleep(0.005)
        began_cpu_s = time.process_time()
        sys.stdout.write("connected\n")
        sys.stdout.flush()
    late = sorted(heard.lateness_ns)
    result = {
        "last_ns": heard.last_ns,
        "events": len(late),
        "p50_ms": late[len(late) // 2] / 1e6 if late else 0,
        "p99_ms": late[len(late) * 99 // 100] / 1e6 if late else 0,
        "cpu_s": time.process_time() - began_cpu_s,
        "wrong": heard.wrong[:5],
    }
    sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    sys.stdout.flush()


def main() -> None:
    """Follow the jobs that the arguments name."""
    uvloop.run(_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))


if __name__ == "__main__":
    main()
