"""RQ, as the driver loads it; its workers find the body by its name."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from jobs_body import ran  # type: ignore[import-not-found]  # this directory is where the program runs

_redis: Any = import_module("redis")
_rq: Any = import_module("rq")
queue = _rq.Queue(connection=_redis.Redis.from_url(os.environ["BENCH_URL"]))


def submit(count: int) -> None:
    """Enqueue so many jobs."""
    for _ in range(count):
        queue.enqueue(ran)
