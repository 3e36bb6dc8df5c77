"""The counting engine's answer: a pure function, in llama.cpp's pieces, that goes on from any of its borders."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.testing.counting import Act, Count, Piece, answer_of, pieces
from rbee.testing.counting.frames import ChatFrames

COUNTS = st.builds(Count, first=st.integers(1, 120), last=st.integers(1, 160))
STOPS = st.lists(st.text("0123456789 ", min_size=1, max_size=3), max_size=2)


def test_prompt_says_all_that_a_count_is() -> None:
    """But for the canary, which is in the prompt and nowhere else."""
    acts: dict[int, Act] = {14: "sigkill", 16: "chatter"}
    count = Count(first=12, last=20, rate=7.5, acts=acts, claims="job-1", canary="a-canary")
    assert str(count).endswith(" a-canary")
    assert Count.read(str(count)) == msgspec.structs.replace(count, canary="")


def test_answer_is_the_numbers_up_to_the_limit() -> None:
    """Ended by the count, by the limit of tokens, and by a stop word, which is no part of it."""
    count = Count(first=8, last=12)
    assert answer_of(count) == "8 9 10 11 12"
    assert answer_of(count, max_tokens=3) == "8 9 10"
    assert answer_of(count, stop=["10"]) == "8 9 "
    assert list(pieces(count, max_tokens=1)) == [Piece("8", 1), Piece("", 1, "length")]


def test_beginning_of_a_stop_word_is_held_back_and_counted() -> None:
    """Until it is known not to be one."""
    held = list(pieces(Count(first=8, last=10), stop=["9 1x"]))
    assert held == [Piece("8", 1), Piece("", 2), Piece(" 9 10", 3), Piece("", 3, "stop")]


@given(COUNTS, STOPS, st.integers(1, 60), st.data())
def test_answer_continued_at_any_border_is_the_whole_answer(
    count: Count, stop: list[str], max_tokens: int, data: st.DataObject
) -> None:
    """With what was said as the prefill and the tokens made for it taken off the limit, as the queen does."""
    whole = list(pieces(count, max_tokens=max_tokens, stop=stop))
    said = [piece for piece in whole if piece.text and piece.finish_reason is None]
    cut = data.draw(st.integers(0, max(0, len(said) - 1)))
    text, made = "".join(piece.text for piece in said[:cut]), said[cut - 1].tokens if cut else 0
    if made < max_tokens:
        rest = pieces(count, said=text, max_tokens=max_tokens - made, stop=stop)
        assert text + "".join(piece.text for piece in rest) == answer_of(count, max_tokens=max_tokens, stop=stop)


def test_prefill_of_something_else_is_refused() -> None:
    """So a text that was repeated or lost on the way cannot be continued unnoticed."""
    with pytest.raises(ValueError, match="first tokens"):
        list(pieces(Count(first=8), said="8 9 9"))


def test_frames_have_the_form_of_llama_cpp() -> None:
    """The role with no content first, timings in each where asked for, the finish reason, the end."""
    frames = ChatFrames("m", 5, timings=True, usage=False)
    sent = b"".join(frames.of(piece) for piece in pieces(Count(first=1), max_tokens=2))
    lines = [line.removeprefix(b"data: ") for line in sent.strip().split(b"\n\n")]
    assert lines[-1] == b"[DONE]"
    chunks = [msgspec.json.decode(line) for line in lines[:-1]]
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": None},
        {"content": "1"},
        {"content": " 2"},
        {},
    ]
    assert [chunk.get("timings", {}).get("predicted_n") for chunk in chunks] == [None, 1, 2, 2]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
