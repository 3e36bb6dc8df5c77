"""The body of `POST /v1/jobs`: what is taken, and what the refusal says."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from rbee.contracts.events import encode_json
from rbee.contracts.operations import (
    SUBMITTABLE,
    AnyOperation,
    ChatCompletion,
    HiveCheck,
    Infer,
    Message,
    ModelDelete,
    ModelDownload,
    QueenCheck,
    WorkerSpawn,
    WorkerStop,
    operation_name,
    parse_operation,
)
from rbee.errors import InvalidRequestError


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse_operation(body)
    return caught.value


@pytest.mark.parametrize(
    "operation",
    [
        Infer(prompt="Why?", max_tokens=5, stop=["\n"], labels={"a": "b"}, timeout_s=1.5, store=False),
        Infer(messages=[Message(role="user", content="é")], temperature=0, seed=2**32 - 1),
        WorkerSpawn(model="smollm2:135m", slots=2),
        WorkerStop(worker_id="worker-1", drain_s=0),
        ModelDownload(model="smollm2:135m"),
        ModelDelete(model="smollm2:135m", hive_id="hive-1"),
        QueenCheck(lines=0),
        HiveCheck(parent_job_id="job-1"),
    ],
)
def test_operation_comes_back_from_the_wire_as_it_was(operation: Any) -> None:
    body = encode_json(operation)
    assert json.loads(body)["operation"] == operation_name(operation)
    assert parse_operation(body) == msgspec.json.decode(body, type=AnyOperation) == operation


def test_relayed_call_is_kept_but_cannot_be_submitted() -> None:
    body = encode_json(ChatCompletion(model="m", parameters={"top_p": 1}))
    assert msgspec.json.decode(body, type=AnyOperation) == ChatCompletion(model="m", parameters={"top_p": 1})
    assert "Unknown operation `chat_completion`" in refused(body).message


def test_every_submittable_operation_has_a_name_of_its_own() -> None:
    names = {str(kind.__struct_config__.tag) for kind in SUBMITTABLE}
    assert names == {
        *("infer", "worker_spawn", "worker_stop", "model_download", "model_delete", "queen_check", "hive_check")
    }


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b'{"operation":"inferr"}', "Unknown operation `inferr` (did you mean `infer`?). Known: ", "operation"),
        (b'{"operation":"x"}', "Unknown operation `x`. Known: ", "operation"),
        (b"{}", "Object missing required field `operation`.", None),
        (b'{"operation":7}', "Expected `str` - at `$.operation`.", "operation"),
        (b'{"operation":"infer","promt":"x"}', "Unknown field `promt` (did you mean `prompt`?).", "promt"),
        (
            b'{"operation":"worker_stop","worker":"x"}',
            "Unknown field `worker` (did you mean `worker_id`?).",
            "worker",
        ),
        (b'{"promt":"x","operation":"infer"}', "Unknown field `promt` (did you mean `prompt`?).", "promt"),
        (
            b'{"operation":"infer","messages":[{"role":"user","contents":"x"}]}',
            "Unknown field `contents` in `messages[0]`.",
            "messages[0].contents",
        ),
        (b'{"operation":"infer","promt":1,', "Unknown field `promt` (did you mean `prompt`?).", "promt"),
        (b'{"operation":"infer","promt":' + b"[" * 100_000, "Unknown field `promt` (did you mean", "promt"),
        (
            b'{"operation":"infer","prompt":"x","max_tokens":"9"}',
            "Expected `int | null`, got `str` - at `$.max_tokens`.",
            "max_tokens",
        ),
        (
            b'{"operation":"infer","messages":[{"role":"boss","content":"x"}]}',
            "Invalid enum value 'boss' - at `$.messages[0].role`.",
            "messages[0].role",
        ),
        (b'{"operation":"infer","prompt":"x","top_p":1.5}', "Expected `float` <= 1.0 - at `$.top_p`.", "top_p"),
        (b'{"operation":"infer","prompt":"x","temperature":1e999}', "Number out of range", "temperature"),
        (b'{"operation":"infer","prompt":"x","temperature":NaN}', "The body is not JSON: ", None),
        (
            b'{"operation":"infer","prompt":"x","attempts":0}',
            "Expected `int` >= 1 - at `$.attempts`.",
            "attempts",
        ),
        (b'{"operation":"infer"}', "exactly one of `prompt` and `messages` is needed.", None),
        (b'{"operation":"infer","prompt":"x","messages":[]}', "exactly one of `prompt` and `messages`", None),
        (b'{"operation":"infer","prompt":" \\n"}', "the prompt is empty.", None),
        (b'{"operation":"infer","messages":[]}', "`messages` is empty.", None),
        (b'{"operation":"infer","prompt":"\\ud800"}', "The body is not JSON: ", None),
        (b'{"operation":"infer","prompt":"\xff"}', "The body is not JSON: ", None),
        (
            b'{"operation":"infer","prompt":"x","response_format":{"a":' + b"[" * 100_000,
            "The body is nested too",
            None,
        ),
        (b"[]", "Expected `object`, got `array`.", None),
        (b"", "The body is not JSON: ", None),
        (b'{"operation":"infer","prompt":"x"}{}', "The body is not JSON: ", None),
    ],
)
def test_wrong_body_is_refused_with_what_where_and_the_nearest_word(
    body: bytes, message: str, param: str | None
) -> None:
    error = refused(body)
    assert error.message.startswith(message)
    assert error.param == param


def test_labels_beyond_their_number_or_length_are_refused() -> None:
    def body(labels: dict[str, str]) -> bytes:
        return json.dumps({"operation": "queen_check", "labels": labels}).encode()

    full = {str(number): "x" * 256 for number in range(64)}
    assert parse_operation(body(full)).labels == full
    assert refused(body({**full, "64": ""})).param == "labels"
    assert refused(body({"a": "x" * 257})).message.startswith("Expected `str` of length <= 256")


def test_message_of_a_tool_keeps_all_its_words() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "content": "4", "tool_call_id": "1", "name": "sum"},
    ]
    operation = parse_operation(json.dumps({"operation": "infer", "messages": messages}).encode())
    assert isinstance(operation, Infer)
    told = json.loads(encode_json(operation.messages))
    assert told == [{"role": "assistant", "tool_calls": messages[0]["tool_calls"]}, messages[1]]


def test_body_of_ten_megabytes_is_read() -> None:
    prompt = "é" * 5_000_000
    operation = parse_operation(json.dumps({"operation": "infer", "prompt": prompt}, ensure_ascii=False).encode())
    assert isinstance(operation, Infer)
    assert operation.prompt == prompt
