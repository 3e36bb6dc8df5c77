"""A queen that plays one job from a script, on a thread of its own, over real HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from aiohttp import web

JOB_ID = "job-01hzzzzzzzzzzzzzzzzzzzzzzz"
Step = dict[str, Any] | Callable[[], None] | str
"""An event; something to do at that point; `cut` (break the connection); `wait` (until the job is cancelled)."""


def narration(action: str, message: str, **more: Any) -> dict[str, Any]:
    """Make a narration."""
    return {"kind": "narration", "actor": action.split("_")[0], "action": action, "message": message, **more}


def token(text: str, channel: str = "answer") -> dict[str, Any]:
    """Make a piece of an answer."""
    return {"kind": "token", "text": text, "channel": channel}


def end(state: str = "completed", **more: Any) -> dict[str, Any]:
    """Make the end."""
    return {"kind": "end", "state": state, **more}


class SmallQueen:
    """Accepts one job and plays its log; a step that was played is not played again."""

    def __init__(self, steps: list[Step]) -> None:
        self.url = ""
        self.submitted: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.cancelled: list[str] = []
        self.headers: list[Mapping[str, str]] = []
        self._steps = list(steps)
        self._log: list[bytes] = []
        self._is_cancelled = asyncio.Event()

    async def submit(self, request: web.Request) -> web.Response:
        """Accept the job."""
        self.submitted.append(msgspec.json.decode(await request.read()))
        self.keys.append(request.headers.get("Idempotency-Key"))
        self.headers.append(request.headers)
        accepted = {"job_id": JOB_ID, "state": "queued", "stream_url": "", "correlation_id": "c"}
        return web.json_response(accepted, status=202)

    async def cancel(self, request: web.Request) -> web.Response:
        """Note the cancellation."""
        self.cancelled.append(request.match_info["job_id"])
        self._is_cancelled.set()
        return web.json_response(job_view(), status=202)

    async def job(self, request: web.Request) -> web.Response:
        """Show the job."""
        return web.json_response(job_view())

    async def hives(self, request: web.Request) -> web.Response:
        """List the one hive."""
        return web.json_response({"data": [HIVE], "next": None})

    async def model_settings(self, request: web.Request) -> web.Response:
        """Tell of one alias, and of one model's settings."""
        table = {"aliases": {"small": "smollm2:135m"}, "models": {"smollm2:135m": {"slots": 2}}}
        own = {"model": "smollm2:135m", "slots": 4, "context_tokens": 4096, "keep_alive_s": 300.0, "table": table}
        return web.json_response(own)

    async def jobs(self, request: web.Request) -> web.Response:
        """List the one job."""
        return web.json_response({"data": [job_view()], "next": None})

    async def job_log(self, request: web.Request) -> web.Response:
        """Answer with the job's log, in which it was placed twice."""
        events = [narration("queen_forward", f"Placed on {place}.") for place in ("a worker", "another worker")]
        return web.json_response({"data": events, "next": None})

    async def log_page(self, request: web.Request) -> web.Response:
        """Answer with two pages of a worker's log."""
        first = request.query["after"] == "0"
        events = [{"kind": "raw", "seq": 1, "text": "chatter"}] if first else [narration("worker_ready", "Here.")]
        return web.json_response({"data": events, "next": "1" if first else None})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Play the log from where the reader is."""
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"retry: 1\n\n")
        for frame in self._log[int(request.headers.get("Last-Event-ID", 0)) :]:
            await response.write(frame)
        while self._steps:
            step = self._steps.pop(0)
            if step == "cut":
                return response
            if step == "wait":
                await self._is_cancelled.wait()
            elif callable(step):
                step()
            elif isinstance(step, dict):
                await response.write(self._frame(step))
        return response

    def _frame(self, fields: dict[str, Any]) -> bytes:
        seq = len(self._log) + 1
        data = msgspec.json.encode({"v": 1, "seq": seq, "ts": seq, "job_id": JOB_ID, **fields})
        self._log.append(b"id: %d\nevent: %s\ndata: %s\n\n" % (seq, fields["kind"].encode(), data))
        return self._log[-1]

    def routes(self) -> list[web.RouteDef]:
        """Return what is served."""
        return [
            web.post("/v1/jobs", self.submit),
            web.get("/v1/jobs", self.jobs),
            web.get("/v1/jobs/{job_id}", self.job),
            web.delete("/v1/jobs/{job_id}", self.cancel),
            web.get("/v1/jobs/{job_id}/stream", self.stream),
            web.get("/v1/jobs/{job_id}/events", self.job_log),
            web.get("/v1/hives", self.hives),
            web.get("/v1/model-settings", self.model_settings),
            web.get("/v1/workers/{worker_id}/events", self.log_page),
        ]


_EMPTY = "reason message phase queue_position progress model hive_id worker_id parent_job_id result error"


def job_view(**more: Any) -> dict[str, Any]:
    """Make a job as a queen shows it."""
    return {
        **dict.fromkeys([*_EMPTY.split(), "started_at", "ended_at"]),
        "job_id": JOB_ID,
        "operation": "infer",
        "state": "running",
        "attempt": 1,
        "principal": "local",
        "correlation_id": "c",
        "created_at": "2026-01-01T00:00:00Z",
        "last_seq": 1,
        "labels": {},
        "stream_url": "",
        **more,
    }


HIVE = {
    "hive_id": "hive-1",
    "state": "live",
    "url": "http://127.0.0.1:9000",
    "version": "0.1.0",
    "machine": {
        "hostname": "box",
        "cpus": 2,
        "memory_bytes": 8_000_000_000,
        "memory_free_bytes": 4_000_000_000,
        "disk_free_bytes": 1,
    },
    "devices": [
        {"device": "cpu", "name": "CPU", "memory_bytes": 1, "memory_free_bytes": 1},
        {
            "device": "cuda:0",
            "name": "A card",
            "memory_bytes": 2,
            "memory_free_bytes": 2,
            "is_usable": False,
            "note": "install a build for it",
        },
    ],
    "models": [{"model": "smollm2:135m", "size_bytes": 98_362_432, "path": "/m/x.gguf"}],
    "workers": [],
    "last_heartbeat_s": 0.4,
}


@contextmanager
def small_queen(*steps: Step) -> Iterator[SmallQueen]:
    """Run a queen that plays `steps`, until the `with` block ends."""
    queen = SmallQueen(list(steps))
    loop = asyncio.new_event_loop()
    started, stopping = threading.Event(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.add_routes(queen.routes())
        runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        queen.url = "http://{}:{}".format(*runner.addresses[0][:2])
        started.set()
        await stopping.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert started.wait(10)
        yield queen
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(10)
        loop.close()
