"""Reading logs in end-to-end tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

MAIN_PATH = [
    "queen_receive",
    "queen_forward",
    "hive_receive",
    "worker_startup",
    "worker_load_model",
    "worker_ready",
    "worker_inference",
    "queen_complete",
]
MODEL = "smollm2:135m"
Event = dict[str, Any]


def actions(events: Sequence[Event]) -> list[str]:
    """Return the action words of a log, in order."""
    return [event["action"] for event in events if event["kind"] == "narration"]


def first(events: Sequence[Event], action: str) -> Event:
    """Return the first event with that action."""
    return next(event for event in events if event.get("action") == action)


def states(events: Sequence[Event]) -> list[str]:
    """Return the states a log tells of, the terminal one included."""
    return [event["state"] for event in events if event["kind"] in {"state", "end"}]


def answer(events: Sequence[Event]) -> str:
    """Put the answer together from its pieces."""
    return "".join(event["text"] for event in events if event["kind"] == "token" and event["channel"] == "answer")


def assert_whole(events: Sequence[Event]) -> None:
    """Check what holds for every log: numbered 1..n without holes, the end last and once."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["kind"] for event in events].count("end") == 1
    assert events[-1]["kind"] == "end"
    assert events[0]["kind"] == "state"
    assert events[0]["state"] == "queued"


def infer(prompt: str = "Tell a long story about a river.", **fields: Any) -> dict[str, Any]:
    """Make an `infer` operation for the demo model."""
    return {"operation": "infer", "model": MODEL, "prompt": prompt, "max_tokens": 8, "seed": 1, **fields}
