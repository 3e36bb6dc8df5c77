"""What one narrated event costs: six fields, in a context, written to a file when the call returns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.peers.install import PeersMissingError, peers_python
from benchmarks.report import Row, main, median

ROUNDS = 9
SMALL_ROUNDS = 3
EVENTS = 5_000
SMALL_EVENTS = 1_000
TIMES_THE_LIMIT = 1.5
TIMES_STRUCTLOG = 2.5

_SPEAK = Path(__file__).parent / "peers" / "speak.py"
_OWN = {
    "new_scopes": "the same, a scope for each event",
    "signs": "the same, signs that secrets have too",
    "secrets": "the same, a secret in each",
}
_PEERS = {
    "structlog": "structlog, bytes and orjson",
    "json_logging": "logging + python-json-logger",
    "loguru": "loguru, serialized",
}


class Side:
    """A process that says events into its own file."""

    def __init__(self, name: str, process: subprocess.Popen[str], path: Path) -> None:
        self.name = name
        self._process = process
        self._path = path
        self.rounds_ns: list[float] = []

    def speak(self, count: int) -> float:
        """Say so many events; returns the CPU nanoseconds of each. Ends the program when one is missing."""
        os.truncate(self._path, 0)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        event_ns = float(self._process.stdout.readline())
        self._check(count)
        return event_ns

    def _check(self, count: int) -> None:
        lines = self._path.read_bytes().splitlines()
        last = json.dumps(json.loads(lines[-1]))
        whole = all(word in last for word in (f'"completion_tokens": {count - 1}', '"job_id"', '"finish_reason"'))
        if len(lines) != count or not whole:
            sys.exit(f"{self.name} lost events: {len(lines)} of {count} lines; the last is {last}")


@contextmanager
def _side(name: str, python: Path | str, directory: Path) -> Iterator[Side]:
    path = directory / name
    path.touch()
    with subprocess.Popen(
        [python, str(_SPEAK), name, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield Side(name, process, path)
        finally:
            process.kill()


def measure(is_small: bool) -> Sequence[Row]:
    """Let every side speak in turn, a process each."""
    rounds, count = (SMALL_ROUNDS, SMALL_EVENTS) if is_small else (ROUNDS, EVENTS)
    missing = ""
    pythons: dict[str, Path | str] = dict.fromkeys(("limit", "rbee", *_OWN), sys.executable)
    try:
        pythons |= dict.fromkeys(_PEERS, peers_python("narration"))
    except PeersMissingError as error:
        missing = str(error)
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        sides = [stack.enter_context(_side(name, python, Path(directory))) for name, python in pythons.items()]
        for side in sides:
            side.speak(count)  # what is made once, and not for each event
        for _ in range(rounds):
            for side in sides:
                side.rounds_ns.append(side.speak(count))
    return _rows({side.name: side.rounds_ns for side in sides}, missing)


def _rows(spoken: dict[str, list[float]], missing: str) -> list[Row]:
    rows = [
        Row("msgspec encode + one write", _event(spoken["limit"])),
        _compared(
            "rbee narrate(), redacted", spoken["rbee"], spoken["limit"], "the limit", f"≤ {TIMES_THE_LIMIT}"
        ),
    ]
    rows += [_compared(title, spoken[name], spoken["limit"], "the limit", "") for name, title in _OWN.items()]
    if missing:
        return [*rows, Row("peers", "not measured", missing)]
    for name, title in _PEERS.items():
        wanted = f"≥ {TIMES_STRUCTLOG}" if name == "structlog" else ""
        rows.append(_compared(title, spoken[name], spoken["rbee"], "rbee", wanted))
    return rows


def _compared(name: str, taken: list[float], other: list[float], against: str, wanted: str) -> Row:
    ratio = median([one / two for one, two in zip(taken, other, strict=True)])
    return Row(name, _event(taken), against, ratio, wanted)


def _event(rounds_ns: list[float]) -> str:
    return f"{median(rounds_ns):,.0f} ns an event"


if __name__ == "__main__":
    main("Narration: CPU time of one event", measure)
