"""Lines and events: what capture accepts, what it refuses, and that nothing of a line is lost on the way."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.events import (
    captured_event,
    decode_source_line,
    events_in,
    frames_from,
    frames_of,
    new_event,
    seq_and_kind,
)
from rbee.narration import configure, narrate, scope
from rbee.narration.testing import captured_narration

_ADDED = b'"seq":7,"src":{"id":"worker-1/stdout","offset":42},"observed_ts":99,'


def line_of(*more: bytes, message: bytes = b'"message":"c"') -> bytes:
    return b"{" + b",".join([b'"v":1,"kind":"narration","ts":1,"actor":"a","action":"b"', message, *more]) + b"}"


def captured(line: bytes) -> bytes:
    return captured_event(line, source="worker-1/stdout", offset=42, observed_ts=99).numbered(7)


_VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5)


@given(st.text(min_size=1, max_size=20), st.text(max_size=50), st.dictionaries(st.text(max_size=5), _VALUES))
def test_narrated_line_comes_through_capture_byte_for_byte(
    action: str, message: str, fields: dict[str, Any]
) -> None:
    lines: list[bytes] = []

    class Keep:
        def write(self, line: bytes) -> bool:
            lines.append(line)
            return True

    with captured_narration(), scope(job_id="job-1", correlation_id="c"):
        configure(actor="worker", sink=Keep())
        narrate(action, message, **{"_" + key: value for key, value in fields.items()})
    (line,) = lines
    assert decode_source_line(line) is not None
    event = captured(line)
    assert event.replace(_ADDED, b"", 1) == line
    assert seq_and_kind(event) == (7, "narration")


def test_token_line_comes_through_capture_byte_for_byte() -> None:
    line = b'{"v":1,"kind":"token","ts":1,"text":"password: \\"x\\" token: abcde","tokens":3,"channel":"answer"}'
    assert decode_source_line(line) is not None
    assert captured(line).replace(_ADDED, b"", 1) == line


def test_fields_nobody_knows_survive_capture() -> None:
    line = line_of(b'"trace":{"deep":[1,{"er":null}]},"\xc3\xbc":1.50')
    assert captured(line).endswith(b'"trace":{"deep":[1,{"er":null}]},"\xc3\xbc":1.50}')


def test_captured_event_begins_with_what_the_log_vouches_for() -> None:
    assert list(json.loads(captured(line_of()))) == [
        *("v", "kind", "seq", "src", "observed_ts", "ts", "actor", "action", "message")
    ]


@pytest.mark.parametrize(
    "line",
    [
        b'{"v":1,"ts":1,"kind":"narration","actor":"a","action":"b","message":"c","x":[1]}',
        line_of(b'\r"x":[1]'),
        line_of(b'"x":[1]') + b"\r",
    ],
    ids=["other order", "line end inside", "CRLF"],
)
def test_line_of_an_unusual_form_becomes_an_event_of_the_usual_one(line: bytes) -> None:
    assert decode_source_line(line) is not None
    event = captured(line)
    assert b"\r" not in event
    assert seq_and_kind(event) == (7, "narration")
    told = json.loads(event)
    assert told == json.loads(line) | {"seq": 7, "src": {"id": "worker-1/stdout", "offset": 42}, "observed_ts": 99}


@pytest.mark.parametrize(
    "line",
    [
        line_of(b'"seq":1'),
        line_of(b'"seq":null'),
        line_of(b'"\\u0073eq":1'),
        line_of(b'"src":{"id":"x","offset":0}'),
        line_of(b'"observed_ts":1'),
        line_of().replace(b'"narration"', b'"end"'),
        line_of().replace(b'"narration"', b'"state"'),
        line_of(b'"kind":"end"'),
        line_of(b'"kind":"token"', b'"text":"x"'),
        b'{"v":1,"kind":"token","ts":1,"text":"x","kind":"narration","actor":"a","action":"b","message":"c"}',
        line_of().replace(b'"v":1', b'"v":2'),
        line_of(b'"v":2'),
        line_of(message=b'"message":"c\rid: 9\revent: end\r"'),
        line_of(b'"x":"\xff"'),
        line_of(message=b'"message":"\xff"'),
        line_of(b'"x":NaN'),
        line_of(b'"x":' + b"[" * 100_000),
        line_of(b'"fields":null'),
        line_of(message=b'"message":null'),
        line_of(b'"job_id":7'),
        line_of().replace(b'"ts":1', b'"ts":1.5'),
        line_of().replace(b'"ts":1', b'"ts":-1'),
        line_of().replace(b'"ts":1', b'"ts":99999999999999999999'),
        line_of().replace(b'"a"', b'""'),
        line_of()[:-1],
        line_of() + b"x",
        b'{"v":1,"kind":"token","ts":1}',
        b" " + line_of(),
        b"[worker] say: hello",
        b"",
    ],
)
def test_line_that_is_forged_or_broken_is_no_event(line: bytes) -> None:
    assert decode_source_line(line) is None


def test_new_event_leaves_out_what_is_absent_and_keeps_the_order() -> None:
    event = new_event("state", {"ts": 5, "job_id": None, "state": "queued", "attempt": 0})
    assert event.numbered(1) == b'{"v":1,"kind":"state","seq":1,"ts":5,"state":"queued","attempt":0}'


def test_seq_and_kind_of_what_is_no_stored_event_raises() -> None:
    with pytest.raises(ValueError, match="not a stored event"):
        seq_and_kind(line_of())


@given(st.lists(st.text(), max_size=5), st.integers(1, 10**15))
def test_events_framed_all_at_once_are_framed_as_each_by_itself(texts: list[str], first: int) -> None:
    events = [
        new_event("narration", {"message": text, "more": '{"v":1,"kind":"token","seq":7,'}).numbered(seq)
        for seq, text in enumerate(texts, first)
    ]

    frames = frames_of(events, first)

    assert frames == b"".join(
        b"id: %d\nevent: narration\ndata: %b\n\n" % (seq, event) for seq, event in enumerate(events, first)
    )
    assert events_in(frames) == events
    for index in range(len(events) + 1):
        assert events_in(frames_from(frames, first + index)) == events[index:]
