"""What every request passes before its route: correlation id, guards, and errors turned into answers."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbee.contracts.ids import is_correlation_id, new_correlation_id
from rbee.errors import RbeeError
from rbee.http.auth import Door
from rbee.http.errors import error_response, translate_http_exception
from rbee.jobs.endings import incident
from rbee.narration import scope as narration_scope

LIVENESS_PATHS = frozenset({"/livez", "/health"})


class GuardMiddleware:
    """Checks host, origin and credential, gives each request its correlation id, and answers errors."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

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
        is_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                MutableHeaders(scope=message)["x-correlation-id"] = correlation_id
            await send(message)

        with narration_scope(correlation_id=correlation_id):
            try:
                self._guard(scope, headers)
                await self.app(scope, receive, send_with_id)
            except ClientDisconnect:
                return  # nobody is left to be answered
            except Exception as error:  # the one border where errors become answers
                if is_started:
                    raise
                translated = _translated(error, scope["path"])
                await error_response(translated)(scope, receive, send_with_id)

    def _guard(self, scope: Scope, headers: Headers) -> None:
        self.door.check_host(headers.get("host"))
        self.door.check_origin(headers.get("origin"), headers.get("host"))
        if scope["path"] not in LIVENESS_PATHS:
            scope["state"]["principal"] = self.door.principal(headers.get("authorization"))


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
