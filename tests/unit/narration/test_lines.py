"""The two written forms of an event: what is encoded, what is cut, what is drawn and read back."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.events import MAX_LINE_BYTES, decode_source_line
from rbee.narration import Narration, format_bracket, parse_bracket
from rbee.narration.lines import encode_narration, plain_text


def narration(message: Any = "Hello", **values: Any) -> Narration:
    words = {"actor": "worker", "action": "worker_say", "message": message, **values}
    return Narration(v=1, kind="narration", ts=1, **words)


def encoded(message: Any = "Hello", **values: Any) -> dict[str, Any]:
    line = encode_narration(narration(message, **values))
    assert b"\n" not in line
    assert len(line) < MAX_LINE_BYTES
    assert decode_source_line(line) is not None
    decoded: dict[str, Any] = json.loads(line)
    return decoded


def test_encode_fields_stand_in_a_fixed_order_and_absent_ones_are_left_out() -> None:
    assert list(encoded(job_id="job-1", fields={"n": 1})) == [
        *("v", "kind", "ts", "actor", "job_id", "action", "message", "fields")
    ]


class Grumpy:
    def __repr__(self) -> str:
        raise KeyError("no")


def circle() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


def test_encode_field_json_cannot_hold_becomes_text_and_its_neighbours_stay() -> None:
    fields = encoded(
        fields={"circle": circle(), "grumpy": Grumpy(), "pair": {(1, 2): 3}, "lone": "\ud800", "n": 5, "x": [1.5]}
    )["fields"]
    assert fields == {
        "circle": "{'self': {...}}",
        "grumpy": "<Grumpy>",
        "pair": {"(1, 2)": 3},
        "lone": r"'\ud800'",
        "n": 5,
        "x": [1.5],
    }


def test_encode_number_json_has_no_word_for_becomes_null() -> None:
    assert encoded(fields={"a": float("nan"), "b": float("-inf"), "c": 2**70})["fields"] == {
        "a": None,
        "b": None,
        "c": 2**70,
    }


def test_encode_bytes_become_base64() -> None:
    assert encoded(fields={"data": b"\x00\xff"})["fields"] == {"data": "AP8="}


def test_encode_message_that_is_no_string_becomes_text() -> None:
    assert encoded(Grumpy())["message"] == "<Grumpy>"
    assert encoded(ValueError("why"))["message"] == "ValueError('why')"


@pytest.mark.parametrize(
    "message", ["tab\tand\r\nend", "NUL \x00 ESC \x1b[2J", 'quote " and \\', "🐝 ünï", "", "\u2028"]
)
def test_encode_any_character_travels_in_one_line(message: str) -> None:
    assert encoded(message)["message"] == message


def test_encode_lone_surrogate_in_words_is_replaced() -> None:
    assert encoded("a\ud800b", model="m\udfff")["message"] == "a?b"


@pytest.mark.parametrize("character", ["a", "\x00", "🐝", '"', "\ud800", "\x7f"])
def test_encode_event_that_is_too_long_is_cut_and_says_so(character: str) -> None:
    long = character * (1024 * 1024)
    event = encoded(long, actor=long, job_id=long, correlation_id=long, model=long, fields={"payload": long})
    assert event["fields"]["shortened_from_bytes"] > 1024 * 1024
    assert event["action"] == "worker_say"


def test_encode_event_that_masks_make_too_long_is_cut_too() -> None:
    secrets = {f"password_{number}": "" for number in range(880)}
    plain = len(msgspec.json.encode(narration(fields=secrets)))
    assert plain < MAX_LINE_BYTES < plain + 3 * len(secrets)
    assert encoded(fields=secrets)["fields"] == {"shortened_from_bytes": plain}


_VALUES = st.recursive(st.none() | st.text() | st.floats() | st.binary(), st.lists, max_leaves=5)


@given(st.dictionaries(st.text(max_size=8), _VALUES))
def test_encode_any_fields_give_one_line_that_capture_accepts(fields: dict[str, Any]) -> None:
    encoded(fields=fields)


_NAME = st.from_regex(re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII), fullmatch=True)
_SENTENCE = st.text(st.characters(exclude_categories=["Cs", "Cc"])).filter(lambda text: text == text.strip())


@given(_NAME, _NAME, _SENTENCE)
def test_bracket_form_round_trips(actor: str, action: str, message: str) -> None:
    drawn = format_bracket({"actor": actor, "action": action, "message": message})
    assert parse_bracket(drawn.encode()) == (actor, action, message)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"[a] b:c", ("a", "b", "c")),
        (b"  [my-actor   ]   my_action  :  x: y ]", ("my-actor", "my_action", " x: y ]")),
        ("[w] say: 🐝".encode(), ("w", "say", "🐝")),
        (b"[w] say: \xff", ("w", "say", "\ufffd")),
        (b"[w] say:", ("w", "say", "")),
        (b"random text", None),
        (b"[w] no colon", None),
        (b"w say: x", None),
        (b"[] say: x", None),
        (b"[w]say: x", None),
        (b"[12:00:01] INFO: x", None),
        (b"", None),
    ],
)
def test_parse_bracket_reads_the_form_and_nothing_else(line: bytes, expected: tuple[str, str, str] | None) -> None:
    assert parse_bracket(line) == expected


def test_format_bracket_pads_the_actor_and_draws_the_message() -> None:
    event = {"actor": "worker", "action": "worker_ready", "message": "Loaded"}
    assert format_bracket(event) == "[worker    ] worker_ready: Loaded"


def test_format_bracket_hostile_event_draws_one_harmless_line() -> None:
    drawn = format_bracket(
        {
            "actor": "a\n[queen     ] queen_complete",
            "action": "b\x1b[2J",
            "message": "\x1b]0;title\x07red \x1b[31mtext\x1b[0m\r\nnext \x9b31m \x1b\x1b[31m[1m end\x00",
        }
    )
    assert drawn == "[a [queen     ] queen_complete] b: red text next 31m [1m end"


def test_format_bracket_missing_words_are_empty() -> None:
    assert format_bracket({"message": None}) == "[          ] : "


@given(st.text())
def test_plain_text_has_no_control_character_left_but_tab_and_newline(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", plain_text(text))
