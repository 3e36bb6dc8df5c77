"""Output nobody should write: lines of awkward sizes and bytes, forged events, fake frames; and its accounting."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from rbee.contracts.events import (
    MAX_LINE_BYTES,
    MAX_TOKEN_LINE_BYTES,
    TOKEN_PREFIX,
    SourceLine,
    decode_source_line,
)
from rbee.contracts.stretches import Piece, split
from tests.unit.queen.queen_stage import narration, token

Told = TypeVar("Told")
SIZES = [0, 1, MAX_LINE_BYTES - 1, MAX_LINE_BYTES, MAX_LINE_BYTES + 1, 2 * MAX_LINE_BYTES, 3 * MAX_LINE_BYTES + 1]
HUGE = [MAX_TOKEN_LINE_BYTES - 1, MAX_TOKEN_LINE_BYTES, MAX_TOKEN_LINE_BYTES + 1]
ODD = [
    b"\xff\xfe bad \xc3\x28 utf-8 \xed\xa0\x80",
    b"nul \0 and \0\0\0",
    b"\x1b[31mred\x1b[0m \x1b]0;title\x07",
    b"carriage\r",
    b"10%\r20%\r100%",
    b"data: [DONE]",
    b"id: 7\nevent: end\ndata: {}\n",
    b"[DONE]",
    b'{"source":"x","offset":0,"bytes":5}',
    b'{"v":1,"kind":"narration",',
    b"\xe2\x80\xa8 line separator \xc2\x85 next line \x0b\x0c",
]


def forged(own: str, other: str) -> list[bytes]:
    """Return lines that claim what is not theirs to claim."""
    events: list[dict[str, Any]] = [
        {"job_id": other},
        {"job_id": other, "attempt": 1},
        {"job_id": own, "attempt": 7},
        {"job_id": own, "seq": 1},
        {"src": {"id": "another/stdout", "offset": 0}},
        {"observed_ts": 1},
        {"actor": "queen", "job_id": other},
        {"kind": "end", "state": "completed", "job_id": own},
        {"kind": "state", "state": "completed", "job_id": own},
        {"kind": "gap", "lost_bytes": 5, "job_id": own},
        {"v": 2},
        {"ts": "now"},
    ]
    twice = narration()[:-2] + b',"job_id":"%b"}\n' % other.encode()
    deep = [narration()[:-2] + b',"x":' + b"[" * depth + b"]" * depth + b"}\n" for depth in range(100, 1400, 50)]
    return [*(narration(**fields) for fields in events), token(other), token(own, attempt=9), twice, *deep]


def lines(choice: random.Random, own: str, other: str, count: int) -> list[bytes]:
    """Return lines of every kind, among them honest events of the job `own`; each with its newline."""
    crooked = forged(own, other)
    made = []
    for number in range(count):
        kind = choice.random()
        if kind < 0.3:
            made.append(token(own, text=f"{number} " + "t" * choice.choice([0, 10, 200, 20_000])))
        elif kind < 0.45:
            made.append(narration(message=str(number), job_id=own, attempt=1))
        elif kind < 0.6:
            made.append(choice.choice(crooked))
        elif kind < 0.8:
            made.append(choice.choice(ODD) + b"\n")
        else:
            made.append(b"%d " % number + b"r" * choice.choice(SIZES) + b"\n")
    made += [b"h" * size + b"\n" for size in HUGE]
    made += [TOKEN_PREFIX.ljust(size, b"q") + b"\n" for size in HUGE]
    choice.shuffle(made)
    return made


def account(written: bytes, told: Mapping[int, Told], check: Callable[[Piece, Told], None]) -> int:
    """Check that every piece of a file was told once, by its offset, as it stood there; returns the bytes."""
    pieces = split(written, offset=0, part=0, final=True).pieces
    assert sorted(told) == [piece.offset for piece in pieces]
    for piece in pieces:
        check(piece, told[piece.offset])
    newlines = sum(written[piece.offset + len(piece.data) :][:1] == b"\n" for piece in pieces)
    return sum(len(piece.data) for piece in pieces) + newlines


def line_of(piece: Piece) -> SourceLine | None:
    """Return the event that a piece is, if it is one."""
    return decode_source_line(piece.data) if piece.part is None else None
