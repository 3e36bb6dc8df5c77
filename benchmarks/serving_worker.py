"""The program `llama-worker-rbee` with the paced engine: all of it but the engine is the real worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from rbee.contracts.home import Home
from rbee.errors import StartError
from rbee.narration import FileSink
from rbee.testing.counting import write_programs
from rbee.testing.counting.programs import WORKER
from rbee.worker.__main__ import main as worker_main
from rbee.worker.engines import EngineAddress
from rbee.worker.settings import WorkerSettings

PACED = "benchmarks.serving_paced"
_ROOT = Path(__file__).parent.parent


class PacedEngine:
    """Starts the paced engine as a process of its own, which ends with this one."""

    name = "paced"
    version = "1"
    holds_threads = False

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: subprocess.Popen[bytes] | None = None

    def load(self) -> EngineAddress:
        """Start it; ready when this returns."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / "paced.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", PACED, str(path)], cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"ready\n":
            raise StartError("The paced engine did not start.")
        return EngineAddress(str(path), "no key")

    def kill(self) -> None:
        """Kill its process."""
        if self._process is not None:
            self._process.kill()


def main() -> NoReturn:
    """Run one worker."""
    worker_main(_run)


def _run(settings: WorkerSettings, sink: FileSink) -> None:
    from rbee.worker.lifecycle import run_worker

    run_worker(settings, PacedEngine(Home.at(settings.home).workers / settings.worker_id), sink)


def write_paced_programs(directory: Path) -> None:
    """Write the programs of a home in which workers have the paced engine: the real hive, and this worker."""
    write_programs(directory)
    (directory / WORKER).write_text(
        f"#!{sys.executable}\n"
        "import sys\n"
        f"sys.path.insert(0, {str(_ROOT)!r})\n"
        "from benchmarks.serving_worker import main\n"
        "main()\n",
        "utf-8",
    )
