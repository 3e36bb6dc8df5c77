"""What must hold once everything has come to rest."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rbee.contracts.events import events_in
from rbee.contracts.operations import Infer, QueenCheck
from rbee.contracts.states import TERMINAL_STATES, JobState
from tests.chaos.simulation.answers import answer_to
from tests.chaos.simulation.callers import Call, faults_of
from tests.chaos.simulation.readers import Plan, Transcript

if TYPE_CHECKING:
    from tests.chaos.simulation.run import Simulation

NEVER = {
    "internal",
    "invalid",
    "model_not_found",
    "model_invalid",
    "download_failed",
    "overloaded",
    "queue_timeout",
    "first_token_timeout",
}


def stored_log(connection: sqlite3.Connection, job_id: str) -> list[bytes]:
    """Read a log off the file, as it stands."""
    rows = connection.execute("SELECT body FROM log_rows WHERE log_id = ? ORDER BY last_seq", (job_id,))
    return [line for (body,) in rows for line in events_in(body)]


def check(simulation: Simulation, database: Path) -> Iterator[str]:
    """Yield everything that does not hold."""
    connection = sqlite3.connect(database)
    connection.row_factory = sqlite3.Row
    try:
        known = {row["job_id"] for row in connection.execute("SELECT job_id FROM jobs")}
        for job_id, plan in simulation.accepted.items():
            if job_id not in known:
                yield f"{job_id} was accepted and is not there"
                continue
            for what in check_job(simulation, connection, job_id, plan):
                yield f"{job_id} ({plan.number}): {what}"
        for row in connection.execute("SELECT job_id, state, principal FROM jobs"):
            if JobState(row["state"]) not in TERMINAL_STATES and row["principal"] != "queen":
                yield f"{row['job_id']} is {row['state']}"
        yield from _check_worker_logs(connection)
        for call in simulation.calls:
            yield from faults_of(call)
            yield from _check_call(connection, call)
        for transcript in simulation.transcripts:
            yield from check_transcript(connection, transcript)
    finally:
        connection.close()
    yield from _at_rest(simulation)


def _check_worker_logs(connection: sqlite3.Connection) -> Iterator[str]:
    """Check that a worker's end is told behind everything that it said."""
    for (log_id,) in connection.execute("SELECT log_id FROM log_heads WHERE log_id LIKE 'worker-%'").fetchall():
        has_ended = False
        for event in map(json.loads, stored_log(connection, log_id)):
            if has_ended and event.get("src", {}).get("id", "").startswith(log_id):
                yield f"{log_id} spoke on behind its end (event {event['seq']})"
                break
            has_ended = has_ended or event.get("action") == "worker_exit"


def _check_call(connection: sqlite3.Connection, call: Call) -> Iterator[str]:
    """Check the log of a relayed call: its states and the end, none of the answer."""
    row = connection.execute("SELECT state, reason FROM jobs WHERE job_id = ?", (call.job_id,)).fetchone()
    if row is None:
        if call.job_id is not None:
            yield f"the call {call.job_id} is not there"
        return
    events = [json.loads(line) for line in stored_log(connection, call.job_id or "")]
    if [event["seq"] for event in events] != list(range(1, len(events) + 1)) or events[-1]["kind"] != "end":
        yield f"the log of the call {call.job_id} is not dense, or has no end"
    if any(event["kind"] == "token" for event in events):
        yield f"the log of the call {call.job_id} tells its answer"
    if row["reason"] in NEVER:
        yield f"the call {call.job_id} ended {row['state']}, {row['reason']}"


def check_job(simulation: Simulation, connection: sqlite3.Connection, job_id: str, plan: Plan) -> Iterator[str]:
    """Check one job: its record against its log."""
    row = connection.execute("SELECT * FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
    state, reason = row["state"], row["reason"]
    if reason in NEVER:
        yield f"ended {state}, {reason}: {row['message']}"
    if state == "cancelled" and job_id not in simulation.cancelled:
        yield "was cancelled, and nobody had asked for it"
    if reason == "timeout" and plan.operation.timeout_s is None:
        yield "ran into a deadline that it does not have"
    if reason == "queen_lost" and isinstance(plan.operation, Infer):
        yield "a kept answer was given up at a queen's start"
    if row["is_stored"]:
        lines = stored_log(connection, job_id)
        yield from check_log([json.loads(line) for line in lines], state, plan)
        yield from _check_result(row, plan)


def check_log(events: list[dict[str, Any]], state: str, plan: Plan) -> Iterator[str]:
    """Check that a log is dense, that its end is last and once, and whose words stand in it."""
    if [event["seq"] for event in events] != list(range(1, len(events) + 1)):
        yield "its log is not dense"
    ends = [event for event in events if event["kind"] == "end"]
    if len(ends) != 1 or events[-1]["kind"] != "end":
        yield f"its log has {len(ends)} ends, and closes with {events[-1]['kind'] if events else 'nothing'}"
    elif ends[0]["state"] != state:
        yield f"its log ends {ends[0]['state']}, its record is {state}"
    yield from _check_attempts(events)
    if isinstance(plan.operation, Infer):
        yield from _check_words(events, state, plan.operation)
    elif isinstance(plan.operation, QueenCheck) and state == "completed":
        said = sum(event.get("action") == "queen_check" for event in events)
        if said != plan.operation.lines:
            yield f"it said {said} of {plan.operation.lines} sentences"


def _check_attempts(events: list[dict[str, Any]]) -> Iterator[str]:
    attempt = 0
    sources: dict[tuple[str, int], int] = {}
    for event in events:
        if event["kind"] == "state" and event["state"] == "running":
            if event["attempt"] != attempt + 1:
                yield f"attempt {event['attempt']} came after attempt {attempt}"
            attempt = event["attempt"]
        if event["kind"] == "token" and event["attempt"] != attempt:
            yield f"a token of attempt {event['attempt']} stands in attempt {attempt} (event {event['seq']})"
        if "src" in event:
            place = (event["src"]["id"], event["src"]["offset"])
            if place in sources:
                yield f"the line at {place} stands there twice"
            sources[place] = event["seq"]


def _check_words(events: list[dict[str, Any]], state: str, operation: Infer) -> Iterator[str]:
    assert operation.prompt is not None
    right = answer_to(operation.prompt, operation.max_tokens)
    said = "".join(event["text"] for event in events if event["kind"] == "token")
    if state == "completed" and said != right:
        yield f"completed with {said[-60:]!r} of {len(said)} characters, not {right[-60:]!r} of {len(right)}"
    elif not right.startswith(said):
        yield f"it said {said[-60:]!r}, which is no beginning of the answer"


def _check_result(row: sqlite3.Row, plan: Plan) -> Iterator[str]:
    if row["state"] == "completed" and isinstance(plan.operation, Infer):
        assert plan.operation.prompt is not None
        right = answer_to(plan.operation.prompt, plan.operation.max_tokens)
        found = json.loads(row["result"])["text"]
        if found != right:
            yield f"its result is {found[-60:]!r}, not {right[-60:]!r}"


def check_transcript(connection: sqlite3.Connection, transcript: Transcript) -> Iterator[str]:
    """Check that a reader saw a log's beginning, byte for byte, and to its end."""
    row = connection.execute("SELECT is_stored FROM jobs WHERE job_id = ?", (transcript.job_id,)).fetchone()
    if row is None:
        return
    if not row["is_stored"]:
        return
    lines = stored_log(connection, transcript.job_id)
    if lines[: len(transcript.lines)] != transcript.lines:
        yield f"a reader of {transcript.job_id} saw something else than stands in its log"
    if transcript.is_gone:
        yield f"a reader of {transcript.job_id} was told that it is gone"
    elif not transcript.has_seen_end:
        yield f"a reader of {transcript.job_id} has not seen the end ({transcript.last_seq} of {len(lines)})"


def _at_rest(simulation: Simulation) -> Iterator[str]:
    cluster = simulation.cluster
    for store in cluster.queen_stores:
        yield from store.faults
    queen = cluster.queen
    if queen is None:
        yield "no queen lives"
        return
    if running := sorted(simulation.accepted.keys() & queen.runner.running.keys()):
        yield f"the queen still runs {running}"
    for machine, computer in cluster.computers.items():
        hive = cluster.hives.get(machine.name)
        if hive is None:
            yield f"no hive lives on {machine.name}"
            continue
        known = {info.worker_id for info in hive.workers.infos()}
        for process in computer.living():
            worker_id = process.spec.env["RBEE_WORKER_ID"]
            if worker_id not in known:
                yield f"{worker_id} lives on {machine.name} and its hive does not know it"
            if queen.workers.slots_used(worker_id):
                yield f"a slot of {worker_id} is still taken"
            desk = simulation.desks.get(process.process)
            if desk is not None and desk.slots_used:
                yield f"{worker_id} still answers {desk.slots_used} requests that nobody waits for"
