"""The numbers of the closing line, from each form in which an engine tells them."""

from __future__ import annotations

from typing import Any

from rbee.worker.tally import Tally


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def timings(predicted: int, *, cached: int = 30, prompt: int = 2, rate: float = 50.0) -> dict[str, Any]:
    """Make the engine's timings."""
    return {"cache_n": cached, "prompt_n": prompt, "predicted_n": predicted, "predicted_per_second": rate}


def test_chat_stream_is_counted_by_its_last_timings() -> None:
    """Each chunk's timings replace those before."""
    tally = Tally()
    for tokens in (1, 2, 3):
        tally.observe({"choices": [{"index": 0, "delta": {}}], "timings": timings(tokens)})
    tally.observe({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
    assert tally.fields() == {
        "prompt_tokens": 32,
        "completion_tokens": 3,
        "time_to_first_token_s": None,
        "tokens_per_s": 50.0,
        "finish_reason": "length",
    }


def test_usage_chunks_of_several_choices_are_added() -> None:
    """With `include_usage` the timings come without an index, one chunk a choice; the prompt counts once."""
    tally = Tally(choices=2)
    tally.observe({"choices": [], "usage": {"completion_tokens": 3}, "timings": timings(3)})
    tally.observe({"choices": [], "usage": {"completion_tokens": 4}, "timings": timings(4)})
    assert (tally.prompt_tokens, tally.completion_tokens) == (32, 7)


def test_several_prompts_are_added() -> None:
    """Each prompt of a list counts."""
    tally = Tally()
    for index in (0, 1):
        tally.observe({"choices": [{"index": index, "finish_reason": "stop"}], "timings": timings(1)})
    assert (tally.prompt_tokens, tally.completion_tokens) == (64, 2)


def test_anthropic_usage_counts_what_was_cached() -> None:
    """There are no timings; input and cache are told apart there, and both are the prompt."""
    clock = Clock()
    tally = Tally(clock=clock)
    clock.now_s += 0.5
    tally.note_arrival()
    tally.observe(
        {"type": "message_start", "message": {"usage": {"cache_read_input_tokens": 24, "input_tokens": 8}}}
    )
    clock.now_s += 2.0
    tally.note_arrival()
    tally.observe({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}})
    assert tally.fields() == {
        "prompt_tokens": 32,
        "completion_tokens": 5,
        "time_to_first_token_s": 0.5,
        "tokens_per_s": 2.0,
        "finish_reason": "end_turn",
    }


def test_responses_usage_is_that_of_the_last_event() -> None:
    """The response carries its own usage and status."""
    tally = Tally()
    tally.observe({"type": "response.created", "response": {"status": "in_progress"}})
    assert tally.finish_reason is None
    used = {"input_tokens": 32, "output_tokens": 3, "input_tokens_details": {"cached_tokens": 0}}
    tally.observe({"type": "response.completed", "response": {"status": "completed", "usage": used}})
    numbers = tally.fields()
    assert (numbers["prompt_tokens"], numbers["completion_tokens"]) == (32, 3)
    assert numbers["finish_reason"] == "completed"


def test_broken_off_answer_counts_the_pieces_that_came() -> None:
    """Where no number ever came, each piece of text was a token at least."""
    tally = Tally()
    assert tally.completion_tokens is None
    tally.note_delta()
    tally.note_delta()
    assert tally.completion_tokens == 2


def test_frames_are_told_of_kept_requests_only() -> None:
    """A relayed request writes no token lines."""
    tally = Tally()
    assert "frames" not in tally.fields()
    tally.frames = 0
    assert tally.fields()["frames"] == 0
