"""Bad input: a clear error with the right status and exit code, and nothing left behind."""

from __future__ import annotations

import io
import json
import socket
from typing import Any

import aiohttp
import pytest

from rbee.testing import LocalStack
from tests.e2e.reading import actions, infer

REFUSED: list[tuple[dict[str, Any] | bytes, int, str, str]] = [
    ({"operation": "infer", "prompt": "x", "model": "smolm2:135m"}, 404, "model_not_found", "smollm2:135m"),
    ({"operation": "infer", "prompt": "  "}, 400, "invalid", "prompt is empty"),
    ({"operation": "infer"}, 400, "invalid", "prompt"),
    ({"operation": "infer", "prompt": "x", "max_tokens": "7"}, 400, "invalid", "$.max_tokens"),
    ({"operation": "infer", "prompt": "x", "modle": "y"}, 400, "invalid", "did you mean `model`"),
    ({"operation": "inferr", "prompt": "x"}, 400, "invalid", "did you mean `infer`"),
    ({"operation": "infer", "prompt": "x", "attempts": 0}, 400, "invalid", "attempts"),
    (b"{not json", 400, "invalid", "not JSON"),
    ({"operation": "infer", "prompt": "x" * 10_000_000}, 413, "payload_too_large", "8388608"),
]


async def test_wrong_requests_are_refused_without_a_job() -> None:
    """What the request alone shows to be wrong is answered at once, by path and nearest name."""
    async with LocalStack(with_hive=False) as stack, aiohttp.ClientSession(stack.url) as session:
        for body, status, code, said in REFUSED:
            data = io.BytesIO(body if isinstance(body, bytes) else json.dumps(body).encode())
            headers = {"content-type": "application/json"}
            async with session.post("/v1/jobs", headers=headers, data=data) as answer:
                told = (await answer.json())["error"]
                assert (answer.status, told["code"]) == (status, code), told
                assert said in told["message"] + str(told["param"])
                assert told["remedy"]
        async with session.get("/v1/jobs") as answer:
            assert (await answer.json())["data"] == []
        async with session.get("/v1/jobs/job-01m85nq67zzgxpbrn6bvp5hze5") as answer:
            assert answer.status == 404
        async with session.get("/v1/jobs", params={"state": "idle"}) as answer:
            assert answer.status == 400


async def test_prompt_longer_than_the_context_fails_with_both_numbers(rbee_stack: LocalStack) -> None:
    """Only trying tells that a prompt is too long: the job says how long, and how much there is."""
    events = await rbee_stack.run_job(infer("word " * 6000))
    end = events[-1]
    assert (end["state"], end["reason"]) == ("failed", "invalid")
    assert end["error"]["code"] == "context_length_exceeded"
    assert "4096" in end["error"]["message"]
    assert actions(events)[-2:] == ["worker_inference", "queen_failed"]


async def test_keeper_says_what_was_wrong_and_exits_so() -> None:
    """Exit codes: 2 for a wrong request, 1 for a failed job; the sentence and the remedy on stderr."""
    async with LocalStack(with_hive=False, env={"RBEE_HIVE_TIMEOUT_S": "1"}) as stack:
        unknown = await stack.keeper("infer", "-m", "no-such-model", "Hi")
        empty = await stack.keeper("infer", "")
        from_nothing = await stack.keeper("infer", stdin="")
        no_hive = await stack.keeper("infer", "Hi")
        no_job = await stack.keeper("jobs", "show", "job-01m85nq67zzgxpbrn6bvp5hze5")
        wrong_flag = await stack.keeper("infer", "--temprature", "1", "Hi")
    assert unknown.exit_code == 2
    assert "no-such-model" in unknown.stderr
    assert empty.exit_code == from_nothing.exit_code == wrong_flag.exit_code == 2
    assert no_hive.exit_code == 1
    assert "no hive" in no_hive.stderr.lower()
    assert no_job.exit_code == 2
    assert [ran.stdout for ran in (unknown, empty, from_nothing, no_hive, no_job)] == [""] * 5


@pytest.mark.parametrize("program", ["queen-rbee", "rbee-hive"])
async def test_port_in_use_ends_the_program_with_three(program: str) -> None:
    """A port that was asked for and is taken is an error that names it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with LocalStack(with_hive=False) as stack:
            ran = await stack.program(program, "--port", str(port), "--home", str(stack.home / "second"))
    assert ran.exit_code == 3
    assert str(port) in ran.stderr


async def test_second_queen_on_one_home_is_refused() -> None:
    """One home, one queen: the second one says so and ends."""
    async with LocalStack(with_hive=False) as stack:
        ran = await stack.program("queen-rbee", "--port", "0")
        events = await stack.run_job({"operation": "queen_check"})
    assert ran.exit_code == 3
    assert "Another queen" in ran.stderr
    assert events[-1]["state"] == "completed"


async def test_unknown_setting_is_refused_with_the_nearest_name() -> None:
    """A misspelt key of rbee.toml is named, with the one that was probably meant."""
    async with LocalStack(with_hive=False) as stack:
        second = stack.home / "second"
        second.mkdir()
        (second / "rbee.toml").write_text("[queen]\nstal_s = 3\n")
        ran = await stack.program("queen-rbee", "--port", "0", "--home", str(second))
    assert ran.exit_code == 2
    assert "stall_s" in ran.stderr
