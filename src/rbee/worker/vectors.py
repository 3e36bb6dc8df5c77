"""Shorten embeddings to the `dimensions` that were asked for, which the engine does not. Pure."""

from __future__ import annotations

import base64
import math
from array import array
from typing import Any

import msgspec

from rbee.errors import InvalidRequestError, WorkerError

_encode = msgspec.json.Encoder().encode


class Wanted(msgspec.Struct, frozen=True):
    """How vectors are to be given: how many numbers each, and whether as base64 of 32-bit floats."""

    dimensions: int
    is_base64: bool


def wanted_of(asked: dict[str, Any]) -> Wanted | None:
    """Read how vectors are to be shortened; None where they are taken as they are.

    Raises:
        InvalidRequestError: `dimensions` is no whole number from 1.
    """
    dimensions = asked.get("dimensions")
    if dimensions is None:
        return None
    if not isinstance(dimensions, int) or isinstance(dimensions, bool) or dimensions < 1:
        raise InvalidRequestError("`dimensions` must be a whole number from 1.", param="dimensions")
    return Wanted(dimensions, asked.get("encoding_format") == "base64")


def shortened(answer: bytes, wanted: Wanted) -> bytes:
    """Keep the first numbers of each vector and make it of length 1 again.

    What is left means as much as the model was trained for it (Matryoshka embeddings; Kusupati et al., 2022).

    Raises:
        InvalidRequestError: The model's vectors have fewer numbers than were asked for.
        WorkerError: It is no answer of vectors.
    """
    try:
        told = msgspec.json.decode(answer, type=dict[str, Any])
        told["data"] = [{**one, "embedding": _given(one["embedding"], wanted)} for one in told["data"]]
    except (msgspec.MsgspecError, KeyError, TypeError, OverflowError) as error:
        raise WorkerError("The engine's answer cannot be read.") from error
    return _encode(told)


def _given(vector: list[float], wanted: Wanted) -> list[float] | str:
    if len(vector) < wanted.dimensions:
        raise InvalidRequestError(
            f"The model's vectors have {len(vector)} dimensions, fewer than the {wanted.dimensions} asked for.",
            param="dimensions",
        )
    kept = vector[: wanted.dimensions]
    norm = math.sqrt(sum(number * number for number in kept)) or 1.0
    scaled = [number / norm for number in kept]
    return base64.b64encode(array("f", scaled).tobytes()).decode() if wanted.is_base64 else scaled
