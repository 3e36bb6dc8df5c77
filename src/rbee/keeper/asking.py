"""Read what the person gave: the prompt, the model, the operation made of them."""

from __future__ import annotations

import os
import sys
from typing import Any, BinaryIO

from rbee.contracts.events import encode_json
from rbee.contracts.models import KNOWN_MODELS
from rbee.contracts.operations import MAX_BODY_BYTES, AnyOperation, parse_operation
from rbee.errors import InvalidRequestError, ModelNotFoundError, PayloadTooLargeError

_EMPTY = 'Give one as an argument (rbee infer "Why is the sky blue?") or on stdin.'


def read_prompt(given: str | None, stdin: BinaryIO | None = None) -> str:
    """Return the prompt: the argument, or what stdin holds when it is absent or `-`.

    Raises:
        InvalidRequestError: It is empty, or no UTF-8.
        PayloadTooLargeError: It is longer than a request may be.
    """
    text = _from_stdin(stdin or _stdin()) if given is None or given == "-" else given
    if not text.strip():
        raise InvalidRequestError("The prompt is empty.", remedy=_EMPTY, param="prompt")
    return text


def _stdin() -> BinaryIO | None:
    return sys.stdin.buffer if sys.stdin is not None else None


def _from_stdin(stdin: BinaryIO | None) -> str:
    if stdin is None:
        return ""
    if stdin.isatty():
        print("Type the prompt, then Ctrl-D on a line of its own.", file=sys.stderr)
    data = stdin.read(MAX_BODY_BYTES + 1)
    if len(data) > MAX_BODY_BYTES:
        raise PayloadTooLargeError(f"The prompt is longer than {MAX_BODY_BYTES // 1024**2} MiB.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"The prompt on stdin is no UTF-8 text: {error}.", param="prompt") from None


def model_argument(given: str | None) -> str | None:
    """Return a model reference as every program understands it; a path is made absolute.

    Raises:
        ModelNotFoundError: It has the form of a relative path, and there is no such file.
    """
    if given is None or given in KNOWN_MODELS or os.path.isabs(given):
        return given
    path = os.path.expanduser(given)
    if os.path.isfile(path):
        return os.path.abspath(path)
    looks_like_a_path = given.startswith(("./", "../", "~")) or (given.endswith(".gguf") and ":" not in given)
    if looks_like_a_path:
        raise ModelNotFoundError(f"There is no file {os.path.abspath(path)}.", param="model")
    return given


def operation(name: str, **fields: Any) -> AnyOperation:
    """Make an operation of the fields that are given.

    Raises:
        InvalidRequestError: A value the operation does not take, named.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    return parse_operation(encode_json({"operation": name, **given}))
