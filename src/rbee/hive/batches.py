"""Batches on their way to the queen: cutting off as much as a slow network can carry. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import SourceHeader

_header = msgspec.json.Decoder(SourceHeader)


def cut_off(batch: Sequence[bytes], max_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """Cut a batch in two: what is sent first, at most `max_bytes` but at least one line, and the rest.

    Args:
        batch: Header lines, each followed by its stretch where it announces one.
        max_bytes: Of stretches, headers not counted.
    """
    if stretch_bytes(batch) <= max_bytes:
        return list(batch), []
    first: list[bytes] = []
    rest = list(batch)
    left = max_bytes
    while rest:
        header = _header.decode(rest[0])
        if not header.bytes:
            first.append(rest.pop(0))
            continue
        data = rest[1]
        size = len(data) if len(data) <= left else _whole_lines(data, left, is_first=not first)
        if not size:
            break
        first += [_announce(header, 0, size), data[:size]]
        rest[:2] = [] if size == len(data) else [_announce(header, size, len(data)), data[size:]]
        left -= size
    return first, rest


def _whole_lines(data: bytes, max_bytes: int, *, is_first: bool) -> int:
    """Return how many bytes the lines have that fit; of the first stretch one line fits whatever its length."""
    end = data.rfind(b"\n", 0, max(0, max_bytes)) + 1
    if not end and is_first:
        end = data.find(b"\n") + 1 or len(data)
    return end


def _announce(header: SourceHeader, begin: int, end: int) -> bytes:
    part = msgspec.structs.replace(header, offset=header.offset + begin, bytes=end - begin)
    return encode_json(part) + b"\n"


def stretch_bytes(batch: Sequence[bytes]) -> int:
    """Return how many bytes of files a batch holds."""
    return sum(_header.decode(piece).bytes for piece in _headers(batch))


def _headers(batch: Sequence[bytes]) -> list[bytes]:
    found: list[bytes] = []
    at = 0
    while at < len(batch):
        found.append(batch[at])
        at += 2 if _header.decode(batch[at]).bytes else 1
    return found
