"""The hive's workers: started with captured output, watched, stopped down to the last grandchild."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from rbee.contracts.events import decode_source_line
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.home import Home
from rbee.contracts.states import WorkerState
from rbee.contracts.stretches import split
from rbee.errors import DeadlineExceededError, ModelInvalidError, NotFoundError, RbeeError, WorkerError
from rbee.hive.catalog import LocalModel
from rbee.hive.outbox import LAST_LINES, Outbox, Source
from rbee.hive.settings import HiveSettings
from rbee.narration import narrate, scope
from rbee.processes import (
    CapturedProcess,
    ExitStatus,
    FileFollower,
    FileWatch,
    ProcessNarrationCapture,
    child_environment,
    stop_tree,
)

WORKER_PROGRAM = "llama-worker-rbee"
EXIT_MODEL_INVALID = 4
LOAD_S_PER_GIB = 20.0
STDERR_TAIL_BYTES = 16 * 1024


class WorkerWanted(Struct, frozen=True, kw_only=True):
    """What worker to start, and in whose name its start-up story is told."""

    worker_id: str
    model: LocalModel
    slots: int
    context_tokens: int
    job_id: str | None
    correlation_id: str | None


class Worker:
    """One worker process of this hive.

    Attributes:
        ended: Set when the process and all it started are gone and its end has been told.
    """

    def __init__(self, wanted: WorkerWanted, token: str, process: CapturedProcess, sources: list[Source]) -> None:
        self.wanted = wanted
        self.token = token
        self.process = process
        self.sources = sources
        self.state = WorkerState.STARTING
        self.url: str | None = None
        self.status: ExitStatus | None = None
        self.last_lines: list[str] = []
        self.is_stopping = False
        self.ended = asyncio.Event()
        self.ready_position = 0

    @property
    def worker_id(self) -> str:
        """The worker's id."""
        return self.wanted.worker_id

    def info(self) -> WorkerInfo:
        """Tell the queen about it."""
        return WorkerInfo(
            worker_id=self.worker_id,
            model=self.wanted.model.ref,
            state=self.state,
            url=self.url,
            token=self.token,
            purpose="generate",
            slots=self.wanted.slots,
            slots_used=0,
            pid=self.process.child.pid,
        )

    def error(self) -> RbeeError:
        """Say why it ended, with its last lines."""
        status = self.status or ExitStatus(unknown=True)
        details = {
            "worker_id": self.worker_id,
            "exit_code": status.exit_code,
            "signal": status.signal,
            "last_lines": self.last_lines,
        }
        said = _last_failure(self.last_lines)
        if status.exit_code == EXIT_MODEL_INVALID:
            return ModelInvalidError(said or "The worker could not load the model.", details=details)
        message = f"The worker {status.describe()} before it was ready."
        return WorkerError(f"{message} {said}" if said else message, details=details)


class Workers:
    """Starts, watches and stops workers. One event loop owns it; `run_watchers` of each are its tasks."""

    def __init__(self, home: Home, settings: HiveSettings, outbox: Outbox, on_change: Callable[[], None]) -> None:
        self._home = home
        self._settings = settings
        self._outbox = outbox
        self._on_change = on_change
        self._workers: dict[str, Worker] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def infos(self) -> list[WorkerInfo]:
        """Tell the queen about all of them."""
        return [worker.info() for worker in self._workers.values()]

    def get(self, worker_id: str) -> Worker:
        """Return one worker.

        Raises:
            NotFoundError: It does not run here.
        """
        if worker_id not in self._workers:
            raise NotFoundError(f"There is no worker {worker_id} on this hive.", param="worker_id")
        return self._workers[worker_id]

    async def start(self, wanted: WorkerWanted, hive_id: str) -> Worker:
        """Start a worker and wait until it is ready.

        Cancelled, it stops what it started.

        Raises:
            WorkerError: It ended before it was ready; with exit code or signal and its last lines.
            ModelInvalidError: It could not load the model.
            DeadlineExceededError: It took too long.
        """
        worker = await self._spawn(wanted, hive_id)
        limit_s = self._settings.load_timeout_s + LOAD_S_PER_GIB * wanted.model.size_bytes / 2**30
        try:
            async with asyncio.timeout(limit_s):
                await self._until_ready(worker)
        except TimeoutError:
            await self.stop(worker.worker_id)
            raise DeadlineExceededError(
                f"The worker was not ready after {limit_s:.0f} s.", reason="worker_failed"
            ) from None
        except asyncio.CancelledError:
            await self.stop(worker.worker_id)
            raise
        return worker

    async def _spawn(self, wanted: WorkerWanted, hive_id: str) -> Worker:
        directory = self._home.workers / wanted.worker_id
        token = secrets.token_urlsafe(32)
        env = child_environment(
            {
                "RBEE_HOME": str(self._home.root),
                "RBEE_HIVE_ID": hive_id,
                "RBEE_WORKER_ID": wanted.worker_id,
                "RBEE_WORKER_TOKEN": token,
                "RBEE_WORKER_LEASE_S": str(self._settings.worker_lease_s),
            }
        )
        capture = ProcessNarrationCapture(
            job_id=wanted.job_id,
            correlation_id=wanted.correlation_id,
            directory=directory,
            env=env,
            marker=("RBEE_WORKER_ID", wanted.worker_id),
        )
        process = await capture.spawn(_command(wanted))
        sources = [
            self._outbox.add(f"{wanted.worker_id}/{stream}", directory / stream) for stream in ("stdout", "stderr")
        ]
        worker = Worker(wanted, token, process, sources)
        sources[0].keep_from = lambda: worker.ready_position
        self._workers[wanted.worker_id] = worker
        self._own(self._watch(worker))
        self._on_change()
        return worker

    async def _until_ready(self, worker: Worker) -> None:
        """Read the worker's own words until it says that it is ready, or ends."""
        follower = FileFollower(worker.sources[0].follower.path)
        ended = asyncio.ensure_future(worker.ended.wait())
        try:
            with FileWatch() as watch:
                watch.add(follower.path)
                ended.add_done_callback(lambda _: watch.wake())
                while worker.url is None:
                    stretch = follower.read(64 * 1024)
                    worker.ready_position = follower.position
                    worker.url = _ready_url(stretch.data)
                    if worker.url is None and not stretch.data:
                        if worker.ended.is_set():
                            raise worker.error()
                        await watch.wait(60)
        finally:
            ended.cancel()
            follower.close()
            worker.sources[0].keep_from = None
        worker.state = WorkerState.READY
        self._on_change()

    async def _watch(self, worker: Worker) -> None:
        """Wait for a worker's end, clear up behind it and tell how it ended."""
        status = await worker.process.wait()
        await worker.process.stop(0)  # what it left behind
        worker.status = status
        sizes = {source.name: source.seal() for source in worker.sources}
        worker.last_lines = [line for source in worker.sources for line in _tail(source)][-LAST_LINES:]
        worker.state = WorkerState.STOPPED if worker.is_stopping else WorkerState.FAILED
        del self._workers[worker.worker_id]
        _say_exit(worker.worker_id, worker.wanted.model.ref, status, worker.last_lines, sizes)
        worker.ended.set()
        self._outbox.wake()
        self._on_change()
        worker.process.stdout.close()
        worker.process.stderr.close()
        worker.process.child.close()
        await self._remove_delivered(self._home.workers / worker.worker_id, worker.sources)

    async def stop(self, worker_id: str) -> None:
        """Stop a worker with everything it started: TERM, `stop_grace_s`, KILL; returns when all is gone.

        Raises:
            NotFoundError: It does not run here.
        """
        worker = self.get(worker_id)
        worker.is_stopping = True
        worker.state = WorkerState.DRAINING
        self._on_change()
        await worker.process.stop(self._settings.stop_grace_s)
        await worker.ended.wait()

    async def stop_all(self) -> None:
        """Stop every worker, all at once."""
        await asyncio.gather(*(self.stop(worker_id) for worker_id in list(self._workers)))

    async def close(self) -> None:
        """Let go of files that could not be delivered; they wait on disk for the next start."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def clear_strays(self) -> None:
        """Stop workers of a hive that died, and see that what they said still arrives."""
        for directory in sorted(self._home.workers.iterdir()):
            worker_id = directory.name
            report = await stop_tree(
                None, marker=("RBEE_WORKER_ID", worker_id), grace_s=self._settings.stop_grace_s
            )
            paths = [path for path in (directory / "stdout", directory / "stderr") if path.exists()]
            sources = self.deliver_rest(directory, [(f"{worker_id}/{path.name}", path) for path in paths])
            sizes = {source.name: source.follower.size for source in sources}
            with scope(worker_id=worker_id):
                narrate(
                    "hive_clear_stray", f"Found {worker_id} of an earlier start; stopped {report.found} processes."
                )
            lines = [line for source in sources for line in _tail(source)][-LAST_LINES:]
            _say_exit(worker_id, None, ExitStatus(unknown=True), lines, sizes)

    def deliver_rest(self, place: Path, files: list[tuple[str, Path]]) -> list[Source]:
        """Carry files whose writer is dead to their end, then remove `place`, the file or directory of them."""
        sources = [self._outbox.add(name, path) for name, path in files]
        for source in sources:
            source.seal()
        self._own(self._remove_delivered(place, sources))
        return sources

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _remove_delivered(self, place: Path, sources: list[Source]) -> None:
        for source in sources:
            await source.delivered.wait()
            self._outbox.remove(source)
        if place.is_dir():
            shutil.rmtree(place, ignore_errors=True)
        else:
            place.unlink(missing_ok=True)


def _command(wanted: WorkerWanted) -> list[str]:
    program = Path(sys.executable).parent / WORKER_PROGRAM
    return [
        str(program),
        "--model",
        str(wanted.model.path),
        "--alias",
        wanted.model.ref,
        "--port",
        "0",
        "--slots",
        str(wanted.slots),
        "--context-tokens",
        str(wanted.context_tokens),
    ]


def _ready_url(data: bytes) -> str | None:
    """Find the address in the worker's `worker_ready` line."""
    for piece in split(data, offset=0, part=0, final=True).pieces:
        if b'"worker_ready"' in piece.data:
            line = decode_source_line(piece.data)
            if line is not None and line.action == "worker_ready":
                return str(line.fields["url"])
    return None


def _tail(source: Source) -> list[str]:
    """Return the last lines of a file, those already read and those still to be read."""
    path, position = source.follower.path, source.follower.position
    with path.open("rb") as file:
        file.seek(max(position, source.follower.size - STDERR_TAIL_BYTES))
        rest = file.read(STDERR_TAIL_BYTES)
    lines = [*source.last_lines, *rest.decode("utf-8", "replace").splitlines()]
    return [_readable(line) for line in lines if line.strip() and '"kind":"token"' not in line[:40]][-LAST_LINES:]


def _readable(line: str) -> str:
    """Show a narrated line as its sentence, another one as it is."""
    decoded = decode_source_line(line.encode())
    return f"{decoded.action}: {decoded.message}" if decoded is not None and decoded.action else line[:2000]


def _last_failure(lines: list[str]) -> str:
    for line in reversed(lines):
        if line.startswith("worker_failed: "):
            return line.removeprefix("worker_failed: ")
    return ""


def _say_exit(
    worker_id: str, model: str | None, status: ExitStatus, last_lines: list[str], sizes: dict[str, int]
) -> None:
    fields: dict[str, Any] = msgspec.to_builtins(status)
    known = {name: value for name, value in fields.items() if value is not None and value is not False}
    is_clean = status.exit_code == 0
    with scope(job_id=None, correlation_id=None, worker_id=worker_id, model=model):
        narrate(
            "worker_exit",
            f"The worker {status.describe()}.",
            level="info" if is_clean else "error",
            **known,
            last_lines=[line[:400] for line in last_lines],
            sources=sizes,
        )
