"""What `split` and `FileFollower.read` promise together: how bytes arrive never changes how they are cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts import stretches
from rbee.contracts.events import MAX_LINE_BYTES, MAX_TOKEN_LINE_BYTES, TOKEN_PREFIX
from rbee.contracts.stretches import Piece, split
from rbee.processes import FileFollower, follower

contents = st.lists(st.sampled_from([b"a", b"a" * 7, b"b" * 8, b"c" * 50, b"\n", b"T", b"\r"]), max_size=40).map(
    b"".join
)
chunkings = st.lists(st.integers(1, 60), max_size=40)


@contextmanager
def small_limits() -> Iterator[None]:
    """Shrink every limit, so that short examples reach all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stretches, "MAX_LINE_BYTES", 8)
        patch.setattr(stretches, "MAX_TOKEN_LINE_BYTES", 48)
        patch.setattr(stretches, "TOKEN_PREFIX", b"T")
        patch.setattr(follower, "CHUNK_BYTES", 16)
        yield


def whole(data: bytes) -> list[Piece]:
    return split(data, offset=0, part=0, final=True).pieces


@given(contents)
def test_pieces_and_their_newlines_are_the_data(data: bytes) -> None:
    with small_limits():
        pieces = whole(data)
    ends = [piece.offset for piece in pieces[1:]] + [len(data)] * bool(pieces)
    for piece, end in zip(pieces, ends, strict=True):
        assert data[piece.offset : end] in (piece.data, piece.data + b"\n")
    assert [piece.offset for piece in pieces[:1]] == [0] * bool(data)
    assert sum(data[end - 1 : end] == b"\n" for end in ends) == data.count(b"\n")


@given(contents)
def test_parts_count_from_one_within_each_line(data: bytes) -> None:
    with small_limits():
        pieces = whole(data)
    previous = 0
    for piece in pieces:
        at_line_start = piece.offset == 0 or data[piece.offset - 1 : piece.offset] == b"\n"
        assert piece.part == (previous + 1 if not at_line_start else piece.part and 1)
        previous = piece.part or 0


@given(contents, chunkings)
def test_split_of_growing_data_gives_the_same_pieces(data: bytes, chunks: list[int]) -> None:
    with small_limits():
        pieces: list[Piece] = []
        offset = part = seen = 0
        for chunk in [*chunks, len(data)]:
            seen = min(len(data), seen + chunk)
            found = split(data[offset:seen], offset=offset, part=part, final=False)
            pieces += found.pieces
            offset, part = found.offset, found.part
        pieces += split(data[offset:], offset=offset, part=part, final=True).pieces
        assert pieces == whole(data)


@given(contents, chunkings, st.integers(1, 80), st.booleans())
def test_follower_and_receiver_cut_as_if_all_had_come_at_once(
    data: bytes, chunks: list[int], max_bytes: int, forgetful: bool
) -> None:
    """The receiver cuts each stretch as final, with its own part count; a follower that forgot its own is fine."""
    with small_limits(), tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        path.touch()
        reader = FileFollower(path)
        received: list[Piece] = []
        offset = part = 0

        def receive(*, final: bool) -> None:
            nonlocal offset, part
            while stretch := reader.read(max_bytes, final=final):
                if not stretch.data:
                    return
                assert stretch.offset == offset
                found = split(stretch.data, offset=offset, part=part, final=True)
                if not forgetful:
                    assert stretch.part == part
                    assert len(found.pieces) == 1 or len(stretch.data) <= max_bytes
                received.extend(found.pieces)
                offset, part = found.offset, found.part
                if forgetful:
                    reader.rewind(offset)

        seen = 0
        for chunk in [*chunks, len(data)]:
            with path.open("ab") as file:
                file.write(data[seen : seen + chunk])
            seen += chunk
            receive(final=False)
        receive(final=True)
        assert reader.exhausted
        reader.close()
        assert received == whole(data)


@pytest.mark.parametrize(
    ("length", "parts"),
    [
        (MAX_LINE_BYTES - 1, [None]),
        (MAX_LINE_BYTES, [None]),
        (MAX_LINE_BYTES + 1, [1, 2]),
        (2 * MAX_LINE_BYTES, [1, 2]),
        (2 * MAX_LINE_BYTES + 1, [1, 2, 3]),
    ],
)
def test_line_around_the_limit_is_cut_only_above_it(length: int, parts: list[int | None]) -> None:
    pieces = split(b"x" * length + b"\n", offset=0, part=0, final=False).pieces
    assert [piece.part for piece in pieces] == parts
    assert b"".join(piece.data for piece in pieces) == b"x" * length


@pytest.mark.parametrize(("excess", "count"), [(0, 1), (1, MAX_TOKEN_LINE_BYTES // MAX_LINE_BYTES + 1)])
def test_token_line_is_cut_only_above_one_mebibyte(tmp_path: Path, excess: int, count: int) -> None:
    line = TOKEN_PREFIX.ljust(MAX_TOKEN_LINE_BYTES + excess, b"t") + b"\n"
    path = tmp_path / "file"
    path.write_bytes(line)
    reader = FileFollower(path)
    data = b""
    while stretch := reader.read(64 * 1024).data:
        data += stretch
    assert data == line
    assert len(split(data, offset=0, part=0, final=False).pieces) == count
    reader.close()


def test_stretch_of_a_long_token_line_holds_that_line_alone(tmp_path: Path) -> None:
    token = TOKEN_PREFIX.ljust(200_000, b"t") + b"\n"
    path = tmp_path / "file"
    path.write_bytes(b"before\n" + token + b"after\n")
    reader = FileFollower(path)
    assert [reader.read(64 * 1024).data for _ in range(3)] == [b"before\n", token, b"after\n"]
    reader.close()


def test_token_line_behind_the_last_part_of_a_long_line_is_not_cut(tmp_path: Path) -> None:
    path = tmp_path / "file"
    long, token = b"x" * (MAX_LINE_BYTES + 1), TOKEN_PREFIX.ljust(MAX_LINE_BYTES + 100, b"t")
    path.write_bytes(long)
    reader = FileFollower(path)
    assert (len(reader.read(64 * 1024).data), reader.part) == (MAX_LINE_BYTES, 1)
    with path.open("ab") as file:
        file.write(b"\n" + token)
    assert (reader.read(64 * 1024).data, reader.part) == (b"x\n", 0)
    reader.close()


def test_unfinished_token_line_waits_for_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(TOKEN_PREFIX.ljust(500_000, b"t"))
    reader = FileFollower(path)
    assert reader.read(64 * 1024).data == b""
    assert reader.position == 0
    with path.open("ab") as file:
        file.write(b"\n")
    assert len(reader.read(64 * 1024).data) == 500_001
    reader.close()


def test_unfinished_token_line_of_a_dead_writer_comes_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    line = TOKEN_PREFIX.ljust(500_000, b"t")
    path.write_bytes(line)
    reader = FileFollower(path)
    taken = []
    while (stretch := reader.read(64 * 1024, final=True)).data:
        taken.append(stretch)
    assert b"".join(stretch.data for stretch in taken) == line
    assert {len(stretch.data) for stretch in taken[1:-1]} == {3 * MAX_LINE_BYTES}
    assert os.path.getsize(path) == reader.position
    reader.close()
