"""Secrets go, everything else stays, and JSON stays JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.narration import redact


def redacted(value: Any) -> Any:
    return json.loads(redact(json.dumps(value, separators=(",", ":")).encode()))


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("asked with bearer canarytoken-1", "asked with bearer ***"),
        ("Proxy-Authorization: Basic dXNlcjpwYXNz", "Proxy-Authorization: Basic ***"),
        ("the key sk-proj-a1b2c3d4_e5 is wrong", "the key sk-*** is wrong"),
        ("hf_abcdefghijklmnopqrstuvwxyz was refused", "hf_*** was refused"),
        ("GET https://ann:pa:ss@host/v1", "GET https://***@host/v1"),
        ("GET /v1?api_key=abc123&limit=5", "GET /v1?api_key=***&limit=5"),
        ("GET /v1?token=abc&limit=5", "GET /v1?token=***&limit=5"),
        ("password: hunter2, then more", "password: ***, then more"),
        ("PASSWORD='two words' given", "PASSWORD='***' given"),
        ('body was {"password": "two words", "n": 1}', 'body was {"password": "***", "n": 1}'),
        ("body was {'api_key': 'abc', 'n': 1}", "body was {'api_key': '***', 'n': 1}"),
        ("token: 8c4f91ab2", "token: ***"),
        ("worker_token=abcd", "worker_token=***"),
        ("ghs_abcdefghijklmnopqrstuvwxyz was refused", "ghs_*** was refused"),
        ("Keys:\nsk-abcdefgh12\ttoken: 8c4f91ab2", "Keys:\nsk-***\ttoken: ***"),
        ("Headers:\r\nBearer abcdef123456", "Headers:\r\nBearer ***"),
        ("Headers:\nBasic dXNlcjpwYXNz", "Headers:\nBasic ***"),
    ],
)
def test_redact_sentence_with_secret_masks_only_the_secret(sentence: str, expected: str) -> None:
    assert redacted({"message": sentence, "n": 1}) == {"message": expected, "n": 1}


@pytest.mark.parametrize(
    "sentence",
    [
        "prompt_tokens: 35, completion_tokens=256, max_tokens=4096",
        "Time to first token: 0.31 s",
        "next token: hello",
        "basic understanding of basic authentication",
        "hf_hub_download failed for hf:org/repo:Q4_1",
        "task-12345678 on desk-00000001",
        "Listening on http://127.0.0.1:8500/v1 (a key is wanted)",
        "the password is wrong",
        "eos_token: </s>",
        "",
    ],
)
def test_redact_ordinary_sentence_changes_nothing(sentence: str) -> None:
    assert redacted({"message": sentence}) == {"message": sentence}


@pytest.mark.parametrize(
    "name", ["password", "api_key", "X-Api-Key", "HF_TOKEN", "token", "client_secret", "authorization"]
)
def test_redact_field_of_secret_name_masks_its_whole_value(name: str) -> None:
    assert redacted({name: 'a "b" \\ c\n', "n": 1}) == {name: "***", "n": 1}


@pytest.mark.parametrize("name", ["prompt_tokens", "completion_tokens", "eos_token", "key", "text", "author"])
def test_redact_field_of_ordinary_name_keeps_its_value(name: str) -> None:
    assert redacted({name: "some words", "n": 35}) == {name: "some words", "n": 35}


def test_redact_string_that_ends_in_a_backslash_ends_there() -> None:
    value = {"password:\\": [{"n": 1}], "password='\\": "\\", "x": "token=\\"}
    assert redacted(value) == value


_PIECES = "password|token|api_key|secret|bearer |basic |://|@|sk-|\"|'|\\|:|=| |\n|a1B2c3d4e5|,|{|}|é|\x00|hf_|/"
_WORDS = st.lists(st.sampled_from(_PIECES.split("|")), max_size=12).map("".join)
_VALUES = st.recursive(_WORDS | st.integers() | st.none(), st.lists, max_leaves=4)


@given(st.dictionaries(_WORDS, _VALUES, max_size=4))
def test_redact_any_json_stays_json_of_the_same_shape(value: dict[str, Any]) -> None:
    line = json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    after = json.loads(redact(line))
    assert [type(item) for item in after.values()] == [type(item) for item in value.values()][: len(after)]


@given(_WORDS, _WORDS, st.sampled_from(["password", "api_key", "token", "X-Client-Secret", "authorization"]))
def test_redact_secret_in_any_company_never_survives(before: str, after: str, name: str) -> None:
    secret = before + "CANARY-7f3a" + after
    value = {"message": f"{before} Bearer CANARY-7f3a", "fields": {before: [{name: secret}], name: secret}}
    assert "CANARY" not in json.dumps(redacted(value))


@pytest.mark.parametrize(
    "hostile",
    ["token a-", "a", "://", 'password":"', "password'", "basic aaaa", "password\\", "sk-", "bearer ", "api_key "],
)
@pytest.mark.timeout(60)  # what is quadratic takes hours for a mebibyte
def test_redact_hostile_mebibyte_is_read_in_linear_time(hostile: str) -> None:
    redact((hostile * (1024 * 1024 // len(hostile))).encode())
