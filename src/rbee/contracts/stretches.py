"""How the bytes of a captured file become lines, the same on both sides of the wire.

A line ends at its newline. A line over 16 KiB (a `token` line: over 1 MiB) is cut into parts of 16 KiB counted
from its start, so where it is cut never depends on how much one read happened to return.
"""

from __future__ import annotations

from msgspec import Struct

from rbee.contracts.events import MAX_LINE_BYTES, MAX_TOKEN_LINE_BYTES, TOKEN_PREFIX


class Piece(Struct, frozen=True):
    """A line, or one part of a line that is too long.

    Attributes:
        offset: The byte of the file it begins at.
        data: Its bytes without the newline.
        part: None for a whole line, else 1, 2, … within its line.
    """

    offset: int
    data: bytes
    part: int | None = None


class Split(Struct, frozen=True):
    """What `split` found: the pieces, where the next one begins, and how many parts of its line came before."""

    pieces: list[Piece]
    offset: int
    part: int


def split(data: bytes, *, offset: int, part: int, final: bool) -> Split:
    """Cut `data` into pieces.

    Args:
        data: Bytes of the file from `offset` on.
        offset: A place where a piece begins.
        part: How many parts of the line at `offset` came before it; 0 at a line's start.
        final: Nothing follows `data` (its writer is dead, or the sender cut it here): what has no newline
            counts as well.
    """
    pieces: list[Piece] = []
    position, end = 0, len(data)
    while position < end:
        limit = MAX_LINE_BYTES
        if part == 0 and data.startswith(TOKEN_PREFIX, position):
            limit = MAX_TOKEN_LINE_BYTES
        newline = data.find(b"\n", position, position + limit + 1)
        if newline >= 0:
            pieces.append(Piece(offset + position, data[position:newline], part + 1 if part else None))
            position, part = newline + 1, 0
        elif end - position > limit or (final and end - position >= MAX_LINE_BYTES):
            part += 1
            cut = position + MAX_LINE_BYTES
            pieces.append(Piece(offset + position, data[position:cut], part))
            position = cut
        elif final:
            pieces.append(Piece(offset + position, data[position:], part + 1 if part else None))
            position, part = end, 0
        else:
            break
    return Split(pieces, offset + position, part)
