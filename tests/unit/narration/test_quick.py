"""The quick way to a line gives what the careful one gives, byte for byte, or leaves it to that one."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.narration import ListSink, Narration, configure, narrate, quick, scope
from rbee.narration.emit import compose
from rbee.narration.lines import encode_narration
from rbee.narration.scope import current_place
from rbee.narration.testing import captured_narration


@pytest.fixture(autouse=True)
def said() -> Iterator[ListSink]:
    with captured_narration("tester") as sink:
        yield sink


def careful(line: bytes) -> bytes:
    """Say the same event again, the careful way; only `ts` is taken from the line."""
    return encode_narration(msgspec.convert(msgspec.json.decode(line), Narration))


class Word(StrEnum):
    STOP = "stop"


class Secret:
    def __repr__(self) -> str:
        return "Secret(token='CANARY-7f3a')"


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("", {}),
        ("Answered with 12 tokens.", {"outcome": "completed", "prompt_tokens": 35, "rate": 118.25, "cut": False}),
        ('Tab\tnewline\n quote " backslash \\ é 🐝', {"text": "é\n", "none": None}),
        ("Listening on http://127.0.0.1:8500/v1", {"url": "http://127.0.0.1:8500", "n": float("nan")}),
        ("Basic", {"a": 2**70, "b": "bears, and a basic_auth"}),
    ],
)
@pytest.mark.parametrize("names", [{}, {"job_id": "job-1", "correlation_id": "c:1.2-3", "model": "smollm2:135m"}])
def test_quick_ordinary_event_is_the_careful_one(
    message: str, fields: dict[str, Any], names: dict[str, str]
) -> None:
    with scope(**names):
        line = compose("say", message, attempt=2, **fields)
        assert line == careful(line)
        assert quick.quick_line(_speaker(), "say", message, 2, fields) is not None


def _speaker() -> object:
    return current_place().prepared.speaker


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("token: CANARY-7f3a", {}),
        ("Said", {"password": "CANARY-7f3a"}),
        ("Said", {"why": "Authorization: Bearer CANARY-7f3a"}),
        ("Said", {"why": ["api_key=CANARY-7f3a"]}),
        ("Said", {"why": {"secret": "CANARY-7f3a"}}),
        ("Said", {"why": Secret()}),
        ("Said", {'a"b password': "CANARY-7f3a"}),
        ("Key\nsk-CANARY-7f3a", {}),
        ("Asked with bearer CANARY-7f3a", {}),
        ("Asked with\u00e9bearer\u00e9 bEaReR CANARY-7f3a", {}),
        ("GET https://ann:CANARY-7f3a@host/v1", {}),
    ],
)
def test_narrate_secret_never_takes_the_quick_way(said: ListSink, message: str, fields: dict[str, Any]) -> None:
    narrate("say", "Before", ordinary=1)
    narrate("say", message, **fields)
    assert len(said.events) == 2
    assert b"CANARY" not in msgspec.json.encode(said.events)


@pytest.mark.parametrize("name", ["job_id", "correlation_id", "model", "actor"])
def test_narrate_secret_in_a_name_of_the_scope_is_masked(said: ListSink, name: str) -> None:
    with scope(**{name: "sk-CANARY-7f3a"}):
        narrate("say", "Hello")
        narrate("say", "Hello", n=1)
    assert b"CANARY" not in msgspec.json.encode(said.events)


_PIECES = "password|token|api_key|secret|bearer |basic |://|@|sk-|\"|'|\\|:|=| |\n|a1B2c3d4e5|,|{|}|é|\x00|hf_|/|-"
_WORDS = st.lists(st.sampled_from([*_PIECES.split("|"), "ghs_", "xoxb-"]), max_size=8).map("".join)
_VALUES = st.recursive(
    _WORDS | st.integers() | st.none() | st.floats() | st.booleans() | st.text(max_size=8), st.lists, max_leaves=3
)


@given(_WORDS, st.dictionaries(_WORDS | st.sampled_from(["n", "max_tokens", "text"]), _VALUES, max_size=4), _WORDS)
def test_quick_any_event_is_the_careful_one_or_left_to_it(message: str, fields: dict[str, Any], name: str) -> None:
    with scope(correlation_id=name):
        compose("say", "Hello")  # prepares the scope
        line = quick.quick_line(_speaker(), "say", message, None, fields)
        if line is not None:
            event = msgspec.json.decode(line)
            assert line == encode_narration(
                Narration(
                    v=1,
                    kind="narration",
                    ts=event["ts"],
                    actor="tester",
                    correlation_id=name,
                    action="say",
                    message=message,
                    fields=fields or None,
                )
            )


@pytest.mark.parametrize("attempt", [None, 0, 3])
def test_narrate_words_of_unusual_types_come_out_as_they_always_did(said: ListSink, attempt: int | None) -> None:
    narrate("say", Word.STOP, attempt=attempt, reason=Word.STOP)
    event = said.events[0]
    assert (event["message"], event["fields"], event.get("attempt")) == ("stop", {"reason": "stop"}, attempt)


def test_narrate_after_configure_speaks_as_the_new_one_in_the_same_scope(said: ListSink) -> None:
    with scope(job_id="job-1"):
        narrate("a", "")
        configure(actor="other", sink=said, hive_id="hive-1")
        narrate("b", "")
        narrate("c", "")
    assert [(event["actor"], event.get("hive_id")) for event in said.events] == [
        ("tester", None),
        ("other", "hive-1"),
        ("other", "hive-1"),
    ]


def test_narrate_more_names_than_are_remembered_are_still_all_said(
    said: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quick, "MAX_PLAIN_WORDS", 5)
    for number in range(20):
        fields: dict[str, Any] = {f"field{number}": number, "n": 1}
        narrate("say", "Hello", **fields)
    assert [event["fields"] for event in said.events] == [{f"field{n}": n, "n": 1} for n in range(20)]
