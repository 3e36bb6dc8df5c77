"""What each form of chunk adds to the answer."""

from __future__ import annotations

from typing import Any

import pytest

from rbee.contracts.dialects import DIALECTS, Delta


@pytest.mark.parametrize(
    ("path", "chunk", "expected"),
    [
        ("/v1/chat/completions", {"choices": [{"delta": {"content": "a"}}]}, Delta("a")),
        ("/v1/chat/completions", {"choices": [{"delta": {"reasoning_content": "a"}}]}, Delta("a", "reasoning")),
        ("/v1/chat/completions", {"choices": [{"delta": {"role": "assistant", "content": None}}]}, Delta()),
        ("/v1/chat/completions", {"choices": [{"delta": {"tool_calls": []}}]}, Delta()),
        ("/v1/chat/completions", {"choices": []}, Delta()),
        ("/v1/chat/completions", {}, Delta()),
        ("/v1/completions", {"choices": [{"text": "a"}]}, Delta("a")),
        ("/v1/completions", {"choices": [{"text": ""}]}, Delta()),
        ("/v1/responses", {"type": "response.output_text.delta", "delta": "a"}, Delta("a")),
        ("/v1/responses", {"type": "response.reasoning_text.delta", "delta": "a"}, Delta("a", "reasoning")),
        ("/v1/responses", {"type": "response.function_call_arguments.delta", "delta": "a"}, Delta()),
        ("/v1/responses", {"type": "response.output_text.done", "text": "a"}, Delta()),
        ("/v1/messages", {"type": "content_block_delta", "delta": {"text": "a"}}, Delta("a")),
        ("/v1/messages", {"type": "content_block_delta", "delta": {"thinking": "a"}}, Delta("a", "reasoning")),
        ("/v1/messages", {"type": "message_delta", "delta": {"stop_reason": "end_turn"}}, Delta()),
    ],
)
def test_chunk_adds_its_text_to_its_channel(path: str, chunk: dict[str, Any], expected: Delta) -> None:
    """Answer, reasoning, or nothing."""
    assert DIALECTS[path].delta(chunk) == expected
