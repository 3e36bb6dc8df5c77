"""Submits a peer's jobs and waits for their bodies: a burst of them, then one after the other.

Run as a program beside the peer's worker, with the peer's module and the numbers of jobs: for warming up, in the
burst, alone. It prints one JSON object: the jobs a second of the burst, and the milliseconds of each job alone.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from importlib import import_module

from jobs_body import pipe  # type: ignore[import-not-found]  # this directory is where the program runs

PATIENCE_S = 60.0
ALONE_S = 20.0


def wait_for(fd: int, count: int) -> None:
    """Wait until so many bodies ran.

    Raises:
        TimeoutError: None ran for `PATIENCE_S`.
    """
    while count > 0:
        if not select.select([fd], [], [], PATIENCE_S)[0]:
            raise TimeoutError(f"{count} jobs did not run within {PATIENCE_S:g} s.")
        count -= len(os.read(fd, count))


def main() -> None:
    """Measure one peer."""
    submit = import_module(sys.argv[1]).submit
    warm, burst, alone = map(int, sys.argv[2:])
    fd = pipe()
    submit(warm)
    wait_for(fd, warm)
    began = time.perf_counter()
    submit(burst)
    wait_for(fd, burst)
    per_s = burst / (time.perf_counter() - began)
    alone_ms: list[float] = []
    until_s = time.perf_counter() + ALONE_S
    while len(alone_ms) < alone and time.perf_counter() < until_s:
        began = time.perf_counter()
        submit(1)
        wait_for(fd, 1)
        alone_ms.append((time.perf_counter() - began) * 1e3)
    print(json.dumps({"per_s": per_s, "alone_ms": alone_ms}))


if __name__ == "__main__":
    main()
