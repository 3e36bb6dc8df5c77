"""What must hold after any run, whatever was killed meanwhile. Each function raises AssertionError."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from rbee.contracts.views import JobView
from rbee.testing.reader import LogReader

TERMINAL = {"completed", "failed", "cancelled"}

Event = Mapping[str, Any]


class Told(Struct, frozen=True):
    """A job after its end: what it should say, how it is shown, and its whole log as bytes.

    Attributes:
        right: The one right answer.
        canary: A word of its prompt.
    """

    right: str
    canary: str
    view: JobView
    log: list[bytes]

    def events(self) -> list[dict[str, Any]]:
        """Decode the log."""
        return [msgspec.json.decode(event) for event in self.log]


def assert_ended_once(told: Told) -> None:
    """Check that a job reached exactly one terminal state, and is shown in it (O1)."""
    ends = [event for event in told.events() if event["kind"] == "end"]
    assert len(ends) == 1, f"{told.view.job_id} ended {len(ends)} times"
    assert ends[0]["state"] == told.view.state, f"{told.view.job_id}: the log says {ends[0]}, its view {told.view}"
    assert told.view.state in TERMINAL


def assert_dense(events: Sequence[Event]) -> None:
    """Check that a log is numbered 1..n, the end last (O2)."""
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["kind"] == "end"


def assert_saw_the_log(reader: LogReader, log: Sequence[bytes]) -> None:
    """Check that a reader saw, over all its connections, the log from its place on: in order, once (O3)."""
    place = f"a reader of {reader.job_id} from {reader.after}"
    expected = range(reader.after + 1, reader.after + 1 + len(reader.events))
    assert reader.order == list(expected), f"{place} got {reader.order}"
    seen = [reader.events[seq] for seq in expected]
    assert seen == list(log[reader.after : reader.after + len(seen)]), f"{place} saw other bytes"
    assert not reader.is_ended or reader.last_seq == len(log), f"{place} missed the last events"


def assert_private(texts: Iterable[str], canaries: Collection[str]) -> None:
    """Check that nothing of any prompt stands in any of these texts (O4)."""
    for text in texts:
        found = [canary for canary in canaries if canary in text]
        assert not found, f"the canary {found[0]} is in a log"


def assert_right(told: Told) -> None:
    """Check what was said: of a completed job the one right answer, of another its beginning or a gap (O4, O6)."""
    events, job_id = told.events(), told.view.job_id
    text = "".join(event["text"] for event in events if event["kind"] == "token" and event["channel"] == "answer")
    if told.view.state == "completed":
        assert text == told.right, f"{job_id} was answered {text!r}, not {told.right!r}"
        assert told.view.result is not None
        assert told.view.result["text"] == told.right
    elif not any(event["kind"] == "gap" for event in events):
        assert told.right.startswith(text), f"{job_id} said {text!r}, which is no beginning of {told.right!r}"


def assert_lawful(events: Sequence[Event]) -> None:
    """Check the order of a job's states: queued once, then running with rising attempts (O7)."""
    states = [(event["state"], event.get("attempt")) for event in events if event["kind"] == "state"]
    assert states[0][0] == "queued"
    assert {state for state, _ in states[1:]} <= {"running"}
    attempts = [int(attempt or 0) for _, attempt in states[1:]]
    assert all(before < after for before, after in itertools.pairwise(attempts)), attempts
    spoken = [event["attempt"] for event in events if event["kind"] == "token"]
    assert spoken == sorted(spoken), f"an older attempt spoke after a newer one: {spoken}"


def assert_all(told: Sequence[Told], readers: Iterable[LogReader]) -> None:
    """Check every job and every reader."""
    logs = {one.view.job_id: one.log for one in told}
    for one in told:
        events = one.events()
        assert_ended_once(one)
        assert_dense(events)
        assert_lawful(events)
        assert_right(one)
    for reader in readers:
        assert_saw_the_log(reader, logs[reader.job_id])
    whole = (event.decode("utf-8", "replace") for log in logs.values() for event in log)
    assert_private(whole, [one.canary for one in told if one.canary])


def assert_port_is_free(url: str) -> None:
    """Check that nobody listens at an address any more (O5)."""
    parts = urlsplit(url)
    with socket.socket() as sock:
        assert sock.connect_ex((parts.hostname, parts.port)) != 0, f"somebody still listens at {url}"
