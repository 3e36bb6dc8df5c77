"""What an engine streams as the real one was seen to do it; it always answers with the same words."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

ANSWER = ("One", " two", " three", " 🙂", " five", " six")
PROMPT_TOKENS = 10
_numbers = itertools.count(1)
DONE = b"data: [DONE]\n\n"


def frames_of(body: dict[str, Any]) -> list[bytes]:
    """Return the frames of a stream: of a chat completion, or of a completion when there is a `prompt`."""
    number = next(_numbers)
    is_chat = "messages" in body
    said = said_in(body)
    limit = body.get("max_tokens") or len(ANSWER)
    rest = ANSWER[len(said) :][:limit]
    reason = "stop" if len(said) + len(rest) == len(ANSWER) else "length"
    names = {"created": number, "id": f"chatcmpl-{number}", "model": "model"}
    kind = {"object": "chat.completion.chunk" if is_chat else "text_completion"}
    timings = {"cache_n": 4, "prompt_n": PROMPT_TOKENS + len(said) - 4, "predicted_n": len(rest)}

    def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
        text = {"delta": delta} if is_chat else {"text": delta.get("content") or "", "logprobs": None}
        part = {"index": 0, **text, "finish_reason": finish}
        return b"data: " + msgspec.json.encode({"choices": [part], **names, **kind, **more}) + b"\n\n"

    prompt, completion = PROMPT_TOKENS + len(said), len(rest)
    usage = {"completion_tokens": completion, "prompt_tokens": prompt, "total_tokens": prompt + completion}
    usage_too = {"usage": {**usage, "prompt_tokens_details": {"cached_tokens": 4}}, "timings": timings}
    pieces = [chunk({"content": text}) for text in rest]
    if not is_chat:
        return [*pieces, chunk({}, reason, **usage_too), DONE]
    begin = [chunk({"role": "assistant", "content": None}), *pieces]
    if not (body.get("stream_options") or {}).get("include_usage"):
        return [*begin, chunk({}, reason, timings=timings), DONE]
    last = b"data: " + msgspec.json.encode({"choices": [], **names, **kind, **usage_too}) + b"\n\n"
    return [*begin, chunk({}, reason), last, DONE]


def said_in(body: dict[str, Any]) -> tuple[str, ...]:
    """Return which words the request begins the answer with."""
    text = body["prompt"].partition("> ")[2] if "prompt" in body else ""
    last = body["messages"][-1] if "messages" in body else {}
    if last.get("role") == "assistant":
        text = last["content"]
    found: list[str] = []
    while text:
        word = ANSWER[len(found)]
        assert text.startswith(word), f"no beginning of the answer: {text}"
        found.append(word)
        text = text.removeprefix(word)
    return tuple(found)
