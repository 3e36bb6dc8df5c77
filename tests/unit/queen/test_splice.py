"""One response of any number of attempts."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.dialects import DIALECTS
from rbee.errors import WorkerLostError
from rbee.queen.continuation import Again, Asked, Whole, after_loss, body_after, has_all_tokens
from rbee.queen.splice import Splice
from tests.unit.queen.scripted_engine import ANSWER, DONE, PROMPT_TOKENS, frames_of

CHAT = DIALECTS["/v1/chat/completions"]
USER = {"role": "user", "content": "count"}
USAGE = {"stream_options": {"include_usage": True}}


@given(
    cuts=st.lists(st.integers(0, len(ANSWER) + 4), max_size=5),
    limit=st.none() | st.integers(1, len(ANSWER)),
    given_words=st.integers(0, 2),
)
def test_answer_of_many_attempts_is_the_answer_of_one(
    cuts: list[int], limit: int | None, given_words: int
) -> None:
    """However often it is cut, and wherever: the same words, one role, one finish, the counts of one attempt."""
    begun = [{"role": "assistant", "content": "".join(ANSWER[:given_words])}] if given_words else []
    body: dict[str, Any] = {"messages": [USER, *begun], "stream": True, **USAGE}
    body |= {"max_tokens": limit} if limit else {}
    asked = Asked(path=CHAT.path, body=body, attempts=100)
    splice, chunks = Splice(CHAT), []
    for attempt, cut in enumerate([*cuts, 100], 1):
        if attempt > 1:
            verdict = after_loss(asked, splice.said, WorkerLostError(), used=1)
            if isinstance(verdict, Whole) and splice.is_usage_told:
                break
            assert isinstance(verdict, (Again, Whole))
            splice.is_full = has_all_tokens(asked, splice.said) or isinstance(verdict, Whole)
        for frame in frames_of(body_after(asked, splice.said))[:cut]:
            if frame != DONE:
                made = splice.hear(msgspec.json.decode(frame.removeprefix(b"data: ")), attempt)
                chunks += [] if made is None else [made]

    parts = [part for chunk in chunks for part in chunk["choices"]]
    wanted = ANSWER[given_words:][:limit]
    assert "".join(part["delta"].get("content") or "" for part in parts) == "".join(wanted)
    assert [part["delta"]["role"] for part in parts if "role" in part["delta"]] == ["assistant"]
    is_whole = given_words + len(wanted) == len(ANSWER) and len(wanted) < (limit or 1000)
    assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["stop" if is_whole else "length"]
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    [usage] = [chunk["usage"] for chunk in chunks if "usage" in chunk]
    counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    prompt = PROMPT_TOKENS + given_words
    assert counts == (prompt, len(wanted), prompt + len(wanted))
