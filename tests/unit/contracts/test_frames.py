"""Frames are the same however the bytes of a stream come in."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.frames import FrameSplitter, frames_data, line_start
from rbee.errors import WorkerError

JSON_TEXTS = st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20)


def framed(texts: list[str], newline: bytes) -> bytes:
    """Write one frame for each text."""
    return b"".join(b"data: " + text.encode() + newline + newline for text in texts)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Cut bytes at some places."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


@given(
    texts=st.lists(JSON_TEXTS, max_size=8),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    places=st.lists(st.integers(min_value=0, max_value=1000), max_size=12),
)
def test_stream_cut_anywhere_gives_the_same_data(texts: list[str], newline: bytes, places: list[int]) -> None:
    """Where one read ends says nothing about where a frame does."""
    splitter = FrameSplitter()
    wholes = [splitter.feed(part) for part in cut(framed(texts, newline), places)]
    assert [data.decode() for whole in wholes for data in frames_data(whole)] == texts
    assert b"".join(wholes) == framed(texts, newline)


@given(texts=st.lists(JSON_TEXTS, min_size=1, max_size=4), place=st.integers(min_value=1, max_value=1000))
def test_unfinished_frame_is_held_back(texts: list[str], place: int) -> None:
    """Only whole frames are handed on."""
    data = framed(texts, b"\n")
    part = data[: place % len(data)]
    whole = FrameSplitter().feed(part)
    assert whole == part[: part.rfind(b"\n\n") + 2 if b"\n\n" in part else 0]


def test_comments_and_event_names_are_no_data() -> None:
    """A ping has no data; an event's name is not part of it."""
    whole = b": ping\n\nevent: message_stop\ndata: {}\n\nevent: lonely\n\n"
    assert list(frames_data(whole)) == [b"{}"]


def test_data_of_several_lines_is_joined() -> None:
    """The standard joins the data lines of one frame by newlines."""
    assert list(frames_data(b"data: {\ndata:  1}\n\n")) == [b"{\n 1}"]


def test_frame_without_end_is_refused_at_its_bound() -> None:
    """An engine that never ends a frame does not fill the memory."""
    splitter = FrameSplitter(max_bytes=10)
    assert splitter.feed(b"data: 1\n\n") == b"data: 1\n\n"
    with pytest.raises(WorkerError, match="more than 10 bytes"):
        splitter.feed(b"data: 12345")


def test_line_start_is_found_only_where_a_line_begins() -> None:
    """Words inside an answer are never taken for frames."""
    assert line_start(b"event: message_stop\ndata: {}\n\n", b"event: message_stop") == 0
    assert line_start(b'data: {"text":"event: message_stop"}\n\n', b"event: message_stop") == -1
    assert line_start(b"data: 1\n\ndata: [DONE]\n\n", b"data: [DONE]") == 9
