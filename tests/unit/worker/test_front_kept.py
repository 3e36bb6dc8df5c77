"""Kept requests: answered at once, narrated piece by piece, ended by exactly one closing line."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from rbee.contracts.events import TOKEN_PREFIX, decode_source_line
from tests.unit.worker.worker_stage import (
    ASKED,
    CHAT,
    DONE,
    FINISH,
    HELLO,
    TIMINGS,
    WORKER_ID,
    Script,
    Stage,
    chat,
    data,
    stage,
)


async def post(worker: Stage, request_id: str = "job-a.2", *, keep: str = "1", **more: Any) -> int:
    """Post a kept request and return the status."""
    headers = {"x-request-id": request_id, "x-job-id": request_id.partition(".")[0], "x-rbee-keep": keep}
    body = {**ASKED, **more}
    async with worker.session.post(CHAT, json=body, headers={**headers, "x-correlation-id": "c"}) as response:
        await response.read()
        return int(response.status)


async def test_answer_is_narrated_frame_by_frame(tmp_path: Path) -> None:
    """One token line for each data frame, also without text; the closing line last."""
    reasoning = data({"choices": [{"index": 0, "delta": {"reasoning_content": "Hm"}}], "timings": TIMINGS})
    role = data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
    script = Script(parts=[role, reasoning, b": ping\n\n", *HELLO])
    async with stage(tmp_path, script) as worker:
        assert await post(worker) == 202
        closing = await worker.closing()
        tokens = worker.tokens()
        assert worker.lines() == [*tokens, closing]
        for line in worker.output.read_bytes().splitlines()[:-1]:
            assert line.startswith(TOKEN_PREFIX)
            assert decode_source_line(line) is not None
        assert worker.engine.asked == [{**ASKED, "stream": True, "timings_per_token": True}]
    assert [(line["text"], line["channel"], line["tokens"]) for line in tokens] == [
        ("", "answer", 0),
        ("Hm", "reasoning", 2),
        ("Hel", "answer", 2),
        ("lo", "answer", 2),
        ("", "answer", 2),
    ]
    assert set(tokens[0]) == {
        "v", "kind", "ts", "actor", "job_id", "correlation_id", "worker_id", "attempt", "text", "tokens", "channel"
    }  # fmt: skip
    ids = {name: tokens[0][name] for name in ("actor", "job_id", "correlation_id", "worker_id", "attempt")}
    assert ids == {
        "actor": "worker",
        "job_id": "job-a",
        "correlation_id": "c",
        "worker_id": WORKER_ID,
        "attempt": 2,
    }
    assert (closing["job_id"], closing["attempt"], closing["fields"]["frames"]) == ("job-a", 2, 5)
    assert closing["fields"]["outcome"] == "completed"


async def test_chunk_is_kept_beside_the_text_when_asked_for(tmp_path: Path) -> None:
    """The engine's JSON, without the timings that only the worker asked for; the last ones stay."""
    script = Script(parts=[chat("a", id="x", timings=TIMINGS), FINISH, DONE])
    async with stage(tmp_path, script) as worker:
        await post(worker, keep="chunk")
        await worker.closing()
        first, last = worker.tokens()
    assert first["chunk"] == {
        "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}],
        "id": "x",
    }
    assert last["chunk"]["timings"] == TIMINGS


async def test_timings_that_the_caller_asked_for_stay_in_every_chunk(tmp_path: Path) -> None:
    """They are the caller's then."""
    script = Script(parts=[chat("a", timings=TIMINGS), FINISH, DONE])
    async with stage(tmp_path, script) as worker:
        await post(worker, keep="chunk", timings_per_token=True)
        await worker.closing()
        assert [line["chunk"]["timings"] for line in worker.tokens()] == [TIMINGS, TIMINGS]


async def test_same_request_again_starts_nothing(tmp_path: Path) -> None:
    """While it runs and after it ended: 202, and the engine was asked once."""
    go_on = asyncio.Event()
    async with stage(tmp_path, Script(parts=[go_on, *HELLO])) as worker:
        assert [await post(worker), await post(worker)] == [202, 202]
        go_on.set()
        await worker.closing()
        assert await post(worker) == 202
        await worker.until(lambda: worker.desk.slots_used == 0)
        assert (len(worker.engine.asked), len(worker.closings())) == (1, 1)


async def test_delete_stops_a_kept_request(tmp_path: Path) -> None:
    """The engine is left, what was said stays, the end is told as cancelled; deleting again changes nothing."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never])) as worker:
        await post(worker)
        await worker.until(lambda: bool(worker.tokens()))
        for _ in range(2):
            async with worker.session.delete("/requests/job-a.2") as deleted:
                assert deleted.status == 202
                assert await deleted.json() == {"request_id": "job-a.2", "is_known": True}
        async with asyncio.timeout(10):
            await worker.engine.left.wait()
        closing = await worker.closing()
        assert (closing["fields"]["outcome"], closing["fields"]["frames"]) == ("cancelled", 1)
        assert closing["fields"]["completion_tokens"] == 1
        assert await post(worker) == 202
        assert len(worker.engine.asked) == 1


async def test_delete_before_the_request_is_remembered(tmp_path: Path) -> None:
    """The request is accepted and over: one closing line, the engine never asked."""
    async with stage(tmp_path) as worker:
        for _ in range(2):
            async with worker.session.delete("/requests/job-a.2") as deleted:
                assert deleted.status == 202
                assert await deleted.json() == {"request_id": "job-a.2", "is_known": False}
        assert [await post(worker), await post(worker)] == [202, 202]
        assert (await worker.closing())["fields"]["outcome"] == "cancelled"
        assert worker.engine.asked == []


async def test_caller_that_leaves_changes_nothing(tmp_path: Path) -> None:
    """Nobody has to wait for a kept answer."""
    go_on = asyncio.Event()
    async with stage(tmp_path, Script(parts=[go_on, *HELLO])) as worker:
        await post(worker)
        await worker.session.close()
        go_on.set()
        assert (await worker.closing())["fields"]["outcome"] == "completed"


async def test_token_line_that_cannot_be_written_fails_the_request(tmp_path: Path) -> None:
    """A full disk under the worker's output: the engine is left, the end is told as failed."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never]), sink_path="/dev/full") as worker:
        await post(worker)
        async with asyncio.timeout(10):
            await worker.engine.left.wait()
        fields = (await worker.closing())["fields"]
    assert (fields["outcome"], fields["frames"]) == ("failed", 0)
    assert fields["error"]["code"] == "storage_full"


async def test_frame_over_the_bound_of_a_line_fails_the_request(tmp_path: Path) -> None:
    """A token line has 1 MiB at most; nothing is cut."""
    async with stage(tmp_path, Script(parts=[chat("a" * 1024 * 1024), FINISH, DONE])) as worker:
        await post(worker)
        fields = (await worker.closing())["fields"]
        assert (fields["outcome"], fields["error"]["code"]) == ("failed", "worker_failed")
        assert worker.tokens() == []


async def test_engine_that_breaks_off_fails_the_request(tmp_path: Path) -> None:
    """An answer without its end is not completed."""
    async with stage(tmp_path, Script(parts=[chat("a")])) as worker:
        await post(worker)
        fields = (await worker.closing())["fields"]
        assert (fields["outcome"], fields["frames"]) == ("failed", 1)


async def test_two_requests_speak_each_in_its_own_name(tmp_path: Path) -> None:
    """Interleaved answers: every line has the ids of its own job."""
    go_on = asyncio.Event()
    scripts = [Script(parts=[chat("a"), go_on, chat("a"), FINISH, DONE]) for _ in range(2)]
    async with stage(tmp_path, *scripts, slots=2) as worker:
        await post(worker, "job-a.1")
        await post(worker, "job-b.1")
        await worker.until(lambda: len(worker.tokens()) == 2)
        go_on.set()
        await worker.until(lambda: len(worker.closings()) == 2)
        lines = worker.lines()
    for job_id in ("job-a", "job-b"):
        kinds = [line["kind"] for line in lines if line["job_id"] == job_id]
        assert kinds == ["token", "token", "token", "narration"]


async def test_drain_fails_what_does_not_end_in_time(tmp_path: Path) -> None:
    """The closing line says that the worker was stopped, so that the job can go elsewhere."""
    never = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), never])) as worker:
        await post(worker)
        await worker.until(lambda: bool(worker.tokens()))
        await worker.desk.drain(0.0)
        fields = (await worker.closing())["fields"]
        assert (fields["outcome"], fields["error"]["code"]) == ("failed", "worker_lost")
        assert fields["error"]["retryable"] is True
        assert await post(worker, "job-b.1") == 503
        async with worker.session.get("/readyz") as response:
            assert response.status == 503


async def test_drain_lets_an_answer_end(tmp_path: Path) -> None:
    """What is nearly done is not thrown away."""
    go_on = asyncio.Event()
    async with stage(tmp_path, Script(parts=[chat("a"), go_on, FINISH, DONE])) as worker:
        await post(worker)
        await worker.until(lambda: bool(worker.tokens()))
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.desk.drain(10.0))
            go_on.set()
        assert (await worker.closing())["fields"]["outcome"] == "completed"
