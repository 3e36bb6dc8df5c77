"""Which way a call is answered."""

from __future__ import annotations

from typing import Any

import pytest

from rbee.contracts.operations import ApiCall, ChatCompletion, Completion, Embedding, MessagesCall, ResponseCall
from rbee.errors import InvalidRequestError
from rbee.queen.call_ways import is_kept, is_narrated


@pytest.mark.parametrize("kind", [ChatCompletion, Completion, ResponseCall, MessagesCall])
def test_header_has_any_generating_call_kept(kind: type[ApiCall]) -> None:
    assert is_kept(kind, {}, {"x-rbee-keep": "1"})
    assert not is_kept(kind, {}, {"x-rbee-keep": "0"})
    assert not is_kept(kind, {}, {})


@pytest.mark.parametrize(
    ("kind", "body", "kept"),
    [
        (ResponseCall, {"store": True}, True),
        (ResponseCall, {"background": True}, True),
        (ResponseCall, {"store": False}, False),
        (ResponseCall, {"store": None, "background": False}, False),
        (ChatCompletion, {"store": True, "background": True}, False),
    ],
)
def test_response_that_is_to_be_stored_is_kept_and_nothing_else_is_by_its_body(
    kind: type[ApiCall], body: dict[str, Any], kept: bool
) -> None:
    assert is_kept(kind, body, {}) is kept


@pytest.mark.parametrize(
    ("kind", "body", "headers", "param"),
    [
        (ChatCompletion, {}, {"x-rbee-keep": "yes"}, "x-rbee-keep"),
        (Embedding, {}, {"x-rbee-keep": "1"}, "x-rbee-keep"),
        (ResponseCall, {"previous_response_id": "resp_1"}, {}, "previous_response_id"),
        (ResponseCall, {"background": True, "store": False}, {}, "store"),
        (ResponseCall, {"store": False}, {"x-rbee-keep": "1"}, "store"),
        (ChatCompletion, {"store": False}, {"x-rbee-keep": "1"}, "store"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    kind: type[ApiCall], body: dict[str, Any], headers: dict[str, str], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        is_kept(kind, body, headers)
    assert refused.value.param == param


def test_stream_tells_what_it_waits_for_only_where_that_is_asked() -> None:
    assert is_narrated({"x-rbee-narrate": "1"})
    assert not is_narrated({})
    with pytest.raises(InvalidRequestError):
        is_narrated({"x-rbee-narrate": "please"})
