"""Columns and numbers as people read them."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest

from rbee.keeper.tables import ago, show_table, size


def test_table_off_a_terminal_is_aligned_columns() -> None:
    """None is a dash, control characters are dropped, lines carry no blanks at their end."""
    out = io.StringIO()
    show_table(("name", "n"), [("a\x1b[31mbc\n", 1), (None, 22)], out)
    assert out.getvalue() == "name  n\nabc   1\n-     22\n"


def test_table_without_rows_is_its_header() -> None:
    out = io.StringIO()
    show_table(("name", "n"), [], out)
    assert out.getvalue() == "name  n\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, None), (0, "0 B"), (999, "999 B"), (98_362_432, "98.4 MB"), (7 * 10**12, "7.0 TB")],
)
def test_size_is_written_with_its_unit(given: int | None, expected: str | None) -> None:
    assert size(given) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(-5, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (200_000, "2 d")]
)
def test_age_is_written_with_its_largest_unit(seconds: float, expected: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert ago(now - timedelta(seconds=seconds), now) == expected
