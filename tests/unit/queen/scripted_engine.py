"""What an engine streams as the real one was seen to do it; it always answers with the same words."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec

from tests.unit.queen.queen_stage import token

ANSWER = ("One", " two", " three", " 🙂", " five", " six")
PROMPT_TOKENS = 10
_numbers = itertools.count(1)
DONE = b"data: [DONE]\n\n"


def frames_of(body: dict[str, Any]) -> list[bytes]:
    """Return the frames of a stream: of a chat completion, or of a completion when there is a `prompt`."""
    number = next(_numbers)
    is_chat = "messages" in body
    said = said_in(body)
    limit = body.get("max_tokens") or 1000
    rest = ANSWER[len(said) :][:limit]
    is_whole = len(said) + len(rest) == len(ANSWER) and len(rest) < limit  # its end is a token as well
    reason = "stop" if is_whole else "length"
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


def lines_of(frames: list[bytes], job_id: str, attempt: int = 1) -> list[bytes]:
    """Return the token lines by which a worker narrates a stream of a kept call."""
    lines, tokens = [], 0
    for number, frame in enumerate(frame for frame in frames if frame != DONE):
        chunk = msgspec.json.decode(frame.partition(b"data: ")[2])
        text = _text_of(chunk)
        tokens += bool(text)
        more: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS} if number == 0 and attempt == 1 else {}
        finish = _finish_of(chunk)
        more |= {"finish_reason": finish} if finish else {}
        lines.append(token(job_id, attempt, text, tokens=tokens, chunk=chunk, **more))
    return lines


def _text_of(chunk: dict[str, Any]) -> str:
    choices = chunk.get("choices") or [{}]
    delta = choices[0].get("delta") or chunk.get("delta") or {}
    if isinstance(delta, str):
        return delta
    return str(choices[0].get("text") or delta.get("content") or delta.get("text") or "")


def _finish_of(chunk: dict[str, Any]) -> str | None:
    choices = chunk.get("choices") or [{}]
    finish: str | None = choices[0].get("finish_reason")
    return finish


def response_frames() -> list[bytes]:
    """Return the frames of an answer of the Responses API."""
    begun = {"id": "resp_engine", "object": "response", "status": "in_progress"}
    text = {"type": "output_text", "annotations": [], "text": "".join(ANSWER)}
    item = {"type": "message", "status": "completed", "id": "msg_1", "content": [text], "role": "assistant"}
    usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": len(ANSWER), "total_tokens": 16}
    whole = {**begun, "created_at": 1, "status": "completed", "model": "model", "output": [item], "usage": usage}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        *({"type": "response.output_text.delta", "item_id": "msg_1", "delta": word} for word in ANSWER),
        {"type": "response.completed", "response": whole},
    ]
    return [_typed(event) for event in events]


def message_frames() -> list[bytes]:
    """Return the frames of an answer of Anthropic's API."""
    usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": 0}
    message = {"id": "chatcmpl-1", "type": "message", "role": "assistant", "content": [], "model": "model"}
    events: list[dict[str, Any]] = [
        {"type": "message_start", "message": {**message, "usage": usage}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *(
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
            for word in ANSWER
        ),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": len(ANSWER)}},
        {"type": "message_stop"},
    ]
    return [_typed(event) for event in events]


def _typed(event: dict[str, Any]) -> bytes:
    name: bytes = event["type"].encode()
    return b"event: " + name + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"
