"""Embeddings shortened to the dimensions asked for."""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import msgspec
import pytest

from rbee.errors import InvalidRequestError, WorkerError
from rbee.worker.vectors import Wanted, shortened, wanted_of

ANSWER = msgspec.json.encode(
    {"object": "list", "usage": {"prompt_tokens": 2}, "data": [{"index": 0, "embedding": [3.0, 4.0, 12.0]}]}
)


@pytest.mark.parametrize("dimensions", [0, -1, "8", 1.5, True])
def test_dimensions_of_the_wrong_form_are_refused(dimensions: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        wanted_of({"dimensions": dimensions})
    assert refused.value.param == "dimensions"


def test_vectors_without_wanted_dimensions_are_left_alone() -> None:
    assert wanted_of({"input": "a", "encoding_format": "base64", "dimensions": None}) is None


def test_first_numbers_are_kept_at_length_one() -> None:
    """All else of the answer stays."""
    told = msgspec.json.decode(shortened(ANSWER, Wanted(2, is_base64=False)))
    [one] = told["data"]
    assert one == {"index": 0, "embedding": [0.6, 0.8]}
    assert told["usage"] == {"prompt_tokens": 2}


def test_base64_holds_32_bit_floats() -> None:
    """As OpenAI's client asks for them without being told."""
    told = msgspec.json.decode(shortened(ANSWER, Wanted(3, is_base64=True)))
    numbers = array("f", base64.b64decode(told["data"][0]["embedding"]))
    assert math.isclose(sum(number * number for number in numbers), 1.0, rel_tol=1e-6)
    assert len(numbers) == 3


def test_more_dimensions_than_there_are_is_the_callers_error() -> None:
    with pytest.raises(InvalidRequestError, match="have 3 dimensions, fewer than the 4"):
        shortened(ANSWER, Wanted(4, is_base64=False))


@pytest.mark.parametrize("answer", [b"", b"[]", b"{}", b'{"data":[{}]}', b'{"data":[{"embedding":"abc"}]}'])
def test_answer_that_holds_no_vectors_is_the_workers_error(answer: bytes) -> None:
    with pytest.raises(WorkerError):
        shortened(answer, Wanted(1, is_base64=False))


def test_vector_of_nothing_stays_nothing() -> None:
    """Its length cannot be made 1."""
    answer = msgspec.json.encode({"data": [{"embedding": [0.0, 0.0]}]})
    assert msgspec.json.decode(shortened(answer, Wanted(1, is_base64=False)))["data"] == [{"embedding": [0.0]}]
