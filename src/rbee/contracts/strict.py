"""Decode JSON strictly, and say on refusal where it is wrong and which known word is nearest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from typing import Any, TypeVar, Union

import msgspec

from rbee.errors import InvalidRequestError

T = TypeVar("T", bound=msgspec.Struct)

_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")
_INVALID_TAG = re.compile(r"Invalid value '([^']*)'")
_PATH = re.compile(r" - at `\$\.?(.*)`$")


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint such as ` (did you mean `model`?)`, or nothing when no known word is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close else ""


@cache
def _decoder(types: tuple[type[Any], ...]) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(Union[types])  # noqa: UP007  # the members are known only now


def decode_strict(body: bytes, types: tuple[type[T], ...]) -> T:
    """Decode `body` into one of `types`.

    Raises:
        InvalidRequestError: What is wrong, at which path, with the nearest known name.
    """
    try:
        decoded: T = _decoder(types).decode(body)
        return decoded
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_explain(str(error), body, types), param=_param(str(error))) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"The body is not JSON: {error}.") from None
    except RecursionError:
        raise InvalidRequestError("The body is nested too deeply.") from None


def _param(message: str) -> str | None:
    unknown = _UNKNOWN_FIELD.search(message)
    path = _path(message)
    if unknown:
        return f"{path}.{unknown[1]}" if path else unknown[1]
    return path or None


def _path(message: str) -> str:
    found = _PATH.search(message)
    return found[1] if found else ""


def _explain(message: str, body: bytes, types: tuple[type[T], ...]) -> str:
    tag_field = types[0].__struct_config__.tag_field
    tags = {str(cls.__struct_config__.tag): cls for cls in types}
    tag = _INVALID_TAG.search(message)
    if tag and tag_field and message.endswith(f"`$.{tag_field}`"):
        return f"Unknown {tag_field} `{tag[1]}`{nearest(tag[1], tags)}. Known: {', '.join(sorted(tags))}."
    unknown = _UNKNOWN_FIELD.search(message)
    if unknown and _path(message):
        return f"Unknown field `{unknown[1]}` in `{_path(message)}`."
    if unknown:
        fields = _fields_of(body, types, tag_field, tags)
        return f"Unknown field `{unknown[1]}`{nearest(unknown[1], fields)}."
    return message + "." if not message.endswith(".") else message


def _fields_of(
    body: bytes, types: tuple[type[T], ...], tag_field: str | None, tags: dict[str, type[T]]
) -> list[str]:
    """Return the fields of the type that `body` seems to name; it need not be JSON to its end."""
    tag = re.search(rb'"%b"\s*:\s*"(\w+)"' % tag_field.encode(), body) if tag_field else None
    cls = tags.get(tag[1].decode(), types[0]) if tag else types[0]
    return [field.encode_name for field in msgspec.structs.fields(cls)]
