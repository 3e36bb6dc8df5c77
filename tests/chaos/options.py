"""The options of the chaos tests, and the table of figures at the end of a run. For the conftest of all tests."""

from __future__ import annotations

import os
import random

import pytest

FIGURE = "figure"


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
