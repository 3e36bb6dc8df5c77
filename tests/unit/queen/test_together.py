"""Lines decided together end exactly where each of them ends when it is decided alone, byte for byte."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rbee.contracts.events import decode_plain_lines, decode_source_line
from rbee.contracts.ids import new_id
from rbee.contracts.operations import QueenCheck
from rbee.contracts.states import JobState, Reason
from rbee.jobs.records import Run
from rbee.queen import ingest
from rbee.queen.claims import Speaker, hear_together
from tests.unit.queen.queen_stage import closing, narration, parts, stretch, token

WORKER, HIVE = new_id("worker"), new_id("hive")
JOB, OTHER, ENDED, FOREIGN = (new_id("job") for _ in range(4))
PREFIX = b'{"v":1,"kind":"token","ts":5,'

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
jobs = st.sampled_from([JOB, OTHER, ENDED, FOREIGN, "", "x"])
good = st.one_of(
    st.builds(token, jobs, st.sampled_from([1, 2]), texts),
    st.builds(
        lambda job_id, text: token(job_id, worker_id=WORKER, text=text, chunk={"a": [text, 1.5]}), jobs, texts
    ),
    st.builds(lambda job_id, text: narration(message=text, job_id=job_id, fields={text: text}), jobs, texts),
    st.builds(lambda job_id: narration(job_id=job_id, attempt=1, level="error", worker_id=WORKER), jobs),
    st.builds(closing, jobs),
    texts.map(lambda text: narration(message=text)),
)
odd = st.sampled_from(
    [
        b"\n",
        b"{}\n",
        b"Loading tensors ...\n",
        b"\xff\xfe\n",
        token(JOB).replace(b'"x"', b'"\xff"'),
        token(JOB).replace(b'"x"', b'"\\ud800"'),
        token(JOB).replace(b'"x"', b'"a\rb"'),
        token(JOB).replace(b'"x"', b"null"),
        token(JOB).replace(b'"x"', b'"\x01"'),
        token(JOB)[:-2] + b"\n",
        token(JOB)[:-2] + b',"seq":9}\n',
        token(JOB)[:-2] + b',"src":{"id":"x","offset":0}}\n',
        token(JOB)[:-2] + b',"observed_ts":null}\n',
        token(JOB)[:-2] + b',"kind":"narration"}\n',
        token(JOB)[:-2] + b',"k\\u0069nd":"narration","actor":"a","action":"b","message":"c"}\n',
        token(JOB)[:-2] + b',"kind":"end"}\n',
        token(JOB)[:-2] + b',"v":2}\n',
        token(JOB)[:-2] + b',"v":1}\n',
        token(JOB)[:-2] + b',"job_id":"%b"}\n' % FOREIGN.encode(),
        token(FOREIGN)[:-2] + b',"job_id":"%b"}\n' % JOB.encode(),
        token(JOB)[:-2] + b',"attempt":2}\n',
        token(JOB)[:-2] + b',"attempt":1.0}\n',
        token(JOB)[:-2] + b',"unknown":[1,{"a":"\xff"}]}\n',
        token(JOB)[:-2] + b',"unknown":1e999}\n',
        token(JOB)[:-2] + b',"chunk":1e999}\n',
        token(JOB)[:-2] + b',"chunk":{"a":"\xff"}}\n',
        token(JOB)[:-2] + b',"chunk":%b}\n' % (b"[" * 5000 + b"]" * 5000),
        token(JOB)[:-2] + b',"worker_id":7}\n',
        token(JOB)[:-1] + b" \n",
        token(JOB)[:-1] + b"{}\n",
        b" " + token(JOB),
        token(JOB, ts=-1),
        token(JOB, ts=2**63),
        token(JOB, level="loud"),
        token(JOB, text="t" * 20_000),
        narration(action="", job_id=JOB),
        narration(actor="", job_id=JOB),
        narration(job_id=JOB).replace(b'"Something"', b"null"),
        narration(job_id=JOB, fields={"a": {"b": [None, True, -1.5e3]}}),
        narration(job_id=JOB, fields=[1]),
        narration(job_id=JOB, message="m" * 17_000),
        narration(job_id=JOB)[:-2] + b',"fields":{"a":"\xff"}}\n',
        narration("worker_exit", job_id=JOB, worker_id=WORKER),
        narration(job_id=JOB).replace(b"narration", b"narrati\\u006fn"),
        PREFIX.replace(b'"ts"', b'"kind":"narration","ts"')
        + b'"text":"x","job_id":"%b","attempt":1}\n' % JOB.encode(),
        msgspec.json.encode({"v": 1, "kind": "end", "ts": 5, "job_id": JOB}) + b"\n",
        msgspec.json.encode({"kind": "token", "v": 1, "ts": 5, "text": "x", "job_id": JOB, "attempt": 1}) + b"\n",
    ]
)
files = st.lists(st.one_of(good, good, good, odd), min_size=1, max_size=40).map(b"".join)


async def _logs(data: bytes, cut: int) -> dict[str, list[bytes]]:
    """Bring a file in two batches; return every log, with what alone differs from run to run taken out."""
    async with parts() as queen:
        for job_id in (JOB, OTHER, ENDED, FOREIGN):
            await queen.registry.create(QueenCheck(), correlation_id="c", job_id=job_id)
        await queen.workers.add(WORKER, HIVE, "m", OTHER, list)
        for job_id in (JOB, OTHER, ENDED):
            queen.workers.place(job_id, WORKER, HIVE, 1)
        await queen.registry.end(ENDED, JobState.FAILED, reason=Reason.USER, message="")
        border = data.rfind(b"\n", 0, cut) + 1
        for start, end in ((0, border), (border, len(data))):
            await queen.ingest.take(HIVE, stretch(f"{WORKER}/stdout", start, data[start:end]))
        logs = {}
        for log_id in (WORKER, HIVE, JOB, OTHER, ENDED, FOREIGN):
            page = await queen.registry.store.read_log(log_id, 0, 10_000)
            logs[log_id] = [] if page is None else [event for event in page.events if b'"src"' in event]
        return logs


@given(files, st.integers(0, 4000))
@settings(max_examples=150, deadline=None)
def test_file_gives_the_same_logs_decided_together_and_one_by_one(data: bytes, cut: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: 7)
        together = asyncio.run(_logs(data, cut))
        patch.setattr(ingest, "hear_together", lambda *_: None)
        assert together == asyncio.run(_logs(data, cut))


@given(st.one_of(good, odd))
@settings(max_examples=300, deadline=None)
def test_line_that_is_read_at_once_is_read_the_same_with_care(line: bytes) -> None:
    at_once = decode_plain_lines([line[:-1]])
    if at_once is not None and b"\r" not in line:
        with_care = decode_source_line(line[:-1])
        assert with_care is not None
        assert [getattr(at_once[0], name) for name in FIELDS] == [getattr(with_care, name) for name in FIELDS]


FIELDS = ("kind", "ts", "actor", "action", "message", "level", "text", "tokens", "attempt", "job_id", "fields")


@pytest.mark.parametrize("make", [token, closing, lambda job_id: narration(job_id=job_id, fields={"step": 1})])
def test_lines_of_workers_are_decided_together(make: Callable[[str], bytes]) -> None:
    speaker = Speaker(f"{WORKER}/stdout", WORKER, is_hive=False, placed={JOB: 1, OTHER: 1})
    lines = [make(name)[:-1] for name in (JOB, OTHER, JOB)]
    chorus = hear_together(lines, [100, 200, 300], speaker, 7)
    assert chorus is not None
    assert [(run.log_id, run.lines.offsets) for run in chorus.runs] == [(JOB, [100, 300]), (OTHER, [200])]
    assert all(isinstance(run, Run) for run in chorus.runs)
    assert hear_together([make(JOB)[:-1], make(FOREIGN)[:-1]], [100, 200], speaker, 7) is None
