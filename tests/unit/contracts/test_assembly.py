"""A streamed answer put together is the response that the engine would have sent."""

from __future__ import annotations

from typing import Any

import pytest

from rbee.contracts.assembly import (
    AnthropicAssembler,
    Assembler,
    ChatAssembler,
    CompletionAssembler,
    ResponsesAssembler,
)
from rbee.errors import WorkerError

TIMINGS = {"cache_n": 30, "prompt_n": 2, "predicted_n": 3, "predicted_per_second": 100.0}
ENVELOPE = {"id": "chatcmpl-1", "created": 5, "model": "m", "object": "chat.completion.chunk"}


def assembled(assembler: Assembler, *chunks: dict[str, Any]) -> dict[str, Any]:
    """Put chunks together."""
    for chunk in chunks:
        assembler.add(chunk)
    return assembler.result()


def chat_chunk(delta: dict[str, Any], *, index: int = 0, **more: Any) -> dict[str, Any]:
    """Make a chunk of a chat answer."""
    choice = {"index": index, "delta": delta, "finish_reason": more.pop("finish_reason", None)}
    if "logprobs" in more:
        choice["logprobs"] = more.pop("logprobs")
    return {**ENVELOPE, "choices": [choice], **more}


def test_chat_answer_has_text_and_usage() -> None:
    """The texts are joined, the envelope is kept, usage comes of the timings."""
    answer = assembled(
        ChatAssembler(),
        chat_chunk({"role": "assistant", "content": None}),
        chat_chunk({"content": "Hel"}),
        chat_chunk({"content": "lo"}),
        chat_chunk({}, finish_reason="length", timings=TIMINGS),
    )
    assert answer == {
        "id": "chatcmpl-1",
        "created": 5,
        "model": "m",
        "object": "chat.completion",
        "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "Hello"}}],
        "usage": {
            "prompt_tokens": 32,
            "completion_tokens": 3,
            "total_tokens": 35,
            "prompt_tokens_details": {"cached_tokens": 30},
        },
        "timings": TIMINGS,
    }


def test_chat_reasoning_stays_apart_from_the_answer() -> None:
    """Reasoning has a field of its own."""
    answer = assembled(
        ChatAssembler(),
        chat_chunk({"reasoning_content": "Let me "}),
        chat_chunk({"reasoning_content": "see."}),
        chat_chunk({"content": "4"}, finish_reason="stop"),
    )
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": "4",
        "reasoning_content": "Let me see.",
    }


def test_chat_tool_calls_grow_by_their_arguments() -> None:
    """Two calls whose arguments come in pieces are told apart by their index."""
    answer = assembled(
        ChatAssembler(),
        chat_chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": '{"x"'}}]}),
        chat_chunk({"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}),
        chat_chunk({"tool_calls": [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "{}"}}]}),
        chat_chunk({}, finish_reason="tool_calls"),
    )
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
            {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def test_chat_choices_are_told_apart_by_index() -> None:
    """Several choices come interleaved; the prompt counts once, every answer counts."""
    answer = assembled(
        ChatAssembler(),
        chat_chunk({"content": "B"}, index=1),
        chat_chunk({"content": "A"}, index=0),
        chat_chunk({"content": "b"}, index=1, finish_reason="stop", timings=TIMINGS),
        chat_chunk({"content": "a"}, index=0, finish_reason="stop", timings=TIMINGS),
    )
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["Aa", "Bb"]
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (32, 6)


def test_chat_logprobs_are_joined() -> None:
    """The lists of each chunk become one."""
    answer = assembled(
        ChatAssembler(),
        chat_chunk({"content": "a"}, logprobs={"content": [{"token": "a"}]}),
        chat_chunk({"content": "b"}, logprobs={"content": [{"token": "b"}]}),
    )
    assert answer["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}


def test_completion_answer_has_text() -> None:
    """Plain completions carry their text in the choice itself."""
    answer = assembled(
        CompletionAssembler(),
        {},
        {"id": "1", "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}]},
        {"id": "1", "choices": [{"index": 0, "text": "b", "finish_reason": "stop"}], "timings": TIMINGS},
    )
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "ab", "logprobs": None, "finish_reason": "stop"}]


def test_responses_answer_is_that_of_the_last_event() -> None:
    """The last event repeats everything."""
    answer = assembled(
        ResponsesAssembler(),
        {"type": "response.created", "response": {"status": "in_progress"}},
        {"type": "response.completed", "response": {"status": "completed", "output": []}},
    )
    assert answer == {"status": "completed", "output": []}


def test_anthropic_answer_is_built_of_its_blocks() -> None:
    """Thinking, text and a tool's input each grow in their block; usage is that of both ends."""
    answer = assembled(
        AnthropicAssembler(),
        {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 7, "output_tokens": 0}}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm"}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "."}},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "Yes"}},
        {"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "input": {}}},
        {
            "type": "content_block_delta",
            "index": 2,
            "delta": {"type": "input_json_delta", "partial_json": '{"a":'},
        },
        {"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "1}"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}},
        {"type": "message_stop"},
    )
    assert answer == {
        "id": "m",
        "stop_reason": "end_turn",
        "usage": {"input_tokens": 7, "output_tokens": 4},
        "content": [
            {"type": "thinking", "thinking": "Hm."},
            {"type": "text", "text": "Yes"},
            {"type": "tool_use", "input": {"a": 1}},
        ],
    }


def test_message_whose_start_the_engine_left_out_is_whole_all_the_same() -> None:
    """An answer that begins with half a character: the engine sends no `message_start`."""
    answer = assembled(
        AnthropicAssembler(),
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 5}},
        {"type": "message_stop"},
    )
    assert (answer["type"], answer["role"], answer["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert answer["content"] == [{"type": "text", "text": "Hi"}]
    assert answer["usage"] == {"input_tokens": None, "output_tokens": 5}
    assert answer["id"].startswith("msg_")


@pytest.mark.parametrize("assembler", [ChatAssembler, CompletionAssembler, ResponsesAssembler, AnthropicAssembler])
def test_nothing_at_all_is_no_answer(assembler: type[Assembler]) -> None:
    """An answer without a beginning is refused, not made up."""
    with pytest.raises(WorkerError):
        assembler().result()


def test_choices_beyond_the_bound_are_refused() -> None:
    """An engine that counts up for ever does not fill the memory."""
    with pytest.raises(WorkerError, match="more choices"):
        assembled(ChatAssembler(), *[chat_chunk({"content": "a"}, index=index) for index in range(1000)])


def test_usage_told_for_each_choice_by_itself_is_added() -> None:
    """As servers of llama.cpp do; the prompt counts once, and a usage told on the way is replaced."""
    assembler = ChatAssembler()
    for index in (0, 1):
        assembler.add(
            {"choices": [{"index": index, "delta": {"content": "a"}}], "usage": {"completion_tokens": 1}}
        )
        usage = {"prompt_tokens": 7, "completion_tokens": 3 + index, "total_tokens": 10 + index}
        assembler.add({"choices": [], "usage": usage})
    assert assembler.result()["usage"] == {"prompt_tokens": 7, "completion_tokens": 7, "total_tokens": 14}
