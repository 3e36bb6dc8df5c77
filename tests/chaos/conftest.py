"""What the chaos tests share: their size, their seed, and a way to tell figures."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from msgspec import Struct

from tests.chaos.options import FIGURE


class Size(Struct, frozen=True):
    """How much of a test is run: a small part in every CI run, all of it by `make chaos`."""

    is_full: bool

    def of(self, small: int, full: int) -> int:
        """Return one of two numbers."""
        return full if self.is_full else small


@pytest.fixture
def size(pytestconfig: pytest.Config) -> Size:
    """Return how much is run."""
    return Size(is_full=bool(pytestconfig.option.chaos_full))


@pytest.fixture
def seed(pytestconfig: pytest.Config, request: pytest.FixtureRequest) -> int:
    """Return this test's own seed, which follows from the run's; each is printed with the figures."""
    return random.Random(f"{pytestconfig.option.chaos_seed} {request.node.name}").randrange(2**31)


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[[str, object], None]:
    """Return what adds one figure of this test to the table at the end: its name and its value."""

    def add(name: str, value: object) -> None:
        record_property(FIGURE, f"{name} | {value}")

    return add
