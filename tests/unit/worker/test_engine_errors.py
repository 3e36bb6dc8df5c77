"""An engine's errors in the house's words."""

from __future__ import annotations

import msgspec
import pytest

from rbee.errors import (
    ContextExceededError,
    InvalidRequestError,
    NotFoundError,
    RbeeError,
    UnavailableError,
    WorkerError,
)
from rbee.worker.engine_errors import narrated_message, no_route, translate


def engine_answer(status: int, kind: str, message: str, **more: object) -> bytes:
    """Make an error as llama.cpp answers it."""
    return msgspec.json.encode({"error": {"code": status, "message": message, "type": kind, **more}})


def test_prompt_too_long_names_both_numbers() -> None:
    """How long it was, and how long it may be."""
    body = engine_answer(400, "exceed_context_size_error", "request …", n_prompt_tokens=5031, n_ctx=2048)
    error = translate(400, body)
    assert type(error) is ContextExceededError
    assert (error.status, error.code, error.type) == (400, "context_length_exceeded", "invalid_request_error")
    assert error.message == "The prompt has 5031 tokens; the context holds 2048."


def test_embedding_input_too_long_names_both_numbers() -> None:
    """The engine calls it a failure of its own; it is the caller's."""
    said = (
        "input (1001 tokens) is too large to process. increase the physical batch size (current batch size: 512)"
    )
    error = translate(500, engine_answer(500, "server_error", said))
    assert type(error) is ContextExceededError
    assert error.message == "The prompt has 1001 tokens; the context holds 512."


@pytest.mark.parametrize(
    ("status", "kind", "expected"),
    [
        (400, "invalid_request_error", InvalidRequestError),
        (404, "not_found_error", InvalidRequestError),
        (501, "not_supported_error", InvalidRequestError),
        (503, "unavailable_error", UnavailableError),
        (500, "server_error", WorkerError),
        (401, "authentication_error", WorkerError),
    ],
)
def test_error_becomes_the_class_for_its_kind(status: int, kind: str, expected: type[RbeeError]) -> None:
    """What the caller can mend is a 4xx; our own key being refused is not."""
    assert type(translate(status, engine_answer(status, kind, "no"))) is expected


def test_loading_engine_says_when_to_come_back() -> None:
    """A 503 carries Retry-After."""
    assert translate(503, engine_answer(503, "unavailable_error", "Loading model")).retry_after_s == 1.0


def test_picture_that_a_model_cannot_see_is_the_callers_error() -> None:
    """The engine calls it a failure of its own, which clients would send again."""
    said = "image input is not supported - hint: if this is unexpected, you may need to provide the mmproj"
    error = translate(500, engine_answer(500, "server_error", said))
    assert (type(error), error.retryable) == (InvalidRequestError, False)
    assert error.message == "This model takes no image."


def test_missing_purpose_is_named() -> None:
    """The engine's advice names switches nobody has here."""
    said = "This server does not support embeddings. Start it with `--embeddings`"
    assert translate(501, engine_answer(501, "not_supported_error", said)).message == (
        "This worker was not started for embeddings."
    )


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"error":""}', b"\xff", b"a" * 2000, b"a\x1b[31mb"])
def test_answer_of_no_known_form_is_a_failure(body: bytes) -> None:
    """Nothing is taken for granted about what an engine sends."""
    error = translate(500, body)
    assert type(error) is WorkerError
    assert error.message == "The engine answered with status 500 and no reason."


def test_narrated_message_has_nothing_the_engine_quoted() -> None:
    """The caller reads the whole sentence; narration must not repeat a prompt."""
    said = "parse error at column 9: syntax error; last read: '\"the secret plan'; expected end of input"
    error = translate(400, engine_answer(400, "invalid_request_error", said))
    assert error.message == said
    assert narrated_message(error, {}) == "parse error at column 9: syntax error; …"
    said = "Unknown word 'a long piece of somebody\"s prompt here'"
    error = translate(400, engine_answer(400, "invalid_request_error", said))
    assert narrated_message(error, {}) == "Unknown word …"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error":"no such word"}', "no such word"),
        (b'{"detail":"no such word"}', "no such word"),
        (b'{"object":"error","message":"no such word","code":400}', "no such word"),
        (b"no such word\n", "no such word"),
        (
            b'{"detail":[{"loc":["body","messages"],"msg":"Field required","input":{"prompt":"canary"}}]}',
            "body.messages: Field required",
        ),
    ],
)
def test_errors_of_other_servers_are_read(body: bytes, said: str) -> None:
    """Each has a form of its own; what was given in the wrong field is never repeated."""
    error = translate(400, body)
    assert type(error) is InvalidRequestError
    assert error.message == said


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b'{"detail":"Not Found"}',
        b"404 page not found\n",
        b'{"error":{"message":"File Not Found"}}',
        b"<html>",
    ],
)
def test_route_that_an_engine_lacks_is_told_so(body: bytes) -> None:
    """The engine is named, and the route."""
    error = no_route(404, body, "/v1/responses", "cook")
    assert type(error) is NotFoundError
    assert error.message == "The engine cook does not offer /v1/responses."


def test_404_for_another_reason_keeps_it() -> None:
    """The route is there, the model is not."""
    body = engine_answer(404, "NotFoundError", "The model `a` does not exist.")
    error = no_route(404, body, "/v1/chat/completions", "cook")
    assert type(error) is InvalidRequestError
    assert error.message == "The model `a` does not exist."


def test_template_that_refuses_is_named_and_quotes_nothing_in_narration() -> None:
    """Its own words may repeat a message."""
    said = (
        "Unable to generate parser for this template. Automatic parser generation failed: \n---\n"
        "While executing CallExpression at line 1\nError: Jinja Exception: Only two messages, not canary"
    )
    error = translate(400, engine_answer(400, "invalid_request_error", said))
    assert type(error) is InvalidRequestError
    sentence = "The model's chat template does not take these messages"
    assert error.message == f"{sentence}: Only two messages, not canary"
    assert narrated_message(error, {}) == f"{sentence}."
