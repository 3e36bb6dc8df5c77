from __future__ import annotations

from typing import Any

import msgspec
import pytest

from rbee.contracts.events import NewEvent
from rbee.contracts.ids import new_id
from rbee.contracts.stretches import Piece
from rbee.queen.claims import Speaker, hear, is_file_of_hive, lost_stretch

WORKER, HIVE, JOB, OTHER = new_id("worker"), new_id("hive"), new_id("job"), new_id("job")
SECRET = "the prompt of somebody else"


def stdout(placed: dict[str, int] | None = None, started_for: str | None = None) -> Speaker:
    return Speaker(f"{WORKER}/stdout", WORKER, is_hive=False, placed=placed or {}, started_for=started_for)


def hive_file(*handed: str) -> Speaker:
    return Speaker(f"{HIVE}/boot", HIVE, is_hive=True, handed=handed)


def line(kind: str = "narration", **fields: Any) -> bytes:
    said = {"actor": "worker", "action": "worker_say", "message": SECRET} if kind == "narration" else {}
    return msgspec.json.encode({"v": 1, "kind": kind, "ts": 5, **said, **fields})


def token(**fields: Any) -> bytes:
    return line("token", actor="worker", text=SECRET, tokens=1, channel="answer", **fields)


def decoded(event: NewEvent) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode(event.numbered(1))
    return found


def heard_by(speaker: Speaker, data: bytes) -> tuple[str, dict[str, Any], bool]:
    heard = hear(Piece(100, data), speaker, 7)
    return heard.entry.log_id, decoded(heard.entry.event), heard.line is not None


def test_line_of_the_placed_attempt_goes_to_the_job_with_its_source() -> None:
    log_id, event, is_believed = heard_by(stdout({JOB: 2}), token(job_id=JOB, attempt=2, more={"kept": 1}))

    assert (log_id, is_believed) == (JOB, True)
    assert event["text"] == SECRET
    assert event["src"] == {"id": f"{WORKER}/stdout", "offset": 100}
    assert event["observed_ts"] == 7
    assert event["more"] == {"kept": 1}


@pytest.mark.parametrize(
    ("placed", "started_for", "data"),
    [
        ({}, None, token(job_id=OTHER, attempt=1)),
        ({JOB: 1}, JOB, token(job_id=OTHER, attempt=1)),
        ({JOB: 2}, None, token(job_id=JOB, attempt=1)),
        ({JOB: 2}, None, token(job_id=JOB, attempt=3)),
        ({JOB: 2}, JOB, token(job_id=JOB)),
        ({}, JOB, line(job_id=JOB, attempt=1)),
        ({}, JOB, token(job_id=JOB, attempt=1)),
        ({}, None, line(job_id=HIVE)),
        ({}, None, line(job_id=new_id("worker"))),
        ({JOB: 1}, None, line(job_id="")),
    ],
    ids=[
        "a job it does not have",
        "another job than its own",
        "an older attempt",
        "a later attempt",
        "a token without an attempt",
        "an attempt at the job it was started for",
        "a token of the job it was started for",
        "a hive's log",
        "another worker's log",
        "an empty id",
    ],
)
def test_forged_line_goes_to_the_worker_without_its_text(
    placed: dict[str, int], started_for: str | None, data: bytes
) -> None:
    heard = hear(Piece(100, data), stdout(placed, started_for), 7)
    event = decoded(heard.entry.event)

    assert heard.entry.log_id == WORKER
    assert heard.line is None
    assert SECRET.encode() not in heard.entry.event.tail
    assert event["action"] == "queen_refuse_line"
    assert event["fields"]["claimed"] is True
    assert event["fields"]["length_bytes"] == len(data)
    assert "job_id" not in event


def test_action_of_a_forged_line_is_kept_only_where_it_is_a_word() -> None:
    _, plain, _ = heard_by(stdout(), line(job_id=OTHER))
    _, talkative, _ = heard_by(stdout(), line(job_id=OTHER, action=SECRET))

    assert plain["fields"]["action"] == "worker_say"
    assert talkative["fields"]["action"] is None


def test_line_for_an_ended_job_is_diverted_without_its_text() -> None:
    heard = hear(Piece(0, token(job_id=JOB, attempt=1)), stdout({JOB: 1}), 7)

    assert heard.entry.otherwise is not None
    log_id, event = heard.entry.otherwise
    assert log_id == WORKER
    assert SECRET.encode() not in event.tail


def test_start_up_story_goes_to_the_job_the_worker_was_started_for() -> None:
    assert heard_by(stdout(started_for=JOB), line(job_id=JOB))[0] == JOB


def test_line_about_no_job_goes_to_the_worker() -> None:
    log_id, event, is_believed = heard_by(stdout({JOB: 1}), line())

    assert (log_id, event["kind"], is_believed) == (WORKER, "narration", True)


@pytest.mark.parametrize(
    "data",
    [
        b"ggml: loading",
        b"",
        b"\xff\xfe",
        b'{"v":2,"kind":"narration"}',
        line(job_id=JOB, seq=4),
        line(job_id=JOB, src={"id": "forged", "offset": 1}),
        line(job_id=JOB, observed_ts=1),
        b'{"v":1,"kind":"end","ts":1,"job_id":"' + JOB.encode() + b'","state":"completed"}',
        b'{"v":1,"kind":"state","ts":1,"job_id":"' + JOB.encode() + b'","state":"running"}',
        line(job_id=JOB)[:-1] + b',"x":"\xff"}',
        line(job_id=JOB)[:-1] + b',"x":1e999}',
    ],
    ids=[
        "a print",
        "an empty line",
        "no UTF-8",
        "another version",
        "a number",
        "a source",
        "a time of observation",
        "an end",
        "a state",
        "a field that is no UTF-8",
        "a number no reader can read",
    ],
)
def test_what_is_no_event_stays_with_the_worker_as_raw(data: bytes) -> None:
    log_id, event, is_believed = heard_by(stdout({JOB: 1}, JOB), data)

    assert (log_id, event["kind"], is_believed) == (WORKER, "raw", False)
    assert event["stream"] == "stdout"
    assert event["text"] == data.decode("utf-8", "replace")


def test_part_of_a_long_line_is_raw_however_it_begins() -> None:
    heard = hear(Piece(16384, line(job_id=JOB), part=2), stdout({JOB: 1}, JOB), 7)

    assert heard.entry.log_id == WORKER
    assert decoded(heard.entry.event)["part"] == 2


def test_stderr_is_raw_even_when_it_looks_like_an_event() -> None:
    speaker = Speaker(f"{WORKER}/stderr", WORKER, is_hive=False, placed={JOB: 1}, started_for=JOB)

    log_id, event, is_believed = heard_by(speaker, line(job_id=JOB))

    assert (log_id, event["kind"], event["stream"], is_believed) == (WORKER, "raw", "stderr", False)


def test_hive_speaks_of_a_job_it_was_handed() -> None:
    heard = hear(Piece(0, line(job_id=JOB)), hive_file(JOB), 7)

    assert heard.entry.log_id == JOB
    assert heard.entry.otherwise is not None
    assert heard.entry.otherwise[0] == HIVE


@pytest.mark.parametrize("job_id", [OTHER, WORKER, new_id("hive"), "job-x"], ids=["job", "worker", "hive", "junk"])
def test_hive_does_not_speak_of_what_it_was_not_handed(job_id: str) -> None:
    log_id, event, _ = heard_by(hive_file(JOB), line(job_id=job_id))

    assert (log_id, event["action"]) == (HIVE, "queen_refuse_line")


def test_hive_writes_no_tokens_into_a_job() -> None:
    assert heard_by(hive_file(JOB), token(job_id=JOB, attempt=1))[0] == HIVE


def test_hive_speaks_of_itself_in_its_own_log() -> None:
    log_id, event, _ = heard_by(hive_file(JOB), line())

    assert (log_id, event["message"]) == (HIVE, SECRET)


def test_lost_stretch_is_told_to_every_log_that_may_have_had_lines_in_it() -> None:
    entries = lost_stretch(stdout({JOB: 1}, OTHER), 64, 4096, 12, 7)

    assert [entry.log_id for entry in entries] == [WORKER, JOB, OTHER]
    gap = decoded(entries[0].event)
    assert (gap["kind"], gap["source"], gap["lost_bytes"], gap["lost_lines"]) == (
        "gap",
        f"{WORKER}/stdout",
        4096,
        12,
    )


@pytest.mark.parametrize(
    ("name", "is_fine"),
    [
        ("0f" * 16, True),
        ("", False),
        ("stdout", False),
        ("stderr", False),
        ("../x", False),
        ("a/b", False),
        ('a","job_id":"x', False),
        ("a\nb", False),
        ("x" * 65, False),
    ],
)
def test_hive_file_is_named_by_a_boot_id(name: str, is_fine: bool) -> None:
    assert is_file_of_hive(name) is is_fine
