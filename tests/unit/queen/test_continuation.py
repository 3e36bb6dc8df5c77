from __future__ import annotations

from typing import Any

import pytest

from rbee.contracts.operations import ApiCall, ChatCompletion, Infer, Message, MessagesCall, ResponseCall
from rbee.errors import WorkerLostError
from rbee.queen.continuation import Again, Asked, GiveUp, Whole, after_loss, asked_of, body_after
from rbee.queen.said import Said

LOST = WorkerLostError("The worker was ended by SIGKILL.", details={"signal": "SIGKILL"})


def said(*texts: str, attempt: int = 1, channel: str = "answer", **last: Any) -> Said:
    """Return an answer of such pieces, each of one token."""
    found = Said()
    for number, text in enumerate(texts, 1):
        more = last if number == len(texts) else {}
        found.take(
            {"ts": 7, "text": text, "tokens": number, "attempt": attempt, "channel": channel, **more},
        )
    return found


def ask(**values: Any) -> Asked:
    return asked_of(Infer(**({"prompt": "count"} | values)), None)


def test_answer_that_has_not_begun_is_asked_for_again_as_it_was() -> None:
    operation = ask(max_tokens=9)

    assert isinstance(after_loss(operation, said(""), LOST, used=1), Again)
    assert body_after(operation, said("")) == body_after(operation, Said())


def test_begun_answer_goes_on_from_its_text_with_the_tokens_that_are_left() -> None:
    operation = ask(max_tokens=9, system="Be short.", temperature=0.9, seed=3, stop=["x"])

    body = body_after(operation, said("one", " two"))

    assert body["messages"] == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "one two"},
    ]
    assert (body["max_tokens"], body["temperature"], body["seed"], body["stop"]) == (7, 0.9, 3, ["x"])
    assert body["stream"] is True


def test_callers_own_beginning_and_the_text_so_far_become_one_message() -> None:
    messages = [Message(role="user", content="count"), Message(role="assistant", content="zero ")]
    operation = ask(prompt=None, messages=messages)

    body = body_after(operation, said("one"))

    assert body["messages"] == [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "zero one"},
    ]


def test_tokens_of_all_attempts_count() -> None:
    so_far = said("one", " two")
    so_far.take({"ts": 8, "text": " three", "tokens": 1, "attempt": 2, "channel": "answer"})

    assert body_after(ask(max_tokens=9), so_far)["max_tokens"] == 6
    assert so_far.text == "one two three"


@pytest.mark.parametrize(
    ("operation", "so_far", "reason"),
    [
        (ask(max_tokens=2), said("one", " two"), "length"),
        (ask(), said("one", finish_reason="stop"), "stop"),
        (ask(attempts=1), said("one", finish_reason="stop"), "stop"),
    ],
)
def test_answer_that_only_lacks_its_closing_line_is_whole(operation: Asked, so_far: Said, reason: str) -> None:
    assert after_loss(operation, so_far, LOST, used=1) == Whole(reason)


def test_answer_with_a_hole_is_never_whole_nor_continued() -> None:
    so_far = said("one", finish_reason="stop")
    so_far.has_gap = True

    verdict = after_loss(ask(), so_far, LOST, used=1)

    assert isinstance(verdict, GiveUp)
    assert "a part of it is lost" in verdict.error.message


@pytest.mark.parametrize(
    ("operation", "so_far", "why"),
    [
        (ask(), said("hm", channel="reasoning"), "reasoning"),
        (
            ask(
                prompt=None,
                messages=[
                    Message(role="user", content="count"),
                    Message(role="assistant", content=[{"type": "text", "text": "a"}]),
                ],
            ),
            said("one"),
            "more than text",
        ),
    ],
)
def test_what_cannot_be_continued_faithfully_is_lost_and_says_why(
    operation: Asked, so_far: Said, why: str
) -> None:
    verdict = after_loss(operation, so_far, LOST, used=1)

    assert isinstance(verdict, GiveUp)
    assert (verdict.error.reason, verdict.error.details) == ("worker_lost", {"signal": "SIGKILL"})
    assert why in verdict.error.message
    assert verdict.error.message.startswith("The worker was ended by SIGKILL.")


def test_last_attempts_loss_is_the_jobs_end() -> None:
    assert after_loss(ask(attempts=3), said("one"), LOST, used=3) == GiveUp(LOST)


def test_number_with_a_point_is_a_number() -> None:
    """An engine takes `2.0` for 2: what is said counts towards it, and one of several is one of several."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}]}
    limited = Asked(path=ChatCompletion.path, body={**body, "max_tokens": 9.0}, attempts=2)
    several = Asked(path=ChatCompletion.path, body={**body, "n": 2.0}, attempts=2)
    switched = Asked(path=ChatCompletion.path, body={**body, "max_tokens": True}, attempts=2)

    assert body_after(limited, said("one", " two"))["max_tokens"] == 7
    assert isinstance(after_loss(several, said("one"), LOST, used=1), GiveUp)
    assert isinstance(after_loss(switched, said("one"), LOST, used=1), Again)


@pytest.mark.parametrize("limit", [{}, {"max_tokens": 2}])
def test_one_answer_of_several_that_has_ended_makes_no_whole(limit: dict[str, int]) -> None:
    """The others may lack anything; nor do the tokens of all of them together tell that each has its own."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}], "n": 2, **limit}
    asked = Asked(path=ChatCompletion.path, body=body, attempts=2)
    ending: dict[str, Any] = {} if limit else {"finish_reason": "stop"}

    verdict = after_loss(asked, said("one", " two", **ending), LOST, used=1)

    assert isinstance(verdict, GiveUp)
    assert "one of several" in verdict.error.message


@pytest.mark.parametrize("kind", [MessagesCall, ResponseCall])
def test_answer_in_events_is_whole_by_its_events_alone(kind: type[ApiCall]) -> None:
    """As many tokens as may be are not all: the events that close it are made by nobody else."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "count"}], "input": "count", "max_tokens": 2}
    asked = Asked(path=kind.path, body=body, attempts=2)

    assert isinstance(after_loss(asked, said("one", " two"), LOST, used=1), GiveUp)
    assert after_loss(asked, said("one", finish_reason="end_turn"), LOST, used=1) == Whole("end_turn")
