"""The hive's workers: started with captured output, watched, stopped down to the last grandchild."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from rbee.contracts.engine_settings import BUILT_IN, EngineTable
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.home import Home
from rbee.contracts.ids import is_id
from rbee.contracts.states import WorkerState
from rbee.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    RbeeError,
    StartError,
    StorageFullError,
    WorkerError,
)
from rbee.hive.deliveries import Deliveries
from rbee.hive.last_words import AGAIN_S, LastWords, last_words, say_exit_surely
from rbee.hive.outbox import Outbox, Source
from rbee.hive.settings import HiveSettings
from rbee.hive.worker import Worker, ready_url
from rbee.hive.worker_file import WorkerFile, new_worker_file
from rbee.hive.worker_wanted import WorkerWanted, command_of, device_environment
from rbee.narration import narrate, scope
from rbee.processes import (
    CapturedProcess,
    Child,
    FileFollower,
    FileWatch,
    ProcessNarrationCapture,
    child_environment,
)

WORKER_PROGRAM = "llama-worker-rbee"
LOAD_S_PER_GIB = 20.0
SETTLE_S = 30.0


class Workers:
    """Starts, watches and stops workers. One event loop owns it."""

    def __init__(
        self,
        home: Home,
        settings: HiveSettings,
        outbox: Outbox,
        deliveries: Deliveries,
        on_change: Callable[[], None],
        *,
        engines: EngineTable,
        program: Path | None = None,
    ) -> None:
        """Take what is needed; `program` is what to run instead of the worker installed next to Python."""
        self._engines = engines
        self._home = home
        self._settings = settings
        self._outbox = outbox
        self._deliveries = deliveries
        self._on_change = on_change
        self._program = program or Path(sys.executable).parent / WORKER_PROGRAM
        self._workers: dict[str, Worker] = {}

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
            InvalidRequestError, ConflictError: See `check_new`.
            StartError: The program cannot be started.
            StorageFullError: It cannot be written down.
            WorkerError: It ended before it was ready; with exit code or signal and its last lines.
            ModelInvalidError: It could not load the model.
            DeadlineExceededError: It took too long.
        """
        self.check_new(wanted.worker_id)
        await self._spawn(wanted, hive_id)
        return await self.until_ready(wanted.worker_id)

    def check_new(self, worker_id: str) -> None:
        """Refuse to start a worker under such an id.

        Raises:
            InvalidRequestError, ConflictError: It is no worker's id, or is one that was used before.
        """
        if not is_id("worker", worker_id):
            raise InvalidRequestError(f"`{worker_id[:64]}` is no worker's id.", param="worker_id")
        if (self._home.workers / worker_id).exists():
            raise ConflictError(f"The worker {worker_id} was started before.")

    async def until_ready(self, worker_id: str) -> Worker:
        """Wait until a worker that was started, or adopted, is ready; cancelled, or if it fails, it is stopped.

        Raises:
            WorkerError: It has ended already.
            RbeeError: See `start`.
        """
        worker = self._workers.get(worker_id)
        if worker is None:
            raise WorkerError(
                f"{worker_id} ended while the hive was away, before it was ready.",
                details={"worker_id": worker_id},
            )
        try:
            await asyncio.shield(worker.ready)
        except BaseException:
            await self._stop(worker)
            raise
        return worker

    async def _spawn(self, wanted: WorkerWanted, hive_id: str) -> Worker:
        directory = self._home.workers / wanted.worker_id
        file = new_worker_file(wanted, secrets.token_urlsafe(32))
        capture = ProcessNarrationCapture(
            job_id=wanted.job_id,
            correlation_id=wanted.correlation_id,
            directory=directory,
            env=self._environment(file, hive_id),
            marker=("RBEE_WORKER_ID", wanted.worker_id),
        )
        process: CapturedProcess | None = None
        try:
            directory.mkdir(mode=0o700)
            file.write(directory)  # from here on, the next start of the hive finds the process
            process = await capture.spawn(command_of(wanted, self._program))
            sources = self._sources(directory)
        except BaseException as error:
            if process is not None:
                await process.aclose(0)
            shutil.rmtree(directory, ignore_errors=True)
            if not isinstance(error, OSError):
                raise
            said = f"The worker's files cannot be had: {error.strerror or error}."
            raise StorageFullError(said) from error
        child = process.child
        file = msgspec.structs.replace(file, pid=child.pid, start_time=child.start_time)
        worker = self._take(Worker(file, process, sources))
        self._write_down(worker)
        self._on_change()
        return worker

    def _environment(self, file: WorkerFile, hive_id: str) -> dict[str, str]:
        return child_environment(
            {
                "RBEE_HOME": str(self._home.root),
                "RBEE_HIVE_ID": hive_id,
                "RBEE_WORKER_ID": file.wanted.worker_id,
                "RBEE_WORKER_TOKEN": file.token,
                "RBEE_WORKER_LEASE_S": str(self._settings.worker_lease_s),
                **device_environment(file.wanted.device),
            }
        )

    def _sources(self, directory: Path) -> list[Source]:
        """Carry both files of a worker from now on, or none of them."""
        sources: list[Source] = []
        try:
            for stream in ("stdout", "stderr"):
                sources.append(self._outbox.add(f"{directory.name}/{stream}", directory / stream))
        except BaseException:
            for source in sources:
                self._outbox.remove(source)
            raise
        return sources

    def _take(self, worker: Worker) -> Worker:
        """Watch over a worker from now on: until it is ready, and until it ends."""
        self._workers[worker.worker_id] = worker
        if worker.file.url is None:
            worker.sources[0].keep_from = lambda: worker.ready_position
            self._deliveries.own(self._follow_start(worker))
        else:
            worker.mark_ready()
        self._deliveries.own(self._watch(worker))
        return worker

    def adopt(self, file: WorkerFile, child: Child) -> None:
        """Take a live worker back: what it said meanwhile is in its files, from where the queen has it."""
        directory = self._home.workers / file.wanted.worker_id
        stdout, stderr = (FileFollower(directory / stream) for stream in ("stdout", "stderr"))
        process = CapturedProcess(child, stdout, stderr, marker=("RBEE_WORKER_ID", directory.name))
        file = msgspec.structs.replace(file, pid=child.pid, start_time=child.start_time)
        worker = self._take(Worker(file, process, self._sources(directory)))
        self._write_down(worker)
        with scope(worker_id=worker.worker_id, model=worker.wanted.model.ref):
            narrate(
                "hive_adopt",
                f"Adopted {worker.worker_id} ({worker.wanted.model.ref}), which went on while the hive was away.",
                pid=child.pid,
                is_ready=file.url is not None,
            )

    def _write_down(self, worker: Worker, **values: Any) -> bool:
        """Keep what has become known; where the disk is full, the next start of the hive would know less."""
        worker.file = msgspec.structs.replace(worker.file, **values)
        try:
            worker.file.write(self._home.workers / worker.worker_id)
        except OSError as error:
            if worker.is_kept:
                said = f"{worker.worker_id} cannot be written down: {error.strerror or error}."
                narrate("hive_worker_not_kept", said, level="warning", worker_id=worker.worker_id)
            worker.is_kept = False
        else:
            worker.is_kept = True
        return worker.is_kept

    async def _follow_start(self, worker: Worker) -> None:
        """Wait until a worker says that it is ready, and no longer than it may take; then tell who waits."""
        limit_s = self._settings.load_timeout_s + LOAD_S_PER_GIB * worker.wanted.model.size_bytes / 2**30
        if worker.wanted.ready_timeout_s:
            limit_s = max(limit_s, worker.wanted.ready_timeout_s + SETTLE_S)  # the worker itself says it first
        try:
            async with asyncio.timeout(limit_s):
                url = await self._ready_url(worker)
        except TimeoutError:
            message = f"The worker was not ready after {limit_s:.0f} s."
            await self._give_up(worker, DeadlineExceededError(message, reason="worker_failed"))
        except (RbeeError, OSError) as error:
            failure = error if isinstance(error, RbeeError) else StartError(f"It cannot be followed: {error}.")
            await self._give_up(worker, failure)
        else:
            await self._is_followed(worker, url)

    async def _is_followed(self, worker: Worker, url: str | None) -> None:
        """Take note of what a worker's own words came to."""
        if url is None or worker.is_stopping:
            await worker.ended.wait()
            worker.mark_failed(worker.error())
            return
        is_kept = self._write_down(worker, url=url)
        worker.mark_ready()
        self._on_change()
        while not is_kept and not worker.ended.is_set():  # its words stay until then, for the next start to read
            await asyncio.sleep(AGAIN_S)
            is_kept = self._write_down(worker)
        worker.sources[0].keep_from = None

    async def _give_up(self, worker: Worker, failure: RbeeError) -> None:
        """Stop a worker that will not be ready, and tell who waits."""
        try:
            await self._stop(worker)
        except InternalError as error:  # it hangs in the kernel
            narrate("hive_worker_left_behind", error.message, level="error", worker_id=worker.worker_id)
        failure.details = {**failure.details, "worker_id": worker.worker_id, "last_lines": worker.last_words.lines}
        worker.mark_failed(failure)

    async def _ready_url(self, worker: Worker) -> str | None:
        """Read the worker's own words until it says that it is ready; None when it ends first."""
        follower = FileFollower(worker.sources[0].follower.path)
        ended = asyncio.ensure_future(worker.ended.wait())
        try:
            with FileWatch() as watch:
                watch.add(follower.path)
                ended.add_done_callback(lambda _: watch.wake())
                follower.skip_hole()
                while True:
                    worker.ready_position = follower.position
                    stretch = follower.read(64 * 1024)
                    if url := ready_url(stretch.data):
                        return url
                    if not stretch.data:
                        if worker.ended.is_set():
                            return None
                        await watch.wait(60)
        finally:
            ended.cancel()
            follower.close()

    async def _watch(self, worker: Worker) -> None:
        """Wait for a worker's end, clear up behind it and tell how it ended."""
        status = await worker.process.wait()
        try:
            await worker.process.stop(0)  # what it left behind
        except InternalError as error:  # it hangs in the kernel; the worker itself has ended all the same
            narrate("hive_worker_left_behind", error.message, level="error", worker_id=worker.worker_id)
        worker.status = status
        self._write_down(worker, status=status)
        sizes = {source.name: source.seal() for source in worker.sources}
        worker.last_words = self.last_words(worker.sources, worker.wanted.engine)
        worker.state = WorkerState.STOPPED if worker.is_stopping else WorkerState.FAILED
        del self._workers[worker.worker_id]
        await say_exit_surely(worker.worker_id, worker.wanted.model.ref, status, worker.last_words, sizes)
        worker.ended.set()
        self._outbox.wake()
        self._on_change()
        worker.process.stdout.close()
        worker.process.stderr.close()
        worker.process.child.close()
        await self._deliveries.remove_delivered(self._home.workers / worker.worker_id, worker.sources)

    def last_words(self, sources: list[Source], engine: str | None) -> LastWords:
        """Return the last of a worker's files without what the configuration gives its engine in `env`."""
        return last_words(sources, self._engines.engines.get(engine or BUILT_IN))

    async def stop(self, worker_id: str) -> None:
        """Stop a worker with everything it started: TERM, `stop_grace_s`, KILL; returns when all is gone.

        Raises:
            NotFoundError: It does not run here.
        """
        await self._stop(self.get(worker_id))

    async def stop_if_there(self, worker_id: str) -> None:
        """Stop a worker; one that does not run here is fine."""
        if worker_id in self._workers:
            await self._stop(self._workers[worker_id])

    async def _stop(self, worker: Worker) -> None:
        if not worker.ended.is_set():
            worker.is_stopping = True
            worker.state = WorkerState.DRAINING
            self._on_change()
            await worker.process.stop(self._settings.stop_grace_s)
            await worker.ended.wait()

    async def stop_all(self) -> None:
        """Stop every worker, all at once; what one of them cannot be stopped for is raised when all were tried."""
        stops = (self._stop(worker) for worker in list(self._workers.values()))
        for result in await asyncio.gather(*stops, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
