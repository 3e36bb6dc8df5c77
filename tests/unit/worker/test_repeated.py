"""What an engine repeats of a request is not narrated."""

from __future__ import annotations

from typing import Any

import pytest

from rbee.worker.repeated import TEXT_CHARS_MAX, without_repeated


@pytest.mark.parametrize(
    ("words", "asked", "kept"),
    [
        ("no: tell me a secret", {"prompt": "tell me a secret now"}, "no: …"),
        ("no: tell me a secret", {"messages": [{"role": "user", "content": "tell me a secret"}]}, "no: …"),
        ("bad input 47110", {"input": ["a", "47110"]}, "bad input …"),
        ("a long\\nsecret text", {"system": "long\nsecret text"}, "a long\\n…"),
        ("the model `some-model` is not here", {"model": "some-model"}, "the model `some-model` is not here"),
        ("roles: user, assistant", {"messages": [{"role": "assistant"}]}, "roles: user, assistant"),
        ("out of memory", {"prompt": "memo"}, "out of …ry"),
        ("out of memory", {"prompt": "out"}, "out of memory"),
        ("anything", {"prompt": "a" * TEXT_CHARS_MAX + "b"}, "…"),
        ("anything", {}, "anything"),
    ],
)
def test_pieces_of_a_request_are_left_out(words: str, asked: dict[str, Any], kept: str) -> None:
    """Whole or in part, and nothing else; where there is too much to look through, all of it."""
    assert without_repeated(words, asked) == kept
