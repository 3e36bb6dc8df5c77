"""A conversation: what was said goes with every question."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path

import pytest

from rbee.errors import InvalidRequestError
from rbee.keeper.cli import main
from rbee.keeper.conversation import Conversation
from tests.unit.keeper.small_queen import JOB_ID, SmallQueen, end, small_queen, token


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("RBEE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RBEE_HOME", str(tmp_path / "home"))


def chat(queen: SmallQueen, monkeypatch: pytest.MonkeyPatch, typed: str, *options: str) -> int:
    """Talk with a queen."""
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    return main(["chat", "--queen", queen.url, *options])


def test_question_carries_everything_said_before() -> None:
    """And an answer that never came is forgotten with its question."""
    conversation = Conversation(model="m", system="Be brief.")
    conversation.add("one", "1")
    conversation.add("two", "")
    asked = conversation.question("three")
    assert [(message.role, message.content) for message in asked.messages] == [
        ("user", "one"),
        ("assistant", "1"),
        ("user", "three"),
    ]
    assert (asked.model, asked.system) == ("m", "Be brief.")


def test_value_that_cannot_be_asked_is_refused() -> None:
    """Before anything is started."""
    with pytest.raises(InvalidRequestError, match="max_tokens"):
        Conversation(max_tokens=0).question("hi")


@pytest.mark.parametrize("last", ["/exit\nnot asked\n", ""])
def test_chat_answers_each_line_until_it_ends(
    last: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By /exit or the end of the input; empty lines ask nothing."""
    with small_queen(token("yes"), end()) as queen:
        assert chat(queen, monkeypatch, "hi\n\n" + last) == 0
    assert [asked["messages"] for asked in queen.submitted] == [[{"role": "user", "content": "hi"}]]
    assert capsys.readouterr().out == "yes\n"


def test_interrupt_cancels_the_answer_and_the_conversation_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was heard of the answer stays part of what was said."""
    interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)  # noqa: E731
    with small_queen(token("ye"), interrupt, "wait", end("cancelled")) as queen:
        assert chat(queen, monkeypatch, "hi\nmore\n") == 0
    assert queen.cancelled == [JOB_ID]
    assert queen.submitted[1]["messages"] == [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ye"},
        {"role": "user", "content": "more"},
    ]
