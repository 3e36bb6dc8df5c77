"""Errors in the shapes that OpenAI's and Anthropic's clients read, as answers and as frames of a stream."""

from __future__ import annotations

import asyncio

import aiohttp
import msgspec
import pytest
from starlette.requests import Request

from rbee.errors import (
    AuthenticationError,
    ContextExceededError,
    DeadlineExceededError,
    ForbiddenError,
    InternalError,
    ModelNotFoundError,
    NoCapacityError,
    OverloadedError,
    PayloadTooLargeError,
    QueueTimeoutError,
    RbeeError,
    StalledError,
    WorkerLostError,
)
from rbee.http.auth import Door
from rbee.http.errors import error_frame, error_response, errors_shaped
from rbee.http.routes import Route, build_app
from rbee.http.serve import bind, serving, url_of


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ContextExceededError(), "invalid_request_error"),
        (AuthenticationError(), "authentication_error"),
        (ForbiddenError(), "permission_error"),
        (ModelNotFoundError(), "not_found_error"),
        (PayloadTooLargeError(), "request_too_large"),
        (OverloadedError(), "rate_limit_error"),
        (NoCapacityError(), "overloaded_error"),
        (DeadlineExceededError(), "timeout_error"),
        (WorkerLostError(), "api_error"),
        (InternalError(), "api_error"),
    ],
)
def test_error_has_anthropics_word_and_all_that_is_ours(error: RbeeError, word: str) -> None:
    """Type and request id as that API has them; code, retryable and remedy beside."""
    with errors_shaped("anthropic"):
        answer = msgspec.json.decode(error_response(error, job_id="job-1").body)
    assert (answer["type"], answer["error"]["type"], answer["request_id"]) == ("error", word, "job-1")
    assert answer["error"]["message"] == error.message
    assert (answer["error"]["code"], answer["error"]["retryable"]) == (error.code, error.retryable)
    assert answer["error"]["remedy"] == error.remedy


def test_error_outside_is_shaped_for_openais_clients() -> None:
    """The shape ends with its block."""
    with errors_shaped("anthropic"):
        pass
    answer = msgspec.json.decode(error_response(ModelNotFoundError(param="model"), job_id="job-1").body)
    assert answer["error"]["type"] == "invalid_request_error"
    assert (answer["error"]["code"], answer["error"]["param"]) == ("model_not_found", "model")
    assert "type" not in answer


@pytest.mark.parametrize(
    ("error", "again", "after"),
    [
        (OverloadedError(retry_after_s=1.2), "true", "2"),
        (NoCapacityError(), "true", "1"),
        (WorkerLostError(), "true", None),
        (StalledError(), "true", None),
        (DeadlineExceededError(), "false", None),
        (QueueTimeoutError(), "false", None),
        (ForbiddenError(), "false", None),
    ],
)
def test_answer_says_whether_and_when_to_send_it_again(error: RbeeError, again: str, after: str | None) -> None:
    """In the headers that clients' own retries heed; a deadline of the caller's is not for them to repeat."""
    headers = error_response(error).headers
    assert (headers["x-should-retry"], headers.get("retry-after")) == (again, after)


def test_frame_is_what_each_clients_stream_reader_raises() -> None:
    """OpenAI's looks for `error` in the data, Anthropic's for the event's name."""
    openai = error_frame(WorkerLostError(), job_id="job-1")
    assert openai.startswith(b'data: {"error":{')
    anthropic = error_frame(WorkerLostError(), job_id="job-1", shape="anthropic")
    assert anthropic.startswith(b'event: error\ndata: {"type":"error","error":{')
    with errors_shaped("anthropic"):
        assert error_frame(WorkerLostError(), job_id="job-1") == anthropic
    for frame in (openai, anthropic):
        assert frame.endswith(b"}\n\n")
        assert frame.count(b"\n\n") == 1


async def test_guards_answer_each_path_in_its_shape_and_take_the_key_from_either_header() -> None:
    """Before any route: 401 as each client reads it; `x-api-key` opens as well as `authorization` does."""

    async def whoami(request: Request) -> dict[str, str]:
        return {"principal": request.state.principal}

    rows = [
        Route(method="GET", path="/v1/messages", endpoint=whoami, summary="", error_shape="anthropic"),
        Route(method="GET", path="/v1/models", endpoint=whoami, summary=""),
    ]
    sock = bind("127.0.0.1", 0, is_port_asked_for=True)
    app = build_app(rows, Door(api_key="key"), title="test")
    async with (
        asyncio.timeout(20),
        serving(app, sock, stop_grace_s=1),
        aiohttp.ClientSession(url_of(sock)) as session,
    ):
        async with session.get("/v1/messages") as refused:
            told = await refused.json()
            assert (refused.status, told["error"]["type"]) == (401, "authentication_error")
            assert told["type"] == "error"
            assert refused.headers["request-id"] == refused.headers["x-request-id"] == told["request_id"]
        async with session.get("/v1/models") as refused:
            told = await refused.json()
            assert (refused.status, told["error"]["code"]) == (401, "invalid_api_key")
            assert refused.headers["x-request-id"] == told["correlation_id"]
        wrong, right = {"authorization": "Bearer wrong"}, {"x-api-key": "key"}
        for headers, status in (
            ({"x-api-key": "wrong"}, 401),
            (wrong, 401),
            (right, 200),
            (wrong | right, 200),
        ):
            async with session.get("/v1/messages", headers=headers) as answer:
                assert answer.status == status, headers
