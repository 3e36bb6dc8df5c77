"""What every benchmark shares: its size, and a table of measurements, each beside what it is compared with."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec import Struct


class Row(Struct, frozen=True):
    """One measurement.

    Attributes:
        name: What was measured.
        value: The number with its unit, as it is printed.
        against: What it is compared with, measured in the same run.
        ratio: The number by the other one.
        wanted: What the number or the ratio should be.
    """

    name: str
    value: str
    against: str = ""
    ratio: float | None = None
    wanted: str = ""


def median(values: Sequence[float]) -> float:
    """Return the middle value."""
    return percentile(values, 50)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def main(title: str, measure: Callable[[bool], Sequence[Row]]) -> None:
    """Run one benchmark as a program: `measure(is_small)` returns its rows.

    It ends with 1 only where something is wrong (an event is lost): never because the machine is slow.
    """
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--small", action="store_true", help="a size for every CI run; its numbers mean little")
    arguments = parser.parse_args()
    print(f"{title}\n{machine()}{' · small size' if arguments.small else ''}", flush=True)
    table = measure(arguments.small)
    names = [max([len(name), *(len(_cell(row, name)) for row in table)]) for name in Row.__struct_fields__]
    for row in [None, *table]:
        cells = [name if row is None else _cell(row, name) for name in Row.__struct_fields__]
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, names, strict=True)).rstrip())
    sys.stdout.flush()


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    if isinstance(value, float):
        return f"{value:.2f}"
    return "" if value is None else str(value)


def machine() -> str:
    """Say in one line what was measured and where."""
    root = Path(__file__).parent.parent
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip() or "no commit"
    load = os.getloadavg()[0]
    return (
        f"{commit} · {len(os.sched_getaffinity(0))} cores · Python {platform.python_version()} · "
        f"Linux {platform.release()} · load {load:.1f}"
    )
