"""Dramatiq with its Redis broker, as its workers and the driver load it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from jobs_body import ran  # type: ignore[import-not-found]  # this directory is where the program runs

dramatiq: Any = import_module("dramatiq")
broker = import_module("dramatiq.brokers.redis").RedisBroker(url=os.environ["BENCH_URL"])
dramatiq.set_broker(broker)
noop = dramatiq.actor(ran)


def submit(count: int) -> None:
    """Enqueue so many jobs."""
    for _ in range(count):
        noop.send()
