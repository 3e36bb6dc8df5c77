"""A whole queen in memory, and hives on real ports whose commands and workers do what the test says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import uvicorn
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import ASGIApp
from uvicorn.server import ServerState

from rbee.contracts.dialects import DIALECTS
from rbee.contracts.heartbeats import WorkerInfo
from rbee.contracts.ids import new_boot_id, new_id
from rbee.contracts.model_settings import ModelTable
from rbee.contracts.operations import (
    AnyOperation,
    Embedding,
    HiveCheck,
    Infer,
    ModelDelete,
    ModelDownload,
    Operation,
    WorkerSpawn,
    WorkerStop,
    parse_operation,
)
from rbee.contracts.states import WorkerState
from rbee.errors import RbeeError, UnavailableError
from rbee.http.auth import Door
from rbee.http.job_routes import JobRoutes
from rbee.http.routes import Route, build_app, read_body
from rbee.http.serve import bind, url_of
from rbee.jobs import JobRegistry, JobRunner, RunningJob
from rbee.jobs.records import JobRecord
from rbee.narration.emit import captured_narration
from rbee.narration.sinks import ListSink
from rbee.queen.app import make_app
from rbee.queen.service import QueenService
from rbee.queen.settings import QueenSettings
from tests.unit.queen.queen_stage import GIB, MODEL, closing, heartbeat, stretch, token, worker_exit, worker_info

WAIT_S = 10.0


class ScriptedHive:
    """A hive, and the fronts of its workers, behind one address.

    Attributes:
        commands: What it was asked for, in order.
        may_go_on: Commands wait for it; set at first.
        failure: What commands fail with.
        workers: What its heartbeats say of workers.
        workers_max: What they say of how many it may have.
        asked: The bodies and headers of the answers that were asked of its workers.
        on_asked: Called whenever an answer is asked for.
        refusals: What its workers refuse the next answers with.
        accepted: The ids of the requests that its workers took on.
        stopped: The ids of the requests that were stopped.
        unheard: How many of the next stops its workers answer with an error.
        frames: What a relayed answer consists of; None ends it whole, an exception breaks it off.
        left: Set when the caller of a relayed answer has left.
        several: What its workers' tokenizers take for three tokens; any other word is one.
        facts: What the closing sentences of commands carry.
        answer_late_s: How long the next command's acceptance takes.
    """

    def __init__(self, service: QueenService, registry: JobRegistry, *, free: int, models: dict[str, int]) -> None:
        self.hive_id = new_id("hive")
        self.boot_id = new_boot_id()
        self.url = ""
        self.free = free
        self.workers_max: int | None = None
        self.models = models
        self.registry = registry
        self.commands: list[Operation] = []
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.failure: Exception | None = None
        self.workers: list[WorkerInfo] = []
        self.asked: list[tuple[dict[str, Any], dict[str, str]]] = []
        self.on_asked: Callable[[], None] = lambda: None
        self.refusals: list[RbeeError] = []
        self.accepted: set[str] = set()
        self.stopped: list[str] = []
        self.unheard = 0
        self.frames: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self.media = "text/event-stream"
        self.left = asyncio.Event()
        self.several = "several"
        self.facts: dict[str, Any] = {}
        self.answer_late_s = 0.0
        self._service = service
        self.serving = AsyncExitStack()
        self._offsets: dict[str, int] = {}
        handlers: dict[type[Any], Any] = {
            WorkerSpawn: self._spawn,
            WorkerStop: self._stop,
            ModelDownload: self._other,
            ModelDelete: self._other,
            HiveCheck: self._other,
        }
        self.runner = JobRunner(registry, actor="hive", owner="hive", handlers=handlers)

    def app(self) -> Any:
        """Return what it answers with."""
        jobs = JobRoutes(self.registry, self.runner, self._submit).table()
        return build_app(
            [
                *jobs,
                *[
                    Route(method="POST", path=path, endpoint=self._answer, summary="Answer.")
                    for path in (*DIALECTS, Embedding.path)
                ],
                Route(method="POST", path="/tokenize", endpoint=self._tokenize, summary="Count."),
                Route(method="DELETE", path="/requests/{request_id}", endpoint=self._unask, summary="Stop."),
            ],
            Door(api_key=None, hosts=frozenset(), origins=frozenset()),
            title="scripted hive",
        )

    async def serve(self) -> None:
        """Listen, at a new address."""
        self.url = await self.serving.enter_async_context(served(self.app()))

    # As a hive

    async def move(self) -> None:
        """Be gone from where it listened, and come back elsewhere."""
        await self.serving.aclose()
        await self.serve()

    async def forget(self) -> None:
        """Come back at the same address with an empty registry."""
        await self.runner.close()
        port = int(self.url.rpartition(":")[2])
        await self.serving.aclose()
        self.registry = JobRegistry.open(None)
        self.serving.push_async_callback(self.registry.close)
        self.url = await self.serving.enter_async_context(served(self.app(), port))

    def beat(self, *, url: str | None = None) -> None:
        """Send a heartbeat."""
        beat = heartbeat(
            *self.workers,
            url=url or self.url,
            boot_id=self.boot_id,
            free=self.free,
            models=self.models,
            workers_max=self.workers_max,
        )
        self._service.book.beat(self.hive_id, beat)

    def has_worker(self, worker_id: str | None = None, *, slots: int = 2, model: str = MODEL) -> str:
        """Have a ready worker, and say so."""
        worker_id = worker_id or new_id("worker")
        self.workers.append(worker_info(worker_id, url=self.url, slots=slots, model=model))
        self.beat()
        return worker_id

    def drains(self, worker_id: str) -> None:
        """Have a worker that takes on nothing more, and say so."""
        self.workers = [
            msgspec.structs.replace(info, state=WorkerState.DRAINING) if info.worker_id == worker_id else info
            for info in self.workers
        ]
        self.beat()

    async def kill(self, worker_id: str, said: bytes = b"") -> None:
        """Let a worker die behind its last words."""
        self.workers = [info for info in self.workers if info.worker_id != worker_id]
        self.beat()
        if said:
            await self.say(f"{worker_id}/stdout", said)
        sizes = {f"{worker_id}/stdout": self.written(f"{worker_id}/stdout")}
        line = worker_exit(worker_id, sizes, exit_code=None, signal="SIGKILL")
        await self.say(f"{self.hive_id}/boot", line)

    async def say(self, source: str, *lines: bytes) -> None:
        """Bring lines of a file: `<worker id>/stdout`, or a boot of its own."""
        data, offset = b"".join(lines), self._offsets.get(source, 0)
        self._offsets[source] = offset + len(data)
        await self._service.ingest.take(self.hive_id, stretch(source, offset, data))

    def written(self, source: str) -> int:
        """Return how many bytes of a file were brought."""
        return self._offsets.get(source, 0)

    async def answer(self, worker_id: str, job_id: str, *texts: str, attempt: int = 1) -> None:
        """Have a worker narrate a whole answer."""
        lines = [token(job_id, attempt, text) for text in texts]
        await self.say(f"{worker_id}/stdout", *lines, closing(job_id, attempt, frames=len(lines)))

    async def _submit(self, request: Request) -> JobRecord:
        operation = parse_operation(await read_body(request))
        record = await self.registry.create(
            operation,
            correlation_id=request.state.correlation_id,
            parent_job_id=operation.parent_job_id,
            idempotency_key=request.headers.get("idempotency-key"),
        )
        if not record.is_ended:
            self.runner.launch(record, operation)
        late_s, self.answer_late_s = self.answer_late_s, 0.0
        await asyncio.sleep(late_s)
        return record

    async def _begin(self, job: RunningJob) -> None:
        await job.start()
        self.commands.append(job.operation)
        job.facts.update(self.facts)
        await self.may_go_on.wait()
        if self.failure is not None:
            raise self.failure

    async def _spawn(self, job: RunningJob) -> dict[str, Any]:
        await self._begin(job)
        assert isinstance(job.operation, WorkerSpawn)
        self.has_worker(job.operation.worker_id, slots=job.operation.slots, model=job.operation.model)
        return {"worker_id": job.operation.worker_id, "hive_id": self.hive_id}

    async def _stop(self, job: RunningJob) -> None:
        await self._begin(job)
        assert isinstance(job.operation, WorkerStop)
        gone = job.operation.worker_id
        self.workers = [info for info in self.workers if info.worker_id != gone]
        self.beat()

    async def _other(self, job: RunningJob) -> dict[str, Any]:
        await self._begin(job)
        return {}

    # As a worker

    async def _answer(self, request: Request) -> Response:
        self.asked.append((msgspec.json.decode(await request.body()), dict(request.headers)))
        self.on_asked()
        if self.refusals:
            raise self.refusals.pop(0)
        self.accepted.add(request.headers["x-request-id"])
        if request.headers.get("x-rbee-keep"):
            return Response(b"{}", status_code=202, media_type="application/json")
        return StreamingResponse(self._stream(), media_type=self.media)

    async def _stream(self) -> AsyncIterator[bytes]:
        try:
            while (part := await self.frames.get()) is not None:
                if isinstance(part, Exception):
                    raise part
                yield part
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        text = msgspec.json.decode(await request.body())["content"]
        return {"tokens": list(range(len(text.split()) + 2 * text.count(self.several)))}

    async def _unask(self, request: Request) -> Response:
        if self.unheard:
            self.unheard -= 1
            raise UnavailableError("Not now.")
        request_id = request.path_params["request_id"]
        self.stopped.append(request_id)
        answer = msgspec.json.encode({"request_id": request_id, "is_known": request_id in self.accepted})
        return Response(answer, status_code=202, media_type="application/json")


class Queen:
    """A queen's service over a registry in memory, and what it narrates."""

    def __init__(self, service: QueenService, sink: ListSink, stack: AsyncExitStack) -> None:
        self.service = service
        self.sink = sink
        self.registry = service.registry
        self._stack = stack

    async def hive(self, *, free: int = 8 * GIB, models: dict[str, int] | None = None) -> ScriptedHive:
        """Start a hive that has not been heard of yet."""
        registry = JobRegistry.open(None)
        self._stack.push_async_callback(registry.close)
        hive = ScriptedHive(self.service, registry, free=free, models={MODEL: GIB} if models is None else models)
        self._stack.push_async_callback(hive.runner.close)
        self._stack.push_async_callback(hive.serving.aclose)
        await hive.serve()
        return hive

    async def live_hive(self, *, workers_max: int | None = None, **values: Any) -> ScriptedHive:
        """Start a hive that is live."""
        hive = await self.hive(**values)
        hive.workers_max = workers_max
        hive.beat()
        return hive

    async def url(self) -> str:
        """Serve the queen, and return where."""
        return await self._stack.enter_async_context(served(make_app(self.service, "http://queen")))

    async def submit(self, operation: AnyOperation) -> str:
        """Accept a job and start it; returns its id."""
        record = await self.service.accept(
            operation, correlation_id="c", is_correlation_id_replaced=False, principal="local"
        )
        self.service.launch(record, operation)
        return record.job_id

    async def infer(self, **values: Any) -> str:
        """Submit an `infer`; returns its id."""
        return await self.submit(Infer(**{"prompt": "hello", "model": MODEL, **values}))

    async def log(self, job_id: str) -> list[dict[str, Any]]:
        """Return a job's log so far."""
        page = await self.registry.read(job_id, 0)
        return [msgspec.json.decode(event) for event in page.events]

    async def said(self, job_id: str) -> list[str]:
        """Return the actions, or else the kinds, of a job's events so far."""
        return [event.get("action", event["kind"]) for event in await self.log(job_id)]

    async def end(self, job_id: str) -> dict[str, Any]:
        """Wait for a job's end, and return it."""
        reader = await self.registry.follow(job_id)
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    for event in await reader.next(WAIT_S):
                        decoded: dict[str, Any] = msgspec.json.decode(event)
                        if decoded["kind"] == "end":
                            return decoded
        finally:
            reader.close()

    async def until_running(self, job_id: str) -> str:
        """Wait until a job has its place; returns the worker."""
        await until(lambda: job_id not in self.service.runner.running or self._place_of(job_id) is not None)
        worker_id = self._place_of(job_id)
        assert worker_id is not None, f"{job_id} has ended"
        return worker_id

    def _place_of(self, job_id: str) -> str | None:
        running = self.service.runner.running.get(job_id)
        return running.record.worker_id if running is not None else None


@asynccontextmanager
async def served(app: ASGIApp, port: int = 0) -> AsyncIterator[str]:
    """Serve an application as the programs do, and return where; leaving it breaks off what is open."""
    config = uvicorn.Config(app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    sock = bind("127.0.0.1", port, is_port_asked_for=True)
    protocol: Any = config.http_protocol_class
    server = await loop.create_server(
        lambda: protocol(config=config, server_state=state, app_state={}, _loop=loop), sock=sock
    )
    try:
        yield url_of(sock)
    finally:
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else go on until a condition holds, `WAIT_S` at most."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110  # a condition is no event
            await asyncio.sleep(0.002)


@asynccontextmanager
async def queen_of(
    home: Path, registry: JobRegistry | None = None, models: ModelTable | None = None, **settings: Any
) -> AsyncIterator[Queen]:
    """Give a queen that runs; a registry that is given stays open."""
    values = {"hive_stale_s": 600.0, "hive_lost_s": 700.0, "hive_timeout_s": 5.0, "stop_grace_s": 5.0, **settings}
    with captured_narration("queen") as sink:
        async with AsyncExitStack() as stack:
            if registry is None:
                registry = JobRegistry.open(None)
                stack.push_async_callback(registry.close)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            service = QueenService(QueenSettings(home=home, **values), registry, session, new_boot_id(), models)
            await service.open()
            background = asyncio.ensure_future(service.run())
            inner = await stack.enter_async_context(AsyncExitStack())
            try:
                yield Queen(service, sink, inner)
            finally:
                background.cancel()
                await asyncio.gather(background, return_exceptions=True)
                await service.close(0)
