"""What engines say otherwise than the clients' own libraries take it, put right."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rbee.worker.mending import Mender, prepare, unheeded

OWN = "smollm2:135m"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
DONE = b"data: [DONE]\n\n"


def frame(chunk: Any, event: str = "") -> bytes:
    """Return a frame as engines send it."""
    return (f"event: {event}\n" if event else "").encode() + b"data: " + msgspec.json.encode(chunk) + b"\n\n"


def data(whole: bytes) -> list[Any]:
    """Return what some frames hold."""
    lines = [line.removeprefix(b"data: ") for line in whole.splitlines() if line.startswith(b"data: ")]
    return [msgspec.json.decode(line) for line in lines if line != b"[DONE]"]


def test_request_that_needs_nothing_goes_on_as_it_is() -> None:
    """The very same object, so that its body goes on byte for byte."""
    asked = {"model": OWN, "messages": [], "response_format": {"type": "json_object"}}
    for path in (CHAT, COMPLETIONS, RESPONSES, "/v1/messages", "/v1/embeddings"):
        assert prepare(path, asked, OWN) is asked
    unnamed = {"input": "a", "text": {"format": {"type": "text"}}}
    assert prepare(RESPONSES, unnamed, OWN) is unnamed


def test_engine_is_asked_by_its_own_name_of_the_model() -> None:
    """Whatever alias the caller used."""
    assert prepare(CHAT, {"model": "fast", "n": 1}, OWN) == {"model": OWN, "n": 1}


def test_schema_of_the_responses_api_is_said_as_the_engine_heeds_it() -> None:
    """`text.format` becomes `response_format`; one that is there already stands."""
    text = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    assert prepare(RESPONSES, {"text": text}, OWN) == {"text": text, "response_format": wanted}
    plain = {"text": {"format": {"type": "json_object"}}}
    assert prepare(RESPONSES, plain, OWN)["response_format"] == {"type": "json_object"}
    both = {"text": text, "response_format": {"type": "json_object"}}
    assert prepare(RESPONSES, both, OWN) is both


@pytest.mark.parametrize(
    ("path", "asked", "param"),
    [
        (
            "/v1/messages",
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            "output_config",
        ),
        (COMPLETIONS, {"echo": True}, "echo"),
        (COMPLETIONS, {"suffix": "the end"}, "suffix"),
        (COMPLETIONS, {"best_of": 2}, "best_of"),
    ],
)
def test_what_would_not_be_heeded_is_refused(path: str, asked: dict[str, Any], param: str) -> None:
    """An answer that only looks as if it were what was asked for helps nobody."""
    refusal = unheeded(path, asked)
    assert refusal is not None
    assert refusal.param == param


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/messages", {"output_config": {"effort": "low"}}),
        (COMPLETIONS, {"echo": False, "suffix": None, "best_of": 1}),
        (CHAT, {"echo": True}),
    ],
)
def test_what_asks_for_nothing_of_that_is_not_refused(path: str, asked: dict[str, Any]) -> None:
    """What is the same without it, and what is no business of ours."""
    assert unheeded(path, asked) is None


@pytest.mark.parametrize("colon", [b":", b": "])
def test_answer_repeats_the_name_that_was_asked_with(colon: bytes) -> None:
    """In frames, whole answers and plain JSON; but not in what the answer says."""
    mender = Mender(CHAT, {"model": "my/fast:one"}, OWN)
    text = msgspec.json.encode(f'"model":"{OWN}"')
    chunk = b'data: {"text":' + text + b',"model"' + colon + b'"smollm2:135m"}\n\n'
    assert mender.frames(chunk) == b'data: {"text":' + text + b',"model":"my/fast:one"}\n\n'
    assert mender.named(b'{"model"' + colon + b'"smollm2:135m"}') == b'{"model":"my/fast:one"}'
    assert mender.whole({"model": OWN, "id": 1}) == {"model": "my/fast:one", "id": 1}
    inner = {"type": "message_start", "message": {"model": OWN}}
    assert mender.chunk(inner) == {"type": "message_start", "message": {"model": "my/fast:one"}}


def test_answer_by_the_models_own_name_is_passed_on_byte_for_byte() -> None:
    """The common case costs nothing."""
    frames = frame({"choices": [], "usage": {}, "model": OWN}) + DONE
    for asked in ({"model": OWN}, {}, {"n": 1}):
        assert Mender(CHAT, asked, OWN).frames(frames) is frames


def test_null_chunk_of_a_completion_is_left_out() -> None:
    """Clients would hand it on as a completion that is None."""
    whole = b"data: null\n\n" + frame({"choices": [{"text": "a"}]}) + DONE
    assert Mender(COMPLETIONS, {}, OWN).frames(whole) == frame({"choices": [{"text": "a"}]}) + DONE


def test_usage_of_several_choices_is_told_once_and_last() -> None:
    """The prompt once, the tokens of every choice; the engine tells each choice's own, some in mid-stream."""
    usage = {"completion_tokens": 3, "prompt_tokens": 31, "total_tokens": 34}
    word = {"choices": [{"index": 0, "delta": {"content": '"usage"'}}]}
    parts = [
        frame(word) + frame({"choices": [], "usage": usage}),
        frame(word),
        frame({"choices": [], "usage": {**usage, "completion_tokens": 4}}) + DONE,
    ]
    mender = Mender(CHAT, {"n": 2}, OWN)
    mended = [mender.frames(part) for part in parts]
    assert mended[0] == mended[1] == frame(word)
    assert data(mended[2]) == [
        {"choices": [], "usage": {"completion_tokens": 7, "prompt_tokens": 31, "total_tokens": 38}}
    ]
    assert mended[2].endswith(DONE)
    assert Mender(CHAT, {"n": 2}, OWN).frames(frame(word) + DONE) == frame(word) + DONE


def test_events_of_a_response_are_numbered_with_their_items_and_parts() -> None:
    """As far as the engine left it out: a sequence number, and where in the response each event belongs."""
    said: list[dict[str, Any]] = [
        {"type": "response.created", "response": {"id": "r"}},
        {"type": "response.output_item.added", "item": {"id": "rs", "type": "reasoning"}},
        {"type": "response.reasoning_text.delta", "item_id": "rs", "delta": "h"},
        {"type": "response.output_item.done", "item": {"id": "rs"}},
        {"type": "response.output_item.added", "item": {"id": "m", "type": "message"}},
        {"type": "response.content_part.added", "item_id": "m", "part": {}},
        {"type": "response.output_text.delta", "item_id": "m", "delta": "a"},
        {"type": "response.output_item.added", "item": {"call_id": "fc", "type": "function_call"}},
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "delta": "{"},
        {"type": "response.completed", "response": {"id": "r", "output": [{"id": "m"}]}},
    ]
    whole = b"".join(frame(one, one["type"]) for one in said)
    mended = data(Mender(RESPONSES, {}, OWN).frames(whole))
    assert [one["sequence_number"] for one in mended] == list(range(len(said)))
    assert [one.get("output_index") for one in mended] == [None, 0, 0, 0, 1, 1, 1, 2, 2, None]
    assert [one.get("content_index") for one in mended] == [None, None, 0, None, None, 0, 0, None, None, None]
    assert mended[0]["response"] == {"output": [], "id": "r"}
    assert mended[-1]["response"] == said[-1]["response"]
    kept = Mender(RESPONSES, {}, OWN)
    assert [kept.chunk(one) for one in said] == mended


def test_events_that_an_engine_numbers_itself_stay_as_they_are() -> None:
    """What the engine says goes before what we would add."""
    said = {
        "type": "response.output_text.delta",
        "sequence_number": 40,
        "item_id": "m",
        "output_index": 3,
        "content_index": 2,
    }
    assert data(Mender(RESPONSES, {}, OWN).frames(frame(said, "response.output_text.delta"))) == [said]


def test_stop_sequence_is_the_reason_where_one_ended_the_message() -> None:
    """The engine names it, and calls it the end of a turn all the same; other endings stay."""
    wrong = {"stop_reason": "end_turn", "stop_sequence": "e"}
    right = {**wrong, "stop_reason": "stop_sequence"}
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    mender = Mender("/v1/messages", {}, OWN)
    stop = frame({"type": "message_stop"}, "message_stop")
    said = frame({"type": "message_delta", "delta": wrong, "usage": {}}, "message_delta") + stop
    assert mender.frames(said) == (
        frame({"type": "message_delta", "delta": right, "usage": {}}, "message_delta") + stop
    )
    assert mender.whole({"type": "message", **wrong}) == {"type": "message", **right}
    assert mender.chunk({"type": "message_delta", "delta": wrong}) == {"type": "message_delta", "delta": right}
    untouched = frame({"type": "message_delta", "delta": ended}, "message_delta") + stop
    assert mender.frames(untouched) is untouched
    assert mender.whole({"type": "message", **ended}) == {"type": "message", **ended}


def test_logprobs_of_a_completion_are_lists_as_that_api_has_them() -> None:
    """In the stream with offsets that go on, in a whole answer, and in what is kept; nothing else is touched."""

    def choice(*tokens: str) -> dict[str, Any]:
        told = [
            {"token": one, "logprob": -0.5, "top_logprobs": [{"token": "x", "logprob": -0.1}]} for one in tokens
        ]
        return {"choices": [{"index": 0, "text": "".join(tokens), "logprobs": {"content": told}}]}

    def lists(offset: int, *tokens: str) -> dict[str, Any]:
        return {
            "tokens": list(tokens),
            "token_logprobs": [-0.5] * len(tokens),
            "top_logprobs": [{"x": -0.1}] * len(tokens),
            "text_offset": [offset + sum(map(len, tokens[:number])) for number in range(len(tokens))],
        }

    mender = Mender(COMPLETIONS, {}, OWN)
    streamed = data(mender.frames(frame(choice("One"))) + mender.frames(frame(choice(" two", "!"))))
    assert [chunk["choices"][0]["logprobs"] for chunk in streamed] == [lists(0, "One"), lists(3, " two", "!")]
    whole = Mender(COMPLETIONS, {}, OWN).whole(choice("One", " two"))
    assert whole["choices"][0]["logprobs"] == lists(0, "One", " two")
    for plain in ({"choices": [{"text": "a", "logprobs": None}]}, {"choices": [{"logprobs": lists(0, "a")}]}):
        assert Mender(COMPLETIONS, {}, OWN).chunk(plain) is plain


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, "/v1/messages"])
def test_what_is_no_chunk_is_passed_on(path: str) -> None:
    """It is for the reader of the stream to say what it is worth."""
    junk = b'data: {"logprobs":{ "stop_sequence":" "usage"\n\n' + b"data: [1]\n\n"
    assert Mender(path, {"n": 2}, OWN).frames(junk) == junk


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_all_chunks_of_an_answer_have_the_time_of_its_first(path: str) -> None:
    """Streamed or kept; what the answer's own text says stays, and frames that are alike go on byte for byte."""
    told = [{"created": 1000 + second, "text": '"created":1007'} for second in (0, 0, 1, 2)]
    streamed, kept = Mender(path, {}, OWN), Mender(path, {}, OWN)
    first = frame(told[0])
    assert streamed.frames(first) is first
    assert data(streamed.frames(frame(told[1]) + frame(told[2])) + streamed.frames(frame(told[3]) + DONE)) == [
        {**chunk, "created": 1000} for chunk in told[1:]
    ]
    assert [kept.chunk(chunk) for chunk in told] == [{**chunk, "created": 1000} for chunk in told]
