"""The lives of jobs on a registry's file, run under faults, and what the registry is to hold after each step."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rbee.jobs import JobRegistry
from tests.chaos.job_life import STEPS
from tests.chaos.strace_stage import Point, counted, module, run, traced


class Life:
    """The registry's file, and what it holds after each step of a run without a fault."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / "jobs.db"
        self.log = directory / "strace.log"
        self._reference = directory / "reference.json"
        recorded = run(module("job_life", str(self.path), "record")).stdout.splitlines()
        said = [json.loads(line) for line in recorded]
        self.held: list[Any] = [line["snapshot"] for line in said if "snapshot" in line]
        assert len(self.held) == len(STEPS) + 1
        self._reference.write_text(json.dumps(self.held))
        self.clear()

    def clear(self) -> None:
        """Remove the registry."""
        for path in self.files():
            path.unlink()

    def files(self) -> list[Path]:
        """Return the registry's files."""
        return sorted(self.directory.glob("jobs.db*"))

    def prepare(self) -> None:
        """Make an empty registry, so that opening it writes next to nothing."""
        self.clear()

        async def make() -> None:
            await JobRegistry.open(self.path).close()

        asyncio.run(make())

    def run(self, mode: str, inject: str) -> subprocess.CompletedProcess[str]:
        """Run the jobs' lives under a fault."""
        names = [self.path, *(Path(f"{self.path}{end}") for end in ("-wal", "-shm", "-journal"))]
        program = module("job_life", str(self.path), mode, str(self._reference))
        return run(traced(self.log, inject, names, program))

    def live(self, inject: str) -> int:
        """Live under a fault that kills; returns how many steps were acknowledged."""
        done = self.run("live", inject)
        assert "Error" not in done.stderr, done.stderr
        return done.stdout.count('{"acknowledged"')

    def points(self, calls: Sequence[str]) -> list[Point]:
        """Count the points of one life from here on."""
        assert self.live(f"{','.join(calls)}:signal=KILL:when=60000") == len(STEPS)
        return counted(self.log, calls)
