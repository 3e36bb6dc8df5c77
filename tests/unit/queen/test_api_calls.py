"""What the bodies of API calls ask of the queen, and what is left of them for the engine."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.model_settings import ModelSettings, ModelTable
from rbee.contracts.operations import (
    API_CALLS,
    AnyApiCall,
    ChatCompletion,
    Completion,
    Embedding,
    MessagesCall,
    Rerank,
    ResponseCall,
)
from rbee.errors import InvalidRequestError
from rbee.queen.api_calls import Read, read_api_call, read_keep_alive

MODEL = "smollm2:135m"
MESSAGES = [{"role": "user", "content": "a secret"}]


def read(kind: type[AnyApiCall] = ChatCompletion, table: ModelTable | None = None, **body: Any) -> Read:
    """Read a body."""
    return read_api_call(kind, msgspec.json.encode(body), table or ModelTable(), MODEL)


def test_what_is_the_queens_is_taken_out_and_the_rest_goes_to_the_engine() -> None:
    """Deadlines, priority and keep_alive never reach an engine; what nobody knows does."""
    ours: dict[str, Any] = {
        "timeout_s": 5,
        "queue_timeout_s": 4,
        "first_token_timeout_s": 3,
        "idle_timeout_s": 2,
        "priority": -3,
    }
    found = read(messages=MESSAGES, min_p=0.1, temperature=0, keep_alive="5m", **ours)
    assert found.body == {"messages": MESSAGES, "min_p": 0.1, "temperature": 0, "model": MODEL}
    operation = found.operation
    assert isinstance(operation, ChatCompletion)
    assert (operation.timeout_s, operation.queue_timeout_s, operation.priority) == (5, 4, -3)
    assert (operation.first_token_timeout_s, operation.idle_timeout_s, operation.keep_alive) == (3, 2, 300)
    assert operation.parameters == {"min_p": 0.1, "temperature": 0, "model": MODEL}


def test_null_of_ours_is_as_if_it_were_not_there() -> None:
    """Clients send null for what they leave open."""
    found = read(messages=MESSAGES, timeout_s=None, priority=None, keep_alive=None)
    assert (found.operation.timeout_s, found.operation.priority, found.operation.keep_alive) == (None, 0, None)


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (ChatCompletion, {}, "messages"),
        (ChatCompletion, {"messages": []}, "messages"),
        (ChatCompletion, {"messages": "hello"}, "messages"),
        (MessagesCall, {"messages": None}, "messages"),
        (Completion, {"prompt": []}, "prompt"),
        (ResponseCall, {}, "input"),
        (Embedding, {"input": []}, "input"),
        (Rerank, {"query": "a"}, "documents"),
        (Rerank, {"documents": ["a"]}, "query"),
        (ChatCompletion, {"messages": MESSAGES, "model": 7}, "model"),
        (ChatCompletion, {"messages": MESSAGES, "model": ""}, "model"),
        (ChatCompletion, {"messages": MESSAGES, "priority": 11}, "priority"),
        (ChatCompletion, {"messages": MESSAGES, "timeout_s": 0}, "timeout_s"),
        (ChatCompletion, {"messages": MESSAGES, "keep_alive": "soon"}, "keep_alive"),
        (ChatCompletion, {"messages": MESSAGES, "keep_alive": True}, "keep_alive"),
        (ChatCompletion, {"messages": MESSAGES, "keep_alive": "99999h"}, "keep_alive"),
        (ChatCompletion, {"messages": MESSAGES, "keep_alive": 10**400}, "keep_alive"),
    ],
)
def test_body_that_cannot_be_asked_is_refused_by_the_name_of_its_field(
    kind: type[AnyApiCall], body: dict[str, Any], field: str
) -> None:
    """Without a job, and with the field in `param`."""
    with pytest.raises(InvalidRequestError) as refused:
        read(kind, **body)
    assert refused.value.param == field


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff", b'"text"', b"[" * 100_000])
def test_body_that_is_no_object_is_refused(body: bytes) -> None:
    """Whatever it is instead."""
    with pytest.raises(InvalidRequestError):
        read_api_call(ChatCompletion, body, ModelTable(), MODEL)


@pytest.mark.parametrize("kind", API_CALLS)
def test_nothing_that_is_asked_about_is_kept(kind: type[AnyApiCall]) -> None:
    """Of a relayed call the job keeps parameters, and not a word of a prompt."""
    about = ("messages", "prompt", "input", "system", "instructions", "tools", "query", "documents", "suffix")
    body: dict[str, Any] = {name: [{"role": "user", "content": "a secret"}] for name in about}
    found = read(kind, top_k=4, **body)
    assert found.operation.parameters == {"top_k": 4, "model": MODEL}


@pytest.mark.parametrize("value", ["a secret", ["a secret"], {"authorization_token": "a secret"}])
@pytest.mark.parametrize("name", ["mcp_servers", "metadata", "response_format", "stop", "user", "whatever_is_new"])
def test_nothing_in_words_is_kept_of_what_was_asked(name: str, value: Any) -> None:
    """What nobody knows may hold a prompt or a key: of a relayed call, only numbers and switches are kept."""
    options = {"include_usage": True, "note": "a secret"}
    found = read(messages=MESSAGES, stream=True, seed=7, stream_options=options, **{name: value})
    assert found.body[name] == value
    kept = {"stream": True, "seed": 7, "stream_options": {"include_usage": True}, "model": MODEL}
    assert found.operation.parameters == kept


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        *((0, 0.0), (2.5, 2.5), (-1, -1.0), (-300, -1.0), ("0", 0.0), ("90", 90.0), ("-1", -1.0), ("-1m", -1.0)),
        *(("5m", 300.0), ("24h", 86400.0), ("1h30m", 5400.0), ("1.5s", 1.5), ("500ms", 0.5), (" 10s ", 10.0)),
    ],
)
def test_keep_alive_is_seconds_or_a_duration(given_value: Any, seconds: float) -> None:
    """As Ollama's users write it; anything negative is for ever."""
    assert read_keep_alive(given_value) == seconds


@given(
    st.one_of(
        st.text(), st.none(), st.booleans(), st.lists(st.integers()), st.floats(allow_nan=False), st.integers()
    )
)
def test_keep_alive_is_read_or_refused_whatever_it_is(value: Any) -> None:
    """No value brings the reader down; what is no number and no duration is refused."""
    try:
        found = read_keep_alive(value)
    except InvalidRequestError:
        assert not isinstance(value, (int, float)) or isinstance(value, bool)
    else:
        assert max(found, -1.0) == found


def test_settings_of_the_model_behind_an_alias_change_the_call() -> None:
    """The caller's name goes to the worker, to be repeated in its answer; the settings are the model's."""
    settings = ModelSettings(
        defaults={"temperature": 0.2, "top_p": 0.5}, forced={"seed": 7, "timeout_s": 9}, stripped=("logit_bias",)
    )
    table = ModelTable(aliases={"fast": MODEL}, models={MODEL: settings})
    found = read(table=table, model="fast", messages=MESSAGES, temperature=1, seed=3, logit_bias={"1": 2})
    assert found.body == {"model": "fast", "messages": MESSAGES, "temperature": 1, "top_p": 0.5, "seed": 7}
    assert (found.operation.model, found.operation.timeout_s) == ("fast", 9)
    assert found.change.sentence(MODEL) == (
        f"The settings of {MODEL} filled in top_p, forced seed and timeout_s and took out logit_bias."
    )


@pytest.mark.parametrize(
    ("kind", "body", "limit"),
    [
        (ChatCompletion, {"messages": MESSAGES}, {"max_tokens": 64}),
        (ChatCompletion, {"messages": MESSAGES, "max_completion_tokens": 9}, {"max_completion_tokens": 9}),
        (ChatCompletion, {"messages": MESSAGES, "max_tokens": None}, {"max_tokens": 64}),
        (ResponseCall, {"input": "a"}, {"max_output_tokens": 64}),
        (Completion, {"prompt": "a", "n_predict": 3}, {"n_predict": 3}),
    ],
)
def test_limit_of_an_answer_is_one_thing_by_whatever_name(
    kind: type[AnyApiCall], body: dict[str, Any], limit: dict[str, int]
) -> None:
    """A default does not overrule the caller's own limit because the route calls it otherwise."""
    table = ModelTable(models={MODEL: ModelSettings(defaults={"max_tokens": 64})})
    found = read(kind, table, **body)
    assert {name: value for name, value in found.body.items() if "max" in name or name == "n_predict"} == limit
