"""The front: the closed list of routes, who may ask, and which way each request goes."""

from __future__ import annotations

import asyncio
import hmac
import sys
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee.contracts.dialects import DIALECTS, Dialect
from rbee.contracts.heartbeats import Purpose
from rbee.errors import (
    AuthenticationError,
    InternalError,
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    WorkerLostError,
)
from rbee.http.auth import Door
from rbee.http.errors import ErrorShape
from rbee.http.middleware import GuardMiddleware
from rbee.http.routes import read_body
from rbee.narration import FileSink, narrate, scope
from rbee.worker.asking import check_continuation, named
from rbee.worker.calls import Call, check_body, read_call, read_object
from rbee.worker.closing import Closing, StopCause, stopped_worker
from rbee.worker.desk import Desk, Running
from rbee.worker.engine_client import EngineClient
from rbee.worker.keep import TokenWriter, keep
from rbee.worker.mending import MESSAGES, Mender, prepare, unheeded
from rbee.worker.relay import relay_foreign_stream, relay_plain, relay_stream, relay_whole
from rbee.worker.reply import Reply
from rbee.worker.tally import Tally

# What has no stream, and what a worker has to be started for to answer it.
PURPOSES: dict[str, Purpose] = {
    "/v1/embeddings": "embed",
    "/v1/rerank": "rerank",
    "/v1/messages/count_tokens": "generate",
}
_FOR = {"generate": "answers", "embed": "embeddings", "rerank": "rankings"}
# No inference: they need no slot and have no closing line.
ASIDE_PATHS = frozenset({"/tokenize", "/apply-template"})
_REQUESTS = "/requests/"

_Answer = Callable[[Request, Send], Awaitable[None]]
# Made only when it is begun: a task that is cancelled before its first step would leave it unawaited.
_Work = Callable[[], Awaitable[None]]


class WorkerDoor(Door, frozen=True, kw_only=True):
    """Lets in who has the worker's token."""

    def principal(self, authorization: str | None) -> str:
        """Return who is calling.

        Raises:
            AuthenticationError: The token is missing or wrong.
        """
        scheme, _, given = (authorization or "").partition(" ")
        token = (self.api_key or "").encode()
        if scheme.lower() == "bearer" and token and hmac.compare_digest(given.strip().encode(), token):
            return "queen"
        raise AuthenticationError(
            "This worker's token is needed: send `Authorization: Bearer <token>`.",
            remedy="Ask the queen instead; it knows the tokens of its workers.",
        )


class Front:
    """Answers for one engine."""

    def __init__(
        self,
        *,
        engine: EngineClient,
        desk: Desk,
        kept: asyncio.TaskGroup,
        sink: FileSink,
        worker_id: str,
        model: str,
        purpose: Purpose = "generate",
    ) -> None:
        """Take what the requests share.

        Args:
            model: The name the model is shown under, and the engine's own where it has no other.
            purpose: What the engine was started for.
            kept: Waits for the tasks of kept requests, which no caller waits for.
            sink: The worker's stdout.
        """
        self._engine = engine
        self._desk = desk
        self._kept = kept
        self._sink = sink
        self._worker_id = worker_id
        self._shown_model = model
        self._model = engine.traits.model_name or model
        self._purpose = purpose
        self._routes: dict[str, dict[str, _Answer]] = {
            "/livez": {"GET": self._livez},
            "/health": {"GET": self._livez},
            "/readyz": {"GET": self._readyz},
            "/v1/models": {"GET": self._models},
            **{path: {"POST": self._infer} for path in [*DIALECTS, *PURPOSES]},
            **{path: {"POST": self._aside} for path in ASIDE_PATHS},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http":
            await self._find(scope["method"], scope["path"])(Request(scope, receive), send)

    def _find(self, method: str, path: str) -> _Answer:
        by_method = self._routes.get(path)
        if by_method is None and path.startswith(_REQUESTS) and len(path) > len(_REQUESTS):
            by_method = {"DELETE": self._cancel}
        if by_method is None:
            raise NotFoundError(f"There is nothing at {path[:200]}.", remedy="Ask one of the worker's routes.")
        if method not in by_method:
            raise MethodNotAllowedError(f"{path} takes {', '.join(by_method)}.")
        return by_method[method]

    async def _livez(self, request: Request, send: Send) -> None:
        await Reply(send, []).whole(b'{"status":"ok"}')

    async def _readyz(self, request: Request, send: Send) -> None:
        desk = self._desk
        if desk.is_draining:
            raise UnavailableError("This worker is being stopped.", retry_after_s=1.0)
        status = {"status": "ready", "slots": desk.slots, "slots_used": desk.slots_used}
        await Reply(send, []).whole(msgspec.json.encode(status))

    async def _models(self, request: Request, send: Send) -> None:
        await Reply(send, []).whole(await self._engine.ask("GET", "/v1/models"))

    async def _aside(self, request: Request, send: Send) -> None:
        body = await read_body(request)
        read_object(body)
        await Reply(send, []).whole(await self._engine.ask("POST", request.scope["path"], body))

    async def _cancel(self, request: Request, send: Send) -> None:
        request_id = request.scope["path"].removeprefix(_REQUESTS)
        is_known = self._desk.cancel(request_id[:200])
        answer = {"request_id": request_id, "is_known": is_known}
        await Reply(send, []).whole(msgspec.json.encode(answer), status=202)

    async def _infer(self, request: Request, send: Send) -> None:
        call = read_call(request.headers)
        frames: ErrorShape = "anthropic" if request.scope["path"] == MESSAGES else "openai"
        reply = Reply(send, call.echoed(), frames)
        body = await read_body(request)
        if call.keep != "no" and self._desk.is_known(call.request_id):
            await self._accepted(call, reply)
            return
        closing = Closing(call, Tally())
        with scope(job_id=call.job_id, correlation_id=call.correlation_id):
            try:
                await self._begin(request, body, closing, reply)
            except RbeeError as error:
                await reply.error(error, job_id=call.job_id)

    async def _begin(self, request: Request, body: bytes, closing: Closing, reply: Reply) -> None:
        """Check and admit a request; what the body alone shows to be wrong has its closing line too."""
        path, call = request.scope["path"], closing.call
        dialect = DIALECTS.get(path)
        try:
            self._check_purpose(PURPOSES.get(path, "generate"))
            asked = closing.asked = read_object(body)
            if dialect is not None:
                check_body(asked, dialect)
            elif call.keep != "no":
                raise InvalidRequestError(f"{path} has no answer that could be kept.", param="x-rbee-keep")
            if call.keep != "no" and call.attempt > 1:
                check_continuation(asked, self._engine.traits)
            refusal = unheeded(path, asked)
            if refusal is not None and await self._engine.is_llama_cpp():
                raise refusal
            mender = Mender(path, asked, self._model)
            prepared = prepare(path, asked, self._model)
        except (InvalidRequestError, WorkerLostError) as error:
            closing.failed(error)
            raise
        if prepared is not asked:  # else the body goes on byte for byte
            asked, body = prepared, msgspec.json.encode(prepared)
        if isinstance(asked.get("n"), int):
            closing.tally.choices = asked["n"]
        if asked.get("tools"):
            await self._tell_of_tools(call)
        running = self._desk.admit(closing)
        if dialect is not None and call.keep != "no":
            self._keep(running, dialect, asked, mender)
            await self._accepted(call, reply)
            return
        await self._relay(running, self._work(path, dialect, asked, body, closing, reply, mender), request, reply)

    async def _tell_of_tools(self, call: Call) -> None:
        """Tell the job's log where the model hears nothing of the tools that it is given."""
        if await self._engine.ignores_tools():
            narrate(
                "worker_ignore_tools",
                f"The chat template of {self._shown_model} has no place for tools: the model is not told of them.",
                level="warning",
                attempt=call.attempt,
            )

    def _check_purpose(self, asked_for: Purpose) -> None:
        if asked_for != self._purpose:
            raise InvalidRequestError(
                f"This worker was not started for {_FOR[asked_for]}, but for {_FOR[self._purpose]}.",
                remedy="Ask the queen: she knows which worker is for what, and starts one where there is none.",
            )

    def _work(
        self,
        path: str,
        dialect: Dialect | None,
        asked: dict[str, Any],
        body: bytes,
        closing: Closing,
        reply: Reply,
        mender: Mender,
    ) -> _Work:
        is_built_in = self._engine.traits.is_built_in
        if dialect is None:
            plain = asked if is_built_in else named(asked, self._engine.traits)
            if plain is not asked:
                body = msgspec.json.encode(plain)
            return partial(relay_plain, self._engine, path, plain, body, closing, reply, mender)
        if asked.get("stream") is True and is_built_in:
            return partial(relay_stream, self._engine, dialect, body, closing, reply, mender)
        if asked.get("stream") is True:
            return partial(relay_foreign_stream, self._engine, dialect, asked, closing, reply, mender)
        return partial(relay_whole, self._engine, dialect, asked, closing, reply, mender)

    async def _accepted(self, call: Call, reply: Reply) -> None:
        await reply.whole(msgspec.json.encode({"request_id": call.request_id}), status=202)

    def _keep(self, running: Running, dialect: Dialect, asked: dict[str, Any], mender: Mender) -> None:
        closing = running.closing
        if running.cause is not None:
            closing.stopped(running.cause)
            return
        writer = TokenWriter(
            self._sink,
            worker_id=self._worker_id,
            call=closing.call,
            dialect=dialect,
            tally=closing.tally,
            timings=asked.get("timings_per_token") is True,
            mender=mender,
        )
        work = partial(keep, self._engine, dialect, asked, closing, writer)
        self._desk.start(self._kept, running, _settled(running, None, work))

    async def _relay(self, running: Running, work: _Work, request: Request, reply: Reply) -> None:
        if running.cause is None:
            async with asyncio.TaskGroup() as group:
                task = self._desk.start(group, running, _settled(running, reply, work))
                watcher = group.create_task(_stop_when_left(request, running))
                task.add_done_callback(lambda _: watcher.cancel())
        else:
            running.closing.stopped(running.cause)
        if running.cause is StopCause.REQUEST:
            await _tell(reply, _cancelled(), running.closing)
        elif running.cause is StopCause.SHUTDOWN:
            await _tell(reply, stopped_worker(), running.closing)


def front_app(front: Front, token: str) -> ASGIApp:
    """Make the application: the front behind its door."""
    return GuardMiddleware(front, WorkerDoor(api_key=token))


def _cancelled() -> RbeeError:
    return InvalidRequestError(
        "The request was cancelled.", code="cancelled", remedy="Send it again if it is wanted."
    )


async def _settled(running: Running, reply: Reply | None, work: _Work) -> None:
    """Do a request's work and say how it ended, to the log first and then to the caller."""
    closing = running.closing
    try:
        await work()
    except asyncio.CancelledError:
        closing.stopped(running.cause or StopCause.SHUTDOWN)
        raise
    except TimeoutError:
        running.cause = StopCause.CALLER  # it took nothing for too long
        closing.stopped(running.cause)
    except RbeeError as error:
        closing.failed(error)
        await _tell(reply, error, closing)
    except Exception:  # noqa: BLE001  # a fault of ours must not end the worker
        traceback.print_exc(file=sys.stderr)
        closing.failed(InternalError())
        await _tell(reply, InternalError(), closing)


async def _tell(reply: Reply | None, error: RbeeError, closing: Closing) -> None:
    if reply is not None:
        with suppress(TimeoutError):  # nobody reads it
            await reply.error(error, job_id=closing.call.job_id)


async def _stop_when_left(request: Request, running: Running) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    running.stop(StopCause.CALLER)
