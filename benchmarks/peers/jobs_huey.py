"""Huey with its SQLite storage, as its consumer and the driver load it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from jobs_body import ran  # type: ignore[import-not-found]  # this directory is where the program runs

_module: Any = import_module("huey")
huey = _module.SqliteHuey(filename=os.environ["BENCH_URL"], fsync=os.environ["BENCH_SYNC"] == "on")
noop = huey.task()(ran)


def submit(count: int) -> None:
    """Enqueue so many jobs."""
    for _ in range(count):
        noop()
