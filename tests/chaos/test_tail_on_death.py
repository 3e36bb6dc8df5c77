"""Whatever a worker dies of, everything it wrote before stands in the logs, and how it died."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rbee.client import JobClient
from rbee.processes import find_marked
from rbee.testing.counting import Act, Behaviour, Count, behave
from rbee.testing.counting.acts import EXIT_CODE, FORGED, TAIL_LINE_BYTES, TAIL_LINES
from rbee.testing.oracles import assert_all
from rbee.testing.reader import LogReader
from tests.chaos.conftest import Size
from tests.chaos.counting_stack import counting_stack, infer, model, pid_of_worker, told, worker_log

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
        assert error["last_lines"][-1].startswith(f"tail {act} {TAIL_LINES - 1} ")
        assert Counter(event.get("action") for event in events)["worker_exit"] == 1
    assert find_marked("RBEE_WORKER_ID", tokens[0]["worker_id"]) == [], f"{act} left something behind"
    return reader.arrived_s[reader.last_seq] - reader.arrived_s[tokens[-1]["seq"]]


def _check_worker_log(log: list[dict[str, Any]], act: Act) -> None:
    tail = [event["text"] for event in log if event["kind"] == "raw" and event["text"].startswith("tail ")]
    assert [line.partition(" .")[0] for line in tail] == [f"tail {act} {number}" for number in range(TAIL_LINES)]
    assert {len(line) for line in tail} == {TAIL_LINE_BYTES}
    fields = log[-1]["fields"]
    assert {name: fields[name] for name in ENDINGS[act]} == ENDINGS[act], act


async def test_chatter_and_forged_lines_leave_every_answer_as_it_is(tmp_path: Path) -> None:
    """What is no event, and what claims another's job, goes to the worker's log; both answers are right."""
    attacked = Count(first=10_000, rate=40)
    path, other = model(tmp_path), model(tmp_path, "other")
    async with counting_stack(tmp_path) as stack, stack.client() as client, asyncio.TaskGroup() as group:
        reader = LogReader((await client.submit(infer(other, attacked, max_tokens=120))).job_id)
        group.create_task(reader.follow(stack.url))
        await stack.until(lambda: bool(reader.last_token))
        acts: dict[int, Act] = {505: "chatter", 510: "forge", 515: "chatter", 520: "forge"}
        count = Count(first=500, rate=200, acts=acts, claims=reader.job_id)
        job_id = (await client.submit(infer(path, count, max_tokens=50))).job_id
        ended = [await told(client, job_id, count, 50), await told(client, reader.job_id, attacked, 120)]
        assert_all(ended, [reader])
        assert [one.view.state for one in ended] == ["completed"] * 2
        assert not any(FORGED.encode() in event for one in ended for event in one.log)
        worker_id = next(worker.worker_id for worker in await client.workers() if worker.model == str(path))
        pid = pid_of_worker(worker_id)
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)  # it has to hear that it is to end all the same
        await stack.keeper("workers", "stop", worker_id)
        log = await worker_log(client, worker_id)
    assert log[-1]["fields"]["exit_code"] == 0
    raw = [event["text"] for event in log if event["kind"] == "raw"]
    assert [raw.count(text) for text in ("plain chatter", "data: [DONE]")] == [2, 2]
    assert sum(event["kind"] == "raw" and event.get("part") == 1 for event in log) == 2
    refused = [event["fields"] for event in log if event.get("action") == "queen_refuse_line"]
    assert [fields["action"] for fields in refused] == [None, "queen_complete", "worker_inference"] * 2
    assert FORGED not in str([event for event in log if event["kind"] != "raw"])
