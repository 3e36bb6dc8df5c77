"""Cutting batches: every byte stays where it is announced, whole lines wherever they fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.events import encode_json
from rbee.contracts.heartbeats import SourceHeader
from rbee.hive.batches import cut_off, stretch_bytes
from rbee.queen.ingest import parse_batch

stretches = st.lists(
    st.one_of(
        st.tuples(st.integers(0, 1000), st.lists(st.binary(max_size=30), min_size=1, max_size=8)),
        st.tuples(st.integers(0, 1000), st.none()),
    ),
    max_size=6,
)


def made(parts: list[tuple[int, list[bytes] | None]]) -> list[bytes]:
    """Write a batch of stretches, and of losses where there are no lines."""
    batch: list[bytes] = []
    for number, (offset, lines) in enumerate(parts):
        if lines is None:
            header = SourceHeader(source=f"w/{number}", offset=offset, lost_bytes=7, lost_lines=1)
            batch.append(encode_json(header) + b"\n")
        else:
            data = b"".join(line.replace(b"\n", b"") + b"\n" for line in lines)
            batch.append(encode_json(SourceHeader(source=f"w/{number}", offset=offset, bytes=len(data))) + b"\n")
            batch.append(data)
    return batch


def bytes_of(batch: list[bytes]) -> list[tuple[str, int, int, int]]:
    """Return every byte with where it belongs, and every loss."""
    found = []
    for stretch in parse_batch(b"".join(batch)):
        header = stretch.header
        found += [(header.source, header.offset + at, byte, 0) for at, byte in enumerate(stretch.data)]
        if header.lost_bytes:
            found.append((header.source, header.offset, header.lost_bytes, header.lost_lines))
    return found


@given(stretches, st.integers(1, 300))
def test_pieces_hold_what_the_batch_held_in_its_order(
    parts: list[tuple[int, list[bytes] | None]], max_bytes: int
) -> None:
    """However small they are."""
    batch = made(parts)
    pieces, rest = [], batch
    while rest:
        piece, rest = cut_off(rest, max_bytes)
        assert piece
        pieces.append(piece)
    assert [byte for piece in pieces for byte in bytes_of(piece)] == bytes_of(batch)
    for piece in pieces:
        datas = [stretch.data for stretch in parse_batch(b"".join(piece)) if stretch.data]
        assert stretch_bytes(piece) <= max_bytes or b"".join(datas).count(b"\n") == 1
        assert all(data.endswith(b"\n") for data in datas)


def test_batch_that_fits_stays_as_it_is() -> None:
    """Nothing is decoded anew, nothing copied but the list."""
    batch = made([(0, [b"a", b"b"]), (5, None)])
    assert cut_off(batch, stretch_bytes(batch)) == (batch, [])
