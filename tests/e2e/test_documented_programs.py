"""The programs in the how-to guides run as they stand there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rbee.testing import LocalStack

GUIDES = Path(__file__).parents[2] / "docs" / "how-to"
LINES_MAX = 30


def programs(guide: str) -> list[str]:
    """Return the programs that stand in a guide."""
    return re.findall(r"^```python\n(.*?)^```$", (GUIDES / guide).read_text("utf-8"), re.DOTALL | re.MULTILINE)


PROGRAMS = [*programs("follow-jobs-from-python.md"), *programs("keep-jobs-in-a-file.md")]
OPENAI, ANTHROPIC, BACKGROUND = programs("use-openai-and-anthropic-clients.md")


async def run(program: str, *arguments: str, env: dict[str, str]) -> tuple[str, list[str]]:
    """Run a program; returns its answer and the lines of its story."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-X", "dev", "-W", "error", "-c", program, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
    )
    try:
        async with asyncio.timeout(90):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, err.decode()
    # In development mode asyncio tells which step took long: that is the machine's, not the program's.
    return out.decode(), [line for line in err.decode().splitlines() if not line.startswith("Executing <")]


@pytest.mark.parametrize(
    "program",
    [*PROGRAMS, OPENAI, ANTHROPIC, BACKGROUND],
    ids=["sync", "async", "own", "openai", "anthropic", "background"],
)
def test_documented_program_is_short(program: str) -> None:
    """Somebody reads it from top to bottom."""
    assert len(program.splitlines()) <= LINES_MAX


async def test_program_without_an_event_loop_prints_answer_and_story(rbee_stack: LocalStack) -> None:
    """The answer is the job's, the story ends with its end."""
    out, told = await run(PROGRAMS[0], env={**rbee_stack.env, "RBEE_QUEEN_URL": rbee_stack.url})
    async with rbee_stack.client() as client:
        (job,) = (await client.jobs(operation="infer")).data
        assert job.result is not None
    assert out == job.result["text"] + "\n"
    assert told[0].startswith("queen: ")
    assert told[-1] == f"{job.job_id} completed (ok)"


async def test_program_with_an_event_loop_prints_both_answers(rbee_stack: LocalStack) -> None:
    """Each once, and nothing else."""
    out, told = await run(PROGRAMS[1], env={**rbee_stack.env, "RBEE_QUEEN_URL": rbee_stack.url})
    async with rbee_stack.client() as client:
        jobs = (await client.jobs(operation="infer")).data
        results = [job.result["text"] for job in jobs if job.result is not None]
    assert len(jobs) == 2
    assert all(f"{text}\n" in out for text in results)
    assert len(out) == sum(len(text) + 1 for text in results)
    assert told == []


async def test_program_of_openais_client_prints_what_is_done_and_the_answer(rbee_stack: LocalStack) -> None:
    """Each sentence in parentheses, before the answer."""
    out, told = await run(OPENAI, env={**rbee_stack.env, "RBEE_QUEEN_URL": rbee_stack.url})
    assert told == []
    lines = out.splitlines()
    assert lines[0] == "(Accepted: /v1/chat/completions of smollm2:135m.)"
    answer = "\n".join(line for line in lines if not line.startswith("("))
    assert answer.strip()


async def test_program_of_anthropics_client_prints_the_answer(rbee_stack: LocalStack) -> None:
    """As a call of its own."""
    out, told = await run(ANTHROPIC, env={**rbee_stack.env, "RBEE_QUEEN_URL": rbee_stack.url})
    async with rbee_stack.client() as client:
        (job,) = (await client.jobs(operation="message")).data
    assert (job.state, told) == ("completed", [])
    assert out.strip()


async def test_program_that_asks_in_the_background_prints_the_answer(rbee_stack: LocalStack) -> None:
    """Read again when it is there."""
    out, told = await run(BACKGROUND, env={**rbee_stack.env, "RBEE_QUEEN_URL": rbee_stack.url})
    async with rbee_stack.client() as client:
        (job,) = (await client.jobs(operation="response")).data
    assert (job.state, told) == ("completed", [])
    assert job.result is not None
    assert out == job.result["text"] + "\n"


async def test_program_with_jobs_of_its_own_tells_their_story(tmp_path: Path) -> None:
    """The second run finds the file of the first."""
    for _ in range(2):
        out, told = await run(PROGRAMS[2], str(tmp_path / "jobs.db"), env=dict(os.environ))
        result, *lines = out.splitlines()
        assert (result, told) == ('{"bytes":1000}', [])
        events = [json.loads(line) for line in lines]
        assert [event.get("action") or event["kind"] for event in events] == [
            *("state", "state", "resizer_begin", "resizer_complete", "end")
        ]
        assert [event["seq"] for event in events] == [1, 2, 3, 4, 5]
