"""The event stream parser: the standard's rules, and any chunking gives the same events."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.client.sse import SseEvent, SseParser
from rbee.errors import InternalError


def parsed(*chunks: bytes) -> list[SseEvent]:
    """Feed chunks to a new parser and collect what comes out."""
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_event_with_any_line_end_is_read(end: bytes) -> None:
    """LF, CR and CRLF all end lines."""
    stream = end.join([b"id: 7", b"event: token", b'data: {"a":1}', b"", b""])
    assert parsed(stream) == [SseEvent("7", "token", b'{"a":1}')]


def test_event_without_name_is_a_message() -> None:
    """The default name is `message`."""
    assert parsed(b"data: x\n\n") == [SseEvent("", "message", b"x")]


def test_data_on_several_lines_is_joined_by_newlines() -> None:
    """Each data line adds a newline but the last."""
    assert parsed(b"data: a\ndata:\ndata:  b\n\n") == [SseEvent("", "message", b"a\n\n b")]


def test_comments_and_unknown_fields_are_ignored() -> None:
    """A line that begins with a colon is a comment; a field nobody knows is nothing."""
    assert parsed(b": hello\nfoo: bar\nbaz\ndata: x\n: more\n\n:\n\n") == [SseEvent("", "message", b"x")]


def test_block_without_data_gives_no_event_but_keeps_the_id() -> None:
    """The last id stays, the name does not."""
    assert parsed(b"id: 3\nevent: odd\n\ndata: x\n\n") == [SseEvent("3", "message", b"x")]


def test_field_without_colon_has_an_empty_value() -> None:
    """A lone `data` is one empty line of data."""
    assert parsed(b"data\n\ndata\ndata\n\n") == [SseEvent("", "message", b""), SseEvent("", "message", b"\n")]


def test_id_with_nul_is_ignored() -> None:
    """The id before it stays."""
    assert parsed(b"id: 1\n\nid: 2\0\ndata: x\n\n") == [SseEvent("1", "message", b"x")]


def test_empty_id_clears_the_last_one() -> None:
    """`id` alone resets it."""
    assert parsed(b"id: 1\ndata: x\n\nid\ndata: y\n\n") == [
        SseEvent("1", "message", b"x"),
        SseEvent("", "message", b"y"),
    ]


@pytest.mark.parametrize("cut", [1, 2, 3, 4])
def test_byte_order_mark_split_anywhere_is_dropped_once(cut: int) -> None:
    """Only the one at the very start is no part of the first line."""
    stream = b"\xef\xbb\xbfdata: x\n\n\xef\xbb\xbfdata: y\n\n"
    assert parsed(stream[:cut], stream[cut:]) == [SseEvent("", "message", b"x")]


def test_half_of_an_event_is_never_handed_out() -> None:
    """Without its blank line an event does not count."""
    assert parsed(b"data: x\n\nid: 2\ndata: y\n") == [SseEvent("", "message", b"x")]


def test_crlf_split_between_chunks_is_one_line_end() -> None:
    """The LF of the next chunk does not end a second line."""
    assert parsed(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [SseEvent("", "message", b"a\nb")]


def test_character_split_between_chunks_stays_whole() -> None:
    """Data is bytes; where a chunk ends means nothing."""
    stream = "data: grüß 🐝\n\n".encode()
    assert parsed(*[stream[at : at + 1] for at in range(len(stream))]) == [
        SseEvent("", "message", "grüß 🐝".encode())
    ]


def test_vertical_tab_and_other_unicode_line_ends_are_data() -> None:
    """Only LF and CR end a line."""
    data = "a\x0bb\x0cc\x1cd\x85e\u2028f".encode()
    assert parsed(b"data: " + data + b"\n\n") == [SseEvent("", "message", data)]


@pytest.mark.parametrize(("value", "expected"), [(b"1500", 1500), (b"1.5", None), (b"-1", None), (b"", None)])
def test_retry_is_taken_when_it_is_a_number(value: bytes, expected: int | None) -> None:
    """Anything but digits is ignored."""
    parser = SseParser()
    parser.feed(b"retry: " + value + b"\n\n")
    assert parser.retry_ms == expected


@pytest.mark.parametrize("chunk", [b"x" * 100, b"data: " + b"x" * 94 + b"\n", b"data\n" * 20])
def test_event_beyond_the_bound_is_an_error(chunk: bytes) -> None:
    """An endless line, or endless lines, of one event do not fill the memory."""
    parser = SseParser(max_event_bytes=1000)
    with pytest.raises(InternalError, match="more than 1000 bytes"):
        for _ in range(1001):
            parser.feed(chunk)


def test_many_events_and_comments_stay_below_the_bound() -> None:
    """What was handed out no longer counts."""
    parser = SseParser(max_event_bytes=100)
    seen = [event for _ in range(1000) for event in parser.feed(b"data: " + b"x" * 60 + b"\n\n: ping\n")]
    assert len(seen) == 1000


streams = st.lists(
    st.sampled_from(
        [
            b"data: x",
            b"data:y",
            b"data",
            b"id: 4",
            b"id: 5\0",
            b"event: token",
            b":",
            b"\xef\xbb\xbf",
            b"\n",
            b"\r",
            b"\r\n",
            b"\n\n",
            "data: ü🐝".encode(),
            b"retry: 9",
            b"\xff",
            b" ",
        ]
    ),
    max_size=40,
).map(b"".join)


@given(streams, st.lists(st.integers(min_value=0, max_value=400), max_size=12))
def test_any_chunking_gives_the_same_events(stream: bytes, cuts: list[int]) -> None:
    """Where the network cut the bytes is invisible."""
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    chunks = [stream[a:b] for a, b in pairwise(edges)]
    whole = parsed(stream)
    assert parsed(*chunks) == whole
    assert parsed(*[stream[at : at + 1] for at in range(len(stream))]) == whole


line_ends = st.sampled_from([b"\n", b"\r", b"\r\n"])
plain = st.text(alphabet=st.characters(exclude_characters="\n\r\0", codec="utf-8"))


@given(st.lists(st.tuples(plain, plain, st.lists(plain, min_size=1, max_size=3))), line_ends)
def test_what_was_written_is_read_back(blocks: list[tuple[str, str, list[str]]], end: bytes) -> None:
    """Every event survives being written by the standard's rules."""
    stream = b""
    expected = []
    for event_id, name, lines in blocks:
        fields = [f"id: {event_id}", f"event: {name}", *(f"data: {line}" for line in lines), "", ""]
        stream += end.join(field.encode() for field in fields)
        expected.append(SseEvent(event_id, name or "message", "\n".join(lines).encode()))
    assert parsed(stream) == expected
