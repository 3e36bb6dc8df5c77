"""A worker's voice for measuring: writes the lines of kept answers into a worker's file, each with one write.

Reads `{"path", "worker_id", "jobs": {job_id: correlation_id}, "count", "rate"}` on stdin and writes `count`
lines for each job in turn: nine `token` lines, then one of narration, numbered 1, 2, … by job. With a rate, so
many lines a second; with none, flat out. Prints when it began and how long it took.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from rbee.contracts.events import encode_json

NARRATION_EVERY = 10


def token_form(job_id: str, correlation_id: str, worker_id: str) -> bytes:
    """Return a `token` line as workers write it, open for time and number."""
    return (
        b'{"v":1,"kind":"token","ts":%%d,"actor":"worker","job_id":"%b","correlation_id":"%b","worker_id":"%b",'
        b'"attempt":1,"text":" token","tokens":%%d,"channel":"answer"}\n'
    ) % (job_id.encode(), correlation_id.encode(), worker_id.encode())


def narration_form(job_id: str, correlation_id: str, worker_id: str) -> bytes:
    """Return a narrated line as workers write it, open for time and number."""
    return (
        b'{"v":1,"kind":"narration","ts":%%d,"actor":"worker","action":"worker_progress",'
        b'"message":"The answer is being made.","job_id":"%b","correlation_id":"%b","worker_id":"%b",'
        b'"fields":{"step":%%d}}\n'
    ) % (job_id.encode(), correlation_id.encode(), worker_id.encode())


def closing_line(job_id: str, correlation_id: str, worker_id: str, frames: int) -> bytes:
    """Return the line that closes a kept answer."""
    line = {
        "v": 1,
        "kind": "narration",
        "ts": time.time_ns(),
        "actor": "worker",
        "action": "worker_inference",
        "message": "Answered.",
        "job_id": job_id,
        "correlation_id": correlation_id,
        "worker_id": worker_id,
        "attempt": 1,
        "fields": {"outcome": "completed", "finish_reason": "stop", "frames": frames},
    }
    return encode_json(line) + b"\n"


def tokens_of(count: int) -> int:
    """Return how many of `count` lines are `token` lines."""
    return count - count // NARRATION_EVERY


def _write_all(fd: int, wanted: dict[str, Any]) -> None:
    names = [(job_id, correlation_id, wanted["worker_id"]) for job_id, correlation_id in wanted["jobs"].items()]
    forms = [(token_form(*name), narration_form(*name)) for name in names]
    gap_s = 1 / wanted["rate"] if wanted["rate"] else 0.0
    due = time.perf_counter()
    write, now_ns = os.write, time.time_ns
    for number in range(1, wanted["count"] + 1):
        is_narration = number % NARRATION_EVERY == 0
        for form in forms:
            if gap_s:
                due += gap_s
                while (left_s := due - time.perf_counter()) > 0:
                    time.sleep(left_s)
            write(fd, form[is_narration] % (now_ns(), number))


def main() -> None:
    """Write what stdin asks for."""
    wanted = msgspec.json.decode(sys.stdin.buffer.read())
    fd = os.open(Path(wanted["path"]), os.O_WRONLY | os.O_APPEND)
    began = time.time_ns()
    _write_all(fd, wanted)
    took_s = (time.time_ns() - began) / 1e9
    sys.stdout.buffer.write(
        msgspec.json.encode({"began_ns": began, "took_s": took_s, "cpu_s": time.process_time()})
    )


if __name__ == "__main__":
    main()
