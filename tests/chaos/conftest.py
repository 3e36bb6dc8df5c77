"""What the chaos tests share: their size, their seed, and the table of figures at the end of a run."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
from msgspec import Struct

FIGURE = "figure"


class Size(Struct, frozen=True):
    """How much of a test is run: a small part in every CI run, all of it by `make chaos`."""

    is_full: bool

    def of(self, small: int, full: int) -> int:
        """Return one of two numbers."""
        return full if self.is_full else small


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the size and the seed."""
    group = parser.getgroup("chaos")
    group.addoption("--chaos-full", action="store_true", help="run the chaos tests in full size")
    group.addoption("--chaos-seed", type=int, help="repeat a run: the seed that it printed")


def pytest_configure(config: pytest.Config) -> None:
    """Choose one seed for the whole run, in CI always the same; parallel workers are told it."""
    if hasattr(config, "workerinput"):
        config.option.chaos_seed = config.workerinput["chaos_seed"]
    elif config.option.chaos_seed is None:
        config.option.chaos_seed = 1 if "CI" in os.environ else random.SystemRandom().randrange(2**31)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: object) -> None:
    """Tell a parallel worker the seed."""
    node.workerinput["chaos_seed"] = node.config.option.chaos_seed  # type: ignore[attr-defined]


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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print every figure of the run, and the seed that repeats it."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [
        (report.nodeid.split("::")[-1], *str(value).split(" | ", 1))
        for report in reports
        if report.when == "call"
        for name, value in report.user_properties
        if name == FIGURE
    ]
    if not rows:
        return
    terminalreporter.section(f"chaos figures (--chaos-seed {config.option.chaos_seed})")
    for test, name, value in sorted(rows, key=lambda row: row[0]):
        terminalreporter.write_line(f"{test:<60} {name:<40} {value}")
