"""The routes that the clients of OpenAI and Anthropic know: each call a job, its answer the worker's own bytes."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from rbee.contracts.heartbeats import Heartbeat, WorkerInfo
from rbee.contracts.operations import (
    API_CALLS,
    AnyApiCall,
    ApiCall,
    ChatCompletion,
    Completion,
    Embedding,
    MessagesCall,
    Rerank,
    ResponseCall,
    TokenCount,
)
from rbee.contracts.states import HiveState
from rbee.contracts.views import ModelList, ModelView
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
from rbee.http.errors import ErrorShape
from rbee.http.routes import Endpoint, Route, read_body
from rbee.narration.emit import compose
from rbee.queen.api_calls import read_api_call
from rbee.queen.call_ways import is_kept, is_narrated
from rbee.queen.model_list import find_model, list_models
from rbee.queen.parameters import Change
from rbee.queen.service import QueenService

_SUMMARIES: dict[type[ApiCall], str] = {
    ChatCompletion: "An answer to a conversation, as OpenAI's API has it; streamed when `stream` is true.",
    Completion: "A text that goes on from a prompt, as OpenAI's API has it; streamed when `stream` is true.",
    ResponseCall: "An answer, as OpenAI's Responses API has it; streamed when `stream` is true.",
    MessagesCall: "An answer to a conversation, as Anthropic's API has it; streamed when `stream` is true.",
    TokenCount: "How many tokens a conversation has, as Anthropic's API counts them.",
    Embedding: "Texts as vectors, as OpenAI's API has it.",
    Rerank: "Documents by how well they fit a query.",
}
_ERRORS = (
    InvalidRequestError,
    ModelNotFoundError,
    PayloadTooLargeError,
    UnsupportedMediaTypeError,
    OverloadedError,
    WorkerError,
    NoCapacityError,
    DeadlineExceededError,
)


class ApiRoutes:
    """Answers the clients of OpenAI and Anthropic."""

    def __init__(self, service: QueenService) -> None:
        self._service = service

    def table(self) -> list[Route]:
        """Return the rows."""
        return [*(self._row(kind) for kind in API_CALLS), *self._models()]

    def _row(self, kind: type[AnyApiCall]) -> Route:
        shape: ErrorShape = "anthropic" if kind in (MessagesCall, TokenCount) else "openai"
        return Route(
            method="POST",
            path=kind.path,
            endpoint=self._endpoint(kind),
            summary=_SUMMARIES[kind],
            result=dict[str, Any],
            errors=_ERRORS,
            error_shape=shape,
        )

    def _models(self) -> list[Route]:
        return [
            Route(
                method="GET",
                path="/v1/models",
                endpoint=self.models,
                summary="The models that can be asked for.",
                result=ModelList,
            ),
            Route(
                method="GET",
                path="/v1/models/{model:path}",
                endpoint=self.model,
                summary="One model.",
                result=ModelView,
                errors=(ModelNotFoundError,),
            ),
        ]

    def _endpoint(self, kind: type[AnyApiCall]) -> Endpoint:
        async def call(request: Request) -> Response:
            return await self._call(kind, request)

        return call

    async def _call(self, kind: type[AnyApiCall], request: Request) -> Response:
        """Accept a call as a job and answer it: relayed, or kept where that is asked for."""
        service = self._service
        read = read_api_call(kind, await read_body(request), service.models, service.settings.model)
        is_to_be_kept, is_told = is_kept(kind, read.body, request.headers), is_narrated(request.headers)
        operation = read.operation
        if is_to_be_kept:
            operation = msgspec.structs.replace(operation, request=read.body)
        about: dict[str, Any] = {
            "correlation_id": request.state.correlation_id,
            "is_correlation_id_replaced": request.state.is_correlation_id_replaced,
            "principal": request.state.principal,
            "say": lambda: said_of(read.change, service.models.resolve(operation.model or "")),
        }
        if is_to_be_kept:
            record = await service.accept(operation, **about)
            service.launch(record, operation)
            return service.kept_calls.response(record, operation, is_narrated=is_told)
        body = msgspec.json.encode(read.body)
        record, made = service.accept_soon(operation, **about)
        return service.relay.response(record, operation, kind.path, body, made=made, is_narrated=is_told)

    async def models(self, request: Request) -> ModelList:
        """List the models that can be asked for: those of hives, those known by name, and aliases."""
        data = list_models(*self._there(), self._service.models)
        return ModelList(
            object="list",
            data=data,
            has_more=False,
            first_id=data[0].id if data else None,
            last_id=data[-1].id if data else None,
        )

    async def model(self, request: Request) -> ModelView:
        """Show one model."""
        return find_model(request.path_params["model"], *self._there(), self._service.models)

    def _there(self) -> tuple[list[Heartbeat], list[WorkerInfo]]:
        """Return the last heartbeats of the hives that are not lost, and their workers."""
        book = self._service.book
        beats = [hive.heartbeat for hive in book.hives() if book.state_of(hive) is not HiveState.LOST]
        return beats, [worker.info for worker in book.workers()]


def said_of(change: Change, model: str) -> list[bytes]:
    """Compose what a model's settings changed of a request: names, no values."""
    sentence = change.sentence(model)
    if not sentence:
        return []
    names = {"filled": change.filled, "forced": change.forced, "stripped": change.stripped}
    return [compose("queen_parameters", sentence, level="info", attempt=None, **names)]
