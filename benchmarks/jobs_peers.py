"""The peers that run jobs: where each keeps them, how its worker is started, and what it came to."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from msgspec import Struct

from benchmarks.report import median
from benchmarks.services import postgres, program, redis

PATIENCE_S = 180.0
WARM = 20
SMALL_SHARE = 20
ALONE = 100
SMALL_ALONE = 5

_HERE = Path(__file__).parent / "peers"


class Measured(Struct, frozen=True):
    """What a side came to: jobs a second, and the milliseconds of each job that was alone."""

    per_s: float
    alone_ms: list[float]

    @property
    def alone_p50_ms(self) -> float:
        """The median of a job alone."""
        return median(self.alone_ms)


class Peer(Struct, frozen=True):
    """A peer in one of its set-ups.

    Attributes:
        title: Its name, and where it keeps its jobs.
        module: `peers/<module>.py` holds its configuration.
        storage: What it keeps them in.
        sync: How soon its storage is on disk, in the storage's own word.
        is_durable: A job that was accepted is on disk, as ours are.
        worker: The command of its worker, a program of the peers' environment first.
        prepare: A command that has to run once before.
        burst: How many jobs are submitted at once in the full size: a few seconds' work.
    """

    title: str
    module: str
    storage: Literal["sqlite", "redis", "postgres"]
    sync: str
    is_durable: bool
    worker: tuple[str, ...]
    burst: int
    prepare: tuple[str, ...] = ()


_HUEY = ("huey_consumer", "jobs_huey.huey", "--delay", "0.01", "--max-delay", "0.01", "--backoff", "1", "--quiet")
_DRAMATIQ = ("dramatiq", "jobs_dramatiq")
_CELERY = ("celery", "--app", "jobs_celery", "worker", "--pool", "prefork")
_RQ = ("rq", "worker-pool", "--num-workers", "2", "--quiet")
_PROCRASTINATE = ("procrastinate", "--app", "jobs_procrastinate.app")

PEERS = (
    Peer("Huey, SQLite without fsync", "jobs_huey", "sqlite", "off", False, _HUEY, 6_000),
    Peer("Huey, SQLite with fsync", "jobs_huey", "sqlite", "on", True, _HUEY, 3_000),
    Peer("Dramatiq, Redis, fsync each second", "jobs_dramatiq", "redis", "everysec", False, _DRAMATIQ, 4_000),
    Peer("Dramatiq, Redis, fsync always", "jobs_dramatiq", "redis", "always", True, _DRAMATIQ, 4_000),
    Peer("Celery, Redis, fsync each second", "jobs_celery", "redis", "everysec", False, _CELERY, 1_500),
    Peer("Celery, Redis, fsync always", "jobs_celery", "redis", "always", True, _CELERY, 1_500),
    Peer("RQ, Redis, fsync each second", "jobs_rq", "redis", "everysec", False, _RQ, 500),
    Peer("RQ, Redis, fsync always", "jobs_rq", "redis", "always", True, _RQ, 500),
    Peer(
        "Procrastinate, PostgreSQL",
        "jobs_procrastinate",
        "postgres",
        "on",
        True,
        (*_PROCRASTINATE, "worker", "--concurrency", "10"),
        1_500,
        (*_PROCRASTINATE, "schema", "--apply"),
    ),
)


@contextmanager
def _storage(peer: Peer, directory: Path) -> Iterator[str]:
    if peer.storage == "sqlite":
        yield str(directory / "huey.db")
    elif peer.storage == "postgres":
        with postgres() as url:
            yield url
    else:
        with redis(peer.sync) as url:
            yield url


def measure_peer(peer: Peer, python: Path, is_small: bool) -> Measured:
    """Run a peer's worker, and its driver beside it.

    Raises:
        ServiceMissingError: This machine does not have what it keeps its jobs in.
    """
    burst, alone = (peer.burst // SMALL_SHARE, SMALL_ALONE) if is_small else (peer.burst, ALONE)
    with tempfile.TemporaryDirectory(prefix="rbee-bench-") as name, _storage(peer, Path(name)) as url:
        pipe = Path(name) / "ran"
        os.mkfifo(pipe)
        told = {"BENCH_URL": url, "BENCH_SYNC": peer.sync, "BENCH_PIPE": str(pipe), "RQ_REDIS_URL": url}
        env = {**os.environ, **told, "PYTHONPATH": str(_HERE)}
        if peer.prepare:
            subprocess.run(_command(python, peer.prepare), check=True, env=env, cwd=_HERE, capture_output=True)
        worker = _command(python, peer.worker)
        with program(worker, env=env, cwd=_HERE, grace_s=0):  # nothing of its storage is needed any more
            counts = [str(number) for number in (WARM, burst, alone)]
            driver = [str(python), "jobs_driver.py", peer.module, *counts]
            ended = subprocess.run(
                driver, check=True, env=env, cwd=_HERE, stdout=subprocess.PIPE, timeout=PATIENCE_S
            )
    return Measured(**json.loads(ended.stdout))


def _command(python: Path, words: tuple[str, ...]) -> list[str]:
    return [str(python.parent / words[0]), *words[1:]]
