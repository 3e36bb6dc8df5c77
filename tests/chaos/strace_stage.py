"""Programs under `strace`, which kills them, or has a system call fail, at a place that is counted out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest
from msgspec import Struct

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
_CALL = re.compile(r"^(\d+) +([a-z0-9_]+)\(")


class Point(Struct, frozen=True):
    """One system call of a thread's life: the `number`-th of its kind in that thread."""

    call: str
    number: int


@cache
def _why_not() -> str | None:
    """Return why nothing can be traced here."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with tempfile.NamedTemporaryFile() as log:
        tried = subprocess.run(
            ["strace", "-f", "-qq", "-o", log.name, "-e", "inject=fsync:signal=KILL:when=9", "true"],
            capture_output=True,
            text=True,
            check=False,
        )
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()[:200]}"


def require_strace() -> None:
    """Skip the test where programs cannot be traced."""
    if reason := _why_not():
        pytest.skip(reason)


def traced(log: Path, inject: str, paths: Sequence[Path], command: Sequence[str]) -> list[str]:
    """Return the command line that runs `command` with faults.

    Args:
        log: Where strace writes what it saw.
        inject: What is to happen: `pwrite64,fsync:signal=KILL:when=3`.
        paths: Only calls on these files count; all files when empty.
        command: The program.
    """
    only = [word for path in paths for word in ("-P", str(path))]
    return ["strace", "-f", "-qq", "-o", str(log), *only, "-e", f"inject={inject}", *command]


def module(name: str, *arguments: str) -> list[str]:
    """Return the command line of a program of these tests."""
    return [sys.executable, "-m", f"tests.chaos.{name}", *arguments]


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, which may be a kill."""
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def counted(log: Path, calls: Sequence[str]) -> list[Point]:
    """Return every point of a run that was traced without a fault: strace counts each thread for itself."""
    by_thread: Counter[tuple[str, str]] = Counter()
    for line in log.read_text("utf-8", "replace").splitlines():
        if (found := _CALL.match(line)) and found[2] in calls:
            by_thread[found[1], found[2]] += 1
    most: dict[str, int] = {}
    for (_, call), number in by_thread.items():
        most[call] = max(most.get(call, 0), number)
    return [Point(call, number) for call in calls for number in range(1, most.get(call, 0) + 1)]
