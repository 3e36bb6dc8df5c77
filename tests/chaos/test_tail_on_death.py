"""Whatever a worker dies of, everything it wrote before stands in the logs, and how it died."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.client import JobClient
from rbee.processes import find_marked
from rbee.testing.counting import Act, Behaviour, Count, behave
from rbee.testing.counting.acts import EXIT_CODE, FORGED, TAIL_LINES
from rbee.testing.oracles import assert_all
from rbee.testing.reader import LogReader
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import counting_stack, infer, model, told, worker_log

ENDINGS: dict[Act, dict[str, Any]] = {
    "sigkill": {"signal": "SIGKILL"},
    "abort": {"signal": "SIGABRT"},
    "segfault": {"signal": "SIGSEGV"},
    "exit": {"exit_code": EXIT_CODE},
    "exception": {"exit_code": 1},
    "orphan": {"signal": "SIGKILL"},
}
END_WITHIN_S = 9.0  # three times the promise


@pytest.mark.timeout(1800)
async def test_everything_written_before_a_death_is_told_and_then_the_end(
    tmp_path: Path, size: Size, seed: int, figure: Callable[[str, object], None]
) -> None:
    """Each kind of death, in the middle of an answer: its tokens, its last words, its exit, and no more."""
    choose, rounds = random.Random(seed), size.of(1, 33)
    models = {act: model(tmp_path, act) for act in ENDINGS}
    for path in models.values():
        behave(path, Behaviour(rate=200))
    ends_s: list[float] = []
    async with counting_stack(tmp_path) as stack, stack.client() as client:
        for number in range(rounds):
            jobs = {
                act: Count(
                    first=(first := 10_000 * number + 1000 * index), acts={first + choose.randrange(60): act}
                )
                for index, act in enumerate(ENDINGS, 1)
            }
            ends_s += await asyncio.gather(*(_die(client, models[act], act, count) for act, count in jobs.items()))
    figure("workers that died", len(ends_s))
    figure("last token to end, p50 / max", f"{sorted(ends_s)[len(ends_s) // 2]:.2f} / {max(ends_s):.2f} s")
    assert max(ends_s) < END_WITHIN_S


async def _die(client: JobClient, path: Path, act: Act, count: Count) -> float:
    """Have one worker die and check what is told of it; returns how long the end took."""
    job_id = (await client.submit(infer(path, count, max_tokens=100, attempts=1))).job_id
    reader = LogReader(job_id)
    async with asyncio.timeout(60):
        await reader.follow(client.base_url)
    one = await told(client, job_id, count, max_tokens=100)
    assert_all([one], [reader])
    events = one.events()
    tokens = [event for event in events if event["kind"] == "token"]
    (last,) = count.acts
    assert tokens[-1]["text"] == count.token(last), f"{act}: the last token is {tokens[-1]}, not {last}"
    assert (one.view.state, one.view.reason) == ("failed", "worker_lost"), act
    log = await worker_log(client, tokens[0]["worker_id"])
    _check_worker_log(log, act)
    if act != "exception":  # it says goodbye, and that is what ends the job
        error = events[-1]["error"]
        assert {name: error[name] for name in ENDINGS[act]} == ENDINGS[act], act
        assert error["last_lines"][-1] == f"tail {act} {TAIL_LINES - 1}"
        assert Counter(event.get("action") for event in events)["worker_exit"] == 1
    assert find_marked("RBEE_WORKER_ID", tokens[0]["worker_id"]) == [], f"{act} left something behind"
    return reader.arrived_s[reader.last_seq] - reader.arrived_s[tokens[-1]["seq"]]


def _check_worker_log(log: list[dict[str, Any]], act: Act) -> None:
    tail = [event["text"] for event in log if event["kind"] == "raw" and event["text"].startswith("tail ")]
    assert tail == [f"tail {act} {number}" for number in range(TAIL_LINES)]
    fields = log[-1]["fields"]
    assert {name: fields[name] for name in ENDINGS[act]} == ENDINGS[act], act


async def test_chatter_and_forged_lines_leave_the_answer_as_it_is(tmp_path: Path) -> None:
    """What is no event, and what claims another job, goes to the worker's log; the answer beside it is right."""
    count = Count(first=500, acts={505: "chatter", 510: "forge", 515: "chatter", 520: "forge"})
    path = model(tmp_path)
    behave(path, Behaviour(rate=200))
    async with counting_stack(tmp_path) as stack, stack.client() as client:
        job_id = (await client.submit(infer(path, count, max_tokens=50))).job_id
        one = await told(client, job_id, count, max_tokens=50)
        assert_all([one], [])
        assert one.view.state == "completed"
        assert not any(FORGED.encode() in event for event in one.log)
        (worker,) = await client.workers()
        await stack.keeper("workers", "stop", worker.worker_id)
        log = await worker_log(client, worker.worker_id)
    raw = [event["text"] for event in log if event["kind"] == "raw" and event["stream"] == "stderr"]
    assert raw.count("plain chatter") == 2
    assert sum(event["kind"] == "raw" and event.get("part") == 1 for event in log) == 2
    assert "data: [DONE]" in [event["text"] for event in log if event["kind"] == "raw"]
    assert not any(FORGED in str(event) for event in log if event["kind"] in {"token", "end"})
