"""Identifiers sort by time, are told apart by kind, and a correlation id is a short plain word."""

from __future__ import annotations

import time
import uuid
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbee.contracts.ids import Kind, is_correlation_id, is_id, new_boot_id, new_correlation_id, new_id


@pytest.mark.parametrize("kind", get_args(Kind))
def test_new_id_is_an_id_of_its_kind_alone(kind: Kind) -> None:
    made = new_id(kind)
    assert len(made) == len(kind) + 1 + 26
    assert [other for other in get_args(Kind) if is_id(other, made)] == [kind]


def test_new_ids_of_later_milliseconds_sort_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1, 2, 1_000, 1_700_000_000_000, 1_700_000_000_001, 2**48 - 1])
    monkeypatch.setattr("time.time_ns", lambda: next(times) * 1_000_000)
    made = [new_id("job") for _ in range(6)]
    assert made == sorted(made)
    assert all(is_id("job", one) for one in made)


def test_new_ids_of_later_nanoseconds_of_one_millisecond_sort_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 1, 2, 1_000, 999_999])
    monkeypatch.setattr("time.time_ns", lambda: 1_700_000_000_000_000_000 + next(times))
    made = [new_id("job") for _ in range(5)]
    assert made == sorted(made)


def test_new_ids_of_one_millisecond_differ() -> None:
    assert len({new_id("job") for _ in range(5000)}) == 5000


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "job-",
            "job-" + "0" * 25,
            "job-" + "0" * 27,
            "job-" + "8" + "0" * 25,
            "job-" + "u" * 26,
            "job-" + "A" * 26,
        ),
        *("job-" + "0" * 26 + "\n", "queen-" + "0" * 26, "../" + "0" * 26),
    ],
)
def test_is_id_refuses_what_no_id_looks_like(text: str) -> None:
    assert not is_id("job", text)


@given(st.from_regex(r"\A[A-Za-z0-9._:-]{1,128}\Z"))
def test_correlation_id_of_the_accepted_form_is_taken(text: str) -> None:
    assert is_correlation_id(text)


@pytest.mark.parametrize("text", ["", " ", "a b", "a\n", "a" * 129, "é", "a/b", "a\x00", "a,b", "{}"])
def test_correlation_id_of_another_form_is_not_taken(text: str) -> None:
    assert not is_correlation_id(text)


def test_new_correlation_id_is_a_uuid_of_its_time_and_acceptable(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for millisecond in (1, 2, 2**47):
        monkeypatch.setattr(time, "time_ns", lambda at=millisecond: at * 1_000_000)
        made.append(new_correlation_id())
    assert made == sorted(made)
    for text in made:
        assert uuid.UUID(text).version == 7
        assert uuid.UUID(text).variant == uuid.RFC_4122
        assert is_correlation_id(text)


def test_boot_ids_differ() -> None:
    assert new_boot_id() != new_boot_id()
