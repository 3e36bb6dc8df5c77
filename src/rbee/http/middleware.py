"""What every request passes before its route: correlation id, guards, and errors turned into answers."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee.contracts.ids import is_correlation_id, new_correlation_id
from rbee.errors import AuthenticationError, RbeeError
from rbee.http.auth import Door
from rbee.http.errors import ErrorShape, error_response, errors_shaped, translate_http_exception
from rbee.jobs.endings import incident
from rbee.narration import scope as narration_scope

LIVENESS_PATHS = frozenset({"/livez", "/health"})


class GuardMiddleware:
    """Checks host, origin and credential, gives each request its ids, and answers errors.

    Args:
        app: What answers.
        door: Who may come in.
        anthropic_paths: The paths that Anthropic's clients ask, and whose errors are shaped for them.
    """

    def __init__(self, app: ASGIApp, door: Door, anthropic_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.door = door
        self._anthropic_paths = anthropic_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        correlation_id, is_replaced = _correlation_id(headers)
        state = scope.setdefault("state", {})
        state["correlation_id"] = correlation_id
        state["is_correlation_id_replaced"] = is_replaced
        shape: ErrorShape = "anthropic" if scope["path"] in self._anthropic_paths else "openai"
        is_started = False

        async def send_with_ids(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                _put_ids(MutableHeaders(scope=message), correlation_id, shape)
            await send(message)

        with narration_scope(correlation_id=correlation_id), errors_shaped(shape):
            try:
                self._guard(scope, headers)
                await self.app(scope, receive, send_with_ids)
            except ClientDisconnect:
                return  # nobody is left to be answered
            except Exception as error:  # the one border where errors become answers
                if is_started:
                    raise
                translated = _translated(error, scope["path"])
                await error_response(translated)(scope, receive, send_with_ids)

    def _guard(self, scope: Scope, headers: Headers) -> None:
        self.door.check_host(headers.get("host"))
        self.door.check_origin(headers.get("origin"), headers.get("host"))
        if scope["path"] not in LIVENESS_PATHS:
            scope["state"]["principal"] = _principal(self.door, headers)


def _put_ids(headers: MutableHeaders, correlation_id: str, shape: ErrorShape) -> None:
    """Name the request: by its job where it has one, else by its correlation id."""
    headers["x-correlation-id"] = correlation_id
    headers.setdefault("x-request-id", correlation_id)
    if shape == "anthropic":
        headers["request-id"] = headers["x-request-id"]  # the name that Anthropic's clients look for


def _principal(door: Door, headers: Headers) -> str:
    """Return who is calling, by `authorization` or, as Anthropic's clients have it, by `x-api-key`.

    Raises:
        AuthenticationError: A key is asked for, and neither of them is it.
    """
    key = headers.get("x-api-key")
    try:
        return door.principal(headers.get("authorization"))
    except AuthenticationError:
        if key is None:
            raise
        return door.principal(f"Bearer {key}")


def _correlation_id(headers: Headers) -> tuple[str, bool]:
    given = headers.getlist("x-correlation-id")
    if not given:
        return new_correlation_id(), False
    if len(given) == 1 and is_correlation_id(given[0].strip()):
        return given[0].strip(), False
    return new_correlation_id(), True


def _translated(error: Exception, path: str) -> RbeeError:
    if isinstance(error, RbeeError):
        return error
    if isinstance(error, HTTPException):
        return translate_http_exception(error, path)
    return incident(error, path)
