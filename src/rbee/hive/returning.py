"""What a hive does when it comes back: adopt the workers that went on, clear up behind those that did not."""

from __future__ import annotations

import shutil
from pathlib import Path

from rbee.contracts.home import Home
from rbee.contracts.ids import is_id
from rbee.errors import InternalError
from rbee.hive.deliveries import Deliveries
from rbee.hive.last_words import say_exit_surely
from rbee.hive.worker_file import adopted, read_worker_file
from rbee.hive.workers import Workers
from rbee.narration import narrate, scope
from rbee.processes import ExitStatus, stop_tree


class Returning:
    """Looks at what earlier starts of the hive left in its home, once, at start."""

    def __init__(self, home: Home, workers: Workers, deliveries: Deliveries, *, stop_grace_s: float) -> None:
        self._home = home
        self._workers = workers
        self._deliveries = deliveries
        self._stop_grace_s = stop_grace_s

    def find_again(self) -> None:
        """Adopt the workers that an earlier start left running; what others left is cleared up from now on."""
        for directory in sorted(self._home.workers.iterdir()):
            if directory.is_dir() and is_id("worker", directory.name):
                self._find_again(directory)

    def _find_again(self, directory: Path) -> None:
        file = read_worker_file(directory)
        has_words = all((directory / stream).exists() for stream in ("stdout", "stderr"))
        child = adopted(file) if file is not None and has_words else None
        if file is not None and child is not None:
            self._workers.adopt(file, child)
        elif file is not None and file.pid is None and not has_words:
            shutil.rmtree(directory, ignore_errors=True)  # it was never started
        else:
            status, engine = (file.status, file.wanted.engine) if file is not None else (None, None)
            self._deliveries.own(self._clear_stray(directory, status, engine))  # may take a while

    async def _clear_stray(self, directory: Path, status: ExitStatus | None, engine: str | None) -> None:
        """Stop what is left of a worker that cannot be adopted, and see that all it said still arrives."""
        worker_id = directory.name
        marker = ("RBEE_WORKER_ID", worker_id)
        try:
            report = await stop_tree(None, marker=marker, grace_s=self._stop_grace_s)
        except InternalError as error:  # it hangs in the kernel, and may write again: the next start tries again
            narrate("hive_stray_left_behind", error.message, level="error", worker_id=worker_id)
            return
        paths = [path for path in (directory / "stdout", directory / "stderr") if path.exists()]
        sources = self._deliveries.deliver_rest(directory, [(f"{worker_id}/{path.name}", path) for path in paths])
        if status is None:
            with scope(worker_id=worker_id):
                narrate(
                    "hive_clear_stray",
                    f"{worker_id} ended while the hive was away; stopped {report.found} processes it left.",
                )
        sizes = {source.name: source.follower.size for source in sources}
        status = status or ExitStatus(unknown=True)
        await say_exit_surely(worker_id, None, status, self._workers.last_words(sources, engine), sizes)
