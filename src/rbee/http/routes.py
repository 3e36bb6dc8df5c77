"""Routes as a table of data, from which both the application and `/openapi.json` are made."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router
from starlette.types import ASGIApp, Receive, Scope, Send

from rbee import __version__
from rbee.contracts.events import encode_json
from rbee.contracts.operations import MAX_BODY_BYTES
from rbee.contracts.views import AnthropicErrorAnswer, ErrorAnswer
from rbee.errors import (
    InvalidRequestError,
    MethodNotAllowedError,
    NotFoundError,
    PayloadTooLargeError,
    RbeeError,
    UnsupportedMediaTypeError,
)
from rbee.http.auth import Door
from rbee.http.errors import ErrorShape
from rbee.http.middleware import GuardMiddleware

_CONVERTOR = re.compile(r":[a-z]+(?=})")  # of a path such as `/workers/{worker_id}/{rest:path}`

_ERROR_ANSWERS: dict[ErrorShape, type[Struct]] = {"openai": ErrorAnswer, "anthropic": AnthropicErrorAnswer}

Endpoint = Callable[[Request], Awaitable[Any]]


class Route(Struct, frozen=True, kw_only=True):
    """One row of the table.

    Attributes:
        endpoint: Answers with a contract value (sent as JSON with `status`) or a whole `Response`.
        body: The type of the JSON body, where there is one; bodies of other routes are not looked at.
        result: The type of the answer, for `/openapi.json`.
        media: What the answer is.
        errors: What can go wrong besides 401, 403 and 500.
        error_shape: Whose clients ask here, and so how errors look.
    """

    method: str
    path: str
    endpoint: Endpoint
    summary: str
    body: Any = None
    result: Any = None
    status: int = 200
    media: str = "application/json"
    errors: tuple[type[RbeeError], ...] = ()
    error_shape: ErrorShape = "openai"


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Answer with a contract value as JSON."""
    return Response(encode_json(value), status_code=status, headers=headers, media_type="application/json")


async def read_body(request: Request, limit: int = MAX_BODY_BYTES) -> bytes:
    """Read a JSON body of at most `limit` bytes.

    Raises:
        UnsupportedMediaTypeError: It does not say that it is JSON.
        PayloadTooLargeError: It is larger.
    """
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":
        raise UnsupportedMediaTypeError()
    return await read_bytes(request, limit)


async def read_bytes(request: Request, limit: int) -> bytes:
    """Read a body of any kind, of at most `limit` bytes."""
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and len(announced) < 20 and int(announced) > limit:
        raise PayloadTooLargeError(f"The body has {announced} bytes; {limit} are taken.")
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise PayloadTooLargeError(f"The body has more than the {limit} bytes that are taken.")
        parts.append(part)
    return b"".join(parts)


def query_int(request: Request, name: str, default: int, *, low: int, high: int) -> int:
    """Read a whole number off the query.

    Raises:
        InvalidRequestError: It is none, or out of range.
    """
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 12 or not low <= int(text) <= high:
        raise InvalidRequestError(f"`{name}` must be a whole number from {low} to {high}.", param=name)
    return int(text)


def build_app(routes: Sequence[Route], door: Door, *, title: str) -> ASGIApp:
    """Make the application of a table of routes, with its guards and its `/openapi.json`."""

    async def describe(request: Request) -> Response:
        return Response(described, media_type="application/json")

    table = [*routes, Route(method="GET", path="/openapi.json", endpoint=describe, summary="This description.")]
    described = encode_json(openapi(table, title))
    by_path: dict[str, dict[str, Route]] = {}
    for row in table:
        by_path.setdefault(row.path, {})[row.method] = row
    router = Router(
        [StarletteRoute(path, _Address(rows)) for path, rows in by_path.items()],
        redirect_slashes=False,
        default=_nothing_here,
    )
    return GuardMiddleware(router, door, frozenset(row.path for row in table if row.error_shape == "anthropic"))


class _Address:
    """Answers at one path: by the row of the request's method."""

    def __init__(self, rows: dict[str, Route]) -> None:
        self._rows = {"HEAD": rows["GET"], **rows} if "GET" in rows else rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request; what is raised is answered by the guard around the application."""
        row = self._rows.get(scope["method"])
        if row is None:
            raise MethodNotAllowedError(details={"allow": ", ".join(sorted(self._rows))})
        value = await row.endpoint(Request(scope, receive, send))
        response = value if isinstance(value, Response) else json_response(value, row.status)
        await response(scope, receive, send)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise NotFoundError(
        f"There is nothing at {scope['path'][:200]}.", remedy="See /openapi.json for what there is."
    )


def openapi(routes: Sequence[Route], title: str) -> dict[str, Any]:
    """Describe a table of routes (OpenAPI 3.1)."""
    types = [kind for row in routes for kind in (row.body, row.result) if kind is not None]
    schemas, components = msgspec.json.schema_components(
        [*types, *_ERROR_ANSWERS.values()], ref_template="#/components/schemas/{name}"
    )
    by_type = list(zip([*types, *_ERROR_ANSWERS.values()], schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for row in routes:
        paths.setdefault(_CONVERTOR.sub("", row.path), {})[row.method.lower()] = _described(row, by_type)
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],
    }


def _described(row: Route, by_type: list[tuple[Any, Any]]) -> dict[str, Any]:
    def schema(kind: Any) -> Any:
        return next(found for known, found in by_type if known is kind or known == kind)

    content = {row.media: {"schema": schema(row.result)} if row.result is not None else {}}
    responses: dict[str, Any] = {str(row.status): {"description": row.summary, "content": content}}
    for error in row.errors:
        responses[str(error.status)] = {
            "description": HTTPStatus(error.status).phrase,
            "content": {"application/json": {"schema": schema(_ERROR_ANSWERS[row.error_shape])}},
        }
    described: dict[str, Any] = {"summary": row.summary, "responses": responses}
    names = [part[1:-1].partition(":")[0] for part in row.path.split("/") if part.startswith("{")]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if row.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schema(row.body)}},
        }
    return described
