"""Celery with Redis as its broker and no result backend, as its worker and the driver load it."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from jobs_body import ran  # type: ignore[import-not-found]  # this directory is where the program runs

_module: Any = import_module("celery")
app = _module.Celery("jobs_celery", broker=os.environ["BENCH_URL"])
app.conf.task_ignore_result = True
noop = app.task(ran, name="noop")


def submit(count: int) -> None:
    """Enqueue so many jobs."""
    for _ in range(count):
        noop.delay()
