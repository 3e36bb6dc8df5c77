"""The OpenAI-compatible routes: each call a job, its answer the worker's own bytes."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rbee.contracts.models import KNOWN_MODELS
from rbee.contracts.operations import ChatCompletion, Completion, MessagesCall, ResponseCall, operation_name
from rbee.contracts.states import WorkerState
from rbee.contracts.strict import decode_strict
from rbee.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    NoCapacityError,
    OverloadedError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    WorkerError,
)
from rbee.http.routes import Endpoint, Route, read_body
from rbee.queen.call_ways import is_kept, is_narrated
from rbee.queen.service import QueenService

NEVER_KEPT = frozenset({"messages", "prompt", "input", "system", "instructions", "tools"})
DEADLINES = ("timeout_s", "queue_timeout_s", "first_token_timeout_s", "idle_timeout_s")


class OpenAIRoutes:
    """Answers OpenAI's clients."""

    def __init__(self, service: QueenService) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """Return the rows."""
        return [
            *[
                Route(
                    method="POST",
                    path=kind.path,
                    endpoint=self._endpoint(kind),
                    summary="An answer, as OpenAI's or Anthropic's API has it; streamed when `stream` is true.",
                    result=dict[str, Any],
                    errors=(
                        InvalidRequestError,
                        ModelNotFoundError,
                        PayloadTooLargeError,
                        UnsupportedMediaTypeError,
                        OverloadedError,
                        WorkerError,
                        NoCapacityError,
                        DeadlineExceededError,
                    ),
                )
                for kind in (ChatCompletion, Completion, ResponseCall, MessagesCall)
            ],
            Route(
                method="GET",
                path="/v1/models",
                endpoint=self.models,
                summary="The models that can be asked for.",
                result=dict[str, Any],
            ),
        ]

    async def models(self, request: Request) -> dict[str, Any]:
        """List models: those loaded, those on a disk, and those known by name."""
        workers = self._service.book.workers()
        loaded = {worker.info.model for worker in workers if worker.info.state is WorkerState.READY}
        on_disk = {found.model for hive in self._service.book.hives() for found in hive.heartbeat.models}
        names = sorted({*loaded, *on_disk, *KNOWN_MODELS})

        def state(name: str) -> str:
            if name in loaded:
                return "loaded"
            return "available" if name in on_disk else "remote"

        data = [
            {"id": name, "object": "model", "created": 0, "owned_by": "rbee", "state": state(name)}
            for name in names
        ]
        return {"object": "list", "data": data}

    def _endpoint(self, kind: type[Any]) -> Endpoint:
        async def call(request: Request) -> Response:
            return await self._call(kind, request)

        return call

    async def _call(self, kind: type[Any], request: Request) -> Response:
        """Accept a call as a job and answer it: relayed, or kept where that is asked for."""
        call = read_call(await read_body(request))
        is_list_needed = kind in (ChatCompletion, MessagesCall)
        if is_list_needed and (not isinstance(call.get("messages"), list) or not call["messages"]):
            raise InvalidRequestError("`messages` must be a list with at least one message.", param="messages")
        is_to_be_kept, is_told = is_kept(kind, call, request.headers), is_narrated(request.headers)
        operation = read_operation(kind, call)
        if is_to_be_kept:
            operation = msgspec.structs.replace(operation, request=call)
        record = await self._service.accept(
            operation,
            correlation_id=request.state.correlation_id,
            is_correlation_id_replaced=request.state.is_correlation_id_replaced,
            principal=request.state.principal,
            is_kept=is_to_be_kept,
        )
        if is_to_be_kept:
            self._service.launch(record, operation)
            return self._service.kept_calls.response(record, operation, is_narrated=is_told)
        call["model"] = record.model
        body = msgspec.json.encode(call)
        return self._service.relay.response(record, operation, kind.path, body, is_narrated=is_told)


def read_call(body: bytes) -> dict[str, Any]:
    """Read the body of a call; what is unknown in it goes to the engine.

    Raises:
        InvalidRequestError: It is no JSON object.
    """
    try:
        call = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"The body is no JSON object: {error}.") from None
    return call


def read_operation(kind: type[Any], call: dict[str, Any]) -> Any:
    """Make the operation of a call, and take the deadlines, which are none of the engine's, out of the call.

    Raises:
        InvalidRequestError: The model or a deadline is of the wrong form.
    """
    model = read_model(call)
    deadlines = {name: call.pop(name) for name in DEADLINES if name in call}
    told = decode_strict(msgspec.json.encode({"operation": operation_name(kind), **deadlines}), (kind,))
    parameters = {key: value for key, value in call.items() if key not in NEVER_KEPT}
    return msgspec.structs.replace(told, model=model, parameters=parameters)


def read_model(call: dict[str, Any]) -> str | None:
    """Read the model a call names, if any.

    Raises:
        InvalidRequestError: It is no string.
    """
    model = call.get("model")
    if model is not None and (not isinstance(model, str) or not 0 < len(model) <= 1024):
        raise InvalidRequestError("`model` must be a model's name.", param="model")
    return model
